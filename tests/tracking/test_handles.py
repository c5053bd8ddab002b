"""A job of one process, followed and stopped by another."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import tasks
from flask import Flask
from tasks import add, fail
from two_apps import another_app, stored

from flask_executor import (
    Executor,
    JobStopped,
    JobTimeout,
    KeyExists,
    ResultExpired,
    StoreUnavailable,
    WorkerLost,
    current_job,
    track,
)
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, run_in_threads, wait_until


def test_a_handle_from_elsewhere(here: Executor, there: Executor, gate: threading.Event) -> None:
    future = here.options(owner="ada").submit_stored("report", gate.wait, 10)
    assert wait_until(lambda: there.futures.running("report"))
    handle = stored(there, "report")
    assert (handle.job_id, handle.key, handle.status) == (future.job_id, "report", "running")
    assert handle.record().owner == "ada"
    assert not handle.done()
    assert not handle.cancelled()
    assert there.futures._state("report") == "RUNNING"
    with pytest.raises(concurrent.futures.TimeoutError):
        handle.result(timeout=0.1)
    gate.set()
    assert handle.result(timeout=10) is True
    assert handle.exception() is None
    assert handle.done()
    assert not handle.running()
    assert there.futures._state("report") == "FINISHED"
    assert there.futures._state("unknown") is None
    assert handle in there.futures
    assert there.futures.pop("report") is not None
    assert here.futures.done("report") is None, "popped by another process"
    assert here.futures.pop("report") is None
    assert handle not in there.futures


def test_errors_travel(here: Executor, there: Executor) -> None:
    here.submit_stored("report", fail, "no paper")
    error = there.futures.exception("report", timeout=10)
    assert isinstance(error, ValueError)
    assert "no paper" in str(error)
    assert "Traceback" in str(error.__cause__)
    with pytest.raises(ValueError, match="no paper"):
        stored(there, "report").result()


def test_wait_and_as_completed(here: Executor, there: Executor, gate: threading.Event) -> None:
    here.submit_stored("slow", gate.wait, 10)
    here.submit_stored("quick", add, 1, 2)
    slow, quick = stored(there, "slow"), stored(there, "quick")
    done, left = concurrent.futures.wait([slow, quick], 10, concurrent.futures.FIRST_COMPLETED)
    assert (done, left) == ({quick}, {slow})
    assert next(concurrent.futures.as_completed([quick, slow], 10)) is quick
    threading.Timer(0.1, gate.set).start()
    done, left = concurrent.futures.wait([slow, quick], 10)
    assert (done, left) == ({slow, quick}, set())


def test_callbacks(here: Executor, there: Executor, gate: threading.Event) -> None:
    here.submit_stored("report", gate.wait, 10)
    called: list[Any] = []
    handle = stored(there, "report")
    handle.add_done_callback(called.append)
    assert called == []
    gate.set()
    assert wait_until(lambda: called == [handle])
    handle.add_done_callback(called.append)
    assert wait_until(lambda: called == [handle, handle])


def test_await(here: Executor, there: Executor, gate: threading.Event) -> None:
    here.submit_stored("report", gate.wait, 10)

    async def view() -> bool:
        asyncio.get_running_loop().call_later(0.1, gate.set)
        return bool(await asyncio.wait_for(stored(there, "report"), 10))

    assert asyncio.run(view()) is True


def test_it_waits_without_work(here: Executor, there: Executor, gate: threading.Event) -> None:
    here.submit_stored("report", gate.wait, 10)
    handle = stored(there, "report")
    before = time.process_time()
    with pytest.raises(concurrent.futures.TimeoutError):
        handle.result(timeout=2)
    assert time.process_time() - before < 0.3, "of 2 seconds"


def test_it_hears_of_the_end_soon(here: Executor, there: Executor) -> None:
    delays = []
    for number in range(10):
        future = here.submit_stored(number, time.sleep, 0.1)
        handle = stored(there, number)
        ended: list[float] = []
        future.add_done_callback(lambda _, ended=ended: ended.append(time.monotonic()))  # type: ignore[misc]
        handle.result(10)
        delays.append(time.monotonic() - ended[0])
    assert sorted(delays)[5] < 0.5, "it does not wait for the next heartbeat"


def test_stop_from_elsewhere(here: Executor, there: Executor) -> None:
    def work() -> None:
        for _ in track(range(1000)):
            current_job.sleep(0.01)

    future = here.submit_stored("report", work)
    assert wait_until(lambda: there.futures.progress("report"))
    with pytest.raises(ValueError, match="grace is -1"):
        there.futures.stop("report", grace=-1)
    assert there.futures.stop("report")
    assert isinstance(there.futures.exception("report", timeout=10), JobStopped)
    assert future.status == there.futures.status("report") == "stopped"
    assert there.futures.stop("report") is False


def test_a_stop_request_is_seen_elsewhere(here: Executor, there: Executor, gate: threading.Event) -> None:
    future = here.submit_stored("report", gate.wait, 10)
    assert wait_until(lambda: there.futures.running("report"))
    future.stop(grace=60)
    assert wait_until(lambda: there.futures.stop_requested("report"), 2), "though the job reports nothing"
    assert there.futures.status("report") == "running"


def test_kill_from_elsewhere(shared_store: str, make_executor: MakeExecutor, app: Flask) -> None:
    here = make_executor(store=shared_store, type="process", max_workers=1)
    there = make_executor(other := another_app(app))
    here.submit_stored("report", tasks.spin)
    assert wait_until(lambda: there.futures.running("report"))
    assert there.futures.stop("report", grace=0.1)
    assert isinstance(there.futures.exception("report", timeout=10), JobStopped)
    assert there.futures.status("report") == "killed"
    assert other is not None


def test_cancel_from_elsewhere(shared_store: str, make_executor: MakeExecutor, app: Flask) -> None:
    here = make_executor(store=shared_store, max_workers=1)
    there = make_executor(other := another_app(app))
    gate = threading.Event()
    running = here.submit_stored("running", gate.wait, 10)
    queued = here.submit_stored("queued", add, 1, 2)
    assert wait_until(lambda: there.futures.running("running"))
    assert not stored(there, "running").cancel()
    handle = stored(there, "queued")
    assert handle.cancel()
    assert handle.cancelled()
    assert queued.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        handle.result(10)
    done, _ = concurrent.futures.wait([handle], 10)
    assert done == {handle}
    gate.set()
    assert running.result(10)
    assert other is not None


def test_timeouts_and_meta_and_logs_are_seen(here: Executor, there: Executor, app: Flask) -> None:
    def work() -> None:
        current_job.update(0.5, "half", page=3)
        app.logger.warning("paper is low")
        current_job.sleep(10)

    here.options(timeout=0.3).submit_stored("report", work)
    assert isinstance(there.futures.exception("report", timeout=10), JobTimeout)
    handle = stored(there, "report")
    assert (handle.status, handle.progress, handle.message, handle.meta) == ("timed_out", 0.5, "half", {"page": 3})
    assert [line.text for line in handle.log()] == ["paper is low"]
    assert [line.text for line in there.jobs.log(handle.job_id)] == ["paper is low"]
    assert handle.stop_requested


def test_retries_are_seen(here: Executor, there: Executor) -> None:
    attempts: list[int] = []

    def work() -> int:
        attempts.append(current_job.attempt)
        if len(attempts) < 3:
            raise ValueError("no paper")
        return 7

    here.options(retries=3).submit_stored("report", work)
    assert there.futures.result("report", timeout=10) == 7
    job = there.jobs.find("report")
    assert job is not None
    assert job.attempt == 3


def test_by_hand(here: Executor, there: Executor) -> None:
    future = here.submit(add, 1, 2)
    here.futures.add("mine", future)
    with pytest.raises(KeyExists):
        here.futures.add("mine", future)
    assert here.futures.result("mine") == 3
    assert here.futures.keys() == ["mine"]
    assert there.futures.get("mine") is None, "it stays in its process"
    assert here.submit_once("mine", fail, "must not run") is future
    assert here.futures.pop("mine") is future
    here.submit_stored("mine", add, 1, 2)
    with pytest.raises(KeyExists):
        there.futures.add("mine", there.submit(add, 1, 2))
    drain(there)


def test_two_pop_and_one_gets_it(here: Executor, there: Executor) -> None:
    here.submit_stored("report", add, 1, 2).result(10)
    got: list[Any] = []
    executors = iter([here, there] * 8)
    run_in_threads(16, lambda: got.append(next(executors).futures.pop("report")))
    assert sum(future is not None for future in got) == 1


def test_more_than_the_handles_that_are_held(shared_store: str, make_executor: MakeExecutor) -> None:
    executor = make_executor(store=shared_store, futures_max_length=3)
    for number in range(10):
        executor.submit_stored(number, add, number, 1)
    drain(executor)
    assert [executor.futures.result(number, timeout=10) for number in range(10)] == list(range(1, 11))
    assert len(executor.futures) == 10
    assert executor.futures.keys() == list(range(10))


def test_expired_handles(shared_store: str, make_executor: MakeExecutor, app: Flask) -> None:
    here = make_executor(store=shared_store, result_ttl=0.3)
    there = make_executor(other := another_app(app))
    gate = threading.Event()
    here.submit_stored("report", gate.wait, 10)
    handle = stored(there, "report")
    gate.set()
    assert wait_until(lambda: there.jobs.expired(key="report"))
    assert here.futures.get("report") is None
    assert there.futures.get("report") is None
    with pytest.raises(ResultExpired, match=f"Job {handle.job_id} is not in the store any more"):
        handle.result(10)
    assert other is not None


def test_a_process_that_dies(here: Executor, there: Executor) -> None:
    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        here.submit_stored("report", time.sleep, 60)
        os.write(writes, b"started")
        time.sleep(60)
        os._exit(1)
    os.read(reads, 10)
    os.close(reads)
    os.close(writes)
    handle = stored(there, "report")
    results: list[Any] = []
    waiting = threading.Thread(target=lambda: results.append(handle.exception(20)))
    waiting.start()
    assert wait_until(lambda: there.futures.running("report"))
    os.kill(pid, 9)
    begin = time.monotonic()
    waiting.join()
    assert time.monotonic() - begin < 15
    [error] = results
    assert isinstance(error, WorkerLost)
    assert f"process {pid}, which had the job, is gone" in str(error)
    os.waitpid(pid, 0)
    assert there.jobs.list(status="lost")[0].key == "report"
    assert there.submit_once("report", fail, "must not run").status == "lost"
    assert there.options(again=True).submit_once("report", add, 1, 2).result(10) == 3


def test_nothing_is_opened_before_it_is_needed(make_executor: MakeExecutor, file: Path) -> None:
    executor = make_executor(store="sqlite")
    assert executor.submit(add, 1, 2).result(10) == 3
    assert not file.exists()
    assert executor.futures.get("unknown") is None
    assert file.exists()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StoreUnavailable("elsewhere", "it was away")])
def test_whatever_a_job_raises_others_can_be_followed(here: Executor, there: Executor, error: BaseException) -> None:
    def torn() -> None:
        time.sleep(0.1)
        raise error

    here.submit_stored("torn", torn)
    here.submit_stored("good", time.sleep, 0.2)
    handles = [stored(there, "torn"), stored(there, "good")]
    done, _ = concurrent.futures.wait(handles, 10)
    assert done == set(handles)
    assert type(handles[0].exception()) is type(error)
    here.submit_stored("next", time.sleep, 0.1)
    assert stored(there, "next").result(10) is None


def test_a_job_that_has_ended_does_not_run_again_for_who_reads_slowly(
    here: Executor, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = here._app_executor()[1].tracker.store  # type: ignore[attr-defined]
    find = store.find
    future = here.submit_stored("report", gate.wait, 10)
    assert wait_until(lambda: find("report").status == "running")

    def find_slowly(key: Any) -> Any:
        stored = find(key)
        gate.set()
        future.result(10)
        drain(here)  # its end is written meanwhile
        return stored

    monkeypatch.setattr(store, "find", find_slowly)
    job = here.jobs.find("report")
    assert job is not None
    assert job.status == "succeeded"


def test_owners_that_are_no_strings(here: Executor, there: Executor) -> None:
    for number, owner in enumerate((5, uuid.UUID(int=7), "caf\udce9")):
        here.options(owner=owner).submit_stored(number, add, 1, 2).result(10)  # type: ignore[arg-type]
    drain(here)
    assert [job.owner for job in there.jobs.list()][1:] == [str(uuid.UUID(int=7)), "5"]
    assert [job.key for job in there.jobs.list(owner=5)] == [0]  # type: ignore[arg-type]


def test_a_step_within_itself(here: Executor) -> None:
    def step() -> Any:
        return here.flow("order").step(step)

    with pytest.raises(RuntimeError, match=r"step .*step of flow 'order' would wait for itself"):
        here.flow("order").step(step)
