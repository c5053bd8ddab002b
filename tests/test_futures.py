from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
import weakref
from typing import Any

import pytest
from flask import Flask
from tasks import add, fail, sleep

from flask_executor import Executor, FutureProxy, JobStatus
from flask_executor.executor.extension import propagate_exceptions_callback
from flask_executor.futures import Future
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until


@pytest.fixture
def go() -> threading.Event:
    return threading.Event()


@pytest.fixture
def one_worker(make_executor: MakeExecutor) -> Executor:
    return make_executor(max_workers=1)


def test_it_is_a_future(executor: Executor) -> None:
    future = executor.submit(add, 1, b=2)
    assert isinstance(future, FutureProxy)
    assert isinstance(future, concurrent.futures.Future)
    assert Future is concurrent.futures.Future
    assert concurrent.futures.wait([future]).done == {future}
    assert list(concurrent.futures.as_completed([future])) == [future]
    assert {future: 1}[future] == 1
    assert future.result() == 3
    assert future.exception() is None
    assert future._state == "FINISHED"


def test_it_knows_its_job(executor: Executor) -> None:
    future = executor.submit_stored("sum", add, 1)
    future.result()
    assert len(future.job_id) == 24
    assert (future.key, future.status) == ("sum", "succeeded")
    assert future.record() == executor.jobs.get(future.job_id)
    assert executor.submit(add, 1).key is None


def test_the_error_of_a_job(executor: Executor) -> None:
    future = executor.submit(fail)
    with pytest.raises(ValueError, match="no paper"):
        future.result()
    assert isinstance(future.exception(), ValueError)
    assert future.status == JobStatus.FAILED


def test_base_exceptions_end_the_job_not_the_worker(one_worker: Executor) -> None:
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        one_worker.submit(leave).result()
    assert one_worker.submit(add, 1).result() == 1


def test_cancel_and_stop_a_queued_job(one_worker: Executor, go: threading.Event) -> None:
    running = one_worker.submit(go.wait, 10)
    queued, other = one_worker.submit(fail), one_worker.submit(fail)
    assert wait_until(running.running)
    assert queued.cancel()
    assert other.stop()
    assert not running.cancel()
    for future in (queued, other):
        assert future.cancelled()
        assert future.done()
        assert future.cancel(), "once more is harmless"
        assert future.status == "cancelled"
        assert concurrent.futures.wait([future], timeout=0).done == {future}
        with pytest.raises(concurrent.futures.CancelledError):
            future.result()
    go.set()
    assert running.result()
    assert not running.cancel()
    assert one_worker.submit(add, 2).result() == 2


def test_cancelled_by_shutdown_does_not_hang_those_who_wait(one_worker: Executor, go: threading.Event) -> None:
    running = one_worker.submit(go.wait, 10)
    queued = one_worker.submit(fail)
    waiting = threading.Thread(target=concurrent.futures.wait, args=([queued],))
    waiting.start()
    one_worker.shutdown(wait=False, cancel_futures=True)
    waiting.join(10)
    assert not waiting.is_alive()
    assert queued.status == "cancelled"
    go.set()
    assert running.result()


def test_callbacks(executor: Executor, go: threading.Event) -> None:
    called: list[Any] = []
    future = executor.submit(go.wait, 10)
    future.add_done_callback(called.append)
    go.set()
    assert wait_until(lambda: called)
    future.add_done_callback(called.append)
    assert called == [future, future]
    with pytest.raises(TypeError, match="'nothing to call'"):
        future.add_done_callback("nothing to call")  # type: ignore[arg-type]


def test_a_callback_can_submit(app: Flask, executor: Executor) -> None:
    results: list[int] = []
    with app.test_request_context():
        future = executor.submit(add, 1)
        future.add_done_callback(lambda _: results.append(executor.submit(add, 2).result()))
    assert wait_until(lambda: results)
    assert results == [2]


def test_default_callbacks_see_every_future(app: Flask, executor: Executor) -> None:
    seen: list[Any] = []
    executor.add_default_done_callback(lambda future: seen.append(future.result()))
    with app.test_request_context():
        executor.submit(add, 1).result()
        assert list(executor.map(add, [2, 3])) == [2, 3]
    assert wait_until(lambda: sorted(seen) == [1, 2, 3])
    with pytest.raises(TypeError):
        executor.add_default_done_callback(None)  # type: ignore[arg-type]


def test_propagate_exceptions(make_executor: MakeExecutor, caplog: pytest.LogCaptureFixture) -> None:
    executor = make_executor(propagate_exceptions="yes")
    future = executor.submit(fail)
    executor.wait(10)
    assert [record.name for record in caplog.records] == ["concurrent.futures"]
    assert "no paper" in caplog.text
    with pytest.raises(ValueError, match="no paper"):
        propagate_exceptions_callback(future)
    propagate_exceptions_callback(executor.submit(add, 1))


class TestFailuresThatNobodyLooksAt:
    def test_are_logged_with_their_traceback(
        self, app: Flask, executor: Executor, caplog: pytest.LogCaptureFixture
    ) -> None:
        job_id = executor.submit(fail).job_id
        assert wait_until(lambda: "no paper" in caplog.text)
        (record,) = caplog.records
        assert record.name == app.logger.name
        assert record.levelno == logging.ERROR
        assert "in fail" in caplog.text, "the traceback"
        assert (record.job_id, record.job_key) == (job_id, None)  # type: ignore[attr-defined]

    def test_are_logged_at_once_when_they_are_stored(
        self, executor: Executor, caplog: pytest.LogCaptureFixture
    ) -> None:
        executor.submit_stored("k", fail)
        executor.wait(10)
        assert "no paper" in caplog.text
        assert executor.futures.exception("k") is not None
        executor.futures.pop("k")
        assert len(caplog.records) == 1

    def test_are_logged_when_only_the_waiting_timed_out(
        self, executor: Executor, go: threading.Event, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail_later() -> None:
            go.wait(10)
            fail()

        future = executor.submit(fail_later)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(timeout=0.01)
        del future
        go.set()
        assert wait_until(lambda: "no paper" in caplog.text)

    def test_are_not_logged_when_one_of_two_gave_up(
        self, executor: Executor, go: threading.Event, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail_later() -> None:
            go.wait(10)
            fail()

        future = executor.submit_stored("k", fail_later)
        patient = threading.Thread(target=future.exception)
        patient.start()
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(timeout=0.01)
        go.set()
        patient.join()
        executor.wait(10)
        assert not caplog.records

    @pytest.mark.parametrize("stored", [False, True])
    def test_are_not_logged_when_somebody_looks(
        self, executor: Executor, go: threading.Event, caplog: pytest.LogCaptureFixture, stored: bool
    ) -> None:
        def fail_later() -> None:
            go.wait(10)
            fail()

        future = executor.submit_stored("k", fail_later) if stored else executor.submit(fail_later)
        threading.Timer(0.05, go.set).start()
        assert isinstance(future.exception(timeout=10), ValueError)
        if stored:
            executor.futures.pop("k")
        del future
        executor.wait(10)
        assert not caplog.records


def test_await(executor: Executor) -> None:
    async def main() -> list[Any]:
        with pytest.raises(ValueError, match="no paper"):
            await executor.submit(fail)
        futures = [executor.submit(sleep, 0.01) for _ in range(3)]
        return [await future for future in futures] + [await executor.submit(add, 1)]

    assert asyncio.run(main()) == [0.01, 0.01, 0.01, 1]


def test_giving_up_an_await_leaves_the_job_alone(executor: Executor, go: threading.Event) -> None:
    future = executor.submit(go.wait, 10)

    async def wait() -> bool:
        return await future

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(wait(), 0.01)

    asyncio.run(main())
    go.set()
    assert future.result()


def test_asyncios_own_ways(executor: Executor) -> None:
    async def main() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        return await asyncio.wrap_future(executor.submit(add, 1)), await loop.run_in_executor(executor, add, 2)

    assert asyncio.run(main()) == (1, 2)


def test_racing_cancels_and_workers_agree(executor: Executor) -> None:
    """Exactly one of them wins: a job either runs, or is cancelled, never both."""
    ran: list[int] = []
    futures = [executor.submit(ran.append, number) for number in range(3000)]
    cancelled = [future.cancel() for future in reversed(futures)][::-1]
    assert executor.wait(10)
    assert sorted(ran) == [number for number, gone in enumerate(cancelled) if not gone]
    assert [future.status == "cancelled" for future in futures] == cancelled


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_results_leave_memory_in_time(make_executor: MakeExecutor, store: str) -> None:
    class Result:
        def __reduce__(self) -> tuple[type[int], tuple[()]]:
            return int, ()

    executor = make_executor(store=store, result_ttl=0.2, store_max_records=5)
    references: list[weakref.ref[Result]] = []

    def make() -> Result:
        result = Result()
        references.append(weakref.ref(result))
        return result

    for number in range(10):
        executor.submit_stored(number, make)
        executor.futures.setdefault(("by hand", number), executor.submit(make))
    drain(executor)

    def is_let_go() -> bool:
        executor.submit(str).result(10)
        gc.collect()
        return all(reference() is None for reference in references)

    assert wait_until(is_let_go)
    assert len(references) == 20
