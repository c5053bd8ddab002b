"""Worker processes that are watched over: one that dies is replaced, and only the job it ran is lost.

.. code-block:: text

  parent process                                                    worker process (one of several)
 ┌───────────────────────────────────────────┐                     ┌────────────────────────────────────┐
 │ any thread: submit ──> queue              │   calls ─────────>  │ main thread: takes a call, runs it,│
 │     │                    │                │                     │ sends what came of it              │
 │     └──── hand out <─────┘                │                     │                                    │
 │              │  ^                         │                     │                                    │
 │              v  │   (Dispatcher)          │   control ───────>  │ listener thread: tells the job to  │
 │ supervisor thread: waits for all workers  │                     │ leave; ends when the parent is gone│
 │   at once, settles futures, starts and    │  <── wire: results, │                                    │
 │   buries workers                          │  progress, records  │                                    │
 │ callback thread: runs the user's code     │  <──────── sentinel │ readable when the process has ended│
 └───────────────────────────────────────────┘                     └────────────────────────────────────┘

**Handing out ahead.** A worker is given a few calls before it has finished the one it runs, which saves it the wait
for the parent; more than anything else this is why the pool is fast. A call that was handed out must not be stuck,
though: behind a job that takes long, in a worker that is killed, or when it is cancelled. So calls go over a line that
the parent can read as well, and the system hands each to one reader only: what the parent gets back will not be run
there, and what it does not get back has been begun (:class:`CallSender`). Each call has a number, as
the worker may take one in the middle of others that are taken back.

**Who owns what.** The lock of the :class:`Dispatcher` guards the queue, the workers' lists of
what they were given, and all sending to them; it is held for short and never waits for a process: what a worker does
not take at once is sent on by the supervisor. Only the supervisor thread starts processes, reads from them, and buries
them. Futures are claimed under the lock, and settled by the supervisor, outside of it. Code of the user's runs in the
callback thread, under no lock; only what rebuilds results and errors is called by the supervisor.

**Invariants.** A worker runs its calls in the order in which they were given. The first in its list is claimed
(``running``) in the parent; the others are claimed when those before have ended. A task is in the queue, or in the
list of one worker, or settled. The first in a list is claimed, and so is what was found to have begun.
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
from flask_executor.backends.process.worker_main import WorkerPlugin, WorkerSettings
from flask_executor.backends.process.worker_process import Task, WorkerProcess
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
_RESTART_DELAY = 0.1  # seconds until a worker is started again that should stand; twice as long each time
_MAX_RESTART_DELAY = 30.0  # seconds
_MAX_DOUBLINGS = 10  # of the pause that lead to the longest, at least
_STABLE_AFTER = 10.0  # seconds after which a worker is taken to have started well
_MAX_QUEUED_LOG_RECORDS = 10_000  # log records that wait for the app's handlers before others are dropped


class PoolObserver(Protocol):
    """Whoever wants the same number of workers at all times, with something living in them."""

    #: Makes that, in each worker; inherited or pickled.
    make_plugin: Callable[[], WorkerPlugin]

    def worker_failed(self, error: BaseException, delay: float) -> None:
        """A worker could not start, or died. Others are started in so many seconds."""

    def message_received(self, message: ServiceMessage) -> None:
        """A resident has sent a message. Quick, and runs no code of the user's."""


class Supervisor:
    """Starts worker processes, listens to them and buries them; see the top of this module."""

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
        self._starting = threading.Lock()  # taken before the dispatcher's, never after
        self._thread: threading.Thread | None = None
        self._app_import: str | None = None
        self._failed_starts = 0  # one after the other
        self._crashes = 0  # of what should stand, one after the other
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
        """Start the thread, if it was not.

        :raises ConfigError: when a worker process could not find the app.
        """
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self.dispatcher.closing:
                    self._app_import = self._find_app()
                    thread = threading.Thread(target=self._supervise, name="flask-executor-supervisor", daemon=True)
                    thread.start()
                    self._thread = thread

    def shutdown(self, *, wait: bool, cancel_futures: bool = False) -> None:
        """Take in no more calls, and end when those that were taken in have ended."""
        if os.getpid() != self._pid:  # a child of ours throws away what it has inherited
            return
        with self._starting:
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

    @property
    def ended(self) -> bool:
        """Whether the thread has, or was never started."""
        return self._thread is None or not self._thread.is_alive()

    def terminate(self, grace: float) -> None:
        """End, and end workers by force that have not ended by themselves after ``grace`` seconds."""
        self.shutdown(wait=False)
        thread = self._thread
        if thread is not None:
            thread.join(grace)
            if thread.is_alive():
                self._terminated = True
                self.dispatcher.kill_all()
                self._wake_up()
                thread.join(5.0)

    def _find_app(self) -> str | None:
        """Where workers import the app from, None where they inherit it."""
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
        """Have the thread look at everything."""
        with contextlib.suppress(OSError):  # it will anyway, or it has ended
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
        """Seconds until :meth:`_step` has to be called unasked; None while there is no need."""
        timeout = self.dispatcher.next_timeout()
        pause = self._restart_at - time.monotonic()
        if pause <= 0:
            return timeout
        return pause if timeout is None else min(timeout, pause)

    def _on_ready(self, worker: WorkerProcess, events: int) -> None:
        if worker.eof:  # since what came before this in the same round
            return
        if events & selectors.EVENT_WRITE:
            self.dispatcher.flush(worker)
        if events & selectors.EVENT_READ:
            self._read(worker)

    def _step(self) -> bool:
        """Do what is due; False when all is done."""
        missing, workers, left = self.dispatcher.step()
        for task in left:
            task.call.stopped()
        for worker in workers:
            if not worker.eof:
                self._watch(worker, worker.stream, selectors.EVENT_READ)
                self._watch(worker, worker.control, 0)
        if self.dispatcher.done or self._terminated:
            return False
        now = time.monotonic()
        if self.dispatcher.closing:  # somebody waits for the end
            self._restart_at = min(self._restart_at, now + _RESTART_DELAY)
        if now >= self._restart_at:
            for _ in range(missing):
                self._start_worker()
        return True

    def _watch(self, worker: WorkerProcess, line: FrameStream, events: int) -> None:
        """Select on a line for these events, and for room if something waits to be sent."""
        if line.pending:
            events |= selectors.EVENT_WRITE
        there = self._selector.get_map().get(line)
        if there is None:
            if events:
                self._selector.register(line, events, worker)
        elif not events:
            self._selector.unregister(line)
        elif there.events != events:
            self._selector.modify(line, events, worker)

    def _start_worker(self) -> None:
        try:
            worker = WorkerProcess(self._context, self._settings())
        except Exception as error:  # no memory, no processes, or something that cannot be pickled for it
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
        """Read what the worker has sent; False when there is nothing (any more)."""
        try:
            frames = worker.stream.receive()
        except BlockingIOError:
            return False
        except EOFError:  # it has ended, or is about to; what is left to be done is done when the sentinel says so
            self._unwatch(worker)
            return False
        except Exception:  # what it says is no frame
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
            for line in (worker.stream, worker.control):
                if line in self._selector.get_map():
                    self._selector.unregister(line)

    def _kill_garbled(self, worker: WorkerProcess) -> None:
        """It says what no worker says: that is the end of it, and of the job it runs, but of nothing else."""
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
            worker.retired = True
            self._on_start_failed(unpack_error(message.error), worker.born)
        elif isinstance(message, AppLoaded):
            worker.is_up = True
        elif isinstance(message, WorkerReady):
            self._failed_starts = 0
            self.dispatcher.worker_ready(worker)
        elif isinstance(message, ServiceMessage) and self._observer is not None:
            self._observer.message_received(message)

    def _settle(self, task: Task, kind: int, body: bytes) -> None:
        if not task.begun:  # a plain future that was cancelled after its call had been handed out
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
        """A worker could not start that was started then (monotonic)."""
        if self._observer is not None:
            self._failed_starts += self._delay_restart(self._observer, error, born)
            if self._failed_starts >= _MAX_FAILED_STARTS and not self.dispatcher.has_ready_worker:
                self._fail_all(error, self.dispatcher.pop_awaited())
                self._terminated |= self.dispatcher.closing  # what is left would wait for ever
            return
        self._failed_starts += 1
        # What it says is told at once; without a word it is tried again.
        if not isinstance(error, WorkerLost) or self._failed_starts >= _MAX_FAILED_STARTS:
            self._fail_all(error, self.dispatcher.pop_oldest())

    def _delay_restart(self, observer: PoolObserver, error: BaseException, born: float) -> bool:
        """Start workers again in a while: the longer, the more often this was so.

        :param born: when the worker was started that has failed (monotonic).
        :return: whether this has begun a pause. Workers that were started before the last one ended fail together.
        """
        now = time.monotonic()
        begins = born >= self._restart_at
        if begins:
            self._restart_at = now + min(_MAX_RESTART_DELAY, _RESTART_DELAY * 2 ** min(self._crashes, _MAX_DOUBLINGS))
            self._crashes += 1
        observer.worker_failed(error, max(0.0, self._restart_at - now))
        return begins

    def _fail_all(self, error: BaseException, tasks: list[Task]) -> None:
        """A worker could not be started: somebody has to be told, or it would be tried for ever."""
        status = JobStatus.LOST if isinstance(error, WorkerLost) else JobStatus.FAILED
        for task in tasks:
            task.call.fail(error, status)

    def _reap(self, worker: WorkerProcess) -> None:
        """A worker process has ended: settle what it had begun, and let others have the rest."""
        self._selector.unregister(worker.sentinel)
        while not worker.eof and self._read(worker):  # what it has still sent
            pass
        self._unwatch(worker)
        worker.kill()  # what its jobs have started
        worker.reaped = True
        exit_code = worker.join()
        was_retired, was_killed = worker.retired, False
        for task in self.dispatcher.worker_exited(worker):
            if task.killed:
                was_killed = True
                task.call.stopped(forced=True)
            else:
                what = f"The worker process died that ran job {task.call.job.name}."
                lost = WorkerLost(what, worker.process.pid, exit_code)
                lost.mark = worker.progress_mark
                task.call.fail(lost, JobStatus.LOST)
        if was_retired or was_killed:
            return
        if not worker.ready:
            # One that was killed before it got to its first job is nobody's loss, but it must not go on for ever.
            self._on_start_failed(WorkerLost(_NO_START, worker.process.pid, exit_code), worker.born)
        elif self._observer is not None:
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
            worker.process.join(5.0)
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
