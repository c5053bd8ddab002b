"""Records in a SQLite file: several processes of one machine, and no server.

The file is in write-ahead mode: those who read do not wait for those who write, who wait for each other. It does not
work on network file systems, where that mode has no shared memory (https://sqlite.org/wal.html).
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flask_executor.abc import MOST_MESSAGES, Entry, StopRequest, StoredMessage, StoreOptions, Watch
from flask_executor.exceptions import StoreUnavailable
from flask_executor.jobs.model import LOG_LINES, Job, JobStatus, LogLine
from flask_executor.stores.base import (
    MESSAGES_PER_JOB,
    SharedStore,
    StoredRecord,
    as_lost,
    message_limit_error,
    report_loss,
    was_transferred,
)
from flask_executor.stores.codec import decode_key, encode_key, encode_prefix, replace_surrogates
from flask_executor.stores.leases import LEASE_SECONDS
from flask_executor.stores.sqlite_connection import Connection, is_locked
from flask_executor.stores.sqlite_schema import COLUMNS, INSERT, LOG_COLUMNS, UPDATE, record_of, row_of

_REMEMBERED_PER_RECORD = 10  # expired jobs that are remembered, as a multiple of `max_records`
_PURGE_BATCH = 500  # records that are deleted in one transaction, so that others need not wait long
_WRITE_DELAY = 5.0  # seconds within which the end of a job is written, nearly always
_MIN_POLL_INTERVAL, _MAX_POLL_INTERVAL = 0.002, 0.025  # seconds between two looks whether the file has changed

_CORRUPT = "it is no SQLite database, or a broken one ({}). It is left as it is: move it away, and a new one is made"
_CURRENT = "(ended_at IS NULL OR ended_at > ?)"
_WITH_MAIL = "holder = ? AND has_mail AND ended_at IS NULL"


class SQLiteStore(SharedStore):
    """Two connections per process: one reads while the other writes. Each is used under its own lock."""

    def __init__(self, options: StoreOptions) -> None:
        super().__init__(options)
        if not options.url.startswith("sqlite:///") or options.url == "sqlite:///":
            raise ValueError("sqlite:///path")
        self._path = Path(options.url.removeprefix("sqlite:///"))
        self.where = str(self._path)
        self._space = options.space
        self._writes, self._reads = Connection(self._path), Connection(self._path)
        self._leases: dict[str, float] = {}  # of the holders in this process: until when they hold, at least

    # ---- one job ----

    def claim(self, entry: Entry, *, again: bool = False) -> Job | None:
        if self._leases.get(entry.holder, 0.0) < time.time() + LEASE_SECONDS / 2:
            self.renew(entry.holder)
        with self._writing_alone() as connection, suppress(sqlite3.IntegrityError):
            self._insert(connection, entry)  # a transaction of one statement, which is quicker than any other
            return None
        with self._writing() as connection:
            there = self._current_claimant(connection, entry, again=again)
            if there is None:
                self._insert(connection, entry)
        return None if there is None or there.id == entry.job.id else there

    def _current_claimant(self, connection: sqlite3.Connection, entry: Entry, *, again: bool) -> Job | None:
        """The job that has the key; None after taking the key from a job from which it may be taken."""
        there = self._holding_in(connection, encode_key(entry.job.key))
        if there is not None and not there.job.status.ended and self._dead({there.holder}):
            there = StoredRecord(self._lose_in(connection, there), there.holder)
        if there is not None:
            status = there.job.status
            if there.job.id == entry.job.id or not (again and status.retryable):
                return there.job
        connection.execute(
            "UPDATE jobs SET has_key = 0 WHERE space = ? AND key = ? AND has_key",
            (self._space, encode_key(entry.job.key)),
        )
        return None

    def write(self, entries: Sequence[Entry]) -> None:
        with self._writing() as connection:
            for entry in entries:
                changed = connection.execute(UPDATE, (*row_of(entry)[4:], entry.job.id))
                if not changed.rowcount:
                    self._restore(connection, entry)
                _write_more(connection, entry)

    def transfer(self, entry: Entry, former: str | None, *, lost: bool = False, new: bool = True) -> Job | None:
        with self._writing() as connection:
            there = self._one(connection, "id = ?", entry.job.id)
            if there is None and not new:
                return None
            if there is None:
                self._restore(connection, entry)
            elif self._may_take(connection, there, former, lost=lost):
                connection.execute(UPDATE, (*row_of(entry)[4:], entry.job.id))
                there = None
            if there is None:
                _write_more(connection, entry)
        return None if there is None or was_transferred(there, entry) else there.job

    def _may_take(self, connection: sqlite3.Connection, there: StoredRecord, former: str | None, *, lost: bool) -> bool:
        job = there.job
        if not job.status.ended:
            return there.holder == former
        if not lost or job.status is not JobStatus.LOST:
            return False
        other = None if job.key is None else self._holding_in(connection, encode_key(job.key))
        return other is None or other.job.id == job.id

    def _insert(self, connection: sqlite3.Connection, entry: Entry, *, has_key: bool = True) -> None:
        """Write a new record.

        :raises sqlite3.IntegrityError: if another job has the key, or the record is there already.
        """
        has_key = has_key and entry.job.key is not None
        connection.execute(INSERT, (self._space, has_key, *row_of(entry)))

    def _restore(self, connection: sqlite3.Connection, entry: Entry) -> None:
        """Write a record that is not there, or no longer, with its key if the job has not ended and the key is free."""
        has_key = not entry.job.status.ended
        try:
            self._insert(connection, entry, has_key=has_key)
        except sqlite3.IntegrityError:
            self._insert(connection, entry, has_key=False)

    def outcome(self, id: str) -> bytes | None:
        with self._reading() as connection:
            row = connection.execute(
                f"SELECT data FROM outcomes JOIN jobs USING (number) WHERE id = ? AND {_CURRENT}", (id, self._oldest())
            ).fetchone()
        return None if row is None else row[0]

    def log(self, id: str) -> Sequence[LogLine]:
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT {LOG_COLUMNS} FROM log JOIN jobs USING (number) WHERE id = ? ORDER BY line", (id,)
            ).fetchall()
        return [LogLine(**dict(zip(LOG_COLUMNS.split(", "), row, strict=True))) for row in rows]

    def remove(self, id: str) -> None:
        with self._writing() as connection:
            connection.execute("DELETE FROM jobs WHERE id = ?", (id,))

    def _mark_lost(self, stored: StoredRecord) -> Job:
        with self._writing() as connection:
            return self._lose_in(connection, stored)

    def _lose_in(self, connection: sqlite3.Connection, stored: StoredRecord) -> Job:
        lost = as_lost(stored)
        changed = connection.execute(
            "UPDATE jobs SET status = ?, ended_at = ?, error = ? WHERE id = ? AND holder = ? AND ended_at IS NULL",
            (lost.status.value, lost.ended_at, lost.error, lost.id, stored.holder),
        )
        if changed.rowcount:
            report_loss(lost)
        found = self._one(connection, "id = ?", lost.id)
        return lost if found is None else found.job

    # ---- looking ----

    def expired(self, id: str | None = None, *, key: Hashable | None = None) -> bool:
        column, value = ("id", id) if key is None else ("key", encode_key(key))
        now = time.time()
        with self._reading() as connection:
            row = connection.execute(
                f"SELECT 1 FROM gone WHERE space = ? AND {column} = ? AND until > ? UNION ALL "
                f"SELECT 1 FROM jobs WHERE space = ? AND {column} = ? LIMIT 1",
                (self._space, value, now, self._space, value),
            ).fetchone()
            # Last, as the first record of the job may be written meanwhile.
            return row is not None and self._one(connection, f"space = ? AND {column} = ?", self._space, value) is None

    def keys(self, within: tuple[Hashable, ...] = ()) -> Sequence[Hashable]:
        condition, values = "", [self._space, self._oldest()]
        if within:
            prefix = encode_prefix(within)
            condition, values = " AND key >= ? AND key < ?", [*values, prefix, prefix + "\U0010ffff"]
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT key FROM jobs WHERE has_key AND space = ? AND {_CURRENT}{condition} ORDER BY number", values
            ).fetchall()
        return [decode_key(text) for (text,) in rows]

    def _read(self, id: str) -> StoredRecord | None:
        with self._reading() as connection:
            return self._one(connection, "id = ? AND space = ?", id, self._space)

    def _youngest(self, key: str) -> StoredRecord | None:
        with self._reading() as connection:
            return self._one(connection, "space = ? AND key = ?", self._space, key)

    def _holding(self, key: str) -> StoredRecord | None:
        with self._reading() as connection:
            return self._holding_in(connection, key)

    def _holding_in(self, connection: sqlite3.Connection, key: str) -> StoredRecord | None:
        return self._one(connection, "has_key AND space = ? AND key = ?", self._space, key)

    def _one(self, connection: sqlite3.Connection, condition: str, *values: object) -> StoredRecord | None:
        """The youngest record for which a condition is true."""
        query = f"SELECT {COLUMNS} FROM jobs WHERE {condition} AND {_CURRENT} ORDER BY number DESC LIMIT 1"
        row = connection.execute(query, (*values, self._oldest())).fetchone()
        return None if row is None else record_of(row)

    def _select(
        self, status: JobStatus | None, name: str | None, owner: str | None, limit: int | None
    ) -> Iterable[StoredRecord]:
        given = {"name": name, "owner": owner, "status": status and status.value}
        wanted = {column: value for column, value in given.items() if value is not None}
        conditions = ["+space = ?", _CURRENT, *(f"{column} = ?" for column in wanted)]
        index = "" if owner is not None else "NOT INDEXED"  # by number, as otherwise all would have to be sorted
        if status is not None and not status.ended:
            conditions.append("ended_at IS NULL")
            index = "INDEXED BY jobs_not_ended"
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT {COLUMNS} FROM jobs {index} WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT ?",
                (self._space, self._oldest(), *wanted.values(), -1 if limit is None else limit),
            ).fetchall()
        return [stored for row in rows if (stored := record_of(row)) is not None]

    # ---- keys, requests, leases ----

    def release(self, key: Hashable, id: str) -> bool:
        with self._writing() as connection:
            released = connection.execute(
                "UPDATE jobs SET has_key = 0 WHERE id = ? AND space = ? AND key = ? AND has_key",
                (id, self._space, encode_key(key)),
            )
        return released.rowcount > 0

    def ask_to_stop(self, request: StopRequest) -> None:
        with self._writing() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO requests (number, grace, only_queued) "
                "SELECT number, ?, ? FROM jobs WHERE id = ? AND ended_at IS NULL",
                (request.grace, request.only_queued, request.id),
            )

    def send(self, id: str, data: bytes) -> bool:
        with self._writing() as connection:
            row = connection.execute(
                "SELECT number FROM jobs WHERE id = ? AND space = ? AND ended_at IS NULL", (id, self._space)
            ).fetchone()
            if row is None:
                return False
            (waiting,) = connection.execute("SELECT count(*) FROM messages WHERE number = ?", row).fetchone()
            if waiting >= MOST_MESSAGES:
                raise message_limit_error(id)
            connection.execute("INSERT INTO messages (number, data) VALUES (?, ?)", (*row, data))
            connection.execute("UPDATE jobs SET has_mail = 1 WHERE number = ? AND NOT has_mail", row)
        return True

    def take_requests(self, holder: str) -> Sequence[StopRequest | StoredMessage]:
        with self._reading() as connection:
            has_requests, has_mail = connection.execute(
                f"SELECT EXISTS (SELECT 1 FROM requests), EXISTS (SELECT 1 FROM jobs WHERE {_WITH_MAIL})", (holder,)
            ).fetchone()
        found: list[StopRequest | StoredMessage] = []
        if has_requests:  # perhaps of another holder
            found += self._take_stops(holder)
        if has_mail:
            found += self._mail(holder)
        return found

    def _take_stops(self, holder: str) -> list[StopRequest]:
        with self._reading() as connection:
            if not _stops(connection, holder):
                return []
        with self._writing() as connection:
            rows = _stops(connection, holder)
            connection.executemany("DELETE FROM requests WHERE number = ?", [row[:1] for row in rows])
        return [StopRequest(id=row[1], grace=row[2], only_queued=bool(row[3])) for row in rows if row[4] is None]

    def _mail(self, holder: str) -> list[StoredMessage]:
        with self._reading() as connection:
            jobs = connection.execute(f"SELECT number, id FROM jobs WHERE {_WITH_MAIL}", (holder,)).fetchall()
            return [
                StoredMessage(id=id, number=str(message), data=data)
                for number, id in jobs
                for message, data in connection.execute(
                    "SELECT message, data FROM messages WHERE number = ? ORDER BY message LIMIT ?",
                    (number, MESSAGES_PER_JOB),
                )
            ]

    def acknowledge(self, holder: str, messages: Sequence[StoredMessage]) -> None:
        with self._writing() as connection:
            connection.executemany("DELETE FROM messages WHERE message = ?", [(int(each.number),) for each in messages])
            connection.executemany(
                "UPDATE jobs SET has_mail = EXISTS (SELECT 1 FROM messages WHERE number = jobs.number) WHERE id = ?",
                [(id,) for id in {each.id for each in messages}],
            )

    def renew(self, holder: str) -> bool:
        self._reopen_if_replaced()
        with self._writing() as connection:
            return self._renew(connection, holder)

    def _renew(self, connection: sqlite3.Connection, holder: str) -> bool:
        now = time.time()
        self._leases[holder] = now + LEASE_SECONDS
        row = connection.execute("SELECT until FROM holders WHERE holder = ?", (holder,)).fetchone()
        connection.execute(
            "INSERT OR REPLACE INTO holders (holder, until) VALUES (?, ?)", (holder, now + LEASE_SECONDS)
        )
        return row is not None and row[0] >= now

    def drop_lease(self, holder: str) -> None:
        self._leases.pop(holder, None)
        with self._writing() as connection:
            connection.execute("DELETE FROM holders WHERE holder = ?", (holder,))

    def _has_lease(self, holder: str) -> bool:
        with self._reading() as connection:
            row = connection.execute(
                "SELECT 1 FROM holders WHERE holder = ? AND until >= ?", (holder, time.time())
            ).fetchone()
        return row is not None

    # ---- cleaning ----

    def purge(self, ended_before: float) -> int:
        return self._purge(
            "space = ? AND ended_at IS NOT NULL AND ended_at < ?", (self._space, ended_before), ended_before
        )

    def _purge(self, condition: str, values: tuple[object, ...], limit: float) -> int:
        total, until = 0, time.time() + self.memory
        chosen = f"SELECT id FROM jobs WHERE {condition} ORDER BY ended_at LIMIT {_PURGE_BATCH}"
        while True:
            with self._writing() as connection:
                connection.execute(
                    f"INSERT OR REPLACE INTO gone (id, space, key, until) SELECT id, space, key, ? FROM jobs "
                    f"WHERE id IN ({chosen})",
                    (until, *values),
                )
                deleted = connection.execute(f"DELETE FROM jobs WHERE id IN ({chosen})", values).rowcount
            total += deleted
            if deleted < _PURGE_BATCH:
                return total

    def find_lost(self) -> None:
        self._find_lost()

    def _find_lost(self) -> set[str]:
        """Mark the jobs of dead holders as lost; these holders."""
        with self._reading() as connection:
            holders = {row[0] for row in connection.execute("SELECT DISTINCT holder FROM jobs WHERE ended_at IS NULL")}
        dead = self._dead(holders)
        if dead:
            self.list(status=JobStatus.RUNNING)  # which marks them
            self.list(status=JobStatus.QUEUED)
        return dead

    def sweep(self) -> None:
        now = time.time()
        dead = self._find_lost()
        self.purge(self._oldest())
        self._bound()
        with self._writing() as connection:
            connection.execute("DELETE FROM gone WHERE until < ?", (now,))
            connection.execute(
                "DELETE FROM gone WHERE until < (SELECT until FROM gone ORDER BY until DESC LIMIT 1 OFFSET ?)",
                (_REMEMBERED_PER_RECORD * self.options.max_records,),
            )
            connection.executemany("DELETE FROM holders WHERE holder = ?", [(holder,) for holder in dead])
            connection.execute("PRAGMA incremental_vacuum(1000)").fetchall()

    def _bound(self) -> None:
        """Let the records of the jobs that ended first expire if there are more than ``max_records``."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT ended_at FROM jobs WHERE space = ? AND ended_at IS NOT NULL ORDER BY ended_at DESC "
                "LIMIT 1 OFFSET ?",
                (self._space, self.options.max_records),
            ).fetchone()
        if row is not None:
            self._purge("space = ? AND ended_at IS NOT NULL AND ended_at <= ?", (self._space, row[0]), row[0])

    def _oldest(self) -> float:
        """Records of jobs that ended before then have expired (seconds since the epoch)."""
        return time.time() - self.options.result_ttl

    # ---- the file ----

    def watch(self) -> Watch:
        return _FileWatch(self)

    def check(self, *, thoroughly: bool = False) -> None:
        self._reopen_if_replaced()
        with self._writing() as connection:
            connection.execute("UPDATE holders SET until = until WHERE holder = ''")
        if thoroughly:
            with self._reading() as connection:
                broken = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if broken != "ok":
                raise StoreUnavailable(self.where, _CORRUPT.format(broken))

    @property
    def is_private(self) -> bool:
        with self._reading():  # which makes the file if there is none
            status = self._path.stat()
        if not hasattr(os, "geteuid"):  # Windows, where the folder decides
            return True
        return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    def after_fork(self) -> None:
        super().after_fork()
        self._leases = {}
        for connection in (self._writes, self._reads):
            connection.after_fork()

    def close(self) -> None:
        for connection in (self._reads, self._writes):
            with connection.lock:
                connection.close()

    def _reopen_if_replaced(self) -> None:
        """Open the file again if it was deleted or replaced: what is written to the old one, no other process sees."""
        for connection in (self._reads, self._writes):
            with connection.lock:
                if connection.is_elsewhere():
                    connection.close()
                    self._leases.clear()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self.reaching(), self._reads as connection:
            yield connection

    @contextmanager
    def _writing_alone(self) -> Iterator[sqlite3.Connection]:
        """For one statement. The lock comes first: a thread that waited for one that failed fails at once, too."""
        with self._writes.lock, self.reaching(writing=True), self._writes as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction."""
        with self._writing_alone() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _reasons(self) -> tuple[type[Exception], ...]:
        return (sqlite3.Error, OSError)

    def _is_slow(self, error: Exception) -> bool:
        return is_locked(error)

    def _explain(self, error: Exception) -> str:
        if is_locked(error):
            return f"another process has written to it for more than {Connection.BUSY_TIMEOUT:g} s"
        if isinstance(error, sqlite3.OperationalError) or not isinstance(error, sqlite3.DatabaseError):
            return f"{error}; see that {self._path.parent} exists, is writable, and has space left"
        return _CORRUPT.format(error)


def _stops(connection: sqlite3.Connection, holder: str) -> list[tuple[int, str, float | None, int, float | None]]:
    """The requests to stop jobs of a holder. One for a lost job stays for the holder that takes the job over."""
    return connection.execute(
        "SELECT number, id, grace, only_queued, ended_at FROM requests JOIN jobs USING (number) "
        "WHERE holder = ? AND status != ?",
        (holder, JobStatus.LOST.value),
    ).fetchall()


def _write_more(connection: sqlite3.Connection, entry: Entry) -> None:
    """Write the outcome and the log of an entry, which stand in tables of their own."""
    if entry.outcome is not None:
        connection.execute(
            "INSERT OR REPLACE INTO outcomes (number, data) SELECT number, ? FROM jobs WHERE id = ?",
            (entry.outcome, entry.job.id),
        )
    if entry.log:
        _write_log(connection, entry.job.id, entry.log)


def _write_log(connection: sqlite3.Connection, id: str, lines: Sequence[LogLine]) -> None:
    (number,) = connection.execute("SELECT number FROM jobs WHERE id = ?", (id,)).fetchone()
    connection.executemany(
        f"INSERT INTO log (number, {LOG_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",
        [
            (
                number,
                line.time,
                line.level,
                replace_surrogates(line.logger),
                replace_surrogates(line.text),
                replace_surrogates(line.trace),
            )
            for line in lines
        ],
    )
    connection.execute(
        "DELETE FROM log WHERE number = ? AND line <= "
        "(SELECT line FROM log WHERE number = ? ORDER BY line DESC LIMIT 1 OFFSET ?)",
        (number, number, LOG_LINES),
    )


class _FileWatch(Watch):
    """Polls SQLite's ``data_version``: it changes when another connection writes, and takes a few microseconds."""

    def __init__(self, store: SQLiteStore) -> None:
        self._store = store
        self._connection = Connection(store._path)
        self._woken = threading.Event()
        self._version = 0
        self._ids: Collection[str] = ()
        self._asked = 0.0  # when it was last asked which jobs have ended (seconds since the epoch)

    def begin(self, ids: Collection[str]) -> None:
        if not self._asked:  # later, changes between two calls of wait() must not be missed
            self._asked = time.time()
            self._version = self._data_version()
        self._ids = ids

    def wait(self, timeout: float) -> Collection[str] | None:
        deadline = time.monotonic() + timeout
        pause = _MIN_POLL_INTERVAL
        while not self._woken.wait(max(0.0, min(pause, deadline - time.monotonic()))):
            version = self._data_version()
            if version != self._version:
                self._version = version
                return self._ended()
            if time.monotonic() >= deadline:
                return ()
            pause = min(pause * 1.5, _MAX_POLL_INTERVAL)
        self._woken.clear()
        return ()

    def _ended(self) -> Collection[str]:
        """The watched jobs that have ended since this was last called."""
        since, self._asked = self._asked - _WRITE_DELAY, time.time()
        with self._store.reaching(), self._connection as connection:
            rows = connection.execute(
                "SELECT id FROM jobs WHERE space = ? AND ended_at IS NOT NULL AND ended_at >= ?",
                (self._store._space, since),
            )
            return [id for (id,) in rows if id in self._ids]

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        with self._connection.lock:
            self._connection.close()

    def _data_version(self) -> int:
        with self._store.reaching(), self._connection as connection:
            version: int = connection.execute("PRAGMA data_version").fetchone()[0]
        return version
