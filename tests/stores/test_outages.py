"""Stores that are not available for a while, or at all."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest
from flask import Flask
from redis_server import RedisServer, redis_client
from tasks import add
from two_apps import another_app, stored
from variants import store_url

from flask_executor import (
    ConfigError,
    Executor,
    StoreUnavailable,
    current_job,
)
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until


def test_redis_is_stopped_and_started(
    make_executor: MakeExecutor, app: Flask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        here = make_executor(store=server.url)
        there = make_executor(other := another_app(app))
        gate = threading.Event()

        def work() -> int:
            gate.wait(20)
            current_job.update(1.0, "done")
            return 7

        future = here.submit_stored("report", work)
        handle = stored(there, "report")
        assert wait_until(lambda: there.futures.running("report"))
        server.stop()
        with pytest.raises(StoreUnavailable, match=f"The job store redis://127.0.0.1:{server.port}/0 is not available"):
            there.futures.done("report")
        with pytest.raises(StoreUnavailable):
            here.submit_stored("second", add, 1, 2)
        assert not there.health().store_reachable
        assert here.futures.running("report"), "its own process knows"
        assert here.submit(add, 1, 2).result(10) == 3
        gate.set()
        assert future.result(10) == 7
        time.sleep(1.5)  # some attempts to write it
        server.start()
        assert handle.result(20) == 7
        assert there.futures.status("report") == "succeeded"
        assert there.futures.message("report") == "done"
        assert here.submit_stored("second", add, 1, 2).result(10) == 3
        assert wait_until(lambda: "is back" in caplog.text)
        assert caplog.text.count("Jobs go on, and what they do is written when it is back") == 1
        assert other is not None
        drain(here)
        here.shutdown()
    finally:
        server.stop()


def test_redis_that_has_forgotten_everything(
    make_executor: MakeExecutor,
    app: Flask,
    request: pytest.FixtureRequest,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    redis_url = store_url("redis", request)
    monkeypatch.setattr("flask_executor.tracking.writer.HEARTBEAT_SECONDS", 0.2)
    here = make_executor(store=redis_url)
    there = make_executor(other := another_app(app))
    here.submit_stored("report", gate.wait, 10)
    with redis_client(redis_url) as client:
        client.flushall()
    assert wait_until(lambda: there.futures.running("report")), "its process writes it again"
    gate.set()
    assert there.futures.result("report", timeout=10) is True
    assert other is not None


def test_sqlite_is_locked_for_long(
    make_executor: MakeExecutor, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flask_executor.stores.sqlite_connection.Connection.BUSY_TIMEOUT", 1.5)
    here = make_executor(store="sqlite")
    gate = threading.Event()
    future = here.submit_stored("report", gate.wait, 10)
    locker = sqlite3.connect(file, isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match=r"another process has written to it for more than 1\.5 s"):
        here.submit_stored("second", add, 1, 2)
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable):
        here.submit_stored("third", add, 1, 2)
    assert time.monotonic() - begin < 1, "nobody is made to wait again at once"
    gate.set()
    assert future.result(10) is True
    time.sleep(1)
    locker.execute("ROLLBACK")
    locker.close()
    store = here._app_executor()[1].tracker.store  # type: ignore[attr-defined]
    assert wait_until(lambda: not is_down(here) and (store.find("report") or future.record()).status == "succeeded")
    assert caplog.text.count("Jobs go on") == 1
    assert here.submit_stored("second", add, 1, 2).result(10) == 3


def is_down(executor: Executor) -> bool:
    return not executor.health().store_reachable


def test_a_disk_that_is_full(make_executor: MakeExecutor, caplog: pytest.LogCaptureFixture) -> None:
    here = make_executor(store="sqlite")
    future = here.submit_stored("first", add, 1, 2)
    assert future.result(10) == 3
    store = here._app_executor()[1].tracker.store  # type: ignore[attr-defined]
    assert wait_until(lambda: store.outcome(future.job_id))
    with store._writes as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
    big = here.submit_stored("big", bytes, 300_000)
    assert big.result(10) == bytes(300_000)
    assert wait_until(lambda: "database or disk is full" in caplog.text)
    with store._writes as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    assert wait_until(lambda: store.outcome(big.job_id), 20)
    assert "is back" in caplog.text or wait_until(lambda: "is back" in caplog.text)


def test_a_corrupt_file_is_reported_and_left_alone(make_executor: MakeExecutor, file: Path) -> None:
    here = make_executor(store="sqlite")
    file.parent.mkdir()
    file.write_bytes(b"this was a database once" * 100)
    for _ in range(2):
        with pytest.raises(
            StoreUnavailable, match=r"\.sqlite is not available: it is no SQLite database, or a broken one"
        ):
            here.submit_stored("report", add, 1, 2)
    assert here.submit(add, 1, 2).result(10) == 3
    assert file.read_bytes() == b"this was a database once" * 100
    file.unlink()
    assert here.submit_stored("report", add, 1, 2).result(10) == 3


def test_a_folder_that_cannot_be_made(make_executor: MakeExecutor, tmp_path: Path) -> None:
    (tmp_path / "instance").write_text("in the way")
    here = make_executor(store="sqlite")
    with pytest.raises(StoreUnavailable, match=r"see that .* exists, is writable, and has space left"):
        here.submit_stored("report", add, 1, 2)


def test_a_file_that_is_deleted_while_it_is_used(
    make_executor: MakeExecutor, file: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, app: Flask
) -> None:
    monkeypatch.setattr("flask_executor.tracking.writer.HEARTBEAT_SECONDS", 0.2)
    here = make_executor(store="sqlite")
    here.submit_stored("report", gate.wait, 10)
    for path in file.parent.iterdir():
        path.unlink()
    assert wait_until(file.exists)
    there = make_executor(other := another_app(app))
    assert wait_until(lambda: there.futures.running("report"))
    assert other is not None


def test_no_password_is_shown(make_executor: MakeExecutor) -> None:
    executor = make_executor(store="redis://user:sesame@127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable, match=r"The job store redis://127\.0\.0\.1:1/0 is not available") as caught:
        executor.submit_stored("report", add, 1, 2)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["redis://:pa/ss@host:port", "reddis://:pa/ss@h", "redis://:pa/ss@h?foo=pa/ss", "redis://h?password=pa/ss&x=1"],
)
def test_no_password_is_shown_in_an_error_of_the_config(make_executor: MakeExecutor, url: str) -> None:
    with pytest.raises((ConfigError, StoreUnavailable)) as caught:
        make_executor(store=url).submit_stored("report", add, 1, 2)
    assert "pa/ss" not in str(caught.value)
    assert caught.value.__cause__ is None or isinstance(caught.value, StoreUnavailable)
