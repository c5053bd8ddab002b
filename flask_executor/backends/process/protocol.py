"""What a pool and its worker processes say to each other."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from flask_executor.helpers.pickling import CompactPickle
from flask_executor.jobs.model import JobStatus
from flask_executor.jobs.packing import Outcome


@dataclass(slots=True)
class StopJob(CompactPickle):
    """To the worker: this attempt has to leave at its next checkpoint, STOPPED or TIMED_OUT."""

    id: str
    attempt: int
    reason: JobStatus


@dataclass(slots=True)
class DeliverMessage(CompactPickle):
    """To the worker: a message for the job with this id, which it runs or is about to."""

    id: str
    #: A JobMessage, pickled.
    data: bytes


@dataclass(slots=True)
class Broadcast(CompactPickle):
    """To every worker of a service: something to do before the calls that are given out from now on."""

    #: How many there were, with this one.
    number: int
    #: The type of the message, and its body, pickled; None for a new worker, to which those before do not matter.
    data: bytes | None


@dataclass(slots=True)
class ServiceMessage(CompactPickle):
    """From the worker of a service: a message to another service, or to the app."""

    #: The name of the service; None for the app.
    to: str | None
    type: str
    #: The type and the body, pickled: as the service that it is for gets it.
    data: bytes


@dataclass(slots=True)
class AppLoaded(CompactPickle):
    """The worker has its app, and its initializers run next, for as long as they take."""


@dataclass(slots=True)
class WorkerReady(CompactPickle):
    """The worker has its app, its initializers have run, and it waits for calls."""


@dataclass(slots=True)
class StartFailed(CompactPickle):
    """The worker could not start and ends."""

    #: From ``runner.pack_error()``.
    error: bytes


@dataclass(slots=True)
class ProgressReport(CompactPickle):
    """How far the job is."""

    id: str
    progress: float | None
    message: str | None
    #: What else it reports, pickled as its values may be of any class; None for nothing new.
    meta: bytes | None


@dataclass(slots=True)
class LogReport(CompactPickle):
    """A log record was made, by the job with this id or by none."""

    id: str | None
    name: str
    level: int
    text: str
    #: All of the record, pickled as there may be values of any class.
    fields: bytes


@dataclass(slots=True)
class LogsDropped(CompactPickle):
    """So many log records were made faster than they could be sent, and are gone."""

    count: int


class FrameKind(enum.IntEnum):
    """What the body of a frame is. The first three end the call that the worker had begun."""

    RESULT = Outcome.RESULT
    ERROR = Outcome.ERROR
    STOPPED = Outcome.STOPPED
    MESSAGE = 3  # one of the dataclasses above, pickled
