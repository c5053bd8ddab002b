"""What Flask-Worker documents, with its import lines changed, and what is better here."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from requirements import require
from variants import store_url

from flask_executor import Executor, MissingExtra, UntrustedResult
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import run_in_threads, wait_until

if not os.environ.get("CI"):  # there it is an error
    for needed in ("flask_socketio", "flask_sqlalchemy", "requests", "rq"):
        pytest.importorskip(needed)

import flask_worker_app
import socketio
import sqlalchemy
from flask_sqlalchemy import SQLAlchemy
from flask_worker_app import Office

from flask_executor.compat.flask_worker import Manager, RouterMixin, WorkerMixin, set_route

# ---- the documented app, on a server of its own ----


VARIANTS = [
    "executor",
    # On one Python only: they take long, and what differs is not ours.
    pytest.param("rq and sockets", marks=pytest.mark.web),
    *(pytest.param(name, marks=[pytest.mark.web, pytest.mark.storm]) for name in ("rq", "executor and sockets")),
]


@pytest.fixture(scope="module", params=VARIANTS)
def office(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    redis_url = store_url("redis", request) if "rq" in request.param else None
    folder = tmp_path_factory.mktemp("office")
    with flask_worker_app.opened(folder, redis_url, socketio="sockets" in request.param) as office:
        yield office


@pytest.fixture
def name(office: Office, request: pytest.FixtureRequest) -> str:
    """Of somebody with a job that ends when :meth:`Office.finish` is called."""
    name = re.sub(r"\W", "_", request.node.name)
    office.get(f"/hire/{name}")
    return name


def test_example_1_runs_once_and_is_remembered(office: Office) -> None:
    page = office.wait_at("/example1")
    assert office.wait_at("/example1").job_id == page.job_id
    assert page.follow() == "Example 1 finished"
    assert office.get("/example1") == "Example 1 finished"
    assert office.ask(page.url)[0] == 200
    assert office.printed("Request for /example1") == ["Request for /example1"] * 4


@pytest.mark.web
@pytest.mark.parametrize("runner", ["rq", pytest.param("executor", marks=pytest.mark.storm)])
def test_the_documented_setup_with_eventlet(tmp_path: Path, request: pytest.FixtureRequest, runner: str) -> None:
    require("eventlet")
    # Another database: the office's worker looks at a queue of the same name.
    redis_url = store_url("redis", request).removesuffix("0") + "1" if runner == "rq" else None
    with flask_worker_app.opened(tmp_path, redis_url, eventlet=True) as office:
        assert office.wait_at("/example1").follow() == "Example 1 finished"
        assert "wsgi starting up" in (tmp_path / "log").read_text(), "it is the server of eventlet"


def test_example_2_starts_anew_after_a_reset(office: Office) -> None:
    first = office.wait_at("/example2")
    assert first.follow() == "Example 2 finished"
    second = office.wait_at("/example2")
    assert second.job_id != first.job_id
    assert second.follow() == "Example 2 finished"


def test_example_3_goes_on_to_the_callback(office: Office) -> None:
    page = office.wait_at("/example3")
    assert page.next == "/callback_route"
    assert office.wait_at("/callback_route").job_id == page.job_id
    assert page.follow() == "Example 3 finished"
    assert office.printed("Request for /example3", "Request for /callback_route") == [
        "Request for /example3",
        "Request for /callback_route",
        "Request for /callback_route",
    ]


def test_example_4_goes_on_where_it_was(office: Office) -> None:
    page = office.wait_at("/example4")
    for _ in range(2):
        office.wait_at("/example4")
    assert page.follow() == "Example 4 finished"
    lines = ["Request for /example4", "hello world", "hello moon", "hello star"]
    asked, world, moon, star = lines
    expected = [asked, world, moon, asked, moon, asked, moon, asked, moon, star]
    assert office.printed(*lines) == expected
    assert office.get("/example4") == "Example 4 finished"
    assert office.printed(*lines) == [*expected, asked, star]


def test_example_5_begins_at_the_beginning_again(office: Office) -> None:
    lines = ["Request for /example5", "hello world"]
    before = office.printed("hello world")
    for _ in range(2):
        assert office.wait_at("/example5").follow() == "Example 5 finished"
    assert len(office.printed("hello world")) == len(before) + 2
    assert office.printed(lines[0]) == [lines[0]] * 4


def test_what_the_task_prints(office: Office) -> None:
    office.get("/dismiss/employer1")
    lines = ["Complex task started", "Progress: 0.0%", "Progress: 50.0%", "Progress: 100.0%", "Complex task finished"]
    before = office.printed(*lines)
    assert office.wait_at("/example1").follow() == "Example 1 finished"
    assert office.printed(*lines)[len(before) :] == lines


def test_requests_that_race_start_one_job(office: Office, name: str) -> None:
    job_ids = list[str]()
    run_in_threads(12, lambda: job_ids.append(office.wait_at(f"/work/{name}").job_id))
    assert len(job_ids) == 12
    assert len(set(job_ids)) == 1
    page = office.wait_at(f"/work/{name}")
    office.finish(name)
    assert page.follow() == "<h1>The work is done</h1>"
    assert office.printed(f"{name} started") == [f"{name} started"]


def test_a_job_that_fails_ends_the_page_and_can_be_started_again(office: Office, name: str) -> None:
    office.get(f"/hire/{name}?method=fail")
    page = office.wait_at(f"/work/{name}")
    assert page.end() == "failed"
    assert "a secret of" not in office.get(page.url)
    office.get(f"/hire/{name}")
    again = office.wait_at(f"/work/{name}")
    assert again.job_id != page.job_id
    office.finish(name)
    assert again.follow() == "<h1>The work is done</h1>"


def test_a_worker_that_is_killed_ends_the_page(office: Office, name: str) -> None:
    if not (office.folder / "worker.log").exists():
        pytest.skip("without RQ it is the server that would be killed")
    office.get(f"/hire/{name}?method=die")
    page = office.wait_at(f"/work/{name}")
    assert page.end() == "failed"
    office.get(f"/hire/{name}")
    office.finish(name)
    assert office.wait_at(f"/work/{name}").follow() == "<h1>The work is done</h1>"


def test_a_job_whose_worker_was_reset_meanwhile_finishes_nothing(office: Office, name: str) -> None:
    page = office.wait_at(f"/work/{name}")
    assert wait_until(lambda: page.status == "running", timeout=30)
    office.get(f"/dismiss/{name}")
    office.finish(name)
    assert page.end() == "succeeded"
    again = office.wait_at(f"/work/{name}")
    assert again.job_id != page.job_id
    assert again.follow() == "<h1>The work is done</h1>"


@pytest.mark.parametrize("template", ["", "own.html"])
def test_the_page_is_from_here(office: Office, name: str, template: str) -> None:
    office.get(f"/hire/{name}?template={template}&loading_img=my-loading-img.gif")
    text = office.wait_at(f"/work/{name}").text
    office.finish(name)
    links = re.findall(r'(?:src|href|action|content)="([^"]*)"', text)
    assert "/static/my-loading-img.gif" in links
    assert "/_executor/flask_worker.js" in links
    assert "//" not in text
    for link in links:
        if link.startswith("/"):
            served = office.get(link) if not link.endswith(".gif") else ""
            assert not re.search(r"https?://(?!www\.w3\.org/)", served), link


def test_the_status_of_an_unknown_job(office: Office) -> None:
    for query in ("", "?job_id=", "?job_id=0000", "?job_id=a:b*"):
        assert office.ask(f"/_check_job_status{query}")[0] == 404, query


def test_sockets_hear_of_jobs(office: Office, name: str) -> None:
    if "socketio=socketio" not in (office.folder / "factory.py").read_text():
        pytest.skip("without sockets")
    heard = list[str]()
    namespace = f"/Worker-{_worker_id(office, name)}"
    with socketio.SimpleClient() as client:
        client.connect(office.url, namespace=namespace)
        page = office.wait_at(f"/work/{name}")
        office.finish(name)
        heard += [client.receive(timeout=30)[0] for _ in range(2)]
        office.get(f"/dismiss/{name}")
        office.get(f"/hire/{name}?method=fail")
        office.wait_at(f"/work/{name}")
        heard += [client.receive(timeout=30)[0] for _ in range(2)]
    assert page.end() == "succeeded"
    assert heard == ["job_started", "job_finished", "job_started", "job_failed"]


def _worker_id(office: Office, name: str) -> int:
    engine = sqlalchemy.create_engine(f"sqlite:///{office.folder}/data.db")
    question = "SELECT worker.id FROM worker JOIN employer ON employer.id = employer_id WHERE name = :name"
    with engine.connect() as connection:
        found: int = connection.execute(sqlalchemy.text(question), {"name": name}).scalar_one()
    engine.dispose()
    return found


# ---- one thing at a time ----

db = SQLAlchemy()


class Employer(db.Model):  # type: ignore[name-defined, misc]
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String)
    worker = db.relationship("Worker", uselist=False, backref="employer")

    def greet(self, *people: Any, **more: Any) -> None:
        self.name = f"{people} {more}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class Worker(WorkerMixin, db.Model):  # type: ignore[name-defined, misc]
    id = db.Column(db.Integer, primary_key=True)
    employer_id = db.Column(db.Integer, db.ForeignKey("employer.id"))


class Router(RouterMixin, db.Model):  # type: ignore[name-defined, misc]
    id = db.Column(db.Integer, primary_key=True)

    @set_route
    def meet(self, *people: Any, **more: Any) -> str:
        """Says whom it meets."""
        return f"{people} {more}"


@pytest.fixture(params=["thread"])
def manager(app: Flask, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Manager]:
    app.config["EXECUTOR_TYPE"] = request.param
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/data.db"
    db.init_app(app)
    manager = Manager(app, db=db)
    with app.app_context():
        db.create_all()
    yield manager
    app.extensions["executor"].shutdown()
    with app.app_context():
        db.engine.dispose()


@pytest.fixture
def client(app: Flask, manager: Manager) -> FlaskClient:
    @app.get("/")
    def work() -> str:
        from flask import request

        worker = the(Worker)
        worker.callback = request.args.get("callback")
        return "done" if worker.job_finished else str(worker())

    return app.test_client()


def the(model: Any) -> Any:
    """The first row of a model."""
    return db.session.get(model, 1)


def hire(**columns: Any) -> Any:
    employer = Employer(name="Ada", worker=Worker(method_name="greet", **columns))
    db.session.add(employer)
    db.session.commit()
    return employer


@pytest.mark.parametrize(
    "callback",
    [
        "https://evil.example/",
        "//evil.example/",
        "\\\\evil.example",
        "/\\evil.example",
        "/\t/evil.example",
        " \x01//evil.example",
        "http:\n//evil.example",
        "javascript:alert(1)",
        "data:text/html,x",
        "http://localhost:81/",
        "http://localhost@evil.example/",
        "ftp://localhost/",
        "http://[evil.example/",
        "http://\u2100.example/",
    ],
)
def test_a_callback_that_leads_elsewhere_is_refused(app: Flask, client: FlaskClient, callback: str) -> None:
    with app.app_context():
        hire()
    answer = client.get("/", query_string={"callback": callback})
    assert (answer.status_code, "another site" in answer.text) == (400, True)
    with app.app_context():
        assert the(Worker).job_id is None


@pytest.mark.parametrize(
    ("callback", "leads_to"),
    [
        ("callback_route", "/callback_route"),
        ("/a/b?c=1&d=2#e", "/a/b?c=1&amp;d=2#e"),
        ("http://localhost/a", "/a"),
        ("///evil.example", "/evil.example"),
        ("http:evil.example", "/evil.example"),
        ("?page=2", "/?page=2"),
        ("a:b", None),
    ],
)
def test_a_callback_on_this_site(app: Flask, client: FlaskClient, callback: str, leads_to: str | None) -> None:
    with app.app_context():
        hire()
    answer = client.get("/", query_string={"callback": callback})
    if leads_to is None:
        assert answer.status_code == 400
    else:
        assert f'data-worker-callback="{leads_to}"' in answer.text


@pytest.mark.parametrize("manager", ["thread", "process", "immediate"], indirect=True)
def test_models_as_arguments(app: Flask, client: FlaskClient) -> None:
    with app.app_context():
        boss = Employer(name="Bob")
        db.session.add(boss)
        db.session.flush()
        hire(args=[boss, [boss], (1, boss)], kwargs={"to": {"boss": boss}})
    client.get("/")
    drain(app.extensions["executor"])
    assert client.get("/").text == "done"
    with app.app_context():
        said = db.session.scalars(db.select(Employer).filter(Employer.worker != None)).one().name  # noqa: E711
    assert said == "(<Employer Bob>, [<Employer Bob>], (1, <Employer Bob>)) {'to': {'boss': <Employer Bob>}}"


def test_a_model_that_is_gone_is_none(app: Flask, client: FlaskClient) -> None:
    with app.app_context():
        boss = Employer(name="Bob")
        db.session.add(boss)
        db.session.flush()
        employer = hire(args=[boss])
        db.session.delete(boss)
        db.session.commit()
        name_of_employer = db.select(Employer.name).filter_by(id=employer.id)
    client.get("/")
    drain(app.extensions["executor"])
    with app.app_context():
        assert db.session.scalar(name_of_employer) == "(None,) {}"


def test_a_model_without_a_primary_key_is_refused(app: Flask, manager: Manager) -> None:
    with app.app_context(), pytest.raises(sqlalchemy.exc.StatementError, match="flush the session first"):
        hire(args=[Employer(name="Bob")])


def test_arguments_that_are_changed_in_place_are_stored(app: Flask, manager: Manager) -> None:
    with app.app_context():
        worker = hire(args=[1], kwargs={"a": 1}).worker
        worker.args.append(2)
        worker.kwargs["b"] = 2
        db.session.commit()
    with app.app_context():
        worker = the(Worker)
        assert (worker.args, worker.kwargs) == ([1, 2], {"a": 1, "b": 2})


class Harm:
    """What somebody who can write to the database would store."""

    def __reduce__(self) -> Any:
        return print, ("harm is done",)


def test_arguments_are_signed(app: Flask, client: FlaskClient, capsys: pytest.CaptureFixture[str]) -> None:
    with app.app_context():
        hire(args=[1])
    app.config.update(SECRET_KEY="a newer one", SECRET_KEY_FALLBACKS=[app.secret_key])
    with app.app_context():
        assert the(Worker).args == [1]
        db.session.execute(sqlalchemy.text("UPDATE worker SET args = :args"), {"args": pickle.dumps([Harm()])})
        db.session.commit()
    app.testing = True
    with pytest.raises(UntrustedResult, match="not signed with this app's SECRET_KEY"):
        client.get("/")
    assert "harm" not in capsys.readouterr().out


def test_arguments_without_a_secret_key(app: Flask, manager: Manager) -> None:
    app.secret_key = None
    with app.app_context():
        hire(args=[1])
    with app.app_context():
        assert the(Worker).args == [1]


def test_a_router_remembers_models(app: Flask, manager: Manager) -> None:
    with app.test_request_context():
        ada = hire()
        router = Router(current_route="meet")
        db.session.add(router)
        assert router.meet(ada, other=ada) == "(<Employer Ada>,) {'other': <Employer Ada>}"
        db.session.commit()
    with app.test_request_context():
        assert the(Router).route() == "(<Employer Ada>,) {'other': <Employer Ada>}"
    assert (Router.meet.__name__, Router.meet.__doc__) == ("meet", "Says whom it meets.")


def test_a_job_that_nobody_knows_any_more_starts_again(app: Flask, client: FlaskClient) -> None:
    left_from_flask_worker = "7a2b3c4d-0000-4000-8000-9fb2a1c0ffee"
    with app.app_context():
        worker = hire().worker
        worker.job_id, worker.job_in_progress = left_from_flask_worker, True
        db.session.commit()
    assert left_from_flask_worker not in client.get("/").text
    drain(app.extensions["executor"])
    assert client.get("/").text == "done"


def test_a_job_that_was_never_handed_over(app: Flask, client: FlaskClient) -> None:
    """The process died after it had claimed the job."""
    just_now, long_ago = (f"{'a' * 32}-{time.time() - age:.0f}" for age in (0, 3600))
    with app.app_context():
        worker = hire().worker
        worker.job_id, worker.job_in_progress = just_now, True
        db.session.commit()
    assert just_now in client.get("/").text
    assert client.get("/_check_job_status", query_string={"job_id": just_now}).json["status"] == "queued"  # type: ignore[index]
    with app.app_context():
        the(Worker).job_id = long_ago
        db.session.commit()
    assert client.get("/_check_job_status", query_string={"job_id": long_ago}).json["status"] == "lost"  # type: ignore[index]
    assert long_ago not in client.get("/").text
    drain(app.extensions["executor"])
    assert client.get("/").text == "done"


def test_jobs_that_are_of_no_worker_are_not_told_of(app: Flask, client: FlaskClient) -> None:
    app.extensions["executor"].submit_once("the month", pow, 1, 1)
    drain(app.extensions["executor"])
    assert client.get("/_check_job_status?job_id=the+month").status_code == 404


def test_a_job_that_is_not_accepted_is_tried_again(app: Flask, client: FlaskClient) -> None:
    with app.app_context():
        hire()
    app.task_queue = object()  # type: ignore[attr-defined]  # a queue that cannot be reached
    app.testing = True
    with pytest.raises(AttributeError, match="enqueue"):
        client.get("/")
    del app.task_queue  # type: ignore[attr-defined]
    assert "data-worker-url" in client.get("/").text
    drain(app.extensions["executor"])
    assert client.get("/").text == "done"


def test_an_app_without_a_static_folder(app: Flask, client: FlaskClient) -> None:
    app.static_folder = None
    with app.app_context():
        hire()
    page = client.get("/").text
    assert "data-worker-url" in page
    assert "<img" not in page


def test_a_worker_without_a_method_has_nothing_to_do(app: Flask, client: FlaskClient) -> None:
    with app.app_context():
        hire().worker.method_name = None
        db.session.commit()
    client.get("/")
    drain(app.extensions["executor"])
    assert client.get("/").text == "done"


def test_jobs_outlive_the_process_where_the_manager_makes_the_executor(app: Flask, manager: Manager) -> None:
    assert app.config["EXECUTOR_STORE"] == "sqlite"


def test_an_executor_that_is_there_is_used(app: Flask) -> None:
    executor = Executor(app)
    Manager(app, db=db)
    assert app.extensions["executor"] is executor
    assert app.config["EXECUTOR_STORE"] == "memory"


def test_settings(app: Flask) -> None:
    manager = Manager(db=db, loading_img="a.gif")
    manager.init_app(app, template="a.html", app_import="shop.app")
    with app.app_context():
        worker = Worker()
        assert (worker.loading_img, worker.template) == ("a.gif", "a.html")
        worker.loading_img, worker.template = "b.gif", "b.html"
        assert (worker.loading_img, worker.template) == ("b.gif", "b.html")
    assert manager.app_import == "shop.app"
    with pytest.raises(TypeError, match="no such setting: blueprint; there are db, socketio"):
        Manager(blueprint="shop")


def test_without_sqlalchemy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flask_executor.compat.flask_worker")
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(MissingExtra, match=re.escape("pip install flask-executor[flask-worker]")):
        importlib.import_module("flask_executor.compat.flask_worker")
