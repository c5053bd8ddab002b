"""The status document: a job as JSON, for HTTP and for ``flask executor ... --json``."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from flask_executor.helpers import safe_repr
from flask_executor.jobs.model import RESERVED_PREFIX, Job, JobStatus, LogLine
from flask_executor.stores.codec import is_internal_key, jsonable, replace_surrogates

# Where a traceback begins in a message that the app has formatted itself, with traceback.format_exc() for example.
_TRACE = re.compile(r"(?:(?:Exception Group )?Traceback|Stack) \(most recent call last\):")
# A chained exception that was never raised has no traceback: its text comes before the one of the next exception.
_CHAIN = re.compile(r"\n(?:The above exception was the direct cause|During handling of the above exception)")


def timestamp(seconds: float | None) -> str | None:
    """Seconds since the epoch as RFC 3339, in UTC and with milliseconds."""
    if seconds is None:
        return None
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def key_text(key: Hashable | None) -> str | None:
    """A key as text for people; None for no key, and for a key that this package has made."""
    if key is None or is_internal_key(key):
        return None
    return replace_surrogates(key if isinstance(key, str) else safe_repr(key))


def elapsed_seconds(job: Job) -> float | None:
    """Seconds that a job has run so far, or ran in all; None if it has not started."""
    if job.started_at is None:
        return None
    return max(0.0, (time.time() if job.ended_at is None else job.ended_at) - job.started_at)


def _elapsed(job: Job) -> float | None:
    seconds = elapsed_seconds(job)
    return None if seconds is None else round(seconds, 1)


def _remaining(job: Job) -> float | None:
    """Seconds until the job ends at its present speed; None while that cannot be estimated."""
    elapsed = elapsed_seconds(job)
    if job.status is not JobStatus.RUNNING or elapsed is None or elapsed < 1 or not job.progress:
        return None
    return round(elapsed * (1 - job.progress) / job.progress, 1)


def _public_meta(job: Job) -> dict[str, Any]:
    return {name: jsonable(value) for name, value in job.meta.items() if not name.startswith(RESERVED_PREFIX)}


# ---- the fields ----


@dataclass(frozen=True, slots=True)
class Field:
    """One field of the status document."""

    #: Reads it from a record.
    read: Callable[[Job], Any]
    #: Its JSON schema.
    schema: Mapping[str, Any]
    #: If true, it changes by the mere passing of time, which makes no new version of the document.
    is_clock: bool = False


_BOOLEAN = {"type": "boolean"}
_TEXT = {"type": ["string", "null"]}
_TIME = {**_TEXT, "format": "date-time"}
_SECONDS = {"type": ["number", "null"], "minimum": 0}

#: All fields, in their order. The document and its schema in OpenAPI are both made from this table.
FIELDS: Mapping[str, Field] = {
    "id": Field(lambda job: job.id, {"type": "string", "pattern": "^[0-9a-f]{24}$"}),
    "name": Field(lambda job: replace_surrogates(job.name), {"type": "string"}),
    "key": Field(lambda job: key_text(job.key), _TEXT),
    "status": Field(lambda job: job.status.value, {"enum": [status.value for status in JobStatus]}),
    "ended": Field(lambda job: job.status.ended, {**_BOOLEAN, "description": "this status is final"}),
    "failed": Field(lambda job: job.status.failed, {**_BOOLEAN, "description": "something went wrong"}),
    "retryable": Field(
        lambda job: job.status.retryable, {**_BOOLEAN, "description": "it has ended without success: run it again"}
    ),
    "progress": Field(lambda job: job.progress, {"type": ["number", "null"], "minimum": 0, "maximum": 1}),
    "message": Field(lambda job: replace_surrogates(job.message), _TEXT),
    "meta": Field(_public_meta, {"type": "object"}),
    "attempt": Field(lambda job: job.attempt, {"type": "integer", "minimum": 1}),
    "stop_requested": Field(lambda job: job.stop_requested, _BOOLEAN),
    "queued_at": Field(lambda job: timestamp(job.queued_at), {"type": "string", "format": "date-time"}),
    "started_at": Field(lambda job: timestamp(job.started_at), _TIME),
    "ended_at": Field(lambda job: timestamp(job.ended_at), _TIME),
    "elapsed": Field(_elapsed, {**_SECONDS, "description": "seconds that it has run so far, or in all"}, is_clock=True),
    "remaining": Field(_remaining, {**_SECONDS, "description": "seconds, an estimate"}, is_clock=True),
    "error": Field(
        lambda job: replace_surrogates(job.error),
        {**_TEXT, "description": "type and message of the exception, where the reader may see them"},
    ),
}


def job_document(job: Job, *, with_error: bool = False) -> dict[str, Any]:
    """The status document of a job: times are RFC 3339, durations seconds.

    :param with_error: If true, ``error`` has type and message of the exception, else it is None.
    """
    document = {name: field.read(job) for name, field in FIELDS.items()}
    return document if with_error else {**document, "error": None}


def job_schema() -> dict[str, Any]:
    """The JSON schema of a status document as the controller sends it."""
    extra = {
        "owner": {**_TEXT, "description": "in lists"},
        "started_with": {**_TEXT, "description": "in lists: what it was started with over HTTP, as JSON"},
        "links": {"type": "object", "additionalProperties": {"type": "string"}},
    }
    properties = {**{name: field.schema for name, field in FIELDS.items()}, **extra}
    return {"type": "object", "properties": properties, "required": [*FIELDS, "links"]}


def document_version(document: Mapping[str, Any]) -> str:
    """A short text that changes whenever the document does, apart from the fields that are clocks."""
    lasting = {name: value for name, value in document.items() if not (name in FIELDS and FIELDS[name].is_clock)}
    text = json.dumps(lasting, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=9).hexdigest()


# ---- log lines ----


def log_document(line: LogLine, *, with_error: bool = False) -> dict[str, str | None]:
    """A line of a job's log.

    :param with_error: If true, its text includes exceptions and tracebacks.
    """
    text = line.full_text if with_error else _without_trace(line.text)
    return {"time": timestamp(line.time), "level": line.level, "logger": line.logger, "text": replace_surrogates(text)}


def _without_trace(text: str) -> str:
    message, *trace = _TRACE.split(text, maxsplit=1)
    if _CHAIN.search(message):
        return ""
    return message.rstrip("\n |+") if trace else text
