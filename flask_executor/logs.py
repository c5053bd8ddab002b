"""What this package writes to the log, and where."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from flask_executor.jobs import Job

#: For what concerns no app in particular.
logger = logging.getLogger("flask_executor")


def log_failure(app: Flask | None, job: Job, error: BaseException) -> None:
    """Report a failed job that nobody asked about, with its traceback, to the app's logger."""
    log = logger if app is None else app.logger
    log.error(
        "Job %s (%s) failed and nobody has asked for its result.",
        job.name,
        job.id,
        exc_info=error,
        extra={"job_id": job.id, "job_key": job.key},
    )
