"""Handles of jobs that other processes have, and the collection that finds the jobs of all processes by key."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from flask_executor.abc import JobStore, StopRequest
from flask_executor.exceptions import (
    ExecutorError,
    JobStopped,
    JobTimeout,
    ResultExpired,
    WorkerLost,
)
from flask_executor.futures import FutureProxy, checked_grace
from flask_executor.jobs.call import JobChannel
from flask_executor.jobs.model import Job, JobMessage, JobStatus, LogLine
from flask_executor.stores.leases import HEARTBEAT_SECONDS
from flask_executor.tracking.watcher import Followed

T = TypeVar("T")

_GONE = 3 * HEARTBEAT_SECONDS  # seconds after which a process would have written again what the store has forgotten
_PATIENCE = 2.0  # seconds that another process has for cancelling a job


class Elsewhere(Protocol):
    """What a handle needs to know of a job that another process has."""

    store: JobStore

    @property
    def channel(self) -> JobChannel:
        """What handles report to."""

    def open(self, job: Job) -> tuple[Any, BaseException | None]:
        """The result of a job that has ended, or what it has raised."""

    def unfollow(self, future: Followed) -> None:
        """Nobody waits for this handle any more."""

    def follow(self, future: Followed) -> None:
        """Have the handle settled when its job has ended."""

    def cancel_queued(self, job: Job) -> bool:
        """Cancel a job that waits in the queue of an engine; False where no engine has it, or it has begun."""

    def send(self, job: Job, message: JobMessage) -> bool:
        """Send a message to a job by way of the store; False when it has ended."""

    def aside(self, fn: Callable[[], object]) -> None:
        """Run code of the user's where it holds up nobody."""


class StoredFuture(FutureProxy[T]):
    """The handle of a job that another process or an engine has: what it says is read from the store.

    It is used like any :class:`~flask_executor.FutureProxy`. What it reads may raise
    :exc:`~flask_executor.StoreUnavailable`, or :exc:`~flask_executor.ResultExpired` when the record has left the store.
    """

    # The state that the base has is that of this handle: it is settled once, by the follower or by whoever wants the
    # result of a job that has ended, in whichever thread is first.

    def __init__(self, record: Job, elsewhere: Elsewhere, *, is_written: bool = True) -> None:
        self._last_record = record
        self._is_written = is_written
        self._gone_since: float | None = None
        self._asked = False  # whether it was asked to stop with this handle; its process will note that too
        self._waiting = 0  # in result() and exception()
        #: Whether it is settled, and its callbacks have run.
        self.called_back = False
        super().__init__(None, elsewhere.channel)  # type: ignore[arg-type]  # see _job
        self._elsewhere = elsewhere
        self._waiters: list[Any] = _Waiters(partial(elsewhere.follow, self), self._stop_watching_if_unused)
        self._state = PENDING if record.status is JobStatus.QUEUED else RUNNING

    @property
    def _job(self) -> Any:
        """Its record, as it stands now; the base looks there for whatever is asked."""
        if not self._last_record.status.ended:
            job = self._elsewhere.store.get(self._last_record.id)
            if job is None:
                self._check_gone()
            else:
                self._last_record, self._gone_since, self._is_written = job, None, True
        return self._last_record

    @_job.setter
    def _job(self, job: object) -> None:
        """The base sets what it was given."""

    def _check_gone(self) -> None:
        """Its record is not there: it has expired, or is not written yet, or the store has forgotten it and its process
        writes it again."""
        now = time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
        is_late = self._is_written and now - self._gone_since > _GONE
        if is_late or self._elsewhere.store.expired(self._last_record.id):
            raise ResultExpired(self._last_record.id)

    @property
    def job_id(self) -> str:
        return self._last_record.id

    @property
    def key(self) -> Hashable | None:
        return self._last_record.key

    @property
    def name(self) -> str:
        return self._last_record.name

    @property
    def stop_requested(self) -> bool:
        return self._asked or bool(self._job.stop_requested)

    def log(self) -> Sequence[LogLine]:
        return tuple(self._elsewhere.store.log(self.job_id))

    def record(self) -> Job:
        job: Job = self._job
        return job

    def done(self) -> bool:
        return super().done() or self.status.ended

    def running(self) -> bool:
        return not super().done() and self.status is JobStatus.RUNNING

    def cancelled(self) -> bool:
        return super().cancelled() or (not super().done() and self.status is JobStatus.CANCELLED)

    def stop(self, grace: float | None = None) -> bool:
        checked_grace(grace)
        if self.done():
            return False
        if self._elsewhere.cancel_queued(self._last_record):
            return True
        self._elsewhere.store.ask_to_stop(StopRequest(id=self.job_id, grace=grace))
        self._asked = True
        if self.status is JobStatus.QUEUED:
            self._elsewhere.cancel_queued(self._last_record)  # its worker may just have given it back to the engine
        return True

    def send(self, type: str, body: object = None) -> bool:
        return not self.done() and self._elsewhere.send(self._last_record, JobMessage(type, body))

    def cancel(self) -> bool:
        """Cancel the job if it has not started; waits for the answer of its process, 2 seconds at most."""
        if self.status is JobStatus.QUEUED and not self._elsewhere.cancel_queued(self._last_record):
            self._elsewhere.store.ask_to_stop(StopRequest(id=self.job_id, only_queued=True))
            deadline = time.monotonic() + _PATIENCE
            while self.status is JobStatus.QUEUED and time.monotonic() < deadline:
                time.sleep(0.01)
                self._elsewhere.cancel_queued(self._last_record)  # its worker may just be giving it back to the engine
        return self.status is JobStatus.CANCELLED

    def result(self, timeout: float | None = None) -> T:
        with self._awaited():
            return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        with self._awaited():
            return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        with self._awaited():
            super().add_done_callback(fn)

    def __await__(self) -> Generator[Any, None, T]:
        with self._awaited():
            return (yield from super().__await__())

    def _start_watching(self) -> None:
        """Somebody waits for it from now on."""
        if not super().done() and not self.settle():
            self._elsewhere.follow(self)

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        """Somebody waits for it."""
        with self._condition:
            self._waiting += 1
        try:
            self._start_watching()
            yield
        finally:
            with self._condition:
                self._waiting -= 1
            self._stop_watching_if_unused()

    def _stop_watching_if_unused(self) -> None:
        """Somebody waits no more; perhaps nobody does."""
        with self._condition:  # whoever comes counts himself in under it, before he has it followed
            if not (self._waiting or self._waiters or self._done_callbacks):
                self._elsewhere.unfollow(self)

    def settle(self) -> bool:
        """Settle this handle if the job has ended, and tell whether it is settled."""
        result: Any = None
        error: BaseException | None
        try:
            status = self.status
            if not status.ended:
                return False
            if status is JobStatus.CANCELLED:
                self._settle_cancelled()
                return True
            result, error = self._elsewhere.open(self._last_record)
        except ResultExpired as expired:
            error = expired
        with suppress(InvalidStateError):  # another thread was faster
            if error is None:
                self.set_result(result)
            else:
                Future.set_exception(self, error)
        return True

    def after_fork(self) -> None:
        """In the child of a fork: those who wait are in the parent, and callbacks run there."""
        self._condition = threading.Condition()  # the lock may be held by a thread that is not here
        self._done_callbacks.clear()
        self._waiters.clear()
        self._waiting = 0

    @property
    def last_seen(self) -> Job:
        """Its record as it was read last."""
        return self._last_record

    def cancel_unaccepted(self) -> None:
        """The job was not accepted."""
        self._settle_cancelled()
        self._elsewhere.unfollow(self)

    def _settle_cancelled(self) -> None:
        with self._condition:
            if self._state in (CANCELLED_AND_NOTIFIED, FINISHED):
                return
            self._state = CANCELLED_AND_NOTIFIED
            for waiter in self._waiters:
                waiter.add_cancelled(self)
            self._condition.notify_all()
        self._invoke_callbacks()

    def _invoke_callbacks(self) -> None:
        callbacks, self._done_callbacks = self._done_callbacks, []
        if callbacks:
            self._elsewhere.aside(partial(self._call_back, callbacks))
        else:
            self.called_back = True

    def _call_back(self, callbacks: list[Callable[[Future[T]], object]]) -> None:
        super()._call_back(callbacks)
        self.called_back = True


class _Waiters(list[Any]):
    """Those who wait with :func:`concurrent.futures.wait`, which does not ask the future to expect anything."""

    def __init__(self, follow: Callable[[], None], give_up: Callable[[], None]) -> None:
        super().__init__()
        self._follow = follow
        self._give_up = give_up

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        self._follow()

    def remove(self, waiter: Any) -> None:
        super().remove(waiter)
        self._give_up()


def error_of(job: Job) -> ExecutorError:
    """Why a job has no result, of which nothing but the record is there."""
    what = (job.error or "").partition(": ")[2]
    if job.status is JobStatus.LOST:
        return WorkerLost(f"Job {job.name} is lost: {what or 'its process is gone'}.")
    if job.status is JobStatus.TIMED_OUT:
        return JobTimeout(what or f"Job {job.name} ran longer than its timeout.")
    if job.status is JobStatus.STOPPED or job.status is JobStatus.KILLED:
        verb = "stopped" if job.status is JobStatus.STOPPED else "killed"
        return JobStopped(f"Job {job.name} was {verb}, as it was asked to stop.")
    return ResultExpired(job.id) if job.error is None else ExecutorError(job.error)
