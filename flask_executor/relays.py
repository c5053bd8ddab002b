"""A process that follows, and sends its messages for services to the one that leads."""

from __future__ import annotations

import contextlib
import pickle
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from operator import itemgetter

from flask_executor.abc import Backend, PreparedCall
from flask_executor.errands import WELCOME, Errand, Leader, Talk
from flask_executor.exceptions import ExecutorShutdown, QueueFull, WorkerLost
from flask_executor.inherited import not_for_children
from flask_executor.jobs import JobMessage, JobStatus
from flask_executor.lines import Wire, pickle_parts
from flask_executor.logs import logger
from flask_executor.messages import Kind
from flask_executor.runner import settle_packed, unpack_error
from flask_executor.serial import SerialThread

_MOST_UNSENT = 1000  # frames that the leader has not read, before others wait here
_MOST_WAITING = 100_000  # messages that wait here
_AGAIN = 0.05  # seconds after which the leader is asked again to do what it has given back


@dataclass(slots=True)
class SentCall:
    """A call that the leader has."""

    call: PreparedCall
    #: Whether a worker has begun with it, and its future is claimed.
    begun: bool = False
    #: Whether it was to be ended by force.
    forced: bool = False

    def begin(self) -> bool:
        """A worker begins with it, or has; False when it was cancelled."""
        self.begun = self.begun or self.call.begin()
        return self.begun


class Relay(Backend):
    """What a process that follows has to say to the leader; a backend for the calls of services.

    Everything is changed under ``_lock``. A call or message has a number, by which it is told again, and keeps its
    place, when the leader gives it back. It is in ``_waiting`` (a heap) or sent; a call that was sent is in ``_sent``
    until it ends. When this process leads itself, ``_here`` is where they go at once.
    """

    remote = True
    supports_kill = True

    def __init__(self) -> None:
        self.callbacks = SerialThread("flask-executor-callbacks")
        self._lock = threading.RLock()
        self._emptied = threading.Condition(self._lock)
        self._talk: Talk | None = None
        self._here: Leader | None = None
        self._waiting: list[tuple[int, PreparedCall | Errand]] = []
        self._sent: dict[int, SentCall] = {}
        self._numbers = count(1)
        self._question: int | None = None  # the number of one that the leader has not answered
        self._not_before = 0.0  # when to send again what came back (monotonic)
        self._wakes, self._wake_up = map(not_for_children, socket.socketpair())
        self._wake_up.setblocking(False)
        self._closed = False

    # ---- any thread ----

    def enqueue(self, call: PreparedCall) -> None:
        self._put(call)

    def post(self, errand: Errand) -> None:
        """Send a message that nobody waits for.

        :raises QueueFull: when too many wait for a leader.
        """
        self._put(errand)

    def _put(self, item: PreparedCall | Errand) -> None:
        with self._lock:
            if self._closed:
                raise ExecutorShutdown("this executor was shut down in this process, and takes no more messages")
            if self._here is not None:
                _do_here(item, self._here)
                return
            if len(self._waiting) >= _MOST_WAITING:
                raise QueueFull("the way to the process that leads", _MOST_WAITING)
            heappush(self._waiting, (next(self._numbers), item))
            self._send_waiting()

    def _send_waiting(self) -> None:
        """Send what waits, as long as the leader reads it."""
        talk = self._talk
        if talk is None or time.monotonic() < self._not_before:
            return
        while self._waiting and talk.wire.pending < _MOST_UNSENT:
            number, item = heappop(self._waiting)
            if not isinstance(item, Errand):
                self._sent[number] = SentCall(item)
                item = Errand("call", *item.args)
            talk.send(Kind.MESSAGE, pickle_parts(item), number)

    def withdraw(self, call: PreparedCall) -> bool:
        with self._lock:
            waiting = [(number, item) for number, item in self._waiting if item is not call]
            if len(waiting) < len(self._waiting):
                heapify(waiting)
                self._waiting = waiting
                return True
            number, sent = self._find(call)
            if sent is None:
                return True
            if not sent.begun:
                self._tell("leave", number, sent)
                del self._sent[number]
            return not sent.begun

    def leave(self, call: PreparedCall, attempt: int, reason: JobStatus) -> None:
        with self._lock:
            number, sent = self._find(call)
            if sent is not None:
                self._tell("leave", number, sent)

    def kill(self, call: PreparedCall, attempt: int) -> None:
        with self._lock:
            number, sent = self._find(call)
            if sent is not None:
                sent.forced = True
                self._tell("kill", number, sent)

    def _find(self, call: PreparedCall) -> tuple[int, SentCall | None]:
        return next(((number, sent) for number, sent in self._sent.items() if sent.call is call), (0, None))

    def _tell(self, verb: str, number: int, sent: SentCall) -> None:
        if self._talk is not None:
            errand = Errand(verb, sent.call.args[0], "", b"")
            self._talk.send(Kind.MESSAGE, pickle_parts(errand), number)

    def deliver(self, call: PreparedCall, message: JobMessage) -> None:
        raise RuntimeError("messages cannot be sent to a call of a service that another process looks after")

    def aside(self, fn: Callable[[], object]) -> None:
        self.callbacks.run(fn)

    @property
    def workers(self) -> int:
        return 0

    @property
    def capacity(self) -> int | None:
        return None

    def wake(self) -> None:
        """Have the thread look at everything."""
        with contextlib.suppress(OSError):
            self._wake_up.send(b"w")

    def drain(self, timeout: float) -> None:
        """Wait until the leader has got all, and has answered; at most so many seconds."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while self._emptied.wait_for(self._is_empty, max(0.0, deadline - time.monotonic())) and self._talk:
                # The last messages may be given back yet: an answer to this comes behind them.
                number = self._question = next(self._numbers)
                self._talk.send(Kind.MESSAGE, pickle_parts(Errand("ready", "", "", b"")), number)
                self._emptied.wait_for(lambda: self._question is None, max(0.0, deadline - time.monotonic()))
                if self._is_empty() or time.monotonic() > deadline:
                    return

    def _is_empty(self) -> bool:
        return not (self._sent or self._waiting)

    def end(self) -> None:
        """Take in nothing more, and have the thread end."""
        with self._lock:
            self._closed = True
        self.wake()

    def close(self) -> None:
        """Give up what was not sent, and close what is open. The thread has ended."""
        with self._lock:
            items = [item for _, item in self._waiting]
            self._waiting.clear()
        messages = sum(isinstance(item, Errand) for item in items)
        if messages:
            logger.error("%d messages for services are lost, as the process ended.", messages)
        for item in items:
            if not isinstance(item, Errand) and item.begin():
                item.fail(WorkerLost(f"The process ended before service {item.args[0]!r} was asked."), JobStatus.LOST)
        self.callbacks.close(wait=False)
        self._wakes.close()
        self._wake_up.close()

    # ---- the thread ----

    def serve(self, wire: Wire) -> None:
        """Talk to the leader, until it is gone."""
        talk = Talk(wire, self.wake)
        ended = False
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(wire, selectors.EVENT_READ)
                selector.register(self._wakes, selectors.EVENT_READ)
                while not self._closed:
                    selector.modify(wire, talk.events())
                    for key, events in selector.select(_AGAIN if self._waiting else None):
                        if key.fileobj is self._wakes:
                            self._wakes.recv(4096)
                        elif events & selectors.EVENT_WRITE:
                            talk.flush()
                        if key.fileobj is wire and events & selectors.EVENT_READ:
                            ended = self._read(talk) or ended
                    with self._lock:
                        self._send_waiting()
                        self._emptied.notify_all()
                    if ended and not wire.pending:
                        wire.socket.shutdown(socket.SHUT_WR)  # that was all
        except (EOFError, OSError):  # it is gone
            pass
        finally:
            self._hang_up()
            wire.close()

    def _read(self, talk: Talk) -> bool:
        """Hear what the leader says; whether it is ending."""
        ended = False
        with contextlib.suppress(BlockingIOError):
            for kind, number, body in talk.wire.receive():
                if number == WELCOME:
                    with self._lock:
                        self._talk = talk
                elif kind == Kind.MESSAGE:
                    ended = self._given_back(number, pickle.loads(body)) or ended
                else:
                    self._hear_of(number, kind, body)
        return ended

    def _hear_of(self, number: int, kind: int, body: bytes) -> None:
        with self._lock:
            if number == self._question:
                self._question = None
            sent = self._sent.get(number)
            if sent is None or not sent.begin():  # it was cancelled
                self._sent.pop(number, None)
                return
            if kind == Kind.BEGUN:
                return
            del self._sent[number]
        try:
            _settle(sent, kind, body)
        except BaseException as error:  # also SystemExit: it is not meant for this thread
            logger.exception("Job %s could not be settled.", sent.call.job.id)
            with contextlib.suppress(Exception):
                sent.call.fail(error)

    def _given_back(self, number: int, errand: Errand) -> bool:
        """The leader does this not now; whether it does nothing any more."""
        with self._lock:
            self._not_before = time.monotonic() + _AGAIN
            sent = self._sent.pop(number, None)
            if errand.verb == "close":
                self._talk = None
            elif errand.verb in ("send", "broadcast"):
                heappush(self._waiting, (number, errand))
            elif sent is not None:
                heappush(self._waiting, (number, sent.call))
        return errand.verb == "close"

    def _hang_up(self) -> None:
        with self._lock:
            self._talk = self._question = None
            self._not_before = 0.0
            sent = list(self._sent.values())
            for number, one in self._sent.items():
                if not one.begun:
                    heappush(self._waiting, (number, one.call))
            self._sent.clear()
            self._emptied.notify_all()
        for one in sent:
            if one.begun:
                error = WorkerLost(f"The process ended that looked after service {one.call.args[0]!r}.")
                one.call.fail(error, JobStatus.LOST)

    def lead(self, leader: Leader) -> None:
        """This process leads now: what waits is for its own workers, and so is what comes."""
        with self._lock:
            for _, item in sorted(self._waiting, key=itemgetter(0)):
                try:
                    _do_here(item, leader)
                except Exception as error:
                    if isinstance(item, Errand):
                        logger.error("A message for service %r is lost: %s", item.service, error)
                    elif item.begin():
                        item.fail(error)
            self._waiting.clear()
            self._here = leader
            self._emptied.notify_all()


def _do_here(item: PreparedCall | Errand, leader: Leader) -> None:
    workforce = leader.crew(item.service if isinstance(item, Errand) else item.args[0])
    if not isinstance(item, Errand):
        workforce.adopt(item)
    elif item.verb == "send":
        workforce.send(item.type, item.data, anyway=True)
    else:
        workforce.broadcast(item.type, item.data)


def _settle(sent: SentCall, kind: int, body: bytes) -> None:
    call = sent.call
    if kind == Kind.LEFT:
        call.left(forced=sent.forced)
    elif kind == Kind.ERROR:
        error = unpack_error(body)
        call.fail(error, JobStatus.LOST if isinstance(error, WorkerLost) else JobStatus.FAILED)
    else:
        settle_packed(call, kind, body)
