"""What every backend promises about calls, contexts, signals and its end."""

from __future__ import annotations

import concurrent.futures
import io
from functools import partial
from typing import Any

import pytest
from flask import Flask, g, request, session
from werkzeug.datastructures import FileStorage, MultiDict
from werkzeug.test import encode_multipart

from flask_executor.exceptions import ExecutorShutdown
from flask_executor.executor.extension import Executor
from flask_executor.signals import job_failed, job_finished, job_queued, job_started
from flask_executor.testing import drain, jobs
from flask_executor.testing.contract.fixtures import BackendFixtures
from flask_executor.testing.jobs import (
    Tenant,
    add,
    add_async,
    app_name,
    body,
    fail,
    form_and_file,
    of_g,
    of_request,
    of_session,
    pid,
)


class BackendContract(BackendFixtures):
    """Calls, results, contexts, uploads, callbacks, signals, and the end of a backend.

    The fixture ``executor_config`` says which: a dict of what is in the configuration, without ``EXECUTOR_``.
    """

    def test_it_is_an_executor_of_the_standard_library(self, executor: Executor) -> None:
        assert isinstance(executor._self, concurrent.futures.Executor)
        future = executor._self.submit(add, 1, b=2)
        assert future.result() == 3
        with pytest.raises(ValueError, match="no paper"):
            executor._self.submit(fail).result()

    def test_results_and_errors(self, executor: Executor) -> None:
        good, bad = executor.submit(add, 1, b=2), executor.submit(fail, message="torn")
        assert good.result() == 3
        with pytest.raises(ValueError, match="torn"):
            bad.result()
        drain(executor)
        assert [good.status, bad.status] == ["succeeded", "failed"]
        assert bad.record().error == "ValueError: torn"
        assert executor.health().busy == executor.health().waiting == 0

    def test_map(self, executor: Executor) -> None:
        assert list(executor.map(add, range(20), range(20))) == [2 * n for n in range(20)]
        assert list(executor.map(add, range(20), chunksize=3)) == list(range(20))

    def test_stored(self, executor: Executor) -> None:
        executor.submit_stored("sum", add, 1)
        assert executor.futures.result("sum") == 1
        assert executor.futures.done("sum")
        future = executor.futures.pop("sum")
        assert future is not None
        assert executor.jobs.find("sum") == executor.jobs.get(future.job_id)

    def test_contexts(self, app: Flask, executor: Executor) -> None:
        app.config["SERVER_NAME"] = "shop.test"
        with app.test_request_context("/here?q=tea", headers={"X-Trace": "t"}):
            g.user, session["basket"], request.note = "ada", [1], "noted"  # type: ignore[attr-defined]
            futures = [
                executor.submit(app_name),
                executor.submit(of_g, "user"),
                executor.submit(of_request, "path"),
                executor.submit(of_request, "note"),
                executor.submit(of_request, "query_string"),
                executor.submit(of_session, "basket"),
            ]
            g.user = "bob"
            assert list(executor.map(of_g, ["user"] * 3)) == ["bob"] * 3
        assert [future.result() for future in futures] == ["shop", "ada", "/here", "noted", b"q=tea", [1]]

    def test_the_contexts_of_another_call_are_never_seen(self, app: Flask, executor: Executor) -> None:
        with app.test_request_context("/first"):
            g.user = "ada"
            executor.submit(of_g, "user").result()
        for _ in range(4):
            with pytest.raises(AttributeError):
                executor.submit(of_g, "user").result()
            with pytest.raises(RuntimeError, match="request"):
                executor.submit(of_request, "path").result()
            with app.test_request_context("/second"):
                assert executor.submit(of_request, "path").result() == "/second"

    def test_the_route_is_that_of_the_request(self, app: Flask, executor: Executor) -> None:
        app.url_map.converters["tenant"] = Tenant
        app.add_url_rule("/<tenant:name>", "shelf", lambda name: "")

        @app.url_value_preprocessor
        def number(endpoint: str | None, values: dict[str, Any] | None) -> None:
            if values is not None:
                values["page"] = 3

        futures = []

        @app.get("/start/<tenant:name>")
        def start(name: str, page: int) -> str:
            futures.append(executor.submit(of_request, "view_args"))
            return str(futures[-1].result())

        @app.get("/login/<user>")
        def login(user: str, page: int) -> str:
            session["user"] = user
            return ""

        for user in ("ada", "bob"):
            client = app.test_client()
            client.get(f"/login/{user}")
            client.get("/start/books")
        assert [future.result() for future in futures] == [
            {"name": f"books of {user}", "page": 3} for user in ("ada", "bob")
        ]

    def test_a_request_without_a_body(self, app: Flask, executor: Executor) -> None:
        with app.test_request_context("/"):
            futures: list[Any] = [executor.submit(body), executor.submit(of_request, "form")]
        assert futures[0].result() == b""
        assert not futures[1].result()

    def test_an_upload(self, app: Flask, executor: Executor) -> None:
        futures = []

        @app.post("/")
        def view() -> str:
            futures.append(executor.submit(form_and_file))
            return "started"

        data = MultiDict({"title": "T", "upload": FileStorage(stream=io.BytesIO(b"x" * 600_000), filename="f")})
        boundary, body = encode_multipart(data)
        app.test_client().post("/", data=body, content_type=f"multipart/form-data; boundary={boundary}")
        assert futures[0].result() == ("T", "f", b"x" * 600_000)

    def test_callbacks_and_signals(self, app: Flask, executor: Executor) -> None:
        seen: list[str] = []

        def note(name: str, *_: Any, **__: Any) -> None:
            seen.append(name)

        receivers = [partial(note, signal.name) for signal in (job_queued, job_started, job_finished, job_failed)]
        for signal, receiver in zip((job_queued, job_started, job_finished, job_failed), receivers, strict=True):
            signal.connect(receiver, executor)
        executor.submit(add, 1).add_done_callback(partial(note, "called"))
        drain(executor)
        # The workers of an engine send signals where they are.
        told = ["job-queued"] if executor.engine else ["job-queued", "job-started", "job-finished"]
        assert seen == [*told, "called"]

    def test_a_decorated_function(self, app: Flask, executor: Executor) -> None:
        executor.shutdown()  # the app has one of a name at a time
        jobs.unbound.init_app(app)
        try:
            assert jobs.doubled(2) == 4
            assert jobs.doubled.submit(2).result() == 4
            assert list(jobs.doubled.map([1, 2])) == [2, 4]
            assert jobs.doubled.options(name="twice").submit(3).result() == 6
            assert jobs.unbound.jobs.list()[0].name == "twice"
        finally:
            jobs.unbound.shutdown()

    def test_shutdown(self, executor: Executor) -> None:
        futures = [executor.submit(pid) for _ in range(4)]
        executor.shutdown()
        assert [future for future in futures if not future.done()] == []
        assert [future.status for future in futures] == ["succeeded"] * 4
        assert executor.health().accepting is False
        with pytest.raises(ExecutorShutdown):
            executor.submit(pid)

    def test_settling_survives_whatever_a_callback_raises(self, executor: Executor) -> None:
        def leave(_: object) -> None:
            raise SystemExit

        executor.add_default_done_callback(leave)
        assert executor.submit(add, 1).result() == 1
        drain(executor)
        assert [executor.submit(add, n).result() for n in range(6)] == list(range(6))

    def test_async_functions(self, executor: Executor) -> None:
        future: Any = executor.submit(add_async, 1, 2)
        assert future.result() == 3
