"""The order in which waiting jobs start."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class PriorityQueue(Generic[T]):
    """Hashable items, those of the highest priority first, first in first out among equals.

    Unlike a heap it can remove any item, and take one back to the place it came from. Not safe for threads by itself.
    """

    def __init__(self) -> None:
        self._lines: dict[int, OrderedDict[T, None]] = {}
        self._priorities: list[int] = []  # of the lines that are not empty, negated, ascending
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
        """Put an item behind all others of its priority."""
        line = self._lines.get(priority)
        if line is None:
            line = self._lines[priority] = OrderedDict()
            bisect.insort(self._priorities, -priority)
        line[item] = None
        self._length += 1

    def push_first(self, item: T, priority: int = 0) -> None:
        """Put an item before all others of its priority."""
        self.push(item, priority)
        self._lines[priority].move_to_end(item, last=False)

    def pop(self) -> T:
        """Take out the first item.

        :raises IndexError: when there is none.
        """
        priority = self.priority
        line = self._lines[priority]
        item, _ = line.popitem(last=False)
        self._shrink(line, priority)
        return item

    def first(self) -> T:
        """The first item, left where it is.

        :raises IndexError: when there is none.
        """
        return next(iter(self._lines[self.priority]))

    def remove(self, item: T, priority: int = 0) -> bool:
        """Take out an item; False when it is not there."""
        line = self._lines.get(priority)
        if line is None or item not in line:
            return False
        del line[item]
        self._shrink(line, priority)
        return True

    def clear(self) -> list[T]:
        """Take out all items; they come in order."""
        return [self.pop() for _ in range(self._length)]

    def _shrink(self, line: OrderedDict[T, None], priority: int) -> None:
        self._length -= 1
        if not line:
            del self._lines[priority]
            self._priorities.remove(-priority)
