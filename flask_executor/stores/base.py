"""What the stores have in common that several processes share."""

from __future__ import annotations

import abc
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from flask_executor.abc import MOST_MESSAGES, Entry, JobStore, StoreOptions
from flask_executor.exceptions import QueueFull, StoreUnavailable
from flask_executor.helpers import describe_error
from flask_executor.helpers.log import logger
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.stores.codec import encode_key
from flask_executor.stores.leases import is_alive, pid_of

#: Seconds for which a store that was not available is not asked again: requests must not queue up before it.
_PAUSE = 1.0
_HOUR = 3600.0
#: Messages of one job that are given at a time.
MESSAGES_PER_JOB = 100


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as it was read, and who has the job."""

    job: Job
    holder: str


def as_lost(stored: StoredRecord) -> Job:
    """The record of a job whose holder is dead."""
    error = f"WorkerLost: process {pid_of(stored.holder)}, which had the job, is gone"
    return replace(stored.job, status=JobStatus.LOST, ended_at=time.time(), error=error)


def was_transferred(there: StoredRecord, entry: Entry) -> bool:
    """Whether a job that cannot be taken was taken with this very entry before, and only the answer was lost."""
    job = entry.job
    if there.holder != entry.holder:
        return False
    if there.job.status.ended or job.status.ended:
        return (there.job.status, there.job.ended_at) == (job.status, job.ended_at)
    return True


def report_loss(lost: Job) -> None:
    """Whoever finds that a job is lost, and has written it, says so: its own process cannot."""
    extra = {"job_id": lost.id, "job_key": lost.key}
    logger.error("Job %s (%s) is lost. %s", lost.name, lost.id, lost.error, extra=extra)


def message_limit_error(id: str) -> QueueFull:
    """There is no room for one more message to this job."""
    return QueueFull(
        "messages to one job",
        MOST_MESSAGES,
        f"{MOST_MESSAGES} messages wait for job {id}, as many as are kept; this one was not accepted. The process that "
        "has the job collects them some times a second; a job in the queue of an engine gets them when it starts. Try "
        "again later, or put more into one message.",
    )


def skipped(error: Exception) -> None:
    """A record cannot be read: another version may have written it. It is as if it was not there, for us."""
    logger.warning("A record in the job store cannot be read, and is left out: %s", describe_error(error))


class SharedStore(JobStore):
    """Finds out who is dead; where and how records are kept is the adapter's."""

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        #: Seconds for which is remembered that there was a job.
        self.memory = max(options.result_ttl, _HOUR)
        #: For reading and for writing: until when nobody need ask, and why (monotonic).
        self._down: dict[bool, tuple[float, str]] = {}

    # ---- the adapter's ----

    @abc.abstractmethod
    def _read(self, id: str) -> StoredRecord | None:
        """The record with this id."""

    @abc.abstractmethod
    def _youngest(self, key: str) -> StoredRecord | None:
        """The youngest record under this key."""

    @abc.abstractmethod
    def _holding(self, key: str) -> StoredRecord | None:
        """The record of the job that has this key."""

    @abc.abstractmethod
    def _select(
        self, status: JobStatus | None, name: str | None, owner: str | None, limit: int | None
    ) -> Iterable[StoredRecord]:
        """The records that match, youngest first."""

    @abc.abstractmethod
    def _mark_lost(self, stored: StoredRecord) -> Job:
        """Write that a job is lost, as :func:`as_lost` says, unless it has ended meanwhile; its record then."""

    @abc.abstractmethod
    def _has_lease(self, holder: str) -> bool:
        """Whether the lease of a holder holds."""

    @abc.abstractmethod
    def _reasons(self) -> tuple[type[Exception], ...]:
        """What is raised when the store is not available."""

    @abc.abstractmethod
    def _explain(self, error: Exception) -> str:
        """What such an error means, and what to do."""

    # ---- the base's ----

    def get(self, id: str) -> Job | None:
        with self.reaching():
            return self._detect_loss(self._read(id))

    def holder(self, id: str) -> str | None:
        with self.reaching():
            stored = self._read(id)
        return None if stored is None or stored.job.status.ended else stored.holder

    def find(self, key: Hashable) -> Job | None:
        with self.reaching():
            return self._detect_loss(self._youngest(encode_key(key)))

    def holding_key(self, key: Hashable) -> Job | None:
        with self.reaching():
            return self._detect_loss(self._holding(encode_key(key)))

    def _list(self, status: JobStatus | None, name: str | None, owner: str | None, limit: int | None) -> Sequence[Job]:
        with self.reaching():
            found = list(self._select(status, name, owner, limit))
            dead = self._dead({stored.holder for stored in found if not stored.job.status.ended})
            jobs = (
                self._mark_lost(stored) if stored.holder in dead and not stored.job.status.ended else stored.job
                for stored in found
            )
            return [job for job in jobs if status is None or job.status is status]

    def _detect_loss(self, stored: StoredRecord | None) -> Job | None:
        """The record, now that it was looked whether the job is lost."""
        if stored is None:
            return None
        if stored.job.status.ended or not self._dead({stored.holder}):
            return stored.job
        return self._mark_lost(stored)

    def _dead(self, holders: Iterable[str]) -> set[str]:
        """Those of the holders that are dead: gone from this machine, or not heard of from another."""
        dead = set()
        for holder in holders:
            alive = is_alive(holder)
            if alive is False or (alive is None and not self._has_lease(holder)):
                dead.add(holder)
        return dead

    @contextmanager
    def reaching(self, *, writing: bool = False) -> Iterator[None]:
        """What the store's library raises within becomes :exc:`~flask_executor.StoreUnavailable`.

        For a moment after that nobody is made to wait for a store which does not answer.
        """
        down = self._down.get(writing)
        if down is not None and time.monotonic() < down[0]:
            raise StoreUnavailable(self.where, down[1])
        try:
            yield
        except StoreUnavailable:
            raise
        except self._reasons() as error:
            why = self._explain(error)
            if self._is_slow(error):
                self._down[writing] = (time.monotonic() + _PAUSE, why)
            raise StoreUnavailable(self.where, why) from error
        self._down.pop(writing, None)

    def _is_slow(self, error: Exception) -> bool:
        """Whether it took long to find out that the store is not available."""
        return True

    def after_fork(self) -> None:
        self._down = {}
