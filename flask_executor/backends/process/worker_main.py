"""What runs in a worker process.

.. code-block:: text

    main thread:     reads a call, runs it, sends its outcome; again
    listener thread: reads control messages, and gives them to the running job; sends the progress that came too soon
                     after the last report; ends the process when the parent is gone

The main thread reads the calls, the listener thread ``control``; any thread sends, under the lock of the
:class:`Reporter`. The main thread sets the running job, and the listener thread reads it, under the worker's lock.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import select
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from flask_executor.backends.process.after_fork import (
    IGNORED_SIGNALS,
    detach_from_parent,
    die_with_parent,
    dispose_engines,
    exit_with_descendants,
    mark_as_worker,
    own_process_group,
    root_pid,
)
from flask_executor.backends.process.channel import CallReceiver, FrameStream
from flask_executor.backends.process.protocol import (
    AppLoaded,
    Broadcast,
    DeliverMessage,
    StartFailed,
    StopJob,
    WorkerReady,
)
from flask_executor.backends.process.reporter import REPORT_INTERVAL, Reporter, forward_logs
from flask_executor.helpers import describe_error
from flask_executor.helpers.app_import import import_app
from flask_executor.helpers.log import logger
from flask_executor.helpers.pickling import CompactPickle
from flask_executor.jobs.current import RunningJob
from flask_executor.jobs.model import JobState
from flask_executor.jobs.packing import Outcome, pack_error, run_packed

if TYPE_CHECKING:
    from flask import Flask

_MAX_EARLY_JOBS = 16  # whose messages are kept before their calls are read


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """The arguments of a worker process; inherited or pickled."""

    #: The app, if it is inherited.
    app: Flask | None
    #: The app's import string, if it is not inherited; and the config key of that setting, for error messages.
    app_import: str
    app_config_key: str
    #: Called before the first call, in an app context.
    initializers: Sequence[Callable[[], object]]
    #: Log levels by the loggers' names, if they are not inherited.
    log_levels: Mapping[str, int]
    #: Makes the plugin that the process hosts; None for none.
    make_plugin: Callable[[], WorkerPlugin] | None = None
    #: See :func:`~flask_executor.backends.process.after_fork.root_pid`.
    root_pid: int = field(default_factory=root_pid)


class WorkerPlugin(Protocol):
    """Code that lives in a worker process beside its calls, as a service does.

    The worker's main thread calls all methods but :meth:`on_broadcast`.
    """

    #: Readable when :meth:`run_due` is to be called.
    wake_receiver: socket.socket
    #: Shared memory with a ``value`` of 64 bits, which the parent can read even after the worker was killed.
    progress_mark: Any

    def setup(
        self, app: Flask, send: Callable[[CompactPickle], None], exit_if_forked_child: Callable[[Outcome], None]
    ) -> None:
        """Get ready. An error that this raises ends the process.

        :param send: sends a message to the parent.
        :param exit_if_forked_child: call this after running user code; if that code forked, it ends the forked child.
        """

    def next_timeout(self) -> float | None:
        """Seconds until :meth:`run_due` is to be called; None for not before ``wake_receiver`` is readable."""

    def run_due(self) -> None:
        """Do what is due. Never raises."""

    def on_broadcast(self, message: Broadcast) -> None:
        """Take a message that is for all workers. The listener thread calls this."""

    def teardown(self) -> None:
        """Clean up: the worker ends."""


def main(
    settings: WorkerSettings,
    stream: socket.socket,
    control: socket.socket,
    life: socket.socket,
    packets: socket.socket | None,
    progress_mark: Any = None,
) -> None:
    """Run a worker process from its start to its end.

    :param stream: the worker's end of each socket; ``packets`` is None where there are no packet sockets.
    :param progress_mark: the plugin's shared memory.
    """
    inherited = [*logging._handlerList]  # type: ignore[attr-defined]
    own_process_group()
    die_with_parent(life)
    mark_as_worker(settings.root_pid)
    reporter = Reporter(FrameStream(stream))
    if hasattr(os, "register_at_fork"):
        # A process that a job forks is an ordinary one: it sends nothing to the parent, and signals end it. They are
        # blocked during the fork, or one that comes at once would be handled as in the worker.
        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS),
            after_in_child=reporter.mute,
        )
    plugin = None if settings.make_plugin is None else settings.make_plugin()
    if plugin is not None:
        plugin.progress_mark = progress_mark
    worker = Worker(reporter, CallReceiver(stream, packets), plugin)
    try:
        if settings.app is not None:
            detach_from_parent()  # before there is a second thread
        listener = threading.Thread(
            target=worker.listen, args=(FrameStream(control),), name="flask-executor-listener", daemon=True
        )
        listener.start()
        # The parent tells its workers when to end, even if all processes of a service get the signal. A handler and
        # not SIG_IGN, which the programs that a job starts would inherit.
        for number in IGNORED_SIGNALS:
            signal.signal(number, lambda *_: None)
        app = worker.prepare(settings)
    except BaseException as error:
        reporter.send_message(StartFailed(pack_error(error)))
        return
    reporter.send_message(WorkerReady())
    with contextlib.suppress(EOFError):  # the parent sends no more calls
        worker.work(app)
    if plugin is not None:
        plugin.teardown()
    # Not the inherited handlers: the parent flushes them, and a thread of it may have held their locks at the fork.
    logging.shutdown([handler for handler in logging._handlerList if handler not in inherited])  # type: ignore[attr-defined]


class Worker:
    """Runs calls, and gives control messages to the job that runs.

    :param reporter: sends to the parent.
    :param calls: reads the calls.
    """

    def __init__(self, reporter: Reporter, calls: CallReceiver, plugin: WorkerPlugin | None = None) -> None:
        self._reporter = reporter
        self._calls = calls
        self._plugin = plugin
        self._lock = threading.Lock()
        self._running: RunningJob | None = None
        self._last_stop: StopJob | None = None  # its call may not be read yet
        self._undelivered: dict[str, list[DeliverMessage]] = {}  # by job id

    def prepare(self, settings: WorkerSettings) -> Flask:
        """Get the app, run the initializers, and set up the plugin. The main thread calls this."""
        forward_logs(self._reporter)
        for name, level in settings.log_levels.items():
            logging.getLogger(name).setLevel(level)
        if settings.app is not None:
            app = settings.app
            dispose_engines(app)
        else:
            app = import_app(settings.app_import, settings.app_config_key)
            forward_logs(self._reporter)  # again: the app may have set up its own
        self._reporter.send_message(AppLoaded())
        for initialize in settings.initializers:
            with app.app_context():
                initialize()
            self._reporter.exit_if_forked_child(Outcome.RESULT)
        if self._plugin is not None:
            self._plugin.setup(app, self._reporter.send_message, self._reporter.exit_if_forked_child)
            self._reporter.exit_if_forked_child(Outcome.RESULT)
        return app

    def work(self, app: Flask) -> None:
        """Run calls, one after the other. The main thread calls this.

        :raises EOFError: when there will be no more.
        """
        if self._plugin is not None:
            calls: Iterator[None] = self._between_calls(self._plugin)
        else:
            calls = itertools.repeat(None)
        for _ in calls:
            number, attempt, payload = self._calls.next()
            kind, body = run_packed(app, attempt, payload, self._begin)
            del payload
            self._reporter.exit_if_forked_child(kind)
            with self._lock:
                self._running = None
            self._reporter.send(kind, body, number)
            del body

    def _between_calls(self, plugin: WorkerPlugin) -> Iterator[None]:
        """Let the plugin do what is due, and yield each time when there is a call to be read."""
        calls, wakes = self._calls.fileno(), plugin.wake_receiver.fileno()
        poll = select.poll()  # a selector would take longer than some calls
        for number in (calls, wakes):
            poll.register(number, select.POLLIN)
        while True:
            timeout = plugin.next_timeout()
            ready = [number for number, _ in poll.poll(None if timeout is None else 1000 * timeout)]
            if ready != [calls] or timeout == 0:
                if wakes in ready:
                    plugin.wake_receiver.recv(4096)
                plugin.run_due()
            if calls in ready:
                yield

    def _begin(self, job: JobState) -> RunningJob:
        running = RunningJob(job, self._reporter.report, is_remote=True)
        with self._lock:
            self._running = running
            stop = self._last_stop
            if stop is not None and (stop.id, stop.attempt) == (job.id, job.attempt):
                running.request_stop(stop.reason)
            for message in self._undelivered.pop(job.id, ()):
                _deliver(running, message)
        return running

    def listen(self, control: FrameStream) -> None:
        """Read control messages, and send late reports, until the parent is gone. The listener thread runs this."""
        wakes = self._reporter.wake_receiver
        due: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(control, selectors.EVENT_READ)
            selector.register(wakes, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select(due)}
                if control in ready:
                    self._read_control(control)
                if wakes in ready:
                    wakes.recv(4096)
                    due = REPORT_INTERVAL
                elif not ready:
                    due = None if self._reporter.send_pending() else REPORT_INTERVAL

    def _read_control(self, control: FrameStream) -> None:
        try:
            for _, _, body in control.receive():
                message = pickle.loads(body)
                if isinstance(message, StopJob):
                    self._on_stop(message)
                elif isinstance(message, DeliverMessage):
                    self._on_message(message)
                elif self._plugin is not None:
                    self._plugin.on_broadcast(message)
        except EOFError:
            exit_with_descendants()

    def _on_message(self, message: DeliverMessage) -> None:
        with self._lock:
            running = self._running
            if running is not None and running.id == message.id:
                _deliver(running, message)
                return
            self._undelivered.setdefault(message.id, []).append(message)
            if len(self._undelivered) > _MAX_EARLY_JOBS:  # those of jobs that had ended
                del self._undelivered[next(iter(self._undelivered))]

    def _on_stop(self, message: StopJob) -> None:
        with self._lock:
            self._last_stop = message
            running = self._running
            if running is not None and (running.id, running.attempt) == (message.id, message.attempt):
                running.request_stop(message.reason)


def _deliver(running: RunningJob, message: DeliverMessage) -> None:
    try:
        running.deliver(pickle.loads(message.data))
    except Exception as error:  # whatever a __reduce__ of the user's or an import raises
        logger.error("A message for job %s cannot be rebuilt: %s", running.name, describe_error(error))
