"""The sending end of an engine: packs and signs calls, sends them, and keeps their handles.

From then on the job belongs to the engine, and its handle reads the store. The receiving end is
:mod:`flask_executor.executor.consumer`.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flask_executor.abc import Health
from flask_executor.exceptions import ConfigError, EngineUnavailable, QueueFull, ResultExpired, StoreUnavailable
from flask_executor.executor.engine_message import pack_engine_message
from flask_executor.futures import FutureProxy
from flask_executor.helpers import signing_keys, weak_callback
from flask_executor.helpers.log import logger
from flask_executor.jobs.call import Call, CallState
from flask_executor.jobs.model import Job, JobOptions, JobState, JobStatus
from flask_executor.tracking.engine_handover import EngineHandover
from flask_executor.tracking.shared import SharedJobTracker
from flask_executor.tracking.signing import CALL, PayloadSigner

if TYPE_CHECKING:
    from flask import Flask

    from flask_executor.executor.app_executor import AppExecutor

_ENGINE_RETRY_DELAY = 0.8  # seconds for which an engine that was away is not asked again by the next commit


class Producer:
    """Makes and sends the calls for an engine, and knows their handles. May be called from any thread."""

    def __init__(self, app_executor: AppExecutor, tracker: SharedJobTracker, handover: EngineHandover) -> None:
        self._app_executor = app_executor
        self._tracker = tracker
        self._handover = handover
        handover.remove_queued = weak_callback(self._remove_queued)
        self.after_fork()

    def after_fork(self) -> None:
        """In the child of a fork: the jobs are the parent's."""
        self._sent: weakref.WeakSet[Any] = weakref.WeakSet()  # handles of jobs that the engine has, or is to have
        self._away = 0.0  # until when the engine is not asked again (monotonic)
        self._outage: EngineUnavailable | None = None

    def prepare(
        self,
        job: JobState,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Any,
        options: JobOptions,
    ) -> Call:
        """A call for the engine, packed; its handle reads the store.

        :raises QueueFull: if too many jobs wait.
        :raises NotPicklable: for what cannot be sent.
        :raises ConfigError: without a secret key.
        """
        self._check_room()
        options = replace(options, grace=self._app_executor.config.stop_grace)  # the worker's may be another
        handle = self._tracker.handle(job.record(), is_written=False)
        call = Call(handle, job, fn, args, kwargs, context, self._app_executor.channel, options)
        signer = call_signer(self._app_executor.app)
        call.packed = pack_engine_message(call, self._app_executor.destination, self._tracker.holder, signer)
        self._sent.add(handle)
        return call

    def _check_room(self) -> None:
        pending = self._app_executor.config.max_pending
        if pending is not None and self._app_executor.backend.waiting >= pending:
            raise QueueFull(self._app_executor.config.key("EXECUTOR_MAX_PENDING"), pending)

    def hold(self, call: Call) -> None:
        """The call is to wait in this process for a while."""
        self._handover.hold_locally(call.job)
        self._sent.discard(call.future)

    def send_held(self, call: Call) -> None:
        """Have the engine take a call that was held, unless it was cancelled.

        :raises EngineUnavailable: for a while after an outage, without asking the engine, so that commits do not
            each wait.
        """
        if not self._handover.is_held(call.job.id):
            return
        was = self._outage
        if was is not None and time.monotonic() < self._away:
            raise EngineUnavailable(was.what, was.url, was.key, was.why)
        self._sent.add(call.future)
        try:
            self.send(call)
        except EngineUnavailable as error:
            self._sent.discard(call.future)
            self._outage, self._away = error.with_traceback(None), time.monotonic() + _ENGINE_RETRY_DELAY
            raise

    def send(self, call: Call) -> None:
        """Have the engine take a call."""
        call.enter(CallState.QUEUED)
        with self._handover.transferring(call.job):
            self._app_executor.backend.enqueue(call)

    def owns(self, future: FutureProxy[Any]) -> bool:
        """Return whether this is the handle of a call for the engine."""
        return future in self._sent

    def discard_refused(self, future: FutureProxy[Any]) -> bool:
        """The engine has not taken the call of this handle; False if it is none of an engine's."""
        if future not in self._sent:
            return False
        self._sent.discard(future)
        future.cancel_unaccepted()  # type: ignore[attr-defined]
        return True

    def _remove_queued(self, job: Job) -> None:
        try:
            self._app_executor.backend.remove_queued(job)
        except EngineUnavailable as error:  # then it is dropped by the worker that gets it
            logger.info("Job %s (%s) was cancelled, and stays in the queue: %s", job.name, job.id, error)

    # ---- the handles ----

    def unfinished(self) -> list[FutureProxy[Any]]:
        """The handles of this process whose jobs have not ended, oldest first."""
        left = [future for future in list(self._sent) if not _has_ended(future)]
        return sorted(left, key=lambda future: future.last_seen.queued_at)

    def wait(self, timeout: float | None) -> bool:
        """Wait until all jobs have ended and their callbacks have run.

        :param timeout: most seconds to wait; None for as long as it takes.
        :return: whether that is so.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        sent = list(self._sent)
        if wait(sent, timeout).not_done:
            return False
        for future in sent:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not future.wait_for_callbacks(left):
                return False
        return True

    def check_workers(self) -> None:
        """Log a warning if there are jobs to wait for, and no worker that would run them."""
        if all(_has_ended(future) for future in list(self._sent)):
            return
        try:
            if self._app_executor.backend.workers:
                return
            why = "No worker looks at the queue; start one with 'flask executor worker'."
        except EngineUnavailable as error:
            why = f"{error}."
        logger.warning("shutdown() waits for jobs. %s With shutdown(wait=False) they go on without this process.", why)

    def cancel_all(self) -> None:
        """Cancel what has not started."""
        for future in list(self._sent):
            try:
                future.cancel()
            except StoreUnavailable as error:
                logger.warning("Job %s goes on: it cannot be cancelled. %s", future.job_id, error)

    def health(self, health: Health) -> Health:
        """Return ``health`` completed with what the engine reports about its workers and the store about its jobs."""
        try:
            health = replace(
                health, workers=self._app_executor.backend.workers, waiting=self._app_executor.backend.waiting
            )
        except EngineUnavailable as error:
            logger.info("%s", error)
            return replace(health, accepting=False)
        if not health.store_reachable:
            return health
        queued = self._tracker.records.list(status=JobStatus.QUEUED) if health.waiting else ()
        busy = len(self._tracker.records.list(status=JobStatus.RUNNING))
        return replace(health, busy=busy, oldest_wait=oldest_wait(queued))


def _has_ended(future: Any) -> bool:
    try:
        return bool(future.done())
    except ResultExpired:
        return True
    except StoreUnavailable:  # nobody knows
        return False


def oldest_wait(jobs: Sequence[Job]) -> float:
    """Seconds that the oldest of these has waited; 0.0 for none."""
    return max((time.time() - job.queued_at for job in jobs), default=0.0)


def call_signer(app: Flask | None) -> PayloadSigner:
    """Return what signs and checks calls that are sent to an engine.

    :raises ConfigError: without a secret key.
    """
    keys = signing_keys(app)
    if not keys:
        raise ConfigError("SECRET_KEY", None, "set, and the same for all workers: they run only what is signed")
    return PayloadSigner(keys, CALL)
