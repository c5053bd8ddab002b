"""Messages to jobs that another process has, as they lie in a store: pickled, and signed with SECRET_KEY.

.. code-block:: text

    "S", kind, signature (43 bytes), the pickled JobMessage        see seals
"""

from __future__ import annotations

import pickle

from flask_executor.exceptions import NotPicklable, UntrustedResult
from flask_executor.helpers import describe_error
from flask_executor.jobs import Job, JobMessage
from flask_executor.messages import Kind
from flask_executor.runner import pickled
from flask_executor.seals import Sealer


def pack_letter(job: Job, message: JobMessage, sealer: Sealer) -> bytes:
    """A message to this job as bytes.

    :raises NotPicklable: when it cannot be sent to another process.
    """
    packed = pickled(message, f"The message for job {job.name}", "be sent to the process that has the job")
    return sealer.seal(job.id, Kind.MESSAGE, b"".join(packed))


def open_letter(id: str, data: bytes, sealer: Sealer) -> JobMessage:
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
