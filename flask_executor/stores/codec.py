"""Keys and records as text, for stores that keep text."""

from __future__ import annotations

import ast
import json
from collections.abc import Hashable
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from flask_executor.helpers import safe_repr
from flask_executor.jobs.model import RESERVED_PREFIX, Job, JobStatus, LogLine


def is_internal_key(key: Hashable) -> bool:
    """Whether this package has made the key for itself, as for a step of a flow."""
    return isinstance(key, tuple) and bool(key) and isinstance(key[0], str) and key[0].startswith(RESERVED_PREFIX)


def encode_key(key: Hashable) -> str:
    """A key as text, different for different keys, and never empty.

    A string is what it is (unless it is empty, begins with ``=`` or cannot be encoded), anything else is ``=`` and its
    literal.

    :raises TypeError: for a key that is no string, number, bytes, or tuple of such.
    """
    if isinstance(key, str):  # of whatever class: it is equal to the string
        key = str.__str__(key)
        if key and not key.startswith("=") and _can_be_encoded(key):
            return key
    text = ""
    try:
        text = ascii(key)
        same = ast.literal_eval(text) == key
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        same = False
    if not same:
        raise TypeError(
            f"the key {safe_repr(key)} cannot be stored: with a shared EXECUTOR_STORE a key is a string, a number, "
            f"bytes, or a tuple of such; use str(key)"
        )
    return f"={text}"


def _can_be_encoded(text: str) -> bool:
    """Whether it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def decode_key(text: str) -> Any:
    """The key that :func:`encode_key` made ``text`` of."""
    return ast.literal_eval(text[1:]) if text.startswith("=") else text


def encode_prefix(within: tuple[Hashable, ...]) -> str:
    """What the text of every key begins with that is a longer tuple and begins with the elements of ``within``."""
    return encode_key((*within, 0))[:-2]


def replace_surrogates(text: str | None) -> str | None:
    """``text`` without lone surrogates, which UTF-8 cannot encode; names of files may have them."""
    return text if text is None or text.isascii() else text.encode("utf-8", "replace").decode()


def encode_meta(job: Job) -> str | None:
    """The meta of a job as JSON, with the ``repr`` of values that JSON does not have."""
    if not job.meta:
        return None
    return json.dumps({name: jsonable(value) for name, value in job.meta.items()})


def jsonable(value: object) -> Any:
    """A value as it comes back from JSON; its ``repr`` if JSON does not have it."""
    if value is None or type(value) in (str, bool):
        return value
    try:
        return json.loads(json.dumps(value, default=safe_repr, allow_nan=False))
    except Exception:  # it contains itself, is not a number, has keys that are no text, or methods that raise
        return safe_repr(value)


def decode_meta(text: str | None) -> MappingProxyType[str, Any]:
    """The meta that :func:`encode_meta` made ``text`` of."""
    try:
        return MappingProxyType({} if text is None else json.loads(text))
    except RecursionError:  # the stack is deeper here than where it was written
        return MappingProxyType({})


def encode_job(job: Job, **more: Any) -> str:
    """A record as JSON, with further fields at its end."""
    fields = {name: getattr(job, name) for name in job.__dataclass_fields__}
    fields["key"] = None if job.key is None else encode_key(job.key)
    fields["meta"] = encode_meta(job)
    return json.dumps({**fields, **more})


def decode_job(text: str | bytes) -> tuple[Job, dict[str, Any]]:
    """The record that :func:`encode_job` made ``text`` of, and the further fields."""
    fields = json.loads(text)
    more = {name: fields.pop(name) for name in fields.keys() - Job.__dataclass_fields__.keys()}
    fields["key"] = None if fields["key"] is None else decode_key(fields["key"])
    fields["status"] = JobStatus(fields["status"])
    fields["meta"] = decode_meta(fields["meta"])
    return Job(**fields), more


def encode_line(line: LogLine) -> str:
    """A line of a log as JSON."""
    return json.dumps(asdict(line))


def decode_line(text: str | bytes) -> LogLine:
    """The line that :func:`encode_line` made ``text`` of."""
    return LogLine(**json.loads(text))
