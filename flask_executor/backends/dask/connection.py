"""The connection of this process to a Dask scheduler: a thread that runs the event loop of the client."""

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
from flask_executor.helpers.app_import import import_string_of

T = TypeVar("T")

RESPONSE_TIMEOUT = 4.0  #: Seconds that a scheduler may take to answer a thread that submits.
RECONNECT_DELAY = 1.0  #: Seconds between two attempts to reach a scheduler.

_CLUSTER_START_TIMEOUT = 60.0  # seconds that a cluster of this process may take to start
_RECONNECTING_POLL_INTERVAL = 0.05  # seconds between two looks whether Dask's client has reconnected; it has no event


class SchedulerConnection(threading.Thread):
    """A connection to the scheduler at a URL, or to a local cluster that it starts.

    After :meth:`close` it ends when all requests have been answered; one with a local cluster also waits for its tasks.
    """

    # The event loop alone touches the private attributes, except for _requests and _closed: _lock guards those.

    def __init__(self, url: str | None, options: BackendOptions) -> None:
        super().__init__(name="flask-executor-dask", daemon=True)
        self._url = url
        self._options = options
        if url is None:  # before there is a thread: whoever submits is told, and nothing is left behind
            app = None if options.app is None else options.app()
            key = options.config_key("EXECUTOR_APP")
            self._app_import = import_string_of(app, options.app_import, key, "Dask's workers")
        self._opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._lock = threading.Lock()
        self._requests: set[concurrent.futures.Future[Any]] = set()
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._connecting: asyncio.Task[distributed.Client] | None = None
        self._failed_at = -math.inf  # time of the last failure to connect (monotonic)
        self.client: distributed.Client | None = None
        self.cluster: distributed.LocalCluster | None = None
        forget_in_child(self)

    # ---- called from other threads ----

    def open(self) -> None:
        """Start the thread, and wait until its event loop runs.

        :raises OSError: if no event loop can be made.
        """
        self.start()
        self._opened.result()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop, and return its result.

        :raises OSError: or one of the errors for timeouts, if the scheduler cannot be reached.
        :raises ExecutorShutdown: if the connection is closed.
        """
        with self._lock:
            if self._closed:
                coroutine.close()
                raise ExecutorShutdown("this executor was shut down meanwhile")
            request = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._requests.add(request)
        request.add_done_callback(self._requests.discard)
        try:
            return request.result(RESPONSE_TIMEOUT if self._url else _CLUSTER_START_TIMEOUT)
        except concurrent.futures.CancelledError as error:
            raise ExecutorShutdown("this executor was shut down meanwhile") from error
        finally:
            request.cancel()

    def close(self, *, at_once: bool = False) -> None:
        """Have the thread end, without waiting for that.

        :param at_once: if true, cancel what is unfinished.
        """
        with suppress(RuntimeError):  # the event loop has ended already
            self._loop.call_soon_threadsafe((self._cancelling if at_once else self._closing).set)

    # ---- called in the event loop ----

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task, which is cancelled when the connection ends."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def connected(self) -> distributed.Client:
        """The client, connected. All callers share one attempt, which goes on when they have timed out.

        :raises OSError: if the scheduler cannot be reached.
        """
        while self.client is not None and self.client.status == "connecting":  # Dask's client reconnects by itself
            await asyncio.sleep(_RECONNECTING_POLL_INTERVAL)
        if self.client is not None and self.client.status == "running":
            return self.client
        if time.monotonic() - self._failed_at < RECONNECT_DELAY:
            raise OSError("it was not there a moment ago")
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(_mark_retrieved)
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> distributed.Client:
        if self._url is None and self.cluster is None:
            self.cluster = await self._start_cluster()
        address = self.cluster or self._url
        client = distributed.Client(address, asynchronous=True, timeout=RESPONSE_TIMEOUT, set_as_default=False)
        try:
            self.client = await client
        except BaseException:
            self._failed_at = time.monotonic()
            client.status = "closed"  # or it would close itself again when it is collected, in any thread
            raise
        return self.client

    async def _start_cluster(self) -> distributed.LocalCluster:
        with dask.config.set({"distributed.scheduler.worker-saturation": 1.0}):  # or priorities would not hold
            cluster = distributed.LocalCluster(
                n_workers=self._options.max_workers or os.cpu_count() or 1,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                asynchronous=True,
                env={"FLASK_APP": self._app_import},  # which these workers are started with
            )
            try:
                return await cluster
            except BaseException as error:
                with suppress(Exception):  # the parts that have started would stay: the next attempt makes a new one
                    await cluster.close()
                if isinstance(error, RuntimeError):  # Dask wraps all errors of the start in it
                    raise OSError(str(error)) from error
                raise

    # ---- the thread ----

    def run(self) -> None:
        main = self._main()
        try:
            with suppress(asyncio.CancelledError):
                asyncio.run(main)
        except BaseException as error:
            if self._opened.done():
                raise
            main.close()
            self._opened.set_exception(error)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing, self._cancelling = asyncio.Event(), asyncio.Event()
        self._opened.set_result(None)
        await self._closing.wait()
        await self._drain()
        with self._lock:
            self._closed = True
        await self._drain()  # requests that came meanwhile
        left = [*self._tasks, *filter(None, [self._connecting])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for resource in (self.client, self.cluster):
            if resource is not None:
                with suppress(OSError, asyncio.TimeoutError):
                    await resource.close()

    async def _drain(self) -> None:
        """Wait until nothing is unfinished, or the connection is to end at once."""
        cancelling: asyncio.Future[Any] = asyncio.create_task(self._cancelling.wait())
        while not cancelling.done() and (left := self._unfinished()):
            all_done: asyncio.Future[Any] = asyncio.gather(*left, return_exceptions=True)
            await asyncio.wait({cancelling, all_done}, return_when=asyncio.FIRST_COMPLETED)
        cancelling.cancel()

    def _unfinished(self) -> list[asyncio.Future[Any]]:
        """Unanswered requests, an attempt to connect, and with a local cluster the tasks, as it ends with this."""
        left: list[asyncio.Future[Any]] = [asyncio.wrap_future(request) for request in list(self._requests)]
        if self._connecting is not None and not self._connecting.done():
            left.append(self._connecting)
        return left if self._url else [*left, *self._tasks]


def _mark_retrieved(task: asyncio.Task[Any]) -> None:
    """Take note of the task's error: asyncio would complain if all callers have timed out."""
    if not task.cancelled():
        task.exception()
