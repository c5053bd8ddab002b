"""``result_or_202``: one url that starts a job, tells how it stands, and has its result."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Blueprint, Flask, render_template_string, request
from flask.testing import FlaskClient
from werkzeug.exceptions import HTTPException
from werkzeug.test import TestResponse

from flask_executor import Executor, StoreUnavailable, current_job, job_finished
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until
from flask_executor.web import Controller

DOCUMENT = "application/vnd.flask-executor.job+json"
PAGE = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
POLL = {"Accept": f"text/event-stream, {DOCUMENT};q=0.9"}
THREADED = {"wsgi.multithread": True}


class Gate:
    """A job that goes on when it is told to."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.calls = 0
        self.error: Exception | None = None

    def __call__(self, value: Any = "the report") -> Any:
        self.calls += 1
        current_job.update(progress=0.25, message="page 1 of 4")
        while not self.open.wait(0.01):
            current_job.checkpoint()
        if self.error is not None:
            raise self.error
        return value


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture(params=["memory", "sqlite"])
def executor(make_executor: MakeExecutor, request: pytest.FixtureRequest) -> Executor:
    return make_executor(max_workers=4, store=request.param)


@pytest.fixture
def views(app: Flask, executor: Executor, gate: Gate) -> list[str]:
    """The app's views; what they have done beyond waiting."""
    seen: list[str] = []

    @app.errorhandler(Exception)
    def error(error: Exception) -> tuple[str, int]:
        return f"the app's own page for {error!r}", 418

    @app.route("/report", methods=["GET", "POST"])
    def report() -> str:
        result = executor.result_or_202("report", gate)
        seen.append(request.method)
        return f"<h1>{result}</h1>"

    return seen


@pytest.fixture
def client(app: Flask, views: list[str]) -> FlaskClient:
    return app.test_client()


def events(answer: TestResponse) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


def token_of(answer: TestResponse) -> str:
    return answer.text.split('name="token" value="')[1].split('"')[0]


def running(executor: Executor, key: str = "report") -> bool:
    job = executor.jobs.find(key)
    return job is not None and job.progress == 0.25


def test_browsers_get_a_page_until_the_result_is_there(
    client: FlaskClient, executor: Executor, gate: Gate, views: list[str]
) -> None:
    client.get("/report", headers=PAGE)
    assert wait_until(lambda: running(executor))
    answer = client.get("/report", headers=PAGE)
    assert (answer.status_code, answer.mimetype) == (202, "text/html")
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Accept" in answer.headers["Vary"]
    assert 'value="0.25"' in answer.text
    assert "page 1 of 4" in answer.text
    assert '<noscript><meta http-equiv="refresh"' in answer.text
    assert views == []
    gate.open.set()
    drain(executor)
    for _ in range(2):
        assert client.get("/report", headers=PAGE).text == "<h1>the report</h1>"
    assert gate.calls == 1
    assert views == ["GET", "GET"]


def test_no_inline_script_or_style(client: FlaskClient) -> None:
    page = client.get("/report", headers=PAGE).text
    assert "<style" not in page
    assert " style=" not in page
    assert " onclick" not in page
    assert "<script>" not in page
    assert "http://" not in page.replace("http://localhost", "")
    for name in "executor.css", "job.js", "dashboard.js":
        with client.get(f"/_executor/{name}") as answer:
            assert answer.status_code == 200


@pytest.mark.parametrize("accept", ["application/json", "*/*", None])
def test_other_clients_get_a_document_until_the_result_is_there(
    client: FlaskClient, executor: Executor, gate: Gate, accept: str | None
) -> None:
    headers = {} if accept is None else {"Accept": accept}
    client.get("/report", headers=headers)
    assert wait_until(lambda: running(executor))
    answer = client.get("/report", headers=headers)
    document = answer.json
    assert document is not None
    assert (answer.status_code, answer.mimetype) == (202, "application/json")
    assert (document["status"], document["progress"], document["message"]) == ("running", 0.25, "page 1 of 4")
    assert (document["name"], document["key"], document["ended"]) == ("Gate", "report", False)
    assert int(answer.headers["Retry-After"]) >= 1
    unchanged = client.get("/report", headers={**headers, "If-None-Match": answer.headers["ETag"]})
    assert (unchanged.status_code, unchanged.data) == (304, b"")
    gate.open.set()
    drain(executor)
    assert client.get("/report", headers=headers).text == "<h1>the report</h1>"


def test_prefer_wait_holds_the_answer_back(client: FlaskClient, executor: Executor, gate: Gate) -> None:
    client.get("/report")
    assert wait_until(lambda: running(executor))
    threading.Timer(0.2, gate.open.set).start()
    answer = client.get("/report", headers={"Prefer": "respond-async, wait=20"}, environ_overrides=THREADED)
    assert answer.text == "<h1>the report</h1>"


def test_a_page_that_asks_never_runs_the_view(
    client: FlaskClient, executor: Executor, gate: Gate, views: list[str]
) -> None:
    answer = client.get("/report", headers=POLL)
    assert (answer.status_code, answer.mimetype) == (200, DOCUMENT), "a server without threads has no streams"
    gate.open.set()
    drain(executor)
    answer = client.get("/report", headers=POLL)
    assert answer.mimetype == DOCUMENT
    assert answer.json is not None
    assert answer.json["status"] == "succeeded"
    streamed = client.get("/report", headers=POLL, environ_overrides=THREADED)
    assert streamed.mimetype == "text/event-stream"
    assert [event["status"] for event in events(streamed)] == ["succeeded"]
    assert views == []


def test_an_event_stream_tells_all_until_the_end(client: FlaskClient, executor: Executor, gate: Gate) -> None:
    client.get("/report")
    assert wait_until(lambda: running(executor))
    threading.Timer(0.3, gate.open.set).start()
    answer = client.get("/report", headers=POLL, environ_overrides=THREADED)
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Accel-Buffering"] == "no"
    first, *_, last = events(answer)
    assert (first["status"], first["progress"]) == ("running", 0.25)
    assert (last["status"], last["ended"]) == ("succeeded", True)
    last_id = [line[4:] for line in answer.text.splitlines() if line.startswith("id: ")][-1]
    resumed = client.get("/report", headers={**POLL, "Last-Event-ID": last_id}, environ_overrides=THREADED)
    assert resumed.status_code == 204, "there will be no news: a client that follows the standard asks no more"


def test_a_client_that_takes_streams_only(client: FlaskClient, gate: Gate) -> None:
    answer = client.get("/report", headers={"Accept": "text/event-stream"})
    assert (answer.status_code, answer.mimetype) == (503, "application/problem+json")
    assert answer.headers["Retry-After"] == "2"


def test_head(client: FlaskClient, executor: Executor, gate: Gate) -> None:
    answer = client.head("/report", headers=POLL, environ_overrides=THREADED)
    assert (answer.status_code, answer.data) == (200, b"")
    assert client.head("/report", headers=PAGE).status_code == 202


@pytest.mark.parametrize("in_flow", [True, False])
def test_a_view_that_waits_for_one_job_after_the_other(app: Flask, executor: Executor, in_flow: bool) -> None:
    gates = [Gate(), Gate()]

    @app.get("/two")
    def two() -> str:
        if in_flow:
            flow = executor.flow("two")
            first, second = flow.result_or_202(gates[0], "a"), flow.result_or_202(gates[1], "b")
        else:
            first, second = executor.result_or_202("a", gates[0], "a"), executor.result_or_202("b", gates[1], "b")
        return f"{first}{second}"

    client = app.test_client()

    def shown() -> str:
        return client.get("/two", headers=PAGE).text.split('data-executor-id="')[1].split('"')[0]

    def told(id: str) -> tuple[str, str]:
        answer = client.get("/two", headers={**POLL, "Executor-Job": id})
        assert answer.mimetype == DOCUMENT
        assert answer.json is not None
        return answer.json["id"], answer.json["status"]

    first = shown()
    assert wait_until(lambda: told(first) == (first, "running"))
    gates[0].open.set()
    assert wait_until(lambda: told(first) == (first, "succeeded")), "so that the page is loaded again"
    second = shown()
    assert second != first
    assert wait_until(lambda: told(second) == (second, "running"))
    gates[1].open.set()
    assert wait_until(lambda: told(second) == (second, "succeeded"))
    assert told("0" * 24) == (first, "succeeded"), "it never runs the rest of the view"
    assert client.get("/two", headers=PAGE).text == "ab"


def test_48_pages_start_one_job(client: FlaskClient, app: Flask, gate: Gate) -> None:
    with ThreadPoolExecutor(48) as clients:
        statuses = list(clients.map(lambda _: app.test_client().get("/report", headers=PAGE).status_code, range(48)))
    assert set(statuses) == {202}
    assert wait_until(lambda: gate.calls)
    assert gate.calls == 1


def test_a_failed_job_ends_the_page_and_can_be_tried_again(
    client: FlaskClient, executor: Executor, gate: Gate, views: list[str]
) -> None:
    gate.error = ValueError("the password is hunter2")
    gate.open.set()
    client.get("/report", headers=PAGE)
    drain(executor)
    answer = client.get("/report", headers=PAGE)
    assert answer.status_code == 500
    assert "hunter2" not in answer.text
    assert "http-equiv" not in answer.text, "it would be loaded again for ever"
    as_json = client.get("/report", headers={"Accept": "application/json"})
    assert as_json.status_code == 500
    assert as_json.json is not None
    assert (as_json.json["status"], as_json.json["error"]) == ("failed", None)
    assert gate.calls == 1, "loading it again does not start it again"
    gate.error = None
    form = {"token": token_of(answer), "action": "retry"}
    back = client.post("/_executor/act", data=form, headers=PAGE)
    assert (back.status_code, back.headers["Location"]) == (303, "/report")
    client.get("/report", headers=PAGE)
    drain(executor)
    assert client.get("/report", headers=PAGE).text == "<h1>the report</h1>"
    assert client.post("/_executor/act", data=form).status_code == 204, "the second of two who press the button"
    assert client.get("/report", headers=PAGE).text == "<h1>the report</h1>"
    assert gate.calls == 2


def test_errors_are_shown_to_those_who_may_see_them(make_executor: MakeExecutor, app: Flask, gate: Gate) -> None:
    executor = make_executor(expose_errors=True)
    app.add_url_rule("/report", "report", lambda: executor.result_or_202("report", gate))
    gate.error = ValueError("<b>no paper</b>")
    gate.open.set()
    client = app.test_client()
    client.get("/report")
    drain(executor)
    assert "ValueError: &lt;b&gt;no paper&lt;/b&gt;" in client.get("/report", headers=PAGE).text


def test_the_view_can_have_the_error(app: Flask, executor: Executor, gate: Gate) -> None:
    causes: list[BaseException | None] = []

    @app.get("/own")
    def own() -> str:
        try:
            return str(executor.result_or_202("own", gate))
        except HTTPException as answer:
            causes.append(answer.__cause__)
            raise

    client = app.test_client()
    client.get("/own")
    gate.error = ValueError("no paper")
    gate.open.set()
    drain(executor)
    client.get("/own")
    assert [type(cause) for cause in causes] == [type(None), ValueError]


def test_stop_button(client: FlaskClient, executor: Executor, gate: Gate) -> None:
    client.get("/report", headers=PAGE)
    assert wait_until(lambda: running(executor))
    form = {"token": token_of(client.get("/report", headers=PAGE)), "action": "stop"}
    answer = client.post("/_executor/act", data=form, headers={"Accept": "application/json"})
    assert answer.status_code == 202
    drain(executor)
    assert client.post("/_executor/act", data=form).status_code == 204, "it has ended"
    page = client.get("/report", headers=PAGE)
    assert page.status_code == 409
    assert "Stopped" in page.text


@pytest.mark.parametrize(
    ("change", "headers", "status"),
    [
        ({"token": "x.y.z"}, {}, 403),
        ({"token": ""}, {}, 403),
        ({"action": "delete"}, {}, 400),
        ({"action": ""}, {}, 400),
        ({}, {"Origin": "https://elsewhere.example"}, 403),
        ({}, {"Origin": "null"}, 403),
        ({}, {"Sec-Fetch-Site": "cross-site"}, 403),
        ({}, {"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_buttons_of_others_do_nothing(
    client: FlaskClient, executor: Executor, gate: Gate, change: dict[str, str], headers: dict[str, str], status: int
) -> None:
    client.get("/report", headers=PAGE)
    assert wait_until(lambda: running(executor))
    token = token_of(client.get("/report", headers=PAGE))
    form = {"token": token, "action": "stop", **change}
    answer = client.post("/_executor/act", data=form, headers=headers)
    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")
    job = executor.jobs.find("report")
    assert job is not None
    assert not job.stop_requested
    for same in {"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin", "Origin": "null"}, {}:
        assert client.post("/_executor/act", data={"token": token, "action": "stop"}, headers=same).status_code < 300


def test_a_token_does_not_lead_to_another_site(app: Flask, executor: Executor, gate: Gate) -> None:
    app.url_map.merge_slashes = False
    app.add_url_rule("/<path:path>", "any", lambda path: executor.result_or_202("any", gate))
    client = app.test_client()
    page = client.get("/?y=1", headers=PAGE, environ_overrides={"PATH_INFO": "//elsewhere.example/x"})
    form = {"token": token_of(page), "action": "stop"}
    location = client.post("/_executor/act", data=form, headers=PAGE).headers["Location"]
    assert location == "/elsewhere.example/x?y=1"


def test_a_post_leads_to_the_page_of_the_job(
    app: Flask, executor: Executor, client: FlaskClient, gate: Gate, views: list[str]
) -> None:
    app.register_blueprint(Controller(executor), url_prefix="/jobs")
    answer = client.post("/report", headers=PAGE)
    job = executor.jobs.find("report")
    assert job is not None
    assert (answer.status_code, answer.headers["Location"]) == (303, f"/jobs/{job.id}")
    assert client.get(f"/jobs/{job.id}", headers=PAGE).status_code == 200
    assert app.test_client().get(f"/jobs/{job.id}").status_code == 404, "it is somebody else's"
    again = client.post("/report")
    assert (again.status_code, again.headers["Location"]) == (202, f"/jobs/{job.id}")
    gate.error = ValueError("no paper")
    gate.open.set()
    drain(executor)
    gate.error = None
    client.post("/report")
    drain(executor)
    assert client.post("/report").text == "<h1>the report</h1>", "a post starts what has failed again"
    assert views == ["POST"]


def test_a_post_without_a_controller_says_what_to_do(client: FlaskClient) -> None:
    answer = client.post("/report", headers=PAGE)
    assert answer.status_code == 418
    assert "mount a Controller (app.register_blueprint(Controller(executor)))" in answer.text


def test_outside_of_a_request(executor: Executor, gate: Gate) -> None:
    with pytest.raises(RuntimeError, match="elsewhere use submit_once"):
        executor.result_or_202("report", gate)
    with pytest.raises(RuntimeError, match="elsewhere use submit_once"):
        executor.flow("f").result_or_202(gate)
    assert gate.calls == 0


def test_too_late_for_urls(make_executor: MakeExecutor, app: Flask, gate: Gate) -> None:
    app.testing = True
    app.add_url_rule("/first", "first", lambda: "")
    late = Executor()
    app.add_url_rule("/report", "report", lambda: late.result_or_202("report", gate))
    client = app.test_client()
    client.get("/first")
    late.init_app(app)
    try:
        with pytest.raises(RuntimeError, match=r"before\s+init_app\(app\) was called"):
            client.get("/report", headers=PAGE)
        assert client.get("/report").status_code == 202, "a document needs none"
    finally:
        gate.open.set()
        late.shutdown()


def test_a_job_and_options(app: Flask, executor: Executor, gate: Gate) -> None:
    render = executor.job(name="render", timeout=0.2)(gate)
    named = executor.options(name="monthly", owner="ada")
    app.add_url_rule("/a", "a", lambda: render.result_or_202("a", "from a"))
    app.add_url_rule("/b", "b", lambda: named.result_or_202("b", gate, value="from b"))
    client = app.test_client()
    a, b = client.get("/a").json, client.get("/b").json
    assert a is not None
    assert b is not None
    assert (a["name"], b["name"]) == ("render", "monthly")
    job = executor.jobs.find("b")
    assert job is not None
    assert job.owner == "ada"
    assert wait_until(lambda: client.get("/a").status_code == 500), "it is out of time"
    gate.open.set()
    drain(executor)
    assert client.get("/b").text == "from b"


def test_a_flow_takes_the_options_of_a_job(app: Flask, executor: Executor, gate: Gate) -> None:
    attempts: list[int] = []

    @executor.job(name="pack the parcel", retries=1)
    def pack() -> str:
        attempts.append(current_job.attempt)
        if len(attempts) == 1:
            raise ConnectionError
        return "packed"

    @executor.job(name="weigh it")
    def weigh() -> str:
        return current_job.name

    @app.get("/order")
    def order() -> str:
        flow = executor.flow("order")
        return f"{flow.step(weigh)}, {flow.result_or_202(pack)}"

    client = app.test_client()
    answer = client.get("/order").json
    assert answer is not None
    assert answer["name"] == "pack the parcel"
    drain(executor)
    assert client.get("/order").text == "weigh it, packed"
    assert attempts == [1, 2]


def test_a_flow_waits_step_by_step(app: Flask, executor: Executor) -> None:
    gates = [Gate(), Gate()]
    done: list[str] = []

    def note(text: str) -> str:
        done.append(text)
        return text

    @app.get("/order/<id>")
    def order(id: str) -> str:
        flow = executor.flow(f"order {id}")
        first = flow.step(note, "begun")
        second = flow.result_or_202(gates[0], f"{first}, paid")
        third: str = flow.result_or_202(gates[1], f"{second}, packed")
        flow.reset()
        return third

    client = app.test_client()
    for gate in gates:
        answer = client.get("/order/7")
        assert answer.status_code == 202
        assert answer.json is not None
        assert answer.json["key"] is None, "it is none of the user's"
        gate.open.set()
        drain(executor)
    assert client.get("/order/7").text == "begun, paid, packed"
    assert client.get("/order/7").status_code == 202, "it was forgotten"
    drain(executor)
    assert [gate.calls for gate in gates] == [2, 1]
    assert done == ["begun", "begun"]
    assert executor.futures.keys() == []


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
def test_whatever_a_job_says_is_escaped(app: Flask, executor: Executor, text: str) -> None:
    started, go_on = threading.Event(), threading.Event()

    def work() -> str:
        reported: dict[str, Any] = {text: text}
        current_job.update(message=text, **reported)
        started.set()
        return str(go_on.wait(10))

    app.add_url_rule("/x", "x", lambda: executor.options(name=text).result_or_202(text, work))
    client = app.test_client()
    client.get("/x")
    assert started.wait(10)
    page = client.get("/x", headers=PAGE).text
    go_on.set()
    assert text not in page


def test_the_page_of_the_app(app: Flask, executor: Executor, gate: Gate, tmp_path: Any) -> None:
    folder = tmp_path / "templates" / "flask_executor"
    folder.mkdir(parents=True)
    own = '{% extends "flask_executor/base.html" %}{% block content %}one moment, {{ job.name }}{% endblock %}'
    (folder / "waiting.html").write_text(own)
    (folder / "base.html").write_text(
        '{% extends "flask_executor/default/base.html" %}{% block header %}<h2>The shop</h2>{% endblock %}'
    )
    mine = Flask("mine", template_folder=str(tmp_path / "templates"))
    executor.init_app(mine)
    mine.add_url_rule("/x", "x", lambda: executor.options(name="report").result_or_202("x", gate))
    page = mine.test_client().get("/x", headers=PAGE).text
    assert "one moment, report" in page
    assert "<h2>The shop</h2>" in page
    assert "executor.css" in page


def test_image_and_language(make_executor: MakeExecutor, app: Flask, gate: Gate) -> None:
    executor = make_executor(waiting_image="/static/bear.gif")
    app.add_url_rule("/x", "x", lambda: executor.result_or_202("x", gate))
    app.jinja_env.globals["gettext"] = {"Running": "L&auml;uft", "Stop": "Anhalten"}.get
    app.jinja_env.globals["gettext"] = lambda text: {"Stop": "Anhalten"}.get(text, text)
    page = app.test_client().get("/x", headers=PAGE).text
    assert '"/static/bear.gif"' in page
    assert "Anhalten" in page
    assert ">Stop<" not in page


def test_a_bar_in_a_page_of_the_app(app: Flask, executor: Executor, gate: Gate) -> None:
    template = (
        '{% from "flask_executor/macros.html" import assets, progress %}{{ assets() }}'
        "{{ progress(job) }}{{ progress(job, url='/mine') }}"
    )
    futures = []

    @app.get("/mine")
    def mine() -> str:
        futures.append(executor.submit(gate))
        return render_template_string(template, job=futures[0])

    client = app.test_client()
    page = client.get("/mine").text
    assert "/_executor/job.js" in page
    assert 'data-executor-job="/mine"' in page
    url = page.split('data-executor-job="')[1].split('"')[0]
    assert url.startswith("/_executor/jobs/")
    stranger = app.test_client()
    document = stranger.get(url).json
    assert document is not None
    assert (document["id"], document["name"]) == (futures[0].job_id, futures[0].name)
    assert stranger.get(f"{url}x").status_code == 403


def test_a_page_without_a_secret_key(app: Flask, make_executor: MakeExecutor, gate: Gate) -> None:
    app.secret_key = None
    executor = make_executor()
    app.add_url_rule("/x", "x", lambda: executor.result_or_202("x", gate))
    client = app.test_client()
    page = client.get("/x", headers=PAGE)
    assert client.post("/_executor/act", data={"token": token_of(page), "action": "stop"}).status_code == 202


def test_two_executors_and_a_nested_controller(app: Flask, make_executor: MakeExecutor, gate: Gate) -> None:
    one, two = make_executor(), make_executor(name="reports")
    outer = Blueprint("outer", __name__, url_prefix="/outer")
    outer.register_blueprint(Controller(two), url_prefix="/jobs")
    app.register_blueprint(outer)
    app.register_blueprint(Controller(one, name="first"), url_prefix="/first")
    app.add_url_rule("/two", "two", lambda: two.result_or_202("x", gate), methods=["GET", "POST"])
    client = app.test_client()
    location = client.post("/two", headers=PAGE).headers["Location"]
    assert location.startswith("/outer/jobs/")
    links = client.get(location).json
    assert links is not None
    assert links["links"]["self"] == location
    page = client.get("/two", headers=PAGE)
    assert client.post("/_executor/act", data={"token": token_of(page), "action": "stop"}).status_code == 202


def test_the_contexts_of_the_request_are_there(app: Flask, executor: Executor) -> None:
    ended = threading.Event()

    def where() -> str:
        return request.path

    def note(sender: Executor, **_: object) -> None:
        ended.set()

    app.add_url_rule("/where", "where", lambda: executor.result_or_202("where", where))
    with job_finished.connected_to(note):
        app.test_client().get("/where")
        assert ended.wait(10)
    drain(executor)
    assert app.test_client().get("/where").text == "/where"


def test_a_store_that_is_away(client: FlaskClient, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise StoreUnavailable("sqlite:///jobs", "it is away")

    monkeypatch.setattr(type(executor._app_executor()[1].tracker), "find", away)
    answer = client.get("/report", headers=POLL)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2"), "it asks again"
    assert "StoreUnavailable" in client.get("/report", headers=PAGE).text, "that is for the app to say"


def test_a_stream_ends_when_the_store_is_away(client: FlaskClient, executor: Executor, gate: Gate) -> None:
    client.get("/report")
    assert wait_until(lambda: running(executor))
    records, get = executor.jobs, executor.jobs.get
    reads: list[str] = []

    def get_once(id: str) -> Any:
        reads.append(id)
        if len(reads) > 1:
            raise StoreUnavailable("sqlite:///jobs", "it is away")
        return get(id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "get", get_once)
        sent = events(client.get("/report", headers=POLL, environ_overrides=THREADED))
    assert [event["status"] for event in sent] == ["running"]


# ---- what a reviewer has found ----


def test_more_pages_than_futures_are_held(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor(futures_max_length=5)
    runs: list[int] = []
    app.add_url_rule("/n/<int:n>", "n", lambda n: str(executor.result_or_202(f"n {n}", note, n)))

    def note(n: int) -> int:
        runs.append(n)
        return n

    client = app.test_client()
    for n in range(30):
        client.get(f"/n/{n}")
    drain(executor)
    assert [client.get(f"/n/{n}").text for n in range(30)] == [str(n) for n in range(30)]
    assert len(runs) == 30
    for n in range(30, 50):
        executor.submit_stored(n, note, n).result()
    assert len(executor.futures.keys()) == 35
    assert executor.futures.pop("n 3") is not None
    assert client.get("/n/3").status_code == 202


@pytest.mark.parametrize(
    ("asked", "page"),
    [
        ("/%09/evil.example/x", "/%09/evil.example/x"),
        ("/%5Cevil.example/x", "/%5Cevil.example/x"),
        ("/c%23", "/c%23"),
        ("/what%3F?a=%26&b=%C3%BC", "/what%3F?a=%26&b=%C3%BC"),
        ("/50%2541", "/50%2541"),
        ("/%C3%BC", "/%C3%BC"),
        ("/a?", "/a"),
    ],
)
def test_a_page_asks_at_its_own_url(app: Flask, executor: Executor, gate: Gate, asked: str, page: str) -> None:
    app.add_url_rule("/<path:path>", "any", lambda path: executor.result_or_202(path, gate))
    client = app.test_client()
    answer = client.get(asked, headers=PAGE)
    url = answer.text.split('data-executor-job="')[1].split('"')[0].replace("&amp;", "&")
    assert url == page
    form = {"token": token_of(answer), "action": "stop"}
    location = client.post("/_executor/act", data=form, headers=PAGE).headers["Location"]
    assert location == page


def test_to_follow_is_not_to_act(app: Flask, executor: Executor, gate: Gate) -> None:
    template = '{% from "flask_executor/macros.html" import progress %}{{ progress(job) }}'
    futures = [executor.submit(gate)]
    app.add_url_rule("/mine", "mine", lambda: render_template_string(template, job=futures[0]))
    client = app.test_client()
    token = client.get("/mine").text.split("/_executor/jobs/")[1].split('"')[0]
    assert client.get(f"/_executor/jobs/{token}").status_code == 200
    for action in "stop", "retry":
        assert client.post("/_executor/act", data={"token": token, "action": action}).status_code == 403


def test_a_post_of_somebody_else(
    app: Flask, executor: Executor, client: FlaskClient, gate: Gate, views: list[str]
) -> None:
    app.register_blueprint(Controller(executor), url_prefix="/jobs")
    client.get("/report")
    for browser in app.test_client(), app.test_client():
        url = browser.post("/report", headers=PAGE).headers["Location"]
        page = browser.get(url, headers=PAGE)
        assert page.status_code == 200
        assert 'data-executor-part="stop" hidden' in page.text
        assert browser.delete(url).status_code == 404
    gate.open.set()
    drain(executor)
    document = browser.get(url).json
    assert document is not None
    assert browser.get(document["links"]["result"]).json == "the report"
    assert app.test_client().get(document["links"]["result"].partition("?")[0]).status_code == 404


def test_a_failure_is_not_not_modified(client: FlaskClient, executor: Executor, gate: Gate) -> None:
    gate.error = ValueError()
    gate.open.set()
    client.get("/report")
    drain(executor)
    answer = client.get("/report")
    assert client.get("/report", headers={"If-None-Match": answer.headers["ETag"]}).status_code == 500


def test_a_job_that_is_not_there(client: FlaskClient, executor: Executor, gate: Gate) -> None:
    page = client.get("/report", headers=PAGE)
    gate.open.set()
    drain(executor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(executor._app_executor()[1].jobs), "stop_job", lambda *_: None)
        answer = client.post("/_executor/act", data={"token": token_of(page), "action": "stop"})
    assert answer.status_code == 404


def test_a_blueprint_of_that_name(app: Flask) -> None:
    app.register_blueprint(Blueprint("flask_executor", "mine"))
    with pytest.raises(ValueError, match="the app has a blueprint 'flask_executor' already"):
        Executor(app)


def test_what_fails_while_a_client_waits_is_in_the_log(
    app: Flask, executor: Executor, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.error = ValueError("no paper")
    app.add_url_rule("/report", "report", lambda: executor.result_or_202("report", gate))
    timer = threading.Timer(0.2, gate.open.set)
    timer.start()
    answer = app.test_client().get("/report", headers={"Prefer": "wait=10"}, environ_overrides=THREADED)
    timer.join()
    assert answer.status_code == 500
    assert sum("no paper" in str(record.exc_info) for record in caplog.records) == 1


@pytest.mark.parametrize("action", ["stop", "retry"])
def test_buttons_of_a_page_whose_record_has_expired(
    app: Flask, make_executor: MakeExecutor, gate: Gate, action: str
) -> None:
    executor = make_executor(result_ttl=0.1)
    gate.error = ValueError()
    gate.open.set()
    app.add_url_rule("/report", "report", lambda: executor.result_or_202("report", gate))
    client = app.test_client()
    form = {"token": token_of(client.get("/report", headers=PAGE)), "action": action}
    drain(executor)
    assert wait_until(lambda: executor.jobs.find("report") is None)
    answer = client.post("/_executor/act", data=form, headers=PAGE)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/report")
    assert client.post("/_executor/act", data=form).status_code == {"stop": 404, "retry": 204}[action]


def test_what_was_started_before_is_kept_too(app: Flask, make_executor: MakeExecutor, gate: Gate) -> None:
    executor = make_executor(futures_max_length=2)
    gate.open.set()
    app.add_url_rule("/report", "report", lambda: executor.result_or_202("report", gate))
    client = app.test_client()
    executor.submit_once("report", gate).result(10)
    assert client.get("/report").status_code == 200
    for number in range(5):
        executor.submit_stored(number, gate).result(10)
    assert client.get("/report").text == "the report"
    assert gate.calls == 6
    assert len(executor.futures) == 3


def test_a_query_of_bytes_that_were_not_encoded(app: Flask, executor: Executor, gate: Gate) -> None:
    app.add_url_rule("/report", "report", lambda: executor.result_or_202("report", gate))
    raw: dict[str, Any] = {"QUERY_STRING": "q=é&b=%C3%A9".encode().decode("latin-1")}
    page = app.test_client().get("/report", headers=PAGE, environ_overrides=raw)
    assert 'data-executor-job="/report?q=%C3%A9&amp;b=%C3%A9"' in page.text


def test_without_a_secret_key_several_processes_are_warned(
    app: Flask, executor: Executor, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    app.secret_key = None

    template = '{% from "flask_executor/macros.html" import progress %}{{ progress(job) }}'

    @app.get("/bar")
    def bar() -> str:
        return render_template_string(template, job=executor.submit(gate))

    client = app.test_client()
    for environ in ({"wsgi.multiprocess": True}, {"wsgi.multiprocess": True}):
        assert client.get("/bar", environ_overrides=environ).status_code == 200
    [line] = [record.getMessage() for record in caplog.records]
    assert "Set SECRET_KEY to the same random value in all of them" in line
