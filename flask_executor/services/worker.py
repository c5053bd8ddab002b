"""A service in one of its worker processes: the service object, and what calls its methods."""

from __future__ import annotations

import contextlib
import contextvars
import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flask_executor.backends.process.protocol import Broadcast, ServiceMessage
from flask_executor.helpers.log import logger
from flask_executor.helpers.pickling import CompactPickle
from flask_executor.jobs.contexts import call_sync
from flask_executor.jobs.packing import Outcome, pickle_or_explain
from flask_executor.services.definition import Main, Service

if TYPE_CHECKING:
    from flask import Flask

_MAX_WAIT = 3600.0  # seconds of one wait; some systems refuse more than 24 days
_IDLE_RETRY_DELAY = 1.0  # seconds after an error of an @every(0) method until it is called again
_STEPS_PER_BATCH = 1 << 24  # a batch has less than half as many messages; a mark has the batch's number above them


def mark_of(batch: int, begun: int, ended: int) -> int:
    """Return the mark which says that ``begun`` messages of this batch have begun, and ``ended`` have ended."""
    return batch * _STEPS_PER_BATCH + begun + ended


def begun_and_ended(mark: int, batch: int) -> tuple[int, int]:
    """Return how many messages of this batch have begun, and how many have ended."""
    steps = mark % _STEPS_PER_BATCH if mark // _STEPS_PER_BATCH == batch else 0
    return (steps + 1) // 2, steps // 2


def pack_message(
    type: str, body: object, what: str | None = None, cannot: str = "be sent to a worker process"
) -> bytes:
    """A message as bytes, in the one form that it has until a handler gets its body: type and body, pickled.

    :param what: what the body is, to begin an error message with.
    :raises NotPicklable: for a body that cannot be sent.
    """
    return b"".join(pickle_or_explain((type, body), what or f"The body of message {type!r}", cannot))


class ServiceWorker:
    """Owns the service object, and calls its methods; the plugin of a worker process of the pool.

    The listener thread adds to ``_broadcasts`` and counts them in ``_received``, under ``_changed``. Everything else
    belongs to the main thread.
    """

    def __init__(self, name: str, cls: type[Service], args: tuple[Any, ...]) -> None:
        self._name, self._cls, self._args = name, cls, args
        self.wake_receiver, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self.progress_mark: Any = None
        self._changed = threading.Condition()
        self._received = 0  # broadcasts
        self._broadcasts: deque[bytes] = deque()  # that were not handled yet
        self._due: dict[str, float] = {}  # when each method of the schedule is to be called (monotonic)
        self._app: Flask
        self._service: Service
        self._send_message: Callable[[CompactPickle], None]
        self._exit_if_forked_child: Callable[[Outcome], None]
        self._outside: contextvars.Context  # a context in which no job runs

    # ---- the plugin: what the worker process calls ----

    def setup(
        self, app: Flask, send: Callable[[CompactPickle], None], exit_if_forked_child: Callable[[Outcome], None]
    ) -> None:
        global _worker
        _worker = self
        self._app, self._send_message, self._exit_if_forked_child = app, send, exit_if_forked_child
        with app.app_context():
            service = self._service = self._cls(*self._args)
            service.name, service._send, service.main = self._name, self._send, Main(self._send)
            service.setup()
        self._outside = contextvars.copy_context()
        now = time.monotonic()
        self._due = {name: now + seconds for name, seconds in service.schedule.items()}

    def next_timeout(self) -> float | None:
        return min(max(0.0, min(self._due.values()) - time.monotonic()), _MAX_WAIT) if self._due else None

    def run_due(self) -> None:
        self._run_schedule(idle=True)

    def on_broadcast(self, message: Broadcast) -> None:
        with self._changed:
            self._received = message.number
            if message.data is not None:
                self._broadcasts.append(message.data)
            self._changed.notify()
        if message.data is not None:
            with contextlib.suppress(BlockingIOError):  # then the main thread will wake up anyway
                self._wake.send(b"w")

    def teardown(self) -> None:
        self._try("teardown", self._call, "teardown")

    # ---- messages ----

    def handle_call(self, broadcasts: int, message: bytes) -> Any:
        """Handle a message, after ``broadcasts`` broadcasts; return what its handler returns."""
        self._handle_broadcasts(broadcasts)
        return self._handle(message)

    def handle_batch(self, broadcasts: int, batch: int, messages: list[bytes], seconds: float) -> int:
        """Handle messages, after ``broadcasts`` broadcasts, for ``seconds`` seconds; return how many were handled."""
        self._handle_broadcasts(broadcasts)
        end = time.monotonic() + seconds
        for ended, message in enumerate(messages):
            if ended and time.monotonic() >= end:
                return ended
            self.progress_mark.value = mark_of(batch, ended + 1, ended)
            self._try("a message", self._handle, message)
            self.progress_mark.value = mark_of(batch, ended + 1, ended + 1)
            if self._broadcasts or self._due:
                self._run_schedule(idle=False)
        return len(messages)

    def _run_schedule(self, *, idle: bool) -> None:
        """Handle the broadcasts that have come, and call the methods of the schedule that are due.

        :param idle: If true, no message waits, and @every(0) methods are called as well.
        """
        self._handle_broadcasts(0)
        now = time.monotonic()
        for name, due in self._due.items():
            seconds = self._service.schedule[name]
            if due <= now and (idle or seconds > 0):
                self._due[name] = max(due + seconds, now)
                if not self._try(name, self._outside.run, self._call, name) and not seconds:
                    self._due[name] = time.monotonic() + _IDLE_RETRY_DELAY

    def _handle_broadcasts(self, number: int) -> None:
        """Wait until ``number`` broadcasts have arrived, then handle them.

        They use another socket than calls and may arrive later.
        """
        if self._received < number:
            with self._changed:
                self._changed.wait_for(lambda: self._received >= number)
        while self._broadcasts:
            self._try("a message", self._outside.run, self._handle, self._broadcasts.popleft())

    def _handle(self, message: bytes) -> Any:
        type, body = pickle.loads(message)
        return self._call(self._cls.handlers[type], body)

    def _call(self, method: str, *args: object) -> Any:
        with self._app.app_context():
            return call_sync(getattr(self._service, method), args, {})

    def _try(self, what: str, fn: Callable[..., object], *args: object) -> bool:
        succeeded = False
        try:
            fn(*args)
            succeeded = True
        except BaseException:  # also SystemExit: the messages behind it are to be handled all the same
            logger.exception("Service %r: %s failed.", self._name, what)
        self._exit_if_forked_child(Outcome.RESULT)
        return succeeded

    def _send(self, to: str | None, type: str, body: object) -> None:
        what = f"The body of message {type!r} from service {self._name!r}"
        self._send_message(ServiceMessage(to, type, pack_message(type, body, what, "be sent")))


_worker: ServiceWorker


def handle_call(broadcasts: int, message: bytes) -> Any:
    """In a worker process: see :meth:`ServiceWorker.handle_call`."""
    return _worker.handle_call(broadcasts, message)


def handle_batch(broadcasts: int, batch: int, messages: list[bytes], seconds: float) -> int:
    """In a worker process: see :meth:`ServiceWorker.handle_batch`."""
    return _worker.handle_batch(broadcasts, batch, messages, seconds)
