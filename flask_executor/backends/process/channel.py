"""The lines between a pool and a worker process: all there is of sockets and framing.

Nothing that comes from outside is ever on these lines, which are socket pairs between a process and its children.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import deque

from flask_executor.backends.process.protocol import FrameKind
from flask_executor.helpers.pickling import _SMALL, CompactPickle, _size, pickle_parts

_DONT_WAIT: int = getattr(socket, "MSG_DONTWAIT", 0)
_HEAD = struct.Struct("!QIQ")  # of a call: its number, its attempt, its length
_KEEP = 4 * 1024 * 1024  # bytes of a buffer that is kept for the next; making one anew costs more than filling it


def is_small(parts: list[bytes]) -> bool:
    """Whether a call goes into one packet."""
    return len(parts) == 1 and len(parts[0]) <= _SMALL


class FrameStream:
    """One end of a stream of frames: the length of the body (8 bytes), its kind (1), a number (8), the body.

    Never waits unless it is told to. Sending and receiving may be done by two threads, but only one of each at a time.
    """

    _PREFIX = struct.Struct("!QBQ")
    _CHUNK = 64 * 1024  # bytes read at a time, or more when more is known to come

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._outgoing: deque[memoryview] = deque()
        #: How many frames, or parts of them, were sent in full.
        self.sent = 0
        self._buffer = bytearray(self._CHUNK)
        self._filled = 0  # bytes of the buffer that have arrived and were not given out

    def fileno(self) -> int:
        """The descriptor, to be selected on."""
        return self.socket.fileno()

    def send_message(self, message: CompactPickle) -> bool:
        """Send a message, or as much of it as goes out without waiting; whether all is out."""
        return self.send(FrameKind.MESSAGE, pickle_parts(message))

    def send(self, kind: int, body: list[bytes], number: int = 0) -> bool:
        """Send a frame, or as much of it as goes out without waiting; whether all is out.

        :param number: of the call that this is about.
        :raises OSError: when the other end is gone.
        """
        size = _size(body)
        return self.send_parts([self._PREFIX.pack(size, kind, number), *body], size)

    def send_parts(self, parts: list[bytes], size: int = 0) -> bool:
        """Send bytes, of about this size; the other end knows what they are."""
        if size <= _SMALL:
            parts = [b"".join(parts)]
        self._outgoing.extend(map(memoryview, parts))
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
                self.sent += 1
            else:
                outgoing[0] = part[sent:]
        return True

    @property
    def pending(self) -> int:
        """How many frames, or parts of them, could not be sent yet."""
        return len(self._outgoing)

    def receive(self) -> list[tuple[int, int, bytes]]:
        """The frames that have arrived, without waiting: their kinds, numbers and bodies.

        :raises EOFError: when the other end is gone, and nothing is left to be read.
        :raises BlockingIOError: when there is nothing.
        """
        try:
            count = self.socket.recv_into(memoryview(self._buffer)[self._filled :], 0, _DONT_WAIT)
        except ConnectionError:
            count = 0
        if not count:
            raise EOFError
        self._filled += count
        return self._frames()

    def _frames(self) -> list[tuple[int, int, bytes]]:
        frames: list[tuple[int, int, bytes]] = []
        begin, filled, buffer, size = 0, self._filled, self._buffer, self._PREFIX.size
        wanted = size
        while filled - begin >= size:
            length, kind, number = self._PREFIX.unpack_from(buffer, begin)
            wanted = size + length
            end = begin + wanted
            if end > filled:
                break
            frames.append((kind, number, bytes(memoryview(buffer)[begin + size : end])))
            begin, wanted = end, size
        rest = filled - begin
        if wanted > len(buffer):
            self._buffer = bytearray(wanted)
            self._buffer[:rest] = memoryview(buffer)[begin:filled]
        elif rest and begin:
            buffer[:rest] = buffer[begin:filled]
        elif not rest and len(buffer) > _KEEP:
            self._buffer = bytearray(self._CHUNK)
        self._filled = rest
        return frames

    def close(self) -> None:
        """Close this end."""
        self.socket.close()


def packet_pair() -> tuple[socket.socket, socket.socket] | None:
    """Both ends of a line for packets; None where the system has none, as macOS."""
    try:
        return socket.socketpair(type=socket.SOCK_SEQPACKET)
    except OSError:
        return None


class CallSender:
    """Takes calls to a worker: the end in the parent.

    Calls are packets, and the system gives each packet to one reader only. So a call that the parent can read back
    was not begun, and will not be; and one that it cannot was taken by the worker. There is nothing between.

    What is too large for a packet goes over the wire, and its packet only says so. Where there are no packets all goes
    over the wire and nothing can be taken back.

    :param stream: the stream to this worker.
    :param packets: both ends of the line for packets, None where there is none; they are closed with this.
    """

    def __init__(self, stream: FrameStream, packets: tuple[socket.socket, socket.socket] | None) -> None:
        self._stream = stream
        self._here: socket.socket | None = None
        self._there: socket.socket | None = None
        if packets is not None:
            self._here, self._there = packets

    def can_recall(self, parts: list[bytes]) -> bool:
        """Whether a call like this can be taken back: it fits into a packet."""
        return self._here is not None and is_small(parts)

    def send(self, number: int, attempt: int, parts: list[bytes]) -> None:
        """Send a call, or as much of it as goes out without waiting.

        :param number: tells the calls of one line apart.
        :param attempt: which attempt of its job this is.
        :param parts: from :func:`pickle_parts`.
        :raises OSError: when the worker is gone, or does not read (and was given more than it is ever to be given).
        """
        size = _size(parts)
        head = _HEAD.pack(number, attempt, size)
        if self._here is None:
            self._stream.send_parts([head, *parts], size)
        elif is_small(parts):
            self._here.send(head + parts[0], _DONT_WAIT)
        else:
            self._here.send(head, _DONT_WAIT)
            self._stream.send_parts(parts, size)

    def recall(self) -> set[int]:
        """Read back the calls that the worker has not begun; their numbers.

        They need not be the last that it was given: it may take one while others are taken back. The bytes of a large
        one stay on the wire; only a worker that is dead may be treated so.
        """
        numbers = set()
        if self._there is not None:
            with contextlib.suppress(BlockingIOError):
                while packet := self._there.recv(_HEAD.size, _DONT_WAIT):
                    numbers.add(_HEAD.unpack(packet)[0])
        return numbers

    def was_read(self, number: int) -> bool:
        """Whether the worker has begun with a call that it was given, so that it cannot be taken back."""
        if self._there is None:
            return True
        try:
            packet = self._there.recv(_HEAD.size, _DONT_WAIT | socket.MSG_PEEK)
        except BlockingIOError:  # there is none that it has not
            return True
        return bool(packet) and bool(_HEAD.unpack(packet)[0] > number)

    def end(self) -> None:
        """There will be no more calls.

        :raises OSError: when the worker is gone.
        """
        (self._here or self._stream.socket).shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close both ends of the line for packets."""
        if self._here is not None and self._there is not None:
            self._here.close()
            self._there.close()


class CallReceiver:
    """The end of :class:`CallSender` in the worker."""

    def __init__(self, stream: socket.socket, packets: socket.socket | None) -> None:
        self._stream = stream
        self._packets = packets
        self._buffer = bytearray()

    def next(self) -> tuple[int, int, bytes | memoryview]:
        """Wait for a call, which from then on has begun: its number, its attempt, and the call.

        What it gives is good until the next one is waited for.

        :raises EOFError: when there will be no more.
        """
        if self._packets is None:
            number, attempt, size = _HEAD.unpack(self._read(_HEAD.size))
            return number, attempt, self._read(size)
        packet = self._packets.recv(_HEAD.size + _SMALL)
        if not packet:
            raise EOFError
        number, attempt, size = _HEAD.unpack_from(packet)
        if len(packet) == _HEAD.size and size:
            return number, attempt, self._read(size)
        return number, attempt, memoryview(packet)[_HEAD.size :]

    def fileno(self) -> int:
        """What is readable when there is a call, or there will be no more."""
        return (self._packets or self._stream).fileno()

    def _read(self, length: int) -> memoryview:
        if len(self._buffer) > max(length, _KEEP) or len(self._buffer) < length:
            self._buffer = bytearray(length)
        view, filled = memoryview(self._buffer)[:length], 0
        while filled < length:
            count = self._stream.recv_into(view[filled:])
            if not count:
                raise EOFError
            filled += count
        return view
