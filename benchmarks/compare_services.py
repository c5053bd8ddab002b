"""Print one table: calls and messages to services, beside jobs on worker processes and a bare pipe.

.. code-block:: console

    $ python benchmarks/compare_services.py            # half a minute; --rounds 2 for a glance

The rounds are interleaved, so that a machine that slows down slows down all of them; what is printed are medians of one
run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flask import Flask

from flask_executor import Executor, Service, on

CALLS = 500  # of a round
MESSAGES = 20_000


class Counter(Service):
    """Counts."""

    def setup(self) -> None:
        self.count = 0

    @on("note")
    def note(self, _: object) -> None:
        self.count += 1

    @on("count")
    def get_count(self, _: object) -> int:
        count, self.count = self.count, 0
        return count


def nothing(_: object) -> None:
    """A job that does nothing."""


def app_with_service(folder: Path) -> tuple[Flask, Executor, Any]:
    """Those that share a folder share the workers."""
    app = Flask("shop", instance_path=str(folder))
    app.config.update(EXECUTOR_TYPE="process", EXECUTOR_MAX_WORKERS=1)
    executor = Executor(app)
    return app, executor, executor.service(Counter)


def round_trips(call: Callable[[int], object]) -> float:
    """Seconds for each of many, one after the other."""
    begin = time.perf_counter()
    for number in range(CALLS):
        call(number)
    return (time.perf_counter() - begin) / CALLS


def messages(service: Any) -> float:
    """How many are sent and handled in a second."""
    begin = time.perf_counter()
    for number in range(MESSAGES):
        service.send("note", number)
    assert service.call("count").result() == MESSAGES
    return MESSAGES / (time.perf_counter() - begin)


def pipe() -> float:
    """The same number over a pipe of the standard library, each one counted."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_count, args=(there,))
    process.start()
    begin = time.perf_counter()
    for number in range(MESSAGES):
        here.send(("note", number))
    here.send(None)
    assert here.recv() == MESSAGES
    rate = MESSAGES / (time.perf_counter() - begin)
    process.join()
    return rate


def _count(end: Connection) -> None:
    count = 0
    while end.recv() is not None:
        count += 1
    end.send(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds: int = parser.parse_args().rounds
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        app, executor, service = app_with_service(Path(folder))
        other, following, relayed = app_with_service(Path(folder))
        service.call("count").result()
        relayed.call("count").result()
        measures: dict[str, tuple[Flask, Callable[[], float]]] = {
            "process job, round trip (s)": (app, lambda: round_trips(lambda n: executor.submit(nothing, n).result())),
            "call of a service, round trip (s)": (app, lambda: round_trips(lambda n: service.call("note", n).result())),
            "the same through the leader (s)": (other, lambda: round_trips(lambda n: relayed.call("note", n).result())),
            "messages a second, bare pipe": (app, pipe),
            "messages a second": (app, lambda: messages(service)),
            "the same through the leader": (other, lambda: messages(relayed)),
        }
        for _ in range(rounds + 1):  # the first one warms up
            service.call("count").result()
            for name, (its_app, measure) in measures.items():
                with its_app.test_request_context("/predictions"):  # as in a view
                    times.setdefault(name, []).append(measure())
                service.call("count").result()
        following.shutdown()
        executor.shutdown()
    print(f"Python {platform.python_version()}, medians of {rounds} rounds\n")
    for name, values in times.items():
        median = statistics.median(values[1:])
        print(f"{name:36} {median:12.6f}" if "(s)" in name else f"{name:36} {median:12,.0f}")


if __name__ == "__main__":
    main()
