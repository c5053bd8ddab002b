"""Records in the memory of one process: nothing to install, seen by nobody else, gone when it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from itertools import islice

from flask_executor.abc import JobStore
from flask_executor.jobs import Job, JobStatus, LiveJob, LogLine


class MemoryStore(JobStore):
    """Keeps the live jobs themselves; a step needs no writing down.

    Needs no lock: each operation on a dict or a deque is atomic, and what a reader sees between two of
    them is a job more or less, never a broken one.

    :param max_records: most jobs that have ended to keep.
    """

    def __init__(self, max_records: int) -> None:
        self._max_records = max_records
        self._jobs: dict[str, LiveJob] = {}
        self._ended: deque[LiveJob] = deque()  # in the order in which they ended
        self._by_key: dict[Hashable, LiveJob] = {}

    def add(self, job: LiveJob) -> None:
        self._jobs[job.id] = job
        if job.key is not None:
            self._by_key[job.key] = job

    def update(self, job: LiveJob) -> None:
        if job.ended_at is None:
            return
        self._ended.append(job)
        if len(self._ended) > self._max_records:
            self._forget(self._ended.popleft())

    def remove(self, id: str) -> None:
        job = self._jobs.get(id)
        if job is not None:
            self._forget(job)
            if job.ended_at is not None:
                self._ended.remove(job)

    def get(self, id: str) -> Job | None:
        job = self._jobs.get(id)
        return None if job is None else job.record()

    def find(self, key: Hashable) -> Job | None:
        job = self._by_key.get(key)
        return None if job is None else job.record()

    def log(self, id: str) -> Sequence[LogLine]:
        job = self._jobs.get(id)
        return () if job is None or job.log is None else tuple(job.log)

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

    def after_fork(self) -> None:
        pass  # no lock that a thread of the parent could have held

    def reachable(self) -> bool:
        return True

    def _forget(self, job: LiveJob) -> None:
        self._jobs.pop(job.id, None)
        if job.key is not None and self._by_key.get(job.key) is job:
            self._by_key.pop(job.key, None)
