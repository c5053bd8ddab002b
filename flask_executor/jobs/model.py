"""What a job is: its states, its record, and the record in the making."""

from __future__ import annotations

import enum
import os
import time
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from flask_executor.helpers import describe_error
from flask_executor.helpers.fork_hooks import after_fork_in_child
from flask_executor.jobs.retry import Retry

#: Prefix of the keys (in their first element) and ``meta`` names that this package creates itself.
RESERVED_PREFIX = "flask_executor."

#: Most lines of its log that are kept with a job; the oldest leave first.
LOG_LINES = 500


class JobStatus(str, enum.Enum):
    """Where a job stands. Each member is also its own name as a string: ``job.status == "failed"``."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    KILLED = "killed"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    CANCELLED = "cancelled"

    __str__ = str.__str__

    #: Where a job can go from here; nowhere once it has ended.
    successors: tuple[JobStatus, ...]

    @property
    def ended(self) -> bool:
        """If true, the job has reached its final status."""
        return not self.successors

    @property
    def failed(self) -> bool:
        """If true, something went wrong: the job has ended without success, and nobody asked it to stop."""
        return self in (JobStatus.FAILED, JobStatus.TIMED_OUT, JobStatus.LOST)

    @property
    def retryable(self) -> bool:
        """If true, a job with this status may be run again: it has ended without success."""
        return self.ended and self is not JobStatus.SUCCEEDED


for _status in JobStatus:
    _status.successors = ()
JobStatus.QUEUED.successors = (JobStatus.RUNNING, JobStatus.CANCELLED, JobStatus.LOST)
JobStatus.RUNNING.successors = (
    JobStatus.SUCCEEDED,
    JobStatus.FAILED,
    JobStatus.STOPPED,
    JobStatus.KILLED,
    JobStatus.TIMED_OUT,
    JobStatus.LOST,
    JobStatus.QUEUED,  # to be run again
)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """The options of one job; None means the executor's setting."""

    name: str | None = None
    key: Hashable | None = None
    owner: str | None = None
    #: Seconds that it may run.
    timeout: float | None = None
    #: Seconds between a request to stop and force.
    grace: float | None = None
    #: Whether and when it is run again after an error.
    retry: Retry | None = None
    #: Higher ones start first; those alike in the order of submission.
    priority: int = 0
    #: Seconds before which it does not start.
    delay: float = 0.0
    #: What is known of it beforehand, by name.
    meta: Mapping[str, Any] | None = None
    #: If true, its handle does not count for ``EXECUTOR_FUTURES_MAX_LENGTH``, and is held as long as its record.
    pinned: bool = False
    #: If true, ``submit_once`` starts a job anew that has failed.
    again: bool = False


@dataclass(frozen=True, slots=True)
class JobMessage:
    """A message that was sent to a job with :meth:`future.send() <flask_executor.FutureProxy.send>`."""

    type: str
    body: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLine:
    """One log record of a job, formatted."""

    #: Seconds since the epoch.
    time: float
    #: ``"INFO"``, ``"WARNING"`` ...
    level: str
    #: The name of the logger.
    logger: str
    #: The message.
    text: str
    #: The exception that was logged with it, with its traceback, and the stack; None without them.
    trace: str | None = None

    @property
    def full_text(self) -> str:
        """The message, and all that was logged with it."""
        return "\n".join(part for part in (self.text, self.trace) if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The record of one job at one moment.

    Times are seconds since the epoch, those of the last attempt; None where not reached.
    """

    id: str
    name: str
    key: Hashable | None
    owner: str | None
    status: JobStatus
    queued_at: float
    started_at: float | None
    ended_at: float | None
    #: Type and message of the exception that ended the job, or its last attempt, without the traceback.
    error: str | None
    #: Which attempt this is, from 1.
    attempt: int
    #: How much is done, from 0.0 to 1.0; None while it is not known.
    progress: float | None
    #: What the job says it is doing.
    message: str | None
    #: What else it has reported.
    meta: Mapping[str, Any]
    #: Whether it was asked to stop, or is out of time; it goes on until it finds out.
    stop_requested: bool


class JobState:
    """A job as the process that runs it sees it; :meth:`record` gives the frozen :class:`Job` of the moment.

    To replace a frozen record at every step would cost more than many a job does: the steps are written here, and a
    record is made when one is asked for.

    The handle, under its lock, makes the step out of ``queued``. After that only the process that holds the job
    writes here. It never refers to the result, so that a history of jobs does not keep results alive.
    """

    status = JobStatus.QUEUED
    started_at: float | None = None
    ended_at: float | None = None
    error: str | None = None
    attempt = 1
    progress: float | None = None
    message: str | None = None
    #: Only the worker that runs the job changes it; None for nothing.
    meta: dict[str, Any] | None = None
    #: Why the job has to leave: STOPPED or TIMED_OUT; None when it need not. See :meth:`request_stop`.
    stop_reason: JobStatus | None = None
    log: deque[LogLine] | None = None

    def __init__(
        self, name: str, key: Hashable | None = None, owner: str | None = None, *, id: str | None = None
    ) -> None:
        self.id = id or new_id()
        self.name = name
        self.key = key
        self.owner = owner
        self.queued_at = time.time()

    def start(self) -> None:
        """Go from ``queued`` to ``running``."""
        self._check(JobStatus.RUNNING)
        self.started_at = time.time()
        self.status = JobStatus.RUNNING  # last: a thread that sees the status finds the rest

    def end(self, status: JobStatus, error: BaseException | None = None) -> None:
        """Go to a final status, with the error that led there."""
        self._check(status)
        self.error = None if error is None else describe_error(error)
        self.ended_at = time.time()
        self.status = status

    def request_stop(self, reason: JobStatus) -> None:
        """Note why the job has to leave: STOPPED or TIMED_OUT. A person's stop stays a stop when the time is up too."""
        if self.stop_reason is not JobStatus.STOPPED:
            self.stop_reason = reason

    def requeue(self) -> None:
        """Go from ``running`` back to ``queued``, as if it had not started."""
        self._check(JobStatus.QUEUED)
        self.started_at = None
        self.status = JobStatus.QUEUED

    def next_attempt(self, error: BaseException) -> None:
        """Go back to ``queued`` after an attempt that ended with ``error``."""
        self._check(JobStatus.QUEUED)
        self.error = describe_error(error)
        self.attempt += 1
        self.progress = self.message = self.stop_reason = None
        self.queued_at = time.time()
        self.requeue()

    def add_log(self, line: LogLine) -> None:
        """Keep a line of the job's log; the oldest leave when there are too many."""
        log = self.log
        if log is None:
            log = self.log = deque(maxlen=LOG_LINES)
        log.append(line)

    def log_after(self, last: LogLine | None) -> list[LogLine]:
        """The lines of its log that came after ``last``; all that are kept, when that is not among them."""
        new: list[LogLine] = []
        for line in reversed(tuple(self.log or ())):
            if line is last:
                break
            new.append(line)
        new.reverse()
        return new

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
            attempt=self.attempt,
            progress=self.progress,
            message=self.message,
            meta=MappingProxyType(dict(self.meta or ())),
            stop_requested=self.stop_reason is not None,
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


after_fork_in_child(_ids.clear)  # two processes must not hand out the same stock
