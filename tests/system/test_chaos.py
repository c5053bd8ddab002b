"""Workers under random violence: every job ends, exactly the victims fail, and nothing is left over."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tasks import add, die, pid, sleep, spin, tracked

from flask_executor import Executor, FutureProxy, JobStopped, JobTimeout, WorkerLost
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until

JOBS_A_SECOND = 33


class Chaos:
    """Jobs of all kinds, and what may become of each."""

    def __init__(self, executor: Executor, seed: int) -> None:
        self.executor = executor
        self.random = random.Random(seed)
        self.jobs: list[tuple[str, FutureProxy[Any], Any]] = []
        self.shot: set[int] = set()  # the ids of workers that were killed from outside
        self.done = threading.Event()

    def submit(self, number: int) -> None:
        kind = self.random.choices(
            ["add", "sleep", "tracked", "crash", "spin", "timeout", "cancel"], [40, 20, 10, 4, 2, 4, 8]
        )[0]
        options = self.executor.options(priority=self.random.choice((0, 0, 0, 1, -1)))
        seconds = self.random.uniform(0, 0.06)
        job: FutureProxy[Any]
        expected: Any = None
        if kind == "add":
            job, expected = options.submit(add, number, 1), number + 1
        elif kind == "sleep":
            job, expected = options.submit(sleep, seconds), seconds
        elif kind == "tracked":
            job = options.submit(tracked, [1] * 10_000, 0.001)
        elif kind == "crash":
            job = options.submit(die, self.random.choice(("kill", "exit", "segfault")))
        elif kind == "spin":
            job = options.submit(spin)
        elif kind == "timeout":
            job = self.executor.options(timeout=seconds + 0.001).submit(spin)
        else:
            job = options.submit(add, number)
            job.cancel()
        self.jobs.append((kind, job, expected))

    def stop_some(self) -> None:
        while not self.done.wait(self.random.uniform(0, 0.03)):
            for kind, job, _ in self.jobs:
                if kind in ("tracked", "spin") and job.running() and not job.stop_requested:
                    job.stop(grace=self.random.choice((0, 0.01, 0.05)))

    def shoot_some(self) -> None:
        while not self.done.wait(self.random.uniform(0, 0.4)):
            workers = list(self.executor._self._processes)
            if workers:
                worker = self.random.choice(workers)
                self.shot.add(worker)
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(worker, signal.SIGKILL)

    def check(self) -> None:
        """Everything has ended, in one of the ways in which it may."""
        for kind, job, expected in self.jobs:
            assert job.done(), (kind, job.record())
            if job.cancelled():
                assert kind in ("cancel", "tracked", "spin"), "nobody has asked for the others to be cancelled"
                continue
            error = job.exception()
            if isinstance(error, WorkerLost):
                assert job.status == "lost"
                assert kind == "crash" or error.pid in self.shot, (kind, error)
            elif kind in ("add", "sleep"):
                assert error is None
                assert job.result() == expected
            elif kind == "cancel":
                assert error is None, "it had begun before it could be cancelled"
            elif kind == "timeout":
                assert isinstance(error, JobTimeout)
            else:
                assert kind != "crash"
                assert isinstance(error, JobStopped), (kind, error)
        kinds = [kind for kind, _, _ in self.jobs]
        lost = [kind for kind, job, _ in self.jobs if job.status == "lost"]
        assert lost.count("crash") <= kinds.count("crash")
        assert len(lost) - lost.count("crash") <= len(self.shot), "one worker that is killed is the end of one job"


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.storm)])
def test_chaos(make_executor: MakeExecutor, seconds: int) -> None:
    seed = int(os.environ.get("CHAOS_SEED", time.time()))
    print(f"CHAOS_SEED={seed}")  # shown when it fails
    executor = make_executor(type="process", max_workers=2, stop_grace=0.02)
    assert list(executor.map(pid, range(100)))
    before, threads, descriptors = memory(), threading.active_count(), open_files()
    chaos = Chaos(executor, seed)
    helpers = [threading.Thread(target=target) for target in (chaos.stop_some, chaos.shoot_some)]
    for helper in helpers:
        helper.start()
    for number in range(seconds * JOBS_A_SECOND):
        chaos.submit(number)
        time.sleep(1 / JOBS_A_SECOND)  # the rate of a busy app, in which workers are idle now and then
    for _, job, _ in chaos.jobs:
        if job.stop_requested is False and not job.done():
            assert wait_until(job.done, 30), job.record()
    chaos.done.set()
    for helper in helpers:
        helper.join()
    drain(executor)
    chaos.check()
    assert executor.submit(add, 1, 1).result(10) == 2, "the pool is as good as new"
    chaos.jobs.clear()
    gc.collect()
    assert wait_until(lambda: threading.active_count() <= threads + 1)
    assert wait_until(lambda: open_files() <= descriptors), (descriptors, open_files())
    assert memory() < before + 30_000, "kB"


def memory() -> int:
    """What this process has in memory, in kB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])
