"""The same cases as ``compare.py`` one by one, for pytest-benchmark.

.. code-block:: console

    $ pytest benchmarks --benchmark-enable --benchmark-group-by=func

In the ordinary test run they are called once and not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor as StandardExecutor
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from flask import Flask, g

from flask_executor import Executor, current_job, track

Benchmark = Callable[..., Any]


def noop(_: object = None) -> None:
    pass


@pytest.fixture(params=["bare", "ours"])
def executor(request: pytest.FixtureRequest) -> Iterator[StandardExecutor]:
    app = Flask("benchmark")
    app.secret_key = "benchmark"
    app.config["EXECUTOR_MAX_WORKERS"] = 1
    with ThreadPoolExecutor(1) if request.param == "bare" else Executor(app) as executor, app.test_request_context("/"):
        g.value = 1
        yield executor


def test_bulk(benchmark: Benchmark, executor: StandardExecutor) -> None:
    done = benchmark(lambda: wait([executor.submit(noop) for _ in range(500)]))
    assert len(done.done) == 500


def test_round_trip(benchmark: Benchmark, executor: StandardExecutor) -> None:
    assert benchmark(lambda: executor.submit(noop).result()) is None


@pytest.mark.parametrize("chunksize", [1, 16])
def test_map(benchmark: Benchmark, executor: StandardExecutor, chunksize: int) -> None:
    assert benchmark(lambda: list(executor.map(noop, range(500), chunksize=chunksize))) == [None] * 500


def test_done(benchmark: Benchmark, executor: StandardExecutor) -> None:
    future = executor.submit(noop)
    wait([future])
    assert benchmark(future.done)


def work(steps: int, report: bool) -> None:
    for number in range(steps):
        sum(range(100))
        if report:
            current_job.update(progress=number / steps, message="working", number=number)


def go_through(items: range, tracking: bool) -> None:
    for _ in track(items) if tracking else items:
        pass


@pytest.fixture(params=["thread", "process"])
def with_control(request: pytest.FixtureRequest) -> Iterator[Executor]:
    app = Flask("benchmark")
    app.config.update(EXECUTOR_TYPE=request.param, EXECUTOR_MAX_WORKERS=1, EXECUTOR_START_METHOD="fork")
    with Executor(app) as executor:
        yield executor


@pytest.mark.parametrize("report", [False, True])
def test_reports(benchmark: Benchmark, with_control: Executor, report: bool) -> None:
    assert benchmark(lambda: with_control.submit(work, 20_000, report).result()) is None


@pytest.mark.parametrize("tracking", [False, True])
def test_track(benchmark: Benchmark, with_control: Executor, tracking: bool) -> None:
    assert benchmark(lambda: with_control.submit(go_through, range(1_000_000), tracking).result()) is None
