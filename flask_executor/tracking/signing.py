"""Outcomes, calls and messages as signed bytes: what is unpickled runs code, so nothing else is unpickled."""

from __future__ import annotations

import enum
import hashlib
import pickle
from collections.abc import Sequence

from itsdangerous import Signer

from flask_executor.exceptions import NotPicklable, UntrustedResult
from flask_executor.helpers import describe_error
from flask_executor.jobs.model import Job, JobMessage
from flask_executor.jobs.packing import Outcome, pickle_or_explain

#: What is signed: the outcome of a job, its call, or a message to it. Each has a salt of its own, so that one does not
#: pass for another.
OUTCOME, CALL, MESSAGE = "outcome", "call", "message"


class PayloadKind(enum.IntEnum):
    """The kind of a payload. The numbers stand in stores and in the queues of engines."""

    RESULT = Outcome.RESULT
    ERROR = Outcome.ERROR
    MESSAGE = 3
    CALL = 6


_SIGNED, _UNSIGNED = b"S", b"U"
_SIGNATURE_LENGTH = 43  # bytes: SHA-256 in base 64 without padding


class PayloadSigner:
    """Signs a payload together with the id of its job and its kind, so that it does not pass for that of another job.

    .. code-block:: text

        "S", kind (a digit), signature (43 bytes), payload        or        "U", kind, payload

    The signature is that of ``id:kind:payload``. It stands before the payload, and not behind it as
    :meth:`itsdangerous.Signer.sign` would put it, because stores have such rows.

    :param keys: the app's secret keys, the current one last; none if the app has no key, which is good enough for a
        store that no other user can write to.
    :param what: OUTCOME, CALL or MESSAGE.
    """

    def __init__(self, keys: Sequence[bytes], what: str = OUTCOME) -> None:
        self._signer = Signer(keys, salt=f"flask-executor.{what}", digest_method=hashlib.sha256) if keys else None
        self._what = what

    @property
    def signs(self) -> bool:
        """If true, there is a key to sign with."""
        return self._signer is not None

    def sign(self, id: str, kind: PayloadKind, payload: bytes) -> bytes:
        """Return the payload as bytes that :meth:`unsign` takes."""
        mark = str(int(kind)).encode()
        if self._signer is None:
            return _UNSIGNED + mark + payload
        return _SIGNED + mark + self._signer.get_signature(_bound(id, mark, payload)) + payload

    def unsign(self, id: str, signed: bytes) -> tuple[PayloadKind, bytes]:
        """Return the kind and the payload of what :meth:`sign` returned for this job.

        :raises UntrustedResult: if it was not signed with one of the app's keys.
        """
        form, mark = signed[:1], signed[1:2]
        begin = 2 if self._signer is None else 2 + _SIGNATURE_LENGTH
        payload = signed[begin:]
        if self._signer is None:
            good = form == _UNSIGNED
        else:
            good = form == _SIGNED and self._signer.verify_signature(_bound(id, mark, payload), signed[2:begin])
        if not good:
            raise UntrustedResult(
                f"What is there as the {self._what} of job {id} was not signed with this app's SECRET_KEY, and is not "
                "unpickled. All processes of an app need the same key; a former one goes into SECRET_KEY_FALLBACKS."
            )
        return PayloadKind(int(mark)), payload


def _bound(id: str, mark: bytes, payload: bytes) -> bytes:
    return b"%s:%s:%s" % (id.encode(), mark, payload)


def pack_message(job: Job, message: JobMessage, signer: PayloadSigner) -> bytes:
    """Return a message to this job as signed bytes.

    :raises NotPicklable: if it cannot be sent to another process.
    """
    packed = pickle_or_explain(message, f"The message for job {job.name}", "be sent to the process that has the job")
    return signer.sign(job.id, PayloadKind.MESSAGE, b"".join(packed))


def unpack_message(id: str, data: bytes, signer: PayloadSigner) -> JobMessage:
    """Return the message to the job with this id.

    :raises UntrustedResult: if it was not signed with one of the app's keys.
    :raises NotPicklable: if it cannot be unpickled here.
    """
    try:
        _, packed = signer.unsign(id, data)
        message: JobMessage = pickle.loads(packed)
    except UntrustedResult:
        raise
    except BaseException as error:  # whatever a foreign __reduce__ or an import leads to
        raise NotPicklable(
            f"it cannot be rebuilt here: {describe_error(error)}. The class of its body must be importable there, too."
        ) from error
    return message
