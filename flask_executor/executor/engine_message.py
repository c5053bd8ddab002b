"""The envelope of a call on its way to a worker of an engine, perhaps on another machine: versioned, and signed.

.. code-block:: text

    version (4 bytes), signed with SECRET_KEY (see PayloadSigner): EngineMessage, pickled
                                                                     header: id, sender, queued_at, options
                                                                     call: a CallMessage, pickled

The engine's worker reads the header only. The call is passed on as it is to the worker process that runs it, so that
its arguments are pickled and unpickled once, and their classes need not be importable in between.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flask_executor.exceptions import NotPicklable, UntrustedResult
from flask_executor.helpers import describe_error
from flask_executor.jobs.model import JobOptions
from flask_executor.jobs.packing import pack_call, pickle_or_explain
from flask_executor.tracking.signing import PayloadKind, PayloadSigner

if TYPE_CHECKING:
    from flask_executor.jobs.call import Call

_VERSION = b"FE02"


@dataclass(frozen=True, slots=True)
class EngineMessage:
    """A call, and what a worker needs to know of its job."""

    id: str
    #: The holder that has the job until the engine has it.
    sender: str
    queued_at: float
    #: With the name, the key and the owner.
    options: JobOptions
    #: From :func:`flask_executor.jobs.packing.pack_call`.
    call: bytes


def pack_engine_message(call: Call, sender: str, signer: PayloadSigner) -> bytes:
    """The call as signed bytes.

    :param sender: the holder that has the job until the engine has it.
    :raises NotPicklable: naming the part that cannot travel.
    """
    job = call.job
    options = replace(call.options, name=job.name)
    message = EngineMessage(job.id, sender, job.queued_at, options, b"".join(pack_call(call)))
    packed = b"".join(pickle_or_explain(message, f"The options of job {job.name}"))
    return _VERSION + signer.sign(job.id, PayloadKind.CALL, packed)


def unpack_engine_message(id: str, data: bytes, signer: PayloadSigner) -> EngineMessage:
    """The message of this job, its call still packed.

    :raises UntrustedResult: when it was not signed with a key of the app, or packed by another version.
    :raises NotPicklable: when its header cannot be rebuilt here.
    """
    version, signed = data[: len(_VERSION)], data[len(_VERSION) :]
    if version != _VERSION:
        raise UntrustedResult(
            f"Job {id} was packed by another version of Flask-Executor ({version!r}; this worker knows {_VERSION!r}): "
            "have the web app and its workers run the same one."
        )
    _, packed = signer.unsign(id, signed)
    try:
        message: EngineMessage = pickle.loads(packed)
    except BaseException as error:  # whatever a foreign __reduce__ or an import leads to
        raise NotPicklable(
            f"job {id} came to its worker, but cannot be rebuilt there: {describe_error(error)}. The classes in its "
            "options (retry_on, key) must be importable there; is the worker as new as the web app?"
        ) from error
    return message
