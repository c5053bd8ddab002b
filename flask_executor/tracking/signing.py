"""What belongs to a job as bytes that a store can keep: signed, as whoever can write there could make us run code."""

from __future__ import annotations

import enum
import hashlib
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING

from itsdangerous import Signer

from flask_executor.exceptions import NotPicklable, UntrustedResult
from flask_executor.helpers import describe_error
from flask_executor.jobs.model import Job, JobMessage
from flask_executor.jobs.packing import Outcome, pickle_or_explain

if TYPE_CHECKING:
    from flask import Flask

#: What is sealed: what came of a job, the call that it is, or a message to it. One does not pass for another.
OUTCOME, CALL, MESSAGE = "outcome", "call", "message"


class PayloadKind(enum.IntEnum):
    """What the signed bytes are. The numbers stand in stores and in the queues of engines."""

    RESULT = Outcome.RESULT
    ERROR = Outcome.ERROR
    MESSAGE = 3
    CALL = 6


_SIGNED, _UNSIGNED = b"S", b"U"
_SIGNATURE = 43  # bytes, of SHA-256 in base 64 without padding


class PayloadSigner:
    """Seals what came of a job under its id, so that it cannot be passed off as that of another.

    .. code-block:: text

        "S", kind (a digit), signature (43 bytes), payload        or        "U", kind, payload

    :param keys: the app's secret keys, the current one last; none for an app that has no key and a store that nobody
        else can write to.
    :param what: is sealed: OUTCOME, CALL or MESSAGE.
    """

    def __init__(self, keys: Sequence[str | bytes], what: str = OUTCOME) -> None:
        secret = [key.encode() if isinstance(key, str) else key for key in keys]
        self._signer = Signer(secret, salt=f"flask-executor.{what}", digest_method=hashlib.sha256) if secret else None
        self._what = what

    @property
    def signs(self) -> bool:
        """Whether there is a key to sign with."""
        return self._signer is not None

    def seal(self, id: str, kind: PayloadKind, payload: bytes) -> bytes:
        """The payload, sealed."""
        mark = str(int(kind)).encode()
        if self._signer is None:
            return _UNSIGNED + mark + payload
        return _SIGNED + mark + self._signer.get_signature(_bound(id, mark, payload)) + payload

    def open(self, id: str, sealed: bytes) -> tuple[PayloadKind, bytes]:
        """PayloadKind and payload of what was sealed.

        :raises UntrustedResult: when it was not sealed with one of our keys.
        """
        signed, mark = sealed[:1], sealed[1:2]
        begin = 2 if self._signer is None else 2 + _SIGNATURE
        payload = sealed[begin:]
        if self._signer is None:
            good = signed == _UNSIGNED
        else:
            good = signed == _SIGNED and self._signer.verify_signature(_bound(id, mark, payload), sealed[2:begin])
        if not good:
            raise UntrustedResult(
                f"What is there as the {self._what} of job {id} was not signed with this app's SECRET_KEY, and is not "
                "unpickled. All processes of an app need the same key; a former one goes into SECRET_KEY_FALLBACKS."
            )
        return PayloadKind(int(mark)), payload


def _bound(id: str, mark: bytes, payload: bytes) -> bytes:
    return b"%s:%s:%s" % (id.encode(), mark, payload)


def secret_keys(app: Flask | None) -> list[str | bytes]:
    """The app's secret keys, the current one last."""
    config = {} if app is None else app.config
    return [*(config.get("SECRET_KEY_FALLBACKS") or ()), *filter(None, [config.get("SECRET_KEY")])]


def pack_message(job: Job, message: JobMessage, sealer: PayloadSigner) -> bytes:
    """A message to this job as bytes.

    :raises NotPicklable: when it cannot be sent to another process.
    """
    packed = pickle_or_explain(message, f"The message for job {job.name}", "be sent to the process that has the job")
    return sealer.seal(job.id, PayloadKind.MESSAGE, b"".join(packed))


def unpack_message(id: str, data: bytes, sealer: PayloadSigner) -> JobMessage:
    """The message to the job with this id.

    :raises UntrustedResult: when it was not signed with a key of ours.
    :raises NotPicklable: when it cannot be rebuilt here.
    """
    try:
        _, packed = sealer.open(id, data)
        message: JobMessage = pickle.loads(packed)
    except UntrustedResult:
        raise
    except BaseException as error:  # whatever a foreign __reduce__ or an import leads to
        raise NotPicklable(
            f"it cannot be rebuilt here: {describe_error(error)}. The class of its body must be importable there, too."
        ) from error
    return message
