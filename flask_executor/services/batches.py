"""Messages that nobody waits for, on their way to the workers of a service."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Any

from flask_executor.exceptions import ExecutorShutdown, WorkerLost
from flask_executor.helpers.log import logger
from flask_executor.services.worker import begun_and_ended, deliver

_BATCH = 6 * 1024  # bytes of messages in a batch, more or less: what counts as small on its way to a worker
_BRIEF = 0.01  # seconds after which a worker gives back the rest of a batch, where there are others to handle it
_FIRST = 8  # messages of a batch, at most, while it is not known how long they take
_MOST_CRASHES = 3  # of the workers that handled one message


@dataclass(slots=True, eq=False)
class Letter:
    """A message on its way: its type and body, pickled."""

    data: bytes
    type: str
    #: How many workers have died of it.
    crashes: int = 0


class Mailbox:
    """Sends messages in batches: a message at once while there are few, and many at a time when they come fast.

    A message is in ``_waiting`` or in one batch. What comes back of a batch goes to the head of ``_waiting``: what its
    worker had no time for; and when a worker dies the messages that it had not begun, and the one that it was in the
    middle of, unless it was so for the last time.

    :param name: of the service.
    :param submit: has a worker call a function.
    :param broadcasts: how many there were.
    :param most_batches: that are under way; two for each worker.
    :param in_order: whether a worker is to handle a batch to its end, as what it gave back would lose its place.
    """

    # Everything is changed under _lock. Batches are submitted under it as well, to keep their order.

    def __init__(
        self,
        name: str,
        submit: Callable[..., Future[Any]],
        broadcasts: Callable[[], int],
        most_batches: int,
        *,
        in_order: bool,
    ) -> None:
        self._name = name
        self._submit = submit
        self._broadcasts = broadcasts
        self._most_batches = most_batches
        self._seconds = math.inf if in_order else _BRIEF
        self._most_letters = _FIRST  # of a batch
        self._lock = threading.RLock()
        self._waiting: deque[Letter] = deque()
        self._under_way: dict[Future[Any], tuple[int, Sequence[Letter]]] = {}
        self._numbers = count(1)
        self._length = 0
        self._closed = False

    def __len__(self) -> int:
        """How many messages are waiting or in a batch."""
        return self._length

    @property
    def batches(self) -> int:
        """How many batches are under way."""
        return len(self._under_way)

    def put(self, type: str, message: bytes) -> None:
        """Take in a message: its type, and type and body pickled.

        :raises ExecutorShutdown: after :meth:`close`.
        """
        with self._lock:
            if self._closed:
                raise ExecutorShutdown(f"service {self._name!r} was stopped, and takes no more messages")
            self._waiting.append(Letter(message, type))
            self._length += 1
            self._send_off()

    def flush(self) -> None:
        """Hand on all that waits: what is called from now on comes behind it."""
        with self._lock:
            while self._waiting:
                self._send(self._next_batch(math.inf))

    def close(self) -> None:
        """Take in no more messages, and hand on all that waits."""
        with self._lock:
            self._closed = True
            self.flush()

    def _send_off(self) -> None:
        while self._waiting and len(self._under_way) < self._most_batches:
            self._send(self._next_batch(self._most_letters))

    def _next_batch(self, most_letters: float) -> Sequence[Letter]:
        waiting = self._waiting
        letters: list[Letter] = []
        size = 0
        while waiting and size < _BATCH and len(letters) < most_letters:
            letters.append(waiting.popleft())
            size += len(letters[-1].data)
        return letters

    def _send(self, letters: Sequence[Letter]) -> None:
        number = next(self._numbers)
        messages = [letter.data for letter in letters]
        try:
            future = self._submit(deliver, self._broadcasts(), number, messages, self._seconds)
        except ExecutorShutdown:
            lost = len(letters) + len(self._waiting)
            logger.error("%d messages for service %r are lost, as it was stopped.", lost, self._name)
            self._waiting.clear()
            self._length -= lost
            return
        self._under_way[future] = (number, letters)
        future.add_done_callback(self._ended)

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            number, letters = self._under_way.pop(future)
            left_over = self._left_over(future, number, letters)
            self._length -= len(letters) - len(left_over)
            self._waiting.extendleft(reversed(left_over))
            self._send_off()

    def _left_over(self, future: Future[Any], number: int, letters: Sequence[Letter]) -> Sequence[Letter]:
        """What is to be sent again of a batch that has ended."""
        error = None if future.cancelled() else future.exception()
        if isinstance(error, WorkerLost):
            return self._after_crash(letters, *begun_and_ended(error.mark, number))
        if error is not None or future.cancelled():
            logger.error("%d messages for service %r are lost: %s", len(letters), self._name, error)
            return ()
        handled: int = future.result()
        self._most_letters = max(self._most_letters, 2 * handled) if handled == len(letters) else handled
        return letters[handled:]

    def _after_crash(self, letters: Sequence[Letter], begun: int, ended: int) -> Sequence[Letter]:
        if begun > ended:
            suspect = letters[ended]
            suspect.crashes += 1
            if suspect.crashes >= _MOST_CRASHES:
                what = "Service %r: a message %r of %d bytes is dropped, as %d worker processes have died of it."
                logger.error(what, self._name, suspect.type, len(suspect.data), suspect.crashes)
                return letters[begun:]
        return letters[ended:]
