"""Who waits for jobs of other processes, and who gives up."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from typing import Any

import pytest
from tasks import add
from two_apps import stored

from flask_executor import (
    Executor,
    JobStopped,
    current_job,
)
from flask_executor.stores import sqlite
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import wait_until
from flask_executor.tracking.stored_future import StoredFuture


def test_a_record_that_cannot_be_read_is_left_out(
    here: Executor, there: Executor, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_executor.tracking.writer.HEARTBEAT_SECONDS", 0.1)
    odd = here.submit_stored("odd", add, 1, 2)
    drain(here)
    store = here._app_executor()[1].tracker.store  # type: ignore[attr-defined]
    if isinstance(store, sqlite.SQLiteStore):
        with store._writing() as connection:
            connection.execute("UPDATE jobs SET status = 'paused', ended_at = NULL, holder = 'x.1.2.3'")
    else:
        name = f"{store._prefix}job:{odd.job_id}"
        store._redis.set(name, store._redis.get(name).replace(b"succeeded", b"paused"))
    future = here.submit_stored("report", gate.wait, 10)
    time.sleep(0.3)
    assert [job.id for job in there.jobs.list()] == [future.job_id]
    gate.set()
    assert there.futures.result("report", timeout=10) is True


def test_shutdown_lets_those_wait_who_wait(here: Executor, there: Executor, gate: threading.Event) -> None:
    here.submit_stored("report", gate.wait, 10)
    handle = stored(there, "report")
    results: list[Any] = []
    waiting = threading.Thread(target=lambda: results.append(handle.result(10)))
    waiting.start()
    assert wait_until(lambda: handle._waiting)
    there.shutdown()
    gate.set()
    waiting.join()
    assert results == [True]


def test_a_callback_that_takes_long_does_not_hold_up_a_stop(here: Executor, there: Executor) -> None:
    release = threading.Event()
    there.submit_stored("first", time.sleep, 0.05)
    here.futures.get("first").add_done_callback(lambda _: release.wait(10))  # type: ignore[union-attr]

    def work() -> None:
        current_job.sleep(10)

    future = here.submit_stored("report", work)
    assert wait_until(lambda: there.futures.running("report"))
    time.sleep(0.2)
    assert there.futures.stop("report")
    assert isinstance(future.exception(5), JobStopped)
    release.set()
    drain(there)


def test_who_waits_no_more_is_not_followed(here: Executor, there: Executor, gate: threading.Event) -> None:
    here.submit_stored("report", gate.wait, 10)
    for _ in range(20):
        with pytest.raises(concurrent.futures.TimeoutError):
            stored(there, "report").result(timeout=0)
    assert concurrent.futures.wait([stored(there, "report")], 0).done == set()
    watcher = there._app_executor()[1].tracker._watcher  # type: ignore[attr-defined]
    assert watcher._futures == {}


def test_one_gives_up_while_others_wait(here: Executor, there: Executor) -> None:
    for number in range(5):
        here.submit_stored(number, time.sleep, 0.2)
        wait_while_others_give_up(stored(there, number))


def wait_while_others_give_up(handle: StoredFuture[Any]) -> None:
    called: list[Any] = []

    def give_up() -> None:
        until = time.monotonic() + 0.25
        while time.monotonic() < until:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                handle.result(0)

    impatient = [threading.Thread(target=give_up) for _ in range(3)]
    for thread in impatient:
        thread.start()
    handle.add_done_callback(called.append)
    assert concurrent.futures.wait([handle], 10).done == {handle}
    assert handle.result(10) is None
    assert wait_until(lambda: called == [handle])
    for thread in impatient:
        thread.join()
