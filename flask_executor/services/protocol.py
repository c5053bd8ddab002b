"""What processes of an app ask the one that leads to do for them."""

from __future__ import annotations

import contextlib
import enum
import pickle
import selectors
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flask_executor.abc import ServiceStatus
from flask_executor.backends.process.channel import FrameStream
from flask_executor.helpers.pickling import CompactPickle
from flask_executor.jobs.call import Call, PlainCall
from flask_executor.jobs.model import JobState
from flask_executor.jobs.packing import Outcome

#: The number of the frame by which a leader says that it listens: what is sent from then on arrives.
WELCOME = 1 << 63
#: Why nothing is taken in any more.
SHUT = "this executor was shut down in this process, and takes no more messages"


class RelayFrame(enum.IntEnum):
    """What the body of a frame between follower and leader is. The first three end a call."""

    RESULT = Outcome.RESULT
    ERROR = Outcome.ERROR
    STOPPED = Outcome.STOPPED
    MESSAGE = 3  # a message, pickled
    BEGUN = 4  # nothing: a call that was relayed to a worker has begun
    GIVEN = 5  # nothing: it is given to a worker, and may begin at any time


@dataclass(slots=True)
class Errand(CompactPickle):
    """Something that the leader is to do for another process; and word from it that it ends.

    What the leader does not do now it gives back.
    """

    #: ``call``, ``send``, ``broadcast``, ``stop``; of a call ``tell``, ``leave``, ``kill``; ``again``, ``status``,
    #: ``ready``, ``close``.
    verb: str
    service: str
    #: Of the message.
    type: str = ""
    #: The message, packed.
    data: bytes = b""
    #: Of a call: the id of its job.
    job: str = ""


class Watcher(Protocol):
    """Tells another process of its call."""

    def given(self) -> None:
        """A worker gets it now."""

    def begun(self) -> None:
        """A worker begins with it."""

    def progressed(self, job: JobState) -> None:
        """It has something new to report."""


class Workforce(Protocol):
    """What the leader has: the workers of a service."""

    def start_call(self, type: str, message: bytes, id: str, watcher: Watcher) -> Call:
        """Have a worker handle a message.

        :param id: of the job that this is where it comes from.
        :param watcher: is told how it goes on.
        """

    def tell(self, call: Call, data: bytes) -> None:
        """Send a message to the job that a call is: a JobMessage, pickled."""

    def adopt(self, call: Call) -> None:
        """Take over a call of a :class:`~flask_executor.services.follower.Relay`."""

    def send(self, type: str, message: bytes, *, anyway: bool = False) -> None:
        """Have a worker handle a message.

        :param anyway: also if too many wait.
        """

    def broadcast(self, type: str, message: bytes) -> None:
        """Have all workers handle a message."""

    def leave(self, call: Call, *, forced: bool) -> None:
        """Have a call leave, or end it by force."""


class Leader(Protocol):
    """The services of the process that leads."""

    def crew(self, name: str) -> Workforce:
        """The workers of a service in this process, started now if they were not.

        :raises KeyError: for a service that there is not.
        :raises ExecutorShutdown: when it is ending.
        """

    def local_status(self, name: str) -> ServiceStatus:
        """How a service is doing in this process."""

    def stop_here(self, name: str, timeout: float | None) -> None:
        """Stop a service, if it runs in this process; return when it has ended.

        :param timeout: seconds after which force is used; None for never.
        """

    def lead(self) -> None:
        """This process leads from now on."""


class StopCall(PlainCall):
    """Has the leader stop a service."""

    def __init__(self, service: str, timeout: float | None) -> None:
        super().__init__(Leader.stop_here, (service, "", pickle.dumps(timeout)), {})

    def do(self, leader: Leader) -> None:
        """Stop it, in a thread, as it may take long."""
        threading.Thread(target=self._do, args=(leader,), name="flask-executor-stopping", daemon=True).start()

    def _do(self, leader: Leader) -> None:
        service, _, timeout = self.args
        if self.begin():
            try:
                leader.stop_here(service, pickle.loads(timeout))
                self.succeed(None)
            except Exception as error:
                self.fail(error)


class Talk:
    """A wire that several threads send on, and one reads from.

    :param wake: has that one look whether something is left to be sent.
    """

    def __init__(self, wire: FrameStream, wake: Callable[[], object]) -> None:
        self.wire = wire
        self._wake = wake
        self._lock = threading.Lock()

    def send(self, kind: RelayFrame, body: list[bytes], number: int) -> int:
        """Send a frame; what does not go out at once follows. Never waits, and does nothing when the other is gone.

        :return: what ``wire.sent`` is when all of it is out.
        """
        with self._lock:
            with contextlib.suppress(OSError):
                if not self.wire.send(kind, body, number):
                    self._wake()
            return self.wire.sent + self.wire.pending

    def flush(self) -> None:
        """Send what is left."""
        with self._lock, contextlib.suppress(OSError):
            self.wire.flush()

    def events(self) -> int:
        """What to wait for."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.wire.pending else 0)
