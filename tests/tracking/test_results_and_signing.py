"""Results that travel through a store: how large, and signed by whom."""

from __future__ import annotations

import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from tasks import add, fail
from two_apps import another_app, stored

from flask_executor import (
    ConfigError,
    Executor,
    NotPicklable,
    ResultTooLarge,
    UntrustedResult,
    current_job,
)
from flask_executor.stores import sqlite
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until


def test_a_result_that_is_too_large(shared_store: str, make_executor: MakeExecutor, app: Flask) -> None:
    here = make_executor(store=shared_store, result_max_bytes=1000)
    future = here.submit_stored("report", bytes, 2000)
    error = future.exception(10)
    assert isinstance(error, ResultTooLarge)
    assert "The result of job bytes has 20" in str(error)
    assert "EXECUTOR_RESULT_MAX_BYTES allows 1000" in str(error)
    assert future.status == "failed"
    assert here.submit(bytes, 2000).result(10) == bytes(2000), "it is not kept"


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_a_large_result(shared_store: str, make_executor: MakeExecutor, app: Flask, backend: str) -> None:
    here = make_executor(store=shared_store, type=backend)
    there = make_executor(other := another_app(app))
    here.submit_stored("report", bytes, 5_000_000)
    assert there.futures.result("report", timeout=20) == bytes(5_000_000)
    assert other is not None


def test_a_result_that_cannot_be_pickled(here: Executor) -> None:
    error = here.submit_stored("report", threading.Lock).exception(10)
    assert isinstance(error, NotPicklable)
    assert "The result of job" in str(error)
    assert "cannot be kept in the store" in str(error)
    assert here.submit(threading.Lock).result(10) is not None


class Trap:
    def __reduce__(self) -> Any:
        return os.putenv, ("TRAPPED", "1")


def test_what_is_not_signed_with_our_key_is_not_unpickled(
    here: Executor, there: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr("flask_executor.jobs.packing.pickle.loads", loaded.append)
    store = here._app_executor()[1].tracker.store  # type: ignore[attr-defined]
    future = here.submit_stored("report", add, 1, 2)
    other = here.submit_stored("other", add, 1, 2)
    drain(here)
    assert wait_until(lambda: store.outcome(future.job_id) and store.outcome(other.job_id))
    good = store.outcome(future.job_id)
    trap = pickle.dumps(Trap())
    signature = good[2:45]
    for forged in (trap, b"U0" + trap, b"S0" + trap, b"S0" + signature + trap, store.outcome(other.job_id), b"", b"S"):
        plant(store, future.job_id, forged)
        with pytest.raises(UntrustedResult, match="was not signed with this app's SECRET_KEY"):
            stored(there, "report").result(10)
    assert loaded == []


def plant(store: Any, id: str, outcome: bytes) -> None:
    """Write as somebody who can write to the store."""
    if isinstance(store, sqlite.SQLiteStore):
        with store._writing() as connection:
            connection.execute(
                "UPDATE outcomes SET data = ? WHERE number = (SELECT number FROM jobs WHERE id = ?)", (outcome, id)
            )
    else:
        store._redis.set(f"{store._prefix}result:{id}", outcome)


def test_another_key_and_a_former_one(here: Executor, app: Flask, make_executor: MakeExecutor) -> None:
    here.submit_stored("report", add, 1, 2).result(10)
    stranger = another_app(app, secret="another one")
    there = make_executor(stranger)
    assert wait_until(lambda: there.futures.done("report"))
    with pytest.raises(UntrustedResult):
        there.futures.result("report")
    successor = another_app(app, secret="a new one")
    successor.config["SECRET_KEY_FALLBACKS"] = ["not a secret in a test"]
    assert make_executor(successor).futures.result("report") == 3


def test_without_a_key(shared_store: str, make_executor: MakeExecutor, app: Flask, tmp_path: Path) -> None:
    app.secret_key = None
    here = make_executor(store=shared_store)
    if shared_store == "sqlite":
        there = make_executor(other := another_app(app, secret=None))
        here.submit_stored("report", add, 1, 2)
        assert there.futures.result("report", timeout=10) == 3, "the file is ours alone"
        (tmp_path / "instance" / "executor.sqlite").chmod(0o666)
        here = make_executor(another := another_app(app, secret=None))
        assert other is not another
    with pytest.raises(ConfigError, match="SECRET_KEY is None; it must be set, and the same in all processes"):
        here.submit_stored("second", add, 1, 2)
    assert here.jobs.find("second") is None
    assert here.submit(add, 1, 2).result(10) == 3


class Slow:
    """Takes its time to be pickled, as what belongs to an error may."""

    def __reduce__(self) -> Any:
        time.sleep(0.05)
        return Slow, ()


def test_the_end_of_a_job_is_written_with_what_came_of_it(here: Executor, there: Executor) -> None:
    def torn() -> None:
        current_job.update(0.5)
        raise ValueError("no paper", Slow())

    for number in range(10):
        here.submit_stored(number, torn)
    for number in range(10):
        assert isinstance(there.futures.exception(number, timeout=10), ValueError)


def test_a_file_that_others_can_write_to_later(make_executor: MakeExecutor, app: Flask, file: Path) -> None:
    app.secret_key = None
    here = make_executor(store="sqlite")
    there = make_executor(other := another_app(app, secret=None))
    here.submit_stored("report", add, 1, 2).result(10)
    drain(here)
    assert stored(there, "report").result(10) == 3
    file.chmod(0o666)
    with pytest.raises(UntrustedResult, match="Others can write to"):
        stored(there, "report").result(10)
    assert other is not None


def test_an_error_that_is_too_large(shared_store: str, make_executor: MakeExecutor, app: Flask) -> None:
    here = make_executor(store=shared_store, result_max_bytes=20_000)
    there = make_executor(other := another_app(app))
    here.submit_stored("report", fail, "paper " * 10_000)
    error = there.futures.exception("report", timeout=10)
    assert isinstance(error, NotPicklable)
    assert "EXECUTOR_RESULT_MAX_BYTES allows 20000; it was: ValueError: paper" in str(error)
    job = there.jobs.find("report")
    assert job is not None
    assert len(job.error or "") <= 5000
    assert other is not None
