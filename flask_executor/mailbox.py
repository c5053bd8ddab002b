"""Messages that nobody waits for, on their way to the workers of a service."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any

from flask_executor.exceptions import ExecutorShutdown, WorkerLost
from flask_executor.logs import logger
from flask_executor.residents import begun_of, deliver

_BATCH = 6 * 1024  # bytes of messages in a batch, more or less: what counts as small on its way to a worker
_MOST_CRASHES = 3  # of the workers that handled one message


class Mailbox:
    """Sends messages in batches: a message at once while there are few, and many at a time when they come fast.

    A message is in ``_waiting`` or in one batch. When a worker dies, the messages of its batch that it had not begun go
    back to the head of ``_waiting``, and so does the one that it was in the middle of, unless it was so for the
    last time.

    :param name: of the service.
    :param submit: has a worker call a function.
    :param broadcasts: how many there were.
    :param most_batches: that are under way.
    """

    # Everything is changed under _lock. Batches are submitted under it as well, to keep their order.

    def __init__(
        self, name: str, submit: Callable[..., Future[Any]], broadcasts: Callable[[], int], most_batches: int
    ) -> None:
        self._name = name
        self._submit = submit
        self._broadcasts = broadcasts
        self._most_batches = most_batches
        self._lock = threading.RLock()
        self._waiting: deque[bytes] = deque()
        self._under_way: dict[Future[Any], tuple[int, Sequence[bytes]]] = {}
        self._numbers = count(1)
        self._length = 0
        self._closed = False
        self._crashes: Counter[bytes] = Counter()  # of messages that workers have died of

    def __len__(self) -> int:
        """How many messages are waiting or in a batch."""
        return self._length

    @property
    def batches(self) -> int:
        """How many batches are under way."""
        return len(self._under_way)

    def put(self, message: bytes) -> None:
        """Take in a message: its type and body, pickled.

        :raises ExecutorShutdown: after :meth:`close`.
        """
        with self._lock:
            if self._closed:
                raise ExecutorShutdown(f"service {self._name!r} was stopped, and takes no more messages")
            self._waiting.append(message)
            self._length += 1
            self._send_off()

    def flush(self) -> None:
        """Hand on all that waits: what is called from now on comes behind it."""
        with self._lock:
            if self._waiting:
                self._send(list(self._waiting))
                self._waiting.clear()

    def close(self) -> None:
        """Take in no more messages, and hand on all that waits."""
        with self._lock:
            self._closed = True
            self.flush()

    def _send_off(self) -> None:
        while self._waiting and len(self._under_way) < self._most_batches:
            messages, size = [], 0
            while self._waiting and size < _BATCH:
                messages.append(self._waiting.popleft())
                size += len(messages[-1])
            self._send(messages)

    def _send(self, messages: Sequence[bytes]) -> None:
        number = next(self._numbers)
        try:
            future = self._submit(deliver, self._broadcasts(), number, messages)
        except ExecutorShutdown:
            logger.error("%d messages for service %r are lost, as it was stopped.", len(messages), self._name)
            self._length -= len(messages)
            return
        self._under_way[future] = (number, messages)
        future.add_done_callback(self._ended)

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            number, messages = self._under_way.pop(future)
            self._length -= len(messages)
            error = None if future.cancelled() else future.exception()
            if isinstance(error, WorkerLost):
                left_over = self._left_over(messages, begun_of(error.mark, number))
                self._waiting.extendleft(reversed(left_over))
                self._length += len(left_over)
            elif error is not None:
                logger.error("%d messages for service %r are lost: %s", len(messages), self._name, error)
            elif self._crashes:
                for message in messages:
                    self._crashes.pop(message, None)
            self._send_off()

    def _left_over(self, messages: Sequence[bytes], begun: int) -> Sequence[bytes]:
        """What is to be sent again of a batch whose worker has died."""
        if not begun:
            return messages
        suspect = messages[begun - 1]
        self._crashes[suspect] += 1
        if self._crashes[suspect] < _MOST_CRASHES:
            return messages[begun - 1 :]
        del self._crashes[suspect]
        logger.error(
            "Service %r: a message is dropped, as %d worker processes have died of it: %.200r",
            self._name,
            _MOST_CRASHES,
            suspect,
        )
        return messages[begun:]
