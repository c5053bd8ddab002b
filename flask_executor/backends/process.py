"""Jobs on worker processes that are watched over: one that dies is replaced, and only the job it ran is lost.

.. code-block:: text

  parent process                                                    worker process (one of several)
 ┌───────────────────────────────────────────┐                     ┌────────────────────────────────────┐
 │ any thread: submit ──> queue              │   calls ─────────>  │ main thread: takes a call, runs it,│
 │     │                    │                │                     │ sends what came of it              │
 │     └──── hand out <─────┘                │                     │                                    │
 │              │  ^                         │                     │                                    │
 │              v  │  (under the lock)       │   control ───────>  │ listener thread: tells the job to  │
 │ supervisor thread: waits for all workers  │                     │ leave; ends when the parent is gone│
 │   at once, settles futures, starts and    │  <── wire: results, │                                    │
 │   buries workers                          │  progress, records  │                                    │
 │ callback thread: runs the user's code     │  <──────── sentinel │ readable when the process has ended│
 └───────────────────────────────────────────┘                     └────────────────────────────────────┘

**Handing out ahead.** A worker is given a few calls before it has finished the one it runs, which saves it the wait
for the parent; more than anything else this is why the pool is fast. A call that was handed out must not be stuck,
though: behind a job that takes long, in a worker that is killed, or when it is cancelled. So calls go over a line that
the parent can read as well, and the system hands each to one reader only: what the parent gets back will not be run
there, and what it does not get back has been begun (:class:`flask_executor.lines.Calls`).

**Who owns what.** ``_lock`` guards the queue, the workers' lists of what they were given, and all sending to them; it
is held for short and never waits for a process: what a worker does not take at once is sent on by the supervisor. Only
the supervisor thread starts processes, reads from them, and buries them. Futures are claimed under the lock, and
settled by the supervisor, outside of it. Code of the user's runs in the callback thread, under no lock.

**Invariants.** A worker runs its calls in the order in which they were given. The first in its list is claimed
(``running``) in the parent; the others are claimed when those before have ended. A task is in the queue, or in the
list of one worker, or settled; its future is claimed if and only if it is first in a list, or was found to have begun.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import pickle
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any, ParamSpec, TypeVar

from flask_executor.abc import Backend, BackendOptions, PreparedCall
from flask_executor.apps import find_import_string
from flask_executor.exceptions import ConfigError, ExecutorShutdown, NotPicklable, WorkerLost
from flask_executor.handles import Task, WorkerHandle
from flask_executor.helpers import describe_error
from flask_executor.inherited import not_for_children
from flask_executor.jobs import JobStatus, LiveJob
from flask_executor.logs import line_of, logger
from flask_executor.messages import Dropped, Kind, Logged, Message, NotReady, Progressed, Ready
from flask_executor.queues import PriorityQueue
from flask_executor.runner import PlainCall, pack_call, settle_packed, unpack_error
from flask_executor.serial import SerialThread
from flask_executor.worker import WorkerSettings, log_levels

P = ParamSpec("P")
T = TypeVar("T")

_AHEAD = 4  # calls that a worker is given beyond the one it runs
_MOST_STARTS = 3  # workers in a row that may die before they are ready, until that fails a job
_BRIEF = 0.02  # seconds: behind a job that runs for longer nothing is left waiting
_LOG_BACKLOG = 10_000  # log records that wait for the app's handlers before others are dropped


class ProcessBackend(concurrent.futures.ProcessPoolExecutor, Backend):
    """A :class:`~concurrent.futures.ProcessPoolExecutor` by type, with the processes of a :class:`Supervisor`."""

    remote = True
    chunks = True
    supports_kill = True

    def __init__(self, options: BackendOptions) -> None:
        if sys.platform == "win32":  # where a thread cannot wait for sockets and processes at once
            raise ConfigError(options.config_key("EXECUTOR_TYPE"), "process", "'thread' on Windows")
        # The standard pool's own constructor would make queues that nobody uses.
        self._mp_context = multiprocessing.get_context(options.start_method)
        self._max_workers = options.max_workers or os.cpu_count() or 1
        self._supervisor = Supervisor(options, self._mp_context, self._max_workers)
        # An app that is thrown away takes its workers along.
        finalizer = weakref.finalize(self, self._supervisor.shutdown, wait=False)
        finalizer.atexit = False

    def enqueue(self, call: PreparedCall) -> None:
        self._supervisor.add(Task(call, pack_call(call)))

    def withdraw(self, call: PreparedCall) -> bool:
        return self._supervisor.withdraw(call.job.id)

    def leave(self, call: PreparedCall, reason: JobStatus) -> None:
        self._supervisor.leave(call.job.id, reason)

    def kill(self, call: PreparedCall) -> None:
        self._supervisor.kill(call.job.id)

    def aside(self, fn: Callable[[], object]) -> None:
        self._supervisor.aside(fn)

    @property
    def lagging(self) -> bool:
        return self._supervisor.lagging

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function in a worker process, outside of all contexts, as any executor does."""
        call = PlainCall(fn, args, kwargs)
        self.enqueue(call)
        return call.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._supervisor.shutdown(wait=wait, cancel_futures=cancel_futures)

    def abandon(self, grace: float) -> None:
        self._supervisor.abandon(grace)

    @property
    def workers(self) -> int:
        return len(self._processes)

    @property
    def capacity(self) -> int:
        return self._max_workers

    @property
    def _processes(self) -> Any:  # type: ignore[override]  # as in the standard pool
        return self._supervisor.processes()


class Supervisor:
    """Hands out calls to worker processes and watches over them; see the top of this module."""

    def __init__(self, options: BackendOptions, context: BaseContext, max_workers: int) -> None:
        self._options = options
        self._context = context
        self._max_workers = max_workers
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._queue: PriorityQueue[Task] = PriorityQueue()
        self._tasks: dict[str, Task] = {}
        self._workers: list[WorkerHandle] = []
        self._idle: list[WorkerHandle] = []
        self._failed_starts = 0  # one after the other; the supervisor's
        self._levels = False  # whether there ever was a priority other than 0
        self._unhurried = True  # whether the supervisor may sleep until something happens
        self._closing = False
        self._abandoned = False
        self._thread: threading.Thread | None = None
        self._app_import: str | None = None
        self._wakes, self._wake = map(not_for_children, socket.socketpair())
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wakes, selectors.EVENT_READ)
        self._callbacks = SerialThread("flask-executor-callbacks")

    # ---- any thread ----

    def add(self, task: Task) -> None:
        """Take in a call.

        :raises ExecutorShutdown: after :meth:`shutdown`.
        :raises ConfigError: when a worker process could not find the app.
        """
        with self._lock:
            if self._closing:
                raise ExecutorShutdown("cannot schedule new futures after shutdown")
            if self._thread is None:
                self._start()
            priority = task.call.priority
            self._tasks[task.id] = task
            waiting = len(self._queue)
            self._queue.push(task, priority)
            if priority:
                self._levels = True
            if self._levels and not self._idle:
                self._make_way(priority)
            elif waiting and not self._idle and len(self._workers) == self._max_workers:
                return  # nobody had room for those before it, and whoever gets room looks here
            self._hand_out()

    def withdraw(self, id: str) -> bool:
        """Give up a call that has not begun; False when it has, and its future is claimed then."""
        with self._lock:
            task = self._tasks.get(id)
            if task is None:
                return True
            worker = task.worker
            if worker is not None:
                if not task.begun:
                    self._take_back(worker)
                if task.worker is not None:
                    self._claim_begun(worker)
                    return False
            self._queue.remove(task, task.call.priority)
            self._tasks.pop(task.id, None)
            self._hand_out()
            return True

    def leave(self, id: str, reason: JobStatus) -> None:
        """Tell a running job to leave."""
        with self._lock:
            task = self._tasks.get(id)
            if task is not None and task.worker is not None:
                task.worker.leave(task, reason)

    def kill(self, id: str) -> None:
        """End a running job by force, and no other."""
        with self._lock:
            task = self._tasks.get(id)
            worker = None if task is None else task.worker
            if task is None or worker is None:
                return
            # Without further calls the worker cannot go on to another call between this decision and its death.
            self._take_back(worker)
            if task.worker is None:  # it had not begun; it will not
                self._queue.remove(task, task.call.priority)
                self._tasks.pop(task.id, None)
            elif worker.tasks[-1] is task:
                task.killed = True
                worker.kill()
                worker.retired = True
                task = None
            else:  # it has ended, and its outcome is on its way
                task = None
            self._hand_out()
        if task is not None:
            task.call.future.cancel()

    def aside(self, fn: Callable[[], object]) -> None:
        """Call ``fn`` in the callback thread, after what was passed here before."""
        self._callbacks.run(fn)

    @property
    def lagging(self) -> bool:
        """Whether something that was passed to :meth:`aside` has not run yet."""
        return len(self._callbacks) > 0

    def processes(self) -> dict[int, Any]:
        """The worker processes by their ids."""
        with self._lock:
            return {worker.process.pid: worker.process for worker in self._workers}

    def shutdown(self, *, wait: bool, cancel_futures: bool = False) -> None:
        """Take in no more calls, and end when those that were taken in have ended."""
        if os.getpid() != self._pid:  # a child of ours throws away what it has inherited
            return
        cancelled: list[Task] = []
        with self._lock:
            self._closing = True
            if cancel_futures:
                for worker in self._workers:
                    self._take_back(worker)
                cancelled = self._queue.clear()
                for task in cancelled:
                    self._tasks.pop(task.id, None)
            thread = self._thread
            if thread is None:
                self._close()
            else:
                self._wake_up()
        for task in cancelled:
            task.call.future.cancel()
        if wait:
            if thread is not None and thread is not threading.current_thread():
                thread.join()
            self._callbacks.close(wait=True)

    def abandon(self, grace: float) -> None:
        """End, and end workers by force that have not ended by themselves after ``grace`` seconds."""
        self.shutdown(wait=False)
        thread = self._thread
        if thread is None:
            return
        thread.join(grace)
        if thread.is_alive():
            with self._lock:
                self._abandoned = True
                for worker in self._workers:
                    worker.kill()
                self._wake_up()
            thread.join(5.0)

    # ---- under the lock ----

    def _start(self) -> None:
        app = None if self._options.app is None else self._options.app()
        if app is not None and self._context.get_start_method() != "fork":
            self._app_import = self._options.app_import or find_import_string(app)
            if self._app_import is None:
                raise ConfigError(
                    self._options.config_key("EXECUTOR_APP"),
                    None,
                    f"the import string of the app or its factory ('shop:create_app()'): worker processes started by "
                    f"{self._context.get_start_method()!r} import it, and app {app.name!r} is not in a module",
                )
        self._thread = threading.Thread(target=self._supervise, name="flask-executor-supervisor", daemon=True)
        self._thread.start()

    def _wake_up(self) -> None:
        """Have the supervisor look at everything."""
        with contextlib.suppress(OSError):  # it will anyway, or it has ended
            self._wake.send(b"w")

    def _hand_out(self) -> None:
        """Give what is in the queue to workers that have room."""
        queue = self._queue
        while queue:
            if self._idle:
                worker, task = self._idle.pop(), queue.pop()
                if self._claim(task):
                    worker.since = time.monotonic()
                    self._give(worker, task)
                else:
                    self._idle.append(worker)
            elif len(self._workers) < self._max_workers:
                self._wake_up()  # to start one more
                return
            else:
                ahead = self._with_room(queue.first())
                if ahead is None:
                    return
                self._give(ahead, queue.pop())

    def _with_room(self, task: Task) -> WorkerHandle | None:
        """A busy worker that can be given ``task`` ahead of time."""
        best: WorkerHandle | None = None
        brief = time.monotonic() - _BRIEF
        for worker in self._workers:
            if (
                worker.tasks
                and len(worker.tasks) <= _AHEAD
                and (best is None or len(worker.tasks) < len(best.tasks))
                and worker.since > brief
                and worker.calls.may_wait(task.parts)
                and not worker.retired
                and not self._is_worn(worker)
                and not worker.wire.pending
            ):
                best = worker
        return best

    def _is_worn(self, worker: WorkerHandle) -> bool:
        most = self._options.max_tasks_per_child
        return most is not None and worker.given >= most

    def _give(self, worker: WorkerHandle, task: Task) -> None:
        worker.give(task)
        if worker.wire.pending or (self._unhurried and len(worker.tasks) > 1):
            self._wake_up()  # to send on the rest; to look after what waits behind a job

    def _claim(self, task: Task) -> bool:
        """A worker begins with the task; False when it was cancelled, and then it is forgotten."""
        task.begun = task.call.begin()
        if not task.begun:
            self._tasks.pop(task.id, None)
        return task.begun

    def _claim_begun(self, worker: WorkerHandle) -> None:
        """All that is in the worker's list has begun, or ended even, as nothing can be taken back."""
        for task in worker.tasks:
            if not task.begun:
                task.begun = task.call.begin()

    def _take_back(self, worker: WorkerHandle) -> None:
        """Put what the worker has not begun back to the head of the queue."""
        for task in reversed(worker.take_back()):
            task.worker = None
            if task.begun:
                task.begun = False
                task.call.put_back()
            self._queue.push_first(task, task.call.priority)
        if not worker.tasks:
            self._rest(worker)

    def _rest(self, worker: WorkerHandle) -> None:
        """The worker has nothing to do."""
        if worker.retired or worker in self._idle:
            return
        if self._is_worn(worker):
            worker.retire(self._options.exit_grace)
            self._wake_up()
        else:
            self._idle.append(worker)

    def _make_way(self, priority: int) -> None:
        """Take back what waits in workers and is less urgent than something that has come now."""
        for worker in self._workers:
            if len(worker.tasks) > 1 and any(task.call.priority < priority for task in worker.tasks):
                self._take_back(worker)

    def _share(self) -> None:
        """A worker has nothing to do while others have more than they can run."""
        busiest = max(self._workers, key=lambda worker: len(worker.tasks))
        if len(busiest.tasks) > 1:
            self._take_back(busiest)
            self._hand_out()

    # ---- the supervisor thread ----

    def _supervise(self) -> None:
        try:
            while self._tend():
                for key, events in self._selector.select(self._patience()):
                    if key.data is None:
                        self._wakes.recv(4096)
                    elif isinstance(key.fileobj, int):  # a sentinel
                        self._bury(key.data)
                    elif not key.data.buried:  # by what came before this in the same round
                        if events & selectors.EVENT_WRITE:
                            self._send_on(key.data)
                        if events & selectors.EVENT_READ:
                            self._read(key.data)
        except BaseException:
            logger.critical("The supervisor of the worker processes failed.", exc_info=True)
            raise
        finally:
            self._finish()

    def _patience(self) -> float | None:
        """Seconds until something has to be looked at unasked; None while there is nothing like that."""
        with self._lock:
            self._unhurried = all(len(worker.tasks) < 2 for worker in self._workers)
            return None if self._unhurried else _BRIEF

    def _tend(self) -> bool:
        """Start workers that are missing, send on what was left over; False when all is done."""
        with self._lock:
            late = time.monotonic() - _BRIEF
            for worker in self._workers:
                if len(worker.tasks) > 1 and worker.since < late:
                    self._take_back(worker)
                if worker.silent:
                    continue
                writing = selectors.EVENT_WRITE if worker.wire.pending else 0
                if self._selector.get_key(worker.wire).events != selectors.EVENT_READ | writing:
                    self._selector.modify(worker.wire, selectors.EVENT_READ | writing, worker)
            self._hand_out()
            starting = sum(not worker.ready for worker in self._workers)
            missing = min(len(self._queue) - starting, self._max_workers - len(self._workers))
            if self._closing and not self._tasks:
                for worker in self._workers:
                    if not worker.retired:
                        worker.retire(self._options.exit_grace)
                return bool(self._workers) and not self._abandoned
        for _ in range(missing):
            self._hire()
        return True

    def _hire(self) -> None:
        try:
            worker = WorkerHandle(self._context, self._settings())
        except Exception as error:  # no memory, no processes, or something that cannot be pickled for it
            self._fail_oldest(_not_started(error))
            return
        with self._lock:
            self._workers.append(worker)
            if self._abandoned:
                worker.kill()
        self._selector.register(worker.wire, selectors.EVENT_READ, worker)
        self._selector.register(worker.sentinel, selectors.EVENT_READ, worker)

    def _settings(self) -> WorkerSettings:
        app = None if self._options.app is None else self._options.app()
        return WorkerSettings(
            app=app if self._app_import is None else None,
            app_import=self._app_import or "",
            app_config_key=self._options.config_key("EXECUTOR_APP"),
            initializers=tuple(self._options.initializers),
            log_levels={} if self._app_import is None else log_levels(),
        )

    def _send_on(self, worker: WorkerHandle) -> None:
        with self._lock, contextlib.suppress(OSError):
            worker.wire.flush()

    def _read(self, worker: WorkerHandle) -> bool:
        """Read what the worker has sent; False when there is nothing (any more)."""
        try:
            frames = worker.wire.receive()
        except BlockingIOError:
            return False
        except EOFError:
            # It has ended, or is about to. What is left to be done is done when the sentinel says so.
            worker.silent = True
            self._selector.unregister(worker.wire)
            return False
        for kind, body in frames:
            if kind == Kind.MESSAGE:
                self._hear(worker, pickle.loads(body))
            else:
                self._ended(worker, kind, body)
        return True

    def _hear(self, worker: WorkerHandle, message: Message) -> None:
        if isinstance(message, Progressed):
            job = self._job(message.id)
            if job is not None:
                job.progress, job.message = message.progress, message.message
                if message.meta is not None:
                    job.meta = _unpickled_meta(message.meta)
        elif isinstance(message, Logged):
            self._logged(message)
        elif isinstance(message, Dropped):
            logger.warning("%d log records of worker processes came too fast and are gone.", message.count)
        elif isinstance(message, NotReady):
            worker.retired = True
            self._fail_oldest(unpack_error(message.error))
        elif isinstance(message, Ready):
            with self._lock:
                worker.ready = True
                self._failed_starts = 0
                self._rest(worker)
                self._hand_out()

    def _ended(self, worker: WorkerHandle, kind: int, body: bytes) -> None:
        with self._lock:
            task = worker.tasks.popleft()
            self._tasks.pop(task.id, None)
            if worker.tasks:
                following = worker.tasks[0]
                worker.since = time.monotonic()
                if not following.begun:
                    following.begun = following.call.begin()
            else:
                self._rest(worker)
            self._hand_out()
            if self._idle and not self._queue:
                self._share()
        if not task.begun:  # the last one claimed by nobody: it was cancelled by force of its plain future
            return
        self._settle(task, kind, body)

    def _settle(self, task: Task, kind: int, body: bytes) -> None:
        try:
            settle_packed(task.call, kind, body)
        except Exception as error:
            logger.exception("Job %s could not be settled.", task.id)
            with contextlib.suppress(Exception):
                task.call.fail(error)

    def _job(self, id: str) -> LiveJob | None:
        task = self._tasks.get(id)
        return None if task is None else task.call.job

    def _logged(self, message: Logged) -> None:
        job = None if message.id is None else self._job(message.id)
        record = _rebuilt(message)
        if job is not None:
            record.__dict__.update(job_id=job.id, job_key=job.key)
            job.add_log(line_of(record))
        if len(self._callbacks) < _LOG_BACKLOG:
            self.aside(lambda: _handle(record))

    def _fail_oldest(self, error: BaseException) -> None:
        """A worker could not be started: somebody has to be told, or it would be tried for ever."""
        with self._lock:
            task = self._queue.pop() if self._queue else None
            begun = task is not None and self._claim(task)
            if task is not None:
                self._tasks.pop(task.id, None)
        if task is not None and begun:
            status = JobStatus.LOST if isinstance(error, WorkerLost) else JobStatus.FAILED
            task.call.fail(error, status)

    def _bury(self, worker: WorkerHandle) -> None:
        """A worker process has ended: settle what it had begun, and let others have the rest."""
        self._selector.unregister(worker.sentinel)
        while not worker.silent and self._read(worker):  # what it has still sent
            pass
        if not worker.silent:  # something that it has started holds its end open
            self._selector.unregister(worker.wire)
        worker.kill()  # what its jobs have started
        worker.buried = True
        exit_code = worker.join()
        with self._lock:
            was_retired, worker.retired = worker.retired, True
            self._take_back(worker)
            victims = list(worker.tasks)
            self._workers.remove(worker)
            if worker in self._idle:
                self._idle.remove(worker)
            for task in victims:
                self._tasks.pop(task.id, None)
            self._claim_begun(worker)
            worker.close()
            self._hand_out()
        for task in victims:
            if not task.begun:
                continue  # cancelled by force of its plain future
            if task.killed:
                task.call.left(forced=True)
            else:
                what = f"The worker process died that ran job {task.call.job.name}."
                task.call.fail(WorkerLost(what, worker.process.pid, exit_code), JobStatus.LOST)
        if not worker.ready and not was_retired:
            self._failed_starts += 1
            # One that was killed before it got to its first job is nobody's loss, but it must not go on for ever.
            if self._failed_starts >= _MOST_STARTS:
                self._fail_oldest(WorkerLost(_NO_START, worker.process.pid, exit_code))

    def _finish(self) -> None:
        """Close everything; the last thing that happens."""
        with self._lock:
            self._closing = True
            left, workers = list(self._tasks.values()), list(self._workers)
            self._tasks.clear()
            self._queue.clear()
            for worker in workers:
                worker.kill()
        for task in left:
            if task.begun or task.call.begin():
                task.call.fail(
                    WorkerLost(f"Job {task.call.job.name} was cut off as the process ended."), JobStatus.LOST
                )
        for worker in workers:
            worker.process.join(5.0)
            worker.close()
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._selector.close()
        self._wakes.close()
        self._wake.close()
        self._callbacks.close(wait=False)


def _not_started(error: Exception) -> Exception:
    if isinstance(error, (TypeError, AttributeError, pickle.PicklingError)):
        refused = NotPicklable(
            f"A worker process could not be started, as something it needs cannot be sent to it: {error}"
        )
        refused.__cause__ = error
        return refused
    return error


def _rebuilt(message: Logged) -> logging.LogRecord:
    record = logging.makeLogRecord(dict(message.record))
    record.__dict__.setdefault("job_id", None)
    record.__dict__.setdefault("job_key", None)
    return record


def _handle(record: logging.LogRecord) -> None:
    logging.getLogger(record.name).handle(record)


def _unpickled_meta(payload: bytes) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = pickle.loads(payload)
    except Exception as error:  # classes that this process cannot import
        return {"error": f"what the job has reported cannot be rebuilt: {describe_error(error)}"}
    return meta


_NO_START = (
    "A worker process died before it was ready; what it wrote to its standard error says why. One that is started by "
    "'spawn' or 'forkserver' imports the main module, which must not start jobs when it is imported: put that "
    "under 'if __name__ == \"__main__\":'."
)
