"""Waits for jobs that other processes have: one thread, for all handles that somebody waits for."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from flask_executor.abc import JobStore, Watch
from flask_executor.exceptions import StoreUnavailable
from flask_executor.logs import logger

_AGAIN = 1.0  # seconds until a job is looked at again of which nothing was heard: its process may be dead
_SHARE = 4  # times as long as it took to look at all handles nothing is looked at: of many writers, each would wake us


class Followed(Protocol):
    """A handle of a job that another process has."""

    @property
    def job_id(self) -> str:
        """The id of the job."""

    def settle(self) -> bool:
        """Settle the handle if the job has ended, and tell whether it is settled.

        :raises StoreUnavailable: when that cannot be known now.
        """


class Follower:
    """Settles handles when their jobs have ended."""

    # Under _changed: _futures and _thread. The watch is made, used and closed by the thread; others only wake it.

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._changed = threading.Condition()  # a finalizer may come here in the middle
        self._futures: dict[int, Followed] = {}
        self._watch: Watch | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    def add(self, future: Followed) -> None:
        """Settle this handle when its job has ended."""
        with self._changed:
            if id(future) in self._futures:
                return
            self._futures[id(future)] = future
            self._closing = False
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="flask-executor-follower", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify_all()
            watch = self._watch
        if watch is not None:
            watch.wake()

    def discard(self, future: Followed) -> None:
        """Nobody waits for this handle any more."""
        with self._changed:
            self._futures.pop(id(future), None)

    def close(self, *, wait: bool) -> None:
        """End the thread when there is nothing to settle any more.

        :param wait: whether to wait for it, if there is nothing now.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = None if self._futures else self._thread
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join(5.0)

    def _run(self) -> None:
        watch = self._store.watch()
        self._watch = watch
        try:
            while self._is_needed():
                begin = time.monotonic()
                try:
                    if not self._look(watch):
                        self._pause(_SHARE * (time.monotonic() - begin))
                        watch.wait(_AGAIN)
                except StoreUnavailable:
                    self._pause(_AGAIN)
                except Exception:
                    logger.exception("Jobs of other processes cannot be followed; trying again.")
                    self._pause(_AGAIN)
        finally:
            watch.close()

    def _is_needed(self) -> bool:
        """Wait until there is something to do; False at the end. No handle is referred to meanwhile."""
        with self._changed:
            while not self._futures and not self._closing:
                self._changed.wait()
            if not self._futures:
                self._thread = self._watch = None
            return bool(self._futures)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait(seconds)

    def _look(self, watch: Watch) -> bool:
        """Watch all jobs, and settle the handles of those that have ended; whether there was one."""
        with self._changed:
            futures = list(self._futures.values())
        watch.begin({future.job_id for future in futures})
        return self._settle(futures)

    def _settle(self, futures: list[Followed]) -> bool:
        """Settle those whose jobs have ended; whether there was one."""
        settled = []
        for future in futures:
            try:
                if future.settle():
                    settled.append(future)
            except StoreUnavailable:
                raise
            except BaseException:  # also SystemExit: it is not meant for this thread
                logger.exception("The handle of job %s cannot be settled.", future.job_id)
                settled.append(future)
        with self._changed:
            for future in settled:
                self._futures.pop(id(future), None)
        return bool(settled)
