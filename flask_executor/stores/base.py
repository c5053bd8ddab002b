"""The base of the stores that several processes share: who is dead, and what to do when the store is not available."""

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

#: Seconds for which a store that did not answer is not asked again, so that requests do not queue up for it.
_OUTAGE_PAUSE = 1.0
_MIN_MEMORY = 3600.0  # seconds that expired jobs are remembered, at least
#: Most messages of one job that :meth:`~flask_executor.abc.JobStore.take_requests` returns.
MESSAGES_PER_JOB = 100


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as it was read, and the holder of its job."""

    job: Job
    holder: str


def as_lost(stored: StoredRecord) -> Job:
    """The record of a job whose holder is dead."""
    error = f"WorkerLost: process {pid_of(stored.holder)}, which had the job, is gone"
    return replace(stored.job, status=JobStatus.LOST, ended_at=time.time(), error=error)


def was_transferred(there: StoredRecord, entry: Entry) -> bool:
    """Whether a transfer that was refused has succeeded before with this very entry, and only the answer was lost."""
    job = entry.job
    if there.holder != entry.holder:
        return False
    if there.job.status.ended or job.status.ended:
        return (there.job.status, there.job.ended_at) == (job.status, job.ended_at)
    return True


def report_loss(lost: Job) -> None:
    """Log that a job is lost. The process that has written it does that, as the holder is dead."""
    extra = {"job_id": lost.id, "job_key": lost.key}
    logger.error("Job %s (%s) is lost. %s", lost.name, lost.id, lost.error, extra=extra)


def message_limit_error(id: str) -> QueueFull:
    """The error for a message to a job for which too many wait."""
    return QueueFull(
        "messages to one job",
        MOST_MESSAGES,
        f"{MOST_MESSAGES} messages wait for job {id}, as many as are kept; this one was not accepted. The process that "
        "has the job collects them some times a second; a job in the queue of an engine gets them when it starts. Try "
        "again later, or put more into one message.",
    )


def skipped(error: Exception) -> None:
    """Log that a record cannot be read, which another version may have written; the store acts as if there was none."""
    logger.warning("A record in the job store cannot be read, and is left out: %s", describe_error(error))


class SharedStore(JobStore):
    """Finds the jobs of dead holders, and translates errors; adapters read and write the records."""

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        #: Seconds that an expired job is remembered.
        self.memory = max(options.result_ttl, _MIN_MEMORY)
        #: For reading (False) and for writing (True): until when the store is not asked (monotonic), and why.
        self._down: dict[bool, tuple[float, str]] = {}

    # ---- what adapters implement ----

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
        """Write that a job is lost, unless it has ended meanwhile; its record after that. Calls :func:`as_lost`."""

    @abc.abstractmethod
    def _has_lease(self, holder: str) -> bool:
        """Whether the lease of a holder has not run out."""

    @abc.abstractmethod
    def _reasons(self) -> tuple[type[Exception], ...]:
        """What the store's library raises when the store is not available."""

    @abc.abstractmethod
    def _explain(self, error: Exception) -> str:
        """The text of such an error: what is wrong, and what to do."""

    # ---- what they inherit ----

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
        """The record, marked as lost if its holder is dead."""
        if stored is None:
            return None
        if stored.job.status.ended or not self._dead({stored.holder}):
            return stored.job
        return self._mark_lost(stored)

    def _dead(self, holders: Iterable[str]) -> set[str]:
        """Those of the holders that are dead: gone from this machine, or on another one and without a lease."""
        dead = set()
        for holder in holders:
            alive = is_alive(holder)
            if alive is False or (alive is None and not self._has_lease(holder)):
                dead.add(holder)
        return dead

    @contextmanager
    def reaching(self, *, writing: bool = False) -> Iterator[None]:
        """Translate what the store's library raises within to :exc:`~flask_executor.StoreUnavailable`.

        After an error that took long to find out, others fail at once for a moment, instead of waiting too.
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
                self._down[writing] = (time.monotonic() + _OUTAGE_PAUSE, why)
            raise StoreUnavailable(self.where, why) from error
        self._down.pop(writing, None)

    def _is_slow(self, error: Exception) -> bool:
        """Whether it took long to find out that the store is not available."""
        return True

    def after_fork(self) -> None:
        self._down = {}
