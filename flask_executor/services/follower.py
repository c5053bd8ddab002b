"""A process that follows, and sends its messages for services to the one that leads."""

from __future__ import annotations

import contextlib
import math
import pickle
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain, count
from operator import itemgetter
from types import MappingProxyType

from flask_executor.abc import Backend
from flask_executor.backends.process.after_fork import close_in_child
from flask_executor.backends.process.channel import FrameStream
from flask_executor.backends.process.protocol import ProgressReport
from flask_executor.exceptions import ExecutorShutdown, QueueFull, WorkerLost
from flask_executor.helpers.log import logger
from flask_executor.helpers.pickling import pickle_parts
from flask_executor.helpers.serial_thread import SerialThread
from flask_executor.jobs.call import Call
from flask_executor.jobs.model import JobMessage, JobStatus
from flask_executor.jobs.packing import pickle_or_explain, settle_from_bytes, unpack_error, unpack_meta
from flask_executor.services.protocol import SHUT, WELCOME, Errand, Leader, RelayFrame, StopCall, Talk

_MOST_WAITING = 100_000  # messages for a service that wait here
_PAUSES = 0.005, 0.1  # seconds after which the leader is asked again to do what it has given back: at first, at most
_FEW = 16  # of that are sent at first, and twice as many after each pause in which nothing comes back

Item = Call | Errand


class Line:
    """What waits for one service, in its order. Everything happens under the lock of the relay.

    When the leader gives something back it also gives back all that comes behind it, until it is asked again; what it
    answers then comes behind all that it has given back, so that nothing overtakes anything.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, Item]] = []
        self._held = False
        #: The number of the question whether to go on.
        self.question: int | None = None
        self._due = 0.0  # when to ask it, or when more may be sent (monotonic)
        self._pause = _PAUSES[0]
        self._trial: int | None = None  # the number of the first item that was sent after the last question
        self._most = self._left = math.inf  # how many may be sent until then

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def first(self) -> int:
        """The number of the first item."""
        return self._heap[0][0]

    def items(self) -> list[tuple[int, Item]]:
        """All that waits, in order."""
        return sorted(self._heap, key=itemgetter(0))

    def push(self, number: int, item: Item) -> None:
        """Put an item where its number belongs."""
        heappush(self._heap, (number, item))

    def pop(self) -> tuple[int, Item]:
        """Take out the first item."""
        self._left -= 1
        number, item = heappop(self._heap)
        if self._trial is None:
            self._trial = number
        if not self._heap:
            self._most = self._left = math.inf
        return number, item

    def remove(self, item: Item) -> bool:
        """Take out this item; False when it is not here."""
        there = [entry for entry in self._heap if entry[1] is not item]
        found = len(there) < len(self._heap)
        if found:
            heapify(there)
            self._heap = there
        return found

    def clear(self) -> None:
        """Take out all."""
        self._heap.clear()

    def hold(self, number: int) -> None:
        """The leader has given something back, with this number."""
        if not self._held:
            self._held = True
            first, longest = _PAUSES
            self._pause = min(2 * self._pause, longest) if number == self._trial else first  # or it took some
            self._due = time.monotonic() + self._pause

    def is_due(self, now: float) -> bool:
        """Whether to ask now whether to go on."""
        return self._held and self.question is None and now >= self._due

    def go_on(self) -> None:
        """The leader has answered, and has given back all that it does."""
        self._held, self.question, self._trial = False, None, None
        self._most = self._left = _FEW
        self._due = time.monotonic() + self._pause

    def reset(self) -> None:
        """There is another leader to come."""
        self._held, self.question = False, None
        self._most = self._left = math.inf

    def may_send(self, now: float) -> bool:
        """Whether the first item may be sent, if there is one."""
        if self._held or not self._heap:
            return False
        if self._left <= 0 and now >= self._due:
            self._most *= 2
            self._left, self._due = self._most, now + self._pause
        return self._left > 0

    def patience(self, now: float) -> float | None:
        """Seconds until something is due; None while there is no need."""
        if not self._heap or self.question is not None or not (self._held or self._left <= 0):
            return None
        return max(0.0, self._due - now)


@dataclass(slots=True)
class SentCall:
    """A call that the leader has."""

    call: Call
    #: Whether a worker has got it, and may have begun with it.
    given: bool = False
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
    place, when the leader gives it back. It is in one of the ``_lines`` or sent; a call that was sent is in ``_sent``
    until it ends. When this process leads itself, ``_here`` gives where they go at once.
    """

    remote = True
    supports_kill = True

    def __init__(self) -> None:
        self.callbacks = SerialThread("flask-executor-callbacks")
        self._lock = threading.RLock()
        self._emptied = threading.Condition(self._lock)
        self._talk: Talk | None = None
        self._here: Callable[[], Leader | None] | None = None
        self._lines: dict[str, Line] = {}
        self._sent: dict[int, SentCall] = {}
        self._mail: dict[str, list[bytes]] = {}  # for jobs, by their ids, that have not begun
        self._last: tuple[int, int, Errand] | None = None  # the last message: its end on the wire, and its number
        self._numbers = count(1)
        self._question: int | None = None  # the number of one that the leader has not answered
        self._wakes, self._wake_up = map(close_in_child, socket.socketpair())
        self._wake_up.setblocking(False)
        self._closed = False

    # ---- any thread ----

    def enqueue(self, call: Call) -> None:
        self._put(call)

    def post(self, errand: Errand) -> None:
        """Send a message that nobody waits for.

        :raises QueueFull: when too many wait for a leader.
        """
        self._put(errand)

    def _put(self, item: Item) -> None:
        with self._lock:
            if self._closed:
                raise ExecutorShutdown(SHUT)
            if self._here is not None:
                leader = self._here()
                if leader is None:
                    raise ExecutorShutdown(SHUT)
                _do_here(item, leader)
                return
            line = self._line(_service_of(item))
            if len(line) >= _MOST_WAITING:
                raise QueueFull("the way to the process that leads", _MOST_WAITING)
            line.push(next(self._numbers), item)
            self._send_waiting()
            if line.patience(0.0) is not None:
                self.wake()

    def _line(self, service: str) -> Line:
        line = self._lines.get(service)
        if line is None:
            line = self._lines[service] = Line()
        return line

    def _send_waiting(self) -> None:
        """Send what waits, as long as the leader reads it."""
        talk = self._talk
        if talk is None:
            return
        now = time.monotonic()
        for service, line in list(self._lines.items()):
            if line.is_due(now):
                line.question = next(self._numbers)
                talk.send(RelayFrame.MESSAGE, pickle_parts(Errand("again", service)), line.question)
        while not talk.wire.pending:
            ready = [line for line in self._lines.values() if line.may_send(now)]
            if not ready:
                return
            self._send(talk, *min(ready, key=lambda line: line.first).pop())

    def _send(self, talk: Talk, number: int, item: Item) -> None:
        if isinstance(item, Errand):
            self._last = talk.send(RelayFrame.MESSAGE, pickle_parts(item), number), number, item
            return
        sent = self._sent[number] = SentCall(item)
        verb = "stop" if isinstance(item, StopCall) else "call"
        service, type, data = item.args
        talk.send(RelayFrame.MESSAGE, pickle_parts(Errand(verb, service, type, data, item.job.id)), number)
        for mail in self._mail.get(item.job.id, ()):
            self._tell("tell", number, sent, mail)

    def withdraw(self, call: Call) -> bool:
        with self._lock:
            if call.backend is self or call.backend is None:
                if self._line(call.args[0]).remove(call):
                    self._mail.pop(call.job.id, None)
                    return True
                number, sent = self._find(call)
                if sent is None:
                    return True
                if not sent.begun:
                    self._tell("leave", number, sent)
                    self._forget(number)
                return not sent.begun
        return call.backend.withdraw(call)  # this process leads since

    def request_stop(self, call: Call, attempt: int, reason: JobStatus) -> None:
        with self._lock:
            number, sent = self._find(call)
            if sent is not None:
                self._tell("leave", number, sent)

    def kill(self, call: Call, attempt: int) -> None:
        with self._lock:
            number, sent = self._find(call)
            if sent is not None:
                sent.forced = True
                self._tell("kill", number, sent)

    def _find(self, call: Call) -> tuple[int, SentCall | None]:
        return next(((number, sent) for number, sent in self._sent.items() if sent.call is call), (0, None))

    def _tell(self, verb: str, number: int, sent: SentCall, data: bytes = b"") -> None:
        if self._talk is not None:
            errand = Errand(verb, sent.call.args[0], data=data)
            self._talk.send(RelayFrame.MESSAGE, pickle_parts(errand), number)

    def _forget(self, number: int) -> SentCall | None:
        sent = self._sent.pop(number, None)
        if sent is not None:
            self._mail.pop(sent.call.job.id, None)
        return sent

    def deliver(self, call: Call, message: JobMessage) -> None:
        with self._lock:
            if call.backend is self or call.backend is None:
                data = b"".join(pickle_or_explain(message, f"The message for job {call.job.name}"))
                number, sent = self._find(call)
                if sent is not None:
                    self._tell("tell", number, sent, data)
                if sent is None or not sent.begun:  # it is told again with the call, if that is sent (again)
                    self._mail.setdefault(call.job.id, []).append(data)
                return
        call.backend.deliver(call, message)  # this process leads since

    def run_user_code(self, fn: Callable[[], object]) -> None:
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
                self._talk.send(RelayFrame.MESSAGE, pickle_parts(Errand("ready", "", "", b"")), number)
                self._emptied.wait_for(lambda: self._question is None, max(0.0, deadline - time.monotonic()))
                if self._is_empty() or time.monotonic() > deadline:
                    return

    def _is_empty(self) -> bool:
        return not (self._sent or self._waits)

    @property
    def _waits(self) -> bool:
        return any(map(len, self._lines.values()))

    def _patience(self) -> float | None:
        now = time.monotonic()
        with self._lock:
            return min((due for line in self._lines.values() if (due := line.patience(now)) is not None), default=None)

    def _all_items(self) -> list[tuple[int, Item]]:
        return sorted(chain.from_iterable(line.items() for line in self._lines.values()), key=itemgetter(0))

    def end(self) -> None:
        """Take in nothing more, and have the thread end."""
        with self._lock:
            self._closed = True
        self.wake()

    def close(self) -> None:
        """Give up what was not sent, and close what is open. The thread has ended."""
        with self._lock:
            items = [item for _, item in self._all_items()]
            self._lines.clear()
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

    def serve(self, wire: FrameStream) -> None:
        """Talk to the leader, until it is gone."""
        talk = Talk(wire, self.wake)
        ended = False
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(wire, selectors.EVENT_READ)
                selector.register(self._wakes, selectors.EVENT_READ)
                while not self._closed:
                    selector.modify(wire, talk.events())
                    for key, events in selector.select(self._patience()):
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
            self._hang_up(talk)
            wire.close()

    def _read(self, talk: Talk) -> bool:
        """Hear what the leader says; whether it is ending."""
        ended = False
        with contextlib.suppress(BlockingIOError):
            for kind, number, body in talk.wire.receive():
                if number == WELCOME:
                    with self._lock:
                        self._talk = talk
                elif kind == RelayFrame.MESSAGE:
                    message = pickle.loads(body)
                    if isinstance(message, ProgressReport):
                        self._progressed(number, message)
                    else:
                        ended = self._given_back(number, message) or ended
                else:
                    self._hear_of(number, kind, body)
        return ended

    def _progressed(self, number: int, message: ProgressReport) -> None:
        sent = self._sent.get(number)
        if sent is not None and sent.begun:
            job = sent.call.job
            job.progress, job.message = message.progress, message.message
            if message.meta is not None:
                job.meta = unpack_meta(message.meta)
            sent.call.progressed()

    def _hear_of(self, number: int, kind: int, body: bytes) -> None:
        with self._lock:
            if number == self._question:
                self._question = None
            for line in self._lines.values():
                if number == line.question:
                    line.go_on()
            sent = self._sent.get(number)
            if kind == RelayFrame.GIVEN:
                if sent is not None:
                    sent.given = True
                return
            if sent is None or not sent.begin():  # it was cancelled
                self._forget(number)
                return
            if kind == RelayFrame.BEGUN:
                self._mail.pop(sent.call.job.id, None)
                return
            self._forget(number)
        try:
            _settle(sent, kind, body)
        except BaseException as error:  # also SystemExit: it is not meant for this thread
            logger.exception("Job %s could not be settled.", sent.call.job.id)
            with contextlib.suppress(Exception):
                sent.call.fail(error)

    def _given_back(self, number: int, errand: Errand) -> bool:
        """The leader does this not now; whether it does nothing any more."""
        with self._lock:
            if errand.verb == "close":
                self._talk = None
                return True
            item: Item | None = errand
            if errand.verb in ("call", "stop"):
                sent = self._sent.pop(number, None)
                item = None if sent is None else sent.call
            line = self._line(errand.service)
            if item is not None:
                line.push(number, item)
            line.hold(number)
        return False

    def _hang_up(self, talk: Talk) -> None:
        with self._lock:
            self._talk = self._question = None
            for line in self._lines.values():
                line.reset()
            if self._last is not None:
                end, number, errand = self._last
                if talk.wire.sent < end:  # not all of it was sent
                    self._line(errand.service).push(number, errand)
                self._last = None
            sent = list(self._sent.values())
            for number, one in self._sent.items():
                if not one.given and not one.begun:
                    self._line(one.call.args[0]).push(number, one.call)
            self._sent.clear()
            self._emptied.notify_all()
        for one in sent:
            if (one.given or one.begun) and one.begin():
                error = WorkerLost(f"The process ended that looked after service {one.call.args[0]!r}.")
                one.call.fail(error, JobStatus.LOST)

    def lead(self, leader: Leader) -> None:
        """This process leads now: what waits is for its own workers, and so is what comes."""
        with self._lock:
            for _, item in self._all_items():
                try:
                    _do_here(item, leader, self._mail)
                except Exception as error:
                    if isinstance(item, Errand):
                        logger.error("A message for service %r is lost: %s", item.service, error)
                    elif item.begin():
                        item.fail(error)
            self._lines.clear()
            self._mail.clear()
            self._here = weakref.ref(leader)
            self._emptied.notify_all()


def _service_of(item: Item) -> str:
    return item.service if isinstance(item, Errand) else str(item.args[0])


def _do_here(item: Item, leader: Leader, mail: Mapping[str, Sequence[bytes]] = MappingProxyType({})) -> None:
    if isinstance(item, StopCall):
        item.do(leader)
        return
    workforce = leader.crew(_service_of(item))
    if not isinstance(item, Errand):
        workforce.adopt(item)
        for data in mail.get(item.job.id, ()):
            workforce.tell(item, data)
    elif item.verb == "send":
        workforce.send(item.type, item.data, anyway=True)
    else:
        workforce.broadcast(item.type, item.data)


def _settle(sent: SentCall, kind: int, body: bytes) -> None:
    call = sent.call
    if kind == RelayFrame.STOPPED:
        call.stopped(forced=sent.forced)
    elif kind == RelayFrame.ERROR:
        error = unpack_error(body)
        call.fail(error, JobStatus.LOST if isinstance(error, WorkerLost) else JobStatus.FAILED)
    else:
        settle_from_bytes(call, kind, body)
