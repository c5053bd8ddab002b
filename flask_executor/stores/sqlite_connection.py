"""Connections to a SQLite file, which are opened when they are needed, and never in the hands of a forked child."""

from __future__ import annotations

import ctypes
import itertools
import os
import sqlite3
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from flask_executor.helpers.fork_hooks import after_fork_in_child, around_fork
from flask_executor.stores.sqlite_schema import migrate, schema_version

_LOCK_RETRY_INTERVAL = 0.01  # seconds


class Connection:
    """A connection that is opened when it is needed. ``with`` gives it, under its lock.

    No connection is open while this process forks. SQLite keeps account of a process's locks on a file, and in a child
    the account would be of locks that the child does not have (https://sqlite.org/howtocorrupt.html, "Carrying an open
    database connection across a fork").
    """

    BUSY_TIMEOUT: ClassVar[float] = 3.0  #: seconds to wait for another process that writes

    _all: ClassVar[weakref.WeakSet[Connection]] = weakref.WeakSet()
    _locked: ClassVar[list[Connection]] = []
    _numbers = itertools.count()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = next(self._numbers)
        self._all.add(self)
        self.lock = threading.RLock()  # a finalizer may run in the thread that has it
        self._open: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def __enter__(self) -> sqlite3.Connection:
        self.lock.acquire()
        try:
            if self._open is None:
                self._open = self._connect()
                self._file = self._identity()
        except BaseException:
            self.lock.release()
            raise
        return self._open

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, sqlite3.DatabaseError) and not is_locked(error):
                self.close()  # opening it again may help
        finally:
            self.lock.release()

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(
            self._path, timeout=self.BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA journal_size_limit = 67108864")
            if schema_version(connection) == 0:
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                self._use_write_ahead_log(connection)
            migrate(connection, str(self._path))
        except BaseException:
            connection.close()
            raise
        return connection

    def _use_write_ahead_log(self, connection: sqlite3.Connection) -> None:
        """Several processes may make the same file at once, and SQLite's own timeout does not hold for this step."""
        deadline = time.monotonic() + self.BUSY_TIMEOUT
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
                return
            except sqlite3.OperationalError as error:
                if not is_locked(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_LOCK_RETRY_INTERVAL)

    def is_elsewhere(self) -> bool:
        """Whether the file that is open is no longer the one at its path."""
        return self._open is not None and self._file != self._identity()

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def close(self) -> None:
        connection, self._open = self._open, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def after_fork(self) -> None:
        """In the child: leave alone what a fork that Python was not told of has left open; closing it would harm."""
        if self._open is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._open))
        self._open = None
        self.lock = threading.RLock()

    @classmethod
    def before_fork(cls) -> None:
        """Close all connections, and keep their locks so that no thread opens one."""
        # In the order in which they were made: the thread that has a store's writing one may want its reading one.
        for connection in sorted(cls._all, key=lambda each: each._number):
            connection.lock.acquire()
            connection.close()
            cls._locked.append(connection)

    @classmethod
    def after_fork_in_parent(cls) -> None:
        """Give back the locks."""
        while cls._locked:
            cls._locked.pop().lock.release()


around_fork(Connection.before_fork, Connection.after_fork_in_parent)
after_fork_in_child(Connection._locked.clear)


def is_locked(error: BaseException) -> bool:
    """Whether an error says that another process writes."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
