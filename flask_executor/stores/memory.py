"""Records in the memory of one process: nothing to install, not seen by other processes, gone when it ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import suppress
from itertools import islice

from flask_executor.abc import JobRecords
from flask_executor.jobs.model import Job, JobState, JobStatus, LogLine


class MemoryStore(JobRecords):
    """Keeps the :class:`JobState` objects themselves, so that a change of status needs no write.

    Needs no lock: each operation on a dict or a deque is atomic. Between two of them a reader sees a job more or less,
    but never half of one.

    :param max_records: most ended jobs to keep.
    :param ttl: seconds to keep them for.
    """

    def __init__(self, max_records: int, ttl: float) -> None:
        self._max_records = max_records
        self._ttl = ttl
        # When records expired, oldest first; by id, and by key, which stands in a tuple.
        self._expired: dict[str | tuple[Hashable], float] = {}
        self._jobs: dict[str, JobState] = {}
        self._ended: deque[JobState] = deque()  # in the order in which they ended
        self._by_key: dict[Hashable, JobState] = {}

    def add(self, job: JobState) -> None:
        """Record a job that is about to be queued."""
        self._jobs[job.id] = job
        if job.key is not None:
            self._by_key[job.key] = job

    def end(self, job: JobState) -> None:
        """Let a job that has ended expire from now on."""
        self._ended.append(job)
        self._clean()

    def _clean(self) -> None:
        """Remove what has expired, and the oldest ended jobs if there are too many."""
        ended, now = self._ended, time.time()
        while ended and (len(ended) > self._max_records or (ended[0].ended_at or now) <= now - self._ttl):
            try:
                job = ended.popleft()
            except IndexError:  # another thread was faster
                return
            self._forget(job)
            self._remember(job, now)

    def _remember(self, job: JobState, now: float) -> None:
        self._expired[job.id] = now
        if job.key is not None:
            self._expired[(job.key,)] = now
        while len(self._expired) > 2 * self._max_records:
            with suppress(StopIteration, RuntimeError, KeyError):  # another thread was faster
                del self._expired[next(iter(self._expired))]

    def expired(self, id: str | None = None, *, key: Hashable | None = None) -> bool:
        self._clean()
        if key is not None:
            return key not in self._by_key and self._is_remembered((key,))
        return id is not None and id not in self._jobs and self._is_remembered(id)

    def _is_remembered(self, name: str | tuple[Hashable]) -> bool:
        left = self._expired.get(name)
        return left is not None and time.time() - left < max(self._ttl, 3600.0)

    def remove(self, id: str) -> None:
        """Forget a job as if it had never existed."""
        job = self._jobs.get(id)
        if job is not None:
            self._forget(job)
            if job.ended_at is not None:
                self._ended.remove(job)

    def clear(self) -> None:
        """Forget all."""
        for records in (self._jobs, self._by_key, self._ended, self._expired):
            records.clear()

    def get(self, id: str) -> Job | None:
        self._clean()
        job = self._jobs.get(id)
        return None if job is None else job.record()

    def find(self, key: Hashable) -> Job | None:
        self._clean()
        job = self._by_key.get(key)
        return None if job is None else job.record()

    def log(self, id: str) -> Sequence[LogLine]:
        job = self._jobs.get(id)
        return () if job is None or job.log is None else tuple(job.log)

    def _list(self, status: JobStatus | None, name: str | None, owner: str | None, limit: int | None) -> Sequence[Job]:
        self._clean()
        jobs = list(self._jobs.values())
        jobs.reverse()
        matching = (
            job.record()
            for job in jobs
            if (status is None or job.status == status)
            and (name is None or job.name == name)
            and (owner is None or job.owner == owner)
        )
        return [*islice(matching, limit)]

    def _forget(self, job: JobState) -> None:
        self._jobs.pop(job.id, None)
        if job.key is not None and self._by_key.get(job.key) is job:
            self._by_key.pop(job.key, None)
