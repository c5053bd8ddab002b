"""A call, its result and its errors as bytes, and running a packed call in a worker process.

.. code-block:: text

    pack_call(call) ── CallMessage, pickled ──> run_packed() in the worker process
    settle_from_bytes(call) <── Outcome, bytes ──┘   RESULT: the result; ERROR: from pack_error(); STOPPED: nothing
"""

from __future__ import annotations

import contextvars
import copyreg
import enum
import functools
import io
import pickle
import traceback
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from flask_executor.exceptions import JobExit, NotPicklable, RemoteTraceback
from flask_executor.helpers import describe_error
from flask_executor.helpers.pickling import CompactPickle, pickle_parts
from flask_executor.jobs.call import Call
from flask_executor.jobs.context_snapshot import ContextSnapshot, snapshot
from flask_executor.jobs.contexts import CapturedContext, call_sync
from flask_executor.jobs.current import RunningJob, running_job
from flask_executor.jobs.model import JobState

if TYPE_CHECKING:
    from flask import Flask

    from flask_executor.jobs.call import Call


class Outcome(enum.IntEnum):
    """How an attempt of a call ended, and so what the bytes that come with it are."""

    RESULT = 0  # the result, pickled
    ERROR = 1  # the error, from pack_error()
    STOPPED = 2  # nothing: it left at a checkpoint, as it was asked to


T = TypeVar("T")


class ChunkedFunction:
    """One function over several sets of arguments, each call in contexts of its own: a job of ``map``."""

    __slots__ = ("context", "fn")

    def __init__(self, fn: Callable[..., Any], context: CapturedContext | None) -> None:
        self.fn = fn
        self.context = context

    def __call__(self, chunk: Iterable[tuple[Any, ...]]) -> list[Any]:
        context: Any = self.context
        return [context.run(_in_job, running_job(), self.fn, args) for args in chunk]

    def __reduce__(self) -> tuple[type[ChunkedFunction], tuple[Callable[..., Any], None]]:
        return ChunkedFunction, (self.fn, None)  # in a worker process the contexts are made of the snapshot


def _in_job(job: RunningJob | None, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
    # The contexts of a chunk were captured before it became a job.
    return call_sync(fn, args, {}) if job is None else job.run_nested(call_sync, fn, args, {})


# ---- calls that travel ----


def pickle_or_explain(value: object, what: str, cannot: str = "be sent to a worker process") -> list[bytes]:
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
class CallMessage(CompactPickle):
    """A call that travels, and what its job knows of itself."""

    id: str
    name: str
    key: Hashable | None
    owner: str | None
    contexts: ContextSnapshot | None
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def pack_call(call: Call) -> list[bytes]:
    """A call as bytes, in parts, for :func:`run_packed` in a worker process.

    :raises NotPicklable: naming the part that cannot travel.
    """
    job = call.job
    contexts = snapshot(call.context)
    message = CallMessage(job.id, job.name, job.key, job.owner, contexts, call.fn, call.args, call.kwargs)
    try:
        return pickle_parts(message)
    except Exception:  # now slowly, to say which part it is
        pickle_roundtrip(call)
        pickle_or_explain(job.key, f"The key of job {job.name}")
        return pickle_or_explain(message, f"Job {job.name}")


def pickle_roundtrip(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The function and arguments of a call, as a worker process would get them.

    :raises NotPicklable: naming the part that cannot travel.
    """
    name = call.job.name

    def there_and_back(value: Any, what: str) -> Any:
        return pickle.loads(b"".join(pickle_or_explain(value, what)))

    return (
        there_and_back(call.fn, f"The function of job {name}"),
        tuple(there_and_back(value, f"Argument {place} of job {name}") for place, value in enumerate(call.args, 1)),
        {key: there_and_back(value, f"Argument {key!r} of job {name}") for key, value in call.kwargs.items()},
    )


def run_packed(
    app: Flask, attempt: int, payload: bytes | memoryview, adopt: Callable[[JobState], RunningJob]
) -> tuple[Outcome, list[bytes]]:
    """In a worker process: run a call that :func:`pack_call` packed. Never raises.

    :param adopt: makes the job known to the worker.
    """
    try:
        message = _unpacked(payload)
        job = JobState(message.name, message.key, message.owner, id=message.id)
        job.attempt = attempt
        running = adopt(job)
        # A context with nothing in it of what was active when this worker was forked.
        result = contextvars.Context().run(running.call, _call, app, message)
        return Outcome.RESULT, pickle_or_explain(
            result, f"The result of job {job.name}", "be sent back from its worker process"
        )
    except JobExit:
        return Outcome.STOPPED, []
    except BaseException as error:
        return Outcome.ERROR, [pack_error(error)]


def _unpacked(payload: bytes | memoryview) -> CallMessage:
    try:
        message: CallMessage = pickle.loads(payload)
        return message
    except Exception as error:  # whatever a foreign __reduce__ or an import leads to
        raise NotPicklable(
            f"a job came to its worker process, but cannot be rebuilt there: {describe_error(error)}. Its function and "
            "the classes of its arguments must be importable there, and have been there when the worker was started."
        ) from error


def _call(app: Flask, message: CallMessage) -> Any:
    call = call_sync if message.contexts is None else functools.partial(message.contexts.call, app)
    fn, args = message.fn, message.args
    if type(fn) is ChunkedFunction:
        return [contextvars.copy_context().run(call, fn.fn, each, {}) for each in args[0]]
    return call(fn, args, message.kwargs)


def settle_from_bytes(call: Call, kind: int, payload: bytes) -> None:
    """Settle the call with what came back from the worker process."""
    if kind == Outcome.RESULT:
        try:
            result = unpack_result(payload, call.job.name)
        except NotPicklable as refused:
            call.fail(refused)
        else:
            call.succeed(result, payload)
    elif kind == Outcome.STOPPED:
        call.stopped()
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
    """Return the ``meta`` that a job has reported."""
    try:
        meta: dict[str, Any] = pickle.loads(payload)
    except BaseException as error:  # classes that this process cannot import
        return {"error": f"what the job has reported cannot be rebuilt: {describe_error(error)}"}
    return meta
