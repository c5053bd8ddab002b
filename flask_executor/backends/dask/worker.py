"""The task that Dask's workers run, and ``flask executor worker`` as a worker of Dask."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import distributed
from distributed.core import Status

from flask_executor.abc import BackendOptions
from flask_executor.backends.engine.entrypoint import Destination
from flask_executor.backends.engine.entrypoint import run as run_sent
from flask_executor.helpers.log import logger

#: Environment variable of workers: the URL of their scheduler, for jobs that submit jobs.
SCHEDULER = "_FLASK_EXECUTOR_DASK"

_CLOSE_TIMEOUT = 4.0  # seconds that a worker may take to sign off at its scheduler
_RESTART_DELAY = 1.0  # seconds between a failed start of a worker and the next one

_running: dict[str, Future[None]] = {}  # by the id of a job that runs in this process: completed when run() is over


def run(destination: Destination, id: str, data: bytes, at: float = 0.0) -> None:
    """The task of a call. Runs in a thread of a worker.

    :param at: the time at which the call is to run (:func:`time.time`); 0.0 for at once.
    """
    early = at - time.time()
    seconds = early if early > 0 else _run_now(destination, id, data)
    if seconds is None:
        return
    if seconds > 0:
        distributed.secede()
        time.sleep(seconds)
    raise distributed.Reschedule


def _run_now(destination: Destination, id: str, data: bytes) -> float | None:
    """Run a call: None, or seconds until it is to run again."""
    os.environ.setdefault(SCHEDULER, distributed.get_worker().scheduler.address)
    ended = _running[id] = Future()
    try:
        # In an empty context, or a process that is forked here would act as this worker without its event loop.
        return contextvars.Context().run(run_sent, destination, id, data)
    finally:
        _running.pop(id, None)  # the scheduler may have given the call to two threads
        ended.set_result(None)


class Signals:
    """SIGTERM and Ctrl-C: the first one ends the worker after its jobs, the second one stops these."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not loop.add_signal_handler(): forked processes would share its wakeup descriptor.
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        with suppress(RuntimeError):  # the event loop has ended, and the process is about to
            self._loop.call_soon_threadsafe((self.second if self.first.is_set() else self.first).set)


class _Worker(distributed.Worker):  # type: ignore[misc]  # Dask has no types
    """A worker that closes without waiting for its threads; :func:`_retire` has waited for the jobs.

    Dask would wait for them with a lock on all pools of the process. If the worker of before is still closing, after a
    restart of the scheduler, each may wait for the other for half a minute.
    """

    async def close(self, timeout: float = 30, executor_wait: bool = False, **options: Any) -> Any:
        return await super().close(timeout=timeout, executor_wait=False, **options)


async def serve(
    url: str, resources: dict[str, float] | None, stop: Callable[[str], object], options: BackendOptions
) -> None:
    """Run a worker until a signal ends it, and a new one when its scheduler is restarted."""
    signals = Signals()
    ending = asyncio.create_task(signals.first.wait())
    while not ending.done():
        worker = _Worker(url, nthreads=1, resources=resources)
        life = asyncio.create_task(_run_worker(worker))
        await asyncio.wait({life, ending}, return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            await _retire(worker, signals.second, stop, options)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        with suppress(OSError, asyncio.TimeoutError):  # closing a worker that has not started may take 30 seconds
            await asyncio.wait_for(worker.close(timeout=1, nanny=False), _CLOSE_TIMEOUT)


async def _run_worker(worker: distributed.Worker) -> None:
    try:
        await worker
    except Exception:
        logger.exception("A worker of Dask could not be started.")
        await asyncio.sleep(_RESTART_DELAY)
    else:
        await worker.finished()


async def _retire(
    worker: distributed.Worker, hurry: asyncio.Event, stop: Callable[[str], object], options: BackendOptions
) -> None:
    """End a worker after the jobs of this process; it may have received some before it lost its last scheduler.

    :param hurry: when it is set, the jobs are stopped at once, and not after the shutdown timeout.
    """
    if worker.status is Status.running:
        worker.status = Status.paused  # the scheduler assigns no more calls to it
    await _wait_for_jobs(options.shutdown_timeout, hurry)
    for id in list(_running):
        stop(id)
    await _wait_for_jobs(options.exit_grace + 1)
    if worker.status in (Status.running, Status.paused):
        with suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(worker.close_gracefully(), _CLOSE_TIMEOUT)


async def _wait_for_jobs(timeout: float, hurry: asyncio.Event | None = None) -> None:
    """Wait until no job runs in this process, ``hurry`` is set, or ``timeout`` seconds have passed."""
    waiters: list[asyncio.Task[object]] = [asyncio.create_task(_no_job_runs())]
    if hurry is not None:
        waiters.append(asyncio.create_task(hurry.wait()))
    await asyncio.wait(waiters, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for waiter in waiters:
        waiter.cancel()


async def _no_job_runs() -> None:
    while running := list(_running.values()):
        await asyncio.wait([asyncio.wrap_future(ended) for ended in running])
