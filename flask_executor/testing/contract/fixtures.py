"""What the contracts have in common: an app, executors that are shut down after the test, and ways to wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from flask_executor.exceptions import StoreUnavailable
from flask_executor.executor.extension import Executor
from flask_executor.testing import jobs

MakeExecutor = Callable[..., Executor]


class ExecutorFixtures:
    """An app, and executors for it."""

    @pytest.fixture
    def app(self, tmp_path: Path) -> Flask:
        """The app of the jobs, which workers import as ``EXECUTOR_APP`` says."""
        app = jobs.plain_app(str(tmp_path / "instance"))
        app.config["EXECUTOR_APP"] = jobs.APP
        return app

    @pytest.fixture
    def make_executor(self, app: Flask) -> Iterator[MakeExecutor]:
        """``make_executor(type="ray", max_workers=2)``: an executor bound to ``app``, shut down after the test."""
        made: list[Executor] = []

        def make(**config: Any) -> Executor:
            app.config.update({f"EXECUTOR_{key.upper()}": value for key, value in config.items()})
            made.append(Executor(app))
            return made[-1]

        yield make
        shut_down(made)


class BackendFixtures(ExecutorFixtures):
    """An executor that has the backend which is tested."""

    @pytest.fixture
    def executor_config(self) -> dict[str, Any]:
        """What is in the configuration, without ``EXECUTOR_``: ``{"type": "ray", "url": ...}``. To be overridden."""
        raise NotImplementedError(f"{type(self).__qualname__} has to override the fixture executor_config")

    @pytest.fixture
    def make(self, make_executor: MakeExecutor, executor_config: dict[str, Any]) -> MakeExecutor:
        """As ``make_executor``, with the backend which is tested."""

        def make(**config: Any) -> Executor:
            return make_executor(**{"max_workers": 2, **executor_config, **config})

        return make

    @pytest.fixture
    def executor(self, make: MakeExecutor) -> Executor:
        return make()


def shut_down(executors: Iterable[Executor]) -> None:
    """At the end of a test: cancel what has not started, and leave nothing to the workers of an engine."""
    for executor in executors:
        if getattr(executor, "engine", None):  # nobody else ends what a test that has failed leaves there
            with suppress(StoreUnavailable):
                for future in executor.unfinished():
                    future.stop(grace=0)
        executor.shutdown(cancel_futures=True)


def never_waits(executor: Executor) -> bool:
    """Whether a job of this executor starts as soon as it is submitted, always."""
    return executor.engine is None and executor.capacity is None


def skip_if_nothing_waits(executor: Executor) -> None:
    """For tests of jobs that wait in the queue, for their time or for another attempt."""
    if never_waits(executor):
        pytest.skip("with this backend jobs never wait")


def skip_without_force(executor: Executor) -> None:
    """For tests of jobs that have to be ended by force, with backends that do not promise it."""
    if executor.remote and not executor.supports_kill:
        pytest.skip("this backend cannot end a job that does not look whether it should")


def run_in_threads(count: int, fn: Callable[[], object]) -> None:
    """Call ``fn`` in ``count`` threads at the same time, and wait for all of them."""
    threads = [threading.Thread(target=fn) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def wait_until(condition: Callable[[], object], timeout: float = 30) -> bool:
    """Wait for a condition, at most ``timeout`` seconds; whether it came true."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
