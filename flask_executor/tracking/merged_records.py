"""What is known of jobs here and in a store that others write to as well, as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from flask_executor.abc import JobRecords, JobStore
from flask_executor.exceptions import StoreUnavailable
from flask_executor.jobs.model import Job, JobStatus, LogLine
from flask_executor.stores.memory import MemoryStore


class MergedRecords(JobRecords):
    """The records of the jobs of this process, in its memory, and of all others that are in the store.

    :param is_written: whether the store can be asked about a job of this process. It may have purged the record since.
    """

    def __init__(self, memory: MemoryStore, store: JobStore, is_written: Callable[[Job], bool]) -> None:
        self._memory = memory
        self._store = store
        self._is_written = is_written

    def get(self, id: str) -> Job | None:
        here = self._memory.get(id)
        if here is not None and not self._is_written(here):
            return here
        try:
            return self._store.get(id)
        except StoreUnavailable:
            if here is None:
                raise
            return here

    def find(self, key: Hashable) -> Job | None:
        try:
            stored = self._store.find(key)
        except StoreUnavailable:
            here = self._memory.find(key)
            if here is None:
                raise
            return here
        return None if stored is None else self._fresh(stored)

    def _fresh(self, stored: Job) -> Job:
        """A record of the store, or what this process knows better."""
        here = self._memory.get(stored.id)
        if here is None:
            return stored
        # Its end may have been written since the record was read.
        return stored if self._is_written(here) and stored.status.ended else here

    def expired(self, id: str | None = None, *, key: Hashable | None = None) -> bool:
        here = None if id is None else self._memory.get(id)
        if here is not None and not self._is_written(here):
            return False
        return self._store.expired(id, key=key) or (key is None and self._memory.expired(id))

    def log(self, id: str) -> Sequence[LogLine]:
        here = self._memory.get(id)
        return self._store.log(id) if here is None or self._is_written(here) else self._memory.log(id)

    def _list(self, status: JobStatus | None, name: str | None, owner: str | None, limit: int | None) -> Sequence[Job]:
        known = self._memory.list(status=status, name=name, owner=owner, limit=limit)
        here = [job for job in known if not self._is_written(job)]
        stored = self._store.list(status=status, name=name, owner=owner, limit=limit)
        # What memory knows better, and has not listed, does not match any more.
        found = {job.id: job for job in stored if self._fresh(job) is job}
        found.update((job.id, job) for job in here)  # one may be written between the two
        jobs = sorted(found.values(), key=lambda job: job.queued_at, reverse=True)
        return jobs if limit is None else jobs[:limit]
