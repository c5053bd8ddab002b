"""Every store of this package that processes share does what such stores promise; and what is particular to them."""

from __future__ import annotations

import select
import socket
import socketserver
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from variants import store_url

from flask_executor.abc import Entry, JobStore, StopRequest, StoreOptions
from flask_executor.exceptions import StoreUnavailable
from flask_executor.jobs.model import JobState, JobStatus
from flask_executor.stores.leases import new_holder_id
from flask_executor.stores.redis import RedisStore
from flask_executor.stores.sqlite import SQLiteStore
from flask_executor.stores.sqlite_schema import MIGRATIONS
from flask_executor.testing.contract import SharedStoreContract
from flask_executor.testing.contract.fixtures import wait_until
from flask_executor.testing.contract.shared_fixtures import ENGINE, HERE, MakeStore, queued_in_engine, receive, started


class TestSharedStores(SharedStoreContract):
    @pytest.fixture
    def store_url(self, shared_store: str, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/jobs.sqlite" if shared_store == "sqlite" else shared_store

    @pytest.mark.parametrize("leaves", ["received", "removed", "removed when open", "purged", "expired"])
    def test_messages_leave_with_the_record(self, make_store: MakeStore, leaves: str) -> None:
        store = make_store(result_ttl=0.2 if leaves == "expired" else 3600)
        job = started(store, "report")
        for number in range(3):
            assert store.send(job.id, b"%d" % number)
        assert left_in(store)
        if leaves == "received":
            receive(store)
        elif leaves == "removed when open":
            store.remove(job.id)
        else:
            job.end(JobStatus.SUCCEEDED)
            store.write([Entry(job=job.record(), holder=HERE)])
            assert left_in(store), "they stay with the record"
        if leaves == "removed":
            store.remove(job.id)
        elif leaves == "purged":
            assert store.purge(time.time() + 1) == 1

        def has_left() -> bool:
            if isinstance(store, SQLiteStore):  # Redis does it by itself
                store.sweep()
            return not left_in(store)

        assert wait_until(has_left, 5)


def left_in(store: JobStore) -> list[str]:
    """What the store has that belongs to messages."""
    if isinstance(store, SQLiteStore):
        with store._reading() as connection:
            return [str(row) for row in connection.execute("SELECT message FROM messages")]
    assert isinstance(store, RedisStore)
    names = [name for pattern in ("mail:*", "mailed:*") for name in store._redis.keys(f"*{pattern}")]
    return [name.decode() for name in names]


def test_a_message_is_stored_once_though_its_answer_is_lost(way: WayToRedis) -> None:
    """redis-py sends a command again when the connection breaks before the answer."""
    store = way.store
    job = started(store)
    assert store.send(job.id, b"a")
    way.lose = b"\nb\r\n"
    assert store.send(job.id, b"b")
    assert way.lost == [b":1\r\n"], "it was taken, and nobody was told"
    assert store.send(job.id, b"c")
    assert receive(store) == {job.id: [b"a", b"b", b"c"]}


def test_a_job_is_taken_though_the_answer_is_lost(way: WayToRedis) -> None:
    store, worker = way.store, new_holder_id()
    job = queued_in_engine(store)
    job.start()
    way.lose = worker.encode()
    assert store.transfer(Entry(job=job.record(), holder=worker), ENGINE) is None
    assert len(way.lost) == 1, "it was taken, and nobody was told"
    assert store.get(job.id) == job.record()


def test_a_job_that_ends_while_it_is_sent_a_message(way: WayToRedis) -> None:
    store = way.store
    job = started(store)
    job.end(JobStatus.SUCCEEDED)
    way.before = b"\nlate\r\n", lambda: way.other.write([Entry(job=job.record(), holder=HERE)])
    assert not store.send(job.id, b"late")
    assert left_in(store) == []


def test_a_job_that_is_taken_over_while_it_is_sent_a_message(way: WayToRedis) -> None:
    store, worker = way.store, new_holder_id()
    job = queued_in_engine(store)
    job.start()
    way.before = b"\nfirst\r\n", lambda: way.other.transfer(Entry(job=job.record(), holder=worker), ENGINE)
    assert store.send(job.id, b"first")
    assert receive(store, worker) == {job.id: [b"first"]}
    assert left_in(store) == []


def test_a_job_that_is_handed_on_while_it_is_asked_to_stop(way: WayToRedis) -> None:
    store, worker = way.store, new_holder_id()
    job = queued_in_engine(store)
    job.start()
    request = StopRequest(id=job.id, grace=1.5)
    way.before = b"[1.5, false]", lambda: way.other.transfer(Entry(job=job.record(), holder=worker), ENGINE)
    store.ask_to_stop(request)
    assert list(store.take_requests(worker)) == [request]


def test_a_job_that_ends_while_it_is_asked_to_stop(way: WayToRedis) -> None:
    store = way.store
    job = started(store)
    job.end(JobStatus.SUCCEEDED)
    way.before = b"[1.5, false]", lambda: way.other.write([Entry(job=job.record(), holder=HERE)])
    store.ask_to_stop(StopRequest(id=job.id, grace=1.5))
    assert isinstance(store, RedisStore)
    assert store._redis.hlen(f"{store._prefix}stops") == 0


@pytest.mark.parametrize("connected", [True, False])
def test_a_redis_that_hangs(way: WayToRedis, *, connected: bool) -> None:
    """It takes connections, or has them, and does not answer."""
    store, go_on = way.store, threading.Event()
    job = started(way.other)
    if connected:
        assert store.get(job.id) == job.record()
    way.hangs = go_on
    begin = time.monotonic()
    for _ in range(3):  # those who come right after that are not made to wait
        with pytest.raises(StoreUnavailable, match="Timeout"):
            store.claim(Entry(job=JobState("render", "report").record(), holder=HERE))
    assert time.monotonic() - begin < 3.5
    way.hangs = None
    go_on.set()
    assert wait_until(lambda: is_answered(store), 5)
    assert store.get(job.id) == job.record(), "what was asked before is answered to nobody"
    assert store.get("unknown") is None


def is_answered(store: JobStore) -> bool:
    try:
        store.check()
    except StoreUnavailable:
        return False
    return True


def test_a_connection_that_breaks_is_opened_again(way: WayToRedis) -> None:
    store = way.store
    job = started(store)
    way.lose = job.id.encode()
    assert store.get(job.id) == job.record()
    assert len(way.lost) == 1


class WayToRedis(socketserver.ThreadingTCPServer):
    """A proxy before a Redis, a store that uses it, and another that does not."""

    daemon_threads = True

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passage)
        self.port = int(url.rpartition(":")[2].partition("/")[0])
        #: What is done, once, before something that has this in it is passed on.
        self.before: tuple[bytes, Callable[[], object]] | None = None
        #: Until when nothing is passed on.
        self.hangs: threading.Event | None = None
        #: The connection breaks, once, before the answer to what has this in it. The answers that were lost.
        self.lose: bytes | None = None
        self.lost: list[bytes] = []
        urls = f"redis://127.0.0.1:{self.server_address[1]}/0", url
        self.store, self.other = (
            RedisStore(StoreOptions(url=each, space="shop", result_ttl=60, max_records=10)) for each in urls
        )


class _Passage(socketserver.BaseRequestHandler):
    server: WayToRedis

    def handle(self) -> None:
        way = self.server
        is_lost = False
        with socket.create_connection(("127.0.0.1", way.port)) as redis:
            while True:
                for side in select.select([self.request, redis], [], [])[0]:
                    data = side.recv(1 << 20)
                    if not data:
                        return
                    if side is not redis:
                        is_lost = self.look(data)
                        redis.sendall(data)
                    elif is_lost:
                        way.lost.append(data)
                        return
                    else:
                        self.request.sendall(data)

    def look(self, data: bytes) -> bool:
        """Do what is to be done before this is passed on, and tell whether its answer is to be lost."""
        way = self.server
        if way.hangs is not None:
            way.hangs.wait(30)
        if way.before is not None and way.before[0] in data:
            (_, fn), way.before = way.before, None
            fn()
        if way.lose is None or way.lose not in data:
            return False
        way.lose = None
        return True


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[WayToRedis]:
    with WayToRedis(store_url("redis", request)) as way:
        thread = threading.Thread(target=way.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield way
        finally:
            way.store.close()
            way.other.close()
            way.shutdown()
            thread.join()


def test_a_file_from_before_there_were_messages(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    before = MIGRATIONS[:2]
    connection = sqlite3.connect(path)
    for statement in (statement for step in before for statement in step):
        connection.execute(statement)
    job = JobState("render", "report")
    connection.execute(
        "INSERT INTO jobs (id, space, key, has_key, name, status, queued_at, attempt, stop_requested, holder) "
        "VALUES (?, 'shop', 'report', 1, 'render', 'queued', ?, 1, 0, ?)",
        (job.id, job.queued_at, HERE),
    )
    connection.execute(f"PRAGMA user_version = {len(before)}")
    connection.commit()
    connection.close()
    store = SQLiteStore(StoreOptions(url=f"sqlite:///{path}", space="shop", result_ttl=60, max_records=10))
    assert store.send(job.id, b"a")
    assert receive(store) == {job.id: [b"a"]}
    held = store.holding_key("report")
    assert held is not None
    assert held.id == job.id
    with store._reading() as read:
        assert read.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    store.close()
