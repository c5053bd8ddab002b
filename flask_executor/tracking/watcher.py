"""Waits for jobs that other processes have: one thread, for all handles that somebody waits for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from itertools import chain
from typing import Protocol

from flask_executor.abc import JobStore, Watch
from flask_executor.exceptions import StoreUnavailable
from flask_executor.helpers.log import logger

_AGAIN = 1.0  # seconds until it is looked for what nobody tells of: processes that are dead, records that have gone
_AT_ONCE = 50  # jobs that are looked at then; the others when it is their turn
_SHARE = 4  # times as long as it took to look at handles nothing is looked at: of many writers, each would wake us


class Followed(Protocol):
    """A handle of a job that another process has."""

    @property
    def job_id(self) -> str:
        """The id of the job."""

    def settle(self) -> bool:
        """Settle the handle if the job has ended, and tell whether it is settled.

        :raises StoreUnavailable: when that cannot be known now.
        """

    def after_fork(self) -> None:
        """In the child of a fork: those who wait are in the parent."""


class CompletionWatcher:
    """Settles handles when their jobs have ended.

    Those that came are looked at once, and then when the store says that something has changed about them: ten thousand
    that wait cost nothing.
    """

    # Under _changed: _futures, _new and _thread. The watch is made, used and closed by the thread; others only wake it.
    # _turns belongs to the thread.

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._changed = threading.Condition()  # a finalizer may come here in the middle
        self._futures: dict[str, list[Followed]] = {}  # by the ids of their jobs
        self._new: set[str] = set()  # ids of jobs that are to be looked at, and watched
        self._scan_order: deque[str] = deque()  # ids of all jobs that are watched, and of some that were
        self._watch: Watch | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    def add(self, future: Followed) -> None:
        """Settle this handle when its job has ended."""
        id = future.job_id
        with self._changed:
            there = self._futures.setdefault(id, [])
            if any(each is future for each in there):
                return
            there.append(future)
            self._new.add(id)
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
        id = future.job_id
        with self._changed:
            left = [each for each in self._futures.get(id, ()) if each is not future]
            if left:
                self._futures[id] = left
            else:
                self._futures.pop(id, None)
                self._new.discard(id)

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

    def after_fork(self) -> None:
        """In the child of a fork, where another one follows what is to be followed."""
        for future in chain.from_iterable(self._futures.values()):
            future.after_fork()

    # ---- the thread ----

    def _run(self) -> None:
        watch = self._store.watch()
        self._watch = watch
        look = time.monotonic() + _AGAIN  # when to look for what nobody tells of
        try:
            while self._is_needed():
                try:
                    look = self._follow(watch, look)
                except StoreUnavailable:
                    self._look_at_all_again()
                    self._pause(_AGAIN)
                except Exception:
                    logger.exception("Jobs of other processes cannot be followed; trying again.")
                    self._look_at_all_again()
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

    def _follow(self, watch: Watch, look: float) -> float:
        """Settle those that came, and then those of which the store has something new; when to look for more."""
        with self._changed:
            new, self._new = self._new, set()
            ids = set(self._futures) if new else set[str]()
        if new:
            watch.begin(ids)
            self._scan_order.extend(new)
            self._settle(new)
        changed = watch.wait(max(0.0, look - time.monotonic()))
        if time.monotonic() >= look:
            look = time.monotonic() + _AGAIN
            self._store.find_lost()
            self._settle(self._next_turn())
        begin = time.monotonic()
        if not self._settle(set(self._futures) if changed is None else changed):
            self._pause(_SHARE * (time.monotonic() - begin))
        return look

    def _next_turn(self) -> Collection[str]:
        """Some of the jobs, others each time."""
        ids = set[str]()
        for _ in range(min(_AT_ONCE, len(self._scan_order))):
            id = self._scan_order.popleft()
            if id in self._futures and id not in ids:
                ids.add(id)
                self._scan_order.append(id)
        return ids

    def _look_at_all_again(self) -> None:
        with self._changed:
            self._new.update(self._futures)
        self._scan_order.clear()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait(seconds)

    def _settle(self, ids: Iterable[str]) -> bool:
        """Settle the handles of those jobs that have ended; whether there was one."""
        with self._changed:
            futures = list(chain.from_iterable(self._futures.get(id, ()) for id in ids))
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
        for future in settled:
            self.discard(future)
        return bool(settled)
