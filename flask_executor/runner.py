"""Run one call: what every backend ships to its workers."""

from __future__ import annotations

import contextvars
import copyreg
import functools
import io
import pickle
import threading
import traceback
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from flask_executor.context import NO_CONTEXT, CapturedContext, Snapshot, call_to_end, snapshot
from flask_executor.control import RunningJob, running_job
from flask_executor.exceptions import JobExit, JobStopped, JobTimeout, NotPicklable, RemoteTraceback
from flask_executor.helpers import callable_name, describe_error
from flask_executor.jobs import JobMessage, JobOptions, JobStatus, LiveJob
from flask_executor.lines import pickle_parts
from flask_executor.messages import Kind, Message
from flask_executor.timer import Appointment, timer

if TYPE_CHECKING:
    from flask import Flask

    from flask_executor.abc import Backend, JobChannel, PreparedCall

T = TypeVar("T")

NO_OPTIONS = JobOptions()
_posting = threading.Lock()  # guards the mail of all calls, as few get any


class Handle(Protocol):
    """What a call needs of its future, a :class:`concurrent.futures.Future` that can be queued again."""

    def set_running_or_notify_cancel(self) -> bool:
        """Claim it; False when it was cancelled."""

    def queue_again(self, error: BaseException | None = None) -> bool:
        """Undo the claim, unless the job was asked to leave; whether that is done."""

    def set_result(self, result: Any) -> None:
        """Settle it."""

    def set_exception(self, exception: BaseException) -> None:
        """Settle it."""


F = TypeVar("F", bound=Handle)


class Call(Generic[F]):
    """A function, its arguments and contexts, the job it is the work of, and the handle to settle.

    A worker in this process calls :meth:`run`. A backend whose workers are elsewhere calls :meth:`begin`, and then
    :meth:`succeed`, :meth:`fail` or :meth:`left`. Only the one who got True from :meth:`begin` may settle the call.
    """

    __slots__ = (
        "_again",
        "_appointments",
        "_error",
        "_mail",
        "_running",
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
    )

    def __init__(
        self,
        future: F,
        job: LiveJob,
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
        self.backend: Backend | None = None
        #: What the backend has made of it and wants again for the next attempt.
        self.packed: Any = None
        self._running: RunningJob | None = None
        self._mail: list[JobMessage] | None = None  # that came before it ran
        self._appointments: list[Appointment] | None = None
        #: How an attempt ended, between its end and the settling: the error, and seconds until the next attempt.
        self._error: BaseException | None = None
        self._again: float | None = None

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
        """Whether it may be run again."""
        return self.options.retry is not None

    # ---- where it is run here ----

    def run(self, *_unused: object) -> None:
        """Run the call in this thread, unless it was cancelled."""
        # The standard pool passes a context of its worker, from Python 3.14.
        if not self.future.set_running_or_notify_cancel():
            return
        if self.options.timeout is not None:
            self._watch()
        running = RunningJob(self.job, self.channel.reporter(self.job))
        with _posting:  # what comes from now on it gets at once
            for message in self._mail or ():
                running.post(message)
            self._mail, self._running = None, running
        try:
            result = self.context.run(self._report_and_call)
        except BaseException as error:
            if self._error is None:  # it did not get as far as the function
                self._conclude(error)
            self._settle_failure()
            self = None  # type: ignore[assignment]  # the error's traceback refers to this frame
        else:
            self.future.set_result(result)

    def post(self, message: JobMessage) -> None:
        """Give a message to its job, now or when it starts."""
        with _posting:
            if self._running is None:
                self._mail = [*(self._mail or ()), message]
            else:
                self._running.post(message)

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
            result = running.call(call_to_end, self.fn, self.args, self.kwargs)
            self.channel.returned(self.job, result, None)
        except BaseException as error:
            running.uninterruptible()
            self._conclude(error, forced=running.interrupted)
            raise
        self._end(JobStatus.SUCCEEDED)
        return result

    # ---- where it is run elsewhere ----

    def begin(self) -> bool:
        """Claim the call for a worker elsewhere; False when it was cancelled meanwhile."""
        if not self.future.set_running_or_notify_cancel():
            return False
        if self.options.timeout is not None:
            self._watch()
        self.channel.started(self.job)
        return True

    def progressed(self) -> None:
        """Its job has something new to report."""
        self.channel.progressed(self.job)

    def put_back(self) -> bool:
        """The worker that it was claimed for never began: it is queued again, unless it was asked to leave."""
        if not self.future.queue_again():
            return False
        self._call_off()
        return True

    def succeed(self, result: Any, packed: bytes | None = None) -> None:
        """Settle the call with its result, which came packed like this from a worker process."""
        try:
            self.channel.returned(self.job, result, packed)
        except Exception as error:  # it cannot be kept
            self.fail(error)
            return
        self._end(JobStatus.SUCCEEDED)
        self.future.set_result(result)

    def fail(self, error: BaseException, status: JobStatus = JobStatus.FAILED) -> None:
        """Settle the call with an error, or have it run again after a while."""
        self._conclude(error, status)
        self._settle_failure()

    def left(self, *, forced: bool = False) -> None:
        """Settle the call as one that has left as it was asked to, or was forced to."""
        self._conclude(JobExit(), forced=forced)
        self._settle_failure()

    # ---- both ----

    def give_up(self, error: BaseException) -> None:
        """There was to be another attempt, and there is none: settle the call with the error of the last one."""
        if self.future.set_running_or_notify_cancel():
            self._end(JobStatus.FAILED, error)
            self._error, self._again = error, None
            self._settle_failure()

    def _conclude(self, error: BaseException, status: JobStatus = JobStatus.FAILED, *, forced: bool = False) -> None:
        """An attempt has ended with ``error``: decide what that makes of the job."""
        if isinstance(error, JobExit):
            status, error = self._departure(error, forced=forced)
        self._error, self._again = error, None
        if self.options.retry is not None and not isinstance(error, JobStopped):
            self._again = self.options.retry.delay(self.job.attempt, error)
        # Who asks for a job to be stopped does not want to see it again; who asks now finds it queued.
        if self._again is not None:
            with _posting:  # what comes from now on is for the next attempt
                self._running = None
        if self._again is not None and self.future.queue_again(error):
            self._call_off()
        else:
            self._again = None
            self._end(status, None if isinstance(error, JobStopped) else error)

    def _departure(self, exit: JobExit, *, forced: bool) -> tuple[JobStatus, Exception]:
        name = self.job.name
        if self.job.leave is JobStatus.TIMED_OUT:
            timeout = JobTimeout(f"Job {name} ran longer than its timeout of {self.options.timeout:g} s.")
            timeout.__cause__ = exit
            return JobStatus.TIMED_OUT, timeout
        stopped = JobStopped(f"Job {name} was {'killed' if forced else 'stopped'}, as it was asked to stop.")
        stopped.__cause__ = exit
        return (JobStatus.KILLED if forced else JobStatus.STOPPED), stopped

    def _settle_failure(self) -> None:
        error: Any = self._error
        self._error = None
        if self._again is not None:
            self.channel.retry(self, error, self._again)
            return
        future = self.future
        del self.future  # the error's traceback refers to this call, and the future will refer to the error
        future.set_exception(error)

    def _end(self, status: JobStatus, error: BaseException | None = None) -> None:
        self.job.end(status, error)
        if self._appointments is not None:
            self._call_off()
        self.channel.ended(self.job, error)

    def _watch(self) -> None:
        attempt = self.job.attempt
        self.appoint(self.options.timeout or 0.0, lambda: self.channel.out_of_time(self, attempt))

    def appoint(self, seconds: float, fn: Callable[[], object]) -> None:
        """Call ``fn`` in so many seconds, unless the attempt has ended by then."""
        attempt = self.job.attempt
        appointment = timer.after(seconds, fn)
        appointments = self._appointments
        if appointments is None:
            appointments = self._appointments = []
        appointments.append(appointment)
        # The attempt may have ended in between: it changes its status first, and then calls off what it finds here.
        if self.job.status is not JobStatus.RUNNING or self.job.attempt != attempt:
            appointment.cancel()

    def _call_off(self) -> None:
        appointments, self._appointments = self._appointments, None
        for appointment in appointments or ():
            appointment.cancel()


class PlainCall:
    """A call without contexts, for those who use a backend as the plain executor that it is."""

    priority = 0
    delay = 0.0
    timeout: float | None = None
    grace: float | None = None
    retried = False
    backend: Backend | None = None

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.future: Future[Any] = Future()
        self.job = LiveJob(callable_name(fn))
        self.fn, self.args, self.kwargs = fn, args, kwargs
        self.context = NO_CONTEXT
        self.packed: Any = None
        self._claimed: bool | None = None  # set_running_or_notify_cancel() may be asked once

    def run(self, *_unused: object) -> None:
        """Never called: backends that run calls in this process have a way of their own for plain ones."""
        raise NotImplementedError

    def post(self, message: JobMessage) -> None:
        """Nobody can send it any."""

    def wake(self) -> None:
        """Nobody can ask it to leave."""

    def interrupt(self, attempt: int) -> None:
        """Nobody can ask it to."""

    def appoint(self, seconds: float, fn: Callable[[], object]) -> None:
        """It has no deadline."""

    def begin(self) -> bool:
        """Claim it."""
        if self._claimed is None:
            self._claimed = self.future.set_running_or_notify_cancel()
        return self._claimed

    def progressed(self) -> None:
        """Nobody looks."""

    def put_back(self) -> bool:
        """It stays claimed, as a plain future cannot go back, and can be begun again."""
        return True

    def succeed(self, result: Any, packed: bytes | None = None) -> None:
        """Settle it."""
        self.future.set_result(result)

    def fail(self, error: BaseException, status: JobStatus = JobStatus.FAILED) -> None:
        """Settle it."""
        self.future.set_exception(error)

    def give_up(self, error: BaseException) -> None:
        """Settle it."""
        self.fail(error)

    def left(self, *, forced: bool = False) -> None:
        """Settle it."""
        self.fail(JobStopped(f"{self.job.name} has left."))


class Chunk:
    """One function over several sets of arguments, each call in contexts of its own: a job of ``map``."""

    __slots__ = ("context", "fn")

    def __init__(self, fn: Callable[..., Any], context: CapturedContext | None) -> None:
        self.fn = fn
        self.context = context

    def __call__(self, chunk: Iterable[tuple[Any, ...]]) -> list[Any]:
        context: Any = self.context
        return [context.run(_in_job, running_job(), self.fn, args) for args in chunk]

    def __reduce__(self) -> tuple[type[Chunk], tuple[Callable[..., Any], None]]:
        return Chunk, (self.fn, None)  # in a worker process the contexts are made of the snapshot


def _in_job(job: RunningJob | None, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
    # The contexts of a chunk were captured before it became a job.
    return call_to_end(fn, args, {}) if job is None else job.within(call_to_end, fn, args, {})


# ---- calls that travel ----


def pickled(value: object, what: str, cannot: str = "be sent to a worker process") -> list[bytes]:
    """``value`` as bytes, in parts.

    :param what: what the value is, to begin an error message with.
    :param cannot: what it is pickled for.
    :raises NotPicklable: saying why not and what to do.
    """
    try:
        return pickle_parts(value)
    except Exception as error:  # pickle raises PicklingError, TypeError, AttributeError, RecursionError, ...
        raise NotPicklable(
            f"{what} cannot {cannot}: {error}. Functions must be importable (defined at the top "
            "of a module), arguments and results plain data."
        ) from error


@dataclass(slots=True)
class Shipment(Message):
    """A call that travels, and what its job knows of itself."""

    id: str
    name: str
    key: Hashable | None
    owner: str | None
    contexts: Snapshot | None
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def pack_call(call: PreparedCall) -> list[bytes]:
    """A call as bytes, in parts, for :func:`run_packed` in a worker process.

    :raises NotPicklable: naming the part that cannot travel.
    """
    job = call.job
    contexts = snapshot(call.context)
    shipment = Shipment(job.id, job.name, job.key, job.owner, contexts, call.fn, call.args, call.kwargs)
    try:
        return pickle_parts(shipment)
    except Exception:  # now slowly, to say which part it is
        through_pickle(call)
        pickled(job.key, f"The key of job {job.name}")
        return pickled(shipment, f"Job {job.name}")


def through_pickle(call: PreparedCall) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The function and arguments of a call, as a worker process would get them.

    :raises NotPicklable: naming the part that cannot travel.
    """
    name = call.job.name

    def there_and_back(value: Any, what: str) -> Any:
        return pickle.loads(b"".join(pickled(value, what)))

    return (
        there_and_back(call.fn, f"The function of job {name}"),
        tuple(there_and_back(value, f"Argument {place} of job {name}") for place, value in enumerate(call.args, 1)),
        {key: there_and_back(value, f"Argument {key!r} of job {name}") for key, value in call.kwargs.items()},
    )


def run_packed(
    app: Flask, attempt: int, payload: bytes | memoryview, adopt: Callable[[LiveJob], RunningJob]
) -> tuple[Kind, list[bytes]]:
    """In a worker process: run a call that :func:`pack_call` packed. Never raises.

    :param adopt: makes the job known to the worker.
    """
    try:
        shipment = _unpacked(payload)
        job = LiveJob(shipment.name, shipment.key, shipment.owner, id=shipment.id)
        job.attempt = attempt
        running = adopt(job)
        # A context with nothing in it of what was active when this worker was forked.
        result = contextvars.Context().run(running.call, _call, app, shipment)
        return Kind.RESULT, pickled(result, f"The result of job {job.name}", "be sent back from its worker process")
    except JobExit:
        return Kind.LEFT, []
    except BaseException as error:
        return Kind.ERROR, [pack_error(error)]


def _unpacked(payload: bytes | memoryview) -> Shipment:
    try:
        shipment: Shipment = pickle.loads(payload)
        return shipment
    except Exception as error:  # whatever a foreign __reduce__ or an import leads to
        raise NotPicklable(
            f"a job came to its worker process, but cannot be rebuilt there: {describe_error(error)}. Its function and "
            "the classes of its arguments must be importable there, and have been there when the worker was started."
        ) from error


def _call(app: Flask, shipment: Shipment) -> Any:
    call = call_to_end if shipment.contexts is None else functools.partial(shipment.contexts.call, app)
    fn, args = shipment.fn, shipment.args
    if type(fn) is Chunk:
        return [contextvars.copy_context().run(call, fn.fn, each, {}) for each in args[0]]
    return call(fn, args, shipment.kwargs)


def settle_packed(call: PreparedCall, kind: int, payload: bytes) -> None:
    """Settle the call with what came back from the worker process."""
    if kind == Kind.RESULT:
        try:
            result = unpack_result(payload, call.job.name)
        except NotPicklable as refused:
            call.fail(refused)
        else:
            call.succeed(result, payload)
    elif kind == Kind.LEFT:
        call.left()
    else:
        call.fail(unpack_error(payload))


def unpack_result(payload: bytes, name: str) -> Any:
    """The result of a job again.

    :param name: what the job is called.
    :raises NotPicklable: when it cannot be rebuilt here.
    """
    try:
        return pickle.loads(payload)
    except BaseException as error:  # whatever a foreign __reduce__ leads to
        raise NotPicklable(
            f"The result of job {name} was sent here from another process, but cannot be rebuilt here: "
            f"{describe_error(error)}"
        ) from error


class _ErrorPickler(pickle.Pickler):
    """Pickles errors without what led to them.

    tblib, which Dask brings, adds that to all errors of the process: it may be what cannot be pickled.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, BaseException):
            reduce = copyreg.dispatch_table.get(type(value))
            if getattr(reduce, "__module__", "").startswith("tblib"):
                return value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def pack_error(error: BaseException) -> bytes:
    """An error as bytes, with its traceback as text."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        file = io.BytesIO()
        _ErrorPickler(file, pickle.HIGHEST_PROTOCOL).dump(error)
        data = file.getvalue()
        pickle.loads(data)  # many pickle but cannot be rebuilt: those whose __init__ wants more than their args
    except BaseException:  # whatever the error's own __reduce__ or __init__ raises
        says = f"a job's error could not be sent back from its worker process; it was: {describe_error(error)}"
        data = pickle.dumps(NotPicklable(says), pickle.HIGHEST_PROTOCOL)
    return pickle.dumps((data, text), pickle.HIGHEST_PROTOCOL)


def unpack_error(payload: bytes) -> BaseException:
    """The error again; its traceback there is its cause here."""
    data, text = pickle.loads(payload)
    try:
        error: BaseException = pickle.loads(data)
    except BaseException as unable:  # a class that this process cannot import
        error = NotPicklable(f"a job's error cannot be rebuilt here: {describe_error(unable)}")
    error.__cause__ = RemoteTraceback(text)
    return error


def unpack_meta(payload: bytes) -> dict[str, Any]:
    """What a job has reported, by name."""
    try:
        meta: dict[str, Any] = pickle.loads(payload)
    except BaseException as error:  # classes that this process cannot import
        return {"error": f"what the job has reported cannot be rebuilt: {describe_error(error)}"}
    return meta
