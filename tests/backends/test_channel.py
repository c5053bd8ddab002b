"""The lines between a pool and its workers."""

from __future__ import annotations

import contextlib
import pickle
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from flask_executor.backends.process.channel import CallReceiver, CallSender, FrameStream, is_small
from flask_executor.backends.process.dispatcher import _PREFETCH
from flask_executor.backends.process.protocol import FrameKind, StopJob, WorkerReady
from flask_executor.helpers.pickling import pickle_parts
from flask_executor.jobs.model import JobStatus


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def test_frames_arrive_whole_whatever_their_size(pair: tuple[socket.socket, socket.socket]) -> None:
    out, into = FrameStream(pair[0]), FrameStream(pair[1])
    chance = random.Random(3)
    bodies = [chance.randbytes(chance.choice((0, 1, 100, 16_383, 8_192, 65_536, 300_000))) for _ in range(60)]

    def send() -> None:
        for body in bodies:
            out.send(FrameKind.RESULT, [body[:10], body[10:]])
            out.flush(wait=True)
        pair[0].shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    arrived: list[bytes] = []
    while len(arrived) < len(bodies):
        with contextlib.suppress(BlockingIOError):
            arrived += [body for kind, _, body in into.receive() if kind == FrameKind.RESULT]
    sender.join()
    with pytest.raises(EOFError):
        into.receive()
    assert arrived == bodies


def test_what_does_not_fit_is_sent_later(pair: tuple[socket.socket, socket.socket]) -> None:
    out, into = FrameStream(pair[0]), FrameStream(pair[1])
    assert not out.send(FrameKind.RESULT, [b"x" * 5_000_000])
    assert out.pending
    out.send_message(WorkerReady())
    frames: list[tuple[int, int, bytes]] = []
    while len(frames) < 2:
        frames += into.receive()
        out.flush()
    assert [len(frames[0][2]), pickle.loads(frames[1][2])] == [5_000_000, WorkerReady()]
    assert not out.pending


def test_messages_are_what_they_were() -> None:
    for message in (WorkerReady(), StopJob("id", 2, JobStatus.STOPPED)):
        assert pickle.loads(b"".join(pickle_parts(message))) == message


class Line:
    """Both ends of a line for calls."""

    def __init__(self, packets: bool) -> None:
        self.here, self.there = socket.socketpair()
        pair = self.packets = socket.socketpair(type=socket.SOCK_SEQPACKET) if packets else None
        self.inside = pair[1].dup() if pair else None
        self.wire = FrameStream(self.here)
        self.calls = CallSender(self.wire, pair)
        self.number = self.taken = 0
        self.incoming = CallReceiver(self.there, self.inside)

    def give(self, value: object) -> None:
        self.number += 1
        self.calls.send(self.number, 3, pickle_parts(value))

    def take(self) -> object:
        flusher = threading.Thread(target=self.wire.flush, kwargs={"wait": True})
        flusher.start()
        self.taken, attempt, data = self.incoming.next()
        assert attempt == 3
        value = pickle.loads(data)
        flusher.join()
        return value

    def close(self) -> None:
        for end in (self.here, self.there, self.inside, *(self.packets or ())):
            if end is not None:
                end.close()


@pytest.fixture(params=[True, False], ids=["packets", "wire only"])
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    line = Line(request.param)
    yield line
    line.close()


SIZES = [0, 1, 16_000, 8_192, 17_000, 66_000, 300_000, 2_000_000]


def test_calls_of_every_size(line: Line) -> None:
    for size in SIZES * 2:
        line.give(b"x" * size)
        assert line.take() == b"x" * size
    line.calls.end()
    with pytest.raises(EOFError):
        line.incoming.next()


def test_small_is_what_goes_into_a_packet() -> None:
    assert is_small([b"x" * 8_192])
    assert not is_small([b"x" * 8_193])
    assert not is_small([b"x", b"y"])


def test_what_is_taken_back_does_not_arrive() -> None:
    line = Line(packets=True)
    try:
        for number in range(5):
            line.give(number)
        assert line.take() == 0
        assert line.take() == 1
        assert line.taken == 2
        assert line.calls.recall() == {3, 4, 5}
        assert line.calls.recall() == set()
        line.give("last")
        assert line.take() == "last"
        assert line.calls.can_recall(pickle_parts("small"))
        assert not line.calls.can_recall(pickle_parts("large" + "x" * 100_000))
    finally:
        line.close()


def test_nothing_can_be_taken_back_without_packets() -> None:
    line = Line(packets=False)
    try:
        line.give(1)
        assert line.calls.recall() == set()
        assert line.take() == 1
    finally:
        line.close()


def test_what_a_worker_is_given_at_most_fits_into_the_line() -> None:
    line = Line(packets=True)
    try:
        for _ in range(1 + _PREFETCH):
            line.calls.send(1, 1, [b"x" * 8_192])
    finally:
        line.close()
