"""What a job can do about itself: report, sleep, leave when it was asked to.

.. code-block:: python

    from flask_executor import checkpoint, current_job, track

    def render(pages):
        for page in track(pages, message="rendering"):   # progress and checkpoint on every page
            current_job.update(page=page.title)
            draw(page)
            checkpoint()
"""

from __future__ import annotations

import contextvars
import ctypes
import logging
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

from flask_executor.exceptions import JobExit
from flask_executor.jobs.log_records import to_log_line
from flask_executor.jobs.model import RESERVED_PREFIX, JobMessage, JobState, JobStatus

T = TypeVar("T")

_TRACK_INTERVAL = 0.05  # seconds between two reports of track()

_running: contextvars.ContextVar[RunningJob] = contextvars.ContextVar("flask_executor_job")


class RunningJob:
    """The job as it sees itself; ``current_job``.

    :param job: its record in the making.
    :param report: called, in the job's thread, when there is something new in the record.
    :param is_remote: If true, this is a worker process, and the job's record is kept in another one.
    """

    # Who writes what: the job's own thread its progress, message and meta; the thread that stops it the record's
    # stop_reason, once. For _thread and _interrupted see interrupt().

    __slots__ = (
        "_arrived",
        "_inbox",
        "_interrupted",
        "_is_remote",
        "_job",
        "_report",
        "_thread",
        "_woken",
        "report_pending",
    )

    def __init__(
        self, job: JobState, report: Callable[[RunningJob], None] | None = None, *, is_remote: bool = False
    ) -> None:
        self._job = job
        self._report = report
        self._is_remote = is_remote
        #: If true, the reader of reports was told that there is something new, and has not read it; it sets this back.
        self.report_pending = False
        self._woken: threading.Event | None = None
        self._arrived: threading.Event | None = None  # set for a message, and for a request to stop
        self._inbox: deque[JobMessage] | None = None
        self._thread: int | None = None
        self._interrupted = False

    @property
    def id(self) -> str:
        """The id of the job: 24 hexadecimal digits."""
        return self._job.id

    @property
    def key(self) -> Hashable | None:
        """The key it was submitted under, None without one."""
        return self._job.key

    @property
    def name(self) -> str:
        """Its name."""
        return self._job.name

    @property
    def owner(self) -> str | None:
        """Whose job it is, None if nobody's."""
        return self._job.owner

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self._job.attempt

    @property
    def stop_requested(self) -> bool:
        """If true, the job is to leave: it was asked to stop, or is out of time."""
        return self._job.stop_reason is not None

    def update(self, progress: float | None = None, message: str | None = None, **meta: object) -> None:
        """Report how far the job is. Cheap enough for every step: some times a second the latest is sent on.

        .. code-block:: python

            current_job.update(progress=0.4, message="page 4 of 10", pages=4)

        :param progress: how much is done, from 0 to 1; None leaves it as it is.
        :param message: what the job is doing; None leaves it as it is.
        :param meta: anything else, kept by name.
        :raises ValueError: for a progress that is not from 0 to 1, and names that begin with ``flask_executor.``.
        """
        job = self._job
        if progress is not None:
            if not 0 <= progress <= 1:
                raise ValueError(f"progress is {progress!r}; it must be a number from 0 to 1: done / total")
            job.progress = float(progress)
        if message is not None:
            job.message = str(message)
        if meta:
            if any(name.startswith(RESERVED_PREFIX) for name in meta):
                raise ValueError(f"names that begin with {RESERVED_PREFIX!r} are the package's own: {', '.join(meta)}")
            if job.meta is None:
                job.meta = meta
            else:
                job.meta.update(meta)
        if self._report is not None and not self.report_pending:
            self._tell(self._report)

    def _tell(self, report: Callable[[RunningJob], None]) -> None:
        self.report_pending = True
        report(self)

    def checkpoint(self) -> None:
        """Leave the job if it was asked to stop or is out of time.

        :raises JobExit: if so; a :exc:`BaseException`.
        """
        reason = self._job.stop_reason
        if reason is not None:
            raise JobExit("the job is out of time" if reason is JobStatus.TIMED_OUT else "the job was asked to stop")

    def sleep(self, seconds: float) -> None:
        """Sleep, and leave the job at once when it is asked to stop or runs out of time.

        :raises JobExit: if so; a :exc:`BaseException`.
        """
        woken = self._woken
        if woken is None:
            woken = self._woken = threading.Event()
        self.checkpoint()  # the thread that wakes it has set the reason before
        woken.wait(seconds)
        self.checkpoint()

    def receive(self, timeout: float | None = None) -> JobMessage | None:
        """Wait for a message that somebody sends with :meth:`future.send() <flask_executor.FutureProxy.send>`.

        .. code-block:: python

            while (message := current_job.receive(timeout=60)) is not None:
                if message.type == "page":
                    draw(message.body)

        Leaves the job at once when it is asked to stop or runs out of time.

        :param timeout: most seconds to wait; None for as long as it takes.
        :return: the oldest message that was not received yet; None when there is none in time.
        :raises JobExit: if it has to leave; a :exc:`BaseException`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self.checkpoint()
            with _inbox_lock:
                inbox = self._inbox
                if inbox:
                    return inbox.popleft()
                if deadline is not None and time.monotonic() >= deadline:
                    return None
                arrived = self._arrived = threading.Event()
            self.checkpoint()  # the thread that wakes it has set the reason before
            arrived.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))

    # ---- for the worker that runs it ----

    def deliver(self, message: JobMessage) -> None:
        """Put a message where :meth:`receive` finds it."""
        with _inbox_lock:
            if self._inbox is None:
                self._inbox = deque()
            self._inbox.append(message)
            arrived = self._arrived
        if arrived is not None:
            arrived.set()

    @property
    def record(self) -> JobState:
        """Its record in the making."""
        return self._job

    def logged(self, record: logging.LogRecord) -> None:
        """The job has made a log record; called in the thread that made it."""
        if not self._is_remote:  # a worker process sends it to the process that has the job's record
            self._job.add_log(to_log_line(record))
            if self._report is not None and not self.report_pending:
                self._tell(self._report)

    def request_stop(self, reason: JobStatus) -> None:
        """Ask the job to leave, STOPPED or TIMED_OUT, and wake it; called in any thread."""
        self._job.request_stop(reason)
        self.wake()

    def wake(self) -> None:
        """End its sleep, so that it finds out whether it has to leave."""
        for event in (self._woken, self._arrived):
            if event is not None:
                event.set()

    def call(self, fn: Callable[..., T], *args: Any) -> T:
        """Call ``fn`` as the work of this job, which :meth:`interrupt` can then break off.

        In a :class:`contextvars.Context` that is used for nothing else: the job stays the current one there.
        """
        _running.set(self)
        self._thread = threading.get_ident()
        try:
            self.checkpoint()  # an interrupt() before there was a thread came after a request to stop
            return fn(*args)
        finally:
            # The exception of interrupt() may be raised here as well. It is raised once, so the caller that catches it
            # calls uninterruptible() again, undisturbed.
            self.uninterruptible()

    def run_nested(self, fn: Callable[..., T], *args: Any) -> T:
        """Call ``fn`` as a part of the work of this job, in a context of its own."""
        _running.set(self)
        return fn(*args)

    @property
    def interrupted(self) -> bool:
        """If true, :meth:`interrupt` was called."""
        return self._interrupted

    def interrupt(self) -> bool:
        """Raise :exc:`~flask_executor.JobExit` in the thread of the job, once, as soon as it runs Python code.

        :return: False when the job does not run, or was interrupted before.
        """
        # It must not be raised when the thread has gone on to something else. Here _interrupted is set before _thread
        # is read; in uninterruptible() _thread is cleared before _interrupted is read: one of them sees the other.
        with _interrupting:
            if self._interrupted:
                return False
            self._interrupted = True
            thread = self._thread
            if thread is None:
                return False
            exception = ctypes.py_object(JobExit)
            return bool(ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception))

    def uninterruptible(self) -> None:
        """In the thread of the job: from here on :meth:`interrupt` does nothing."""
        thread, self._thread = self._thread, None
        if self._interrupted and thread is not None:
            with _interrupting:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)  # if it was not raised yet


_interrupting = threading.Lock()
_inbox_lock = threading.Lock()  # guards the inboxes of all jobs, as few have one


class CurrentJob(RunningJob):
    """A proxy for the job in which the calling code runs, as :data:`flask.request` is for the request."""

    # Werkzeug's LocalProxy takes three times as long to look up an attribute, and update() is called often.
    __slots__ = ()

    def __init__(self) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        try:
            return getattr(_running.get(), name)
        except LookupError:
            if name.startswith("__"):
                return object.__getattribute__(self, name)  # doctest and inspect look at modules
            raise RuntimeError(
                "current_job is only there inside a job that an executor runs, and this code was called outside of "
                "one. In functions that are to work in both use track() and checkpoint(), which do nothing outside."
            ) from None


#: The job that this code runs in: a :class:`RunningJob`. Outside of a job using it raises a :exc:`RuntimeError`.
current_job = CurrentJob()


def running_job() -> RunningJob | None:
    """The job that this code runs in, None outside of one."""
    return _running.get(None)


def checkpoint() -> None:
    """Leave the job if it was asked to stop or is out of time. Does nothing outside of a job.

    :raises JobExit: if so; a :exc:`BaseException`, so that ``except Exception`` does not swallow it.
    """
    job = _running.get(None)
    if job is not None:
        job.checkpoint()


def track(iterable: Iterable[T], message: str | None = None, total: int | None = None) -> Iterator[T]:
    """Go through ``iterable``, with progress and a :func:`checkpoint` at every item; just iterates outside of a job.

    .. code-block:: python

        for page in track(pages, message="rendering"):
            draw(page)

    Progress is what share of the items is done; where their number is not known only the count is reported. Both
    are in ``meta`` too, as ``done`` and ``total``.

    :param message: what the job is doing, reported along.
    :param total: how many items there will be, where ``iterable`` does not know.
    :raises JobExit: from the iterator, when the job has to leave.
    """
    job = _running.get(None)
    if job is None:
        yield from iterable
        return
    if total is None:
        total = operator.length_hint(iterable, 0) or None
    live, clock = job._job, time.monotonic

    def report() -> None:
        share = None if total is None else min(1.0, done / total)
        job.update(share, message, done=done, total=total)

    done = 0
    report()
    due = clock() + _TRACK_INTERVAL
    for item in iterable:
        if live.stop_reason is not None:
            report()
            job.checkpoint()
        yield item
        done += 1  # noqa: SIM113  # report() reads it
        if clock() >= due:
            report()
            due = clock() + _TRACK_INTERVAL
    report()
