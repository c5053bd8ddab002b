"""A call of a function on its way from the caller of ``submit`` to the worker that runs it, and its outcome back."""

from __future__ import annotations

import abc
import enum
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from flask_executor.exceptions import JobExit, JobStopped, JobTimeout
from flask_executor.helpers import callable_name
from flask_executor.helpers.timer import TimerHandle, timer
from flask_executor.jobs.contexts import NO_CONTEXT, CapturedContext, call_sync
from flask_executor.jobs.current import RunningJob
from flask_executor.jobs.model import JobMessage, JobOptions, JobState, JobStatus

if TYPE_CHECKING:
    from flask_executor.futures import FutureProxy


NO_OPTIONS = JobOptions()
# Guards ``undelivered`` and ``_running`` of all calls; one lock is enough, because few calls receive messages.
_undelivered_lock = threading.Lock()


class CallState(enum.Enum):
    """Where a call is on its way; who may run or settle it follows from that."""

    __hash__ = object.__hash__  # Enum's own is written in Python, and takes longer than the rest of a step

    #: It has a place among the calls in flight, and its key if it is to have one.
    ACCEPTED = enum.auto()
    #: It waits for a transaction to be committed.
    DEFERRED = enum.auto()
    #: It waits in this process for its time, its next attempt, or an engine that is away.
    SCHEDULED = enum.auto()
    #: The backend has it.
    QUEUED = enum.auto()
    #: A worker has begun this attempt.
    RUNNING = enum.auto()
    #: Its future is settled, and its callbacks have run.
    SETTLED = enum.auto()


# A call that is cancelled settles from anywhere, perhaps while another thread is about to move it on: SETTLED is final,
# and moving on from there has no effect.
_TRANSITIONS = {
    CallState.ACCEPTED: {CallState.DEFERRED, CallState.SCHEDULED, CallState.QUEUED, CallState.RUNNING},
    CallState.DEFERRED: {CallState.SCHEDULED, CallState.QUEUED},
    CallState.SCHEDULED: {CallState.SCHEDULED, CallState.QUEUED},
    CallState.QUEUED: {CallState.RUNNING, CallState.SCHEDULED},
    CallState.RUNNING: {CallState.QUEUED, CallState.SCHEDULED},
}


class JobChannel(abc.ABC):
    """Connects a call and its handle with the executor. Any thread may call it.

    Of the methods that a call reports to, only :meth:`pack_result` may raise.
    """

    @abc.abstractmethod
    def started(self, job: JobState) -> None:
        """A worker has taken the job; called in the job's contexts."""

    @abc.abstractmethod
    def reporter(self, job: JobState) -> Callable[[RunningJob], None] | None:
        """Return what a job that runs here calls when it has something new to report; None for nothing."""

    @abc.abstractmethod
    def progressed(self, job: JobState) -> None:
        """A job that runs elsewhere has reported something new."""

    @abc.abstractmethod
    def pack_result(self, job: JobState, result: Any, packed: bytes | None) -> bytes | None:
        """Return what the store is to keep of the result, for :meth:`ended`; None when it is not stored.

        Changes nothing. If this raises, the job has failed with that error.

        :param packed: the result as it came from a worker process, pickled; None when it was made in this process.
        :raises NotPicklable: for a result that has to be stored and cannot.
        :raises ResultTooLarge: for one that is too large for that.
        """

    @abc.abstractmethod
    def ended(self, job: JobState, error: BaseException | None, outcome: bytes | None) -> None:
        """The job has its final status; its future is not settled yet.

        :param error: what it failed with; None when it succeeded, was stopped or was cancelled.
        :param outcome: its result as :meth:`pack_result` has packed it.
        """

    @abc.abstractmethod
    def settled(self, future: Future[Any], call_back: Callable[[], object] | None) -> None:
        """The future has its result; when its callbacks have run nothing more will come.

        :param call_back: runs the callbacks, to be called where they hold up nobody; None when there are none.
        """

    @abc.abstractmethod
    def retry(self, call: Call, error: BaseException, delay: float) -> None:
        """The call failed with ``error``, is queued again, and is to be run in ``delay`` seconds."""

    @abc.abstractmethod
    def out_of_time(self, call: Call, attempt: int) -> None:
        """The call has run for as long as it may, in this attempt."""

    @abc.abstractmethod
    def stop(self, future: Future[Any], grace: float | None) -> bool:
        """Stop the job of this future; False when it has ended."""

    @abc.abstractmethod
    def deliver(self, future: Future[Any], message: JobMessage) -> bool:
        """Send a message to the job of this future; False when it has ended."""

    @abc.abstractmethod
    def withdraw(self, future: Future[Any]) -> bool:
        """Give up the call of this future if it has not started; False when it has."""

    @abc.abstractmethod
    def unretrieved(self, job: JobState, error: BaseException) -> None:
        """The job failed and nobody has asked."""

    @abc.abstractmethod
    def in_contexts(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``fn`` made to run later in a copy of the contexts of the caller of this method."""


class CallControl(abc.ABC):
    """Controls the calls that it was given: a backend, or the way to a process that has one. Any thread may call it."""

    @abc.abstractmethod
    def enqueue(self, call: Call) -> None:
        """Accept a call, which is then run once or its future cancelled."""

    @abc.abstractmethod
    def withdraw(self, call: Call) -> bool:
        """Give up a call that has not started, so that it can be cancelled; False when it has started."""

    @abc.abstractmethod
    def request_stop(self, call: Call, attempt: int, reason: JobStatus) -> None:
        """Tell this attempt of a running call that it has to stop, as its job says: STOPPED or TIMED_OUT."""

    @abc.abstractmethod
    def kill(self, call: Call, attempt: int) -> None:
        """End this attempt of a running call by force, and nothing else."""

    @abc.abstractmethod
    def deliver(self, call: Call, message: JobMessage) -> None:
        """Send a message to the job of a call that has not ended."""


class Call:
    """A function, its arguments and contexts, the job it is the work of, and the handle to settle.

    A worker in this process calls :meth:`run`. A backend whose workers are elsewhere calls :meth:`begin`, and then
    :meth:`succeed`, :meth:`fail` or :meth:`stopped`. Only the one who got True from :meth:`begin` may settle the call.
    """

    __slots__ = (
        "_error",
        "_retry_delay",
        "_running",
        "_timers",
        "args",
        "backend",
        "channel",
        "context",
        "fn",
        "future",
        "job",
        "kwargs",
        "options",
        "packed",
        "state",
        "undelivered",
    )

    def __init__(
        self,
        future: FutureProxy[Any],
        job: JobState,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: CapturedContext,
        channel: JobChannel,
        options: JobOptions = NO_OPTIONS,
    ) -> None:
        self.future = future
        self.job = job
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.context = context
        self.channel = channel
        self.options = options
        self.state = CallState.ACCEPTED
        self.backend: CallControl | None = None
        #: What the backend has made of it and wants again for the next attempt.
        self.packed: Any = None
        #: Messages that came before the job ran. They belong to what runs it: this class, which guards them with
        #: _undelivered_lock; or a pool of processes, which keeps them pickled, guarded by its dispatcher's lock.
        #: After a change of the configuration the one may find messages as the other has kept them.
        self.undelivered: list[Any] | None = None
        self._running: RunningJob | None = None
        self._timers: list[TimerHandle] | None = None
        #: How an attempt ended, between its end and the settling: the error, and seconds until the next attempt.
        self._error: BaseException | None = None
        self._retry_delay: float | None = None

    @property
    def priority(self) -> int:
        """Higher ones are to start first."""
        return self.options.priority

    @property
    def delay(self) -> float:
        """Seconds before which it is not to start."""
        return self.options.delay

    @property
    def timeout(self) -> float | None:
        """Seconds that it may run."""
        return self.options.timeout

    @property
    def grace(self) -> float | None:
        """Seconds between a request to leave and force; None for the executor's."""
        return self.options.grace

    @property
    def retried(self) -> bool:
        """If true, it may be run again."""
        return self.options.retry is not None

    def enter(self, state: CallState) -> bool:
        """Move on to a state; False when the call is settled, which nothing changes.

        :raises RuntimeError: for a step that is not in the table.
        """
        present = self.state  # read once: another thread may settle the call now
        if present is CallState.SETTLED:
            return False
        if state is not CallState.SETTLED and state not in _TRANSITIONS[present]:
            raise RuntimeError(f"job {self.job.id} is {present.name} and cannot become {state.name}")
        self.state = state
        return True

    # ---- where it is run here ----

    def run(self, *_unused: object) -> None:
        """Run the call in this thread, unless it was cancelled."""
        # The standard pool passes a context of its worker, from Python 3.14.
        if not self.future.set_running_or_notify_cancel():
            return
        self.enter(CallState.RUNNING)
        if self.options.timeout is not None:
            self._watch()
        try:
            running = RunningJob(self.job, self.channel.reporter(self.job))
            with _undelivered_lock:  # what comes from now on it gets at once
                for message in self.undelivered or ():
                    # Pickled, if it came when a pool of processes was to run the call; the configuration has changed.
                    running.deliver(pickle.loads(message) if isinstance(message, bytes) else message)
                self.undelivered, self._running = None, running
            result = self.context.run(self._report_and_call)
        except BaseException as error:
            if self._error is None:  # it did not get as far as the function
                self._finish_attempt(error)
            self._settle()
            self = None  # type: ignore[assignment]  # the error's traceback refers to this frame
        else:
            self.future.set_result(result)

    def deliver(self, message: JobMessage) -> None:
        """Give a message to its job, now or when it starts."""
        with _undelivered_lock:
            if self._running is None:
                self.undelivered = [*(self.undelivered or ()), message]
            else:
                self._running.deliver(message)

    def wake(self) -> None:
        """It may have to leave: wake it from its sleep."""
        running = self._running
        if running is not None:
            running.wake()

    def interrupt(self, attempt: int) -> None:
        """Raise the exception that leaves the job in its thread, in this attempt."""
        running = self._running  # each attempt has its own, and to interrupt an old one does nothing
        if running is not None and self.job.attempt == attempt:
            running.interrupt()

    def _report_and_call(self) -> Any:
        self.channel.started(self.job)
        running: RunningJob = self._running  # type: ignore[assignment]
        try:
            result = running.call(call_sync, self.fn, self.args, self.kwargs)
            outcome = self.channel.pack_result(self.job, result, None)
        except BaseException as error:
            running.uninterruptible()
            self._finish_attempt(error, forced=running.interrupted)
            raise
        self._end(JobStatus.SUCCEEDED, None, outcome)
        return result

    # ---- where it is run elsewhere ----

    def begin(self) -> bool:
        """Claim the call for a worker elsewhere; False when it was cancelled meanwhile."""
        if not self.future.set_running_or_notify_cancel():
            return False
        self.enter(CallState.RUNNING)
        if self.options.timeout is not None:
            self._watch()
        self.channel.started(self.job)
        return True

    def progressed(self) -> None:
        """Its job has something new to report."""
        self.channel.progressed(self.job)

    def requeue(self) -> bool:
        """The worker that it was claimed for never began: it is queued again, unless it was asked to leave."""
        if not self.future.requeue():
            return False
        self.enter(CallState.QUEUED)
        self._cancel_timers()
        return True

    def succeed(self, result: Any, packed: bytes | None = None) -> None:
        """Settle the call with its result, which came packed like this from a worker process."""
        try:
            outcome = self.channel.pack_result(self.job, result, packed)
        except Exception as error:  # it cannot be kept
            self.fail(error)
            return
        self._end(JobStatus.SUCCEEDED, None, outcome)
        self.future.set_result(result)

    def fail(self, error: BaseException, status: JobStatus = JobStatus.FAILED) -> None:
        """Settle the call with an error, or have it run again after a while."""
        self._finish_attempt(error, status)
        self._settle()

    def stopped(self, *, forced: bool = False) -> None:
        """Settle the call as one that has left as it was asked to, or was forced to."""
        self._finish_attempt(JobExit(), forced=forced)
        self._settle()

    # ---- both ----

    def fail_finally(self, error: BaseException) -> None:
        """There was to be another attempt, and there is none: settle the call with the error of the last one."""
        if self.future.set_running_or_notify_cancel():
            self._end(JobStatus.FAILED, error)
            self._error, self._retry_delay = error, None
            self._settle()

    def _finish_attempt(
        self, error: BaseException, status: JobStatus = JobStatus.FAILED, *, forced: bool = False
    ) -> None:
        """An attempt has ended with ``error``: decide what that makes of the job."""
        if isinstance(error, JobExit):
            status, error = self._stop_outcome(error, forced=forced)
        self._error, self._retry_delay = error, None
        if self.options.retry is not None and not isinstance(error, JobStopped):
            self._retry_delay = self.options.retry.delay(self.job.attempt, error)
        if self._retry_delay is not None:
            with _undelivered_lock:  # what comes from now on is for the next attempt
                self._running = None
        # A stop request prevents the retry. A request that arrives from here on finds the job queued and cancels it.
        if self._retry_delay is not None and self.future.requeue(error):
            self._cancel_timers()
        else:
            self._retry_delay = None
            self._end(status, None if isinstance(error, JobStopped) else error)

    def _stop_outcome(self, exit: JobExit, *, forced: bool) -> tuple[JobStatus, Exception]:
        name = self.job.name
        if self.job.stop_reason is JobStatus.TIMED_OUT:
            timeout = JobTimeout(f"Job {name} ran longer than its timeout of {self.options.timeout:g} s.")
            timeout.__cause__ = exit
            return JobStatus.TIMED_OUT, timeout
        stopped = JobStopped(f"Job {name} was {'killed' if forced else 'stopped'}, as it was asked to stop.")
        stopped.__cause__ = exit
        return (JobStatus.KILLED if forced else JobStatus.STOPPED), stopped

    def _settle(self) -> None:
        error: Any = self._error
        self._error = None
        if self._retry_delay is not None:
            self.channel.retry(self, error, self._retry_delay)
            return
        future = self.future
        del self.future  # the error's traceback refers to this call, and the future will refer to the error
        future.set_exception(error)

    def _end(self, status: JobStatus, error: BaseException | None = None, outcome: bytes | None = None) -> None:
        self.job.end(status, error)
        if self._timers is not None:
            self._cancel_timers()
        self.channel.ended(self.job, error, outcome)

    def _watch(self) -> None:
        attempt = self.job.attempt
        self.call_later(self.options.timeout or 0.0, lambda: self.channel.out_of_time(self, attempt))

    def call_later(self, seconds: float, fn: Callable[[], object]) -> None:
        """Call ``fn`` in ``seconds`` seconds, unless the attempt has ended by then."""
        attempt = self.job.attempt
        handle = timer.call_later(seconds, fn)
        timers = self._timers
        if timers is None:
            timers = self._timers = []
        timers.append(handle)
        # The attempt may have ended in between: it changes its status first, and then calls off what it finds here.
        if self.job.status is not JobStatus.RUNNING or self.job.attempt != attempt:
            handle.cancel()

    def _cancel_timers(self) -> None:
        timers, self._timers = self._timers, None
        for handle in timers or ():
            handle.cancel()


class PlainCall(Call):
    """A call without contexts, for a backend that is used as a plain executor: no channel, no deadline."""

    __slots__ = ("_claimed",)

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        future: Any = Future()
        nobody: Any = None
        contexts: Any = NO_CONTEXT
        super().__init__(future, JobState(callable_name(fn)), fn, args, kwargs, contexts, nobody)
        self._claimed: bool | None = None  # set_running_or_notify_cancel() may be asked once

    def run(self, *_unused: object) -> None:
        """Never called: backends that run calls in this process have a way of their own for plain ones."""
        raise NotImplementedError

    def deliver(self, message: JobMessage) -> None:
        """Nobody can send it any."""

    def wake(self) -> None:
        """Nobody can ask it to leave."""

    def interrupt(self, attempt: int) -> None:
        """Nobody can ask it to."""

    def call_later(self, seconds: float, fn: Callable[[], object]) -> None:
        """It has no deadline."""

    def begin(self) -> bool:
        """Claim it."""
        if self._claimed is None:
            self._claimed = self.future.set_running_or_notify_cancel()
        return self._claimed

    def progressed(self) -> None:
        """Nobody looks."""

    def requeue(self) -> bool:
        """It stays claimed, as a plain future cannot go back, and can be begun again."""
        return True

    def succeed(self, result: Any, packed: bytes | None = None) -> None:
        """Settle it."""
        self.future.set_result(result)

    def fail(self, error: BaseException, status: JobStatus = JobStatus.FAILED) -> None:
        """Settle it."""
        self.future.set_exception(error)

    def fail_finally(self, error: BaseException) -> None:
        """Settle it."""
        self.fail(error)

    def stopped(self, *, forced: bool = False) -> None:
        """Settle it."""
        self.fail(JobStopped(f"{self.job.name} has left."))
