"""The connection of this process with a scheduler of Dask: a thread, which has the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import dask
import distributed

from flask_executor.abc import BackendOptions
from flask_executor.backends.dask.after_fork import forget_in_child
from flask_executor.exceptions import ExecutorShutdown

T = TypeVar("T")

PATIENCE = 4.0  #: Seconds that a scheduler may take to answer those who submit.
AGAIN = 1.0  #: Seconds until a scheduler that was not there is tried again.

_START = 60.0  # seconds that a cluster of this process may take to start


class SchedulerConnection(threading.Thread):
    """A connection with a scheduler, or with a cluster of its own.

    It ends when all is answered that was asked, and that of its own when what it looks after has ended.
    """

    # What begins with _ is touched in the event loop only, but for _asked and _closed, which change under _gate.

    def __init__(self, url: str | None, options: BackendOptions) -> None:
        super().__init__(name="flask-executor-dask", daemon=True)
        self._url = url
        self._options = options
        self._begun: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._gate = threading.Lock()
        self._asked: set[concurrent.futures.Future[Any]] = set()
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._connecting: asyncio.Task[distributed.Client] | None = None
        self._failed = -math.inf  # when it was that no connection could be made
        self.client: distributed.Client | None = None
        self.cluster: distributed.LocalCluster | None = None
        forget_in_child(self)

    # ---- from other threads ----

    def begin(self) -> None:
        """Start the thread.

        :raises OSError: when it cannot have an event loop.
        """
        self.start()
        self._begun.result()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns that runs in the event loop.

        :raises OSError: or one of the errors for timeouts, when the scheduler cannot be reached.
        :raises ExecutorShutdown: when the line has ended.
        """
        with self._gate:
            if self._closed:
                coroutine.close()
                raise ExecutorShutdown("this executor was shut down meanwhile")
            answer = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._asked.add(answer)
        answer.add_done_callback(self._asked.discard)
        try:
            return answer.result(PATIENCE if self._url else _START)
        except concurrent.futures.CancelledError as error:
            raise ExecutorShutdown("this executor was shut down meanwhile") from error
        finally:
            answer.cancel()

    def end(self, *, at_once: bool = False) -> None:
        """Have it end when nothing is left to do, or at once."""
        with suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe((self._cut if at_once else self._ending).set)

    # ---- in the event loop ----

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine for as long as there is this line."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def connected(self) -> distributed.Client:
        """The client, connected. One attempt at a time, which goes on when somebody has waited long enough for it.

        :raises OSError: when the scheduler cannot be reached.
        """
        while self.client is not None and self.client.status == "connecting":  # again, which it does by itself
            await asyncio.sleep(0.05)
        if self.client is not None and self.client.status == "running":
            return self.client
        if time.monotonic() - self._failed < AGAIN:
            raise OSError("it was not there a moment ago")
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(_note_error)
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> distributed.Client:
        if self._url is None and self.cluster is None:
            self.cluster = await self._start_cluster()
        where = self.cluster or self._url
        client = distributed.Client(where, asynchronous=True, timeout=PATIENCE, set_as_default=False)
        try:
            self.client = await client
        except BaseException:
            self._failed = time.monotonic()
            client.status = "closed"  # or it would be closed once more when it is collected, in whichever thread
            raise
        return self.client

    async def _start_cluster(self) -> distributed.LocalCluster:
        with dask.config.set({"distributed.scheduler.worker-saturation": 1.0}):  # those of high priority go first
            cluster = distributed.LocalCluster(
                n_workers=self._options.max_workers or os.cpu_count() or 1,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                asynchronous=True,
            )
            try:
                return await cluster
            except BaseException as error:
                with suppress(Exception):  # what there is of it would stay, and the next attempt makes another one
                    await cluster.close()
                if isinstance(error, RuntimeError):  # what Dask makes of all errors there
                    raise OSError(str(error)) from error
                raise

    # ---- life ----

    def run(self) -> None:
        life = self._live()
        try:
            with suppress(asyncio.CancelledError):
                asyncio.run(life)
        except BaseException as error:
            if self._begun.done():
                raise
            life.close()
            self._begun.set_exception(error)

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending, self._cut = asyncio.Event(), asyncio.Event()
        self._begun.set_result(None)
        await self._ending.wait()
        await self._finish()
        with self._gate:
            self._closed = True
        await self._finish()  # what was asked meanwhile
        left = [*self._tasks, *filter(None, [self._connecting])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for each in (self.client, self.cluster):
            if each is not None:
                with suppress(OSError, asyncio.TimeoutError):
                    await each.close()

    async def _finish(self) -> None:
        """Wait for what is in hand, unless it is to end at once."""
        cut: asyncio.Future[Any] = asyncio.create_task(self._cut.wait())
        while not cut.done() and (left := self._in_hand()):
            all_of_it: asyncio.Future[Any] = asyncio.gather(*left, return_exceptions=True)
            await asyncio.wait({cut, all_of_it}, return_when=asyncio.FIRST_COMPLETED)
        cut.cancel()

    def _in_hand(self) -> list[asyncio.Future[Any]]:
        """What others wait for, a connection that is being made, and what runs in a cluster of ours."""
        left: list[asyncio.Future[Any]] = [asyncio.wrap_future(answer) for answer in list(self._asked)]
        if self._connecting is not None and not self._connecting.done():
            left.append(self._connecting)
        return left if self._url else [*left, *self._tasks]


def _note_error(task: asyncio.Task[Any]) -> None:
    """Nobody may be there any more who waits for it, and asyncio would complain."""
    if not task.cancelled():
        task.exception()
