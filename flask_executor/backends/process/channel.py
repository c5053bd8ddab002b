"""The sockets between a pool and a worker process, and what is written on them, byte by byte.

The sockets are pairs between a process and its children: nothing from outside is ever read from them. What is sent on
which is described in :mod:`~flask_executor.backends.process.protocol`.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import deque

from flask_executor.backends.process.protocol import FrameKind
from flask_executor.helpers.pickling import SMALL, CompactPickle, pickle_parts, total_size

_DONT_WAIT: int = getattr(socket, "MSG_DONTWAIT", 0)
_CALL_HEAD = struct.Struct("!QIQ")  # number, attempt, size
_MAX_KEPT_BUFFER = 4 * 1024 * 1024  # bytes of a buffer that is used again: to make one costs more than to fill it


def is_small(parts: list[bytes]) -> bool:
    """If true, a call fits into one packet."""
    return len(parts) == 1 and len(parts[0]) <= SMALL


class FrameStream:
    """One end of a stream of frames.

    No method waits for the other end, unless it is told to. One thread may send while another one receives; two that
    send need a lock.

    :param end: a connected stream socket.
    """

    _HEAD = struct.Struct("!QBQ")  # size of the body, kind, number
    _CHUNK = 64 * 1024  # bytes read at a time; more when a larger frame has begun

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._outgoing: deque[memoryview] = deque()
        #: Number of parts (of frames) that were sent in full.
        self.sent = 0
        self._buffer = bytearray(self._CHUNK)
        self._filled = 0  # bytes of the buffer that are the beginning of a frame

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self.socket.fileno()

    def send_message(self, message: CompactPickle) -> bool:
        """As :meth:`send`, of a message."""
        return self.send(FrameKind.MESSAGE, pickle_parts(message))

    def send(self, kind: int, body: list[bytes], number: int = 0) -> bool:
        """Send a frame, or as much of it as the socket has room for.

        :param number: the number of the call that it is about.
        :return: False if :meth:`flush` has to be called to send the rest.
        :raises OSError: when the other end is closed.
        """
        size = total_size(body)
        return self.send_parts([self._HEAD.pack(size, kind, number), *body], size)

    def send_parts(self, parts: list[bytes], size: int = 0) -> bool:
        """As :meth:`send`, of bytes that are no frame; the other end knows what to read when.

        :param size: total size of ``parts`` in bytes; small headers may be left out.
        """
        if size <= SMALL:
            parts = [b"".join(parts)]
        self._outgoing.extend(map(memoryview, parts))
        return self.flush()

    def flush(self, *, wait: bool = False) -> bool:
        """Send what there was no room for before.

        :param wait: if true, wait until there is room for all of it.
        :return: False if something is left over.
        :raises OSError: when the other end is closed.
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
        """Number of parts (of frames) that are not sent yet."""
        return len(self._outgoing)

    def receive(self) -> list[tuple[int, int, bytes]]:
        """The frames that have arrived: kind, number and body of each.

        :raises EOFError: when the other end is closed and everything was read.
        :raises BlockingIOError: when nothing has arrived.
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
        begin, filled, buffer, size = 0, self._filled, self._buffer, self._HEAD.size
        wanted = size
        while filled - begin >= size:
            length, kind, number = self._HEAD.unpack_from(buffer, begin)
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
        elif not rest and len(buffer) > _MAX_KEPT_BUFFER:
            self._buffer = bytearray(self._CHUNK)
        self._filled = rest
        return frames

    def close(self) -> None:
        """Close this end."""
        self.socket.close()


def packet_pair() -> tuple[socket.socket, socket.socket] | None:
    """A pair of packet sockets; None where the system has none, as macOS."""
    try:
        return socket.socketpair(type=socket.SOCK_SEQPACKET)
    except OSError:
        return None


class CallSender:
    """Sends calls to a worker, and recalls them.

    The parent has both ends of the packet sockets, and the system gives each packet to one reader only. So a call that
    the parent reads back was not begun, and will not be; and one that it cannot read back was read by the worker. There
    is nothing between.

    The bytes of a large call follow on the stream. Without packet sockets everything goes over the stream, and no call
    can be recalled.

    :param stream: the stream to this worker.
    :param packets: a pair of packet sockets, ours and the worker's, if there are any. The caller closes them.
    """

    def __init__(self, stream: FrameStream, packets: tuple[socket.socket, socket.socket] | None) -> None:
        self._stream = stream
        self._ours: socket.socket | None = None
        self._workers: socket.socket | None = None
        if packets is not None:
            self._ours, self._workers = packets

    def can_recall(self, parts: list[bytes]) -> bool:
        """If true, a call of these parts can be recalled."""
        return self._ours is not None and is_small(parts)

    def send(self, number: int, attempt: int, parts: list[bytes]) -> None:
        """Send a call, or as much of it as the sockets have room for.

        :param number: tells the calls of one worker apart; each is higher than the one before.
        :param attempt: the number of the attempt of its job.
        :param parts: from :func:`pickle_parts`.
        :raises BlockingIOError: when there is no room for a packet: more calls were sent than ever should be.
        :raises OSError: when the worker is gone.
        """
        size = total_size(parts)
        head = _CALL_HEAD.pack(number, attempt, size)
        if self._ours is None:
            self._stream.send_parts([head, *parts], size)
        elif is_small(parts):
            self._ours.send(head + parts[0], _DONT_WAIT)
        else:
            self._ours.send(head, _DONT_WAIT)
            self._stream.send_parts(parts, size)

    def recall(self) -> set[int]:
        """Read back the calls that the worker has not read.

        The bytes of a large call stay on the stream, so a large call may be recalled only after the worker
        has died.

        :return: their numbers. They need not be the last ones: the worker may read one while others are recalled.
        """
        numbers = set()
        if self._workers is not None:
            with contextlib.suppress(BlockingIOError):
                while packet := self._workers.recv(_CALL_HEAD.size, _DONT_WAIT):
                    numbers.add(_CALL_HEAD.unpack(packet)[0])
        return numbers

    def was_read(self, number: int) -> bool:
        """If true, the worker has read this call, and it can never be recalled."""
        if self._workers is None:
            return True
        try:
            packet = self._workers.recv(_CALL_HEAD.size, _DONT_WAIT | socket.MSG_PEEK)
        except BlockingIOError:  # it has read all
            return True
        return bool(packet) and bool(_CALL_HEAD.unpack(packet)[0] > number)

    def end(self) -> None:
        """Tell the worker that there will be no more calls.

        :raises OSError: when the worker is gone.
        """
        (self._ours or self._stream.socket).shutdown(socket.SHUT_WR)


class CallReceiver:
    """Reads the calls of a :class:`CallSender`, in the worker's main thread.

    :param stream: the worker's end of the stream.
    :param packets: the worker's packet socket, if there is one.
    """

    def __init__(self, stream: socket.socket, packets: socket.socket | None) -> None:
        self._stream = stream
        self._packets = packets
        self._buffer = bytearray()

    def next(self) -> tuple[int, int, bytes | memoryview]:
        """Wait for a call; once this has read one it has begun, and cannot be recalled.

        :return: its number, its attempt, and the call, which is valid until the next call of this method.
        :raises EOFError: when there will be no more.
        """
        if self._packets is None:
            number, attempt, size = _CALL_HEAD.unpack(self._read(_CALL_HEAD.size))
            return number, attempt, self._read(size)
        packet = self._packets.recv(_CALL_HEAD.size + SMALL)
        if not packet:
            raise EOFError
        number, attempt, size = _CALL_HEAD.unpack_from(packet)
        if len(packet) == _CALL_HEAD.size and size:
            return number, attempt, self._read(size)
        return number, attempt, memoryview(packet)[_CALL_HEAD.size :]

    def fileno(self) -> int:
        """The descriptor that is readable when there is a call, or there will be no more."""
        return (self._packets or self._stream).fileno()

    def _read(self, length: int) -> memoryview:
        if len(self._buffer) > max(length, _MAX_KEPT_BUFFER) or len(self._buffer) < length:
            self._buffer = bytearray(length)
        view, filled = memoryview(self._buffer)[:length], 0
        while filled < length:
            count = self._stream.recv_into(view[filled:])
            if not count:
                raise EOFError
            filled += count
        return view
