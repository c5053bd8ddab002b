"""One contender of ``compare_processes.py``, in a process of its own: measures what it is told to, line by line.

``main("standard")`` is the standard pool, ``main("request")`` this package inside a request context; the others are
in :data:`CONTENDERS`. Each line of input is the name of a case and a count; each line of output is what was measured
(seconds, for ``memory`` bytes), or ``fails`` with the reason.

It has to be imported, not run: what is defined in a ``__main__`` module some pools send in a slower way.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from flask import Flask

WORKERS = 2
KIB = 1024
MIB = 1024 * KIB


def noop(_: object = None) -> None:
    pass


def large(size: int) -> bytes:
    return bytes(size)


class Pool(Protocol):
    """What the cases use of a pool."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]: ...

    def shutdown(self) -> None: ...


def standard() -> Pool:
    return ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork"))


def loky() -> Pool:
    """It starts its processes in a way of its own, anew instead of forked."""
    pool: Pool = importlib.import_module("loky").ProcessPoolExecutor(WORKERS)
    return pool


class Pebble:
    """A ``pebble.ProcessPool``."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pool = importlib.import_module("pebble").ProcessPool(max_workers=WORKERS, context=context)

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = self._pool.schedule(fn, args=args)
        return future

    def shutdown(self) -> None:
        self._pool.close()
        self._pool.join()


class ProcessPerJob:
    """A process for each job, and a pipe for its result; as many at a time as a pool has workers."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("fork")
        self._threads = ThreadPoolExecutor(WORKERS)

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        return self._threads.submit(self._run, fn, args)

    def shutdown(self) -> None:
        self._threads.shutdown()

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run_and_send, args=(sender, fn, args))
        process.start()
        sender.close()
        with receiver:
            result = receiver.recv()
        process.join()
        return result


def _run_and_send(sender: Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    sender.send(fn(*args))


def make_app() -> Flask:
    app = Flask("contender")
    app.secret_key = "contender"
    app.config.update(EXECUTOR_TYPE="process", EXECUTOR_MAX_WORKERS=WORKERS, EXECUTOR_START_METHOD="fork")
    return app


def ours(app: Flask) -> Pool:
    from flask_executor import Executor

    app.extensions.pop("executor", None)
    return Executor(app)


#: name, what makes the pool, and the context that jobs are submitted in. All of them have an app, as theirs would too.
CONTENDERS: dict[str, tuple[Callable[[Flask], Pool], Callable[[Flask], contextlib.AbstractContextManager[Any]]]] = {
    "standard": (lambda app: standard(), Flask.app_context),
    "loky": (lambda app: loky(), Flask.app_context),
    "pebble": (lambda app: Pebble(), Flask.app_context),
    "per_job": (lambda app: ProcessPerJob(), Flask.app_context),
    "ours": (ours, Flask.app_context),
    "request": (ours, lambda app: app.test_request_context("/")),
}


class Cases:
    """The measured cases; each takes how many jobs and gives the seconds they took, or the bytes."""

    def __init__(self, make: Callable[[], Pool]) -> None:
        self.make = make

    def bulk(self, count: int) -> float:
        with self.warm_pool() as pool:
            return self.timed(pool, count, noop)

    def bulk_1k(self, count: int) -> float:
        with self.warm_pool() as pool:
            return self.timed(pool, count, noop, bytes(KIB))

    def bulk_1m(self, count: int) -> float:
        with self.warm_pool() as pool:
            return self.timed(pool, count, noop, bytes(MIB))

    def result_1m(self, count: int) -> float:
        with self.warm_pool() as pool:
            return self.timed(pool, count, large, MIB)

    def round_trip(self, count: int) -> float:
        with self.warm_pool() as pool:
            begin = time.perf_counter()
            for _ in range(count):
                pool.submit(noop).result()
            return time.perf_counter() - begin

    def first_job(self, count: int) -> float:
        """From the making of a pool to the result of its first job, ``count`` times."""
        elapsed = 0.0
        for _ in range(count):
            begin = time.perf_counter()
            pool = self.make()
            try:
                pool.submit(noop).result()
                elapsed += time.perf_counter() - begin
            finally:
                pool.shutdown()
        return elapsed

    def memory(self, count: int) -> float:
        """Bytes that this process and its workers hold after ``count`` jobs whose futures are gone."""
        with self.warm_pool() as pool:
            self.timed(pool, count, noop)
            return sum(map(proportional_set_size, family(os.getpid())))

    @contextlib.contextmanager
    def warm_pool(self) -> Iterator[Pool]:
        """A pool of which all workers have started."""
        pool = self.make()
        try:
            wait([pool.submit(time.sleep, 0.05) for _ in range(WORKERS)])
            yield pool
        finally:
            pool.shutdown()

    def timed(self, pool: Pool, count: int, fn: Callable[..., Any], *args: Any) -> float:
        begin = time.perf_counter()
        futures = [pool.submit(fn, *args) for _ in range(count)]
        wait(futures)
        elapsed = time.perf_counter() - begin
        for future in futures:
            future.result()  # raises what went wrong
        return elapsed


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    pids = [pid]
    for threads in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in threads.read_text().split():
            pids += family(int(child))
    return pids


def proportional_set_size(pid: int) -> int:
    """Bytes of memory, of which shared pages count in parts."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * KIB
    raise LookupError(f"no PSS of process {pid}")


def main(kind: str) -> None:
    app = make_app()
    make, context = CONTENDERS[kind]
    cases = Cases(lambda: make(app))
    for line in sys.stdin:
        case, count = line.split()
        with context(app):
            try:
                print(getattr(cases, case)(int(count)), flush=True)
            except Exception as error:
                print("fails", repr(error), flush=True)
