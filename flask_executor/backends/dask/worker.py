"""What workers of Dask run, and how this package is one."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import distributed
from distributed.core import Status

from flask_executor.abc import BackendOptions
from flask_executor.backends.engine.entrypoint import Address
from flask_executor.backends.engine.entrypoint import run as run_sent
from flask_executor.helpers.log import logger

#: In the environment of workers: their scheduler, for jobs that start jobs.
SCHEDULER = "_FLASK_EXECUTOR_DASK"

_PATIENCE = 4.0  # seconds that the scheduler may take to answer a worker that ends
_AGAIN = 1.0  # seconds until a worker that could not be started is tried again

_running: set[str] = set()  # ids of jobs that run in this process


def run(address: Address, id: str, data: bytes, at: float = 0.0) -> None:
    """What a worker of Dask runs.

    :param at: when it is to run, as :func:`time.time` tells it.
    """
    early = at - time.time()
    seconds = early if early > 0 else _run_now(address, id, data)
    if seconds is None:
        return
    if seconds > 0:
        distributed.secede()
        time.sleep(seconds)
    raise distributed.Reschedule


def _run_now(address: Address, id: str, data: bytes) -> float | None:
    """Run it, and return None; in how many seconds it is to be run again."""
    os.environ.setdefault(SCHEDULER, distributed.get_worker().scheduler.address)
    if address[0] is not None:  # the processes of a nanny spawn their children, which import the app
        os.environ.setdefault("FLASK_APP", address[0])
    _running.add(id)
    try:
        # A process that is forked here must not take itself for a worker of Dask: it does not have its event loop.
        return contextvars.Context().run(run_sent, address, id, data)
    finally:
        _running.discard(id)


class Signals:
    """SIGTERM and Ctrl-C: at the first one a worker ends after its jobs, at the second one it stops them."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not asyncio's own handlers: processes that are forked here would share them.
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        with suppress(RuntimeError):  # the loop has ended: the process is about to
            self._loop.call_soon_threadsafe((self.second if self.first.is_set() else self.first).set)


async def serve(
    url: str, resources: dict[str, float] | None, stop: Callable[[str], object], options: BackendOptions
) -> None:
    """Be a worker until a signal says to end; a new one when the scheduler is."""
    signals = Signals()
    ended = asyncio.create_task(signals.first.wait())
    while not ended.done():
        worker = distributed.Worker(url, nthreads=1, resources=resources)
        life = asyncio.create_task(_live(worker))
        await asyncio.wait({life, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            await _retire(worker, signals.second, stop, options)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        with suppress(OSError, asyncio.TimeoutError):  # one that has not begun may take half a minute
            await asyncio.wait_for(worker.close(timeout=1, nanny=False, executor_wait=False), _PATIENCE)


async def _live(worker: distributed.Worker) -> None:
    try:
        await worker
    except Exception:
        logger.exception("A worker of Dask could not be started.")
        await asyncio.sleep(_AGAIN)
    else:
        await worker.finished()


async def _retire(
    worker: distributed.Worker, cut: asyncio.Event, stop: Callable[[str], object], options: BackendOptions
) -> None:
    """Have a worker end after the jobs of this process, some of which it may have got before its scheduler was lost."""
    if worker.status is Status.running:
        worker.status = Status.paused  # it gets no more
    await _let_end(cut, options.shutdown_timeout)
    for id in list(_running):
        stop(id)
    await _let_end(None, options.exit_grace + 1)
    if worker.status in (Status.running, Status.paused):
        with suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(worker.close_gracefully(), _PATIENCE)


async def _let_end(cut: asyncio.Event | None, seconds: float) -> None:
    """Let the jobs of this process end, within a limit."""
    deadline = time.monotonic() + seconds
    while _running and time.monotonic() < deadline and not (cut is not None and cut.is_set()):
        await asyncio.sleep(0.05)
