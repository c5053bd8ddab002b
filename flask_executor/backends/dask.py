"""Jobs run by workers of Dask: on this machine, or on all those that a scheduler of Dask has.

.. code-block:: text

    web process                                      scheduler              worker
      enqueue() ──> _Line (thread, event loop)
                      submit(), fire_and_forget() ──> priority, queue ────> run() ─> remote.run()
                      _see_through(): send it again <─ connection lost       again later: secede, sleep, Reschedule

**Invariants.** A call that was sent stays in its process until a worker has run it: the scheduler keeps in memory what
it has, and one that is started anew gets its calls again. Whoever gets a call twice finds in the store that it is had.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import math
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

from flask_executor.abc import Backend, BackendOptions, PreparedCall
from flask_executor.exceptions import (
    ConfigError,
    EngineUnavailable,
    ExecutorError,
    ExecutorShutdown,
    MissingExtra,
    WorkerLost,
)
from flask_executor.forks import after_fork_in_child
from flask_executor.helpers import without_password
from flask_executor.jobs import Job
from flask_executor.logs import logger
from flask_executor.remote import Address, address_of
from flask_executor.remote import run as run_sent
from flask_executor.troop import run_processes

try:
    import dask
    import distributed
    from dask._task_spec import Task
    from distributed.core import Status
except ImportError as error:
    raise MissingExtra("distributed", "dask") from error

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE = 4.0  # seconds that a scheduler may take to answer those who submit
_START = 60.0  # seconds that a cluster of this process may take to start
_MOMENT = 0.001  # seconds between two looks whether the scheduler has a call
_AGAIN = 1.0  # seconds until a scheduler that was not there is tried again
_LOST = "scheduler-connection-lost"  # what Dask calls it
_DISCARDED = "flask-executor-discarded"  # and what we call it when a job was cancelled
_SCHEDULER = "_FLASK_EXECUTOR_DASK"  # in the environment of workers: their scheduler, for jobs that start jobs
_ID = re.compile(r"-[0-9a-f]{24}\Z")  # what ends the keys of our tasks, and of no others
_WAITING = ("waiting", "no-worker", "queued")  # what tasks are that no worker has


class DaskBackend(Backend):
    """Has calls run by workers of Dask.

    ``EXECUTOR_URL`` is the address of a scheduler; without, the first job starts a cluster on this machine, which ends
    with this process. ``EXECUTOR_QUEUE``, unless it is ``default``, is a resource that workers must have.

    A call that has to wait, for its delay or for its next attempt, waits on a sleeping thread of a worker, in which
    other calls run meanwhile. When that worker ends, another one waits for a delay, but not for the next attempt.
    """

    remote = True
    engine = "dask"
    supports_kill = True

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._url = options.url or os.environ.get(_SCHEDULER)
        self._shutdown = False
        self._lock = threading.Lock()
        self._line: _Line | None = None

    @classmethod
    def broker(cls, options: BackendOptions) -> str:
        """A scheduler keeps no records; a cluster of this process can have them in a file on this machine."""
        return options.url or "sqlite"

    @cached_property
    def _address(self) -> Address:
        return address_of(self._options)

    @cached_property
    def _resources(self) -> dict[str, float] | None:
        return None if self._options.queue == "default" else {self._options.queue: 1}

    def _connection(self) -> _Line:
        with self._lock:
            if self._shutdown:
                raise ExecutorShutdown("cannot schedule new futures after shutdown")
            if self._line is None:
                self._line = _Line(self._url, self._options)
                self._line.start()
            return self._line

    def enqueue(self, call: PreparedCall) -> None:
        at = time.time() + call.delay if call.delay else 0.0
        arguments = (self._address, call.job.id, call.packed, at)
        sent = _Sent(call.job.id, call.job.name, arguments, call.priority, self._resources, weakref.ref(call.future))
        line = self._connection()
        with self._reaching():
            line.ask(line.send(sent))

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        # For asyncio a deadline is another TimeoutError in Python 3.10, and so is one of a future.
        except (OSError, asyncio.TimeoutError, concurrent.futures.TimeoutError) as error:
            where = self._options.config_key("EXECUTOR_URL")
            url = "this machine" if self._url is None else str(without_password(self._url))
            why = str(error) or f"no answer within {_PATIENCE:g} s"
            raise EngineUnavailable("Dask's scheduler", url, where, why) from error

    def discard(self, job: Job) -> None:
        if self._shutdown or (self._url is None and self._line is None):
            return
        line = self._connection()
        with self._reaching():
            line.ask(line.drop(_key(job.name, job.id)))

    def work(self, stop: Callable[[str], object], *, processes: int, burst: bool) -> None:
        url = self._url
        if url is None:
            allowed = "the address of a scheduler ('tcp://host:8786'): without, each web process has workers of its own"
            raise ConfigError(self._options.config_key("EXECUTOR_URL"), None, allowed)
        if burst:
            raise ExecutorError("Dask's workers cannot end when there are no more jobs: leave out --burst.")
        # Calls that wait keep what they have taken of a resource: it is the threads that are to limit the others.
        resources = self._resources and dict.fromkeys(self._resources, math.inf)
        run_processes(processes, lambda: asyncio.run(_serve(url, resources, stop, self._options)))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function, outside of all contexts, as any executor does."""
        return self._options.start(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more. Jobs go on without this process, unless the cluster is its own: that ends after them."""
        with self._lock:
            self._shutdown = True
            line = self._line
        if line is None:
            return
        if cancel_futures:
            for future in line.futures():
                future.cancel()
        line.end()
        if wait:
            line.join()

    def abandon(self, grace: float) -> None:
        line = self._line
        if line is None:
            return
        line.end()
        line.join(self._options.shutdown_timeout if self._url is None else _PATIENCE)
        if line.is_alive() and self._url is None:
            for future in line.futures():
                with suppress(ExecutorError):
                    future.stop(grace)
            line.join(grace + 1)
        line.end(at_once=True)
        line.join(_PATIENCE)

    @property
    def waiting(self) -> int:
        return self._look()[1]

    @property
    def workers(self) -> int:
        return self._look()[0]

    def _look(self) -> tuple[int, int]:
        if self._shutdown or (self._url is None and self._line is None):
            return 0, 0
        line = self._connection()
        with self._reaching():
            return line.ask(line.look(self._resources))

    @property
    def capacity(self) -> None:
        return None


# ---- in the process that submits ----


@dataclass(frozen=True, slots=True)
class _Sent:
    """A call that Dask has."""

    id: str
    name: str
    arguments: tuple[Address, str, bytes, float]
    priority: int
    resources: dict[str, float] | None
    future: Callable[[], Any]

    @property
    def key(self) -> str:
        return _key(self.name, self.id)


def _key(name: str, id: str) -> str:
    """What Dask calls a job: its dashboard shows the name."""
    return f"{name}-{id}"


class _Line(threading.Thread):
    """The connection of this process with a scheduler, or with a cluster of its own: a thread, and its event loop."""

    # What begins with _ is touched in the event loop only, but for _sent, of which others take copies.

    def __init__(self, url: str | None, options: BackendOptions) -> None:
        super().__init__(name="flask-executor-dask", daemon=True)
        self._url = url
        self._options = options
        self._begun = threading.Event()
        self._sent: dict[asyncio.Task[None], _Sent] = {}
        self._connecting: asyncio.Task[distributed.Client] | None = None
        self._failed = -math.inf  # when it was that no connection could be made
        self.client: distributed.Client | None = None
        self.cluster: distributed.LocalCluster | None = None
        _lines.add(self)

    # -- from other threads

    def ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns that runs in the event loop.

        :raises OSError: or one of the errors for timeouts, when the scheduler cannot be reached.
        """
        self._begun.wait()
        try:
            answer = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:
            coroutine.close()
            raise ExecutorShutdown("this executor was shut down meanwhile") from error
        try:
            return answer.result(_PATIENCE if self._url else _START)
        except concurrent.futures.CancelledError as error:
            raise ExecutorShutdown("this executor was shut down meanwhile") from error
        finally:
            answer.cancel()

    def futures(self) -> list[Any]:
        """The handles, those that are left, of the calls that no worker has run yet."""
        return [future for sent in list(self._sent.values()) if (future := sent.future()) is not None]

    def end(self, *, at_once: bool = False) -> None:
        """Close the connection; a cluster of ours when it has run all its calls, or at once."""
        self._begun.wait()
        with suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe((self._cut if at_once else self._ending).set)

    # -- in the event loop

    def run(self) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(self._live())

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending, self._cut = asyncio.Event(), asyncio.Event()
        self._begun.set()
        await self._ending.wait()
        if self._url is None and self._sent:
            cut = asyncio.create_task(self._cut.wait())
            while self._sent and not cut.done():
                await asyncio.wait({cut, *self._sent}, return_when=asyncio.FIRST_COMPLETED)
            cut.cancel()
        tasks = [*self._sent, *filter(None, [self._connecting])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in (self.client, self.cluster):
            if each is not None:
                with suppress(OSError, asyncio.TimeoutError):
                    await each.close()

    async def _connected(self) -> distributed.Client:
        """The client, connected. One attempt at a time, which goes on when somebody has waited long enough for it."""
        while self.client is not None and self.client.status == "connecting":  # again, which it does by itself
            await asyncio.sleep(0.05)
        if self.client is not None and self.client.status == "running":
            return self.client
        if time.monotonic() - self._failed < _AGAIN:
            raise OSError("it was not there a moment ago")
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect())
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> distributed.Client:
        if self._url is None and self.cluster is None:
            self.cluster = await self._start_cluster()
        where = self.cluster or self._url
        client = distributed.Client(where, asynchronous=True, timeout=_PATIENCE, set_as_default=False)
        try:
            self.client = await client
        except BaseException:
            self._failed = time.monotonic()
            client.status = "closed"  # or it would be closed once more when it is collected, in whichever thread
            raise
        return self.client

    async def _start_cluster(self) -> distributed.LocalCluster:
        with dask.config.set({"distributed.scheduler.worker-saturation": 1.0}):  # those of high priority go first
            try:
                return await distributed.LocalCluster(
                    n_workers=self._options.max_workers or os.cpu_count() or 1,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    asynchronous=True,
                )
            except RuntimeError as error:  # what Dask makes of all errors there
                raise OSError(str(error)) from error

    async def send(self, sent: _Sent) -> None:
        """Give a call to the scheduler, see that it has it, and look after it."""
        client = await self._connected()
        future = self._submit(client, sent)
        try:
            while future.status == "pending":
                status = await client.scheduler.get_task_status(keys=[sent.key])
                if status[sent.key] is not None:
                    break
                await asyncio.sleep(_MOMENT)
        except BaseException:  # it is not accepted
            future.release()
            raise
        if future.status == "cancelled":
            raise OSError("the connection was lost")
        task = asyncio.create_task(self._see_through(sent, future))
        self._sent[task] = sent
        task.add_done_callback(self._sent.pop)

    def _submit(self, client: distributed.Client, sent: _Sent) -> Any:
        # As Client.submit() does, but for the mark: what makes data waits at the scheduler, in order of priority.
        task = Task(sent.key, run, *sent.arguments, _data_producer=True)
        options = {"priority": sent.priority, "resources": sent.resources, "fifo_timeout": 0, "sync": False}
        client.scheduler_comm.interval = _MOMENT  # somebody waits
        future = client.get({sent.key: task}, sent.key, **options)
        distributed.fire_and_forget(future)
        return future

    async def _see_through(self, sent: _Sent, future: Any) -> None:
        """See to it that a worker runs a call, whatever becomes of the scheduler."""
        while True:
            try:
                with future.client.as_current():
                    await distributed.wait([future])
            except distributed.client.FuturesCancelledError as cancelled:
                reasons = {group.reason for group in cancelled.error_groups}
                if _DISCARDED in reasons:
                    return
                if reasons != {_LOST}:
                    why = WorkerLost(f"Job {sent.name} is lost: it was cancelled at Dask's scheduler.")
                    await asyncio.to_thread(self._refuse, sent, why)
                    return
            else:
                error = await future.exception()
                if error is not None:
                    await asyncio.to_thread(self._refuse, sent, error)
                return
            future = await self._send_again(sent)

    async def _send_again(self, sent: _Sent) -> Any:
        while True:
            try:
                return self._submit(await self._connected(), sent)
            except (OSError, asyncio.TimeoutError):
                await asyncio.sleep(_AGAIN)

    def _refuse(self, sent: _Sent, error: Exception) -> None:
        """Dask has given up a call. If a worker had begun with it, that is known or found out otherwise."""
        logger.error("Job %s (%s) could not be run by Dask: %s", sent.name, sent.id, error)
        try:
            self._options.refuse(sent.id, error, sent.name)
        except Exception:
            logger.exception("Job %s (%s) could not be marked as failed.", sent.name, sent.id)

    async def drop(self, key: str) -> None:
        """Have the scheduler forget a call, whoever has sent it. Not worth waiting for a connection that was lost."""
        if self.client is not None and self.client.status != "running":
            raise OSError("the connection is lost")
        client = await self._connected()
        await client.cancel([distributed.Future(key, client)], force=True, reason=_DISCARDED)

    async def look(self, resources: dict[str, float] | None) -> tuple[int, int]:
        """How many workers there are, and how many calls wait."""
        client = await self._connected()
        found: tuple[int, int] = await client.run_on_scheduler(_count, names=list(resources or ()))
        return found


_lines: weakref.WeakSet[_Line] = weakref.WeakSet()


def _disarm() -> None:
    """In the child of a fork: what is the parent's must not be closed when it is collected, nor at the end."""
    for line in list(_lines):
        if line.client is not None:
            line.client.status = "closed"
        if line.cluster is not None:
            line.cluster.status = Status.closed
    _lines.clear()


after_fork_in_child(_disarm)


def _count(names: list[str], dask_scheduler: Any) -> tuple[int, int]:
    """In the scheduler: how many workers have these resources, and how many calls that need them wait."""
    tasks = dask_scheduler.tasks

    def is_ours(task: Any) -> bool:
        is_call = isinstance(task.key, str) and _ID.search(task.key) is not None
        return is_call and set(task.resource_restrictions or ()) == set(names)

    waiting = sum(task.state in _WAITING and is_ours(task) for task in tasks.values())
    for worker in dask_scheduler.workers.values():
        have = sum(map(is_ours, worker.processing))
        asleep = sum(
            map(is_ours, worker.long_running)
        )  # those that wait for their time, and keep no other from running
        waiting += max(0, have - asleep - worker.nthreads)
    workers = [worker for worker in dask_scheduler.workers.values() if all(name in worker.resources for name in names)]
    return len(workers), waiting


# ---- in workers ----

_running: set[str] = set()  # ids of jobs that run in this process


def run(address: Address, id: str, data: bytes, at: float = 0.0) -> None:
    """What a worker of Dask runs.

    :param at: when it is to run, as :func:`time.time` tells it.
    """
    seconds: float | None = at - time.time()
    if seconds is None or seconds <= 0:
        os.environ.setdefault(_SCHEDULER, distributed.get_worker().scheduler.address)
        if address[0] is not None:  # the processes of a nanny spawn their children, which import the app
            os.environ.setdefault("FLASK_APP", address[0])
        _running.add(id)
        try:
            # A process that is forked here must not take itself for a worker of Dask: it does not have its event loop.
            seconds = contextvars.Context().run(run_sent, address, id, data)
        finally:
            _running.discard(id)
        if seconds is None:
            return
    if seconds > 0:
        distributed.secede()
        time.sleep(seconds)
    raise distributed.Reschedule


class _Signals:
    """SIGTERM and Ctrl-C: at the first one a worker ends after its jobs, at the second one it stops them."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not asyncio's own handlers: processes that are forked here would share them.
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self._loop.call_soon_threadsafe((self.second if self.first.is_set() else self.first).set)


async def _serve(
    url: str, resources: dict[str, float] | None, stop: Callable[[str], object], options: BackendOptions
) -> None:
    """Be a worker until a signal says to end; a new one when the scheduler is."""
    signals = _Signals()
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


async def _live(worker: distributed.Worker) -> None:
    try:
        await worker
    except Exception:
        logger.exception("A worker of Dask could not be started.")
        await asyncio.sleep(_AGAIN)
    else:
        await worker.finished()


async def _let_end(cut: asyncio.Event | None, seconds: float) -> None:
    """Let the jobs of this process end, within a limit."""
    deadline = time.monotonic() + seconds
    while _running and time.monotonic() < deadline and not (cut is not None and cut.is_set()):
        await asyncio.sleep(0.05)
