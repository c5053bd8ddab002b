"""What a pool and its worker processes send to each other, on which socket, and in which form.

.. code-block:: text

  parent                                     worker process
  ──────                                     ──────────────
  any thread ──────── calls ───────────────> main thread      packets: small calls, and the heads of large ones
  any thread, ─────── stream ──────────────> main thread      bytes of large calls
    supervisor thread
  supervisor <─────── stream ─────────────── main thread,     frames: RESULT, ERROR, STOPPED, and
    thread                                     listener         AppLoaded, WorkerReady, StartFailed,
                                                                ProgressReport, LogReport, LogsDropped, ServiceMessage
  any thread, ─────── control ─────────────> listener thread  frames: StopJob, DeliverMessage, Broadcast
    supervisor thread
             ──────── life ────────────────> (the system)     nothing: that it is closed ends the worker

**Calls** are packets (``SOCK_SEQPACKET``): a head of 20 bytes (number of the call, attempt, size), followed by the
call if it is small. The bytes of a larger one follow on the stream. The parent can read the packets back. Where the
system has no such sockets, as on macOS, heads and calls all go over the stream, and no call can be recalled.

**Frames** are the size of the body (8 bytes), a :class:`FrameKind` (1 byte), the number of the call that it is about
(8 bytes, 0 for none), and the body: an outcome, or one of the messages below, pickled.

**Order.** Calls and control messages travel on different sockets, because calls must be recalled without anything else.
So a control message may overtake the call of its job. There are two places where a message waits for its job:

- in the parent, ``Call.undelivered``: the messages that no worker has got for certain, as the call is not with a
  worker, or may yet be recalled and sent to another one, which gets them again;
- in the worker, ``Worker._undelivered``: the messages that came before the call was read, for a few jobs.

A stop request is kept by the worker in the same way; the parent has it in the job's state.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from flask_executor.helpers.pickling import CompactPickle
from flask_executor.jobs.model import JobStatus
from flask_executor.jobs.packing import Outcome


@dataclass(slots=True)
class StopJob(CompactPickle):
    """To a worker: the job is to stop at its next checkpoint, in this attempt; it is STOPPED or TIMED_OUT then."""

    id: str
    attempt: int
    reason: JobStatus


@dataclass(slots=True)
class DeliverMessage(CompactPickle):
    """To a worker: a message for the job with this id, which it runs or is about to run."""

    id: str
    #: A JobMessage, pickled.
    data: bytes


@dataclass(slots=True)
class Broadcast(CompactPickle):
    """To every worker of a service: a message to be handled before the calls that are sent after it."""

    #: Number of broadcasts so far, with this one.
    number: int
    #: The type of the message, and its body, pickled; None tells a new worker only how many there were before it.
    data: bytes | None


@dataclass(slots=True)
class ServiceMessage(CompactPickle):
    """From a service's worker: a message to another service, or to the app."""

    #: The name of the service; None for the app.
    to: str | None
    type: str
    #: The type and the body, pickled: as the service that it is for gets it.
    data: bytes


@dataclass(slots=True)
class AppLoaded(CompactPickle):
    """From a worker: it has its app, and runs its initializers next, for as long as they take."""


@dataclass(slots=True)
class WorkerReady(CompactPickle):
    """From a worker: its initializers have run, and it waits for calls."""


@dataclass(slots=True)
class StartFailed(CompactPickle):
    """From a worker: it could not start, and ends."""

    #: From :func:`~flask_executor.jobs.packing.pack_error`.
    error: bytes


@dataclass(slots=True)
class ProgressReport(CompactPickle):
    """From a worker: how far its job is."""

    id: str
    progress: float | None
    message: str | None
    #: Its metadata, pickled apart, as the values may be of any class; None if nothing in it is new.
    meta: bytes | None


@dataclass(slots=True)
class LogReport(CompactPickle):
    """From a worker: a log record was made, by the job with this id or by none."""

    id: str | None
    name: str
    level: int
    text: str
    #: All fields of the record, pickled apart, as the values may be of any class.
    fields: bytes


@dataclass(slots=True)
class LogsDropped(CompactPickle):
    """From a worker: this many log records were dropped, as they were made faster than they could be sent."""

    count: int


class FrameKind(enum.IntEnum):
    """The kind of a frame's body. The first three are the outcome of the call that the worker runs."""

    RESULT = Outcome.RESULT
    ERROR = Outcome.ERROR
    STOPPED = Outcome.STOPPED
    MESSAGE = 3  # one of the dataclasses above, pickled
