"""Records in the memory of one process: nothing to install, seen by nobody else, gone when it ends."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from itertools import islice

from flask_executor.abc import JobStore
from flask_executor.jobs import Job, JobStatus, LiveJob


class MemoryStore(JobStore):
    """Keeps the live jobs themselves; a step needs no writing down.

    :param max_records: most jobs that have ended to keep.
    """

    def __init__(self, max_records: int) -> None:
        self._max_records = max_records
        self._lock = threading.Lock()
        self._open: dict[str, LiveJob] = {}
        self._ended: dict[str, LiveJob] = {}
        self._by_key: dict[Hashable, LiveJob] = {}

    def add(self, job: LiveJob) -> None:
        with self._lock:
            self._open[job.id] = job
            if job.key is not None:
                self._by_key[job.key] = job

    def update(self, job: LiveJob) -> None:
        if not job.status.ended:
            return
        with self._lock:
            if self._open.pop(job.id, None) is not None:
                self._ended[job.id] = job
                if len(self._ended) > self._max_records:
                    self._forget(self._ended.pop(next(iter(self._ended))))

    def remove(self, id: str) -> None:
        with self._lock:
            job = self._open.pop(id, None) or self._ended.pop(id, None)
            if job is not None:
                self._forget(job)

    def get(self, id: str) -> Job | None:
        with self._lock:
            job = self._open.get(id) or self._ended.get(id)
            return None if job is None else job.record()

    def find(self, key: Hashable) -> Job | None:
        with self._lock:
            job = self._by_key.get(key)
            return None if job is None else job.record()

    def list(
        self,
        *,
        status: JobStatus | str | None = None,
        name: str | None = None,
        owner: str | None = None,
        limit: int | None = None,
    ) -> Sequence[Job]:
        if limit is not None and limit < 0:
            raise ValueError(f"limit is {limit}; it must be 0 or more, or None")
        status = None if status is None else JobStatus(status)
        with self._lock:
            jobs = [*self._open.values(), *self._ended.values()]
        jobs.sort(key=lambda job: job.queued_at, reverse=True)
        matching = (
            job.record()
            for job in jobs
            if (status is None or job.status == status)
            and (name is None or job.name == name)
            and (owner is None or job.owner == owner)
        )
        return [*islice(matching, limit)]

    def after_fork(self) -> None:
        self._lock = threading.Lock()  # the old one may be held by a thread that is not here

    def reachable(self) -> bool:
        return True

    def _forget(self, job: LiveJob) -> None:
        if self._by_key.get(job.key) is job:
            del self._by_key[job.key]
