"""What an executor knows of its jobs: handles by key, and records, in the memory of one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flask_executor.abc import JobRecords
from flask_executor.futures import FutureCollection, FutureProxy, has_ended
from flask_executor.jobs.current import RunningJob
from flask_executor.jobs.model import Job, JobOptions, JobState, JobStatus
from flask_executor.stores.codec import is_internal_key
from flask_executor.stores.memory import MemoryStore

if TYPE_CHECKING:
    from flask_executor.jobs.call import Call
    from flask_executor.tracking.engine_handover import EngineHandover


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingOptions:
    """The settings for handles and records."""

    #: ``EXECUTOR_STORE``.
    store: str
    #: Which jobs a shared store records: ``stored`` (those with a key) or ``all``.
    track: str
    #: Bound of ``executor.futures``; None for none.
    futures_max_length: int | None
    #: Most records of ended jobs.
    max_records: int
    #: Seconds for which the record and the result of an ended job are kept.
    result_ttl: float
    #: Most bytes of a result in a shared store.
    result_max_bytes: int
    #: What the app's config calls each setting.
    config_key: Callable[[str], str]


class JobTracker:
    """Handles and records of the jobs of this process, in its memory."""

    #: Whether other processes see them.
    shared = False
    #: How jobs pass between processes and an engine; None for a backend whose jobs are this process's.
    handover: EngineHandover | None = None

    def __init__(self, options: TrackingOptions) -> None:
        self._options = options
        self._memory = MemoryStore(options.max_records, options.result_ttl)
        self.records: JobRecords = self._memory
        most, ttl = options.max_records, options.result_ttl
        self.futures: FutureCollection[FutureProxy[Any]] = ExpiringFutures(options.futures_max_length, most, ttl)
        self._expire_at = 0.0  # when to look for expired handles again, in seconds since the epoch

    def reconfigure(self, options: TrackingOptions) -> None:
        """Use another configuration. The store stays, with the options it was made with."""
        self._options = options
        self.futures.max_length = options.futures_max_length

    def find(self, options: JobOptions) -> FutureProxy[Any] | None:
        """The handle of the job that has the key; None when :meth:`claim` would start one.

        That is when the key is free, or the job has failed and is to be started again.
        """
        existing = self.futures.get(options.key)
        if existing is None or (options.again and has_failed(existing)):
            return None
        if is_pinned(options):
            self.futures.pin(options.key)
        return existing

    def claim(self, call: Call) -> FutureProxy[Any] | None:
        """Claim the key of a call; None if that succeeds, else the handle of the job that has the key.

        Without a shared store, to be called by one thread at a time.
        """
        futures, key = self.futures, call.job.key
        existing = futures.get(key)
        if existing is not None and call.options.again and has_failed(existing):
            futures.pop(key)
        existing = futures.setdefault(key, call.future, pinned=is_pinned(call.options))  # one may be added by hand now
        return None if existing is call.future else existing

    def handle(self, job: Job) -> FutureProxy[Any] | None:
        """The handle of a job that has this record, if it is held."""
        future = None if job.key is None else self.futures.get(job.key)
        return future if getattr(future, "job_id", None) == job.id else None

    def add(self, call: Call) -> None:
        """Track a job that is about to be queued; its key, if it has one, is claimed."""
        self._memory.add(call.job)
        self._expire(call.job.queued_at)

    def _expire(self, now: float) -> None:
        """Remove handles, and so results, that are older than the TTL."""
        if now < self._expire_at:
            return
        ttl = self._options.result_ttl
        self._expire_at = now + ttl / 8  # so seldom that it costs next to nothing per job
        self.futures.expire(now - ttl)

    def remove(self, future: FutureProxy[Any]) -> None:
        """Forget a job that was not accepted."""
        if future.key is not None:
            self.futures.pop(future.key)
        self._memory.remove(future.job_id)

    def changed(self, job: JobState) -> None:
        """The job has started, is queued again, or has something new to report."""

    def reporter(self, job: JobState) -> Callable[[RunningJob], None] | None:
        """Return what a running job calls when it has something new to report; None for nothing."""
        return None

    def pack_result(self, job: JobState, result: Any, packed: bytes | None) -> bytes | None:
        """See :meth:`~flask_executor.jobs.call.JobChannel.pack_result`: the memory of this process has the handle."""
        return None

    def ended(self, job: JobState, error: BaseException | None, outcome: bytes | None) -> None:
        """The job has ended."""
        self._memory.end(job)

    def flush(self, timeout: float | None) -> bool:
        """Write all that is new to the store.

        :return: whether that was done within ``timeout`` seconds.
        """
        return True

    def in_background(self, fn: Callable[[], object]) -> None:
        """Run ``fn``, which may wait for a store or an engine, in the thread for that, where there is one."""
        fn()

    def check(self) -> None:
        """Check that the store answers.

        :raises StoreUnavailable: if it does not.
        """

    def after_fork(self) -> None:
        """In the child of a fork: the parent keeps its jobs, threads and connections."""
        self.futures.after_fork()

    def abandoned(self, job: JobState) -> None:
        """In the child of a fork: this job is the parent's."""
        self._memory.end(job)

    def abandon_unfinished(self, timeout: float) -> None:
        """The process ends: write that its unfinished jobs are lost, within ``timeout`` seconds."""

    def close(self, *, wait: bool) -> None:
        """There will be no more jobs. Handles and records can still be read.

        :param wait: If true, wait until what is left is written, a few seconds at most.
        """


class ExpiringFutures(FutureCollection[FutureProxy[Any]]):
    """``executor.futures`` in the memory of one process. Handles leave with the records of their jobs.

    Those under keys that this package has made are listed only for a ``within`` that begins as they do.

    :param ttl: seconds for which the handle of a job that has ended is held.
    """

    def __init__(self, max_length: int | None, max_pinned: int, ttl: float) -> None:
        super().__init__(max_length, max_pinned)
        self._ttl = ttl

    def keys(self, within: tuple[Hashable, ...] = ()) -> list[Hashable]:
        keys = super().keys(within)
        return [key for key in keys if is_listed(key, within) and self.get(key) is not None]

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, item: object) -> bool:
        return super().__contains__(item) and (isinstance(item, Future) or self.get(item) is not None)

    def _get(self, future_key: Hashable) -> FutureProxy[Any] | None:
        future = super()._get(future_key)
        if future is not None and has_ended(future, time.time() - self._ttl):
            self.pop(future_key)
            return None
        return future


def is_pinned(options: JobOptions) -> bool:
    """Return whether the handle is exempt from ``EXECUTOR_FUTURES_MAX_LENGTH``, which would be too small.

    ``result_or_202`` asks for that. Keys that this package has made imply it: each step of a flow and each job that was
    started over HTTP has one.
    """
    return options.pinned or is_internal_key(options.key)


def is_listed(key: Hashable, within: tuple[Hashable, ...]) -> bool:
    """Return whether ``keys(within)`` lists this key: users do not see those that this package has made."""
    return bool(within) or not is_internal_key(key)


def has_failed(future: Any) -> bool:
    """Return whether this is a handle, and of a job that has ended other than by success."""
    status = getattr(future, "status", JobStatus.SUCCEEDED)  # a future that was added by hand has none
    return bool(status.retryable)
