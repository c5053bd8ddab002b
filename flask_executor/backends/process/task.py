"""A call on its way through the pool, and the states that it can be in."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from flask_executor.jobs.call import Call
from flask_executor.jobs.model import JobStatus

if TYPE_CHECKING:
    from flask_executor.backends.process.worker_process import WorkerProcess


class TaskState(enum.Enum):
    """Where a task is. Only the :class:`Dispatcher` changes it, under its lock.

    .. code-block:: text

                         recalled
          ┌──────────────────┬───────────┐
          v                  │           │
        QUEUED ─────────> ASSIGNED ─> CLAIMED ─> TAKEN
          │ └────────────────│───────────^
          └──> CANCELLED <───┘

    A task that has been settled keeps the state it had last; the dispatcher does not know it any more.
    """

    __hash__ = object.__hash__  # Enum's own is written in Python, and takes longer than the rest of a step

    #: In the queue.
    QUEUED = enum.auto()
    #: Sent to a worker ahead of time, behind other calls. Its future is still pending and can be cancelled.
    ASSIGNED = enum.auto()
    #: Sent to a worker that runs it or reads it next. Its future is running.
    CLAIMED = enum.auto()
    #: Claimed, and known to have been read by its worker: no other worker will get it.
    TAKEN = enum.auto()
    #: Its future was cancelled before it could be claimed. If a worker runs it all the same, the outcome is dropped.
    CANCELLED = enum.auto()


_TRANSITIONS: Mapping[TaskState, tuple[TaskState, ...]] = {
    TaskState.QUEUED: (TaskState.ASSIGNED, TaskState.CLAIMED, TaskState.CANCELLED),
    TaskState.ASSIGNED: (TaskState.QUEUED, TaskState.CLAIMED, TaskState.CANCELLED),
    TaskState.CLAIMED: (TaskState.QUEUED, TaskState.TAKEN),
    TaskState.TAKEN: (),
    TaskState.CANCELLED: (),
}


class Task:
    """A call in the queue, or in the list of one worker.

    :param parts: the call as bytes, in one part if it is small.
    :param fire_and_forget: if true, nobody waits for the call (a service's message): it stays queued while workers
        fail to start, and is still accepted during shutdown.
    :param on_assigned: called, under the dispatcher's lock, before the call is sent to a worker ahead of time, so that
        the worker may begin with it before that is known here.
    """

    __slots__ = (
        "call",
        "fire_and_forget",
        "id",
        "killed",
        "number",
        "on_assigned",
        "parts",
        "state",
        "stop_sent",
        "worker",
    )

    def __init__(
        self,
        call: Call,
        parts: list[bytes],
        *,
        fire_and_forget: bool = False,
        on_assigned: Callable[[], object] | None = None,
    ) -> None:
        self.call = call
        self.parts = parts
        self.fire_and_forget = fire_and_forget
        self.on_assigned = on_assigned
        self.id = call.job.id
        self.state = TaskState.QUEUED
        #: The worker that it was sent to; None while it is queued.
        self.worker: WorkerProcess | None = None
        #: Tells it apart from the other calls that were sent to its worker.
        self.number = 0
        #: If true, its worker was killed to end this very job.
        self.killed = False
        #: The last stop request that its worker was sent: for which attempt, and why.
        self.stop_sent: tuple[int, JobStatus] | None = None

    def move(self, state: TaskState) -> None:
        """Change the state.

        :raises RuntimeError: when there is no such transition.
        """
        if state not in _TRANSITIONS[self.state]:
            raise RuntimeError(f"task {self.id} must not go from {self.state} to {state}")
        self.state = state

    @property
    def is_claimed(self) -> bool:
        """If true, the future is running, and has to be settled."""
        return self.state is TaskState.CLAIMED or self.state is TaskState.TAKEN

    def claim(self) -> bool:
        """Claim the future for a worker, if that was not done before; False if it was cancelled."""
        if self.state is TaskState.QUEUED or self.state is TaskState.ASSIGNED:
            self.move(TaskState.CLAIMED if self.call.begin() else TaskState.CANCELLED)
        return self.state is not TaskState.CANCELLED
