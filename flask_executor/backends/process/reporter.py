"""What a worker process sends to its parent: outcomes, messages, progress, log records."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from flask_executor.backends.process.after_fork import IGNORED_SIGNALS, exit_with_descendants
from flask_executor.backends.process.channel import FrameStream
from flask_executor.backends.process.protocol import (
    FrameKind,
    LogReport,
    LogsDropped,
    ProgressReport,
)
from flask_executor.helpers import safe_repr
from flask_executor.helpers.pickling import CompactPickle, pickle_parts
from flask_executor.jobs.current import RunningJob, running_job
from flask_executor.jobs.log_records import install_record_factory
from flask_executor.jobs.packing import Outcome

REPORT_INTERVAL = 0.05  # seconds between two reports of progress to the parent
_MAX_PENDING_FRAMES = 1000  # that wait for room in the socket before log records are dropped


class Reporter:
    """Writes the stream to the parent. Never makes the job that reports wait for the parent to read.

    Outcomes and messages always arrive. Of progress only the latest state is sent. Log records are dropped, and
    counted, if for long they come faster than the parent reads.

    Any thread of the worker may call it; its lock guards the stream.
    """

    def __init__(self, stream: FrameStream) -> None:
        self._stream = stream
        self._lock = threading.RLock()  # a finalizer may log in the middle of a method
        self._unsent_report: RunningJob | None = None  # the job that has progress to be sent
        self._next_report = 0.0
        self._dropped = 0
        self._muted = False
        #: Readable when the listener thread is to call :meth:`send_pending` in a while.
        self.wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_sender.setblocking(False)

    def send(self, kind: int, body: list[bytes], number: int = 0) -> None:
        """Send a frame, after everything that was reported before it; wait until all of it is sent."""
        with self._lock:
            self._send_report()
            self._send(kind, body, number)
            if self._stream.pending:
                self._flush(wait=True)

    def send_message(self, message: CompactPickle) -> None:
        """As :meth:`send`, of a message."""
        self.send(FrameKind.MESSAGE, pickle_parts(message))

    def mute(self) -> None:
        """In a process that a job has forked: the stream is its parent's, so nothing is sent from now on."""
        self._muted = True
        self._lock = threading.RLock()
        logging.getLogger().handlers = []
        with contextlib.suppress(ValueError):  # not the main thread of an interpreter
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)

    def exit_if_forked_child(self, kind: Outcome) -> None:
        """End this process if a job has forked it, as what was to run in it has ended.

        :param kind: how that has ended; makes the exit code.
        """
        if self._muted:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # closed, or nowhere
                    stream.flush()
            os._exit(0 if kind is Outcome.RESULT else 1)

    def report(self, running: RunningJob) -> None:
        """Send the progress of the running job: now, or when ``REPORT_INTERVAL`` has passed since the last report.

        The job does not call this again before that, whatever it reports meanwhile.
        """
        if self._muted:
            return
        self._unsent_report = running
        if time.monotonic() >= self._next_report and self._lock.acquire(blocking=False):
            try:
                self._send_report()
            finally:
                self._lock.release()
        if self._unsent_report is not None:
            self._wake_listener()

    def log(self, record: logging.LogRecord) -> None:
        """Send a log record, or drop it if too many wait to be sent."""
        if self._muted:
            return
        job = running_job()
        with self._lock:
            if self._stream.pending > _MAX_PENDING_FRAMES:
                self._dropped += 1
                return
            if self._dropped:
                self._send_message(LogsDropped(self._dropped))
                self._dropped = 0
            self._send_message(_log_report(None if job is None else job.id, record))
            pending = self._stream.pending
        if pending:
            self._wake_listener()

    def send_pending(self) -> bool:
        """Send what there is room for; True if nothing is left. The listener thread calls this."""
        with self._lock:
            self._send_report()
            self._flush()
            return self._unsent_report is None and not self._stream.pending

    def _send_report(self) -> None:
        running = self._unsent_report
        if running is None or not self._flush():  # the parent reads slowly: later, with what is new by then
            return
        self._unsent_report = None
        running.report_pending = False  # before the progress is read: what is new after that is reported again
        self._next_report = time.monotonic() + REPORT_INTERVAL
        job = running.record
        meta = None if job.meta is None else _pickled_meta(job.meta.copy())
        self._send_message(ProgressReport(job.id, job.progress, job.message, meta))

    def _send_message(self, message: CompactPickle) -> None:
        self._send(FrameKind.MESSAGE, pickle_parts(message))

    def _send(self, kind: int, body: list[bytes], number: int = 0) -> None:
        if self._muted:
            return
        try:
            self._stream.send(kind, body, number)
        except OSError:
            exit_with_descendants()

    def _flush(self, *, wait: bool = False) -> bool:
        try:
            return self._stream.flush(wait=wait)
        except OSError:
            exit_with_descendants()

    def _wake_listener(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is awake
            self._wake_sender.send(b"w")


def _pickled_meta(meta: Mapping[str, Any]) -> bytes:
    try:
        return pickle.dumps(meta, pickle.HIGHEST_PROTOCOL)
    except Exception:  # whatever a __reduce__ of the user's raises: its repr is better than nothing
        return pickle.dumps({name: safe_repr(value) for name, value in meta.items()}, pickle.HIGHEST_PROTOCOL)


class _ForwardHandler(logging.Handler):
    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._reporter.log(record)
        except Exception:
            self.handleError(record)


def forward_logs(reporter: Reporter) -> None:
    """Send log records to the parent instead of to the handlers in this process.

    Those are copies of the parent's: two processes would write to one file, and a thread of the parent may have held
    a handler's lock when this process was forked.
    """
    install_record_factory(running_job)
    forward = _ForwardHandler(reporter)
    root = logging.getLogger()
    root.handlers = [forward]
    for each in list(logging.root.manager.loggerDict.values()):
        if isinstance(each, logging.Logger) and each.handlers:
            # A logger that does not propagate to the root needs a handler of its own.
            each.handlers = [] if each.propagate else [forward]


def _log_report(id: str | None, record: logging.LogRecord) -> LogReport:
    """A record in a form that another process can rebuild, as logging.handlers.QueueHandler makes it."""
    fields = copy.copy(record).__dict__
    text = fields["message"] = fields["msg"] = record.getMessage()
    fields["args"] = None
    if record.exc_info:
        fields["exc_text"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
        fields["exc_info"] = None
    fields.pop("_job", None)
    try:
        data = pickle.dumps(fields, pickle.HIGHEST_PROTOCOL)
    except Exception:  # what the app has put on the record
        simple = (str, int, float, type(None))
        plain = {name: value if isinstance(value, simple) else safe_repr(value) for name, value in fields.items()}
        data = pickle.dumps(plain, pickle.HIGHEST_PROTOCOL)
    return LogReport(id, record.name, record.levelno, text, data)


def log_levels() -> dict[str, int]:
    """The levels that were set in this process, by the loggers' names, for a worker that does not inherit them."""
    loggers = {"": logging.getLogger(), **logging.root.manager.loggerDict}
    return {
        name: logger.level
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET
    }
