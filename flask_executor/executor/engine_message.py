"""Calls on their way to workers of other systems, perhaps on another machine: versioned, and signed with SECRET_KEY.

.. code-block:: text

    version (4 bytes), "S", kind, signature (43 bytes), the pickled EngineMessage        see PayloadSigner
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flask_executor.exceptions import NotPicklable, UntrustedResult
from flask_executor.helpers import describe_error
from flask_executor.jobs.context_snapshot import ContextSnapshot, snapshot
from flask_executor.jobs.model import JobOptions
from flask_executor.jobs.packing import pickle_or_explain, pickle_roundtrip
from flask_executor.tracking.signing import PayloadKind, PayloadSigner

if TYPE_CHECKING:
    from flask_executor.jobs.call import Call

_VERSION = b"FE01"


@dataclass(frozen=True, slots=True)
class EngineMessage:
    """A call, and what a worker needs to know of its job."""

    id: str
    #: Who had the job before the engine.
    sender: str
    queued_at: float
    contexts: ContextSnapshot | None
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: With the name, the key and the owner.
    options: JobOptions


def pack_call_for_engine(call: Call, sender: str, sealer: PayloadSigner) -> bytes:
    """The call as bytes.

    :param sender: who has the job until the engine has it.
    :raises NotPicklable: naming the part that cannot travel.
    """
    job = call.job
    options = replace(call.options, name=job.name)
    message = EngineMessage(
        job.id, sender, job.queued_at, snapshot(call.context), call.fn, call.args, call.kwargs, options
    )
    try:
        packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    except Exception:  # now slowly, to say which part it is
        pickle_roundtrip(call)
        packed = b"".join(pickle_or_explain(message, f"Job {job.name}"))
    return _VERSION + sealer.seal(job.id, PayloadKind.CALL, packed)


def unpack_call_for_engine(id: str, data: bytes, sealer: PayloadSigner) -> EngineMessage:
    """The call of this job.

    :raises UntrustedResult: when it was not signed with a key of ours, or packed by another version.
    :raises NotPicklable: when it cannot be rebuilt here.
    """
    version, sealed = data[: len(_VERSION)], data[len(_VERSION) :]
    if version != _VERSION:
        raise UntrustedResult(
            f"Job {id} was packed by another version of Flask-Executor ({version!r}; this worker knows {_VERSION!r}): "
            "have the web app and its workers run the same one."
        )
    _, packed = sealer.open(id, sealed)
    try:
        message: EngineMessage = pickle.loads(packed)
    except BaseException as error:  # whatever a foreign __reduce__ or an import leads to
        raise NotPicklable(
            f"job {id} came to its worker, but cannot be rebuilt there: {describe_error(error)}. Its function and the "
            "classes of its arguments must be importable there; is the worker as new as the web app?"
        ) from error
    return message
