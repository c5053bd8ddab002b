"""How much of what waits for one service a follower may send: flow control by credits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from flask_executor.jobs.call import Call
from flask_executor.services.protocol import Request

#: Messages for a service that a follower may have sent and that were not handled.
WINDOW_SIZE = 4096


class CallProgress(Enum):
    """The progress of a call, as far as the follower knows."""

    QUEUED = auto()  # in the follower
    SENT = auto()  # to the leader
    ASSIGNED = auto()  # to a worker, which may have begun
    STARTED = auto()  # by a worker; its future is claimed


@dataclass(slots=True, eq=False)
class PendingCall:
    """A call that has not ended."""

    call: Call
    progress: CallProgress = CallProgress.QUEUED
    #: The number of the request, once it is sent.
    number: int = 0
    #: Whether it was to be ended by force.
    forced: bool = False


@dataclass(slots=True)
class _SentMessage:
    number: int
    #: What ``FrameStream.sent`` is when all of it is out.
    end: int
    request: Request


Item = PendingCall | Request


class SendWindow:
    """The calls and messages that wait for one service, in order, and the number that may be sent now.

    Everything happens under the lock of the :class:`~flask_executor.services.follower.LeaderClient`. Messages that were
    sent and not handled are kept, as the leader may be shutting down and not accept the last of them.

    :param size: messages that may be with the leader and not handled.
    """

    def __init__(self, size: int) -> None:
        self._size = self._credits = size
        self._queue: deque[Item] = deque()
        self._unhandled: deque[_SentMessage] = deque()

    def __len__(self) -> int:
        """Number of those that wait."""
        return len(self._queue)

    def put(self, item: Item) -> None:
        """Queue a call or message."""
        self._queue.append(item)

    def pop(self) -> Item:
        """Take out the first."""
        return self._queue.popleft()

    def remove(self, item: Item) -> None:
        """Take out this one."""
        self._queue.remove(item)

    def put_back(self, items: list[Item]) -> None:
        """Queue calls and messages again, before all others."""
        self._queue.extendleft(reversed(items))

    def clear(self) -> list[Item]:
        """Take out all."""
        items = list(self._queue)
        self._queue.clear()
        return items

    @property
    def is_ready(self) -> bool:
        """If true, there is a first one and it may be sent. Only ``send`` has to wait for a credit."""
        if not self._queue:
            return False
        first = self._queue[0]
        return self._credits > 0 or isinstance(first, PendingCall) or first.operation != "send"

    def sent(self, number: int, end: int, request: Request) -> None:
        """A message was sent, which takes a credit."""
        self._credits -= 1
        self._unhandled.append(_SentMessage(number, end, request))

    def grant(self, credits: int) -> None:
        """So many more messages may be sent, as others have been handled."""
        # A leader that accepts no more goes on to grant credits for what it has, and all were given back by then.
        self._credits = min(self._size, self._credits + credits)
        while len(self._unhandled) > self._size - self._credits:  # those that were not accepted are the last
            self._unhandled.popleft()

    def take_back(self, is_refused: Callable[[int, int], bool]) -> list[tuple[int, Item]]:
        """Forget what was sent, and give out the messages that the leader has not got, with their numbers.

        :param is_refused: says of which messages that is so, by number and end.
        """
        refused: list[tuple[int, Item]] = [
            (sent.number, sent.request) for sent in self._unhandled if is_refused(sent.number, sent.end)
        ]
        self._unhandled.clear()
        self._credits = self._size
        return refused
