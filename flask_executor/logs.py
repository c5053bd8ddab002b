"""What this package writes to the log, and where."""

from __future__ import annotations

import logging
from collections.abc import Hashable

from flask import Flask

#: For what concerns no app in particular.
logger = logging.getLogger("flask_executor")


def log_failure(app: Flask | None, name: str, id: str, key: Hashable | None, error: BaseException) -> None:
    """Report a failed job that nobody asked about, with its traceback, to the app's logger.

    :param app: the app; without one the package's own logger is used.
    :param name: what the job is called.
    :param id: its id, in the record as ``job_id``.
    :param key: its key, in the record as ``job_key``.
    :param error: the exception that ended it.
    """
    log = logger if app is None else app.logger
    log.error(
        "Job %s (%s) failed and nobody has asked for its result.",
        name,
        id,
        exc_info=error,
        extra={"job_id": id, "job_key": key},
    )
