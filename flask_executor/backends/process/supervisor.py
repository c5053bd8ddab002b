"""The supervised pool: a worker process that dies is replaced, and only the job it ran is lost.

.. code-block:: text

  parent process                                                    worker process (one of several)
 ┌───────────────────────────────────────────┐                     ┌────────────────────────────────────┐
 │ any thread: submit ──> queue              │   calls ─────────>  │ main thread: reads a call, runs it,│
 │     │                    │                │                     │ sends its outcome                  │
 │     └────> assign <──────┘                │                     │                                    │
 │              │  ^                         │                     │                                    │
 │              v  │   (Dispatcher)          │   control ───────>  │ listener thread: gives the job stop│
 │ supervisor thread: waits for all workers  │                     │ requests and messages; ends the    │
 │   at once, settles futures, starts and    │  <──────── stream   │ process when the parent is gone    │
 │   reaps workers                           │  outcomes, progress,│                                    │
 │ callback thread: runs the user's code     │  log records        │                                    │
 │                                           │  <──────── sentinel │ readable when the process has ended│
 └───────────────────────────────────────────┘                     └────────────────────────────────────┘

:mod:`~flask_executor.backends.process.protocol` describes what is sent on which socket.

**Prefetch.** A worker is sent a few calls before it has finished the one it runs, which saves it the wait for the
parent; more than anything else this is why the pool is fast. But such a call must not be stuck: behind a job that takes
long, in a worker that is killed, or when it is cancelled. So calls travel on a socket that the parent can read as well,
and the system hands each packet to one reader only: a call that the parent reads back will not be run by the worker,
and one that it cannot read back has begun (:class:`CallSender`). Each call has a number, as the worker may read one in
the middle of others that are recalled.

**Who owns what.** The lock of the :class:`Dispatcher` guards the queue, the workers' lists of tasks, and all sending to
workers; it is held for short and never while a process is waited for: what a worker has no room for is sent later, by
the supervisor thread. Only the supervisor thread starts processes, reads from them, and reaps them. Futures are claimed
under the lock, and settled by the supervisor thread outside of it. The user's code runs in the callback thread, under
no lock; the supervisor thread runs only what rebuilds results and errors.

**Invariants.** A task is in the queue, or in the list of one worker, or settled. A worker runs its calls in the order
in which they were sent. The first task in its list is claimed (its future is running); the others are claimed when
those before them have ended, or when it is found that the worker has read them.
:class:`~flask_executor.backends.process.task.TaskState` has the states of a task, and the transitions between them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import selectors
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any, Protocol

from flask_executor.abc import BackendOptions
from flask_executor.backends.process.after_fork import close_in_child
from flask_executor.backends.process.channel import FrameStream
from flask_executor.backends.process.dispatcher import Dispatcher
from flask_executor.backends.process.protocol import (
    AppLoaded,
    FrameKind,
    LogReport,
    LogsDropped,
    ProgressReport,
    ServiceMessage,
    StartFailed,
    WorkerReady,
)
from flask_executor.backends.process.reporter import log_levels
from flask_executor.backends.process.task import Task
from flask_executor.backends.process.worker_main import WorkerPlugin, WorkerSettings
from flask_executor.backends.process.worker_process import WorkerPhase, WorkerProcess
from flask_executor.exceptions import NotPicklable, WorkerLost
from flask_executor.helpers import describe_error
from flask_executor.helpers.app_import import import_string_of
from flask_executor.helpers.log import logger
from flask_executor.helpers.pickling import CompactPickle
from flask_executor.helpers.serial_thread import SerialThread, set_thread_callbacks
from flask_executor.jobs.log_records import to_log_line
from flask_executor.jobs.model import JobStatus
from flask_executor.jobs.packing import settle_from_bytes, unpack_error, unpack_meta

_MAX_FAILED_STARTS = 3  # workers in a row that may die before they are ready, until that fails a job
_RESTART_DELAY = 0.1  # seconds until a pool of fixed size replaces a worker that died; doubled each time
_MAX_RESTART_DELAY = 30.0  # seconds
_MAX_DOUBLINGS = 10  # of the delay; enough to reach the longest
_STABLE_AFTER = 10.0  # seconds that a worker has to live for the delay to start from the beginning
_MAX_QUEUED_LOG_RECORDS = 10_000  # that wait for the app's handlers before others are dropped
_KILL_TIMEOUT = 5.0  # seconds to wait for what was killed


class PoolObserver(Protocol):
    """Implemented by a service's pool: a fixed number of workers, each of which hosts a plugin."""

    #: Makes the plugin, in each worker process; inherited or pickled.
    make_plugin: Callable[[], WorkerPlugin]

    def worker_failed(self, error: BaseException, delay: float) -> None:
        """A worker could not start, or died. It is replaced in ``delay`` seconds. The supervisor thread calls this."""

    def message_received(self, message: ServiceMessage) -> None:
        """A plugin has sent a message. The supervisor thread calls this: it must be quick and run no user code."""


class Supervisor:
    """Starts worker processes, reads what they send, and reaps them; see the top of this module.

    :param observer: makes this the pool of a service.
    """

    def __init__(
        self, options: BackendOptions, context: BaseContext, max_workers: int, observer: PoolObserver | None = None
    ) -> None:
        self._options = options
        self._observer = observer
        self._context = context
        self._pid = os.getpid()
        self._wake_receiver, self._wake_sender = map(close_in_child, socket.socketpair())
        self._wake_sender.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._start_lock = threading.Lock()  # taken before the dispatcher's, never after
        self._thread: threading.Thread | None = None
        self._app_import: str | None = None
        self._failed_starts = 0  # in a row
        self._crashes = 0  # in a row, of workers of a pool of fixed size
        self._restart_at = 0.0  # when to start workers again (monotonic)
        self._terminated = False
        self.dispatcher = Dispatcher(
            max_workers,
            options.max_tasks_per_child,
            options.exit_grace,
            self._wake_up,
            fixed_size=observer is not None,
        )
        #: Runs the user's code.
        self.callbacks = SerialThread("flask-executor-callbacks")

    # ---- any thread ----

    def start(self) -> None:
        """Start the supervisor thread, unless it was started before.

        :raises ConfigError: when worker processes could not find the app.
        """
        if self._thread is None:
            with self._start_lock:
                if self._thread is None and not self.dispatcher.closing:
                    self._app_import = self._find_app()
                    thread = threading.Thread(target=self._supervise, name="flask-executor-supervisor", daemon=True)
                    thread.start()
                    self._thread = thread

    def shutdown(self, *, wait: bool, cancel_futures: bool = False) -> None:
        """Accept no more calls, and end when those that were accepted have ended.

        :param wait: if true, wait for that.
        :param cancel_futures: if true, cancel the calls that have not begun.
        """
        if os.getpid() != self._pid:  # a forked child drops its copy of this
            return
        with self._start_lock:
            cancelled = self.dispatcher.close(cancel_futures=cancel_futures)
            thread = self._thread
            if thread is None:
                self.dispatcher.terminate()
                self._close()
        for task in cancelled:
            task.call.future.cancel()
        if wait:
            if thread is not None and thread is not threading.current_thread():
                thread.join()
            self.callbacks.close(wait=True)

    def join(self, timeout: float | None) -> None:
        """After :meth:`shutdown`: wait until the thread has ended, at most ``timeout`` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)

    def terminate(self, grace: float) -> None:
        """Shut down, and kill the workers that have not ended after ``grace`` seconds."""
        self.shutdown(wait=False)
        thread = self._thread
        if thread is not None:
            thread.join(grace)
            if thread.is_alive():
                self._terminated = True
                self.dispatcher.kill_all()
                self._wake_up()
                thread.join(_KILL_TIMEOUT)

    def _find_app(self) -> str | None:
        """The import string of the app for workers; None if they inherit it."""
        app = None if self._options.app is None else self._options.app()
        method = self._context.get_start_method()
        if app is None or method == "fork":
            return None
        return import_string_of(
            app,
            self._options.app_import,
            self._options.config_key("EXECUTOR_APP"),
            f"worker processes started by {method!r}",
        )

    def _wake_up(self) -> None:
        """Make the supervisor thread call :meth:`_step`."""
        with contextlib.suppress(OSError):  # it was woken before and is about to, or it has ended
            self._wake_sender.send(b"w")

    # ---- the supervisor thread ----

    def _supervise(self) -> None:
        set_thread_callbacks(self.callbacks)
        try:
            while self._step():
                for key, events in self._selector.select(self._next_timeout()):
                    if key.data is None:
                        self._wake_receiver.recv(4096)
                    elif isinstance(key.fileobj, int):  # a sentinel
                        self._reap(key.data)
                    else:
                        self._on_ready(key.data, events)
        except BaseException:
            logger.critical("The supervisor of the worker processes failed.", exc_info=True)
            raise
        finally:
            self._finish()

    def _next_timeout(self) -> float | None:
        """Seconds until :meth:`_step` is to be called, if nothing happens before; None for not at all."""
        timeout = self.dispatcher.next_timeout()
        delay = self._restart_at - time.monotonic()
        if delay <= 0:
            return timeout
        return delay if timeout is None else min(timeout, delay)

    def _on_ready(self, worker: WorkerProcess, events: int) -> None:
        if worker.eof:  # since an earlier event of the same round
            return
        if events & selectors.EVENT_WRITE:
            self.dispatcher.flush(worker)
        if events & selectors.EVENT_READ:
            self._read(worker)

    def _step(self) -> bool:
        """Do what is due; False when there is nothing left to supervise."""
        missing, workers, stopped = self.dispatcher.step()
        for task in stopped:
            task.call.stopped()
        for worker in workers:
            if not worker.eof:
                self._watch(worker, worker.stream, selectors.EVENT_READ)
                self._watch(worker, worker.control, 0)
        if self.dispatcher.done or self._terminated:
            return False
        now = time.monotonic()
        if self.dispatcher.closing:  # do not make shutdown() wait for long
            self._restart_at = min(self._restart_at, now + _RESTART_DELAY)
        if now >= self._restart_at:
            for _ in range(missing):
                self._start_worker()
        return True

    def _watch(self, worker: WorkerProcess, stream: FrameStream, events: int) -> None:
        """Select on a stream for these events, and for room in it while something waits to be sent."""
        if stream.pending:
            events |= selectors.EVENT_WRITE
        registered = self._selector.get_map().get(stream)
        if registered is None:
            if events:
                self._selector.register(stream, events, worker)
        elif not events:
            self._selector.unregister(stream)
        elif registered.events != events:
            self._selector.modify(stream, events, worker)

    def _start_worker(self) -> None:
        try:
            worker = WorkerProcess(self._context, self._settings())
        except Exception as error:  # no memory, too many processes, or a setting that cannot be pickled
            self._on_start_failed(_not_started(error), time.monotonic())
            return
        self.dispatcher.worker_started(worker)
        self._selector.register(worker.stream, selectors.EVENT_READ, worker)
        self._selector.register(worker.sentinel, selectors.EVENT_READ, worker)

    def _settings(self) -> WorkerSettings:
        app = None if self._options.app is None else self._options.app()
        return WorkerSettings(
            app=app if self._app_import is None else None,
            app_import=self._app_import or "",
            app_config_key=self._options.config_key("EXECUTOR_APP"),
            initializers=tuple(self._options.initializers),
            log_levels={} if self._app_import is None else log_levels(),
            make_plugin=None if self._observer is None else self._observer.make_plugin,
        )

    def _read(self, worker: WorkerProcess) -> bool:
        """Read and handle what a worker has sent; False when there is nothing to read, now or ever."""
        try:
            frames = worker.stream.receive()
        except BlockingIOError:
            return False
        except EOFError:  # it has ended, or is about to; the sentinel will say so
            self._unwatch(worker)
            return False
        except Exception:  # what it sent is no frame
            self._kill_garbled(worker)
            return False
        for kind, number, body in frames:
            try:
                if kind == FrameKind.MESSAGE:
                    self._on_message(worker, pickle.loads(body))
                else:
                    self._settle(self.dispatcher.call_ended(worker, number), kind, body)
            except Exception:
                self._kill_garbled(worker)
                return False
        return True

    def _unwatch(self, worker: WorkerProcess) -> None:
        if not worker.eof:
            worker.eof = True
            for stream in (worker.stream, worker.control):
                if stream in self._selector.get_map():
                    self._selector.unregister(stream)

    def _kill_garbled(self, worker: WorkerProcess) -> None:
        """A worker sent something that is no frame, or no message: kill it. Only the job that it runs is lost."""
        logger.exception("Worker process %s cannot be understood, and is killed.", worker.process.pid)
        self._unwatch(worker)
        worker.kill()

    def _on_message(self, worker: WorkerProcess, message: CompactPickle) -> None:
        if isinstance(message, ProgressReport):
            call = self.dispatcher.call(message.id)
            if call is not None:
                call.job.progress, call.job.message = message.progress, message.message
                if message.meta is not None:
                    call.job.meta = {**(call.job.meta or {}), **unpack_meta(message.meta)}
                call.progressed()
        elif isinstance(message, LogReport):
            self._on_log_report(message)
        elif isinstance(message, LogsDropped):
            logger.warning("%d log records of worker processes came too fast and are gone.", message.count)
        elif isinstance(message, StartFailed):
            self.dispatcher.worker_not_started(worker)
            self._on_start_failed(unpack_error(message.error), worker.born)
        elif isinstance(message, AppLoaded):
            self.dispatcher.app_loaded(worker)
        elif isinstance(message, WorkerReady):
            self._failed_starts = 0
            self.dispatcher.worker_ready(worker)
        elif isinstance(message, ServiceMessage) and self._observer is not None:
            self._observer.message_received(message)

    def _settle(self, task: Task, kind: int, body: bytes) -> None:
        if not task.is_claimed:  # a plain future that was cancelled after its call had been sent
            return
        try:
            settle_from_bytes(task.call, kind, body)
        except BaseException as error:  # also SystemExit: it is not meant for this thread
            logger.exception("Job %s could not be settled.", task.id)
            with contextlib.suppress(Exception):
                task.call.fail(error)

    def _on_log_report(self, message: LogReport) -> None:
        call = None if message.id is None else self.dispatcher.call(message.id)
        record = _rebuilt(message)
        if call is not None:
            record.__dict__.update(job_id=call.job.id, job_key=call.job.key)
            call.job.add_log(to_log_line(record))
            call.progressed()
        if len(self.callbacks) < _MAX_QUEUED_LOG_RECORDS:
            self.callbacks.run(lambda: _handle(record))

    def _on_start_failed(self, error: BaseException, born: float) -> None:
        """A worker could not start.

        :param born: when it was started (monotonic).
        """
        if self._observer is not None:
            self._failed_starts += self._delay_restart(self._observer, error, born)
            if self._failed_starts >= _MAX_FAILED_STARTS and not self.dispatcher.has_ready_worker:
                self._fail_all(error, self.dispatcher.pop_awaited())
                self._terminated |= self.dispatcher.closing  # the rest of the queue would wait for ever
            return
        self._failed_starts += 1
        # An error of the app's fails a job at once; a worker that died without one is tried again.
        if not isinstance(error, WorkerLost) or self._failed_starts >= _MAX_FAILED_STARTS:
            self._fail_all(error, self.dispatcher.pop_oldest())

    def _delay_restart(self, observer: PoolObserver, error: BaseException, born: float) -> bool:
        """Replace a worker that has failed after a delay, which doubles with each failure in a row.

        :param born: when that worker was started (monotonic).
        :return: True if this begins a delay. Workers that were started before the last one ended count as one failure.
        """
        now = time.monotonic()
        begins = born >= self._restart_at
        if begins:
            self._restart_at = now + min(_MAX_RESTART_DELAY, _RESTART_DELAY * 2 ** min(self._crashes, _MAX_DOUBLINGS))
            self._crashes += 1
        observer.worker_failed(error, max(0.0, self._restart_at - now))
        return begins

    def _fail_all(self, error: BaseException, tasks: list[Task]) -> None:
        """Fail jobs with the error of a worker that could not start, which would be started for them for ever."""
        status = JobStatus.LOST if isinstance(error, WorkerLost) else JobStatus.FAILED
        for task in tasks:
            task.call.fail(error, status)

    def _reap(self, worker: WorkerProcess) -> None:
        """A worker process has ended: settle what it had begun, and let others run the rest."""
        self._selector.unregister(worker.sentinel)
        while not worker.eof and self._read(worker):  # what it sent before
            pass
        self._unwatch(worker)
        worker.kill()  # what its jobs have started
        worker.reaped = True
        exit_code = worker.join()
        phase = worker.phase
        for task in self.dispatcher.worker_exited(worker):
            if task.killed:
                task.call.stopped(forced=True)
            else:
                what = f"The worker process died that ran job {task.call.job.name}."
                lost = WorkerLost(what, worker.process.pid, exit_code)
                lost.mark = worker.progress_mark
                task.call.fail(lost, JobStatus.LOST)
        if phase < WorkerPhase.READY:
            self._on_start_failed(WorkerLost(_NO_START, worker.process.pid, exit_code), worker.born)
        elif phase is WorkerPhase.READY and self._observer is not None:
            if time.monotonic() - worker.born > _STABLE_AFTER:
                self._crashes = 0
            died = WorkerLost("A worker process died.", worker.process.pid, exit_code)
            self._delay_restart(self._observer, died, worker.born)

    def _finish(self) -> None:
        """Close everything; the last thing that happens."""
        tasks, workers = self.dispatcher.terminate()
        for task in tasks:
            error = WorkerLost(f"Job {task.call.job.name} was cut off as the process ended.")
            task.call.fail(error, JobStatus.LOST)
        for worker in workers:
            worker.process.join(_KILL_TIMEOUT)
            worker.close()
        self._close()

    def _close(self) -> None:
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()
        self.callbacks.close(wait=False)


def _not_started(error: Exception) -> Exception:
    if isinstance(error, (TypeError, AttributeError, pickle.PicklingError)):
        refused = NotPicklable(
            f"A worker process could not be started, as something it needs cannot be sent to it: {error}"
        )
        refused.__cause__ = error
        return refused
    return error


def _rebuilt(message: LogReport) -> logging.LogRecord:
    # Not by the app's own factory, which has had its turn in the worker.
    record = logging.LogRecord(message.name, message.level, "", 0, message.text, None, None)
    fields: dict[str, Any] = {}
    try:
        fields = pickle.loads(message.fields)
    except BaseException as error:  # something in it is of a class that this process cannot import
        logger.warning("A log record of a worker process arrives without its fields: %s", describe_error(error))
    record.__dict__.update({"job_id": None, "job_key": None, **fields})
    return record


def _handle(record: logging.LogRecord) -> None:
    logging.getLogger(record.name).handle(record)


_NO_START = (
    "A worker process died before it was ready; what it wrote to its standard error says why. One that is started by "
    "'spawn' or 'forkserver' imports the main module, which must not start jobs when it is imported: put that "
    "under 'if __name__ == \"__main__\":'."
)
