"""What this package writes to the log, and what jobs write to it.

Every record has the attributes ``job_id`` and ``job_key``, in threads and in worker processes (None outside of jobs),
so a format may use ``%(job_id)s``; and a job keeps its own last records.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from flask import Flask

from flask_executor.helpers.log import logger
from flask_executor.jobs.model import LogLine

if TYPE_CHECKING:
    from flask_executor.jobs.current import RunningJob

_FIELDS = ("job_id", "job_key")


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


class _JobRecordMixin:
    """Mixed into the class of each record: gives it ``job_id`` and ``job_key`` when they are asked for.

    .. code-block:: python

        logging.basicConfig(format="%(job_id)s %(message)s")
        log.info("page %d", 4)                      # 5f0c... page 4
        log.info("started", extra={"job_id": 5})    # 5 started: what the app sets itself has precedence

    Were the fields set when the record is made, the second call would raise a :exc:`KeyError`: :mod:`logging` refuses
    to overwrite what is there.
    """

    _job: tuple[str | None, Hashable | None]

    def __getattr__(self, name: str) -> Any:
        if name in _FIELDS:
            return self._job[_FIELDS.index(name)]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def getMessage(self) -> str:  # noqa: N802  # what every formatter calls before it looks at the fields
        for name, value in zip(_FIELDS, self._job, strict=True):
            self.__dict__.setdefault(name, value)
        return super().getMessage()  # type: ignore[misc, no-any-return]

    def __reduce_ex__(self, _protocol: Any) -> Any:  # copied and pickled as what it was
        base = type(self).__mro__[2]
        return _rebuild, (base, {**self.__dict__, **dict(zip(_FIELDS, self._job, strict=True))})


def _rebuild(base: type, state: dict[str, Any]) -> Any:
    record: Any = object.__new__(_with_fields(base))
    record.__dict__.update(state)
    return record


@functools.cache
def _with_fields(base: Any) -> Any:
    return type(base.__name__, (_JobRecordMixin, base), {"__module__": base.__module__})


class _Factory:
    """Makes log records in the way it was done before, and notes which job they belong to."""

    def __init__(self, make: Callable[..., logging.LogRecord], running_job: Callable[[], RunningJob | None]) -> None:
        self._make = make
        self._running_job = running_job

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        job = self._running_job()
        if not isinstance(record, _JobRecordMixin):
            made: Any = type(record)
            record.__class__ = _with_fields(made)
        record._job = (None, None) if job is None else (job.id, job.key)
        if job is not None:
            job.logged(record)
        return record


def install_record_factory(running_job: Callable[[], RunningJob | None]) -> None:
    """From now on log records know the job that they are made in.

    :param running_job: gives the job that the calling code runs in.
    """
    make = logging.getLogRecordFactory()
    if not isinstance(make, _Factory):
        logging.setLogRecordFactory(_Factory(make, running_job))


_formatter = logging.Formatter()


def to_log_line(record: logging.LogRecord) -> LogLine:
    """A record as a job keeps it. Never raises."""
    try:
        text = logging.LogRecord.getMessage(record)  # not our own, see _JobRecordMixin
    except Exception:  # arguments that do not fit the format: logging itself complains of that
        text = str(record.msg)
    trace = record.exc_text
    if record.exc_info and not trace:
        trace = _formatter.formatException(record.exc_info)
    trace = "\n".join(part for part in (trace, record.stack_info) if part)
    return LogLine(time=record.created, level=record.levelname, logger=record.name, text=text, trace=trace or None)
