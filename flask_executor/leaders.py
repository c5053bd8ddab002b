"""One set of workers for all processes of an app on a machine.

One process leads: it has the workers of the services. The others are connected to it by a socket, and send it their
messages. A lock on a file decides which one leads: the system gives it to one process, and takes it back when that
process ends, whatever way. Then the next one gets it.

.. code-block:: text

    leader                                            follower (any number)
   ┌──────────────────────────────────────┐          ┌───────────────────────────────────────────┐
   │ Desk thread: does errands, with the  │ <─────── │ Line: calls and messages of this process; │
   │ crews of this process; replies       │ ───────> │ its thread settles futures, and tries to  │
   │                                      │  socket  │ lead when the socket is closed            │
   └──────────────────────────────────────┘          └───────────────────────────────────────────┘

Lock and socket are in a folder that only this user can enter. What is on its way when the leader dies is lost: calls
fail with :exc:`~flask_executor.WorkerLost`. What was not sent yet waits for the next leader, and so does what a leader
that ends in order gives back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import selectors
import socket
import stat
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from flask_executor.abc import Backend, PreparedCall
from flask_executor.exceptions import ExecutorShutdown, JobStopped, QueueFull, WorkerLost
from flask_executor.forks import after_fork_in_child
from flask_executor.inherited import not_for_children
from flask_executor.jobs import JobStatus
from flask_executor.lines import Wire, pickle_parts
from flask_executor.logs import logger
from flask_executor.messages import Kind, Message
from flask_executor.runner import pack_error, pickled, settle_packed, unpack_error
from flask_executor.serial import SerialThread, serve_this_thread
from flask_executor.services import ServiceStatus

try:
    import fcntl
except ImportError:  # Windows, where there are no worker processes either
    fcntl = None  # type: ignore[assignment]

_PAUSES = 0.02, 0.5  # seconds before one tries again to lead or to reach the leader: the first time, and at most
_MOST_UNSENT = 100_000  # messages that wait for a leader
_WELCOME = 1 << 63  # the number of the frame by which a leader says that it listens: what is sent from then on arrives
_PATIENCE = 5.0  # seconds to wait for the leader's word


@dataclass(slots=True)
class Errand(Message):
    """Something that the leader is to do for another process; and word from it that it ends."""

    verb: str
    service: str
    type: str
    #: A packed message, or what the verb needs.
    data: bytes


class Workforce(Protocol):
    """What the leader has: the workers of a service."""

    def start_call(self, type: str, message: bytes, begun: Callable[[], object]) -> PreparedCall:
        """Have a worker handle a message.

        :param begun: called when a worker begins with it.
        """

    def adopt(self, call: PreparedCall) -> None:
        """Take over a call of a :class:`Line`."""

    def send(self, type: str, message: bytes) -> None:
        """Have a worker handle a message."""

    def broadcast(self, type: str, message: bytes) -> None:
        """Have all workers handle a message."""

    def leave(self, call: PreparedCall, *, forced: bool) -> None:
        """Have a call leave, or end it by force."""

    def status(self) -> ServiceStatus:
        """How the service is doing."""


#: The workers of a service in this process, by its name; None when the app is gone.
Employ = Callable[[str], "Workforce | None"]


def meeting_place(*what: object) -> Path:
    """The folder where the processes meet that have all this in common.

    :raises PermissionError: when it is somebody else's, or open to others.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    parent = Path(tempfile.gettempdir()) / f"flask-executor-{user}"
    folder = parent / hashlib.sha256(repr(what).encode()).hexdigest()[:24]
    for each in (parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        found = each.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
            raise PermissionError(f"{each} must be a folder that belongs to user {user}, with mode 0700: remove it")
    return folder


class Seat:
    """This process, among those that share a folder: the leader, or connected to it.

    :param employ: gives the workers of a service, where this process leads.
    :param promoted: called in a thread when this process leads, having followed.
    """

    # _lock guards who leads and what is open. _led has the folders that this process leads, as the lock is the
    # process's and would be given to it twice.

    def __init__(self, folder: Path, employ: Employ, promoted: Callable[[], object]) -> None:
        self._folder = folder
        self._employ = employ
        self._promoted = promoted
        self._lock = threading.RLock()
        self._file: int | None = None
        self._desk: Desk | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self.line = Line()
        self.leading = False

    def take(self) -> bool:
        """Lead, if nobody does, or else follow; whether this process leads."""
        if self.leading:
            return True
        with self._lock:
            if not self.leading and not self._closed.is_set() and self._thread is None and not self._try_to_lead():
                thread = threading.Thread(target=self._follow, name="flask-executor-follower", daemon=True)
                thread.start()
                self._thread = thread
            return self.leading

    def _try_to_lead(self) -> bool:
        with self._lock:
            if self._closed.is_set() or not self._get_lock():
                return False
            path = self._folder / "socket"
            path.unlink(missing_ok=True)
            listener = not_for_children(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen(128)
            self._desk = Desk(listener, self._employ)
            self.leading = True
            return True

    def _get_lock(self) -> bool:
        if self._folder in _led:
            return False
        if self._file is None:
            self._file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        _led.add(self._folder)
        return True

    def _follow(self) -> None:
        """In a thread: serve the line to the leader; lead when there is none."""
        serve_this_thread(self.line.callbacks)
        pause, longest = _PAUSES
        while not self._closed.is_set():
            if self._try_to_lead():
                self._promoted()
                self.line.hand_over(self._employ)
                return
            end = socket.socket(socket.AF_UNIX)
            try:
                end.connect(str(self._folder / "socket"))
            except OSError:  # it is about to listen, or has just ended
                end.close()
                self._closed.wait(pause)
                pause = min(2 * pause, longest)
                continue
            pause = _PAUSES[0]
            self.line.serve(Wire(not_for_children(end)))

    def ask(self, service: str) -> ServiceStatus | None:
        """What the leader says of a service; None when there is none."""
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(_PATIENCE)
            try:
                end.connect(str(self._folder / "socket"))
                wire = Wire(end)
                wire.say(Errand("status", service, "", b""))
                while True:
                    with selectors.DefaultSelector() as selector:
                        selector.register(end, selectors.EVENT_READ)
                        if not selector.select(_PATIENCE):
                            return None
                    for kind, _, body in wire.receive():
                        if kind == Kind.RESULT:
                            status: ServiceStatus = pickle.loads(body)
                            return status
            except (OSError, EOFError):
                return None

    def close(self) -> None:
        """Let another process lead. The workers have ended before."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed.set()
            desk, self._desk = self._desk, None
        if desk is not None:
            desk.close()
            (self._folder / "socket").unlink(missing_ok=True)
        self.line.end()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)
        self.line.close()
        with self._lock:
            if self._file is not None:
                if self.leading:
                    _led.discard(self._folder)
                os.close(self._file)
                self._file = None


_led: set[Path] = set()
after_fork_in_child(_led.clear)  # a lock is its process's alone


class Talk:
    """A wire that several threads send on, and one reads from.

    :param wake: has that one look whether something is left to be sent.
    """

    def __init__(self, wire: Wire, wake: Callable[[], object]) -> None:
        self.wire = wire
        self._wake = wake
        self._lock = threading.Lock()

    def send(self, kind: Kind, body: list[bytes], number: int) -> None:
        """Send a frame; what does not go out at once follows. Never waits, and does nothing when the other is gone."""
        with self._lock, contextlib.suppress(OSError):
            if not self.wire.send(kind, body, number):
                self._wake()

    def flush(self) -> None:
        """Send what is left."""
        with self._lock, contextlib.suppress(OSError):
            self.wire.flush()

    def events(self) -> int:
        """What to wait for."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.wire.pending else 0)


class Visitor(Talk):
    """Another process, seen from the leader."""

    def __init__(self, wire: Wire, wake: Callable[[], object]) -> None:
        super().__init__(wire, wake)
        #: What it has asked for and waits for, by number.
        self.calls: dict[int, tuple[Workforce, PreparedCall]] = {}

    def reply(self, number: int, future: Future[Any]) -> None:
        """A call has ended."""
        self.calls.pop(number, None)
        if future.cancelled():  # as the other process wanted, which waits for it no more
            return
        error = future.exception()
        if isinstance(error, JobStopped):
            self.send(Kind.LEFT, [], number)
        elif error is not None:
            self.send(Kind.ERROR, [pack_error(error)], number)
        else:
            try:
                self.send(Kind.RESULT, pickled(future.result(), "The result"), number)
            except Exception as refused:
                self.send(Kind.ERROR, [pack_error(refused)], number)


class Desk:
    """Does the errands of other processes, in a thread of its own."""

    def __init__(self, listener: socket.socket, employ: Employ) -> None:
        self._listener = listener
        self._employ = employ
        self._wakes, self._wake_up = map(not_for_children, socket.socketpair())
        self._wake_up.setblocking(False)
        self._closing = False
        self._visitors: set[Visitor] = set()
        self._thread = threading.Thread(target=self._run, name="flask-executor-leader", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Have the thread look at everything."""
        with contextlib.suppress(OSError):
            self._wake_up.send(b"w")

    def close(self) -> None:
        """Send what is left, and end."""
        self._closing = True
        self.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wakes, selectors.EVENT_READ)
            while not self._closing:
                self._serve(selector, None)
            selector.unregister(self._listener)
            for visitor in self._visitors:
                visitor.send(Kind.MESSAGE, pickle_parts(Errand("close", "", "", b"")), 0)
            deadline = time.monotonic() + _PATIENCE
            while self._visitors and time.monotonic() < deadline:  # until all have got back what they still sent
                self._serve(selector, 0.1)
        for visitor in self._visitors:
            visitor.wire.close()
        for line in (self._listener, self._wakes, self._wake_up):
            line.close()

    def _serve(self, selector: selectors.BaseSelector, patience: float | None) -> None:
        for visitor in self._visitors:
            selector.modify(visitor.wire, visitor.events(), visitor)
        for key, events in selector.select(patience):
            if key.fileobj is self._wakes:
                self._wakes.recv(4096)
            elif key.data is None:
                self._welcome(selector)
            elif not self._attend(key.data, events):
                selector.unregister(key.fileobj)
                self._visitors.discard(key.data)
                key.data.wire.close()

    def _welcome(self, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):
            visitor = Visitor(Wire(not_for_children(self._listener.accept()[0])), self.wake)
            self._visitors.add(visitor)
            selector.register(visitor.wire, selectors.EVENT_READ, visitor)
            visitor.send(Kind.BEGUN, [], _WELCOME)

    def _attend(self, visitor: Visitor, events: int) -> bool:
        """Hear what a visitor wants; False when it has gone."""
        if events & selectors.EVENT_WRITE:
            visitor.flush()
        if events & selectors.EVENT_READ:
            try:
                for _, number, body in visitor.wire.receive():
                    self._do(visitor, number, pickle.loads(body))
            except BlockingIOError:
                pass
            except Exception as error:
                if not isinstance(error, EOFError):
                    logger.exception("Another process of the app cannot be understood.")
                return False
        return True

    def _do(self, visitor: Visitor, number: int, errand: Errand) -> None:
        try:
            workforce = self._employ(errand.service)
            if workforce is None:
                raise ExecutorShutdown
            self._do_with(workforce, visitor, number, errand)
        except ExecutorShutdown:  # it is given back, for the next leader
            visitor.send(Kind.MESSAGE, pickle_parts(errand), number)
        except Exception as error:
            if errand.verb == "call":
                visitor.send(Kind.ERROR, [pack_error(error)], number)
            else:
                logger.error("A message for service %r from another process is lost: %s", errand.service, error)

    def _do_with(self, workforce: Workforce, visitor: Visitor, number: int, errand: Errand) -> None:
        if errand.verb == "call":
            call = workforce.start_call(errand.type, errand.data, lambda: visitor.send(Kind.BEGUN, [], number))
            visitor.calls[number] = workforce, call
            call.future.add_done_callback(lambda future: visitor.reply(number, future))
        elif errand.verb == "send":
            workforce.send(errand.type, errand.data)
        elif errand.verb == "broadcast":
            workforce.broadcast(errand.type, errand.data)
        elif errand.verb == "status":
            visitor.send(Kind.RESULT, pickle_parts(workforce.status()), number)
        elif errand.verb in ("leave", "kill") and number in visitor.calls:
            workforce, call = visitor.calls[number]
            workforce.leave(call, forced=errand.verb == "kill")


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


class Line(Backend):
    """What a process that follows has to say to the leader; a backend for the calls of services.

    A call is in ``_waiting`` or in ``_sent``, and everything is changed under ``_lock``.
    """

    remote = True
    supports_kill = True

    def __init__(self) -> None:
        self.callbacks = SerialThread("flask-executor-callbacks")
        self._lock = threading.RLock()
        self._talk: Talk | None = None
        self._waiting: deque[PreparedCall | Errand] = deque()
        self._sent: dict[int, SentCall] = {}
        self._numbers = count(1)
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
            if self._talk is None or self._talk.wire.pending > _MOST_UNSENT:
                if len(self._waiting) >= _MOST_UNSENT:
                    raise QueueFull("the line to the process that leads", _MOST_UNSENT)
                self._waiting.append(item)
            else:
                self._send(self._talk, item)

    def _send(self, talk: Talk, item: PreparedCall | Errand) -> None:
        if isinstance(item, Errand):
            talk.send(Kind.MESSAGE, pickle_parts(item), 0)
        else:
            number = next(self._numbers)
            self._sent[number] = SentCall(item)
            talk.send(Kind.MESSAGE, pickle_parts(Errand("call", *item.args)), number)

    def withdraw(self, call: PreparedCall) -> bool:
        with self._lock:
            if call in self._waiting:
                self._waiting.remove(call)
            number, sent = self._find(call)
            if sent is None:
                return True
            if not sent.begun:
                self._say("leave", number, sent)
                del self._sent[number]
            return not sent.begun

    def leave(self, call: PreparedCall, attempt: int, reason: JobStatus) -> None:
        with self._lock:
            number, sent = self._find(call)
            if sent is not None:
                self._say("leave", number, sent)

    def kill(self, call: PreparedCall, attempt: int) -> None:
        with self._lock:
            number, sent = self._find(call)
            if sent is not None:
                sent.forced = True
                self._say("kill", number, sent)

    def _find(self, call: PreparedCall) -> tuple[int, SentCall | None]:
        return next(((number, sent) for number, sent in self._sent.items() if sent.call is call), (0, None))

    def _say(self, verb: str, number: int, sent: SentCall) -> None:
        if self._talk is not None:
            errand = Errand(verb, sent.call.args[0], "", b"")
            self._talk.send(Kind.MESSAGE, pickle_parts(errand), number)

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

    def end(self) -> None:
        """Have the thread end; what was not sent is lost."""
        with self._lock:
            self._closed = True
        self.wake()

    def close(self) -> None:
        """Close what is open. The thread has ended."""
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
                    for key, events in selector.select():
                        if key.fileobj is self._wakes:
                            self._wakes.recv(4096)
                        elif events & selectors.EVENT_WRITE:
                            talk.flush()
                        if key.fileobj is wire and events & selectors.EVENT_READ:
                            ended = self._read(talk) or ended
                    if ended and not wire.pending:
                        wire.socket.shutdown(socket.SHUT_WR)  # that was all
        except (EOFError, OSError):  # it is gone
            pass
        finally:
            self._hang_up()
            wire.close()

    def _send_waiting(self, talk: Talk) -> None:
        while self._waiting:
            self._send(talk, self._waiting.popleft())

    def _read(self, talk: Talk) -> bool:
        """Hear what the leader says; whether it is ending."""
        ended = False
        with contextlib.suppress(BlockingIOError):
            for kind, number, body in talk.wire.receive():
                if number == _WELCOME:
                    with self._lock:
                        self._talk = talk
                        self._send_waiting(talk)
                    continue
                if kind == Kind.MESSAGE:
                    ended = self._given_back(number, pickle.loads(body)) or ended
                    continue
                with self._lock:
                    sent = self._sent.get(number)
                    if sent is None or not sent.begin():  # it was cancelled
                        self._sent.pop(number, None)
                        continue
                    if kind != Kind.BEGUN:
                        del self._sent[number]
                if kind != Kind.BEGUN:
                    _settle(sent.call, kind, body, forced=sent.forced)
        return ended

    def _given_back(self, number: int, errand: Errand) -> bool:
        """The leader does this no more, as it is ending; whether that was the last of it."""
        with self._lock:
            if errand.verb == "close":
                self._talk = None
            sent = self._sent.pop(number, None)
            if errand.verb in ("send", "broadcast"):
                self._waiting.append(errand)
            elif sent is not None:
                self._waiting.append(sent.call)
        return errand.verb == "close"

    def _hang_up(self) -> None:
        with self._lock:
            self._talk = None
            sent = list(self._sent.values())
            self._sent.clear()
            self._waiting.extendleft(reversed([one.call for one in sent if not one.begun]))
        for one in sent:
            if one.begun:
                error = WorkerLost(f"The process ended that looked after service {one.call.args[0]!r}.")
                one.call.fail(error, JobStatus.LOST)

    def hand_over(self, employ: Employ) -> None:
        """This process leads now: have its own workers do what waits."""
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        for item in waiting:
            try:
                _do_here(item, employ)
            except Exception as error:
                if isinstance(item, Errand):
                    logger.error("A message for service %r is lost: %s", item.service, error)
                elif item.begin():
                    item.fail(error)


def _do_here(item: PreparedCall | Errand, employ: Employ) -> None:
    workforce = employ(item.service if isinstance(item, Errand) else item.args[0])
    if workforce is None:
        raise ExecutorShutdown("the app is gone")
    if not isinstance(item, Errand):
        workforce.adopt(item)
    elif item.verb == "send":
        workforce.send(item.type, item.data)
    else:
        workforce.broadcast(item.type, item.data)


def _settle(call: PreparedCall, kind: int, body: bytes, *, forced: bool) -> None:
    if kind == Kind.LEFT:
        call.left(forced=forced)
    elif kind == Kind.ERROR:
        error = unpack_error(body)
        call.fail(error, JobStatus.LOST if isinstance(error, WorkerLost) else JobStatus.FAILED)
    else:
        settle_packed(call, kind, body)
