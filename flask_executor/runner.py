"""Run one call: what every backend ships to its workers."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flask_executor.context import CapturedContext, call_to_end, snapshot
from flask_executor.exceptions import NotPicklable, RemoteTraceback
from flask_executor.helpers import describe_error
from flask_executor.jobs import JobStatus, LiveJob

if TYPE_CHECKING:
    from flask_executor.abc import JobChannel, PreparedCall

T = TypeVar("T")
F = TypeVar("F", bound=Future[Any])


class Call(Generic[F]):
    """A function, its arguments and contexts, the job it is the work of, and the handle to settle.

    A worker in this process calls :meth:`run`. A backend whose workers are elsewhere calls :meth:`begin`, and then
    :meth:`succeed` or :meth:`fail`. Only the one who got True from :meth:`begin` may settle the call.
    """

    __slots__ = ("args", "channel", "context", "fn", "future", "job", "kwargs")

    def __init__(
        self,
        future: F,
        job: LiveJob,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: CapturedContext,
        channel: JobChannel,
    ) -> None:
        self.future = future
        self.job = job
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.context = context
        self.channel = channel

    def run(self, *_unused: object) -> None:
        """Run the call in this thread, unless it was cancelled."""
        # The standard pool passes a context of its worker, from Python 3.14.
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.context.run(self._report_and_call)
        except BaseException as error:
            self.fail(error)
            self = None  # type: ignore[assignment]  # the error's traceback refers to this frame
        else:
            self._settle(result)

    def begin(self) -> bool:
        """Claim the call for a worker elsewhere; False when it was cancelled meanwhile."""
        if not self.future.set_running_or_notify_cancel():
            return False
        self.channel.started(self.job)
        return True

    def succeed(self, result: Any) -> None:
        """Settle the call with its result."""
        self._end(JobStatus.SUCCEEDED)
        self._settle(result)

    def fail(self, error: BaseException, status: JobStatus = JobStatus.FAILED) -> None:
        """Settle the call with an error."""
        if not self.job.status.ended:
            self._end(status, error)
        future, channel = self.future, self.channel
        del self.future  # the error's traceback refers to this call, and the future will refer to the error
        try:
            future.set_exception(error)
        finally:
            channel.settled(future)

    def _settle(self, result: Any) -> None:
        try:
            self.future.set_result(result)
        finally:
            self.channel.settled(self.future)

    def _report_and_call(self) -> Any:
        self.channel.started(self.job)
        try:
            result = call_to_end(self.fn, self.args, self.kwargs)
        except BaseException as error:
            self._end(JobStatus.FAILED, error)
            raise
        self._end(JobStatus.SUCCEEDED)
        return result

    def _end(self, status: JobStatus, error: BaseException | None = None) -> None:
        self.job.end(status, error)
        self.channel.ended(self.job)


class Chunk:
    """One function over several sets of arguments, each call in contexts of its own: a job of ``map``."""

    __slots__ = ("context", "fn")

    def __init__(self, fn: Callable[..., T], context: CapturedContext) -> None:
        self.fn = fn
        self.context = context

    def __call__(self, chunk: Iterable[tuple[Any, ...]]) -> list[Any]:
        return [self.context.run(call_to_end, self.fn, args, {}) for args in chunk]


def pickled(value: T, what: str) -> bytes:
    """``value`` as bytes.

    :param what: what the value is, to begin an error message with.
    :raises NotPicklable: saying why not and what to do.
    """
    try:
        return pickle.dumps(value)
    except Exception as error:  # pickle raises PicklingError, TypeError, AttributeError, RecursionError, ...
        raise NotPicklable(
            f"{what} cannot be sent to a worker process: {error}. Functions must be importable (defined at the top "
            "of a module), arguments and results plain data."
        ) from error


def ship(call: PreparedCall) -> bytes:
    """A call as bytes, for :func:`run_shipped` in a worker process.

    :raises NotPicklable: naming the part that cannot travel.
    """
    fn, args, kwargs = pickled_parts(call)
    return pickle.dumps((snapshot(call.context), fn, args, kwargs))


def pickled_parts(call: PreparedCall) -> tuple[bytes, list[bytes], dict[str, bytes]]:
    """The function and arguments of a call, each as bytes.

    :raises NotPicklable: naming the part that cannot travel.
    """
    name = call.job.name
    return (
        pickled(call.fn, f"The function of job {name}"),
        [pickled(value, f"Argument {place} of job {name}") for place, value in enumerate(call.args, 1)],
        {key: pickled(value, f"Argument {key!r} of job {name}") for key, value in call.kwargs.items()},
    )


def unpickled_parts(
    fn: bytes, args: list[bytes], kwargs: dict[str, bytes]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The reverse of :func:`pickled_parts`."""
    return (
        pickle.loads(fn),
        tuple(pickle.loads(value) for value in args),
        {key: pickle.loads(value) for key, value in kwargs.items()},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a worker process sends back: a pickled result, or a pickled error with its traceback as text."""

    result: bytes | None = None
    error: bytes | None = None
    traceback: str = ""


def run_shipped(shipped: bytes) -> Outcome:
    """In a worker process: run a call that :func:`ship` packed. Never raises."""
    try:
        contexts, fn, args, kwargs = pickle.loads(shipped)
        result = contexts.call(*unpickled_parts(fn, args, kwargs))
        return Outcome(result=pickled(result, "The result of a job"))
    except BaseException as error:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return Outcome(error=_portable(error), traceback=text)


def settle_shipped(call: PreparedCall, outcome: Outcome) -> None:
    """Settle the call with what came back from the worker process."""
    try:
        value = pickle.loads(outcome.result or outcome.error or b"")
    except Exception as error:  # whatever a foreign __reduce__ leads to
        what = "result" if outcome.result else "error"
        refused = NotPicklable(
            f"The {what} of job {call.job.name} was sent back from its worker process, but cannot be rebuilt here: "
            f"{describe_error(error)}"
        )
        refused.__cause__ = error
        call.fail(refused)
        return
    if outcome.result is not None:
        call.succeed(value)
    else:
        value.__cause__ = RemoteTraceback(outcome.traceback)
        call.fail(value)


def _portable(error: BaseException) -> bytes:
    """The error pickled, or one that says what it was: many exceptions pickle but cannot be rebuilt."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # whatever the error's own __reduce__ or __init__ raises
        text = f"a job's error could not be sent back from its worker process; it was: {describe_error(error)}"
        return pickle.dumps(NotPicklable(text))
    return data
