"""Handles of jobs, and the collection that keeps them by key."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, LOGGER, PENDING, RUNNING
from functools import partial
from typing import Any, Generic, TypeVar

from flask_executor.exceptions import JobStopped, KeyExists, WorkerLost
from flask_executor.jobs.call import JobChannel
from flask_executor.jobs.model import Job, JobMessage, JobState, JobStatus, LogLine

__all__ = ["Future", "FutureCollection", "FutureProxy", "propagate_exceptions_callback"]

T = TypeVar("T")
F = TypeVar("F", bound=Future[Any])


def propagate_exceptions_callback(future: Future[Any]) -> None:
    """A done callback that raises the job's exception again; :mod:`concurrent.futures` then logs it."""
    error = future.exception()
    if error is not None:
        raise error


def checked_grace(grace: float | None) -> None:
    """Refuse a grace that cannot be used.

    :raises ValueError: saying what can.
    """
    if grace is not None and not grace >= 0:
        raise ValueError(f"grace is {grace!r}; it must be a number of seconds, 0 or more")


class FutureProxy(Future[T]):
    """The handle of one job: a :class:`concurrent.futures.Future` that knows its job.

    It works wherever a future does: ``wait``, ``as_completed``, as a key of a dict. In an async view it can be
    awaited. Only executors make them.
    """

    _done_callbacks: list[Callable[[Future[T]], object]]  # the standard library's

    # Invariants: the job leaves ``queued`` only under ``_condition``, by set_running_or_notify_cancel() or by cancel(),
    # so that exactly one of them wins; the winner alone settles the future. A stop request and a requeue also happen
    # only under ``_condition``.

    def __init__(self, job: JobState, channel: JobChannel) -> None:
        super().__init__()
        self._job = job
        self._channel = channel
        self._retrievers = 0
        self._unretrieved: _UnretrievedError | None = None

    @property
    def job_id(self) -> str:
        """The id of the job: 24 hexadecimal digits."""
        return self._job.id

    @property
    def key(self) -> Hashable | None:
        """The key that the job was submitted under, None without one."""
        return self._job.key

    @property
    def name(self) -> str:
        """What the job is called: by default as its function."""
        return self._job.name

    @property
    def status(self) -> JobStatus:
        """Where the job stands."""
        return self._job.status

    @property
    def progress(self) -> float | None:
        """How much is done, from 0.0 to 1.0; None while it is not known."""
        return self._job.progress

    @property
    def message(self) -> str | None:
        """What the job says it is doing, None if nothing."""
        return self._job.message

    @property
    def meta(self) -> dict[str, Any]:
        """What else the job has reported, by name."""
        return dict(self._job.meta or ())

    @property
    def stop_requested(self) -> bool:
        """Whether the job was asked to stop; it goes on until its next checkpoint."""
        return self._job.stop_reason is not None

    def log(self) -> Sequence[LogLine]:
        """The last lines that the job has written to the log, oldest first."""
        return tuple(self._job.log or ())

    def stop(self, grace: float | None = None) -> bool:
        """Stop the job, and return without waiting for it: a queued one is cancelled, a running one asked to stop.

        A job leaves at its next :func:`~flask_executor.checkpoint`, and its :meth:`result` is then a
        :exc:`~flask_executor.JobStopped`. If it has not left after ``grace`` seconds force is used: a worker process is
        killed; in a thread an exception is raised as soon as it runs Python code, which it does not inside a call of
        the system or of a library in C.

        :param grace: seconds before force is used; None for ``EXECUTOR_STOP_GRACE``.
        :return: False when the job had ended already.
        :raises ValueError: for a negative number.
        """
        checked_grace(grace)
        return self._channel.stop(self, grace)

    def send(self, type: str, body: object = None) -> bool:
        """Send a message to the job, which gets it with :meth:`current_job.receive()
        <flask_executor.jobs.RunningJob.receive>`; also before it has started.

        :param type: any name.
        :param body: anything; where jobs run in other processes, what can be pickled.
        :return: False when the job has ended. One that is ending may not receive it.
        :raises NotPicklable: for a body that cannot be sent to another process.
        :raises QueueFull: when another process has the job, and 1000 messages wait for that process in the store.
        :raises StoreUnavailable: when another process has the job; whether it gets the message is not known then.
        """
        return self._channel.deliver(self, JobMessage(type, body))

    def cancel(self) -> bool:
        """Cancel the job if it has not started.

        :return: True when it will not run; False when it runs or has ended.
        """
        if self._state == PENDING and not self._channel.withdraw(self):
            return False
        with self._condition:
            if self._state != PENDING:
                return self.cancelled()
            self._job.end(JobStatus.CANCELLED)
            # Waiters are told here and now: the standard library leaves that to the worker that finds the
            # cancelled call, and wait() hangs when the pool was shut down and none ever does.
            self._state = CANCELLED_AND_NOTIFIED
            for waiter in self._waiters:
                waiter.add_cancelled(self)
            self._condition.notify_all()
        self._channel.ended(self._job, None, None)
        self._invoke_callbacks()
        return True

    def set_running_or_notify_cancel(self) -> bool:
        """For backends: claim the job for a worker; False when it was cancelled."""
        with self._condition:
            if self._state != PENDING:
                return False
            self._job.start()
            self._state = RUNNING
            return True

    def requeue(self, error: BaseException | None = None) -> bool:
        """For backends: undo the claim, unless the job was asked to stop.

        :param error: how the attempt has ended; None when the job had not begun.
        :return: whether it is queued again. After an attempt also a job that was out of time is.
        """
        with self._condition:
            reason = self._job.stop_reason
            if reason is JobStatus.STOPPED or (reason is not None and error is None):
                return False
            if error is None:
                self._job.requeue()
            else:
                self._job.next_attempt(error)
            self._state = PENDING
            return True

    def request_stop(self, reason: JobStatus, attempt: int) -> bool:
        """For backends: note that this attempt has to stop; False when it does not run any more.

        :param reason: STOPPED or TIMED_OUT.
        """
        with self._condition:
            job = self._job
            if job.status is not JobStatus.RUNNING or job.attempt != attempt:
                return False
            job.request_stop(reason)
            return True

    def set_exception(self, exception: BaseException | None) -> None:
        """For backends: settle the future with an error."""
        if exception is not None and not isinstance(exception, JobStopped):
            unretrieved = self._unretrieved = _UnretrievedError(self._job, self._channel, exception)
            if self._job.key is not None and not self._waiters and not self._retrievers:
                # executor.futures holds this handle, perhaps for hours: report now, not when it is dropped.
                unretrieved.report()
        super().set_exception(exception)

    def result(self, timeout: float | None = None) -> T:
        """What the job returned; waits for it.

        :param timeout: most seconds to wait; None for as long as it takes.
        :raises concurrent.futures.TimeoutError: when the job has not ended by then.
        :raises concurrent.futures.CancelledError: when it was cancelled.
        """
        self._retrieve(1)
        try:
            return super().result(timeout)
        finally:
            self._retrieve(-1)
            self = None  # type: ignore[assignment]  # the error's traceback refers to this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception that the job raised, None if it succeeded; waits for it.

        :param timeout: most seconds to wait; None for as long as it takes.
        :raises concurrent.futures.TimeoutError: when the job has not ended by then.
        :raises concurrent.futures.CancelledError: when it was cancelled.
        """
        self._retrieve(1)
        try:
            return super().exception(timeout)
        finally:
            self._retrieve(-1)

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call ``fn`` with this future when the job has ended, in a copy of the contexts that are active now.

        It is called in a thread of this process, at once if the job has ended already. An exception that it
        raises is logged by :mod:`concurrent.futures`.

        :raises TypeError: if ``fn`` cannot be called.
        """
        if not callable(fn):
            raise TypeError(f"add_done_callback() takes a function, not {fn!r}")
        super().add_done_callback(self._channel.in_contexts(fn))

    def __await__(self) -> Generator[Any, None, T]:
        """Wait in an async function. Giving up waiting does not stop the job."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        def done(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody awaits any more
                loop.call_soon_threadsafe(wake)

        super().add_done_callback(done)
        yield from ended
        return self.result()

    def record(self) -> Job:
        """The record of the job as it stands now."""
        return self._job.record()

    def abandon(self) -> JobState:
        """In the child of a fork: end with :class:`WorkerLost`, as the job goes on in the parent only."""
        # A thread of the parent may hold the lock; the callbacks run in the parent.
        self._condition = threading.Condition()
        self._done_callbacks.clear()
        self._waiters.clear()
        if self._state in (PENDING, RUNNING):
            error = WorkerLost(
                f"Job {self._job.name} was submitted before this process was forked; only its parent has it."
            )
            self._retrievers = 1  # the parent will report, not this process
            if not self._job.status.ended:  # it may have, when the future was about to be settled
                self._job.end(JobStatus.LOST, error)
            self.set_exception(error)
            self._retrieve(-1)
        return self._job

    def _invoke_callbacks(self) -> None:
        # Without the callbacks, which refer to contexts and so to the app and a request: the future may live for long.
        callbacks, self._done_callbacks = self._done_callbacks, []
        self._channel.settled(self, partial(self._call_back, callbacks) if callbacks else None)

    def _call_back(self, callbacks: list[Callable[[Future[T]], object]]) -> None:
        for callback in callbacks:
            try:
                callback(self)
            except BaseException:  # also SystemExit, which the standard library lets end a worker for good
                LOGGER.exception("exception calling callback for %r", self)

    @contextlib.contextmanager
    def retrieving(self) -> Iterator[None]:
        """Within this context the caller retrieves the error, if there is one: it need not be reported."""
        self._retrieve(1)
        try:
            yield
        finally:
            self._retrieve(-1)

    def report(self) -> None:
        """Log the job's error, if it has one that was not retrieved yet."""
        if self._unretrieved is not None:
            self._unretrieved.report()

    def _retrieve(self, change: int) -> None:
        with self._condition:
            self._retrievers += change
            if change < 0 and self._unretrieved is not None:
                self._unretrieved.is_retrieved = True


class _UnretrievedError:
    """An error that is reported when it is dropped, unless it was retrieved with ``result()`` or ``exception()``."""

    def __init__(self, job: JobState, channel: JobChannel, error: BaseException) -> None:
        self._job = job
        self._channel = channel
        self._error = error
        self.is_retrieved = False

    def report(self) -> None:
        if not self.is_retrieved:
            self.is_retrieved = True
            self._channel.unretrieved(self._job, self._error)

    def __del__(self) -> None:
        self.report()


def has_ended(future: Future[Any], before: float) -> bool:
    """Whether this is a handle (and no plain future that was added by hand) of a job that ended before this time."""
    if not Future.done(future):  # the state of the handle: asking for the job could mean asking a store
        return False
    record = getattr(future, "record", None)
    ended_at = None if record is None else record().ended_at
    return ended_at is not None and ended_at <= before


def _is_within(key: Hashable, within: tuple[Hashable, ...]) -> bool:
    return isinstance(key, tuple) and len(key) > len(within) and key[: len(within)] == within


class FutureCollection(Generic[F]):
    """Futures by key; ``executor.futures``.

    Every attribute and method of a future can be used with the key in front: ``futures.done("report")``,
    ``futures.result("report", timeout=5)``, ``futures.status("report")``. With a key that is not there the answer is
    None; an attribute that futures do not have raises :exc:`AttributeError`.

    :param max_length: most futures to hold, None for no bound. When it is exceeded finished ones are removed first,
        oldest first. An unfinished one that was removed can still be found by its key until it ends.
    :param max_pinned: most futures to hold that are pinned, and so do not count for ``max_length``; None for no bound.
    """

    # Who owns what: everything is changed under _lock. _held counts the keys of each future in _futures and _pinned.

    def __init__(self, max_length: int | None = 50, max_pinned: int | None = None) -> None:
        self.max_length = max_length
        self._max_pinned = max_pinned
        self._lock = threading.RLock()  # reentrant: the finalizer of a future may run in the middle, and look here
        self._futures: dict[Hashable, F] = {}
        self._pinned: dict[Hashable, F] = {}
        self._held: Counter[F] = Counter()
        self._evicted_unfinished: weakref.WeakValueDictionary[Hashable, F] = weakref.WeakValueDictionary()

    def add(self, future_key: Hashable, future: F) -> None:
        """Hold ``future`` under ``future_key``.

        :raises KeyExists: if the key is taken (a :exc:`ValueError`).
        """
        with self._lock:
            if self._get(future_key) is not None:
                raise KeyExists(future_key)
            self._put(future_key, future)

    def setdefault(self, future_key: Hashable, future: F, *, pinned: bool = False) -> F:
        """The future under this key; ``future``, now held, if there was none.

        :param pinned: if true, :meth:`pin` the one that is returned.
        """
        with self._lock:
            existing = self._get(future_key)
            if existing is None:
                self._put(future_key, future, pinned=pinned)
                return future
            if pinned:
                self.pin(future_key)
            return existing

    def pin(self, future_key: Hashable) -> None:
        """Exempt the future under this key, if there is one, from ``max_length``: it is never removed to make room."""
        with self._lock:
            if future_key not in self._pinned:
                future = FutureCollection.pop(self, future_key)  # held here: a subclass may also free the key elsewhere
                if future is not None:
                    self._put(future_key, future, pinned=True)

    def expire(self, before: float) -> None:
        """Remove the handles of jobs that ended before this time, in seconds since the epoch."""
        with self._lock:
            for futures in self._futures, self._pinned:
                for key in [key for key, future in futures.items() if has_ended(future, before)]:
                    self._let_go(futures.pop(key))

    def get(self, future_key: Hashable) -> F | None:
        """The future under this key, None for an unknown key."""
        with self._lock:
            return self._get(future_key)

    def pop(self, future_key: Hashable) -> F | None:
        """Take a future out, and free its key; None for an unknown key."""
        with self._lock:
            future = self._futures.pop(future_key, None) or self._pinned.pop(future_key, None)
            if future is None:
                return self._evicted_unfinished.pop(future_key, None)
            self._let_go(future)
            return future

    def release(self, future_key: Hashable, job_id: str) -> bool:
        """Free the key if the job with this id has it, and tell whether it had."""
        with self._lock:
            if getattr(self._get(future_key), "job_id", None) != job_id:
                return False
            self.pop(future_key)
            return True

    def keys(self, within: tuple[Hashable, ...] = ()) -> list[Hashable]:
        """The keys of the futures held, oldest first.

        :param within: only those that are longer tuples which begin with this.
        """
        with self._lock:
            keys = [*self._futures, *self._pinned]
        return [key for key in keys if _is_within(key, within)] if within else keys

    def __contains__(self, item: object) -> bool:
        """Whether a future is held, or a key."""
        if isinstance(item, Future):
            return item in self._held
        return item in self._futures or item in self._pinned

    def __len__(self) -> int:
        return len(self._futures) + len(self._pinned)

    def __getattr__(self, attr: str) -> Callable[..., Any]:
        if attr.startswith("__"):  # copy, pickle and the like ask for optional methods
            raise AttributeError(attr)

        def of_the_future(future_key: Hashable, *args: Any, **kwargs: Any) -> Any:
            future = self.get(future_key)
            if future is None:
                return None
            value = getattr(future, attr)
            return value(*args, **kwargs) if callable(value) else value

        return of_the_future

    def after_fork(self) -> None:
        """In the child of a fork: replace the lock, which a thread of the parent may have held."""
        self._lock = threading.RLock()

    def _get(self, future_key: Hashable) -> F | None:
        future = self._futures.get(future_key)
        if future is None:
            future = self._pinned.get(future_key)
        if future is None:
            future = self._evicted_unfinished.get(future_key)
            if future is not None and future.done():
                del self._evicted_unfinished[future_key]
                return None
        return future

    def _put(self, future_key: Hashable, future: F, *, pinned: bool = False) -> None:
        # Future.done is the state of the handle: asking for the job could mean asking a store.
        self._held[future] += 1
        futures, most = (self._pinned, self._max_pinned) if pinned else (self._futures, self.max_length)
        futures[future_key] = future
        while most is not None and len(futures) > most:
            oldest = next(iter(futures))
            key = next((key for key, future in futures.items() if Future.done(future)), oldest)
            future = futures.pop(key)
            self._let_go(future)
            if not Future.done(future):
                self._evicted_unfinished[key] = future

    def _let_go(self, future: F) -> None:
        self._held[future] -= 1
        if not self._held[future]:
            del self._held[future]
