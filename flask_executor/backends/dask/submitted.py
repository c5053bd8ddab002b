"""The calls that this process has submitted to a Dask scheduler.

.. code-block:: text

    web process                                        scheduler              worker
      enqueue() ──> SubmittedCalls.send(), in the
                    thread of SchedulerConnection:
                      submit(), fire_and_forget() ───> priority, queue ────> run() ─> entrypoint.run()
                      _await_completion():                 ^                   to run again later:
                        submit again    <──────────── connection lost          secede, sleep, Reschedule

**Invariants.** A submitted call stays in the memory of its process until a worker has run it: the scheduler has its
tasks in memory only, and one that is restarted gets the calls again. A worker that gets a call which another one has
got already finds that in the store.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import distributed
from dask._task_spec import Task

from flask_executor.abc import BackendOptions
from flask_executor.backends.dask.connection import RECONNECT_DELAY, SchedulerConnection
from flask_executor.backends.dask.worker import run
from flask_executor.backends.engine.entrypoint import Destination
from flask_executor.exceptions import WorkerLost
from flask_executor.helpers.log import logger
from flask_executor.jobs.model import Job

_ACCEPTED_POLL_INTERVAL = 0.001  # seconds between two questions whether the scheduler has a call
_SEND_INTERVAL = 0.001  # seconds for which Dask's client collects messages before it sends them together
_CONNECTION_LOST = "scheduler-connection-lost"  # Dask's reason for a cancelled future
_DISCARDED = "flask-executor-discarded"  # the reason when a job was cancelled
_KEY_OF_JOB = re.compile(r"-[0-9a-f]{24}\Z")  # matches the keys of this package's tasks, and no others
_WAITING_STATES = ("waiting", "no-worker", "queued")  # of tasks that no worker has


@dataclass(frozen=True, slots=True)
class SubmittedCall:
    """A call that the scheduler has, or is to have."""

    id: str
    name: str
    arguments: tuple[Destination, str, bytes, float]
    priority: int
    resources: dict[str, float] | None
    future: Callable[[], Any]

    @property
    def key(self) -> str:
        return _key(self.name, self.id)


def _key(name: str, id: str) -> str:
    """The key of a job's task. Dask's dashboard shows the name in it."""
    return f"{name}-{id}"


class SubmittedCalls:
    """Submits calls to a scheduler, and submits them again until a worker has run them.

    The public methods are called from other threads, and raise :exc:`OSError` or one of the errors for timeouts if the
    scheduler cannot be reached.
    """

    def __init__(self, url: str | None, options: BackendOptions) -> None:
        self._options = options
        self._sent: dict[asyncio.Task[None], SubmittedCall] = {}  # changed in the event loop; other threads copy it
        self.connection = SchedulerConnection(url, options)
        self.connection.open()

    def send(self, sent: SubmittedCall) -> None:
        """Submit a call, and wait until the scheduler has it."""
        self.connection.call(self._send(sent))

    def drop(self, job: Job) -> None:
        """Have the scheduler forget a call, whichever process has submitted it."""
        self.connection.call(self._drop(_key(job.name, job.id)))

    def count(self, resources: dict[str, float] | None) -> tuple[int, int]:
        """How many workers have these resources, and how many waiting calls need them."""
        return self.connection.call(self._count(resources))

    def futures(self) -> list[Any]:
        """The handles, as far as they still exist, of the calls that no worker has run yet."""
        return [future for sent in list(self._sent.values()) if (future := sent.future()) is not None]

    # ---- in the event loop ----

    async def _send(self, sent: SubmittedCall) -> None:
        client = await self.connection.connected()
        future = _submit(client, sent)
        try:
            while future.status == "pending":
                status = await client.scheduler.get_task_status(keys=[sent.key])
                if status[sent.key] is not None:
                    break
                await asyncio.sleep(_ACCEPTED_POLL_INTERVAL)
            if future.status == "cancelled":
                raise OSError("the connection was lost")
        except BaseException:  # enqueue() fails, so the call must not run
            # The cancellation follows the call on the same connection: a scheduler that gets one gets the other.
            with suppress(distributed.client.ClosedClientError):
                await _forget(client, future)
            raise
        task = self.connection.spawn(self._await_completion(sent, future))
        self._sent[task] = sent
        task.add_done_callback(self._sent.pop)

    async def _await_completion(self, sent: SubmittedCall, future: Any) -> None:
        """Wait until a worker has run the call, and submit it again if the scheduler is restarted."""
        while True:
            try:
                with future.client.as_current():
                    await distributed.wait([future])
            except distributed.client.FuturesCancelledError as cancelled:
                reasons = {group.reason for group in cancelled.error_groups}
                if _DISCARDED in reasons:
                    return
                if reasons != {_CONNECTION_LOST}:
                    why = WorkerLost(f"Job {sent.name} is lost: it was cancelled at Dask's scheduler.")
                    await asyncio.to_thread(self._refuse, sent, why)
                    return
            else:
                error = await future.exception()
                if error is not None:
                    await asyncio.to_thread(self._refuse, sent, error)
                return
            future = await self._send_again(sent)

    async def _send_again(self, sent: SubmittedCall) -> Any:
        while True:
            try:
                return _submit(await self.connection.connected(), sent)
            except (OSError, asyncio.TimeoutError):
                await asyncio.sleep(RECONNECT_DELAY)

    def _refuse(self, sent: SubmittedCall, error: Exception) -> None:
        """Dask has given up a call. Its job fails, unless the store knows that a worker has begun it."""
        logger.error("Job %s (%s) could not be run by Dask: %s", sent.name, sent.id, error)
        try:
            self._options.refuse(sent.id, error, sent.name)
        except Exception:
            logger.exception("Job %s (%s) could not be marked as failed.", sent.name, sent.id)

    async def _drop(self, key: str) -> None:
        client = self.connection.client
        if client is not None and client.status != "running":  # a cancelled job is not worth a wait for a reconnect
            raise OSError("the connection is lost")
        client = await self.connection.connected()
        await _forget(client, distributed.Future(key, client))

    async def _count(self, resources: dict[str, float] | None) -> tuple[int, int]:
        client = await self.connection.connected()
        counted: tuple[int, int] = await client.run_on_scheduler(_count, names=list(resources or ()))
        return counted


def _submit(client: distributed.Client, sent: SubmittedCall) -> Any:
    # As Client.submit() does, except for _data_producer: the scheduler queues such tasks in order of priority.
    task = Task(sent.key, run, *sent.arguments, _data_producer=True)
    options = {"priority": sent.priority, "resources": sent.resources, "fifo_timeout": 0, "sync": False}
    client.scheduler_comm.interval = _SEND_INTERVAL
    future = client.get({sent.key: task}, sent.key, **options)
    distributed.fire_and_forget(future)
    return future


async def _forget(client: distributed.Client, future: Any) -> None:
    await client.cancel([future], force=True, reason=_DISCARDED)


# ---- in the scheduler's process ----


def _count(names: list[str], dask_scheduler: Any) -> tuple[int, int]:
    """How many workers have these resources, and how many waiting calls need them."""
    waiting = sum(task.state in _WAITING_STATES and _needs(task, names) for task in dask_scheduler.tasks.values())
    workers = dask_scheduler.workers.values()
    for worker in workers:
        assigned = sum(_needs(task, names) for task in worker.processing)
        seceded = sum(_needs(task, names) for task in worker.long_running)  # these sleep, and occupy no thread
        waiting += max(0, assigned - seceded - worker.nthreads)
    return sum(all(name in worker.resources for name in names) for worker in workers), waiting


def _needs(task: Any, names: list[str]) -> bool:
    """Return whether a task is a call of this package that needs exactly these resources."""
    is_call = isinstance(task.key, str) and _KEY_OF_JOB.search(task.key) is not None
    return is_call and set(task.resource_restrictions or ()) == set(names)
