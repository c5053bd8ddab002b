"""The file of the SQLite store, and the names of stores in the configuration."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from tasks import add
from two_apps import another_app

from flask_executor import (
    ConfigError,
    MissingExtra,
    StoreUnavailable,
)
from flask_executor.stores import sqlite_schema
from flask_executor.testing.contract.fixtures import MakeExecutor


def test_the_file_is_ours_alone(make_executor: MakeExecutor, file: Path) -> None:
    before = os.umask(0)
    try:
        make_executor(store="sqlite").submit_stored("report", add, 1, 2).result(10)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()}
    assert modes == dict.fromkeys(["executor.sqlite", "executor.sqlite-shm", "executor.sqlite-wal"], 0o600)


@pytest.mark.parametrize("url", ["sqlite:///jobs/mine.db", "sqlite:///{}/jobs/mine.db"], ids=["relative", "absolute"])
def test_where_the_file_is(make_executor: MakeExecutor, tmp_path: Path, url: str) -> None:
    make_executor(store=url.format(tmp_path / "instance")).submit_stored("report", add, 1, 2).result(10)
    assert (tmp_path / "instance" / "jobs" / "mine.db").exists()


def test_each_executor_has_its_own_file(make_executor: MakeExecutor, file: Path, app: Flask) -> None:
    make_executor(store="sqlite").submit_stored("report", add, 1, 2).result(10)
    make_executor(name="mails", store="sqlite").submit_stored("report", add, 1, 2).result(10)
    assert {path.name for path in file.parent.glob("*.sqlite")} == {"executor.sqlite", "mails_executor.sqlite"}


def test_a_file_of_a_newer_version(make_executor: MakeExecutor, file: Path) -> None:
    file.parent.mkdir()
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreUnavailable, match=r"a newer version of Flask-Executor has written it .its schema is 99"):
        make_executor(store="sqlite").submit_stored("report", add, 1, 2)


def test_a_file_of_an_older_version_is_brought_up_to_date(
    make_executor: MakeExecutor, file: Path, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make_executor(store="sqlite")
    before.submit_stored("report", add, 1, 2).result(10)
    before.shutdown()
    step = ("ALTER TABLE jobs ADD COLUMN colour TEXT", "CREATE INDEX jobs_by_colour ON jobs (colour)")
    monkeypatch.setattr(sqlite_schema, "MIGRATIONS", (*sqlite_schema.MIGRATIONS, step))
    after = make_executor(other := another_app(app))
    assert after.futures.result("report") == 3
    connection = sqlite3.connect(file)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(sqlite_schema.MIGRATIONS),)
    assert connection.execute("SELECT colour FROM jobs").fetchall() == [(None,)]
    connection.close()
    assert other is not None


def test_many_processes_make_the_file_at_once(make_executor: MakeExecutor) -> None:
    executor = make_executor(store="sqlite")
    children = []
    for number in range(8):
        pid = os.fork()
        if not pid:
            try:
                ok = executor.submit_stored(number, add, number, 1).result(20) == number + 1
                executor.shutdown()
                os._exit(0 if ok else 1)
            finally:
                os._exit(2)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * 8
    assert sorted(executor.futures.keys()) == list(range(8))  # type: ignore[type-var]


@pytest.mark.parametrize("store", ["sqlit", "postgres://x", "redis://", "sqlite://", 5, None])
def test_stores_that_there_are_not(make_executor: MakeExecutor, store: Any) -> None:
    with pytest.raises(ConfigError, match=r"EXECUTOR_STORE is .*; it must be 'memory', 'sqlite' .a file in the inst"):
        make_executor(store=store)


def test_a_library_that_is_not_installed(make_executor: MakeExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "flask_executor.stores.redis", raising=False)
    with pytest.raises(MissingExtra, match=r"redis is not installed: pip install flask-executor\[redis\]"):
        make_executor(store="redis://127.0.0.1")
