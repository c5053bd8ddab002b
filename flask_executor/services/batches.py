"""Messages without an answer, on their way to the workers of a service."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Any

from flask_executor.exceptions import ExecutorShutdown, WorkerLost
from flask_executor.helpers.log import logger
from flask_executor.services.worker import begun_and_ended, handle_batch

_BATCH_SIZE = 6 * 1024  # bytes of messages in a batch, more or less: what counts as small on its way to a worker
_BATCH_SECONDS = 0.01  # with several workers: handle a batch for so long, and return the rest for an idle one to take
_FIRST_BATCH_LENGTH = 8  # messages of a batch, at most, while it is not known how long they take
_MAX_CRASHES = 3  # workers that may die of one message


@dataclass(slots=True, eq=False)
class QueuedMessage:
    """A message on its way."""

    #: Its type and body, pickled.
    data: bytes
    type: str
    #: Called when some messages with this one have been handled, or dropped: how many.
    on_handled: Callable[[int], object] | None = None
    #: How many workers have died of it.
    crashes: int = 0


class MessageBatcher:
    """Sends messages in batches: a message at once while there are few, and many at a time when they come fast.

    A message is in ``_waiting`` or in one batch. What comes back of a batch goes to the head of ``_waiting``: what its
    worker had no time for; and when a worker dies the messages that it had not begun, and the one that it was in the
    middle of, unless that is dropped.

    :param name: of the service.
    :param submit: has a worker call a function.
    :param broadcasts: how many broadcasts there were.
    :param max_batches: most batches that workers have; two for each worker.
    :param in_order: If true, a worker handles a batch to its end, as what it returned would lose its place.
    """

    # Everything is changed under _lock, by threads that send and by the supervisor thread, which ends batches. Batches
    # are submitted under it as well, to keep their order.

    def __init__(
        self,
        name: str,
        submit: Callable[..., Future[Any]],
        broadcasts: Callable[[], int],
        max_batches: int,
        *,
        in_order: bool,
    ) -> None:
        self._name = name
        self._submit = submit
        self._broadcasts = broadcasts
        self._max_batches = max_batches
        self._seconds = math.inf if in_order else _BATCH_SECONDS
        self._max_length = _FIRST_BATCH_LENGTH  # messages of a batch
        self._lock = threading.RLock()
        self._waiting: deque[QueuedMessage] = deque()
        self._batches: dict[Future[Any], tuple[int, Sequence[QueuedMessage]]] = {}
        self._numbers = count(1)
        self._length = 0
        self._closed = False

    def __len__(self) -> int:
        """How many messages are waiting or in a batch."""
        return self._length

    @property
    def batches(self) -> int:
        """How many batches workers have."""
        return len(self._batches)

    def put(self, message: QueuedMessage) -> None:
        """Send a message.

        :raises ExecutorShutdown: after :meth:`close`.
        """
        with self._lock:
            if self._closed:
                raise ExecutorShutdown(f"service {self._name!r} was stopped, and takes no more messages")
            self._waiting.append(message)
            self._length += 1
            self._send_batches()

    def flush(self) -> None:
        """Submit everything that waits: calls that are submitted from now on come behind it."""
        with self._lock:
            while self._waiting:
                self._submit_batch(self._next_batch(math.inf))

    def close(self) -> None:
        """Accept no more messages, and submit everything that waits."""
        with self._lock:
            self._closed = True
            self.flush()

    def _send_batches(self) -> None:
        while self._waiting and len(self._batches) < self._max_batches:
            self._submit_batch(self._next_batch(self._max_length))

    def _next_batch(self, max_length: float) -> Sequence[QueuedMessage]:
        messages: list[QueuedMessage] = []
        size = 0
        while self._waiting and size < _BATCH_SIZE and len(messages) < max_length:
            messages.append(self._waiting.popleft())
            size += len(messages[-1].data)
        return messages

    def _submit_batch(self, messages: Sequence[QueuedMessage]) -> None:
        number = next(self._numbers)
        data = [message.data for message in messages]
        try:
            future = self._submit(handle_batch, self._broadcasts(), number, data, self._seconds)
        except ExecutorShutdown:
            lost = [*messages, *self._waiting]
            logger.error("%d messages for service %r are lost, as it was stopped.", len(lost), self._name)
            self._waiting.clear()
            self._forget(lost)
            return
        self._batches[future] = (number, messages)
        future.add_done_callback(self._on_batch_ended)

    def _on_batch_ended(self, future: Future[Any]) -> None:
        with self._lock:
            number, messages = self._batches.pop(future)
            rest = self._rest_of(future, number, messages)
            self._waiting.extendleft(reversed(rest))
            self._forget(messages[: len(messages) - len(rest)])
            self._send_batches()

    def _rest_of(self, future: Future[Any], number: int, messages: Sequence[QueuedMessage]) -> Sequence[QueuedMessage]:
        """The messages at the end of a batch that are to be sent again."""
        error = None if future.cancelled() else future.exception()
        if isinstance(error, WorkerLost):
            return self._rest_after_crash(messages, *begun_and_ended(error.mark, number))
        if error is not None or future.cancelled():
            logger.error("%d messages for service %r are lost: %s", len(messages), self._name, error)
            return ()
        handled: int = future.result()
        self._max_length = max(self._max_length, 2 * handled) if handled == len(messages) else handled
        return messages[handled:]

    def _rest_after_crash(self, messages: Sequence[QueuedMessage], begun: int, ended: int) -> Sequence[QueuedMessage]:
        if begun > ended:
            suspect = messages[ended]
            suspect.crashes += 1
            if suspect.crashes >= _MAX_CRASHES:
                what = "Service %r: a message %r of %d bytes is dropped, as %d worker processes have died of it."
                logger.error(what, self._name, suspect.type, len(suspect.data), suspect.crashes)
                return messages[begun:]
        return messages[ended:]

    def _forget(self, messages: Sequence[QueuedMessage]) -> None:
        """These are not on their way any more: tell those who wait for that."""
        self._length -= len(messages)
        for on_handled, number in Counter(message.on_handled for message in messages).items():
            if on_handled is not None:
                on_handled(number)
