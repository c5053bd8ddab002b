"""A job of one process, seen from another: two apps with one store stand for two processes here."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import pickle
import sqlite3
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tasks
from flask import Flask
from redis_server import RedisServer, redis_client
from tasks import add, fail
from variants import store_url

from flask_executor import (
    ConfigError,
    Executor,
    JobStopped,
    JobTimeout,
    KeyExists,
    MissingExtra,
    NotPicklable,
    ResultExpired,
    ResultTooLarge,
    StoreUnavailable,
    UntrustedResult,
    WorkerLost,
    current_job,
    track,
)
from flask_executor.abc import StoreOptions
from flask_executor.jobs.model import JobMessage
from flask_executor.stores import sqlite, sqlite_schema
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, run_in_threads, wait_until
from flask_executor.tracking.signing import MESSAGE, PayloadSigner, pack_message
from flask_executor.tracking.stored_future import StoredFuture
from flask_executor.tracking.writer import StoreWriter


def another_app(app: Flask, secret: str | None = "not a secret in a test") -> Flask:
    other = Flask(app.import_name, instance_path=app.instance_path)
    other.config.update({key: value for key, value in app.config.items() if key.startswith("EXECUTOR_")})
    other.secret_key = secret
    return other


@pytest.fixture
def here(shared_store: str, make_executor: MakeExecutor) -> Executor:
    return make_executor(store=shared_store, max_workers=4)


@pytest.fixture
def there(here: Executor, app: Flask, make_executor: MakeExecutor) -> Executor:
    other = another_app(app)
    there = make_executor(other)
    there.keep = other  # type: ignore[attr-defined]  # an executor does not keep its app alive
    return there


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def stored(executor: Executor, key: Any) -> StoredFuture[Any]:
    future = executor.futures.get(key)
    assert isinstance(future, StoredFuture)
    return future


# ---- handles ----


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
    assert sorted(delays)[5] < 0.05


def test_stop_from_elsewhere(here: Executor, there: Executor) -> None:
    def work() -> None:
        for _ in track(range(1000)):
            current_job.sleep(0.01)

    future = here.submit_stored("report", work)
    assert wait_until(lambda: there.futures.progress("report"))
    with pytest.raises(ValueError, match="grace is -1"):
        there.futures.stop("report", grace=-1)
    begin = time.monotonic()
    assert there.futures.stop("report")
    assert isinstance(there.futures.exception("report", timeout=10), JobStopped)
    assert time.monotonic() - begin < 1
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
    store = executor._binding()[1].tracker.store  # type: ignore[attr-defined]
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


# ---- results ----


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
    store = here._binding()[1].tracker.store  # type: ignore[attr-defined]
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


# ---- messages ----


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
    store = here._binding()[1].tracker.store  # type: ignore[attr-defined]
    holder = here._binding()[1].tracker._recorder.holder  # type: ignore[attr-defined]
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
    binding = here._binding()[1]
    enqueue, store, holder = binding.backend.enqueue, binding.tracker.store, binding.tracker._recorder.holder  # type: ignore[attr-defined]

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
    tracker = here._binding()[1].tracker
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


# ---- processes that die ----


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


# ---- stores that are not available ----


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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "instance" / "executor.sqlite"


def test_sqlite_is_locked_for_long(
    make_executor: MakeExecutor, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flask_executor.stores.sqlite_connection.Connection.BUSY_TIMEOUT", 0.2)
    here = make_executor(store="sqlite")
    gate = threading.Event()
    future = here.submit_stored("report", gate.wait, 10)
    locker = sqlite3.connect(file, isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match=r"another process has written to it for more than 0\.2 s"):
        here.submit_stored("second", add, 1, 2)
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable):
        here.submit_stored("third", add, 1, 2)
    assert time.monotonic() - begin < 0.15, "nobody is made to wait again at once"
    gate.set()
    assert future.result(10) is True
    time.sleep(1)
    locker.execute("ROLLBACK")
    locker.close()
    store = here._binding()[1].tracker.store  # type: ignore[attr-defined]
    assert wait_until(lambda: not is_down(here) and (store.find("report") or future.record()).status == "succeeded")
    assert caplog.text.count("Jobs go on") == 1
    assert here.submit_stored("second", add, 1, 2).result(10) == 3


def is_down(executor: Executor) -> bool:
    return not executor.health().store_reachable


def test_a_disk_that_is_full(make_executor: MakeExecutor, caplog: pytest.LogCaptureFixture) -> None:
    here = make_executor(store="sqlite")
    future = here.submit_stored("first", add, 1, 2)
    assert future.result(10) == 3
    store = here._binding()[1].tracker.store  # type: ignore[attr-defined]
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


# ---- the file ----


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


# ---- config ----


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


def test_no_password_is_shown(make_executor: MakeExecutor) -> None:
    executor = make_executor(store="redis://user:sesame@127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable, match=r"The job store redis://127\.0\.0\.1:1/0 is not available") as caught:
        executor.submit_stored("report", add, 1, 2)
    assert "sesame" not in str(caught.value)


def test_nothing_is_opened_before_it_is_needed(make_executor: MakeExecutor, file: Path) -> None:
    executor = make_executor(store="sqlite")
    assert executor.submit(add, 1, 2).result(10) == 3
    assert not file.exists()
    assert executor.futures.get("unknown") is None
    assert file.exists()


# ---- what a review has found ----


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


def test_a_record_that_cannot_be_read_is_left_out(
    here: Executor, there: Executor, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_executor.tracking.writer.HEARTBEAT_SECONDS", 0.1)
    odd = here.submit_stored("odd", add, 1, 2)
    drain(here)
    store = here._binding()[1].tracker.store  # type: ignore[attr-defined]
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


def test_a_job_that_has_ended_does_not_run_again_for_who_reads_slowly(
    here: Executor, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = here._binding()[1].tracker.store  # type: ignore[attr-defined]
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


def test_a_claim_of_which_it_is_not_known_whether_it_was_made_is_retracted(
    here: Executor, there: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = here._binding()[1].tracker.store  # type: ignore[attr-defined]
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


def test_owners_that_are_no_strings(here: Executor, there: Executor) -> None:
    for number, owner in enumerate((5, uuid.UUID(int=7), "caf\udce9")):
        here.options(owner=owner).submit_stored(number, add, 1, 2).result(10)  # type: ignore[arg-type]
    drain(here)
    assert [job.owner for job in there.jobs.list()][1:] == [str(uuid.UUID(int=7)), "5"]
    assert [job.key for job in there.jobs.list(owner=5)] == [0]  # type: ignore[arg-type]


def test_what_cannot_be_written_is_left_out_and_the_rest_is_written(
    here: Executor, there: Executor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def odd() -> int:
        current_job.update(0.5, "half", n=10**5000)
        logging.getLogger("caf\udce9").warning("hi")
        return 7

    here.submit_stored("report", odd)
    assert there.futures.result("report", timeout=10) == 7
    store = here._binding()[1].tracker.store  # type: ignore[attr-defined]
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
    follower = there._binding()[1].tracker._follower  # type: ignore[attr-defined]
    assert follower._futures == {}


@pytest.mark.parametrize(
    "url",
    ["redis://:pa/ss@host:port", "reddis://:pa/ss@h", "redis://:pa/ss@h?foo=pa/ss", "redis://h?password=pa/ss&x=1"],
)
def test_no_password_is_shown_in_an_error_of_the_config(make_executor: MakeExecutor, url: str) -> None:
    with pytest.raises((ConfigError, StoreUnavailable)) as caught:
        make_executor(store=url).submit_stored("report", add, 1, 2)
    assert "pa/ss" not in str(caught.value)
    assert caught.value.__cause__ is None or isinstance(caught.value, StoreUnavailable)


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


def test_a_step_within_itself(here: Executor) -> None:
    def step() -> Any:
        return here.flow("order").step(step)

    with pytest.raises(RuntimeError, match=r"step .*step of flow 'order' would wait for itself"):
        here.flow("order").step(step)


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


def test_the_store_is_not_closed_while_the_recorder_takes_its_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At the end of a process: the thread gives back its lease, and the finalizer of the ledger comes in between.
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
    recorder = StoreWriter(store, lambda request: None)
    recorder.remove_when_possible("a job that there is not")
    recorder.close(wait=False)
    assert leaves.wait(10)
    recorder.dispose()
    assert done == []
    goes_on.set()
    assert wait_until(lambda: done == ["left", "closed"])
    close()
