"""What all tests share: apps and executors that are cleaned up, and a watch for what is left behind."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask

from flask_executor import Executor

MakeExecutor = Callable[..., Executor]


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves threads or processes behind."""
    yield
    assert wait_until(lambda: not left_behind()), f"left behind: {left_behind()}"


def left_behind() -> list[str]:
    gc.collect()  # an app that a test made is a cycle; its threads end with it
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    return threads + [process.name for process in multiprocessing.active_children()]


@pytest.fixture
def app() -> Flask:
    app = Flask("shop")
    app.secret_key = "not a secret in a test"
    return app


@pytest.fixture
def make_executor(app: Flask, no_leaks: None) -> Iterator[MakeExecutor]:
    """``make_executor(type="process", max_workers=2)``: an executor bound to ``app``, shut down after the test."""
    made: list[Executor] = []

    def make(app: Flask | None = app, *, name: str = "", **config: Any) -> Executor:
        prefix = f"{name.upper()}_" if name else ""
        if app is not None:
            app.config.update({f"{prefix}EXECUTOR_{key.upper()}": value for key, value in config.items()})
        executor = Executor(app, name=name)
        made.append(executor)
        return executor

    yield make
    for executor in made:
        executor.shutdown(cancel_futures=True)


@pytest.fixture
def executor(make_executor: MakeExecutor) -> Executor:
    return make_executor(max_workers=4)


def run_in_threads(count: int, fn: Callable[[], object]) -> None:
    """Call ``fn`` in so many threads at the same time, and wait for all of them."""
    threads = [threading.Thread(target=fn) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


#: What every backend promises is tested with each of these. A new one joins by a line here.
TYPES: dict[str, dict[str, Any]] = {
    "thread": {},
    "process": {"start_method": "fork"},
    "process forkserver": {"type": "process", "start_method": "forkserver"},
    "process spawn": {"type": "process", "start_method": "spawn"},
    "process as on macOS": {"type": "process", "start_method": "fork"},
    "immediate": {},
}


def without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what only Linux has: packets between processes, and descriptors of processes."""
    monkeypatch.setattr("flask_executor.handles.packet_pair", lambda: None)
    monkeypatch.delattr("os.pidfd_open", raising=False)


def wait_until(condition: Callable[[], object], timeout: float = 10) -> bool:
    """Wait for a condition, at most ``timeout`` seconds; whether it came true."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
