"""The records in the memory of this process and those in a shared store, read as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from flask_executor.abc import JobRecords, JobStore
from flask_executor.exceptions import StoreUnavailable
from flask_executor.jobs.model import Job, JobStatus, LogLine
from flask_executor.stores.memory import MemoryStore


class MergedRecords(JobRecords):
    """The records of the jobs of this process, from its memory until their end is written, and all others in the store.

    :param is_written: whether the store has, or had, the end of a job of this process.
    """

    def __init__(self, memory: MemoryStore, store: JobStore, is_written: Callable[[Job], bool]) -> None:
        self._memory = memory
        self._store = store
        self._is_written = is_written

    def get(self, id: str) -> Job | None:
        own = self._memory.get(id)
        if own is not None and not self._is_written(own):
            return own
        try:
            return self._store.get(id)
        except StoreUnavailable:
            if own is None:
                raise
            return own

    def find(self, key: Hashable) -> Job | None:
        try:
            stored = self._store.find(key)
        except StoreUnavailable:
            own = self._memory.find(key)
            if own is None:
                raise
            return own
        return None if stored is None else self._fresh(stored)

    def _fresh(self, stored: Job) -> Job:
        """A record of the store, or the newer one in memory."""
        own = self._memory.get(stored.id)
        if own is None:
            return stored
        # Its end may have been written since the record was read.
        return stored if self._is_written(own) and stored.status.ended else own

    def expired(self, id: str | None = None, *, key: Hashable | None = None) -> bool:
        own = None if id is None else self._memory.get(id)
        if own is not None and not self._is_written(own):
            return False
        return self._store.expired(id, key=key) or (key is None and self._memory.expired(id))

    def log(self, id: str) -> Sequence[LogLine]:
        own = self._memory.get(id)
        return self._store.log(id) if own is None or self._is_written(own) else self._memory.log(id)

    def _list(self, status: JobStatus | None, name: str | None, owner: str | None, limit: int | None) -> Sequence[Job]:
        known = self._memory.list(status=status, name=name, owner=owner, limit=limit)
        own = [job for job in known if not self._is_written(job)]
        stored = self._store.list(status=status, name=name, owner=owner, limit=limit)
        # A record of the store does not match any more if memory has a newer one that it has not listed.
        found = {job.id: job for job in stored if self._fresh(job) is job}
        found.update((job.id, job) for job in own)  # its end may be written between the two
        jobs = sorted(found.values(), key=lambda job: job.queued_at, reverse=True)
        return jobs if limit is None else jobs[:limit]
