"""Records in a SQLite file: several processes of one machine, and no server.

The file is in write-ahead mode: those who read do not wait for those who write, who wait for each other. It does not
work on network file systems, where that mode has no shared memory (https://sqlite.org/wal.html).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sqlite3
import stat
import threading
import time
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from flask_executor.abc import MOST_MESSAGES, Entry, StopRequest, StoredMessage, StoreOptions, Watch
from flask_executor.exceptions import StoreUnavailable
from flask_executor.helpers.fork_hooks import after_fork_in_child, around_fork
from flask_executor.jobs.model import LOG_LINES, Job, JobStatus, LogLine
from flask_executor.stores.base import (
    MESSAGES_PER_JOB,
    SharedStore,
    StoredRecord,
    as_lost,
    message_limit_error,
    report_loss,
    skipped,
    was_transferred,
)
from flask_executor.stores.codec import (
    decode_key,
    decode_meta,
    encode_key,
    encode_meta,
    encode_prefix,
    replace_surrogates,
)
from flask_executor.stores.leases import LEASE_SECONDS

_BUSY = 3.0  # seconds to wait for others who write
_GONE = 10  # times as many as there may be records are remembered to have been
_AT_ONCE = 500  # records that leave in one transaction, so that it is short
_LATE = 5.0  # seconds after the end of a job within which it is written, nearly always
_SHORTEST, _LONGEST = 0.002, 0.025  # seconds between two looks whether somebody has written

_COLUMNS = (
    "id, key, name, owner, status, queued_at, started_at, ended_at, error, attempt, progress, message, meta, "
    "stop_requested, holder"
)
_FIELDS = _COLUMNS.split(", ")
_INSERT = f"INSERT INTO jobs (space, has_key, {_COLUMNS}) VALUES ({', '.join('?' * (2 + len(_FIELDS)))})"
_UPDATE = f"UPDATE jobs SET {', '.join(f'{column} = ?' for column in _FIELDS[4:])} WHERE id = ?"
_LINE = "time, level, logger, text, trace"

# Each index is one more page to write at each step of a job, so there are no more than are needed. What has not ended
# has no ended_at; `has_key` is 1 while the job has its key.
_SCHEMA = (
    """CREATE TABLE jobs (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, space TEXT NOT NULL, key TEXT, has_key INTEGER NOT NULL,
        name TEXT NOT NULL, owner TEXT, status TEXT NOT NULL, queued_at REAL NOT NULL, started_at REAL, ended_at REAL,
        error TEXT, attempt INTEGER NOT NULL, progress REAL, message TEXT, meta TEXT, stop_requested INTEGER NOT NULL,
        holder TEXT NOT NULL)""",
    "CREATE UNIQUE INDEX jobs_with_key ON jobs (space, key) WHERE has_key",
    "CREATE INDEX jobs_by_key ON jobs (space, key) WHERE key IS NOT NULL",
    "CREATE INDEX jobs_by_owner ON jobs (space, owner) WHERE owner IS NOT NULL",
    "CREATE INDEX jobs_by_end ON jobs (space, ended_at) WHERE ended_at IS NOT NULL",
    "CREATE INDEX jobs_not_ended ON jobs (holder) WHERE ended_at IS NULL",
    "CREATE TABLE outcomes (number INTEGER PRIMARY KEY REFERENCES jobs ON DELETE CASCADE, data BLOB NOT NULL)",
    """CREATE TABLE log (
        line INTEGER PRIMARY KEY, number INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE, time REAL NOT NULL,
        level TEXT NOT NULL, logger TEXT NOT NULL, text TEXT NOT NULL)""",
    "CREATE INDEX log_by_job ON log (number)",
    """CREATE TABLE requests (
        number INTEGER PRIMARY KEY REFERENCES jobs ON DELETE CASCADE, grace REAL, only_queued INTEGER NOT NULL)""",
    "CREATE TABLE holders (holder TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID",
    "CREATE TABLE gone (id TEXT PRIMARY KEY, space TEXT NOT NULL, key TEXT, until REAL NOT NULL) WITHOUT ROWID",
    "CREATE INDEX gone_by_key ON gone (space, key) WHERE key IS NOT NULL",
    "CREATE INDEX gone_by_time ON gone (until)",
)

# `has_mail` is 1 while messages wait for the job: its holder looks often, and there are none nearly always.
_MESSAGES = (
    "ALTER TABLE jobs ADD COLUMN has_mail INTEGER NOT NULL DEFAULT 0",
    "CREATE INDEX jobs_with_mail ON jobs (holder) WHERE has_mail AND ended_at IS NULL",
    """CREATE TABLE messages (
        message INTEGER PRIMARY KEY, number INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE, data BLOB NOT NULL)""",
    "CREATE INDEX messages_by_job ON messages (number)",
)

#: What brings a file of an older version up to date: the statements that lead from version n to n + 1, at n.
#: Version 0 is an empty file. The number of entries is the version that this module reads and writes.
MIGRATIONS: tuple[tuple[str, ...], ...] = (_SCHEMA, ("ALTER TABLE log ADD COLUMN trace TEXT",), _MESSAGES)


class SQLiteStore(SharedStore):
    """Two connections per process: one reads while the other writes. Each is used under its own lock."""

    def __init__(self, options: StoreOptions) -> None:
        super().__init__(options)
        if not options.url.startswith("sqlite:///") or options.url == "sqlite:///":
            raise ValueError("sqlite:///path")
        self._path = Path(options.url.removeprefix("sqlite:///"))
        self.where = str(self._path)
        self._space = options.space
        self._writes, self._reads = _Connection(self._path), _Connection(self._path)
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
        """The job that has the key; None, and it has the key no more, when it may be taken from it."""
        there = self._holding_in(connection, encode_key(entry.job.key))
        if there is not None and not there.job.status.ended and self._dead({there.holder}):
            there = StoredRecord(self._lose_in(connection, there), there.holder)
        if there is not None:
            status = there.job.status
            if there.job.id == entry.job.id or not (again and status.ended and status is not JobStatus.SUCCEEDED):
                return there.job
        connection.execute(
            "UPDATE jobs SET has_key = 0 WHERE space = ? AND key = ? AND has_key",
            (self._space, encode_key(entry.job.key)),
        )
        return None

    def write(self, entries: Sequence[Entry]) -> None:
        with self._writing() as connection:
            for entry in entries:
                changed = connection.execute(_UPDATE, (*_values(entry)[4:], entry.job.id))
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
                connection.execute(_UPDATE, (*_values(entry)[4:], entry.job.id))
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

        :raises sqlite3.IntegrityError: when another job has the key, or there is this one already.
        """
        has_key = has_key and entry.job.key is not None
        connection.execute(_INSERT, (self._space, has_key, *_values(entry)))

    def _restore(self, connection: sqlite3.Connection, entry: Entry) -> None:
        """Write a record that is not here (any more), and let the job have its key if that is free."""
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
                f"SELECT {_LINE} FROM log JOIN jobs USING (number) WHERE id = ? ORDER BY line", (id,)
            ).fetchall()
        return [LogLine(**dict(zip(_LINE.split(", "), row, strict=True))) for row in rows]

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
            # Asked last: the first record of a job may be written meanwhile.
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
        """The youngest record that a condition holds for."""
        query = f"SELECT {_COLUMNS} FROM jobs WHERE {condition} AND {_CURRENT} ORDER BY number DESC LIMIT 1"
        row = connection.execute(query, (*values, self._oldest())).fetchone()
        return None if row is None else _stored(row)

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
                f"SELECT {_COLUMNS} FROM jobs {index} WHERE {' AND '.join(conditions)} ORDER BY number DESC LIMIT ?",
                (self._space, self._oldest(), *wanted.values(), -1 if limit is None else limit),
            ).fetchall()
        return [stored for row in rows if (stored := _stored(row)) is not None]

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
        if has_requests:  # somebody's
            found += self._take_stops(holder)
        if has_mail:
            found += self._mail(holder)
        return found

    def _take_stops(self, holder: str) -> list[StopRequest]:
        if not self._stops(self._reading, holder):
            return []
        with self._writing() as connection:
            rows = self._stops(lambda: _same(connection), holder)
            connection.executemany("DELETE FROM requests WHERE number = ?", [row[:1] for row in rows])
        return [StopRequest(id=row[1], grace=row[2], only_queued=bool(row[3])) for row in rows if row[4] is None]

    def _stops(self, access: Callable[[], Any], holder: str) -> list[Any]:
        with access() as connection:
            rows: list[Any] = connection.execute(
                "SELECT number, id, grace, only_queued, ended_at FROM requests JOIN jobs USING (number) "
                "WHERE holder = ? AND status != ?",  # who finds a lost job again is to stop it
                (holder, JobStatus.LOST.value),
            ).fetchall()
        return rows

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
        chosen = f"SELECT id FROM jobs WHERE {condition} ORDER BY ended_at LIMIT {_AT_ONCE}"
        while True:
            with self._writing() as connection:
                connection.execute(
                    f"INSERT OR REPLACE INTO gone (id, space, key, until) SELECT id, space, key, ? FROM jobs "
                    f"WHERE id IN ({chosen})",
                    (until, *values),
                )
                deleted = connection.execute(f"DELETE FROM jobs WHERE id IN ({chosen})", values).rowcount
            total += deleted
            if deleted < _AT_ONCE:
                return total

    def find_lost(self) -> None:
        self._find_lost()

    def _find_lost(self) -> set[str]:
        """Those who have died, and had jobs."""
        with self._reading() as connection:
            holders = {row[0] for row in connection.execute("SELECT DISTINCT holder FROM jobs WHERE ended_at IS NULL")}
        dead = self._dead(holders)
        if dead:
            self.list(status=JobStatus.RUNNING)  # looks at each
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
                (_GONE * self.options.max_records,),
            )
            connection.executemany("DELETE FROM holders WHERE holder = ?", [(holder,) for holder in dead])
            connection.execute("PRAGMA incremental_vacuum(1000)").fetchall()

    def _bound(self) -> None:
        """Have the oldest leave of those that have ended, when there are too many."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT ended_at FROM jobs WHERE space = ? AND ended_at IS NOT NULL ORDER BY ended_at DESC "
                "LIMIT 1 OFFSET ?",
                (self._space, self.options.max_records),
            ).fetchone()
        if row is not None:
            self._purge("space = ? AND ended_at IS NOT NULL AND ended_at <= ?", (self._space, row[0]), row[0])

    def _oldest(self) -> float:
        """When the jobs have ended at the latest whose records are to leave."""
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
        with self._reading():  # makes the file, if there is none
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
        """Open the file anew if somebody has deleted or replaced it: what is written now would be seen by nobody."""
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
        """For one statement. Whoever waits here behind others for whom the store was locked need not try it as well."""
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
        return _is_locked(error)

    def _explain(self, error: Exception) -> str:
        if _is_locked(error):
            return f"another process has written to it for more than {_BUSY:g} s"
        if isinstance(error, sqlite3.OperationalError) or not isinstance(error, sqlite3.DatabaseError):
            return f"{error}; see that {self._path.parent} exists, is writable, and has space left"
        return _CORRUPT.format(error)


_CORRUPT = "it is no SQLite database, or a broken one ({}). It is left as it is: move it away, and a new one is made"
_CURRENT = "(ended_at IS NULL OR ended_at > ?)"
_WITH_MAIL = "holder = ? AND has_mail AND ended_at IS NULL"


class _Connection:
    """A connection that is opened when it is needed. ``with`` gives it, under its lock.

    No connection is open while this process forks. SQLite keeps account of a process's locks on a file, and in a child
    the account would be of locks that the child does not have (https://sqlite.org/howtocorrupt.html, "Carrying an open
    database connection across a fork").
    """

    _all: ClassVar[weakref.WeakSet[_Connection]] = weakref.WeakSet()
    _locked: ClassVar[list[_Connection]] = []
    _numbers = itertools.count()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = next(self._numbers)
        self._all.add(self)
        self.lock = threading.RLock()  # a finalizer may come here in the middle
        self._open: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def __enter__(self) -> sqlite3.Connection:
        self.lock.acquire()
        try:
            if self._open is None:
                self._open = _connect(self._path)
                self._file = self._identity()
        except BaseException:
            self.lock.release()
            raise
        return self._open

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, sqlite3.DatabaseError) and not _is_locked(error):
                self.close()  # what is wrong may be mended when it is opened again
        finally:
            self.lock.release()

    def is_elsewhere(self) -> bool:
        """Whether the file that is open is not the one that is at its path."""
        return self._open is not None and self._file != self._identity()

    def close(self) -> None:
        connection, self._open = self._open, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def after_fork(self) -> None:
        """In the child. What is open has come by a fork that Python was not told of, and is not even to be closed."""
        if self._open is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._open))
        self._open = None
        self.lock = threading.RLock()

    @classmethod
    def before_fork(cls) -> None:
        """Close all, and let nobody open one."""
        # In the order in which they were made: who has the one that writes may want the one that reads.
        for connection in sorted(cls._all, key=lambda each: each._number):
            connection.lock.acquire()
            connection.close()
            cls._locked.append(connection)

    @classmethod
    def after_fork_in_parent(cls) -> None:
        while cls._locked:
            cls._locked.pop().lock.release()

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino


around_fork(_Connection.before_fork, _Connection.after_fork_in_parent)
after_fork_in_child(_Connection._locked.clear)


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    connection = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        _prepare(connection, str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, where: str) -> None:
    """Make the tables, or bring them up to date.

    :raises StoreUnavailable: for a file of a newer version.
    """
    version = _version_of(connection)
    if version < len(MIGRATIONS):
        if version == 0:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            _until_unlocked(lambda: connection.execute("PRAGMA journal_mode = WAL").fetchone())
        connection.execute("BEGIN IMMEDIATE")
        for statements in MIGRATIONS[_version_of(connection) :]:  # somebody may have been faster
            for statement in statements:
                connection.execute(statement)
        if _version_of(connection) < len(MIGRATIONS):
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    elif version > len(MIGRATIONS):
        raise StoreUnavailable(
            where,
            f"a newer version of Flask-Executor has written it (its schema is {version}, this one knows "
            f"{len(MIGRATIONS)}). Update this one, or give it another file",
        )


def _version_of(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def _until_unlocked(step: Callable[[], object]) -> None:
    """Several processes may make the same file at once, and SQLite does not wait for this step of the others."""
    deadline = time.monotonic() + _BUSY
    while True:
        try:
            step()
            return
        except sqlite3.OperationalError as error:
            if not _is_locked(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _is_locked(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


@contextmanager
def _same(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    yield connection


def _values(entry: Entry) -> list[Any]:
    """What is written of a job, in the order of the columns."""
    job = entry.job
    return [
        job.id,
        None if job.key is None else encode_key(job.key),
        replace_surrogates(job.name),
        replace_surrogates(job.owner),
        job.status.value,
        job.queued_at,
        job.started_at,
        job.ended_at,
        replace_surrogates(job.error),
        job.attempt,
        job.progress,
        replace_surrogates(job.message),
        encode_meta(job),
        job.stop_requested,
        entry.holder,
    ]


def _stored(row: tuple[Any, ...]) -> StoredRecord | None:
    fields = dict(zip(_FIELDS, row, strict=True))
    holder = fields.pop("holder")
    try:
        fields["key"] = None if fields["key"] is None else decode_key(fields["key"])
        fields["status"] = JobStatus(fields["status"])
        fields["meta"] = decode_meta(fields["meta"])
    except (SyntaxError, ValueError) as error:
        skipped(error)
        return None
    fields["stop_requested"] = bool(fields["stop_requested"])
    return StoredRecord(Job(**fields), holder)


def _write_more(connection: sqlite3.Connection, entry: Entry) -> None:
    """What is not in the record."""
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
        f"INSERT INTO log (number, {_LINE}) VALUES (?, ?, ?, ?, ?, ?)",
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
    """Asks SQLite whether somebody has written anything, which costs a few microseconds; less and less often."""

    def __init__(self, store: SQLiteStore) -> None:
        self._store = store
        self._connection = _Connection(store._path)
        self._woken = threading.Event()
        self._version = 0
        self._ids: Collection[str] = ()
        self._asked = 0.0  # until when (seconds since the epoch) is known which jobs have ended

    def begin(self, ids: Collection[str]) -> None:
        if not self._asked:  # later what was not heard of yet must not be passed over
            self._asked = time.time()
            self._version = self._data_version()
        self._ids = ids

    def wait(self, timeout: float) -> Collection[str] | None:
        deadline = time.monotonic() + timeout
        pause = _SHORTEST
        while not self._woken.wait(max(0.0, min(pause, deadline - time.monotonic()))):
            version = self._data_version()
            if version != self._version:
                self._version = version
                return self._ended()
            if time.monotonic() >= deadline:
                return ()
            pause = min(pause * 1.5, _LONGEST)
        self._woken.clear()
        return ()

    def _ended(self) -> Collection[str]:
        """Those that have ended since this was asked last."""
        since, self._asked = self._asked - _LATE, time.time()
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
