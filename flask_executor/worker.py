"""A worker process, seen from inside.

.. code-block:: text

    main thread:     takes a call, runs it, sends what came of it; again
    listener thread: reads what comes for the running job (leave); sends what the job reported while a report was
                     too recent; ends the process when the parent is gone

Who owns what: the main thread reads the calls; the listener reads ``control``; whoever sends holds the lock of the
:class:`Outbox`. The running job is set by the main thread and read by the listener, under the worker's lock.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import os
import pickle
import select
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from flask_executor.apps import import_app
from flask_executor.control import RunningJob, running_job
from flask_executor.helpers import describe_error, safe_repr
from flask_executor.inherited import be_worker, die_with, let_go, let_go_of_engines, origin, own_process_group
from flask_executor.jobs import LiveJob
from flask_executor.lines import IncomingCalls, Wire, pickle_parts
from flask_executor.logs import know_jobs, logger
from flask_executor.messages import (
    Broadcast,
    Dropped,
    Kind,
    Leave,
    Logged,
    Message,
    NotReady,
    Progressed,
    Ready,
    Told,
    Up,
)
from flask_executor.runner import pack_error, run_packed

if TYPE_CHECKING:
    from flask import Flask

_INTERVAL = 0.05  # seconds between two reports of progress
_IGNORED = (signal.SIGTERM, signal.SIGINT)
_MOST_EARLY = 16  # jobs that are not here yet, and have messages
_BACKLOG = 1000  # frames that wait to be sent before log records are dropped


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """What a worker process is started with; inherited or pickled."""

    #: The app, where it is inherited.
    app: Flask | None
    #: The app's import string, where it is not, and what the app's config calls that setting.
    app_import: str
    app_config_key: str
    #: Called before the first job, in an app context.
    initializers: Sequence[Callable[[], object]]
    #: Levels by logger, where they are not inherited.
    log_levels: Mapping[str, int]
    #: Makes what lives in the process, if anything does.
    resident: Callable[[], Resident] | None = None
    #: See :func:`flask_executor.inherited.origin`.
    origin: int = field(default_factory=origin)


class Resident(Protocol):
    """What lives in a worker process, and is there for every call; used by its main thread, but for :meth:`hear`."""

    #: Readable when :meth:`tend` is to be called.
    wakes: socket.socket
    #: Has a ``value``, a number up to 64 bits, that the parent sees too, even when the process was killed.
    mark: Any

    def move_in(self, app: Flask, send: Callable[[Message], None], leave_child: Callable[[Kind], None]) -> None:
        """Get ready. What this raises ends the process.

        :param leave_child: to be called after code of the user's; ends a process that this has forked.
        """

    def patience(self) -> float | None:
        """Seconds until :meth:`tend` is to be called unasked; None for as long as nothing happens."""

    def tend(self) -> None:
        """Do what is due. Never raises."""

    def hear(self, message: Broadcast) -> None:
        """Take a message that is for all workers; in the listener thread."""

    def move_out(self) -> None:
        """The process ends."""


def main(
    settings: WorkerSettings,
    wire: socket.socket,
    control: socket.socket,
    life: socket.socket,
    packets: socket.socket | None,
    mark: Any = None,
) -> None:
    """The life of a worker process."""
    inherited = [*logging._handlerList]  # type: ignore[attr-defined]
    own_process_group()
    die_with(life)
    be_worker(settings.origin)
    outbox = Outbox(Wire(wire))
    if hasattr(os, "register_at_fork"):
        # What a job forks is an ordinary process: it says nothing here, and ends when it is told to. Signals wait
        # meanwhile, or one that comes at once would meet our handler there.
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED),
            after_in_child=outbox.mute,
        )
    resident = None if settings.resident is None else settings.resident()
    if resident is not None:
        resident.mark = mark
    worker = Worker(outbox, IncomingCalls(wire, packets), resident)
    try:
        if settings.app is not None:
            let_go()  # before there is a second thread
        listener = threading.Thread(
            target=worker.listen, args=(Wire(control),), name="flask-executor-listener", daemon=True
        )
        listener.start()
        # The parent says when to end, also when a signal is sent to all processes of a service. Handlers and not
        # SIG_IGN, which the programs that a job starts would inherit.
        for number in _IGNORED:
            signal.signal(number, lambda *_: None)
        app = worker.prepare(settings)
    except BaseException as error:
        outbox.say(NotReady(pack_error(error)))
        return
    outbox.say(Ready())
    with contextlib.suppress(EOFError):  # the parent wants no more of this worker
        worker.work(app)
    if resident is not None:
        resident.move_out()
    # Not the parent's: it writes them itself, and a thread of it may have held their locks when this one was forked.
    logging.shutdown([handler for handler in logging._handlerList if handler not in inherited])  # type: ignore[attr-defined]


class Worker:
    """Runs the calls that come."""

    def __init__(self, outbox: Outbox, calls: IncomingCalls, resident: Resident | None = None) -> None:
        self._outbox = outbox
        self._calls = calls
        self._resident = resident
        self._lock = threading.Lock()
        self._running: RunningJob | None = None
        self._early: Leave | None = None  # for a job that is not here yet
        self._mail: dict[str, list[Told]] = {}  # for jobs that are not here yet

    def prepare(self, settings: WorkerSettings) -> Flask:
        """Get the app and run the initializers."""
        forward_logs(self._outbox)
        for name, level in settings.log_levels.items():
            logging.getLogger(name).setLevel(level)
        if settings.app is not None:
            app = settings.app
            let_go_of_engines(app)
        else:
            app = import_app(settings.app_import, settings.app_config_key)
            forward_logs(self._outbox)  # again: the app may have set up its own
        self._outbox.say(Up())
        for initialize in settings.initializers:
            with app.app_context():
                initialize()
            self._outbox.leave_child(Kind.RESULT)
        if self._resident is not None:
            self._resident.move_in(app, self._outbox.say, self._outbox.leave_child)
            self._outbox.leave_child(Kind.RESULT)
        return app

    def work(self, app: Flask) -> None:
        """Run calls, one after the other.

        :raises EOFError: when there will be no more.
        """
        if self._resident is not None:
            calls: Iterator[None] = self._between_calls(self._resident)
        else:
            calls = itertools.repeat(None)
        for _ in calls:
            number, attempt, payload = self._calls.next()
            kind, body = run_packed(app, attempt, payload, self._adopt)
            del payload
            self._outbox.leave_child(kind)
            with self._lock:
                self._running = None
            self._outbox.send(kind, body, number)
            del body

    def _between_calls(self, resident: Resident) -> Iterator[None]:
        """Have the resident do what is due until there is a call; again and again."""
        calls, wakes = self._calls.fileno(), resident.wakes.fileno()
        poll = select.poll()  # a selector would take longer than some calls
        for number in (calls, wakes):
            poll.register(number, select.POLLIN)
        while True:
            patience = resident.patience()
            ready = [number for number, _ in poll.poll(None if patience is None else 1000 * patience)]
            if ready != [calls] or patience == 0:
                if wakes in ready:
                    resident.wakes.recv(4096)
                resident.tend()
            if calls in ready:
                yield

    def _adopt(self, job: LiveJob) -> RunningJob:
        running = RunningJob(job, self._outbox.report, is_remote=True)
        with self._lock:
            self._running = running
            early = self._early
            if early is not None and (early.id, early.attempt) == (job.id, job.attempt):
                running.leave(early.reason)
            for message in self._mail.pop(job.id, ()):
                _post(running, message)
        return running

    def listen(self, control: Wire) -> None:
        """In the listener thread: hand on what the parent says, until it is gone."""
        wakes = self._outbox.wakes
        due: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(control, selectors.EVENT_READ)
            selector.register(wakes, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select(due)}
                if control in ready:
                    self._hear(control)
                if wakes in ready:
                    wakes.recv(4096)
                    due = _INTERVAL
                elif not ready:
                    due = None if self._outbox.send_late() else _INTERVAL

    def _hear(self, control: Wire) -> None:
        try:
            for _, _, body in control.receive():
                message = pickle.loads(body)
                if isinstance(message, Leave):
                    self._leave(message)
                elif isinstance(message, Told):
                    self._told(message)
                elif self._resident is not None:
                    self._resident.hear(message)
        except EOFError:
            _die_with_what_was_started()

    def _told(self, message: Told) -> None:
        with self._lock:
            running = self._running
            if running is not None and running.id == message.id:
                _post(running, message)
                return
            self._mail.setdefault(message.id, []).append(message)
            if len(self._mail) > _MOST_EARLY:  # what came too late, for jobs that had ended
                del self._mail[next(iter(self._mail))]

    def _leave(self, message: Leave) -> None:
        with self._lock:
            self._early = message
            running = self._running
            if running is not None and (running.id, running.attempt) == (message.id, message.attempt):
                running.leave(message.reason)


def _post(running: RunningJob, message: Told) -> None:
    try:
        running.post(pickle.loads(message.data))
    except Exception as error:  # whatever a foreign __reduce__ or an import leads to
        logger.error("A message for job %s cannot be rebuilt: %s", running.name, describe_error(error))


def _die_with_what_was_started() -> NoReturn:
    """The parent is gone: nobody waits for this process, nor for what its job has started."""
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


class Outbox:
    """Sends to the parent, without ever holding up the job that reports.

    Outcomes are sent for certain; progress is the last there is; log records are dropped, and counted, when they
    come faster than the parent reads for long.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._lock = threading.RLock()  # a finalizer may log in the middle of it
        self._late: RunningJob | None = None
        self._next_report = 0.0
        self._dropped = 0
        self._muted = False
        #: Readable when the listener should look whether something is late.
        self.wakes, self._wake = socket.socketpair()
        self._wake.setblocking(False)

    def send(self, kind: Kind, body: list[bytes], number: int = 0) -> None:
        """Send what must arrive, after everything that was reported before it."""
        with self._lock:
            self._send_report()
            self._send(kind, body, number)
            if self._wire.pending:
                self._flush(wait=True)

    def say(self, message: Message) -> None:
        """Send a message that must arrive."""
        self.send(Kind.MESSAGE, pickle_parts(message))

    def mute(self) -> None:
        """In a process that a job has forked: the lines are its parent's, say nothing."""
        self._muted = True
        self._lock = threading.RLock()
        logging.getLogger().handlers = []
        with contextlib.suppress(ValueError):  # not the main thread of an interpreter
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)

    def leave_child(self, kind: Kind) -> None:
        """In a process that a job has forked, and in which it has come to its end: this process ends too."""
        if self._muted:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # closed, or nowhere
                    stream.flush()
            os._exit(0 if kind is Kind.RESULT else 1)

    def report(self, running: RunningJob) -> None:
        """The job has something new to tell. Until that is read it does not tell of more."""
        if self._muted:
            return
        self._late = running
        if time.monotonic() >= self._next_report and self._lock.acquire(blocking=False):
            try:
                self._send_report()
            finally:
                self._lock.release()
        if self._late is not None:
            self._wake_listener()

    def log(self, record: logging.LogRecord) -> None:
        """A log record was made."""
        if self._muted:
            return
        job = running_job()
        with self._lock:
            if self._wire.pending > _BACKLOG:
                self._dropped += 1
                return
            if self._dropped:
                self._say(Dropped(self._dropped))
                self._dropped = 0
            self._say(_logged(None if job is None else job.id, record))
            pending = self._wire.pending
        if pending:
            self._wake_listener()

    def send_late(self) -> bool:
        """Send what is late, as far as the parent takes it; whether there is nothing left."""
        with self._lock:
            self._send_report()
            self._flush()
            return self._late is None and not self._wire.pending

    def _send_report(self) -> None:
        running = self._late
        if running is None or not self._flush():  # the parent is slow: later, with what is new then
            return
        self._late = None
        running.reported = False  # before it is read: what comes from now on is told of again
        self._next_report = time.monotonic() + _INTERVAL
        job = running.record
        meta = None if job.meta is None else _pickled_meta(job.meta.copy())
        self._say(Progressed(job.id, job.progress, job.message, meta))

    def _say(self, message: Message) -> None:
        self._send(Kind.MESSAGE, pickle_parts(message))

    def _send(self, kind: Kind, body: list[bytes], number: int = 0) -> None:
        if self._muted:
            return
        try:
            self._wire.send(kind, body, number)
        except OSError:
            _die_with_what_was_started()

    def _flush(self, *, wait: bool = False) -> bool:
        try:
            return self._wire.flush(wait=wait)
        except OSError:
            _die_with_what_was_started()

    def _wake_listener(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is awake
            self._wake.send(b"w")


def _pickled_meta(meta: Mapping[str, Any]) -> bytes:
    try:
        return pickle.dumps(meta, pickle.HIGHEST_PROTOCOL)
    except Exception:  # whatever a foreign __reduce__ raises: what it looks like is better than nothing
        return pickle.dumps({name: safe_repr(value) for name, value in meta.items()}, pickle.HIGHEST_PROTOCOL)


class _Forward(logging.Handler):
    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._outbox.log(record)
        except Exception:
            self.handleError(record)


def forward_logs(outbox: Outbox) -> None:
    """Send log records to the parent, whose handlers they are meant for.

    The handlers here are copies: two processes would write into one file, and a thread of the parent may have held
    their locks when this one was forked.
    """
    know_jobs(running_job)
    forward = _Forward(outbox)
    root = logging.getLogger()
    root.handlers = [forward]
    for each in list(logging.root.manager.loggerDict.values()):
        if isinstance(each, logging.Logger) and each.handlers:
            # Where it does not propagate to the root it has to be forwarded here.
            each.handlers = [] if each.propagate else [forward]


def _logged(id: str | None, record: logging.LogRecord) -> Logged:
    """A record in a form that another process can rebuild; as the standard library's QueueHandler does."""
    fields = copy.copy(record).__dict__
    text = fields["message"] = fields["msg"] = record.getMessage()
    fields["args"] = None
    if record.exc_info:
        fields["exc_text"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
        fields["exc_info"] = None
    fields.pop("_job", None)
    try:
        data = pickle.dumps(fields, pickle.HIGHEST_PROTOCOL)
    except Exception:  # what the app put on the record
        simple = (str, int, float, type(None))
        plain = {name: value if isinstance(value, simple) else safe_repr(value) for name, value in fields.items()}
        data = pickle.dumps(plain, pickle.HIGHEST_PROTOCOL)
    return Logged(id, record.name, record.levelno, text, data)


def log_levels() -> dict[str, int]:
    """The levels that were set in this process, by logger, for a worker that does not inherit them."""
    loggers = {"": logging.getLogger(), **logging.root.manager.loggerDict}
    return {
        name: logger.level
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET
    }
