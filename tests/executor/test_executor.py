from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from processes import left_behind
from requirements import require
from tasks import add, fail, sleep

from flask_executor import (
    AppNotFound,
    ConfigError,
    Executor,
    ExecutorError,
    ExecutorJob,
    ExecutorShutdown,
    KeyExists,
    NotPicklable,
    QueueFull,
)
from flask_executor.executor import shutdown
from flask_executor.helpers import InstanceProxy
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, run_in_threads, wait_until


class TestProxy:
    def test_it_passes_for_the_backend(self, executor: Executor) -> None:
        assert isinstance(executor, concurrent.futures.ThreadPoolExecutor)
        assert not isinstance(executor, concurrent.futures.ProcessPoolExecutor)
        assert isinstance(executor, Executor)
        assert isinstance(executor, concurrent.futures.Executor)
        assert isinstance(executor._self, concurrent.futures.ThreadPoolExecutor)
        assert executor._max_workers == 4
        assert executor._shutdown is False
        assert repr(executor).startswith("<Executor(<flask_executor.backends.thread.ThreadBackend")
        with pytest.raises(AttributeError):
            _ = executor.colour

    def test_before_it_is_bound(self) -> None:
        executor = Executor()
        assert executor
        assert executor._self is None
        assert executor.app is None
        assert isinstance(executor, Executor)
        with pytest.raises(AttributeError, match="_max_workers"):
            _ = executor._max_workers

    def test_of_any_object(self) -> None:
        class Stand(InstanceProxy):
            pass

        stand = Stand(concurrent.futures.Future())
        assert isinstance(stand, concurrent.futures.Future)
        assert isinstance(stand, Stand)
        assert "Stand" in repr(stand)
        assert "Future" in repr(stand)


class TestNames:
    def test_registered_under_its_name(self, app: Flask, make_executor: MakeExecutor) -> None:
        plain, reports = make_executor(), make_executor(name="reports_2")
        assert app.extensions["executor"] is plain
        assert app.extensions["reports_2executor"] is reports
        assert reports.submit(add, 1).result() == 1

    @pytest.mark.parametrize("name", ["two words", "a-b", "a.b", "é", "a\n"])
    def test_others_are_refused(self, app: Flask, name: str) -> None:
        with pytest.raises(ValueError, match="letters, digits and underscores"):
            Executor(app, name=name)


class TestLife:
    def test_no_thread_before_the_first_job(self, executor: Executor) -> None:
        assert isinstance(executor, concurrent.futures.ThreadPoolExecutor)
        assert executor.health().workers == 0
        executor.submit(add, 1).result()
        assert executor.health().workers == 1

    def test_init_app(self, app: Flask, make_executor: MakeExecutor) -> None:
        executor = make_executor(None)
        executor.init_app(app)
        assert executor.app is app
        assert executor.submit(add, 1).result() == 1

    def test_shutdown(self, executor: Executor) -> None:
        future = executor.submit(sleep, 0.05)
        executor.shutdown()
        assert future.done()
        assert executor._shutdown is True
        calls: list[Callable[[], object]] = [
            lambda: executor.submit(add, 1),
            lambda: executor.submit_stored("k", add, 1),
        ]
        for call in calls:
            with pytest.raises(ExecutorShutdown, match="shut down") as raised:
                call()
            assert isinstance(raised.value, RuntimeError)
            assert isinstance(raised.value, ExecutorError)
        assert executor.futures.keys() == []
        executor.shutdown()

    def test_shutdown_without_waiting_still_runs_what_was_accepted(self, make_executor: MakeExecutor) -> None:
        executor = make_executor(max_workers=1)
        futures = [executor.submit(sleep, 0.01) for _ in range(5)]
        executor.shutdown(wait=False)
        assert [future.result(timeout=10) for future in futures] == [0.01] * 5

    def test_as_a_context_manager(self, app: Flask) -> None:
        with Executor(app) as executor:
            future = executor.submit(sleep, 0.02)
        assert future.done()
        assert executor._shutdown is True

    def test_an_app_that_is_thrown_away_takes_its_threads_along(self) -> None:
        app = Flask("short-lived")
        executor = Executor(app)
        executor.submit(add, 1).result()
        assert left_behind()
        del app
        assert wait_until(lambda: not left_behind())
        with pytest.raises(AppNotFound, match="its app is gone"):
            executor.submit(add, 1)

    def test_binding_again_keeps_what_there_is(self, app: Flask, executor: Executor) -> None:
        go = threading.Event()
        future = executor.submit_stored("k", go.wait, 10)
        backend = executor._self
        executor.init_app(app)
        assert executor._self is backend, "nothing has changed"
        app.config["EXECUTOR_MAX_WORKERS"] = 2
        executor.init_app(app)
        assert executor._self is not backend
        assert executor.futures.get("k") is future
        assert executor.unfinished() == [future]
        go.set()
        assert future.result()

    def test_binding_again_opens_what_was_shut_down(self, app: Flask, executor: Executor) -> None:
        executor.shutdown()
        executor.init_app(app)
        assert executor.submit(add, 1).result() == 1

    def test_a_stored_failure_does_not_keep_the_app_alive(self) -> None:
        app = Flask("short-lived")
        executor = Executor(app)
        go = threading.Event()

        def fail_later() -> None:
            go.wait(10)
            fail()

        future = executor.submit_stored("k", fail_later)
        threading.Timer(0.05, go.set).start()
        # Somebody looks, so it is not logged: the log would have the traceback, and so the app.
        assert isinstance(future.exception(10), ValueError)
        del future
        ghost = weakref.ref(app)
        del app
        assert wait_until(lambda: not left_behind())
        assert ghost() is None


class TestBadInput:
    @pytest.mark.parametrize("nothing", [None, 3, "add", ()])
    def test_not_callable(self, executor: Executor, nothing: Any) -> None:
        decorate = executor.job()
        calls: list[Callable[[], object]] = [
            lambda: executor.submit(nothing),
            lambda: executor.submit_stored("k", nothing),
            lambda: executor.submit_once("k", nothing),
            lambda: executor.map(nothing, [1]),
            lambda: decorate(nothing),
        ]
        for call in calls:
            with pytest.raises(TypeError, match="needs a function"):
                call()
        assert executor.futures.keys() == []

    def test_a_call_made_by_mistake(self, executor: Executor) -> None:
        with pytest.raises(TypeError, match="not 3; its arguments follow"):
            executor.submit(add(1, 2))  # type: ignore[arg-type]

    def test_a_duplicate_key_runs_nothing(self, executor: Executor) -> None:
        ran: list[int] = []
        executor.submit_stored("k", ran.append, 1).result()
        with pytest.raises(KeyExists, match=r"'k' already exists .*submit_once"):
            executor.submit_stored("k", ran.append, 2)
        assert executor.wait(10)
        assert ran == [1]
        assert len(executor.jobs.list()) == 1

    def test_a_key_that_cannot_be_one(self, executor: Executor) -> None:
        with pytest.raises(ValueError, match="future_key is None"):
            executor.submit_stored(None, add, 1)
        with pytest.raises(TypeError, match="unhashable"):
            executor.submit_stored([], add, 1)  # type: ignore[arg-type]
        assert executor.jobs.list() == []

    def test_no_app(self) -> None:
        executor = Executor()
        for call in (lambda: executor.submit(add, 1), lambda: executor.futures, lambda: executor.health()):
            with pytest.raises(AppNotFound, match=r"pass the app to Executor\(app\).*init_app"):
                call()

    def test_an_app_that_is_not_bound(self, executor: Executor) -> None:
        with Flask("stranger").app_context(), pytest.raises(AppNotFound, match=r"'stranger'.*init_app"):
            executor.submit(add, 1)

    def test_a_bad_chunksize(self, executor: Executor) -> None:
        with pytest.raises(ValueError, match="chunksize is 0"):
            executor.map(add, [1], chunksize=0)

    def test_the_bound_holds_when_many_submit_at_once(self, make_executor: MakeExecutor) -> None:
        executor = make_executor(max_workers=1, max_pending=5)
        go = threading.Event()
        outcomes: list[bool] = []

        def submit() -> None:
            for _ in range(20):
                try:
                    executor.submit(go.wait, 10)
                    outcomes.append(True)
                except QueueFull:
                    outcomes.append(False)

        run_in_threads(8, submit)
        assert outcomes.count(True) == 6
        go.set()


class TestMap:
    def test_results_in_order_ending_with_the_shortest(self, executor: Executor) -> None:
        assert list(executor.map(add, range(5), [10, 20, 30])) == [10, 21, 32]
        assert list(executor.map(add, [])) == []
        assert list(executor.map(add, range(5), chunksize=2)) == list(range(5))

    def test_what_is_late_is_cancelled(self, make_executor: MakeExecutor) -> None:
        executor = make_executor(max_workers=1)
        go = threading.Event()
        executor.submit(go.wait, 10)
        ran: list[int] = []
        with pytest.raises(concurrent.futures.TimeoutError):
            list(executor.map(ran.append, [1, 2], timeout=0.01))
        go.set()
        drain(executor)
        assert ran == []

    def test_everything_starts_at_once(self, executor: Executor) -> None:
        ran: list[int] = []
        executor.map(ran.append, range(3))
        assert wait_until(lambda: sorted(ran) == [0, 1, 2])

    def test_timeout(self, executor: Executor) -> None:
        results = executor.map(sleep, [0.01, 0.5], timeout=0.2)
        assert next(results) == 0.01
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)

    def test_an_error_or_a_closed_iterator_cancels_the_rest(self, make_executor: MakeExecutor) -> None:
        executor = make_executor(max_workers=1)
        ran: list[object] = []

        def work(value: object) -> None:
            ran.append(value)
            if value == "fail":
                fail()
            time.sleep(0.02)

        with pytest.raises(ValueError, match="no paper"):
            list(executor.map(work, ["fail", *range(100)]))
        results = executor.map(work, range(100, 200))
        next(results)
        results.close()  # type: ignore[attr-defined]
        drain(executor)
        assert len(ran) < 20

    def test_all_or_nothing_when_the_queue_is_full(self, make_executor: MakeExecutor) -> None:
        executor = make_executor(max_workers=1, max_pending=2)
        go = threading.Event()
        executor.submit(go.wait, 10)
        ran: list[int] = []
        with pytest.raises(QueueFull):
            executor.map(ran.append, range(5))
        go.set()
        drain(executor)
        assert ran == []

    def test_the_jobs_have_the_functions_name(self, executor: Executor) -> None:
        list(executor.map(add, range(4)))
        list(executor.map(add, range(4), chunksize=4))
        assert {job.name for job in executor.jobs.list()} == {"add"}


class TestOnce:
    def test_a_job_that_is_there_is_found_when_the_queue_is_full(self, make_executor: MakeExecutor) -> None:
        executor = make_executor(max_workers=1, max_pending=1)
        go = threading.Event()
        first = executor.submit_once("k", go.wait, 10)
        executor.submit(go.wait, 10)
        assert executor.submit_once("k", fail) is first
        go.set()


class TestJobDecorator:
    def test_the_function_stays_a_function(self, executor: Executor) -> None:
        @executor.job
        def double(number: int) -> int:
            """Twice as much."""
            return 2 * number

        assert isinstance(double, ExecutorJob)
        assert double(2) == 4
        assert double.__name__ == "double"
        assert double.__doc__ == "Twice as much."
        assert "double" in repr(double)
        assert double.submit(3).result() == 6
        assert double.submit_stored("k", 4).result() == 8
        assert double.submit_once("k", 99).result() == 8
        assert list(double.map([1, 2])) == [2, 4]
        assert list(double.map([1, 2], chunksize=2)) == [2, 4]
        assert executor.submit(double, 5).result() == 10
        assert {job.name for job in executor.jobs.list()} == {"double"}

    def test_before_init_app(self, app: Flask, make_executor: MakeExecutor) -> None:
        executor = make_executor(None)

        @executor.job(name="twice", owner="ada")
        def double(number: int) -> int:
            return 2 * number

        executor.init_app(app)
        future = double.options(key="k").submit(2)
        assert future.result() == 4
        record = future.record()
        assert (record.name, record.owner, record.key) == ("twice", "ada", "k")

    def test_a_local_function_is_refused_for_processes(self, make_executor: MakeExecutor) -> None:
        executor = make_executor(type="process")
        with pytest.raises(NotPicklable, match=r"Can't decorate .*<locals>.*top of a module") as raised:
            executor.job(lambda: None)
        assert isinstance(raised.value, TypeError)


class TestOptions:
    def test_they_are_in_the_record(self, executor: Executor) -> None:
        future = executor.options(name="monthly", key="may", owner="ada").submit(add, 1)
        record = future.record()
        assert (record.name, record.key, record.owner) == ("monthly", "may", "ada")
        assert executor.futures.result("may") == 1
        with pytest.raises(KeyExists):
            executor.options(key="may").submit(add, 1)
        assert executor.options(owner="bob").submit_once("may", fail) is future
        assert executor.options(owner="bob").submit_stored("june", add, 1).record().owner == "bob"

    def test_unknown_ones_are_refused(self, executor: Executor) -> None:
        with pytest.raises(TypeError, match="colour"):
            executor.options(colour="red")  # type: ignore[call-arg]

    def test_map(self, executor: Executor) -> None:
        assert list(executor.options(name="sum").map(add, [1, 2])) == [1, 2]
        assert {job.name for job in executor.jobs.list()} == {"sum"}
        with pytest.raises(ValueError, match="cannot all have the key 'k'"):
            executor.options(key="k").map(add, [1, 2])


def test_names_of_jobs(executor: Executor) -> None:
    class Printer:
        def __call__(self) -> None: ...

        def page(self) -> None: ...

    calls: list[tuple[Callable[[], object], str]] = [
        (int, "int"),
        (functools.partial(add, 1), "add"),
        (functools.partial(functools.partial(add), 1), "add"),
        (Printer(), "Printer"),
        (Printer().page, "Printer.page"),
        (lambda: None, "<lambda>"),
    ]
    for fn, name in calls:
        future = executor.submit(fn)
        future.result()
        assert future.record().name == name


def test_keyword_arguments_may_have_any_name(executor: Executor) -> None:
    def collect(**values: Any) -> dict[str, Any]:
        return values

    assert executor.submit(collect, self=1, key=2, timeout=3).result() == {"self": 1, "key": 2, "timeout": 3}
    assert executor.submit_stored(future_key="k", fn=add, a=1).result() == 1


def test_health(make_executor: MakeExecutor) -> None:
    executor = make_executor(max_workers=1)
    health = executor.health()
    assert (health.workers, health.busy, health.waiting, health.oldest_wait) == (0, 0, 0, 0.0)
    go = threading.Event()
    first, _ = executor.submit(go.wait, 10), executor.submit(go.wait, 10)
    assert wait_until(first.running)
    health = executor.health()
    assert (health.workers, health.busy, health.waiting, health.accepting) == (1, 1, 1, True)
    assert 0 < health.oldest_wait < 10
    assert health.store_reachable
    go.set()
    executor.shutdown()
    assert executor.health().accepting is False


def test_drain(executor: Executor) -> None:
    results: list[int] = []

    def parent() -> None:
        time.sleep(0.01)
        executor.submit(child).add_done_callback(lambda _: results.append(2))

    def child() -> None:
        time.sleep(0.01)
        results.append(1)

    executor.submit(parent)
    drain(executor)
    assert results == [1, 2]
    go = threading.Event()
    executor.submit(go.wait, 10)
    with pytest.raises(TimeoutError, match=r"after 0.01 s .*wait \((running|queued)\)"):
        drain(executor, timeout=0.01)
    go.set()


def test_a_pool_that_cannot_start_a_thread(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            executor.submit_stored("k", fail)
    assert executor.futures.keys() == []
    assert executor.jobs.list() == []
    assert executor.submit(add, 1).result() == 1
    assert executor.wait(10)


def test_the_type_may_become_an_engine_s_and_back(app: Flask, redis_url: str) -> None:
    require("rq")
    executor = Executor(app)
    assert executor.submit(add, 1).result(10) == 1
    before = app.config.copy()
    app.config.update(EXECUTOR_TYPE="rq", EXECUTOR_URL=redis_url, EXECUTOR_APP="tasks:create_app()")
    executor.init_app(app)
    queued = executor.submit(add, 1)
    app.config.update(before)
    with pytest.raises(ConfigError, match="until 1 job"):
        executor.init_app(app)
    assert queued.cancel()
    executor.init_app(app)
    assert executor.submit(add, 2).result(10) == 2
    executor.shutdown()


def test_many_jobs_give_a_process_of_multiprocessing_one_finalizer(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(shutdown, "Finalize", lambda *_, **options: made.append(options))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(shutdown, "_finalized_pid", os.getppid())
    for _ in range(3):
        shutdown.register_for_shutdown(executor._app_executor()[1])
    assert made == [{"exitpriority": 100}]
