"""A service, in one of its worker processes."""

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
from flask_executor.services.definition import Main, Service, check_handler

if TYPE_CHECKING:
    from flask import Flask

_LONGEST = 3600.0  # seconds of one wait; some systems refuse more than 24 days
_REST = 1.0  # seconds after an error of what is called whenever there is no message
_PLACES = 1 << 24  # twice the messages of a batch, at most; the mark has its number above them


def mark_of(batch: int, begun: int, ended: int) -> int:
    """What marks that so many messages of this batch have begun, and so many ended."""
    return batch * _PLACES + begun + ended


def begun_and_ended(mark: int, batch: int) -> tuple[int, int]:
    """How many messages of this batch have begun, and how many ended."""
    steps = mark % _PLACES if mark // _PLACES == batch else 0
    return (steps + 1) // 2, steps // 2


class ServiceResident:
    """Keeps the service object, and calls its methods.

    The listener thread adds to ``_broadcasts`` and counts them in ``_heard``, under ``_changed``. All else belongs to
    the main thread.
    """

    def __init__(self, name: str, cls: type[Service], args: tuple[Any, ...]) -> None:
        self._name, self._cls, self._args = name, cls, args
        self.wake_receiver, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self.progress_mark: Any = None
        self._changed = threading.Condition()
        self._heard = 0
        self._broadcasts: deque[bytes] = deque()
        self._due: dict[str, float] = {}  # when each method of the schedule is to be called (monotonic)
        self._app: Flask
        self._service: Service
        self._say: Callable[[CompactPickle], None]
        self._leave_child: Callable[[Outcome], None]
        self._outside: contextvars.Context  # of all jobs

    def setup(
        self, app: Flask, send: Callable[[CompactPickle], None], exit_if_forked_child: Callable[[Outcome], None]
    ) -> None:
        global _resident
        _resident = self
        self._app, self._say, self._leave_child = app, send, exit_if_forked_child
        with app.app_context():
            service = self._service = self._cls(*self._args)
            service.name, service._send, service.main = self._name, self._post, Main(self._post)
            service.setup()
        self._outside = contextvars.copy_context()
        now = time.monotonic()
        self._due = {name: now + seconds for name, seconds in service.schedule.items()}

    def next_timeout(self) -> float | None:
        return min(max(0.0, min(self._due.values()) - time.monotonic()), _LONGEST) if self._due else None

    def run_due(self) -> None:
        self._run_due(idle=True)

    def _run_due(self, *, idle: bool) -> None:
        self.catch_up(0)
        now = time.monotonic()
        for name, due in self._due.items():
            seconds = self._service.schedule[name]
            if due <= now and (idle or seconds > 0):
                self._due[name] = max(due + seconds, now)
                if not self._try(name, self._outside.run, self._call, name) and not seconds:
                    self._due[name] = time.monotonic() + _REST

    def on_broadcast(self, message: Broadcast) -> None:
        with self._changed:
            self._heard = message.number
            if message.data is not None:
                self._broadcasts.append(message.data)
            self._changed.notify()
        if message.data is not None:
            with contextlib.suppress(BlockingIOError):  # it is awake
                self._wake.send(b"w")

    def teardown(self) -> None:
        self._try("teardown", self._call, "teardown")

    # ---- messages ----

    def catch_up(self, number: int) -> None:
        """Handle the broadcasts there are, after having waited for so many: a call that came later may overtake one."""
        if self._heard < number:
            with self._changed:
                self._changed.wait_for(lambda: self._heard >= number)
        while self._broadcasts:
            self._try("a message", self._outside.run, self.handle_packed, self._broadcasts.popleft())

    def handle_batch(self, batch: int, messages: list[bytes], seconds: float) -> int:
        """Handle messages that nobody waits for, until so many seconds have passed; how many were handled."""
        end = time.monotonic() + seconds
        for ended, message in enumerate(messages):
            if ended and time.monotonic() >= end:
                return ended
            self.progress_mark.value = mark_of(batch, ended + 1, ended)
            self._try("a message", self.handle_packed, message)
            self.progress_mark.value = mark_of(batch, ended + 1, ended + 1)
            if self._broadcasts or self._due:
                self._run_due(idle=False)
        return len(messages)

    def handle_packed(self, message: bytes) -> Any:
        """What the method returns that handles a message."""
        type, body = pickle.loads(message)
        check_handler(self._cls, self._name, type)
        return self._call(self._cls.handlers[type], body)

    def _call(self, method: str, *args: object) -> Any:
        with self._app.app_context():
            return call_sync(getattr(self._service, method), args, {})

    def _try(self, what: str, fn: Callable[..., object], *args: object) -> bool:
        well = False
        try:
            fn(*args)
            well = True
        except BaseException:  # also SystemExit: what comes behind it is not its own
            logger.exception("Service %r: %s failed.", self._name, what)
        self._leave_child(Outcome.RESULT)
        return well

    def _post(self, to: str | None, type: str, body: object) -> None:
        what = f"The body of message {type!r} from service {self._name!r}"
        self._say(ServiceMessage(to, type, b"".join(pickle_or_explain(body, what, "be sent"))))


_resident: ServiceResident


def answer(broadcasts: int, message: bytes) -> Any:
    """In a worker: what the service says to a message: its type and body, pickled.

    :param broadcasts: how many are to be handled before.
    """
    _resident.catch_up(broadcasts)
    return _resident.handle_packed(message)


def deliver(broadcasts: int, batch: int, messages: list[bytes], seconds: float) -> int:
    """In a worker: have the service handle messages: their types and bodies, each pickled.

    :param seconds: after which it begins with no other.
    :return: how many it has handled.
    """
    _resident.catch_up(broadcasts)
    return _resident.handle_batch(batch, messages, seconds)
