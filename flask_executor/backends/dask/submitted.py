"""The calls of this process that Dask has.

.. code-block:: text

    web process                                      scheduler              worker
      enqueue() ──> Calls.send(), in its Line:
                      submit(), fire_and_forget() ──> priority, queue ────> run() ─> remote.run()
                      _await_completion(): send it again <─ connection lost       again later: secede, sleep, Reschedule

**Invariants.** A call that was sent stays in its process until a worker has run it: the scheduler keeps in memory what
it has, and one that is started anew gets its calls again. Whoever gets a call twice finds in the store that it is had.
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
from flask_executor.backends.dask.connection import AGAIN, SchedulerConnection
from flask_executor.backends.dask.worker import run
from flask_executor.backends.engine.entrypoint import Address
from flask_executor.exceptions import WorkerLost
from flask_executor.helpers.log import logger
from flask_executor.jobs.model import Job

_MOMENT = 0.001  # seconds between two looks whether the scheduler has a call
_LOST = "scheduler-connection-lost"  # what Dask calls it
_DISCARDED = "flask-executor-discarded"  # and what we call it when a job was cancelled
_ID = re.compile(r"-[0-9a-f]{24}\Z")  # what ends the keys of our tasks, and of no others
_WAITING = ("waiting", "no-worker", "queued")  # what tasks are that no worker has


@dataclass(frozen=True, slots=True)
class SubmittedCall:
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


class SubmittedCalls:
    """Gives calls to a scheduler, and looks after them until a worker has run them.

    What others call raises :exc:`OSError`, or one of the errors for timeouts, when the scheduler cannot be reached.
    """

    def __init__(self, url: str | None, options: BackendOptions) -> None:
        self._options = options
        self._sent: dict[asyncio.Task[None], SubmittedCall] = {}  # belongs to the event loop; others take copies
        self.line = SchedulerConnection(url, options)
        self.line.begin()

    def send(self, sent: SubmittedCall) -> None:
        """Give a call to the scheduler, and see that it has it."""
        self.line.call(self._send(sent))

    def drop(self, job: Job) -> None:
        """Have the scheduler forget a call, whoever has sent it."""
        self.line.call(self._drop(_key(job.name, job.id)))

    def look(self, resources: dict[str, float] | None) -> tuple[int, int]:
        """How many workers have these resources, and how many calls wait that need them."""
        return self.line.call(self._look(resources))

    def futures(self) -> list[Any]:
        """The handles, those that are left, of the calls that no worker has run yet."""
        return [future for sent in list(self._sent.values()) if (future := sent.future()) is not None]

    # ---- in the event loop ----

    async def _send(self, sent: SubmittedCall) -> None:
        client = await self.line.connected()
        future = _submit(client, sent)
        try:
            while future.status == "pending":
                status = await client.scheduler.get_task_status(keys=[sent.key])
                if status[sent.key] is not None:
                    break
                await asyncio.sleep(_MOMENT)
            if future.status == "cancelled":
                raise OSError("the connection was lost")
        except BaseException:  # it is not accepted
            # This goes the way of the call, and after it: should the scheduler get the one yet, it gets the other.
            with suppress(distributed.client.ClosedClientError):
                await _forget(client, future)
            raise
        task = self.line.spawn(self._await_completion(sent, future))
        self._sent[task] = sent
        task.add_done_callback(self._sent.pop)

    async def _await_completion(self, sent: SubmittedCall, future: Any) -> None:
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

    async def _send_again(self, sent: SubmittedCall) -> Any:
        while True:
            try:
                return _submit(await self.line.connected(), sent)
            except (OSError, asyncio.TimeoutError):
                await asyncio.sleep(AGAIN)

    def _refuse(self, sent: SubmittedCall, error: Exception) -> None:
        """Dask has given up a call. If a worker had begun with it, that is known or found out otherwise."""
        logger.error("Job %s (%s) could not be run by Dask: %s", sent.name, sent.id, error)
        try:
            self._options.refuse(sent.id, error, sent.name)
        except Exception:
            logger.exception("Job %s (%s) could not be marked as failed.", sent.name, sent.id)

    async def _drop(self, key: str) -> None:
        client = self.line.client
        if client is not None and client.status != "running":  # not worth waiting for a connection that was lost
            raise OSError("the connection is lost")
        client = await self.line.connected()
        await _forget(client, distributed.Future(key, client))

    async def _look(self, resources: dict[str, float] | None) -> tuple[int, int]:
        client = await self.line.connected()
        found: tuple[int, int] = await client.run_on_scheduler(_count, names=list(resources or ()))
        return found


def _submit(client: distributed.Client, sent: SubmittedCall) -> Any:
    # As Client.submit() does, but for the mark: what makes data waits at the scheduler, in order of priority.
    task = Task(sent.key, run, *sent.arguments, _data_producer=True)
    options = {"priority": sent.priority, "resources": sent.resources, "fifo_timeout": 0, "sync": False}
    client.scheduler_comm.interval = _MOMENT  # somebody waits
    future = client.get({sent.key: task}, sent.key, **options)
    distributed.fire_and_forget(future)
    return future


async def _forget(client: distributed.Client, future: Any) -> None:
    await client.cancel([future], force=True, reason=_DISCARDED)


# ---- in the scheduler ----


def _count(names: list[str], dask_scheduler: Any) -> tuple[int, int]:
    """How many workers have these resources, and how many calls that need them wait."""
    waiting = sum(task.state in _WAITING and _needs(task, names) for task in dask_scheduler.tasks.values())
    workers = dask_scheduler.workers.values()
    for worker in workers:
        have = sum(_needs(task, names) for task in worker.processing)
        # Those that wait for their time keep no other from running.
        asleep = sum(_needs(task, names) for task in worker.long_running)
        waiting += max(0, have - asleep - worker.nthreads)
    return sum(all(name in worker.resources for name in names) for worker in workers), waiting


def _needs(task: Any, names: list[str]) -> bool:
    """Whether a task is a call of ours that needs just these resources."""
    is_call = isinstance(task.key, str) and _ID.search(task.key) is not None
    return is_call and set(task.resource_restrictions or ()) == set(names)
