"""The order in which waiting jobs start."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class PriorityQueue(Generic[T]):
    """Hashable items, those of the highest priority first, first in first out among equals.

    Unlike a heap it can remove any item, and put one back to the place it came from. Callers need a lock.
    """

    def __init__(self) -> None:
        self._queues: dict[int, OrderedDict[T, None]] = {}
        self._priorities: list[int] = []  # of the queues that are not empty, negated, ascending
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def priority(self) -> int:
        """The priority of the first item.

        :raises IndexError: when there is none.
        """
        return -self._priorities[0]

    def push(self, item: T, priority: int = 0) -> None:
        """Add an item behind all others of its priority."""
        queue = self._queues.get(priority)
        if queue is None:
            queue = self._queues[priority] = OrderedDict()
            bisect.insort(self._priorities, -priority)
        queue[item] = None
        self._length += 1

    def push_first(self, item: T, priority: int = 0) -> None:
        """Add an item before all others of its priority."""
        self.push(item, priority)
        self._queues[priority].move_to_end(item, last=False)

    def pop(self) -> T:
        """Remove and return the first item.

        :raises IndexError: when there is none.
        """
        priority = self.priority
        queue = self._queues[priority]
        item, _ = queue.popitem(last=False)
        self._shrink(queue, priority)
        return item

    def first(self) -> T:
        """The first item, left where it is.

        :raises IndexError: when there is none.
        """
        return next(iter(self._queues[self.priority]))

    def remove(self, item: T, priority: int = 0) -> bool:
        """Remove an item; False if it is not there."""
        queue = self._queues.get(priority)
        if queue is None or item not in queue:
            return False
        del queue[item]
        self._shrink(queue, priority)
        return True

    def clear(self) -> list[T]:
        """Remove and return all items, in order."""
        return [self.pop() for _ in range(self._length)]

    def _shrink(self, queue: OrderedDict[T, None], priority: int) -> None:
        self._length -= 1
        if not queue:
            del self._queues[priority]
            self._priorities.remove(-priority)
