"""The envelope of a call on its way to a worker of an engine, perhaps on another machine: versioned, and signed.

.. code-block:: text

    signed with SECRET_KEY (see PayloadSigner): version (4 bytes), EngineMessage, pickled
                                                                     header: id, destination, sender, options ...
                                                                     call: a CallMessage, pickled

All of it is under the signature: what another process has written into the queue decides nothing. The engine's worker
reads the header only. The call is passed on as it is to the worker process that runs it, so that its arguments are
pickled and unpickled once, and their classes need not be importable in between.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flask_executor.backends.engine.entrypoint import Destination
from flask_executor.exceptions import NotPicklable, UntrustedResult
from flask_executor.helpers import describe_error
from flask_executor.jobs.model import JobOptions
from flask_executor.jobs.packing import pack_call, pickle_or_explain
from flask_executor.tracking.signing import PayloadKind, PayloadSigner

if TYPE_CHECKING:
    from flask_executor.jobs.call import Call

_VERSION = b"FE03"


@dataclass(frozen=True, slots=True)
class EngineMessage:
    """A call, and what a worker needs to know of its job."""

    id: str
    destination: Destination
    #: The holder that has the job until the engine has it.
    sender: str
    queued_at: float
    #: With the name, the key and the owner.
    options: JobOptions
    #: From :func:`flask_executor.jobs.packing.pack_call`.
    call: bytes


def pack_engine_message(call: Call, destination: Destination, sender: str, signer: PayloadSigner) -> bytes:
    """The call as signed bytes.

    :param destination: the executor whose workers are to run it.
    :param sender: the holder that has the job until the engine has it.
    :raises NotPicklable: naming the part that cannot travel.
    """
    job = call.job
    options = replace(call.options, name=job.name)
    message = EngineMessage(job.id, destination, sender, job.queued_at, options, b"".join(pack_call(call)))
    packed = b"".join(pickle_or_explain(message, f"The options of job {job.name}"))
    return signer.sign(job.id, PayloadKind.CALL, _VERSION + packed)


def unpack_engine_message(id: str, data: bytes, destination: Destination, signer: PayloadSigner) -> EngineMessage:
    """The message of this job, its call still packed.

    :param destination: the executor that is to run it.
    :raises UntrustedResult: when it was not signed with a key of the app, for a job with this id, and for this
        executor. Then nothing is known of it, not even that somebody has submitted it.
    :raises NotPicklable: when it was, but by another version, or its header cannot be rebuilt here.
    """
    kind, packed = signer.unsign(id, data)
    version = packed[: len(_VERSION)]
    if version != _VERSION:
        raise NotPicklable(
            f"Job {id} was packed by another version of Flask-Executor ({version!r}; this worker knows {_VERSION!r}): "
            "have the web app and its workers run the same one."
        )
    try:
        message: EngineMessage = pickle.loads(packed[len(_VERSION) :])
    except BaseException as error:  # whatever a foreign __reduce__ or an import leads to
        raise NotPicklable(
            f"job {id} came to its worker, but cannot be rebuilt there: {describe_error(error)}. The classes in its "
            "options (retry_on, key) must be importable there; is the worker as new as the web app?"
        ) from error
    if kind is not PayloadKind.CALL or message.destination != destination:
        raise UntrustedResult(
            f"Job {id} was signed for the executor {message.destination[1]!r} of the app {message.destination[0]!r}, "
            f"and came to {destination[1]!r} of {destination[0]!r}: it is not run here."
        )
    return message
