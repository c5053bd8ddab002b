"""The collection that finds the jobs of all processes by key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED, FINISHED, PENDING, RUNNING
from typing import Any

from flask_executor.abc import JobStore
from flask_executor.exceptions import (
    KeyExists,
    StoreUnavailable,
)
from flask_executor.futures import FutureCollection, FutureProxy
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.tracking.local import is_listed
from flask_executor.tracking.stored_future import StoredFuture

_STATES = {JobStatus.QUEUED: PENDING, JobStatus.RUNNING: RUNNING, JobStatus.CANCELLED: CANCELLED}


class StoredFutureCollection(FutureCollection[FutureProxy[Any]]):
    """``executor.futures`` with a shared store: the handles of the jobs of all processes.

    The base class holds those of this process, and futures that were added by hand, which other processes do not see.

    :param handle: makes the handle of a job of which the store has this record.
    """

    def __init__(
        self, max_length: int | None, max_pinned: int, store: JobStore, handle: Callable[[Job], FutureProxy[Any]]
    ) -> None:
        super().__init__(max_length, max_pinned)
        self._store = store
        self._handle = handle

    def get(self, future_key: Hashable) -> FutureProxy[Any] | None:
        held = super().get(future_key)
        if held is not None and _is_by_hand(future_key, held):
            return held
        try:
            job = self._store.holding_key(future_key)
        except StoreUnavailable:
            if held is None:
                raise
            return held
        if held is not None and (job is None or job.id != held.job_id):  # another process has freed the key
            super().pop(future_key)
            held = None
        return self._handle(job) if held is None and job is not None else held

    def hold(self, future_key: Hashable, future: FutureProxy[Any], *, pinned: bool) -> None:
        """Hold the handle of a job of this process, which has the key."""
        with self._lock:
            super().pop(future_key)
            self._put(future_key, future, pinned=pinned)

    def add(self, future_key: Hashable, future: FutureProxy[Any]) -> None:
        if self.get(future_key) is not None:
            raise KeyExists(future_key)
        super().add(future_key, future)

    def _state(self, future_key: Hashable) -> str | None:
        """The state as :mod:`concurrent.futures` calls it; polling routes written for 1.0 show it."""
        future = self.get(future_key)
        if isinstance(future, StoredFuture):
            return _STATES.get(future.status, FINISHED)
        return None if future is None else future._state

    def pop(self, future_key: Hashable) -> FutureProxy[Any] | None:
        future = self.get(future_key)
        if future is None or _is_by_hand(future_key, future):
            return super().pop(future_key)
        if not self._store.release(future_key, future.job_id):  # another process was faster
            return None
        super().pop(future_key)
        return future

    def release(self, future_key: Hashable, job_id: str) -> bool:
        with self._lock:
            if getattr(self._get(future_key), "job_id", None) == job_id:
                super().pop(future_key)
        return self._store.release(future_key, job_id)

    def clear(self) -> None:
        """Remove the handles that this process holds; the keys stay taken in the store."""
        with self._lock:
            for key in [*self._futures, *self._pinned]:
                super().pop(key)
            self._evicted_unfinished.clear()

    def keys(self, within: tuple[Hashable, ...] = ()) -> list[Hashable]:
        stored = [key for key in self._store.keys(within) if is_listed(key, within)]
        with self._lock:
            by_hand = [key for key in super().keys(within) if _is_by_hand(key, self._get(key))]
        return [*by_hand, *stored]

    def __contains__(self, item: object) -> bool:
        if isinstance(item, Future):
            return super().__contains__(item) or (isinstance(item, StoredFuture) and self._has(item))
        return self.get(item) is not None

    def __len__(self) -> int:
        return len(self.keys())

    def _has(self, future: StoredFuture[Any]) -> bool:
        job = self._store.holding_key(future.key)
        return job is not None and job.id == future.job_id


def _is_by_hand(key: Hashable, future: Any) -> bool:
    """Return whether the user has added this future under this key, and not the executor."""
    return getattr(future, "key", None) != key or not hasattr(future, "job_id")
