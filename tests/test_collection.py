from __future__ import annotations

import copy
import pickle
import timeit
from concurrent.futures import Future
from typing import Any

import pytest

from flask_executor import FutureCollection, KeyExists


def finished(value: object = None) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@pytest.fixture
def futures() -> FutureCollection[Any]:
    return FutureCollection()


def test_attributes_and_methods_with_the_key_in_front(futures: FutureCollection[Any]) -> None:
    futures.add("report", finished(3))
    assert futures.done("report") is True
    assert futures._state("report") == "FINISHED"
    assert futures.result("report", timeout=0) == 3
    assert futures.exception("report") is None


def test_an_unknown_key_gives_none_and_an_unknown_attribute_raises(futures: FutureCollection[Any]) -> None:
    futures.add("report", finished())
    assert futures.done("other") is None
    assert futures.pop("other") is None
    assert futures.colour("other") is None
    with pytest.raises(AttributeError, match="colour"):
        futures.colour("report")


def test_a_taken_key(futures: FutureCollection[Any]) -> None:
    first = finished()
    futures.add("report", first)
    for future in (first, finished()):
        with pytest.raises(KeyExists, match="'report' already exists") as raised:
            futures.add("report", future)
        assert isinstance(raised.value, ValueError)
    assert futures.pop("report") is first
    futures.add("report", finished())


def test_membership_by_future_and_by_key(futures: FutureCollection[Any]) -> None:
    future = finished()
    futures.add("a", future)
    futures.add("b", future)
    assert future in futures
    assert "a" in futures
    assert "c" not in futures
    futures.pop("a")
    assert future in futures, "it is still held under the other key"
    futures.pop("b")
    assert future not in futures
    assert len(futures) == 0


def test_keys_and_the_dict_that_published_code_reads(futures: FutureCollection[Any]) -> None:
    first, second = finished(), finished()
    futures.add("a", first)
    futures.add(2, second)
    assert futures.keys() == ["a", 2]
    assert futures._futures.get("a") is first
    assert futures.get(2) is second
    assert futures.get("c") is None


def test_finished_ones_leave_first_and_the_oldest_of_them() -> None:
    futures: FutureCollection[Any] = FutureCollection(max_length=3)
    waiting: Future[Any] = Future()
    futures.add("waiting", waiting)
    futures.add("a", finished())
    futures.add("b", finished())
    futures.add("c", finished())
    assert futures.keys() == ["waiting", "b", "c"]
    futures.add("d", Future())
    assert futures.keys() == ["waiting", "c", "d"]


def test_60_unfinished_leave_50_and_none_is_unknown_before_it_ends() -> None:
    futures: FutureCollection[Any] = FutureCollection()
    held: list[Future[Any]] = [Future() for _ in range(60)]
    for key, future in enumerate(held):
        futures.add(key, future)
    assert len(futures) == 50
    assert held[0] not in futures
    assert futures.done(0) is False
    with pytest.raises(KeyExists):
        futures.add(0, finished())
    assert futures.pop(0) is held[0]
    assert futures.done(0) is None
    held[1].set_result(None)
    assert futures.done(1) is None, "it has ended, and it had left"
    futures.add(1, finished())


def test_no_bound() -> None:
    futures: FutureCollection[Any] = FutureCollection(max_length=None)
    for key in range(200):
        futures.add(key, finished())
    assert len(futures) == 200


def test_it_does_not_pretend_to_have_every_special_method(futures: FutureCollection[Any]) -> None:
    assert not hasattr(futures, "__iter__")
    assert not hasattr(futures, "__fspath__")
    with pytest.raises(TypeError):
        pickle.dumps(futures)  # it has a lock
    assert copy.copy(futures).max_length == 50


def test_membership_costs_the_same_whatever_the_size() -> None:
    def cost(size: int) -> float:
        futures: FutureCollection[Any] = FutureCollection(max_length=None)
        held = [finished() for _ in range(size)]
        for key, future in enumerate(held):
            futures.add(key, future)
        return min(timeit.repeat(lambda: held[-1] in futures, number=2000, repeat=5))

    assert cost(10_000) < 20 * cost(10), "a scan would cost a thousand times as much"


def test_to_keep_what_is_held() -> None:
    futures: FutureCollection[Any] = FutureCollection(max_length=1)
    first = finished(1)
    futures.add("a", first)
    assert futures.setdefault("a", finished(2), pinned=True) is first
    futures.pin("a")
    futures.pin("nothing")
    futures.add("b", finished())
    futures.add("c", finished())
    assert (futures.keys(), len(futures)) == (["c", "a"], 2)
    assert first in futures
    assert futures.pop("a") is first
    assert first not in futures


def test_to_keep_what_had_to_leave_unfinished() -> None:
    futures: FutureCollection[Any] = FutureCollection(max_length=0)
    future: Future[Any] = Future()
    futures.add("a", future)
    futures.pin("a")
    future.set_result(3)
    assert futures.get("a") is future
