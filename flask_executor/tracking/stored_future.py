"""The handle of a job that another process or an engine has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from flask_executor.abc import StopRequest
from flask_executor.exceptions import (
    ExecutorError,
    JobStopped,
    JobTimeout,
    ResultExpired,
    WorkerLost,
)
from flask_executor.futures import FutureProxy, checked_grace
from flask_executor.jobs.model import Job, JobMessage, JobStatus, LogLine
from flask_executor.stores.leases import HEARTBEAT_SECONDS

if TYPE_CHECKING:
    from flask_executor.tracking.shared import SharedJobTracker

T = TypeVar("T")

_REWRITE_TIMEOUT = 3 * HEARTBEAT_SECONDS  # seconds for its process to write a record again that the store has forgotten
_CANCEL_TIMEOUT = 2.0  # seconds that another process has for cancelling a job
_CANCEL_POLL_INTERVAL = 0.01  # seconds between two looks whether it has


class StoredFuture(FutureProxy[T]):
    """The handle of a job that another process or an engine has: what it says is read from the store.

    It is used like any :class:`~flask_executor.FutureProxy`. What it reads may raise
    :exc:`~flask_executor.StoreUnavailable`, or :exc:`~flask_executor.ResultExpired` when the record has left the store.
    """

    # _state is that of this handle, not of the job. It is settled once: by the watcher's thread, or by a thread that
    # asks for the result of a job that has ended, whichever is first.

    def __init__(self, record: Job, tracker: SharedJobTracker, *, is_written: bool = True) -> None:
        self._last_record = record
        self._is_written = is_written
        self._gone_since: float | None = None
        self._asked = False  # whether this handle has asked the job to stop; its process will note that too
        self._waiting = 0  # threads and tasks in _awaited()
        self._called_back = False  # whether it is settled, and its callbacks have run
        super().__init__(None, tracker.channel)  # type: ignore[arg-type]  # see _job
        self._tracker = tracker
        self._waiters: list[Any] = _Waiters(partial(tracker.watch, self), self._stop_watching_if_unused)
        self._state = PENDING if record.status is JobStatus.QUEUED else RUNNING

    @property
    def _job(self) -> Any:
        """The record as it stands now; the base class reads all properties from it."""
        if not self._last_record.status.ended:
            job = self._tracker.store.get(self._last_record.id)
            if job is None:
                self._check_gone()
            else:
                self._last_record, self._gone_since, self._is_written = job, None, True
        return self._last_record

    @_job.setter
    def _job(self, job: object) -> None:
        """The base class sets what it was given."""

    def _check_gone(self) -> None:
        """The store has no record: it has expired, is not written yet, or was forgotten and will be written again.

        :raises ResultExpired: in the first case.
        """
        now = time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
        is_late = self._is_written and now - self._gone_since > _REWRITE_TIMEOUT
        if is_late or self._tracker.store.expired(self._last_record.id):
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
        return tuple(self._tracker.store.log(self.job_id))

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
        if self._tracker.cancel_queued(self._last_record):
            return True
        self._tracker.store.ask_to_stop(StopRequest(id=self.job_id, grace=grace))
        self._asked = True
        if self.status is JobStatus.QUEUED:
            self._tracker.cancel_queued(self._last_record)  # its worker may just have returned it to the engine
        return True

    def send(self, type: str, body: object = None) -> bool:
        return not self.done() and self._tracker.send(self._last_record, JobMessage(type, body))

    def cancel(self) -> bool:
        """Cancel the job if it has not started. Waits for its process to do that, 2 seconds at most."""
        if self.status is JobStatus.QUEUED and not self._tracker.cancel_queued(self._last_record):
            self._tracker.store.ask_to_stop(StopRequest(id=self.job_id, only_queued=True))
            deadline = time.monotonic() + _CANCEL_TIMEOUT
            while self.status is JobStatus.QUEUED and time.monotonic() < deadline:
                time.sleep(_CANCEL_POLL_INTERVAL)
                self._tracker.cancel_queued(self._last_record)  # its worker may just be returning it to the engine
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
        """Have the watcher settle this handle, unless it can be settled now. Called by whatever starts to wait."""
        if not super().done() and not self.settle():
            self._tracker.watch(self)

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        """Within this context something waits for the handle."""
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
        with self._condition:  # what starts to wait counts itself under it, before _start_watching()
            if not (self._waiting or self._waiters or self._done_callbacks):
                self._tracker.unwatch(self)

    def settle(self) -> bool:
        """Settle this handle if the job has ended, and tell whether it is settled.

        :raises StoreUnavailable: when that is not known.
        """
        result: Any = None
        error: BaseException | None
        try:
            status = self.status
            if not status.ended:
                return False
            if status is JobStatus.CANCELLED:
                self._settle_cancelled()
                return True
            result, error = self._tracker.open(self._last_record)
        except ResultExpired as expired:
            error = expired
        with suppress(InvalidStateError):  # another thread was faster
            if error is None:
                self.set_result(result)
            else:
                Future.set_exception(self, error)
        return True

    def after_fork(self) -> None:
        """In the child of a fork: the threads that wait are the parent's, and callbacks run there."""
        self._condition = threading.Condition()  # a thread of the parent may hold the lock
        self._done_callbacks.clear()
        self._waiters.clear()
        self._waiting = 0

    @property
    def last_seen(self) -> Job:
        """Its record as it was read last."""
        return self._last_record

    def cancel_unaccepted(self) -> None:
        """Settle the handle of a job that was not accepted."""
        self._settle_cancelled()
        self._tracker.unwatch(self)

    def wait_for_callbacks(self, timeout: float | None) -> bool:
        """Wait until the handle is settled and its callbacks have run; False after ``timeout`` seconds."""
        with self._condition:
            return self._condition.wait_for(lambda: self._called_back, timeout)

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
            self._tracker.run_callbacks(partial(self._call_back, callbacks))
        else:
            self._note_called_back()

    def _call_back(self, callbacks: list[Callable[[Future[T]], object]]) -> None:
        super()._call_back(callbacks)
        self._note_called_back()

    def _note_called_back(self) -> None:
        with self._condition:
            self._called_back = True
            self._condition.notify_all()


class _Waiters(list[Any]):
    """The waiters that :func:`concurrent.futures.wait` puts into a future, without calling any of its methods."""

    def __init__(self, on_append: Callable[[], None], on_remove: Callable[[], None]) -> None:
        super().__init__()
        self._on_append = on_append
        self._on_remove = on_remove

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        self._on_append()

    def remove(self, waiter: Any) -> None:
        super().remove(waiter)
        self._on_remove()


def error_of(job: Job) -> ExecutorError:
    """Why a job has no result, when the store has its record and no outcome."""
    what = (job.error or "").partition(": ")[2]
    if job.status is JobStatus.LOST:
        return WorkerLost(f"Job {job.name} is lost: {what or 'its process is gone'}.")
    if job.status is JobStatus.TIMED_OUT:
        return JobTimeout(what or f"Job {job.name} ran longer than its timeout.")
    if job.status is JobStatus.STOPPED or job.status is JobStatus.KILLED:
        verb = "stopped" if job.status is JobStatus.STOPPED else "killed"
        return JobStopped(f"Job {job.name} was {verb}, as it was asked to stop.")
    return ResultExpired(job.id) if job.error is None else ExecutorError(job.error)
