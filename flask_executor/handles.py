"""A worker process, seen from outside, and what it is given."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import deque
from multiprocessing.context import BaseContext
from typing import Any

from flask_executor.abc import PreparedCall
from flask_executor.inherited import forking, not_for_children
from flask_executor.jobs import JobStatus
from flask_executor.messages import RUN, VOID, Leave, Run, Wire
from flask_executor.timer import Appointment, timer
from flask_executor.worker import WorkerSettings, main

_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)


class Task:
    """A call on its way: in the queue, or in the list of one worker."""

    __slots__ = ("begun", "call", "id", "killed", "payload", "worker")

    def __init__(self, call: PreparedCall, payload: bytes) -> None:
        self.call = call
        self.payload = payload
        self.id = call.job.id
        self.worker: WorkerHandle | None = None
        #: Whether its future is claimed.
        self.begun = False
        #: Whether its worker was killed for its sake.
        self.killed = False


class WorkerHandle:
    """A worker process, seen from outside, with the parent's ends of its lines."""

    def __init__(self, context: BaseContext, settings: WorkerSettings) -> None:
        here, there = zip(*(socket.socketpair() for _ in range(3)), strict=True)
        for line in here:
            not_for_children(line)
        self.calls, self.control = Wire(here[0]), Wire(here[2])
        #: Where tokens are put, and where both sides take them.
        self._give, self._take = here[1], not_for_children(there[1].dup())
        self.process: Any = context.Process(  # type: ignore[attr-defined]
            target=main, args=(settings, *there), name="flask-executor-worker", daemon=False
        )
        forking.worker = True
        try:
            self.process.start()
        except BaseException:
            self.close()
            raise
        finally:
            forking.worker = False
            for line in there:
                line.close()
        self._death: int | None = None
        #: Readable when the process has ended. Unlike multiprocessing's sentinel, a pipe that is closed then, it is
        #: not held open by what the job has started.
        with contextlib.suppress(AttributeError, OSError):  # Linux has it
            self._death = os.pidfd_open(self.process.pid)
        self.sentinel: int = self.process.sentinel if self._death is None else self._death
        self.tasks: deque[Task] = deque()
        self.ready = False
        #: Whether it gets no more calls.
        self.retired = False
        #: Calls that it was given so far; those that were taken back and that it may not have passed yet; and when
        #: it began with the one it runs (seconds, monotonic).
        self.given = 0
        self.voids = 0
        self.since = 0.0
        #: Whether it will send nothing more.
        self.silent = False
        self._end: Appointment | None = None

    def give(self, task: Task) -> None:
        """Send a call and its token."""
        task.worker = self
        self.tasks.append(task)
        self.given += 1
        with contextlib.suppress(OSError):  # it is dead; the supervisor will know in a moment
            self.calls.send(Run(task.id, task.call.job.attempt), task.payload)
            self._give.send(RUN)

    def take_back(self) -> list[Task]:
        """The calls that it has not begun, which it will not run now; in the order in which they were given."""
        try:
            tokens = self._take.recv(4096, _DONT_WAIT)
        except BlockingIOError:
            return []
        self._give.send(VOID * len(tokens))  # it gets to these calls, and passes over them
        back = [self.tasks.pop() for _ in range(tokens.count(RUN))]
        self.voids += len(back)
        self.given -= len(back)
        back.reverse()
        return back

    def leave(self, id: str, reason: JobStatus) -> None:
        """Tell the job."""
        with contextlib.suppress(OSError):
            self.control.send(Leave(id, reason))

    def retire(self, grace: float) -> None:
        """Let it end after what it was given; by force, if it has not after ``grace`` seconds."""
        self.retired = True
        with contextlib.suppress(OSError):
            self.calls.socket.shutdown(socket.SHUT_WR)
        self._end = timer.after(grace, self.kill)

    def kill(self) -> None:
        """End it, and whatever its job has started, at once."""
        if self.process.exitcode is not None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (AttributeError, ProcessLookupError, PermissionError):  # not on Windows; or it has no group yet
            self.process.kill()

    def close(self) -> None:
        """Close our ends of its lines."""
        for line in (self.calls, self.control, self._give, self._take):
            line.close()
        if self._death is not None:
            os.close(self._death)
            self._death = None
        if self._end is not None:
            self._end.cancel()
