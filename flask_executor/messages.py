"""What a pool and its worker processes say to each other, and the wire they say it over.

A frame on the wire is a small message, pickled, and a payload of bytes that whoever passes it on does not look into:

.. code-block:: text

    | length of the message, 4 bytes | length of the payload, 8 bytes | message | payload |

Nothing that comes from outside is ever on these wires: they are socket pairs between a process and its children.
"""

from __future__ import annotations

import enum
import pickle
import socket
import struct
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from flask_executor.jobs import JobStatus

_PREFIX = struct.Struct("!IQ")
_CHUNK = 256 * 1024  # bytes read at a time
_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)


class Message:
    """A message; pickled as its class and its fields, which is half the work of pickling a dataclass."""

    __slots__: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), tuple(getattr(self, name) for name in self.__slots__)


#: Tokens: one for each call that is handed to a worker, on a line of their own. Whoever takes the token has the call.
RUN, VOID = b"r", b"v"


class Outcome(str, enum.Enum):
    """How a call ended in a worker process, and so what its payload is."""

    RESULT = "result"  # the result, pickled
    ERROR = "error"  # the error, from runner.pack_error()
    LEFT = "left"  # nothing: it left as it was asked to


# ---- to the worker ----


@dataclass(slots=True)
class Run(Message):
    """Run the call in the payload, if its token says so."""

    id: str
    attempt: int


@dataclass(slots=True)
class Leave(Message):
    """The job has to leave at its next checkpoint: STOPPED or TIMED_OUT."""

    id: str
    reason: JobStatus


# ---- from the worker ----


@dataclass(slots=True)
class Ready(Message):
    """The worker has its app, its initializers have run, and it waits for calls."""


@dataclass(slots=True)
class NotReady(Message):
    """The worker could not start and ends; the payload is an error, packed by the runner."""


@dataclass(slots=True)
class Progressed(Message):
    """How far the job is."""

    id: str
    progress: float | None
    message: str | None


@dataclass(slots=True)
class Noted(Message):
    """What else the job reports; the payload is a pickled dict, as its values may be of any class."""

    id: str


@dataclass(slots=True)
class Logged(Message):
    """A log record was made, by the job with this id or by none."""

    id: str | None
    record: Mapping[str, Any]


@dataclass(slots=True)
class Dropped(Message):
    """So many log records were made faster than they could be sent, and are gone."""

    count: int


@dataclass(slots=True)
class Ended(Message):
    """The job has ended, in this way; the payload is what came of it, packed by the runner."""

    id: str
    outcome: Outcome


@dataclass(slots=True)
class Card(Message):
    """What a job knows of itself; travels with its call."""

    id: str
    name: str
    key: Hashable | None
    owner: str | None


class Wire:
    """One end of a socket pair that carries frames. Never waits unless it is told to.

    Sending and receiving may be done by two threads, but only one of each at a time.
    """

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._outgoing: deque[memoryview] = deque()
        self._incoming = bytearray()
        self._wanted = _PREFIX.size  # bytes of _incoming before it is worth looking again

    def fileno(self) -> int:
        """The descriptor, to be selected on."""
        return self.socket.fileno()

    def send(self, message: Message, payload: bytes = b"") -> bool:
        """Send a frame, or as much of it as goes out without waiting; whether all of it is out."""
        head = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        prefix = _PREFIX.pack(len(head), len(payload))
        if len(payload) < 16384:
            self._outgoing.append(memoryview(prefix + head + payload))
        else:
            self._outgoing.extend((memoryview(prefix + head), memoryview(payload)))
        return self.flush()

    def flush(self, *, wait: bool = False) -> bool:
        """Send what is left over; whether all of it is out.

        :param wait: whether to wait for the other end to take it.
        :raises OSError: when the other end is gone.
        """
        outgoing, flags = self._outgoing, 0 if wait else _DONT_WAIT
        while outgoing:
            part = outgoing[0]
            try:
                sent = self.socket.send(part, flags)
            except BlockingIOError:
                return False
            if sent == len(part):
                outgoing.popleft()
            else:
                outgoing[0] = part[sent:]
        return True

    @property
    def pending(self) -> int:
        """How many frames, or parts of them, could not be sent yet."""
        return len(self._outgoing)

    def receive(self, *, wait: bool = False) -> list[tuple[Message, bytes]]:
        """The frames that have arrived.

        :param wait: whether to wait until there is something. What arrives then may be less than a frame.
        :raises EOFError: when the other end is gone, and nothing is left to be read.
        :raises BlockingIOError: when there is nothing.
        """
        incoming = self._incoming
        try:
            data = self.socket.recv(max(_CHUNK, self._wanted - len(incoming)), 0 if wait else _DONT_WAIT)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        if incoming:
            incoming += data
            if len(incoming) < self._wanted:
                return []
            data = bytes(incoming)
            incoming.clear()
        return self._frames(data)

    def _frames(self, data: bytes) -> list[tuple[Message, bytes]]:
        frames: list[tuple[Message, bytes]] = []
        begin, size = 0, len(data)
        self._wanted = _PREFIX.size
        view = memoryview(data)
        while size - begin >= _PREFIX.size:
            head, payload = _PREFIX.unpack_from(data, begin)
            middle = begin + _PREFIX.size + head
            end = middle + payload
            if end > size:
                self._wanted = end - begin
                break
            frames.append((pickle.loads(view[begin + _PREFIX.size : middle]), data[middle:end]))
            begin = end
        if begin < size:
            self._incoming += view[begin:]
        return frames

    def close(self) -> None:
        """Close this end."""
        self.socket.close()
