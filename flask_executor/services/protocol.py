"""What a follower and the leader say to each other, over a Unix socket.

One process of an app on a machine leads: it has the workers of the services. The others follow, and send it requests.

.. code-block:: text

    follower                                               leader
       │ ─── connect ──────────────────────────────────────> │
       │ <── WELCOME ─────────────────────────────────────── │  it has accepted the connection
       │                                                     │
       │  send: takes a credit from the service's window     │
       │ ─── 1 send ───────────────────────────────────────> │  queued for a worker
       │ ─── 2 send ───────────────────────────────────────> │  queued for a worker
       │  no credit left: what comes now waits in the follower, in its order
       │ <── CREDIT 2 ────────────────────────────────────── │  a worker has handled two messages
       │ ─── 3 send ───────────────────────────────────────> │
       │                                                     │
       │  call: needs no credit, but waits behind messages for the same service
       │ ─── 4 call ───────────────────────────────────────> │  queued for a worker (or ERROR 4: no room)
       │ <── ASSIGNED 4 ──────────────────────────────────── │  a worker gets it, and may begin at any time
       │ <── STARTED 4 ───────────────────────────────────── │  a worker has begun
       │ <── PROGRESS 4 ──────────────────────────────────── │
       │ <── RESULT 4, ERROR 4 or STOPPED 4 ──────────────── │
       │                                                     │
       │ ─── 5 send ───────────────────────────────────────> │  the leader is shutting down, and does not accept it
       │ <── GOAWAY 4 ────────────────────────────────────── │  4 was the last that it accepted
       │  takes 5 back, and sends no more                    │
       │ <── what is still to be answered ────────────────── │  the leader finishes what it accepted
       │ <── end of the stream ───────────────────────────── │
       │                                                     │
       │  resumed: the follower leads now, and its own workers get what waits; or it connects to the new leader,
       │  and sends that with full windows

**A leader that is killed** sends no GOAWAY. Messages that it has read are lost. Requests that were not written in full,
and calls that were not ASSIGNED, wait for the next leader. Other calls fail with :exc:`~flask_executor.WorkerLost`, as
nobody knows what has become of them.

**Flow control.** A follower has a window of :data:`~flask_executor.services.send_window.WINDOW_SIZE` messages for each
service, or ``max_pending`` if that is less: at most that many may be with the leader and not handled. So the leader
never refuses a ``send`` for want of room, and none overtakes another; it may refuse a ``call``.

**State and threads.** Requests are numbered as they are sent; a reply has the number of its request.

=============================== ================================== ===================================================
state                           owner                              threads
=============================== ================================== ===================================================
windows, calls that have not    ``LeaderClient._lock``             any thread queues and sends;
ended                                                              ``flask-executor-follower`` reads, and settles calls
connections, calls of each, the ``flask-executor-leader``          that thread accepts, reads, and queues for workers
last number accepted
what a connection has to send   ``FrameSender._lock``              in the leader the supervisor threads of the services
                                                                   send replies and credits
who leads, files, the server    ``LeaderElection._lock``           any thread; ``flask-executor-follower`` takes over
=============================== ================================== ===================================================
"""

from __future__ import annotations

import contextlib
import enum
import selectors
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flask_executor.backends.process.channel import FrameStream
from flask_executor.helpers.pickling import CompactPickle, pickle_parts
from flask_executor.jobs.packing import Outcome

#: Why no more messages are accepted.
CLOSED = "this executor was shut down in this process, and takes no more messages"


class Reply(enum.IntEnum):
    """The kind of a frame from the leader; its number is that of the request, unless something else is said."""

    RESULT = Outcome.RESULT
    ERROR = Outcome.ERROR
    STOPPED = Outcome.STOPPED
    PROGRESS = 3  # a ProgressReport, pickled
    ASSIGNED = 4  # nothing: a worker gets the call, and may begin at any time
    STARTED = 5  # nothing: a worker has begun with the call
    WELCOME = 6  # nothing: the leader reads what is sent from now on
    CREDIT = 7  # the name of a service; its field ``number`` says how many more messages may be sent to it
    GOAWAY = 8  # nothing: the leader accepts no request after the one with this number


#: What the leader is to do. The first four are accepted in their order, or not at all after GOAWAY; the next three are
#: about a call that was; ``confirm`` is answered when everything before it is accepted.
Operation = Literal["send", "broadcast", "call", "stop", "deliver", "request_stop", "kill", "confirm", "status"]


@dataclass(slots=True)
class Request(CompactPickle):
    """A request of a follower to the leader."""

    operation: Operation
    #: The name of the service.
    service: str
    #: Of the message.
    type: str = ""
    #: The message, packed: of the service, or (``deliver``) of the job.
    data: bytes = b""
    #: Of a call: the id of its job.
    job: str = ""


class FrameSender:
    """One end of a connection, that several threads send on and one reads from.

    :param wake: has that one call :meth:`flush` when the other end takes more.
    """

    def __init__(self, stream: FrameStream, wake: Callable[[], object]) -> None:
        self.stream = stream
        self._wake = wake
        self._lock = threading.Lock()

    def send(self, kind: int, body: list[bytes], number: int) -> int:
        """Send a frame; what does not go out at once follows. Never waits, and does nothing when the other end is gone.

        :return: what ``stream.sent`` is when all of it is out.
        """
        with self._lock:
            with contextlib.suppress(OSError):
                if not self.stream.send(kind, body, number):
                    self._wake()
            return self.stream.sent + self.stream.pending

    def request(self, request: Request, number: int) -> int:
        """As :meth:`send`, of a request."""
        return self.send(0, pickle_parts(request), number)

    @property
    def pending(self) -> bool:
        """If true, something is left to be sent."""
        return self.stream.pending > 0

    def flush(self) -> None:
        """Send what is left, as much as the other end takes."""
        with self._lock, contextlib.suppress(OSError):
            self.stream.flush()

    @property
    def events(self) -> int:
        """The events to wait for, as a mask for selectors."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.pending else 0)
