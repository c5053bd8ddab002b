"""Messages to a job that another process has."""

from __future__ import annotations

import os
import pickle
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tasks
from flask import Flask
from redis_server import RedisServer
from tasks import fail
from two_apps import another_app, stored

from flask_executor import (
    ConfigError,
    Executor,
    NotPicklable,
    StoreUnavailable,
)
from flask_executor.jobs.model import JobMessage
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until
from flask_executor.tracking.signing import MESSAGE, PayloadSigner, pack_message


class Trap:
    def __reduce__(self) -> Any:
        return os.putenv, ("TRAPPED", "1")


@pytest.mark.parametrize("type", ["thread", "process", "immediate"])
def test_messages_from_elsewhere(shared_store: str, make_executor: MakeExecutor, app: Flask, type: str) -> None:
    here = make_executor(store=shared_store, type=type, max_workers=1)
    there = make_executor(other := another_app(app))
    submitting = threading.Thread(target=lambda: here.submit_stored("report", tasks.echo_messages, 250))
    submitting.start()  # type immediate runs it there
    assert wait_until(lambda: there.futures.message("report") == "receiving", 20)
    handle = stored(there, "report")
    for number in range(250):
        assert handle.send("page", {"number": number})
    assert handle.result(20) == [("page", {"number": number}) for number in range(250)]
    submitting.join()
    assert not handle.send("page", 250)
    assert other is not None


@pytest.mark.parametrize("type", ["thread", "process"])
def test_messages_to_a_job_that_waits(shared_store: str, make_executor: MakeExecutor, app: Flask, type: str) -> None:
    here = make_executor(store=shared_store, type=type, max_workers=1)
    there = make_executor(other := another_app(app))
    here.submit_stored("first", tasks.echo_messages, 1)
    here.submit_stored("second", tasks.echo_messages, 3)
    assert wait_until(lambda: there.futures.message("first") == "receiving", 20)
    for number in range(3):
        assert stored(there, "second").send("page", number)
    store = here._app_executor()[1].tracker.store  # type: ignore[attr-defined]
    holder = here._app_executor()[1].tracker.writer.holder  # type: ignore[attr-defined]
    assert wait_until(lambda: not store.take_requests(holder)), "its process has them"
    assert stored(there, "first").send("go", 1)
    assert there.futures.result("second", timeout=20) == [("page", 0), ("page", 1), ("page", 2)]
    assert other is not None


@pytest.mark.parametrize("type", ["thread", "process"])
def test_a_message_that_comes_before_the_job_is_in_the_queue(
    shared_store: str, make_executor: MakeExecutor, app: Flask, type: str
) -> None:
    here = make_executor(store=shared_store, type=type, max_workers=1)
    there = make_executor(other := another_app(app))
    here.submit_stored("another", tasks.echo_messages, 1)  # or nobody looks for messages so soon
    binding = here._app_executor()[1]
    enqueue, store, holder = binding.backend.enqueue, binding.tracker.store, binding.tracker.writer.holder  # type: ignore[attr-defined]

    def enqueue_late(call: Any) -> None:
        assert stored(there, "report").send("early", 1)
        assert wait_until(lambda: not store.take_requests(holder))
        enqueue(call)

    binding.backend.enqueue = enqueue_late  # type: ignore[method-assign]
    future = here.submit_stored("report", tasks.echo_messages, 1)
    stored(there, "another").send("go", 1)
    assert future.result(20) == [("early", 1)]
    assert other is not None


def test_a_body_that_cannot_be_sent(here: Executor, there: Executor) -> None:
    future = here.submit_stored("report", tasks.echo_messages, 1)
    with pytest.raises(NotPicklable, match="The message for job echo_messages cannot be sent to the process that has"):
        stored(there, "report").send("page", lambda: None)
    assert stored(there, "report").send("page", 1)
    assert future.result(10) == [("page", 1)]


def test_forged_messages_are_dropped_unopened(
    here: Executor, there: Executor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TRAPPED", raising=False)
    future, other = (here.submit_stored(key, tasks.echo_messages, 2) for key in ("report", "other"))
    tracker = here._app_executor()[1].tracker
    store, trap = tracker.store, pickle.dumps(Trap())  # type: ignore[attr-defined]
    message = JobMessage("page", 0)
    for_other = pack_message(other.record(), message, PayloadSigner([b"not a secret in a test"], MESSAGE))
    stranger = pack_message(future.record(), message, PayloadSigner([b"another secret"], MESSAGE))
    outcome = pack_message(future.record(), message, PayloadSigner([b"not a secret in a test"]))
    good = pack_message(future.record(), message, PayloadSigner([b"not a secret in a test"], MESSAGE))
    forged = [trap, b"U3" + trap, b"S3" + good[2:45] + trap, for_other, stranger, outcome, good[:-1], b"", b"S"]
    assert stored(there, "report").send("page", 1)
    for data in forged:
        assert store.send(future.job_id, data)
    assert stored(there, "report").send("page", 2)
    assert future.result(10) == [("page", 1), ("page", 2)]
    errors = [record for record in caplog.records if "is dropped" in record.getMessage()]
    assert len(errors) == len(forged)
    for record in errors:
        assert f"A message for job echo_messages ({future.job_id}) is dropped: What is there" in record.getMessage()
        assert record.__dict__["job_key"] == "report"
    assert os.environ.get("TRAPPED") is None
    stored(there, "other").send("page", 1)
    stored(there, "other").send("page", 2)
    assert other.result(10) == [("page", 1), ("page", 2)]


class Unbuildable:
    def __reduce__(self) -> Any:
        return fail, ("no paper",)


def test_a_message_that_cannot_be_rebuilt(here: Executor, there: Executor, caplog: pytest.LogCaptureFixture) -> None:
    future = here.submit_stored("report", tasks.echo_messages, 1)
    assert stored(there, "report").send("page", Unbuildable())
    assert stored(there, "report").send("page", 1)
    assert future.result(10) == [("page", 1)]
    assert "is dropped: it cannot be rebuilt here: ValueError: no paper" in caplog.text


def test_messages_without_a_key(
    make_executor: MakeExecutor, app: Flask, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app.secret_key = None
    here = make_executor(store="sqlite")
    there = make_executor(other := another_app(app, secret=None))
    future = here.submit_stored("report", tasks.echo_messages, 1)
    assert stored(there, "report").send("page", 1), "the file is ours alone"
    assert future.result(10) == [("page", 1)]
    future = here.submit_stored("second", tasks.echo_messages, 1)
    file.chmod(0o666)
    late = make_executor(another := another_app(app, secret=None))
    with pytest.raises(ConfigError, match="SECRET_KEY is None; it must be set, and the same in all processes"):
        stored(late, "second").send("page", 1)
    assert stored(there, "second").send("page", 2), "it has not looked since"
    assert wait_until(lambda: "is dropped: Others can write to" in caplog.text), "and is not trusted"
    assert not future.done()
    file.chmod(0o600)
    assert stored(there, "second").send("page", 3)
    assert future.result(10) == [("page", 3)]
    assert other is not another


def test_messages_go_on_when_the_store_is_back(make_executor: MakeExecutor, app: Flask, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        here = make_executor(store=server.url)
        there = make_executor(other := another_app(app))
        future = here.submit_stored("report", tasks.echo_messages, 2)
        handle = stored(there, "report")
        assert handle.send("page", 1)
        server.stop()
        with pytest.raises(StoreUnavailable):
            handle.send("page", "nobody gets it")
        server.start()
        assert wait_until(lambda: not is_down(there))
        assert handle.send("page", 2)
        assert future.result(20) == [("page", 1), ("page", 2)]
        assert other is not None
        here.shutdown()
    finally:
        server.stop()


def test_what_was_handed_on_is_not_handed_on_again(
    make_executor: MakeExecutor, app: Flask, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = make_executor(store="sqlite")
    there = make_executor(other := another_app(app))
    future = here.submit_stored("report", tasks.echo_messages, 3)
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("CREATE TRIGGER stay BEFORE DELETE ON messages BEGIN SELECT RAISE(ABORT, 'they stay'); END")
    for number in range(2):
        assert stored(there, "report").send("page", number)
    assert wait_until(lambda: "they stay" in caplog.text)
    time.sleep(1.2)  # some more looks
    connection.execute("DROP TRIGGER stay")
    assert stored(there, "report").send("page", 2)
    assert future.result(20) == [("page", 0), ("page", 1), ("page", 2)]
    assert wait_until(lambda: connection.execute("SELECT count(*) FROM messages").fetchone() == (0,))
    connection.close()
    assert other is not None


def is_down(executor: Executor) -> bool:
    return not executor.health().store_reachable
