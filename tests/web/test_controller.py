"""The controller: who may start, see and stop what, and how it answers."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import tasks
from flask import Blueprint, Flask, abort, has_request_context, render_template_string, request, session
from flask.testing import FlaskClient
from requirements import require
from service_examples import Counter
from werkzeug.test import TestResponse
from werkzeug.wrappers import Response

from flask_executor import ConfigError, Executor, Job, StoreUnavailable, current_job
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until
from flask_executor.web import Controller
from flask_executor.web.tokens import SHOW, JobToken, sign_token

THREADED = {"wsgi.multithread": True}
PAGE = {"Accept": "text/html"}


@pytest.fixture(params=["thread-memory", "thread-sqlite", "process-memory", "process-sqlite"])
def executor(make_executor: MakeExecutor, request: pytest.FixtureRequest) -> Executor:
    type, _, store = request.param.partition("-")
    return make_executor(type=type, store=store, max_workers=2)


class Admins:
    """An app's rule: some may do some things."""

    def __init__(self) -> None:
        self.actions: set[str] = set()
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, action: str, job: Job | None) -> bool:
        self.asked.append((action, None if job is None else job.id))
        return action in self.actions


@pytest.fixture
def admins() -> Admins:
    return Admins()


@pytest.fixture
def controller(app: Flask, executor: Executor, admins: Admins) -> Controller:
    controller = Controller(executor, authorize=admins)
    for fn in (tasks.add, tasks.fail, tasks.work_until, tasks.log_lines, tasks.whatever):
        controller.expose(fn)
    app.register_blueprint(controller, url_prefix="/jobs")
    return controller


@pytest.fixture
def client(app: Flask, controller: Controller) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def stranger(app: Flask, controller: Controller) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def gate(tmp_path: Any) -> Iterator[Any]:
    path = tmp_path / "go on"
    yield path
    path.touch()


def document(answer: TestResponse, status: int = 200) -> dict[str, Any]:
    assert answer.status_code == status, (answer.status_code, answer.text)
    found = json.loads(answer.text)
    assert isinstance(found, dict)
    return found


def problem(answer: TestResponse, status: int) -> dict[str, Any]:
    assert answer.mimetype == "application/problem+json", (answer.status_code, answer.text)
    found = document(answer, status)
    assert found["status"] == status
    assert found["title"]
    assert found["detail"]
    return found


def ended(client: FlaskClient, url: str) -> dict[str, Any]:
    assert wait_until(lambda: document(client.get(url))["ended"])
    return document(client.get(url))


def test_start_watch_and_collect(client: FlaskClient) -> None:
    answer = client.post("/jobs/run/add", json={"a": 2, "b": 3})
    started = document(answer, 202)
    url = answer.headers["Location"]
    assert url == f"/jobs/{started['id']}" == started["links"]["self"]
    assert started["key"] is None
    done = ended(client, url)
    assert (done["status"], done["name"], done["error"]) == ("succeeded", "add", None)
    result = client.get(done["links"]["result"])
    assert (result.json, result.mimetype) == (5, "application/json")
    again = client.get(done["links"]["result"], headers={"If-None-Match": result.headers["ETag"]})
    assert again.status_code == 304
    assert client.delete(url).status_code == 204


def test_progress_etags_and_waiting(client: FlaskClient, gate: Any) -> None:
    url = client.post("/jobs/run/work_until", json={"path": str(gate)}).headers["Location"]
    assert wait_until(lambda: document(client.get(url))["progress"] == 0.5)
    answer = client.get(url)
    assert document(answer)["message"] == "waiting"
    assert answer.headers["Retry-After"] == "1"
    same = {"If-None-Match": answer.headers["ETag"]}
    assert client.get(url, headers=same).status_code == 304
    begin = time.monotonic()
    held = client.get(url, headers={**same, "Prefer": "wait=1"}, environ_overrides=THREADED)
    assert held.status_code == 304
    assert time.monotonic() - begin >= 1
    assert held.headers["Preference-Applied"] == "wait"
    gate.touch()
    news = client.get(url, headers={**same, "Prefer": "wait=30"}, environ_overrides=THREADED)
    assert document(news)["progress"] == 0.5 or document(news)["ended"]
    assert ended(client, url)["status"] == "succeeded"


def test_events(client: FlaskClient, gate: Any) -> None:
    url = client.post("/jobs/run/work_until", json={"path": str(gate)}).headers["Location"]
    gate.touch()
    answer = client.get(f"{url}/events", environ_overrides=THREADED)
    assert answer.mimetype == "text/event-stream"
    last = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")][-1]
    assert last["status"] == "succeeded"
    assert last["links"]["result"] == f"{url}/result"
    as_json = client.get(f"{url}/events", headers={"Accept": "application/json"}, environ_overrides=THREADED)
    assert document(as_json)["status"] == "succeeded"


def test_stop(client: FlaskClient, gate: Any) -> None:
    url = client.post("/jobs/run/work_until", json={"path": str(gate)}).headers["Location"]
    assert wait_until(lambda: document(client.get(url))["progress"])
    assert problem(client.get(f"{url}/result"), 409)["job"] == "running"
    assert document(client.delete(url), 202)["id"]
    assert ended(client, url)["status"] == "stopped"
    assert problem(client.get(f"{url}/result"), 409)["job"] == "stopped"
    assert client.delete(url).status_code == 204


def test_failure_and_retry(client: FlaskClient) -> None:
    url = client.post("/jobs/run/fail", json={"message": "the password is hunter2"}).headers["Location"]
    failed = ended(client, url)
    assert (failed["status"], failed["error"]) == ("failed", None)
    assert "hunter2" not in json.dumps(failed), "errors and arguments are not told to everybody"
    assert problem(client.get(f"{url}/result"), 409)["detail"] == "The job has no result: its status is failed."
    again = client.post(failed["links"]["retry"])
    assert document(again, 202)["meta"] == {}
    assert again.headers["Location"] != url
    assert ended(client, again.headers["Location"])["status"] == "failed"


def test_errors_are_told_where_that_is_wanted(make_executor: MakeExecutor, app: Flask) -> None:
    controller = Controller(make_executor(expose_errors="yes"))
    controller.expose(tasks.fail)
    app.register_blueprint(controller)
    client = app.test_client()
    url = client.post("/run/fail").headers["Location"]
    assert ended(client, url)["error"] == "ValueError: no paper"


def test_only_what_has_failed_here_is_started_again(client: FlaskClient, executor: Executor, admins: Admins) -> None:
    admins.actions = {"retry"}
    url = client.post("/jobs/run/add", json={"a": 1}).headers["Location"]
    assert "retry" not in ended(client, url)["links"]
    problem(client.post(f"{url}/retry"), 409)
    with client.application.app_context():
        by_the_app = executor.submit_stored("by the app", tasks.fail)
    assert wait_until(lambda: by_the_app.status.ended)
    problem(client.post(f"/jobs/{by_the_app.job_id}/retry"), 409)


def test_log(client: FlaskClient) -> None:
    url = client.post("/jobs/run/log_lines", json={"count": 3}).headers["Location"]
    ended(client, url)
    assert wait_until(lambda: len(document(client.get(f"{url}/log"))["lines"]) == 3)
    first = document(client.get(f"{url}/log"))["lines"][0]
    assert (first["level"], first["text"]) == ("WARNING", "line 0")
    assert first["time"].endswith("Z")


def test_a_job_is_its_owners(client: FlaskClient, stranger: FlaskClient, admins: Admins, gate: Any) -> None:
    url = client.post("/jobs/run/work_until", json={"path": str(gate)}).headers["Location"]
    unknown = "/jobs/" + "0" * 24
    for method, path in [
        ("GET", ""),
        ("HEAD", ""),
        ("DELETE", ""),
        ("GET", "/result"),
        ("GET", "/log"),
        ("GET", "/events"),
        ("POST", "/retry"),
    ]:
        answer = stranger.open(f"{url}{path}", method=method)
        assert answer.status_code == 404
        assert answer.data == stranger.open(f"{unknown}{path}", method=method).data, "it tells nothing"
    assert not document(client.get(url))["stop_requested"]
    assert ("stop", document(client.get(url))["id"]) in admins.asked
    admins.actions = {"status"}
    assert stranger.get(url).status_code == 200
    assert stranger.delete(url).status_code == 404
    admins.actions = {"stop"}
    assert stranger.delete(url).status_code == 202


def test_a_forged_cookie(app: Flask, client: FlaskClient, gate: Any) -> None:
    answer = client.post("/jobs/run/work_until", json={"path": str(gate)})
    forger = app.test_client()
    cookie = client.get_cookie("session")
    assert cookie is not None
    payload, _, _ = cookie.value.rpartition(".")
    forger.set_cookie("session", f"{payload}.{'A' * 27}")
    assert forger.get(answer.headers["Location"]).status_code == 404
    honest = app.test_client()
    honest.set_cookie("session", cookie.value)
    assert honest.get(answer.headers["Location"]).status_code == 200


def test_jobs_of_the_app_are_nobodys(app: Flask, client: FlaskClient, executor: Executor) -> None:
    with app.app_context():
        future = executor.submit_stored("mine", tasks.add, 1)
        owned = executor.options(owner="ada").submit_stored("adas", tasks.add, 1)
    drain(executor)
    for job in future, owned:
        assert client.get(f"/jobs/{job.job_id}").status_code == 404


def test_owners_of_the_app(app: Flask, executor: Executor) -> None:
    users: list[object] = ["ada"]
    controller = Controller(executor, owner=lambda: users[0], name="owned")
    controller.expose(tasks.add)
    app.register_blueprint(controller, url_prefix="/jobs")
    client = app.test_client()
    url = client.post("/jobs/run/add", json={"a": 1}).headers["Location"]
    assert client.get(url).status_code == 200
    users[0] = 7
    assert client.get(url).status_code == 404
    numbered = client.post("/jobs/run/add", json={"a": 1}).headers["Location"]
    assert client.get(numbered).status_code == 200
    users[0] = None
    assert client.get(numbered).status_code == 404
    anonymous = client.post("/jobs/run/add", json={"a": 1}).headers["Location"]
    assert client.get(anonymous).status_code == 200
    assert app.test_client().get(anonymous).status_code == 404


def test_without_a_secret_key(app: Flask, make_executor: MakeExecutor) -> None:
    app.secret_key = None
    app.testing = True
    controller = Controller(make_executor())
    controller.expose(tasks.add)
    app.register_blueprint(controller)
    client = app.test_client()
    with pytest.raises(ConfigError, match="SECRET_KEY is None; it must be set"):
        client.post("/run/add", json={"a": 1})
    assert client.get("/health").status_code == 200
    problem(client.get("/" + "0" * 24), 404)


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"", "application/json", 422),
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'"a"', "application/json", 400),
        (b"null", "application/json", 400),
        (b'{"a": NaN}', "application/json", 400),
        (b'{"a": 1' + b"0" * 5000 + b"}", "application/json", 400),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "application/json", 400),
        (b"[" * 200_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"a": 1}', "text/plain", 415),
        (b"a=1", "application/x-www-form-urlencoded", 415),
        (b'{"a": "x"}', "application/json", 422),
        (b'{"a": null}', "application/json", 422),
        (b'{"a": 1, "c": 1}', "application/json", 422),
        (b'{"b": 1}', "application/json", 422),
        (b'{"a": 1, "b": [' + b"1," * 600_000 + b"1]}", "application/json", 413),
    ],
)
def test_bad_bodies(client: FlaskClient, body: bytes, content_type: str, status: int) -> None:
    problem(client.post("/jobs/run/add", data=body, content_type=content_type), status)


def test_what_does_not_fit_is_named(client: FlaskClient) -> None:
    found = problem(client.post("/jobs/run/add", json={"b": "x", "c/d": 1}), 422)
    assert {one["pointer"] for one in found["errors"]} == {"/a", "/b", "/c~1d"}


def test_a_hundred_megabytes(client: FlaskClient) -> None:
    class Endless:
        read_bytes = 0

        def read(self, size: int = -1) -> bytes:
            assert size >= 0, "all of it"
            self.read_bytes += size
            return b" " * size

    stream = Endless()
    declared = {"wsgi.input": stream, "CONTENT_LENGTH": str(100 * 2**20)}
    problem(client.post("/jobs/run/add", content_type="application/json", environ_overrides=declared), 413)
    assert stream.read_bytes == 0
    chunked = {"wsgi.input": stream, "wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    problem(client.post("/jobs/run/add", content_type="application/json", environ_overrides=chunked), 413)
    assert stream.read_bytes < 3 * 2**20


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_sites_change_nothing(client: FlaskClient, gate: Any, headers: dict[str, str]) -> None:
    problem(client.post("/jobs/run/add", json={"a": 1}, headers=headers), 403)
    url = client.post("/jobs/run/work_until", json={"path": str(gate)}).headers["Location"]
    problem(client.delete(url, headers=headers), 403)
    problem(client.post(url, data={"action": "stop"}, headers=headers), 403)
    problem(client.post(f"{url}/retry", headers=headers), 403)
    assert not document(client.get(url))["stop_requested"]
    assert client.delete(url, headers={"Origin": "http://localhost"}).status_code == 202


def test_only_what_is_exposed(client: FlaskClient) -> None:
    problem(client.post("/jobs/run/die"), 404)
    problem(client.post("/jobs/run/tasks.die"), 404)
    assert client.post("/jobs/run/").status_code == 404


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", "GET, HEAD, OPTIONS"),
        ("/health", "GET, HEAD, OPTIONS"),
        ("/run/add", "OPTIONS, POST"),
        ("/0", "DELETE, GET, HEAD, OPTIONS, POST"),
        ("/0/result", "GET, HEAD, OPTIONS"),
        ("/0/retry", "OPTIONS, POST"),
    ],
)
def test_methods(client: FlaskClient, path: str, allowed: str) -> None:
    options = client.options(f"/jobs{path}")
    assert (options.status_code, options.headers["Allow"]) == (204, allowed)
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - set(allowed.split(", ")):
        answer = client.open(f"/jobs{path}", method=method)
        problem(answer, 405)
        assert answer.headers["Allow"] == allowed


def test_head(client: FlaskClient) -> None:
    url = client.post("/jobs/run/add", json={"a": 1}).headers["Location"]
    ended(client, url)
    for path in url, f"{url}/result", f"{url}/log", f"{url}/events", "/jobs/health", "/jobs/openapi.json":
        answer = client.head(path, environ_overrides=THREADED)
        assert (answer.status_code, answer.data) == (200, b""), path


def test_the_list_needs_permission(client: FlaskClient, admins: Admins) -> None:
    assert "authorize('list', None)" in problem(client.get("/jobs/"), 403)["detail"]
    problem(client.get("/jobs/", headers=PAGE), 403)
    problem(client.get("/jobs/overview"), 403)
    admins.actions = {"list"}
    assert document(client.get("/jobs/")) == {"jobs": [], "next": None}
    problem(client.get("/jobs/", headers=PAGE), 403)
    admins.actions = {"dashboard"}
    page = client.get("/jobs/", headers=PAGE)
    assert (page.status_code, page.mimetype) == (200, "text/html")
    assert client.get("/jobs/overview").status_code == 200


def test_workers_of_an_engine_are_elsewhere(app: Flask, make_executor: MakeExecutor, admins: Admins) -> None:
    require("rq")
    admins.actions = {"dashboard"}
    executor = make_executor(type="rq", url="redis://127.0.0.1:1/0")
    app.register_blueprint(Controller(executor, authorize=admins), url_prefix="/jobs")
    page = app.test_client().get("/jobs/", headers=PAGE).text
    assert "Workers run elsewhere, for this engine: rq" in page
    assert "Workers start with the first job" not in page


def test_nothing_is_permitted_without_a_rule(app: Flask, make_executor: MakeExecutor) -> None:
    app.register_blueprint(Controller(make_executor()), url_prefix="/jobs")
    client = app.test_client()
    for path in "/jobs/", "/jobs/overview":
        problem(client.get(path), 403)
    assert document(client.get("/jobs/health")) == {"status": "ok"}


def test_filters_and_pages(client: FlaskClient, executor: Executor, admins: Admins) -> None:
    admins.actions = {"list"}
    with client.application.app_context():
        for number in range(7):
            executor.options(name=f"add {number % 2}", owner=f"owner {number}").submit_stored(
                f"key {number}", tasks.add, number
            )
        executor.submit_stored("broken", tasks.fail)
        drain(executor)

    def keys(query: str) -> list[str]:
        return [job["key"] for job in document(client.get(f"/jobs/?{query}"))["jobs"]]

    assert keys("") == ["broken", *(f"key {number}" for number in reversed(range(7)))]
    assert keys("status=failed") == ["broken"]
    assert keys("name=add+1") == ["key 5", "key 3", "key 1"]
    assert keys("owner=owner+2") == ["key 2"]
    assert keys("key=key+4") == ["key 4"]
    assert keys("q=OWNER+5") == ["key 5"]
    assert keys("q=KEY&limit=2") == ["key 6", "key 5"]
    assert keys("status=&name=") == keys("")
    found: list[str] = []
    url: str | None = "/jobs/?q=key&limit=3"
    pages = 0
    while url is not None:
        page = document(client.get(url))
        found += [job["key"] for job in page["jobs"]]
        url, pages = page["next"], pages + 1
    assert (found, pages) == ([f"key {number}" for number in reversed(range(7))], 3)
    assert keys("before=0-0") == []
    assert len(keys(f"before={time.time() + 9}-gone")) == 8
    client.post("/jobs/run/add", json={"a": 1})
    drain(executor)
    newest = document(client.get("/jobs/"))["jobs"][0]
    assert json.loads(newest["started_with"])["arguments"] == {"a": 1}
    assert newest["owner"].startswith("session:")
    first = client.get("/jobs/")
    assert client.get("/jobs/", headers={"If-None-Match": first.headers["ETag"]}).status_code == 304
    for bad in "status=odd", "limit=0", "limit=201", "limit=x", "limit=-1", "limit=²", "before=nothing":
        problem(client.get(f"/jobs/?{bad}"), 400)


def test_overview(client: FlaskClient, executor: Executor, admins: Admins, gate: Any) -> None:
    admins.actions = {"dashboard"}
    for _ in range(3):
        client.post("/jobs/run/add", json={"a": 1})
    client.post("/jobs/run/fail")
    drain(executor)
    client.post("/jobs/run/work_until", json={"path": str(gate)})
    assert wait_until(lambda: document(client.get("/jobs/overview"))["counts"]["running"] == 1)
    found = document(client.get("/jobs/overview"))
    assert found["counts"]["succeeded"] == 3
    assert found["sampled"] == 5
    rows = {row["name"]: row for row in found["functions"]}
    assert (rows["add"]["count"], rows["add"]["failed"], rows["fail"]["failed"]) == (3, 0, 1)
    assert 0 <= rows["add"]["median"] <= rows["add"]["p95"]
    assert [moment["name"] for moment in found["recent"]].count("add") == 3
    assert found["health"]["accepting"] is True
    busy = [worker for worker in found["workers"] if worker["busy"]]
    assert len(busy) == 1
    assert busy[0]["memory"] > 1024 * 1024
    assert (busy[0]["pid"] == os.getpid()) == (busy[0]["kind"] == "threads")


def test_health_tells_of_services(client: FlaskClient, executor: Executor, admins: Admins) -> None:
    admins.actions = {"health", "dashboard"}
    service = executor.service(Counter, per="process")
    pid = service.call("pid").result(10)
    (found,) = document(client.get("/jobs/health"))["services"]
    assert (found["name"], found["pids"], found["ready"], found["failures"]) == ("Counter", [pid], 1, 0)
    assert document(client.get("/jobs/overview"))["health"]["services"] == [found]


def test_health(client: FlaskClient, executor: Executor, admins: Admins, monkeypatch: pytest.MonkeyPatch) -> None:
    admins.actions = {"health"}
    assert document(client.get("/jobs/health"))["accepting"] is True
    executor.shutdown()
    assert document(client.get("/jobs/health"), 503)["status"] == "unavailable"
    answer = client.post("/jobs/run/add", json={"a": 1})
    assert problem(answer, 503)
    assert answer.headers["Retry-After"]


def test_a_full_queue(app: Flask, make_executor: MakeExecutor, gate: Any) -> None:
    controller = Controller(make_executor(max_workers=1, max_pending=1))
    controller.expose(tasks.work_until)
    app.register_blueprint(controller)
    client = app.test_client()
    statuses = [client.post("/run/work_until", json={"path": str(gate)}) for _ in range(3)]
    assert [answer.status_code for answer in statuses] == [202, 202, 503]
    problem(statuses[-1], 503)
    assert statuses[-1].headers["Retry-After"] == "5"


def test_a_store_that_is_away(client: FlaskClient, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(id: str) -> None:
        raise StoreUnavailable("sqlite:///jobs", "it is away")

    monkeypatch.setattr(executor.jobs, "get", away)
    answer = client.get("/jobs/" + "0" * 24)
    problem(answer, 503)
    assert answer.headers["Retry-After"] == "2"


def test_an_expired_record(app: Flask, make_executor: MakeExecutor, any_store: str) -> None:
    controller = Controller(make_executor(store=any_store, result_ttl=0.3))
    controller.expose(tasks.add)
    app.register_blueprint(controller, url_prefix="/jobs")
    client = app.test_client()
    url = client.post("/jobs/run/add", json={"a": 1}).headers["Location"]
    assert wait_until(lambda: client.get(url).status_code == 410)
    for path in url, f"{url}/result", f"{url}/log", f"{url}/events":
        problem(client.get(path), 410)


def test_a_result_that_json_does_not_have(client: FlaskClient) -> None:
    url = client.post("/jobs/run/whatever").headers["Location"]
    ended(client, url)
    assert "set" in problem(client.get(f"{url}/result"), 406)["detail"]


def test_a_result_that_is_not_kept(app: Flask, client: FlaskClient, executor: Executor, admins: Admins) -> None:
    admins.actions = {"result"}
    with app.app_context():
        future = executor.submit(tasks.add, 1)
    id = future.job_id
    drain(executor)
    del future
    problem(client.get(f"/jobs/{id}/result"), 410)


def test_the_page_of_a_job(client: FlaskClient, gate: Any) -> None:
    url = client.post("/jobs/run/work_until", json={"path": str(gate)}).headers["Location"]
    page = client.get(url, headers=PAGE)
    assert (page.status_code, page.mimetype) == (200, "text/html")
    assert f'action="{url}"' in page.text
    answer = client.post(url, data={"action": "stop"}, headers=PAGE)
    assert (answer.status_code, answer.headers["Location"]) == (303, url)
    ended(client, url)
    again = client.post(url, data={"action": "retry"}, headers=PAGE)
    assert again.status_code == 303
    assert again.headers["Location"] != url
    assert client.post(url, data={"action": "stop"}, headers=PAGE).status_code == 303, "it has ended: back to it"
    problem(client.post(url, data={"action": "x"}), 400)
    gate.touch()
    ended(client, again.headers["Location"])


def test_hooks(app: Flask, make_executor: MakeExecutor) -> None:
    class Own(Controller):
        def run(self, name: str) -> Response:
            if request.headers.get("X-Quota") == "0":
                return Response("no more today", 429)
            return super().run(name)

        def health(self) -> Response:
            return Response("fine")

    controller = Own(make_executor())
    controller.expose(tasks.add)
    app.register_blueprint(controller)
    client = app.test_client()
    assert client.post("/run/add", json={"a": 1}, headers={"X-Quota": "0"}).status_code == 429
    assert client.post("/run/add", json={"a": 1}).status_code == 202
    assert client.get("/health").text == "fine"


def test_jobs_with_options_and_names(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor()
    controller = Controller(executor)

    @controller.expose
    @executor.job(name="monthly", retries=1)
    def render(month: str) -> str:
        if current_job.attempt == 1:
            raise ConnectionError(month)
        return month

    controller.expose(render, "once more")
    app.register_blueprint(controller)
    client = app.test_client()
    for name in "render", "once more":
        url = client.post(f"/run/{name}", json={"month": "may"}).headers["Location"]
        done = ended(client, url)
        assert (done["name"], done["attempt"], done["status"]) == ("monthly", 2, "succeeded")
    with pytest.raises(ValueError, match="'render' is exposed already"):
        controller.expose(render)
    with pytest.raises(ValueError, match="has a slash"):
        controller.expose(render, "a/b")


def test_the_body_can_be_read_in_the_job(app: Flask, make_executor: MakeExecutor) -> None:
    controller = Controller(make_executor())
    controller.expose(tasks.body_of_request)
    app.register_blueprint(controller)
    client = app.test_client()
    url = client.post("/run/body_of_request", json={}).headers["Location"]
    done = ended(client, url)
    assert client.get(done["links"]["result"]).json == "{}"


def test_flask_restful(app: Flask, client: FlaskClient, controller: Controller) -> None:
    require("flask_restful")
    from flask_restful import Api

    from flask_executor.web import restful

    class Jobs(restful.JobsResource):
        pass

    class OneJob(restful.JobResource):
        def put(self, id: str) -> tuple[str, int]:
            return f"put {id}", 200

    Jobs.controller = OneJob.controller = controller
    api = Api(app)
    api.add_resource(Jobs, "/api", "/api/<name>")
    api.add_resource(OneJob, "/api/jobs/<id>")
    problem(client.get("/api"), 403)
    started = document(client.post("/api/add", json={"a": 1}), 202)
    assert started["links"]["self"] == f"/jobs/{started['id']}"
    url = f"/api/jobs/{started['id']}"
    assert ended(client, url)["status"] == "succeeded"
    assert client.delete(url).status_code == 204
    assert client.put(url).json == f"put {started['id']}"
    assert client.patch(url).status_code == 405
    assert app.test_client().get(url).status_code == 404


# ---- what a reviewer has found ----


def test_who_may_only_look_gets_no_buttons(
    client: FlaskClient, stranger: FlaskClient, admins: Admins, gate: Any
) -> None:
    admins.actions = {"status"}
    url = client.post("/jobs/run/work_until", json={"path": str(gate)}).headers["Location"]
    page = stranger.get(url, headers=PAGE)
    assert page.status_code == 200
    token = page.text.split('name="token" value="')[1].split('"')[0]
    assert token == ""
    assert stranger.post("/_executor/act", data={"token": token, "action": "stop"}).status_code == 403
    assert stranger.post(url, data={"action": "stop"}).status_code == 404
    assert set(document(stranger.get(url))["links"]) == {"self", "events"}
    assert {"stop", "log"} <= set(document(client.get(url))["links"])


def test_jobs_of_others_are_not_run_again_with_the_rights_of_whoever_asks(
    app: Flask, make_executor: MakeExecutor
) -> None:
    controller = Controller(make_executor(), authorize=lambda action, job: bool(session.get("admin")))
    seen: list[tuple[object, bool]] = []

    def grant(to: str) -> None:
        seen.append((to, has_request_context()))
        raise PermissionError(to)

    controller.expose(grant)
    app.register_blueprint(controller, url_prefix="/jobs")
    app.add_url_rule("/login", "login", lambda: str(session.update(admin=True)))
    mallory, admin = app.test_client(), app.test_client()
    admin.get("/login")
    url = mallory.post("/jobs/run/grant", json={"to": "mallory"}).headers["Location"]
    ended(mallory, url)
    again = admin.post(f"{url}/retry").headers["Location"]
    assert ended(mallory, again)["status"] == "failed", "it is still hers"
    ended(mallory, mallory.post(f"{again}/retry").headers["Location"])
    assert seen == [("mallory", True), ("mallory", False), ("mallory", True)]


def test_a_body_that_was_read_before(app: Flask, client: FlaskClient) -> None:
    @app.before_request
    def audit() -> None:
        request.get_data()

    url = client.post("/jobs/run/add", json={"a": 2, "b": 3}).headers["Location"]
    done = ended(client, url)
    assert client.get(done["links"]["result"]).json == 5


def test_the_limit_of_the_app(app: Flask, client: FlaskClient) -> None:
    app.config["MAX_CONTENT_LENGTH"] = 100
    problem(client.post("/jobs/run/add", json={"a": 1, "b": "x" * 200}), 413)


def test_nested_arguments(client: FlaskClient, admins: Admins) -> None:
    admins.actions = {"list"}
    for depth in 60, 900, 970, 979, 985, 995:
        body = '{"a": 1, "b": ' + "[" * depth + "]" * depth + "}"
        answer = client.post("/jobs/run/add", data=body, content_type="application/json")
        problem(answer, 422 if depth < 64 else 400)
    assert client.get("/jobs/").status_code == 200


def test_large_arguments_are_not_kept(client: FlaskClient, admins: Admins) -> None:
    admins.actions = {"list"}
    url = client.post("/jobs/run/fail", json={"message": "x" * 100_000}).headers["Location"]
    assert "retry" not in ended(client, url)["links"]
    problem(client.post(f"{url}/retry"), 409)
    assert len(client.get("/jobs/").data) < 5000


def test_a_job_cannot_change_what_it_was_started_with(app: Flask, make_executor: MakeExecutor) -> None:
    controller = Controller(make_executor())
    seen: list[list[int]] = []

    def forge(items: list[int], **more: str) -> None:
        seen.append(items.copy())
        items.clear()
        reported: dict[str, Any] = {"flask_executor.started_with": "[]"}
        current_job.update(**reported)

    controller.expose(forge)
    app.register_blueprint(controller)
    client = app.test_client()
    url = client.post("/run/forge", json={"items": [1, 2], "fn": "x", "self": "y", "key": "z"}).headers["Location"]
    assert ended(client, url)["status"] == "failed"
    ended(client, client.post(f"{url}/retry").headers["Location"])
    assert seen == [[1, 2], [1, 2]]


def test_the_meta_of_the_app_stays(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor()
    controller = Controller(executor)
    controller.expose(executor.job(meta={"colour": "red"})(tasks.fail), "fail")
    app.register_blueprint(controller)
    client = app.test_client()
    failed = ended(client, client.post("/run/fail").headers["Location"])
    assert failed["meta"] == {"colour": "red"}
    assert "retry" in failed["links"]
    with pytest.raises(ValueError, match="the names in meta must be strings"):
        executor.options(meta={(1, 2): 3})  # type: ignore[dict-item]


def test_every_start_is_checked(app: Flask, make_executor: MakeExecutor) -> None:
    left = [1]

    class Quota(Controller):
        def check_start(self, name: str, arguments: Mapping[str, Any]) -> None:
            if not left:
                abort(429)
            left.pop()

    controller = Quota(make_executor())
    controller.expose(tasks.fail)
    app.register_blueprint(controller)
    client = app.test_client()
    url = client.post("/run/fail").headers["Location"]
    ended(client, url)
    assert client.post(f"{url}/retry").status_code == 429
    assert client.post("/run/fail").status_code == 429


@pytest.mark.parametrize("nobody", ["", False, None])
def test_nobody_is_not_a_user(app: Flask, executor: Executor, nobody: object) -> None:
    controller = Controller(executor, owner=lambda: nobody, name="owned")
    controller.expose(tasks.add)
    app.register_blueprint(controller, url_prefix="/jobs")
    url = app.test_client().post("/jobs/run/add", json={"a": 1}).headers["Location"]
    assert app.test_client().get(url).status_code == 404


def test_a_user_cannot_be_called_like_a_session(app: Flask, executor: Executor) -> None:
    app.testing = True
    controller = Controller(executor, owner=lambda: "session:abc", name="owned")
    controller.expose(tasks.add)
    app.register_blueprint(controller)
    with pytest.raises(ValueError, match="owners that begin with 'session:' are those of sessions"):
        app.test_client().post("/run/add", json={"a": 1})


def test_tracebacks_in_the_log_are_for_those_who_may_see_them(
    app: Flask, make_executor: MakeExecutor, admins: Admins
) -> None:
    controller = Controller(make_executor(), authorize=admins)

    def work() -> None:
        try:
            raise ValueError("the password is hunter2")
        except ValueError:
            app.logger.exception("it did not work")

    controller.expose(work)
    app.register_blueprint(controller)
    client = app.test_client()
    url = client.post("/run/work").headers["Location"]
    ended(client, url)
    assert [line["text"] for line in document(client.get(f"{url}/log"))["lines"]] == ["it did not work"]
    admins.actions = {"log"}
    assert "hunter2" in document(client.get(f"{url}/log"))["lines"][0]["text"]


def test_jobs_of_another_executor(make_executor: MakeExecutor) -> None:
    one, two = make_executor(), make_executor(name="two")
    with pytest.raises(ValueError, match="is a job of another executor"):
        Controller(one).expose(two.job(tasks.add))


def test_two_executors_of_one_name(app: Flask, make_executor: MakeExecutor) -> None:
    first = make_executor()
    for executor in Executor(), Executor(name=""):
        with pytest.raises(ValueError, match="the app has an executor named '' already"):
            executor.init_app(app)
    first.shutdown()
    second = make_executor()
    assert second.submit(tasks.add, 1).result(10) == 1
    with pytest.raises(ValueError, match="tell them apart by a name"):
        first.init_app(app)


def test_odd_queries(client: FlaskClient, admins: Admins) -> None:
    admins.actions = {"list"}
    for _ in range(3):
        ended(client, client.post("/jobs/run/add", json={"a": 1}).headers["Location"])
    for odd in "endpoint=x", "self=1", "_anchor=x", "_scheme=ftp", "_external=1", "values=1":
        found = document(client.get(f"/jobs/?limit=1&{odd}"))["next"]
        assert found.startswith("/jobs/?")
        assert odd.split("=")[0] not in found


def test_no_session_for_what_was_not_started(client: FlaskClient) -> None:
    assert "Set-Cookie" not in client.post("/jobs/run/add", json={"a": "x"}).headers
    assert "Set-Cookie" not in client.get("/jobs/health").headers


def test_a_result_that_is_no_number(app: Flask, make_executor: MakeExecutor) -> None:
    controller = Controller(make_executor())
    controller.expose(lambda: float("nan"), "nan")
    app.register_blueprint(controller)
    client = app.test_client()
    url = client.post("/run/nan").headers["Location"]
    ended(client, url)
    problem(client.get(f"{url}/result"), 406)


def test_an_origin_that_is_none(client: FlaskClient) -> None:
    problem(client.post("/jobs/run/add", json={"a": 1}, headers={"Origin": "http://["}), 403)


def test_a_bar_does_not_open_the_result(app: Flask, executor: Executor, client: FlaskClient) -> None:
    url = client.post("/jobs/run/add", json={"a": 1}).headers["Location"]
    ended(client, url)
    job = executor.jobs.get(url[6:])
    with app.test_request_context():
        bar = render_template_string('{{ url_for("flask_executor.live", job=job) }}', job=job)
    stranger = app.test_client()
    assert document(stranger.get(bar))["status"] == "succeeded"
    token = bar.rpartition("/")[2]
    assert stranger.get(f"{url}?permit={token}").status_code == 404
    assert stranger.get(f"{url}/result?permit={token}").status_code == 404


def test_a_permit_is_for_one_job_and_is_quoted(app: Flask, executor: Executor, client: FlaskClient) -> None:
    app.add_url_rule("/form", "form", lambda: str(executor.result_or_202("k", tasks.add, 1)), methods=["POST"])
    client.post("/form")
    drain(executor)
    job = executor.jobs.find("k")
    assert job is not None
    token = sign_token(app, SHOW, JobToken(executor="", id=job.id))
    stranger = app.test_client()
    for junk in "", "%0d%0aX:%20y", "%22%3E%3Cscript%3E":
        started = stranger.post(f"/jobs/run/add?permit={token}{junk}", json={"a": 1})
        links = document(started, 202)["links"]
        assert started.headers["Location"] == links["self"] == f"/jobs/{document(started, 202)['id']}"
        seen = stranger.get(f"/jobs/{job.id}?permit={token}{junk}")
        if seen.status_code == 200:  # base64 in Python skips what does not belong there
            result = document(seen)["links"]["result"]
            assert not {"\r", "\n", "<", '"'} & set(result)
            assert stranger.get(result).json == 1


class Gate:
    """An app's rule that leaves the view by itself."""

    def __call__(self, action: str, job: Job | None) -> bool:
        if not request.headers.get("Admin"):
            abort(403, "Log in first.")
        return True


def test_a_rule_that_leaves_the_view(app: Flask, make_executor: MakeExecutor) -> None:
    controller = Controller(make_executor(), authorize=Gate(), owner=lambda: request.headers.get("User"))
    controller.expose(tasks.fail)
    app.register_blueprint(controller, url_prefix="/jobs")
    client = app.test_client()
    mine = {"User": "ann"}
    url = client.post("/jobs/run/fail", headers=mine).headers["Location"]
    assert wait_until(lambda: document(client.get(url, headers=mine))["ended"])
    assert document(client.get(f"{url}/log", headers=mine))["lines"] == []
    assert document(client.get("/jobs/health")) == {"status": "ok"}
    assert client.get(url, headers={"User": "bob"}).status_code == 403
    assert client.get("/jobs/").status_code == 403
    assert "retry" in document(client.get("/jobs/", headers={"Admin": "1"}))["jobs"][0]["links"]


def test_links_are_of_what_is_allowed(app: Flask, client: FlaskClient, admins: Admins, gate: Any) -> None:
    url = client.post("/jobs/run/work_until", json={"path": str(gate)}).headers["Location"]
    stranger = app.test_client()
    admins.actions = {"list"}
    (listed,) = document(stranger.get("/jobs/"))["jobs"]
    assert listed["links"] == {}
    admins.actions = {"list", "status", "log"}
    (listed,) = document(stranger.get("/jobs/"))["jobs"]
    assert sorted(listed["links"]) == ["events", "log", "self"]
    admins.actions = {"stop"}
    answer = stranger.delete(url)
    assert (answer.status_code, answer.data) == (202, b"")
    ended(client, url)
    admins.actions = {"retry"}
    answer = stranger.post(f"{url}/retry")
    assert (answer.status_code, answer.data) == (202, b"")


def test_what_an_app_writes_of_exceptions_into_its_log(app: Flask, executor: Executor, admins: Admins) -> None:
    controller = Controller(executor, authorize=admins)
    controller.expose(tasks.log_exceptions)
    app.register_blueprint(controller)
    client = app.test_client()
    url = client.post("/run/log_exceptions").headers["Location"]
    ended(client, url)
    texts = [line["text"] for line in document(client.get(f"{url}/log"))["lines"]]
    assert texts == ["", "", "failed:", "plain", "stack", "chained", ""]
    admins.actions = {"log"}
    shown = [line["text"] for line in document(client.get(f"{url}/log"))["lines"]]
    assert sum("hunter2" in text for text in shown) == 6
    assert "stack\nStack (most recent call last):" in shown[4]


def test_forms_are_bounded(app: Flask, client: FlaskClient) -> None:
    body = b"action=" + b"x" * 20_000
    form = "application/x-www-form-urlencoded"
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    for url in "/jobs/abc", "/_executor/act":
        problem(client.post(url, data=body, content_type=form, headers=elsewhere), 403)
        problem(client.post(url, data=body, content_type=form), 413)
        for size, status in ((20_000, 413), (0, 400 if url == "/jobs/abc" else 403)):
            stream = io.BytesIO(body[: 7 + size])
            chunked: dict[str, Any] = {"wsgi.input": stream, "wsgi.input_terminated": True, "CONTENT_LENGTH": ""}
            problem(client.post(url, content_type=form, environ_overrides=chunked), status)
            assert stream.tell() <= 16 * 1024 + 1
    app.config["MAX_CONTENT_LENGTH"] = 100
    problem(client.post("/jobs/abc", data={"action": "x" * 200}), 413)
    app.config["MAX_CONTENT_LENGTH"] = None
    app.request_class = type("Request", (app.request_class,), {"max_form_memory_size": 10})
    parts = {"content_type": "multipart/form-data"}
    problem(client.post("/jobs/abc", data={"action": "x" * 20}, **parts), 413)


def test_a_body_of_which_nothing_is_left(app: Flask, make_executor: MakeExecutor) -> None:
    controller = Controller(make_executor())
    controller.expose(tasks.whatever)
    app.register_blueprint(controller)

    @app.before_request
    def audit() -> None:
        request.get_data(cache=False)

    client = app.test_client()
    assert "read it before" in problem(client.post("/run/whatever", json={"a": 1}), 400)["detail"]
    assert client.post("/run/whatever").status_code == 202


def test_a_view_starts_where_its_own_controller_is(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor()
    other = Controller(executor, name="other")
    owned = Controller(executor, name="owned", owner=lambda: "ann")
    owned.expose(tasks.add)
    lost = Controller(executor, name="lost")
    around = Blueprint("around", __name__, url_prefix="/around")
    around.register_blueprint(owned, url_prefix="/mine")
    app.register_blueprint(other, url_prefix="/jobs")
    app.register_blueprint(around)
    app.add_url_rule("/go", "go", lambda: owned.start("add", {"a": 1}), methods=["POST"])
    app.add_url_rule("/lost", "lost", lambda: lost.index(), methods=["GET"])
    client = app.test_client()
    url = client.post("/go").headers["Location"]
    assert url.startswith("/around/mine/")
    assert ended(client, url)["status"] == "succeeded"
    app.testing = True
    lost._authorize = lambda *_: True
    with pytest.raises(RuntimeError, match="the controller 'lost' is not mounted in this app"):
        client.get("/lost")


@pytest.mark.parametrize("limit", ["0", "201", "00000000100000", "0" * 8 + "1" + "9" * 5000, "x"])
def test_limits_that_are_none(client: FlaskClient, admins: Admins, limit: str) -> None:
    admins.actions = {"list"}
    assert "limit is" in problem(client.get(f"/jobs/?limit={limit}"), 400)["detail"]


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 400])
def test_numbers_that_are_too_large(client: FlaskClient, app: Flask, make_executor: MakeExecutor, number: str) -> None:
    def scale(by: float) -> str:
        return str(by)

    other = Controller(make_executor(name="other"), name="other")
    other.expose(scale)
    app.register_blueprint(other, url_prefix="/other")
    answer = app.test_client().post("/other/run/scale", data=f'{{"by": {number}}}', content_type="application/json")
    require("pydantic")  # which makes a float of a whole number
    assert answer.status_code in (400, 422), answer.text


def test_arguments_may_have_any_name(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor()
    controller = Controller(executor)
    controller.expose(executor.job(tasks.given), "job")
    controller.expose(tasks.given, "plain")
    app.register_blueprint(controller)
    arguments = dict.fromkeys(["self", "fn", "key", "args", "kwargs", "options", "future_key"], 1)
    client = app.test_client()
    for name in "job", "plain":
        url = client.post(f"/run/{name}", json=arguments).headers["Location"]
        assert ended(client, url)["status"] == "succeeded"
        assert client.get(f"{url}/result").json == arguments


def test_a_prefix_with_a_variable(app: Flask, make_executor: MakeExecutor, gate: Any) -> None:
    executor = make_executor()
    controller = Controller(executor, authorize=lambda action, job: True)
    controller.expose(tasks.add)
    app.register_blueprint(controller, url_prefix="/<tenant>/jobs")

    @app.post("/<tenant>/form")
    def form(tenant: str) -> Any:
        return executor.result_or_202("form", tasks.work_until, str(gate))

    client = app.test_client()
    url = client.post("/ann/jobs/run/add", json={"a": 1}).headers["Location"]
    assert url.startswith("/ann/jobs/")
    assert ended(client, url)["links"]["result"] == f"{url}/result"
    assert client.get(f"{url}/result").json == 1
    client.post("/ann/jobs/run/add", json={"a": 1})
    assert document(client.get("/ann/jobs/?limit=1"))["next"].startswith("/ann/jobs/?")
    assert document(client.get("/ann/jobs/openapi.json"))["servers"] == [{"url": "/ann/jobs"}]
    assert client.post("/ann/form").headers["Location"].startswith("/ann/jobs/")


def test_a_result_that_is_on_its_way(client: FlaskClient, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    url = client.post("/jobs/run/add", json={"a": 1}).headers["Location"]
    ended(client, url)

    def late(timeout: float) -> None:
        raise concurrent.futures.TimeoutError

    class Late:
        result = staticmethod(late)

    monkeypatch.setattr(type(executor._app_executor()[1].jobs), "handle", lambda *_: Late)
    answer = client.get(f"{url}/result")
    problem(answer, 503)
    assert answer.headers["Retry-After"] == "1"


def test_resources_without_a_store(app: Flask, executor: Executor, controller: Controller, admins: Admins) -> None:
    require("flask_restful")
    from flask_restful import Api

    from flask_executor.web.restful import JobResource, JobsResource

    jobs_class = type("Reports", (JobsResource,), {"controller": controller})
    job_class = type("Report", (JobResource,), {"controller": controller})
    api = Api(app)
    api.add_resource(jobs_class, "/reports", "/reports/<name>")
    api.add_resource(job_class, "/report/<id>")
    admins.actions = {"list"}

    def away(*_: object, **__: object) -> None:
        raise StoreUnavailable("store", "it is away")

    client = app.test_client()
    with pytest.MonkeyPatch.context() as patch:
        for name in "get", "list":
            patch.setattr(type(executor.jobs), name, away)
        for path in "/reports", "/report/abc":
            problem(client.get(path), 503)
        problem(client.delete("/report/abc"), 503)
