"""What is written to a store, when, and what is not."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from tasks import add, fail
from two_apps import another_app, stored

from flask_executor import (
    Executor,
    StoreUnavailable,
    current_job,
    track,
)
from flask_executor.abc import StoreOptions
from flask_executor.stores import sqlite
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until
from flask_executor.tracking.writer import StoreWriter


def test_progress_is_written_ten_times_a_second_and_the_last_lands(here: Executor, there: Executor) -> None:
    seen: list[Any] = []

    def work() -> None:
        for n in range(1, 60_001):
            current_job.update(n / 60_000, n=n)

    writes = count_writes(here)
    begin = time.monotonic()
    here.submit_stored("report", work)
    while not there.futures.done("report"):
        seen.append(there.futures.progress("report"))
        time.sleep(0.01)
    took = time.monotonic() - begin
    assert seen == sorted(seen, key=lambda progress: progress or 0)
    assert stored(there, "report").meta == {"n": 60_000}
    assert len(writes) <= took * 10 + 4


def count_writes(executor: Executor) -> list[int]:
    store = executor._app_executor()[1].tracker.store  # type: ignore[attr-defined]
    write, writes = store.write, []

    def counted(entries: Any) -> None:
        writes.append(len(entries))
        write(entries)

    store.write = counted
    return writes


def test_unkeyed_jobs_are_recorded_when_asked_for(shared_store: str, make_executor: MakeExecutor, app: Flask) -> None:
    here = make_executor(store=shared_store)
    other = another_app(app)
    there = make_executor(other)
    plain = here.submit(add, 1, 2)
    drain(here)
    assert there.jobs.get(plain.job_id) is None
    assert here.jobs.get(plain.job_id) is not None
    app.config["EXECUTOR_TRACK"] = "all"
    here.init_app(app)
    future = here.submit(add, 1, 2)
    assert wait_until(lambda: (job := there.jobs.get(future.job_id)) is not None and job.status == "succeeded")


def test_8_processes_write_progress_at_once(here: Executor, caplog: pytest.LogCaptureFixture) -> None:
    def work(number: int) -> int:
        for n in track(range(100)):
            current_job.update(n=n)
            logging.getLogger("shop").warning("%d %d", number, n)
            time.sleep(0.01)
        return number

    children = []
    for number in range(8):
        pid = os.fork()
        if not pid:
            try:
                here.submit_stored(number, work, number).result(30)
                here.shutdown()
                os._exit(1 if "is not available" in caplog.text else 0)
            finally:
                os._exit(2)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * 8
    for number in range(8):
        handle = stored(here, number)
        assert handle.result(10) == number
        assert (handle.progress, handle.meta) == (1.0, {"n": 99, "done": 100, "total": 100})
        assert [line.text for line in handle.log()] == [f"{number} {n}" for n in range(100)]


def test_many_short_jobs_are_bounded(
    shared_store: str, make_executor: MakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_executor.tracking.writer.HEARTBEAT_SECONDS", 0.2)
    executor = make_executor(store=shared_store, store_max_records=10)
    for number in range(60):
        executor.submit_stored(number, add, 1, 2).result(10)
        time.sleep(0.01)
    drain(executor)
    assert wait_until(lambda: executor.submit_stored(time.time(), add, 1, 2) and len(executor.jobs.list()) < 40)


def test_a_claim_of_which_it_is_not_known_whether_it_was_made_is_retracted(
    here: Executor, there: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = here._app_executor()[1].tracker.store  # type: ignore[attr-defined]
    claim = store.claim

    def claim_and_lose_the_answer(entry: Any, *, again: bool = False) -> None:
        claim(entry, again=again)
        raise StoreUnavailable("the store", "its answer was lost")

    monkeypatch.setattr(store, "claim", claim_and_lose_the_answer)
    with pytest.raises(StoreUnavailable, match="its answer was lost"):
        here.submit_stored("report", fail, "must not run")
    monkeypatch.undo()
    assert wait_until(lambda: there.futures.get("report") is None)
    assert there.submit_stored("report", add, 1, 2).result(10) == 3


def test_what_cannot_be_written_is_left_out_and_the_rest_is_written(
    here: Executor, there: Executor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def odd() -> int:
        current_job.update(0.5, "half", n=10**5000)
        logging.getLogger("caf\udce9").warning("hi")
        return 7

    here.submit_stored("report", odd)
    assert there.futures.result("report", timeout=10) == 7
    store = here._app_executor()[1].tracker.store  # type: ignore[attr-defined]
    write = store.write

    def refuse(entries: Any) -> None:
        if any(entry.job.message for entry in entries):
            raise ValueError("too odd")
        write(entries)

    monkeypatch.setattr(store, "write", refuse)
    here.submit_stored("second", odd)
    assert there.futures.result("second", timeout=10) == 7
    assert "cannot be written" in caplog.text
    monkeypatch.undo()


def test_the_store_is_not_closed_while_the_writer_drops_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At the end of a process: the thread gives back its lease, and the finalizer of the tracker comes in between.
    store = sqlite.SQLiteStore(
        StoreOptions(url=f"sqlite:///{tmp_path}/jobs.sqlite", space="shop", result_ttl=60, max_records=10)
    )
    leaves, goes_on, done = threading.Event(), threading.Event(), []
    close = store.close

    def leave(holder: str) -> None:
        leaves.set()
        assert goes_on.wait(10)
        done.append("left")

    monkeypatch.setattr(store, "drop_lease", leave)
    monkeypatch.setattr(store, "close", lambda: done.append("closed"))
    writer = StoreWriter(store, lambda request: None)
    writer.remove_when_possible("a job that there is not")
    writer.close(wait=False)
    assert leaves.wait(10)
    writer.dispose()
    assert done == []
    goes_on.set()
    assert wait_until(lambda: done == ["left", "closed"])
    close()
