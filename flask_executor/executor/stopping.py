"""Stopping running jobs: ask first, and use force when the grace period is over.

.. code-block:: text

    future.stop()           ─┐
    timeout of the job       ├─> request: the job leaves at its next checkpoint ── grace seconds ──> force, where the
    the process is ending   ─┘                                                                       backend has any

A job that has not started is cancelled instead; that is :meth:`FutureProxy.cancel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from flask_executor.helpers.log import logger
from flask_executor.jobs.call import Call
from flask_executor.jobs.model import JobStatus

if TYPE_CHECKING:
    from flask_executor.executor.app_executor import AppExecutor

_FORCE_TIMEOUT = 1.0  # seconds that a leaving process waits for jobs that it has forced to end


class Stopping:
    """Stops the calls of one app's executor. May be called from any thread."""

    def __init__(self, app_executor: AppExecutor) -> None:
        self._app_executor = app_executor

    def stop(self, call: Call, future: Future[Any], grace: float | None) -> bool:
        """Cancel the call if it has not started, stop it if it runs.

        :param grace: seconds until force is used; None for the call's own or ``EXECUTOR_STOP_GRACE``.
        :return: False when it has ended.
        """
        while not call.job.status.ended:
            if future.cancel():
                return True
            attempt = call.job.attempt
            if self._request(call, attempt, JobStatus.STOPPED):
                self._force_after(self._grace(call) if grace is None else grace, call, attempt)
                return True
            # It has just started, or this attempt has just ended: look again.
        return False

    def time_out(self, call: Call, attempt: int) -> None:
        """This attempt of the call has run for as long as it may. Called in the timer's thread."""
        if self._request(call, attempt, JobStatus.TIMED_OUT):
            self._force_after(self._grace(call), call, attempt)

    def cut_off(self) -> None:
        """The process is ending, and its jobs have had their time: cancel, stop and force what is left."""
        in_flight, config = self._app_executor.in_flight, self._app_executor.config
        left = [future for future in in_flight.futures() if not future.done()]
        logger.warning(
            "The process ends and %s did not end within %s (%g s): stopping.",
            describe_jobs(left),
            config.key("EXECUTOR_SHUTDOWN_TIMEOUT"),
            config.shutdown_timeout,
        )
        running = [future for future in left if not future.cancel()]
        calls = [call for call in map(in_flight.get, running) if call is not None]
        for call in calls:
            self._request(call, call.job.attempt, JobStatus.STOPPED)
        # Without the timer: Python 3.12 starts no threads while the interpreter ends.
        if in_flight.wait(config.stop_grace):
            return
        for call in calls:
            self._force(call, call.job.attempt)
        if not in_flight.wait(_FORCE_TIMEOUT):
            left = [future for future in left if not future.done()]
            logger.warning("The process ends and %s did not stop: cut off.", describe_jobs(left))

    def _grace(self, call: Call) -> float:
        return self._app_executor.config.stop_grace if call.grace is None else call.grace

    def _request(self, call: Call, attempt: int, reason: JobStatus) -> bool:
        """Ask a running job to leave; False when this attempt does not run any more."""
        future = getattr(call, "future", None)  # a call that has failed lets go of it
        if future is None or call.backend is None or not future.request_stop(reason, attempt):
            return False
        self._app_executor.tracker.changed(call.job)
        call.backend.request_stop(call, attempt, reason)
        return True

    def _force_after(self, grace: float, call: Call, attempt: int) -> None:
        if grace:
            call.call_later(grace, lambda: self._force(call, attempt))
        else:
            self._force(call, attempt)

    def _force(self, call: Call, attempt: int) -> None:
        if call.job.status is JobStatus.RUNNING and call.job.attempt == attempt and call.backend is not None:
            call.backend.kill(call, attempt)


def describe_jobs(futures: Sequence[Any]) -> str:
    """Some jobs in words: ``3 jobs (render, render, mail)``."""
    names = [future.name for future in futures[:5]] + ["..."] * (len(futures) > 5)
    return f"{len(futures)} {'job' if len(futures) == 1 else 'jobs'} ({', '.join(names)})"
