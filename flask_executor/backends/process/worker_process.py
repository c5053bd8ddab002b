"""A worker process, seen from outside, and what it is given."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from typing import Any

from flask_executor.backends.process.after_fork import close_in_child, forget_in_child, forking
from flask_executor.backends.process.channel import CallSender, FrameStream, packet_pair
from flask_executor.backends.process.protocol import DeliverMessage, StopJob
from flask_executor.backends.process.worker_main import WorkerSettings, main
from flask_executor.helpers.timer import TimerHandle, timer
from flask_executor.jobs.call import Call
from flask_executor.jobs.model import JobStatus


class Task:
    """A call on its way: in the queue, or in the list of one worker."""

    __slots__ = (
        "begun",
        "call",
        "fire_and_forget",
        "id",
        "killed",
        "mail",
        "number",
        "on_assigned",
        "parts",
        "stop_sent",
        "taken",
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
        #: Called before a worker gets it that has not begun with it.
        self.on_assigned = on_assigned
        #: Whether nobody waits for it: it is kept while workers cannot start, and taken in until all has ended.
        self.fire_and_forget = fire_and_forget
        #: The call as bytes, one part if it is small.
        self.parts = parts
        self.id = call.job.id
        self.worker: WorkerProcess | None = None
        #: Whether its future is claimed.
        self.begun = False
        #: Whether its worker was killed for its sake.
        self.killed = False
        #: Which of the calls of its worker it is.
        self.number = 0
        #: The messages for its job, which it gets (again) with its worker.
        self.mail: list[DeliverMessage] = []
        #: Whether its worker has taken it for certain, and no other will.
        self.taken = False
        #: What its worker was stop_sent last: the attempt, and why it has to leave.
        self.stop_sent: tuple[int, JobStatus] | None = None


@contextlib.contextmanager
def _allow_daemon_children() -> Iterator[None]:
    """Workers of Celery and Dask are daemons, which multiprocessing lets have no children as these would outlive them.

    Ours end when their parent does.
    """
    config: dict[str, Any] = getattr(multiprocessing.current_process(), "_config", {})
    daemon = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemon is not None:
            config["daemon"] = daemon


class WorkerProcess:
    """A worker process, seen from outside, with the parent's ends of its lines."""

    def __init__(self, context: BaseContext, settings: WorkerSettings) -> None:
        # Memory that both processes see: what is marked there is known even of a worker that was killed.
        self._progress_mark: Any = None if settings.make_plugin is None else context.RawValue("Q", 0)
        here, there = zip(*(socket.socketpair() for _ in range(3)), strict=True)
        packets = packet_pair()
        for line in (*here, *(packets or ())):
            close_in_child(line)
        self.stream, self.control = FrameStream(here[0]), FrameStream(here[1])
        self._life = here[2]  # closed by the system when this process ends, whatever way
        self.calls = CallSender(self.stream, packets)
        inside = None if packets is None else packets[1].dup()
        self.process: Any = context.Process(  # type: ignore[attr-defined]
            target=main,
            args=(settings, *there, inside, self._progress_mark),
            name="flask-executor-worker",
            daemon=False,
        )
        forking.worker = there[2]
        try:
            with _allow_daemon_children():
                self.process.start()
        except BaseException:
            self._close_sockets()
            raise
        finally:
            forking.worker = None
            for line in (*there, inside):
                if line is not None:
                    line.close()
        self._pidfd: int | None = None
        forget_in_child(self.process)
        #: Readable when the process has ended. Unlike multiprocessing's sentinel, a pipe that is closed then, it is
        #: not held open by what the job has started.
        with contextlib.suppress(AttributeError, OSError):  # Linux has it
            self._pidfd = os.pidfd_open(self.process.pid)
        self.sentinel: int = self.process.sentinel if self._pidfd is None else self._pidfd
        self.tasks: deque[Task] = deque()
        #: Whether it has its app, and whether its initializers have run as well.
        self.is_up = self.ready = False
        #: Whether it gets no more calls.
        self.retired = False
        #: How many calls it was given so far, and when it began with the one it runs, or was started (monotonic).
        self.assigned = 0
        self.since = self.born = time.monotonic()
        self._number = 0  # of the call that it was given last
        #: Whether it will send nothing more.
        self.eof = False
        self.reaped = False
        self._kill_timer: TimerHandle | None = None

    def assign(self, task: Task) -> None:
        """Send a call. Never waits."""
        self._number += 1
        task.number = self._number
        task.worker = self
        self.tasks.append(task)
        self.assigned += 1
        try:
            self.calls.send(self._number, task.call.job.attempt, task.parts)
        except BlockingIOError:  # it does not even take what it has to have room for
            self.kill()
        except OSError:  # it is dead; the supervisor will know in a moment
            pass

    def recall(self, *, dead: bool = False) -> list[Task]:
        """The calls that it has not begun, and will not; in the order in which they were given.

        :param dead: take back all of them. From a worker that lives a large one cannot be taken back.
        """
        if not self.tasks or not (dead or self.calls.can_recall(self.tasks[0].parts)):
            return []
        numbers = self.calls.recall()
        back = [task for task in self.tasks if task.number in numbers]
        if back:
            self.tasks = deque(task for task in self.tasks if task.number not in numbers)
            self.assigned -= len(back)
        return back

    @property
    def progress_mark(self) -> int:
        """What the resident has marked last."""
        return 0 if self._progress_mark is None else int(self._progress_mark.value)

    def request_stop(self, task: Task, reason: JobStatus) -> None:
        """Tell the job, once."""
        attempt = task.call.job.attempt
        if task.stop_sent != (attempt, reason):
            task.stop_sent = (attempt, reason)
            with contextlib.suppress(OSError):
                self.control.send_message(StopJob(task.id, attempt, reason))

    def retire(self, grace: float) -> None:
        """Let it end after what it was given; by force, if it has not after ``grace`` seconds."""
        self.retired = True
        with contextlib.suppress(OSError):
            self.calls.end()
        self._kill_timer = timer.call_later(grace, self.kill)

    def kill(self) -> None:
        """End it, and whatever its job has started, at once."""
        if self.reaped:  # its number may be another process's by now
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (AttributeError, ProcessLookupError, PermissionError):  # not on Windows; or it has no group yet
            self.process.kill()

    def join(self) -> int | None:
        """Wait until it has ended; its exit code, None if somebody else has taken it."""
        self.process.join()
        # Another thread that starts a process collects those that have ended, and may be in the middle of it.
        deadline = time.monotonic() + 1.0
        while self.process.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.001)
        exit_code: int | None = self.process.exitcode
        return exit_code

    def close(self) -> None:
        """Close our ends of its lines."""
        self._close_sockets()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._kill_timer is not None:
            self._kill_timer.cancel()

    def _close_sockets(self) -> None:
        for line in (self.stream, self.control, self.calls, self._life):
            line.close()
