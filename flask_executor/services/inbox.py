"""Messages that services send: to the app, and to each other."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection

from flask_executor.backends.process.protocol import ServiceMessage
from flask_executor.helpers.log import logger
from flask_executor.helpers.serial_thread import SerialThread

_MAX_QUEUED = 100_000  # messages that wait for the app, and for being handed on to another service


class ServiceInbox:
    """Delivers what services have sent, in two threads of its own.

    A message for the app waits behind other messages for the app, whose handlers take as long as they like; a message
    for another service does not.

    :param deliver: delivers a message, given the name of its sender; a method whose object is not kept alive.
    """

    def __init__(self, deliver: Callable[[str, ServiceMessage], None]) -> None:
        self._deliver = weakref.WeakMethod(deliver)
        self._to_app = SerialThread("flask-executor-messages-to-app")
        self._to_services = SerialThread("flask-executor-messages-to-services")
        self._routes: set[tuple[str, str]] = set()  # sender and receiver, of services
        self._dropped = 0

    def put(self, sender: str, message: ServiceMessage) -> None:
        """Take a message, in a supervisor thread, which waits for nothing."""
        thread = self._to_app if message.to is None else self._to_services
        if not self._has_room(thread, sender):
            return
        if message.to is not None:
            self._routes.add((sender, message.to))

        def run() -> None:
            deliver = self._deliver()
            if deliver is not None:
                deliver(sender, message)

        thread.run(run)

    def _has_room(self, thread: SerialThread, sender: str) -> bool:
        waiting = len(thread)
        if waiting >= _MAX_QUEUED:
            if not self._dropped:
                what = "Service %r sends messages faster than they are handled: %d wait, and what comes now is dropped."
                logger.error(what, sender, waiting)
            self._dropped += 1
            return False
        if self._dropped and waiting < _MAX_QUEUED // 2:
            logger.error("%d messages of services were dropped, as too many waited.", self._dropped)
            self._dropped = 0
        return True

    def independent(self, names: Collection[str]) -> list[str]:
        """Those of these services to which no other one of them has sent anything; or one of them, if they form a ring.

        :param names: at least one.
        """
        first = [name for name in names if not any((other, name) in self._routes for other in names if other != name)]
        return first or list(names)[:1]

    def flush_to_services(self, deadline: float | None) -> None:
        """Wait until the other services have got what was sent to them; until ``deadline`` at most (monotonic)."""
        _flush(self._to_services, deadline)

    def flush(self, deadline: float | None) -> None:
        """Wait until everything is delivered; until ``deadline`` at most (:func:`time.monotonic`)."""
        _flush(self._to_services, deadline)
        _flush(self._to_app, deadline)

    def close(self) -> None:
        """End the threads after what they were given until now."""
        self._to_app.close(wait=False)
        self._to_services.close(wait=False)


def _flush(thread: SerialThread, deadline: float | None) -> None:
    thread.flush(None if deadline is None else max(0.0, deadline - time.monotonic()))
