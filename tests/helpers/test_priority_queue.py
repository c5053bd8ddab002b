"""The order in which waiting jobs start."""

from __future__ import annotations

import random

import pytest

from flask_executor.helpers.priority_queue import PriorityQueue


def test_the_order() -> None:
    queue: PriorityQueue[str] = PriorityQueue()
    for item, priority in (("c", 0), ("a", 5), ("d", 0), ("b", 5), ("e", -1)):
        queue.push(item, priority)
    assert (queue.first(), queue.priority, len(queue)) == ("a", 5, 5)
    assert "".join(queue.clear()) == "abcde"
    assert not queue
    with pytest.raises(IndexError):
        queue.pop()


def test_taking_out_and_putting_back() -> None:
    queue: PriorityQueue[str] = PriorityQueue()
    for item in "abc":
        queue.push(item)
    assert queue.remove("b")
    assert not queue.remove("b")
    assert not queue.remove("a", 1)
    queue.push_first(queue.pop())
    assert queue.clear() == ["a", "c"]


def test_like_a_sorted_list() -> None:
    chance = random.Random(7)
    queue: PriorityQueue[int] = PriorityQueue()
    model: list[tuple[int, int]] = []
    for number in range(2000):
        action = chance.random()
        if action < 0.5:
            priority = chance.randrange(-2, 3)
            queue.push(number, priority)
            model.append((-priority, number))
        elif action < 0.7 and model:
            priority, item = model.pop(chance.randrange(len(model)))
            assert queue.remove(item, -priority)
        elif model:
            model.sort()
            assert queue.pop() == model.pop(0)[1]
        assert len(queue) == len(model)
