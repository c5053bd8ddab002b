"""The channel between the calls of an app's executor and the rest: records, signals, callbacks, stopping."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flask_executor.helpers.log import logger
from flask_executor.helpers.serial_thread import get_thread_callbacks
from flask_executor.jobs.call import Call, JobChannel
from flask_executor.jobs.contexts import CapturedContext, call_sync, current_app_or_none
from flask_executor.jobs.current import RunningJob
from flask_executor.jobs.log_records import log_failure
from flask_executor.jobs.model import Job, JobMessage, JobState
from flask_executor.signals import job_failed, job_finished, job_started

if TYPE_CHECKING:
    from concurrent.futures import Future

    from blinker import NamedSignal

    from flask_executor.executor.app_executor import AppExecutor


class AppChannel(JobChannel):
    """Connects the calls and futures of one app's executor with its parts.

    The worker that runs the call calls the first half; the second half may be called from any thread.
    """

    def __init__(self, app_executor: AppExecutor, executor: Any) -> None:
        self._app_executor = app_executor
        self._executor = executor  # the sender of signals

    # ---- what a call reports ----

    def started(self, job: JobState) -> None:
        self._app_executor.tracker.changed(job)
        if job_started.receivers:
            self._send_aside(job_started, job)

    def reporter(self, job: JobState) -> Callable[[RunningJob], None] | None:
        return self._app_executor.tracker.reporter(job)

    def progressed(self, job: JobState) -> None:
        self._app_executor.tracker.changed(job)

    def pack_result(self, job: JobState, result: Any, packed: bytes | None) -> bytes | None:
        return self._app_executor.tracker.pack_result(job, result, packed)

    def ended(self, job: JobState, error: BaseException | None, outcome: bytes | None) -> None:
        self._app_executor.tracker.ended(job, error, outcome)
        if job.error is not None and job_failed.receivers:
            self._send_aside(job_failed, job)
        if job_finished.receivers:
            self._send_aside(job_finished, job)

    def settled(self, future: Future[Any], call_back: Callable[[], object] | None) -> None:
        if call_back is not None:
            self._run_user_code(call_back)
        in_flight, backend = self._app_executor.in_flight, self._app_executor.backend_or_none
        if get_thread_callbacks() or (backend is not None and backend.has_pending_user_code):
            self._run_user_code(lambda: in_flight.discard(future))  # after the callbacks that wait there
        else:
            in_flight.discard(future)

    def retry(self, call: Call, error: BaseException, delay: float) -> None:
        self._app_executor.submission.retry(call, error, delay)

    def out_of_time(self, call: Call, attempt: int) -> None:
        self._app_executor.stopping.time_out(call, attempt)

    def unretrieved(self, job: JobState, error: BaseException) -> None:
        log_failure(self._app_executor.app, job.name, job.id, job.key, error)

    # ---- what a future asks ----

    def withdraw(self, future: Future[Any]) -> bool:
        call = self._app_executor.in_flight.get(future)
        if call is None or self._app_executor.scheduled.discard(call):
            return True
        return call.backend is None or call.backend.withdraw(call)

    def stop(self, future: Future[Any], grace: float | None) -> bool:
        call = self._app_executor.in_flight.get(future)
        return call is not None and self._app_executor.stopping.stop(call, future, grace)

    def deliver(self, future: Future[Any], message: JobMessage) -> bool:
        call = self._app_executor.in_flight.get(future)
        if call is None or call.job.status.ended:
            return False
        (call.backend or self._app_executor.backend).deliver(call, message)
        return True

    def in_contexts(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        app = self._app_executor.app
        if app is None:
            return fn
        context = CapturedContext(app, self._app_executor.config.push_app_context)
        return lambda future: context.run(fn, future)

    # ---- signals ----

    def send(self, signal: NamedSignal, record: Job) -> None:
        """Send a signal in this thread, in an app context. Never raises: a receiver's error is logged."""
        app = self._app_executor.app
        receivers = list(signal.receivers_for(self._executor))
        if receivers and app is not None and current_app_or_none() is not app:  # the job may run in another process
            try:
                with app.app_context():
                    self.send(signal, record)
            except Exception:  # of a receiver of Flask's own signals; the job must be settled all the same
                logger.exception("%s could not be sent for job %s.", signal.name, record.id)
            return
        for receiver in receivers:
            try:
                call_sync(receiver, (self._executor,), {"job": record})
            except Exception:
                logger.exception("A receiver of %s failed for job %s (%s).", signal.name, record.name, record.id)

    def _send_aside(self, signal: NamedSignal, job: JobState) -> None:
        record = job.record()
        self._run_user_code(lambda: self.send(signal, record))

    def _run_user_code(self, fn: Callable[[], object]) -> None:
        """Run user code where it does not block what all jobs depend on, such as the pool's supervisor thread."""
        backend, callbacks = self._app_executor.backend_or_none, get_thread_callbacks()
        if callbacks is not None:
            callbacks.run(fn)
        elif backend is not None:
            backend.run_user_code(fn)
        else:
            fn()
