"""What a job is: its states, its record, and the record in the making."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Hashable
from dataclasses import dataclass

from flask_executor.helpers import describe_error


class JobStatus(str, enum.Enum):
    """Where a job stands. Each member is also its own name as a string: ``job.status == "failed"``."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"

    __str__ = str.__str__

    #: Where a job can go from here; nowhere once it has ended.
    successors: tuple[JobStatus, ...]

    @property
    def ended(self) -> bool:
        """Whether a job in this state stays in it."""
        return not self.successors


for _status in JobStatus:
    _status.successors = ()
JobStatus.QUEUED.successors = (JobStatus.RUNNING, JobStatus.CANCELLED, JobStatus.LOST)
JobStatus.RUNNING.successors = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.LOST)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """What is asked for one job beside its function and arguments; None leaves it to the executor."""

    name: str | None = None
    key: Hashable | None = None
    owner: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The record of one job at one moment. Times are seconds since the epoch, None where not reached."""

    id: str
    name: str
    key: Hashable | None
    owner: str | None
    status: JobStatus
    queued_at: float
    started_at: float | None
    ended_at: float | None
    #: Type and message of the exception that ended the job, without the traceback.
    error: str | None


class LiveJob:
    """A job as the process that runs it sees it; :meth:`record` gives the frozen :class:`Job` of the moment.

    A frozen record replaced at every step would cost more than many a job does, so the steps are
    written here and records are made for those who ask.

    Who writes: the handle, under its lock, the step out of ``queued``; after that only the worker that
    holds the job. It never refers to the result, so that a history of jobs does not keep results alive.
    """

    status = JobStatus.QUEUED
    started_at: float | None = None
    ended_at: float | None = None
    error: str | None = None

    def __init__(self, name: str, key: Hashable | None = None, owner: str | None = None) -> None:
        self.id = new_id()
        self.name = name
        self.key = key
        self.owner = owner
        self.queued_at = time.time()

    def start(self) -> None:
        """Go from ``queued`` to ``running``."""
        self._check(JobStatus.RUNNING)
        self.started_at = time.time()
        self.status = JobStatus.RUNNING  # last: whoever sees the status finds the rest

    def end(self, status: JobStatus, error: BaseException | None = None) -> None:
        """Go to a final status, with the error that led there."""
        self._check(status)
        if error is not None:
            self.error = describe_error(error)
        self.ended_at = time.time()
        self.status = status

    def record(self) -> Job:
        """The job as it stands now."""
        status = self.status  # first, for the same reason
        return Job(
            id=self.id,
            name=self.name,
            key=self.key,
            owner=self.owner,
            status=status,
            queued_at=self.queued_at,
            started_at=self.started_at,
            ended_at=self.ended_at,
            error=self.error,
        )

    def _check(self, status: JobStatus) -> None:
        if status not in self.status.successors:
            raise RuntimeError(f"job {self.id} is {self.status} and cannot become {status}")


_ID_BYTES = 12
_ids: list[str] = []  # random, fetched from the system many at a time: one by one would cost 1 us each


def new_id() -> str:
    """A fresh job id: 24 hexadecimal digits that cannot be guessed."""
    while True:
        try:
            return _ids.pop()
        except IndexError:
            digits = os.urandom(_ID_BYTES * 256).hex()
            _ids.extend(digits[i : i + 2 * _ID_BYTES] for i in range(0, len(digits), 2 * _ID_BYTES))


if hasattr(os, "register_at_fork"):  # two processes must not hand out the same stock
    os.register_at_fork(after_in_child=_ids.clear)
