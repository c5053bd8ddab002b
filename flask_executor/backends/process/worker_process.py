"""A worker process as its parent sees it: the process, the parent's ends of its sockets, and the calls it was sent."""

from __future__ import annotations

import contextlib
import enum
import multiprocessing
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

from flask_executor.backends.process.after_fork import close_in_child, forget_in_child, forking
from flask_executor.backends.process.channel import CallSender, FrameStream, packet_pair
from flask_executor.backends.process.protocol import StopJob
from flask_executor.backends.process.task import Task
from flask_executor.backends.process.worker_main import WorkerSettings, main
from flask_executor.helpers.pickling import CompactPickle
from flask_executor.helpers.timer import TimerHandle, timer
from flask_executor.jobs.model import JobStatus


@contextlib.contextmanager
def _allow_daemon_children() -> Iterator[None]:
    """Let this process start children even if it is a daemon, as the workers of Celery and Dask are.

    multiprocessing forbids that, as such children would outlive a daemon that is killed. Worker processes end with
    their parent by themselves.
    """
    config: dict[str, Any] = getattr(multiprocessing.current_process(), "_config", {})
    daemon = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemon is not None:
            config["daemon"] = daemon


class WorkerPhase(enum.IntEnum):
    """The phase of a worker process. It only ever goes on to a later one."""

    #: Gets its app.
    STARTING = 0
    #: Has its app, and runs the initializers, for as long as they take.
    INITIALIZING = 1
    #: Takes calls.
    READY = 2
    #: Gets no more calls, and ends after those that it has; or could not start.
    RETIRING = 3


class WorkerProcess:
    """A worker process.

    The supervisor thread creates, reads, joins and closes it. All else is guarded by the dispatcher's lock,
    except :meth:`kill`, which any thread may call.

    :raises Exception: when the process cannot be started.
    """

    def __init__(self, context: BaseContext, settings: WorkerSettings) -> None:
        # Shared memory: the parent can read what a plugin wrote there even after the worker was killed.
        self._progress_mark: Any = None if settings.make_plugin is None else context.RawValue("Q", 0)
        with contextlib.ExitStack() as own_ends, contextlib.ExitStack() as worker_ends:

            def pair() -> tuple[socket.socket, socket.socket]:
                own, workers = socket.socketpair()
                return own_ends.enter_context(close_in_child(own)), worker_ends.enter_context(workers)

            stream, workers_stream = pair()
            control, workers_control = pair()
            # Nothing is sent on this one: the system closes the parent's end when the parent ends, in whatever way.
            _, workers_life = pair()
            packets = packet_pair()
            for end in packets or ():
                own_ends.enter_context(close_in_child(end))
            workers_packets = None if packets is None else worker_ends.enter_context(packets[1].dup())
            self.process: Any = context.Process(  # type: ignore[attr-defined]
                target=main,
                args=(settings, workers_stream, workers_control, workers_life, workers_packets, self._progress_mark),
                name="flask-executor-worker",
                daemon=False,
            )
            forking.worker = workers_life
            try:
                with _allow_daemon_children():
                    self.process.start()
            finally:
                forking.worker = None
            self._sockets = own_ends.pop_all()
        self.stream, self.control = FrameStream(stream), FrameStream(control)
        self.calls = CallSender(self.stream, packets)
        self._pidfd: int | None = None
        forget_in_child(self.process)
        # Readable when the process has ended. multiprocessing's own sentinel is a pipe, which what the job has
        # started holds open.
        with contextlib.suppress(AttributeError, OSError):  # Linux has it
            self._pidfd = os.pidfd_open(self.process.pid)
        self.sentinel: int = self.process.sentinel if self._pidfd is None else self._pidfd
        #: The calls that it was sent and that have not ended, in the order in which it runs them.
        self.tasks: deque[Task] = deque()
        self.phase = WorkerPhase.STARTING
        #: How many calls it was sent, without those that were recalled.
        self.assigned = 0
        #: When it was started, and when it began to run its present call (monotonic).
        self.born = self.busy_since = time.monotonic()
        self._last_number = 0
        #: If true, nothing more will be read from it. Only the supervisor thread uses this.
        self.eof = False
        #: If true, the process has ended and its pid may be another process's.
        self.reaped = False
        self._kill_timer: TimerHandle | None = None

    @property
    def is_starting(self) -> bool:
        """If true, it has not got to its first call."""
        return self.phase < WorkerPhase.READY

    def reach(self, phase: WorkerPhase) -> None:
        """Go on to a phase, unless it is past that."""
        self.phase = max(self.phase, phase)

    def assign(self, task: Task) -> None:
        """Send it a call. Never waits."""
        self._last_number += 1
        task.number = self._last_number
        task.worker = self
        self.tasks.append(task)
        self.assigned += 1
        try:
            self.calls.send(task.number, task.call.job.attempt, task.parts)
        except BlockingIOError:  # it does not even take what it has to have room for
            self.kill()
        except OSError:  # it is dead; its sentinel will say so
            pass

    def recall(self) -> list[Task]:
        """Read back the calls that it has not read and never will, in the order in which they were sent.

        Returns an empty list while the worker may be reading a large call, because large calls cannot be recalled.
        """
        if not self.tasks or not self.calls.can_recall(self.tasks[0].parts):
            return []
        return self.recall_from_dead()

    def recall_from_dead(self) -> list[Task]:
        """As :meth:`recall`, from a process that has ended: large calls too."""
        numbers = self.calls.recall()
        recalled = [task for task in self.tasks if task.number in numbers]
        if recalled:
            self.tasks = deque(task for task in self.tasks if task.number not in numbers)
            self.assigned -= len(recalled)
        return recalled

    @property
    def progress_mark(self) -> int:
        """The last value that the worker's plugin has written to this shared memory; 0 without a plugin."""
        return 0 if self._progress_mark is None else int(self._progress_mark.value)

    def send_message(self, message: CompactPickle) -> None:
        """Send a control message, or as much of it as goes out without waiting."""
        with contextlib.suppress(OSError):  # it is dead; its sentinel will say so
            self.control.send_message(message)

    def request_stop(self, task: Task, reason: JobStatus) -> None:
        """Tell a job to stop, unless it was told so before."""
        attempt = task.call.job.attempt
        if task.stop_sent != (attempt, reason):
            task.stop_sent = (attempt, reason)
            self.send_message(StopJob(task.id, attempt, reason))

    def retire(self, grace: float) -> None:
        """Let it end after the calls that it has; kill it if it has not ended after ``grace`` seconds."""
        self.reach(WorkerPhase.RETIRING)
        with contextlib.suppress(OSError):
            self.calls.end()
        self._kill_timer = timer.call_later(grace, self.kill)

    def kill(self) -> None:
        """Kill it, and whatever its job has started."""
        if self.reaped:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (AttributeError, ProcessLookupError, PermissionError):  # not on Windows; or it has no group yet
            self.process.kill()

    def join(self) -> int | None:
        """Wait until it has ended; return its exit code, None if other code has collected that."""
        self.process.join()
        # Another thread that starts a process collects all that have ended, and may be in the middle of that.
        deadline = time.monotonic() + 1.0
        while self.process.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.001)
        exit_code: int | None = self.process.exitcode
        return exit_code

    def close(self) -> None:
        """Close the parent's ends of its sockets."""
        self._sockets.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._kill_timer is not None:
            self._kill_timer.cancel()
