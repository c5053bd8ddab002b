"""An app and a test-suite written for Flask-Executor 1.0: what it documents, and what published code relies on."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, Response, current_app, g, jsonify, request

from flask_executor import Executor
from flask_executor.executor.extension import propagate_exceptions_callback
from flask_executor.executor.submitters import ExecutorJob
from flask_executor.futures import Future, FutureCollection, FutureProxy
from flask_executor.testing.contract.fixtures import wait_until


def fib(n: int) -> int:
    return 1 if n <= 2 else fib(n - 1) + fib(n - 2)


def config_value(_: object = None) -> Any:
    return current_app.config["VALUE"]


def g_value(_: object = None) -> Any:
    return g.value


def request_value(_: object = None) -> Any:
    return request.value  # type: ignore[attr-defined]


@pytest.fixture(params=["thread", "process"])
def either(request: pytest.FixtureRequest, app: Flask) -> Flask:
    app.config["EXECUTOR_TYPE"] = request.param
    return app


@pytest.fixture(autouse=True)
def shut_down(app: Flask) -> Iterator[None]:
    yield
    for executor in {name: value for name, value in app.extensions.items() if name.endswith("executor")}.values():
        executor.shutdown()


def test_the_readmes_routes(app: Flask) -> None:
    executor = Executor(app)

    @app.route("/example1")
    def example1() -> str:
        executor.submit(fib, 5)
        return "OK"

    @app.route("/example2")
    def example2() -> str:
        future = executor.submit(fib, 5)
        return str(future.result())

    @app.route("/example3")
    def example3() -> Response:
        futures = [executor.submit(fib, i) for i in range(1, 16)]

        def generate() -> Iterator[str]:
            for future in concurrent.futures.as_completed(futures):
                yield str(future.result()) + "\n"

        return Response(generate(), mimetype="text/text")

    @executor.job
    def decorated(n: int) -> int:
        return fib(n)

    @app.route("/example4")
    def example4() -> str:
        decorated.submit(5)
        decorated.map(range(1, 6))
        return "OK"

    client = app.test_client()
    assert client.get("/example1").text == "OK"
    assert client.get("/example2").text == "5"
    assert sorted(map(int, client.get("/example3").text.split())) == sorted(fib(i) for i in range(1, 16))
    assert client.get("/example4").text == "OK"
    assert isinstance(decorated, ExecutorJob)


def test_the_documented_polling_routes(app: Flask) -> None:
    executor = Executor(app)
    go = threading.Event()

    def power(a: int, b: int) -> int:
        go.wait(10)
        return int(pow(a, b))

    @app.route("/start-task")
    def start_task() -> Response:
        executor.submit_stored("calc_power", power, 3, 4)
        return jsonify({"result": "success"})

    @app.route("/get-result")
    def get_result() -> Response:
        if not executor.futures.done("calc_power"):
            future_status = executor.futures._state("calc_power")
            return jsonify({"status": future_status})
        future = executor.futures.pop("calc_power")
        assert future is not None
        return jsonify({"status": "done", "result": future.result()})

    client = app.test_client()
    assert client.get("/get-result").json == {"status": None}
    client.get("/start-task")
    assert wait_until(lambda: client.get("/get-result").json == {"status": "RUNNING"})
    go.set()
    assert wait_until(lambda: client.get("/get-result").json == {"status": "done", "result": 81})
    assert client.get("/get-result").json == {"status": None}


def test_contexts_in_every_way_of_submitting(app: Flask) -> None:
    app.config["VALUE"] = 1
    executor = Executor(app)
    for job, expected in [(config_value, 1), (g_value, 2), (request_value, 3)]:
        with app.test_request_context(""):
            g.value, request.value = 2, 3  # type: ignore[attr-defined]
            future, results = executor.submit(job), executor.map(job, range(5))
        assert future.result() == expected
        assert list(results) == [expected] * 5


def test_types(either: Flask) -> None:
    kind: Any = {"thread": concurrent.futures.ThreadPoolExecutor, "process": concurrent.futures.ProcessPoolExecutor}[
        either.config["EXECUTOR_TYPE"]
    ]
    either.config["EXECUTOR_MAX_WORKERS"] = "2"
    executor: Any = Executor(either)
    assert isinstance(executor, kind)
    assert isinstance(executor._self, kind)
    assert executor._max_workers == executor._self._max_workers == 2
    with either.test_request_context(""):
        assert executor.submit(fib, 5).result() == 5
        assert Executor(either, name="custom").submit(fib, 5).result() == 5
    assert set(either.extensions) >= {"executor", "customexecutor"}


def test_decorating_for_processes_is_a_type_error(app: Flask) -> None:
    app.config["EXECUTOR_TYPE"] = "process"
    executor = Executor(app)
    with pytest.raises(TypeError):

        @executor.job
        def decorated(n: int) -> int:
            return fib(n)


def test_default_callbacks_and_propagation(either: Flask, caplog: pytest.LogCaptureFixture) -> None:
    either.config["EXECUTOR_PROPAGATE_EXCEPTIONS"] = "true"
    executor = Executor(either)

    def mark(future: Any) -> None:
        future.mark = "seen"

    executor.add_default_done_callback(mark)
    with either.test_request_context("/"):
        future = executor.submit(int, "x")
        concurrent.futures.wait([future])
        assert wait_until(lambda: hasattr(future, "mark"))
        with pytest.raises(ValueError, match="invalid literal"):
            propagate_exceptions_callback(future)
    assert wait_until(lambda: "invalid literal" in caplog.text)


def test_a_callback_may_submit_inside_a_request(app: Flask) -> None:
    executor = Executor(app)
    outcome: list[Any] = []

    def callback(future: Any) -> None:
        try:
            outcome.append(executor.submit(fib, 5).result())
        except RuntimeError as error:
            outcome.append(error)

    with app.test_request_context(""):
        executor.submit(fib, 10).add_done_callback(callback)
    assert wait_until(lambda: outcome)
    assert outcome == [5]


def test_plain_futures_in_a_collection() -> None:
    futures: FutureCollection[Any] = FutureCollection(max_length=10)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(pow, 2, 4)
        futures.add(0, first)
        first.result()
        for number in range(1, 11):
            futures.add(number, pool.submit(pow, 2, 4))
    assert len(futures) == 10
    assert first not in futures


def test_what_published_code_imports_and_touches(app: Flask) -> None:
    """As Flask-Shell2HTTP does."""
    executor = Executor(app)
    with app.test_request_context():
        future = executor.submit_stored(future_key="k", fn=fib, n=5)
    assert isinstance(future, Future)
    assert isinstance(future, FutureProxy)
    assert executor.futures._futures.get("k") is future
    assert executor.futures._futures.get("other") is None
    assert executor.futures.max_length == 50
    assert future.result() == 5


def test_teardown_keeps_sessions_clean(app: Flask) -> None:
    """One worker, two jobs: what the first leaves behind in its thread is cleared before the second."""
    app.config["EXECUTOR_MAX_WORKERS"] = 1
    local = threading.local()

    @app.teardown_appcontext
    def clear(_: BaseException | None) -> None:
        if hasattr(local, "value"):
            del local.value

    def use() -> None:
        assert not hasattr(local, "value")
        local.value = True

    executor = Executor(app)
    with app.test_request_context():
        futures = [executor.submit(use) for _ in range(2)]
    for future in futures:
        future.result()


def test_flask_sqlalchemy(app: Flask, tmp_path: Any) -> None:
    """A session for each job, given back after it."""
    from flask_sqlalchemy import SQLAlchemy
    from sqlalchemy import text
    from sqlalchemy.pool import QueuePool

    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/shop.db"
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"poolclass": QueuePool}
    app.config["EXECUTOR_MAX_WORKERS"] = 4
    db = SQLAlchemy(app)
    executor = Executor(app)

    def query(_: object = None) -> tuple[int, int]:
        db.session.execute(text("select 1")).scalar_one()
        return id(db.session()), db.engine.pool.checkedout()  # type: ignore[attr-defined]

    with app.test_request_context():
        mine = id(db.session())
        results = list(executor.map(query, range(40)))
        assert mine not in {session for session, _ in results}
        executor.wait(10)
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    with app.app_context():
        db.engine.dispose()
