"""Calls at a later time, and the thread of the callbacks."""

from __future__ import annotations

import threading
import time

import pytest

from flask_executor.helpers.serial_thread import SerialThread
from flask_executor.helpers.timer import Timer
from flask_executor.testing.contract.fixtures import wait_until


def threads(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def test_in_order_and_not_before_their_time() -> None:
    timer, seen = Timer(), list[tuple[str, float]]()
    begin = time.monotonic()
    for name, seconds in (("c", 0.09), ("a", 0.0), ("b", 0.04)):
        timer.call_later(seconds, lambda name=name: seen.append((name, time.monotonic() - begin)))  # type: ignore[misc]
    assert wait_until(lambda: len(seen) == 3)
    assert [name for name, _ in seen] == ["a", "b", "c"]
    assert seen[1][1] >= 0.04
    assert seen[2][1] >= 0.09


def test_one_that_is_called_off_does_not_keep_the_thread() -> None:
    timer = Timer()
    handles = [timer.call_later(3600, list) for _ in range(200)]
    assert threads("flask-executor-timer") == 1
    for handle in handles:
        handle.cancel()
        handle.cancel()
    assert wait_until(lambda: threads("flask-executor-timer") == 0)
    done = threading.Event()
    timer.call_later(0.01, done.set)
    assert done.wait(5)


def test_one_that_fails_is_logged_and_the_others_are_called(caplog: pytest.LogCaptureFixture) -> None:
    timer, done = Timer(), threading.Event()
    timer.call_later(0, lambda: 1 / 0)
    timer.call_later(0.01, done.set)
    assert done.wait(5)
    assert "ZeroDivisionError" in caplog.text


def test_a_serial_thread(caplog: pytest.LogCaptureFixture) -> None:
    serial, seen = SerialThread("serial"), list[int]()
    assert threads("serial") == 0
    serial.run(lambda: 1 / 0)
    for number in range(100):
        serial.run(lambda number=number: seen.append(number))  # type: ignore[misc]
    serial.close(wait=True)
    assert seen == list(range(100))
    assert len(serial) == 0
    assert "ZeroDivisionError" in caplog.text
    serial.run(lambda: seen.append(threading.get_ident()))
    assert seen[-1] == threading.get_ident(), "after its end it is done here and now"
