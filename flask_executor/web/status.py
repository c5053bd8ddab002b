"""A job as JSON has it, for those who watch it over HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Hashable, Mapping
from datetime import datetime, timezone
from typing import Any

from flask_executor.helpers import safe_repr
from flask_executor.jobs.model import RESERVED_PREFIX, Job, JobStatus, LogLine
from flask_executor.stores.codec import is_internal_key, jsonable, replace_surrogates

# What an app has written into its message by itself, as with traceback.format_exc(). Of exceptions in a chain one that
# was never raised has no traceback, and comes before the others.
_TRACE = re.compile(r"(?:(?:Exception Group )?Traceback|Stack) \(most recent call last\):")
_CHAIN = re.compile(r"\n(?:The above exception was the direct cause|During handling of the above exception)")
_CHANGES_BY_ITSELF = ("elapsed", "remaining")


def job_document(job: Job, *, with_error: bool = False, links: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The status document of a job.

    Times are RFC 3339, durations seconds.

    :param with_error: whether type and message of its exception are to be told.
    :param links: urls of what belongs to it, by name.
    """
    elapsed = elapsed_seconds(job)
    document: dict[str, Any] = {
        "id": job.id,
        "name": replace_surrogates(job.name),
        "key": key_text(job.key),
        "status": job.status.value,
        "ended": job.status.ended,
        "progress": job.progress,
        "message": replace_surrogates(job.message),
        "meta": {name: jsonable(value) for name, value in job.meta.items() if not name.startswith(RESERVED_PREFIX)},
        "attempt": job.attempt,
        "stop_requested": job.stop_requested,
        "queued_at": _timestamp(job.queued_at),
        "started_at": _timestamp(job.started_at),
        "ended_at": _timestamp(job.ended_at),
        "elapsed": None if elapsed is None else round(elapsed, 1),
        "remaining": _remaining(job, elapsed),
        "error": replace_surrogates(job.error) if with_error else None,
    }
    return document if links is None else {**document, "links": dict(links)}


def key_text(key: Hashable | None) -> str | None:
    """A key as people may see it; None for one that is none of theirs."""
    if key is None or is_internal_key(key):
        return None
    return replace_surrogates(key if isinstance(key, str) else safe_repr(key))


def log_document(line: LogLine, *, with_error: bool = False) -> dict[str, str | None]:
    """A line of a job's log.

    :param with_error: whether with exceptions and tracebacks, where it has some.
    """
    text = line.full_text if with_error else _without_trace(line.text)
    return {"time": _timestamp(line.time), "level": line.level, "logger": line.logger, "text": replace_surrogates(text)}


def _without_trace(text: str) -> str:
    message, *trace = _TRACE.split(text, maxsplit=1)
    if _CHAIN.search(message):
        return ""
    return message.rstrip("\n |+") if trace else text


def version(document: Mapping[str, Any]) -> str:
    """A short text that changes when the document does, but for what passes by itself: the time."""
    lasting = {name: value for name, value in document.items() if name not in _CHANGES_BY_ITSELF}
    text = json.dumps(lasting, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=9).hexdigest()


def elapsed_seconds(job: Job) -> float | None:
    """How long a job has run by now, or in all; None for one that has not begun."""
    if job.started_at is None:
        return None
    return max(0.0, (time.time() if job.ended_at is None else job.ended_at) - job.started_at)


def _remaining(job: Job, elapsed: float | None) -> float | None:
    """Seconds until the job will have ended, if it goes on like this; None while nothing can be said."""
    if job.status is not JobStatus.RUNNING or elapsed is None or elapsed < 1 or not job.progress:
        return None
    return round(elapsed * (1 - job.progress) / job.progress, 1)


def _timestamp(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
