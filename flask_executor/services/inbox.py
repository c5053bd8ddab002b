"""Messages that services send: to the app, and to each other."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection

from flask_executor.backends.process.protocol import ServiceMessage
from flask_executor.helpers.log import logger
from flask_executor.helpers.serial_thread import SerialThread

_MOST = 100_000  # messages that wait for the app, and for being handed on


class Incoming:
    """Hands on what services have sent, in threads of its own.

    What is for the app waits behind other messages for the app, whose functions take as long as they like; what is for
    another service does not.

    :param deliver: does it, given the name of the sender and a message; a method whose object is not kept alive.
    """

    def __init__(self, deliver: Callable[[str, ServiceMessage], None]) -> None:
        self._deliver = weakref.WeakMethod(deliver)
        self._to_app = SerialThread("flask-executor-messages")
        self._to_services = SerialThread("flask-executor-post")
        self._ways: set[tuple[str, str]] = set()  # who has sent something to whom
        self._dropped = 0

    def __len__(self) -> int:
        """How many messages were not handled, or not handed on."""
        return len(self._to_app) + self.between

    @property
    def between(self) -> int:
        """How many messages for services were not handed on."""
        return len(self._to_services)

    def take(self, sender: str, message: ServiceMessage) -> None:
        """Take a message, in the thread of a supervisor, which waits for nothing."""
        thread = self._to_app if message.to is None else self._to_services
        if not self._has_room(thread, sender):
            return
        if message.to is not None:
            self._ways.add((sender, message.to))

        def run() -> None:
            deliver = self._deliver()
            if deliver is not None:
                deliver(sender, message)

        thread.run(run)

    def _has_room(self, thread: SerialThread, sender: str) -> bool:
        waiting = len(thread)
        if waiting >= _MOST:
            if not self._dropped:
                what = "Service %r sends messages faster than they are handled: %d wait, and what comes now is dropped."
                logger.error(what, sender, waiting)
            self._dropped += 1
            return False
        if self._dropped and waiting < _MOST // 2:
            logger.error("%d messages of services were dropped, as too many waited.", self._dropped)
            self._dropped = 0
        return True

    def senders_first(self, names: Collection[str]) -> list[str]:
        """Those of these services to which none of the others has sent anything; one of them if there is none such."""
        first = [name for name in names if not any((other, name) in self._ways for other in names if other != name)]
        return first or list(names)[:1]

    def close(self) -> None:
        """End the threads after what they were given until now."""
        self._to_app.close(wait=False)
        self._to_services.close(wait=False)
