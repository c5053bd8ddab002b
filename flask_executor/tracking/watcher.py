"""Settles the handles of jobs that other processes have: one thread, for all handles that something waits for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from flask_executor.abc import JobStore, Watch
from flask_executor.exceptions import StoreUnavailable
from flask_executor.helpers.log import logger

if TYPE_CHECKING:
    from flask_executor.tracking.stored_future import StoredFuture

_SCAN_INTERVAL = 1.0  # seconds between two looks for what no change tells: dead processes, records that have left
_JOBS_PER_SCAN = 50  # the others have their turn in the next scans
_STORE_RETRY_DELAY = 1.0  # seconds until a store that did not answer is asked again
_REST_FACTOR = 4  # rest this many times as long as reading took: otherwise each of many writers would wake the thread
_CLOSE_TIMEOUT = 5.0  # seconds that close() waits for the thread


class CompletionWatcher:
    """Settles handles when their jobs have ended.

    The thread reads a job once when its handle comes, and then when the store tells that the job may have changed: ten
    thousand handles that wait cost nothing.
    """

    # Under _changed: _futures, _new and _thread. The thread makes, uses and closes the watch; others only wake it.
    # _scan_order belongs to the thread.

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._changed = threading.Condition()  # reentrant: the garbage collector may run a finalizer in the middle
        self._futures: dict[str, list[StoredFuture[Any]]] = {}  # by the ids of their jobs
        self._new: set[str] = set()  # ids of jobs that are to be read, and watched from then on
        self._scan_order: deque[str] = deque()  # ids of all jobs that are watched, and of some that were
        self._watch: Watch | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    def add(self, future: StoredFuture[Any]) -> None:
        """Settle this handle when its job has ended."""
        id = future.job_id
        with self._changed:
            futures = self._futures.setdefault(id, [])
            if any(each is future for each in futures):
                return
            futures.append(future)
            self._new.add(id)
            self._closing = False
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="flask-executor-watcher", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify_all()
            watch = self._watch
        if watch is not None:
            watch.wake()

    def discard(self, future: StoredFuture[Any]) -> None:
        """Nothing waits for this handle any more."""
        id = future.job_id
        with self._changed:
            left = [each for each in self._futures.get(id, ()) if each is not future]
            if left:
                self._futures[id] = left
            else:
                self._futures.pop(id, None)
                self._new.discard(id)

    def close(self, *, wait: bool) -> None:
        """End the thread when there is no handle left to settle.

        :param wait: If true, wait for that, but only if there is none now.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = None if self._futures else self._thread
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_TIMEOUT)

    def after_fork(self) -> None:
        """In the child of a fork, which makes a watcher of its own."""
        for future in chain.from_iterable(self._futures.values()):
            future.after_fork()

    # ---- the thread ----

    def _run(self) -> None:
        watch = self._store.watch()
        self._watch = watch
        scan_at = time.monotonic() + _SCAN_INTERVAL
        try:
            while self._is_needed():
                try:
                    scan_at = self._step(watch, scan_at)
                except StoreUnavailable:
                    self._read_all_again()
                    self._pause(_STORE_RETRY_DELAY)
                except Exception:
                    logger.exception("Jobs of other processes cannot be watched; trying again.")
                    self._read_all_again()
                    self._pause(_STORE_RETRY_DELAY)
        finally:
            watch.close()

    def _is_needed(self) -> bool:
        """Wait until there is a handle; False at the end. The thread refers to no handle meanwhile."""
        with self._changed:
            while not self._futures and not self._closing:
                self._changed.wait()
            if not self._futures:
                self._thread = self._watch = None
            return bool(self._futures)

    def _step(self, watch: Watch, scan_at: float) -> float:
        """Settle the handles that came, then those of jobs that have changed; when to scan next."""
        with self._changed:
            new, self._new = self._new, set()
            ids = set(self._futures) if new else set[str]()
        if new:
            watch.begin(ids)
            self._scan_order.extend(new)
            self._settle(new)
        changed = watch.wait(max(0.0, scan_at - time.monotonic()))
        if time.monotonic() >= scan_at:
            scan_at = time.monotonic() + _SCAN_INTERVAL
            self._store.find_lost()
            self._settle(self._next_to_scan())
        begin = time.monotonic()
        if not self._settle(set(self._futures) if changed is None else changed):
            self._pause(_REST_FACTOR * (time.monotonic() - begin))
        return scan_at

    def _next_to_scan(self) -> Collection[str]:
        """Some of the jobs, others each time."""
        ids = set[str]()
        for _ in range(min(_JOBS_PER_SCAN, len(self._scan_order))):
            id = self._scan_order.popleft()
            if id in self._futures and id not in ids:
                ids.add(id)
                self._scan_order.append(id)
        return ids

    def _read_all_again(self) -> None:
        with self._changed:
            self._new.update(self._futures)
        self._scan_order.clear()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait(seconds)

    def _settle(self, ids: Iterable[str]) -> bool:
        """Settle the handles of those jobs that have ended; False when there was none."""
        with self._changed:
            futures = list(chain.from_iterable(self._futures.get(id, ()) for id in ids))
        settled = []
        for future in futures:
            try:
                if future.settle():
                    settled.append(future)
            except StoreUnavailable:
                raise
            except BaseException:  # unpickling a result may raise anything, SystemExit too
                logger.exception("The handle of job %s cannot be settled.", future.job_id)
                settled.append(future)
        for future in settled:
            self.discard(future)
        return bool(settled)
