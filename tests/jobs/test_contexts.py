"""The promise on contexts, on threads; ``contract/test_backends.py`` has what holds for every backend."""

from __future__ import annotations

import contextvars
import gc
import logging
import sys
import threading
import weakref
from collections import UserDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.metadata import version
from typing import Any

import pytest
from flask import (
    Flask,
    Request,
    after_this_request,
    current_app,
    flash,
    g,
    get_flashed_messages,
    has_app_context,
    has_request_context,
    request,
    session,
    stream_with_context,
    url_for,
)
from flask.sessions import SessionInterface, SessionMixin
from flask.signals import appcontext_popped, appcontext_pushed, appcontext_tearing_down, request_tearing_down

from flask_executor import AppNotFound, Executor, job_finished
from flask_executor.testing.contract.fixtures import MakeExecutor

colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


def test_everything_of_the_request_is_there(app: Flask, executor: Executor) -> None:
    @app.get("/orders/<int:number>")
    def order(number: int) -> dict[str, Any]:
        g.user = "ada"
        session["basket"] = [1]
        request.note = "on the request"  # type: ignore[attr-defined]
        flash("saved")
        token = colour.set("blue")
        try:
            return executor.submit(look).result()
        finally:
            colour.reset(token)

    def look() -> dict[str, Any]:
        return {
            "app": current_app.name,
            "user": g.user,
            "basket": session["basket"],
            "note": request.note,  # type: ignore[attr-defined]
            "colour": colour.get(),
            "path": request.path,
            "args": request.args["q"],
            "header": request.headers["X-Trace"],
            "view_args": request.view_args,
            "endpoint": request.endpoint,
            "url": url_for("order", number=8),
            "flashes": get_flashed_messages(),
        }

    answer = app.test_client().get("/orders/7?q=tea", headers={"X-Trace": "t1"}).json
    assert answer == {
        "app": "shop",
        "user": "ada",
        "basket": [1],
        "note": "on the request",
        "colour": "blue",
        "path": "/orders/7",
        "args": "tea",
        "header": "t1",
        "view_args": {"number": 7},
        "endpoint": "order",
        "url": "/orders/8",
        "flashes": ["saved"],
    }


def test_what_the_view_changes_later_is_not_seen(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor(max_workers=1)
    go = threading.Event()
    executor.submit(go.wait, 10)
    with app.test_request_context():
        g.value, session["value"], request.value = 1, 1, 1  # type: ignore[attr-defined]
        token = colour.set("before")
        future = executor.submit(lambda: (g.value, session["value"], request.value, colour.get()))  # type: ignore[attr-defined]
        g.value, session["value"], request.value = 2, 2, 2  # type: ignore[attr-defined]
        colour.reset(token)
        go.set()
        assert future.result() == (1, 1, 1, "before")


def test_nothing_that_a_job_does_changes_the_view(app: Flask, executor: Executor) -> None:
    def change() -> None:
        g.value = "job"
        g.more = "job"
        session["value"] = "job"
        session.permanent = True
        request.value = "job"  # type: ignore[attr-defined]
        request.environ["value"] = "job"
        colour.set("job")

    with app.test_request_context():
        g.value = "view"
        session["value"] = "view"
        session.modified = False
        request.value = "view"  # type: ignore[attr-defined]
        executor.submit(change).result()
        assert (g.value, session["value"], request.value) == ("view", "view", "view")  # type: ignore[attr-defined]
        assert "more" not in g
        assert not session.permanent
        assert not session.modified
        assert "value" not in request.environ
        assert colour.get() == "none"


def test_reading_the_session_in_a_job_does_not_mark_it(app: Flask, executor: Executor) -> None:
    @app.get("/")
    def view() -> str:
        return str(executor.submit(lambda: session.get("user")).result())

    assert "Set-Cookie" not in app.test_client().get("/").headers


def test_each_call_has_a_copy_of_its_own_also_in_map(app: Flask, executor: Executor) -> None:
    together = threading.Barrier(4, timeout=10)

    def count(number: int) -> tuple[int, int, int]:
        together.wait()
        g.count += number
        session["count"] += number
        request.count += number  # type: ignore[attr-defined]
        together.wait()
        return g.count, session["count"], request.count  # type: ignore[attr-defined]

    with app.test_request_context():
        g.count = session["count"] = request.count = 0  # type: ignore[attr-defined]
        assert list(executor.map(count, range(4))) == [(n, n, n) for n in range(4)]


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_map_in_chunks_shares_nothing_between_calls(app: Flask, executor: Executor, chunksize: int) -> None:
    def count(number: int) -> tuple[int, bool]:
        seen = "count" in g
        g.count = number
        request.count = number  # type: ignore[attr-defined]
        return number, seen

    with app.test_request_context():
        assert list(executor.map(count, range(7), chunksize=chunksize)) == [(n, False) for n in range(7)]


def test_an_app_context_alone_is_enough(app: Flask, executor: Executor) -> None:
    with app.app_context():
        g.value = 3
        assert executor.submit(lambda: (current_app.name, g.value, has_request_context())).result() == (
            "shop",
            3,
            False,
        )


def test_no_context_at_all_with_one_app(executor: Executor) -> None:
    assert executor.submit(lambda: (current_app.name, list(g), has_request_context())).result() == ("shop", [], False)


def test_a_job_can_submit_jobs(app: Flask, executor: Executor) -> None:
    def outer() -> tuple[str, int, int]:
        g.value += 1
        return executor.submit(lambda: (request.path, g.value, session["value"])).result()

    with app.test_request_context("/here"):
        g.value = session["value"] = 1
        assert executor.submit(outer).result() == ("/here", 2, 1)


def test_push_app_context_off_with_a_request(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor(push_app_context=False)
    with app.test_request_context("/here"):
        g.value = 1
        future = executor.submit(lambda: (current_app.name, request.path, list(g)))
    assert future.result() == ("shop", "/here", [])


def test_push_app_context_off_without_a_request(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor(push_app_context=False)
    with app.app_context():
        token = colour.set("green")
        future = executor.submit(lambda: (has_app_context(), has_request_context(), colour.get()))
        colour.reset(token)
    assert future.result() == (False, False, "green")
    assert executor.submit(has_app_context).result() is False


def test_two_apps_with_one_executor(executor: Executor, app: Flask) -> None:
    other = Flask("other")
    executor.init_app(other)
    for bound in (app, other):
        with bound.app_context():
            assert executor.submit(lambda: current_app.name).result() == bound.name
            executor.submit_stored("key", int)
            assert executor.futures.keys() == ["key"]
    with pytest.raises(AppNotFound, match=r"bound to 2 apps .*with app\.app_context"):
        executor.submit(int)


def test_an_app_that_is_gone_does_not_count(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    for _ in range(3):
        executor.init_app(Flask("of an earlier test"))
    assert executor.submit(lambda: current_app.name).result() == "shop"


def test_teardown_runs_after_each_job_with_its_error(app: Flask, executor: Executor) -> None:
    seen: list[tuple[str, str]] = []

    @app.teardown_request
    def of_request(error: BaseException | None) -> None:
        seen.append(("request " + request.path, str(error)))

    @app.teardown_appcontext
    def of_app(error: BaseException | None) -> None:
        seen.append((current_app.name, str(error)))

    def fail() -> None:
        raise ValueError("no paper")

    with app.test_request_context("/here"):
        executor.submit(int).result()
        assert seen == [("request /here", "None"), ("shop", "None")]
        seen.clear()
        assert str(executor.submit(fail).exception()) == "no paper"
        assert seen == [("request /here", "no paper"), ("shop", "no paper")]
    seen.clear()
    executor.submit(int).result()
    assert seen == [("shop", "None")]


def test_a_teardown_that_raises_does_not_lose_the_result(
    app: Flask, executor: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    @app.teardown_appcontext
    def last(error: BaseException | None) -> None:
        calls.append("app")

    @app.teardown_request
    def first(error: BaseException | None) -> None:
        raise SystemExit("closed twice")

    context = app.test_request_context()
    context.push()
    try:
        future = executor.submit(int, 3)
        assert future.result() == 3
        assert future.status == "succeeded"
        assert calls == ["app"]
    finally:
        with pytest.raises(SystemExit):
            context.pop()
    assert "A teardown function failed" in caplog.text
    assert "closed twice" in caplog.text


def test_flasks_signals_are_sent(app: Flask, executor: Executor) -> None:
    sent: list[str] = []
    receivers = []
    for signal in (appcontext_pushed, request_tearing_down, appcontext_tearing_down, appcontext_popped):

        def note(sender: Flask, _name: str = signal.name, **_: Any) -> None:
            sent.append(_name)

        signal.connect(note, app)
        receivers.append(note)
    with app.test_request_context():
        sent.clear()
        executor.submit(int).result()
        assert sent == ["appcontext-pushed", "request-tearing-down", "appcontext-tearing-down", "appcontext-popped"]


def test_a_context_that_a_job_leaves_pushed(app: Flask, executor: Executor) -> None:
    left: list[str] = []

    @app.teardown_appcontext
    def close(error: BaseException | None) -> None:
        left.append(g.connection)

    def job() -> None:
        g.connection = "of the job"
        app.app_context().push()

    executor.submit(job).result()
    assert left == ["of the job"]


@pytest.mark.skipif(version("flask") < "3", reason="Flask 2.3 pushes the context where the stream is made")
def test_a_job_that_gives_a_stream(app: Flask, executor: Executor) -> None:
    def job() -> Iterator[str]:
        return iter(stream_with_context(iter([request.path, "end"])))

    with app.test_request_context("/here"):
        future = executor.submit(job)
        assert list(future.result()) == ["/here", "end"]
        assert request.path == "/here"
    assert not has_app_context()


def test_flask_signals_that_fail_fail_the_job_and_settle_it(app: Flask, executor: Executor) -> None:
    def refuse(sender: Flask, **_: Any) -> None:
        raise LookupError("receiver")

    def note(sender: Any, job: Any) -> None: ...

    job_finished.connect(note, executor)
    appcontext_pushed.connect(refuse, app)
    future = executor.submit(int)
    assert isinstance(future.exception(timeout=10), LookupError)
    assert future.status == "failed"


def test_messages_flashed_in_a_job_do_not_reach_the_view(app: Flask, executor: Executor) -> None:
    with app.test_request_context():
        flash("view")
        executor.submit(flash, "job").result()
        assert get_flashed_messages() == ["view"]


def test_threads_of_a_job_may_look_at_its_request_at_the_same_time(app: Flask, executor: Executor) -> None:
    def look_at_once() -> list[Any]:
        together = threading.Barrier(8, timeout=10)

        def look() -> tuple[int, str]:
            together.wait()
            return id(request._get_current_object()), request.path  # type: ignore[attr-defined]

        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(contextvars.copy_context().run, look) for _ in range(8)]
            return [future.result() for future in futures]

    with app.test_request_context("/here"):
        for seen in [executor.submit(look_at_once).result() for _ in range(30)]:
            assert len(set(seen)) == 1


def test_a_request_that_cannot_be_closed_loses_no_result(
    app: Flask, executor: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn(Request):
        def close(self) -> None:
            if request.environ.get("in.job"):
                raise OSError("disk")

    app.request_class = Stubborn
    with app.test_request_context("/here"):
        request.environ["in.job"] = True
        future = executor.submit(lambda: request.path)
        assert future.result() == "/here"
        del request.environ["in.job"]
    assert "OSError: disk" in caplog.text


def test_sessions_of_every_kind(app: Flask, executor: Executor) -> None:
    class MappingSession(UserDict[str, Any], SessionMixin):
        pass

    class Interface(SessionInterface):
        def open_session(self, app: Flask, request: Request) -> Any:
            return MappingSession(user="ada")

        def save_session(self, app: Flask, session: Any, response: Any) -> None: ...

    app.session_interface = Interface()

    def change() -> str:
        user: str = session["user"]
        session["user"] = "bob"
        session.modified = True
        return user

    with app.test_request_context():
        session.modified = False
        assert executor.submit(change).result() == "ada"
        assert session["user"] == "ada"
        assert not session.modified


def test_g_of_every_kind(app: Flask, executor: Executor) -> None:
    class SlottedGlobals:
        __slots__ = ("value",)

    app.app_ctx_globals_class = SlottedGlobals  # type: ignore[assignment]
    with app.app_context():
        g.value = 1
        future = executor.submit(lambda: g.value)
        g.value = 2
        assert future.result() == 1


def test_functions_for_after_the_request_are_not_those_of_the_view(app: Flask, executor: Executor) -> None:
    called: list[str] = []

    def note(response: Any) -> Any:
        called.append("job")
        return response

    @app.get("/")
    def view() -> str:
        executor.submit(after_this_request, note).result()
        return "view"

    assert app.test_client().get("/").text == "view"
    assert called == []


def test_async_jobs_inside_an_async_view_on_the_immediate_type(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor(type="immediate")

    async def job() -> str:
        return request.path

    @app.get("/here")
    async def view() -> str:
        future: Any = executor.submit(job)
        return str(await future)

    assert app.test_client().get("/here").text == "/here"


def test_callbacks_are_let_go_of(app: Flask, executor: Executor) -> None:
    class Ghost:
        def __call__(self, _: object) -> None: ...

    callback = Ghost()
    ghost = weakref.ref(callback)
    future = executor.submit(int)
    future.add_done_callback(callback)
    del callback
    executor.wait(10)
    assert ghost() is None
    assert future.done()


class StrictFlask(Flask):
    """An app that overrides what Flask documents as overridable."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.torn_down = 0

    def do_teardown_appcontext(self, *args: Any) -> None:
        self.torn_down += 1
        super().do_teardown_appcontext(*args)


def test_an_app_that_overrides_teardown(make_executor: MakeExecutor) -> None:
    strict = StrictFlask("strict")
    executor = make_executor(strict)
    executor.submit(int).result()
    assert strict.torn_down == 1


def test_async_functions(app: Flask, executor: Executor) -> None:
    async def job() -> tuple[str, str]:
        return current_app.name, request.path

    with app.test_request_context("/here"):
        futures: list[Any] = [executor.submit(job), executor.submit(lambda: job())]
    assert [future.result() for future in futures] == [("shop", "/here")] * 2


def test_async_views_submit_and_await(app: Flask, executor: Executor) -> None:
    @app.get("/<int:number>")
    async def view(number: int) -> list[Any]:
        g.number = number
        futures = [executor.submit(lambda: (request.path, g.number)) for _ in range(3)]
        return [await future for future in futures]

    assert app.test_client().get("/5").json == [["/5", 5]] * 3


def test_an_async_function_without_the_extra(app: Flask, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asgiref.sync", None)

    async def job() -> None: ...

    assert isinstance(executor.submit(job).exception(), RuntimeError)


def test_callbacks_run_in_the_contexts_where_they_were_added(app: Flask, executor: Executor) -> None:
    seen: list[tuple[str, int]] = []
    go = threading.Event()
    with app.test_request_context("/here"):
        g.value = 1
        future = executor.submit(go.wait, 10)
        future.add_done_callback(lambda done: seen.append((request.path, g.value)))
        g.value = 2
    go.set()
    wait([future])
    executor.shutdown()
    assert seen == [("/here", 1)]


def test_a_request_that_is_gone_stays_readable(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor(max_workers=1)
    go = threading.Event()
    executor.submit(go.wait, 10)
    futures = []

    def read() -> tuple[str, str | None, Any, str | None]:
        return request.path, request.form.get("title"), request.get_json(silent=True), request.cookies.get("c")

    @app.post("/<name>")
    def view(name: str) -> str:
        futures.append(executor.submit(read))
        return "started"

    client = app.test_client()
    client.set_cookie("c", "1")
    client.post("/form", data={"title": "A"})
    client.post("/json", json={"title": "B"})
    go.set()
    assert futures[0].result() == ("/form", "A", None, "1")
    assert futures[1].result() == ("/json", None, {"title": "B"}, "1")


def test_failed_jobs_do_not_keep_the_handle_alive_in_a_cycle(app: Flask, executor: Executor) -> None:
    def fail() -> None:
        raise ValueError

    gc.disable()
    try:
        with app.test_request_context():
            future = executor.submit(fail)
            assert isinstance(future.exception(), ValueError)
            ghost = weakref.ref(future)
            executor.submit(int).result()
            del future
            assert ghost() is None
    finally:
        gc.enable()


def test_the_log_of_a_teardown_goes_to_the_app(
    app: Flask, executor: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    @app.teardown_appcontext
    def fail(error: BaseException | None) -> None:
        raise ValueError("closed twice")

    with caplog.at_level(logging.ERROR, logger=app.logger.name):
        assert executor.submit(int).result() == 0
    assert "closed twice" in caplog.text
    assert caplog.records[0].name == app.logger.name
