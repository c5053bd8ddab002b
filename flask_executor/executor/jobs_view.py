"""The jobs of an app's executor as pages and commands see them: by their ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flask_executor.abc import JobRecords, WorkerState
from flask_executor.futures import FutureProxy
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.web.events import WaitSlots
from flask_executor.web.status import job_document

if TYPE_CHECKING:
    from flask_executor.executor.app_executor import AppExecutor


class AppJobs:
    """The jobs of one app's executor; implements the port :class:`flask_executor.web.pages.JobsView`."""

    def __init__(self, app_executor: AppExecutor) -> None:
        self._app_executor = app_executor

    @property
    def name(self) -> str:
        """The name of the executor."""
        return self._app_executor.name

    @property
    def records(self) -> JobRecords:
        """The records of the app's jobs."""
        return self._app_executor.tracker.records

    @property
    def waiting_image(self) -> str | None:
        """Url of an image to show while a job runs."""
        return self._app_executor.config.waiting_image

    @property
    def with_errors(self) -> bool:
        """If true, everybody may see what a job has raised."""
        return self._app_executor.config.expose_errors

    @property
    def wait_slots(self) -> WaitSlots:
        """Those of this process for requests that wait."""
        return self._app_executor.wait_slots

    def describe(self, job: Job) -> dict[str, Any]:
        """The status document of a record."""
        return job_document(job, with_error=self.with_errors)

    def document(self, id: str) -> dict[str, Any] | None:
        """The status document of a job; None when there is none."""
        job = self.records.get(id)
        return None if job is None else self.describe(job)

    def handle(self, id: str) -> FutureProxy[Any] | None:
        """The handle of a job, if it is kept somewhere."""
        future = self._app_executor.in_flight.by_id(id)
        if future is not None:
            return future
        job = self.records.get(id)
        return None if job is None else self._app_executor.tracker.handle(job)

    def stop_job(self, id: str) -> bool | None:
        """Ask a job to stop; False when it has ended, None when there is none."""
        future = self.handle(id)
        if future is None:
            return None if self.records.get(id) is None else False
        return future.stop()

    def release_failed_key(self, id: str) -> bool | None:
        """Free the key of a job that has failed, so that it can be started anew; None when there is no such job."""
        job = self.records.get(id)
        if job is None:
            return None
        if job.key is None or not job.status.retryable:
            return False
        return self._app_executor.tracker.futures.release(job.key, id)  # False when another job has the key by now

    def worker_states(self) -> Sequence[WorkerState]:
        """The workers of this process: worker processes; for a backend without any, the process itself."""
        app_executor = self._app_executor
        services = [worker for pool in app_executor.services.started() for worker in pool.worker_states()]
        backend = app_executor.backend_or_none
        workers = () if backend is None else backend.worker_states()
        if workers or app_executor.remote:
            return [*workers, *services]
        running = [each.job_id for each in app_executor.in_flight.futures() if each.status is JobStatus.RUNNING]
        job = running[0] if len(running) == 1 else None
        return [WorkerState(pid=os.getpid(), busy=bool(running), job=job), *services]
