"""One contender of ``compare.py``, in a process of its own: times what it is told to, line by line.

``python contender.py bare`` is the standard pool; ``python contender.py flask_executor`` is whichever
package of that name is found first. Each line of input is the name of a case and a count; each line
of output is the seconds it took, or ``fails`` with the reason.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from flask import Flask


def noop(_: object = None) -> None:
    pass


class Cases:
    """The timed cases; each takes how many jobs and gives the seconds they took."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def bulk(self, count: int, workers: int) -> float:
        with self.make(workers) as executor:
            executor.submit(noop).result()
            begin = time.perf_counter()
            wait([executor.submit(noop) for _ in range(count)])
            return time.perf_counter() - begin

    def bulk_1(self, count: int) -> float:
        return self.bulk(count, 1)

    def bulk_6(self, count: int) -> float:
        return self.bulk(count, 6)

    def round_trip(self, count: int) -> float:
        with self.make(1) as executor:
            executor.submit(noop).result()
            begin = time.perf_counter()
            for _ in range(count):
                executor.submit(noop).result()
            return time.perf_counter() - begin

    def round_trip_paced(self, count: int) -> float:
        """As a server has them: with a pause before each, in which caches and threads go cold."""
        with self.make(1) as executor:
            executor.submit(noop).result()
            elapsed = 0.0
            for _ in range(count):
                time.sleep(0.001)
                begin = time.perf_counter()
                executor.submit(noop).result()
                elapsed += time.perf_counter() - begin
            return elapsed

    def map_6(self, count: int, **kwargs: Any) -> float:
        with self.make(6) as executor:
            executor.submit(noop).result()
            begin = time.perf_counter()
            for _ in executor.map(noop, range(count), **kwargs):
                pass
            return time.perf_counter() - begin

    def map_6_chunks(self, count: int) -> float:
        return self.map_6(count, chunksize=16)

    def done(self, count: int) -> float:
        with self.make(1) as executor:
            future = executor.submit(noop)
            future.result()
            begin = time.perf_counter()
            for _ in range(count):
                future.done()
            return time.perf_counter() - begin

    def wait_finished(self, count: int) -> float:
        with self.make(1) as executor:
            futures = [executor.submit(noop) for _ in range(count)]
            wait(futures)
            begin = time.perf_counter()
            for _ in range(5):
                wait(futures)
            return (time.perf_counter() - begin) / 5

    def membership(self, count: int) -> float:
        """The time of one test, in a collection of ``count``."""
        executor = self.make(1)
        executor.futures.max_length = count
        futures = [executor.submit_stored(key, noop) for key in range(count)]
        times = 20
        begin = time.perf_counter()
        for _ in range(times):
            assert futures[-1] in executor.futures
        elapsed = (time.perf_counter() - begin) / times
        executor.shutdown()
        return elapsed


def make_extension(app: Flask, workers: int) -> Any:
    from flask_executor import Executor

    app.config["EXECUTOR_MAX_WORKERS"] = workers
    app.extensions.pop("executor", None)
    return Executor(app)


def main() -> None:
    app = Flask("contender")
    app.secret_key = "contender"
    bare = sys.argv[1] == "bare"
    cases = Cases(ThreadPoolExecutor if bare else lambda workers: make_extension(app, workers))
    for line in sys.stdin:
        case, count = line.split()
        with app.test_request_context("/"):
            try:
                print(getattr(cases, case)(int(count)), flush=True)
            except Exception as error:
                print("fails", repr(error), flush=True)


if __name__ == "__main__":
    main()
