"""The options of a job, checked where they are given."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, TypedDict

from flask_executor.exceptions import NotPicklable
from flask_executor.jobs.model import JobOptions
from flask_executor.jobs.retry import Retry

Errors = type[Exception] | tuple[type[Exception], ...]


class OptionValues(TypedDict, total=False):
    """The options of one job; :meth:`Executor.options` says what each means."""

    name: str | None
    key: Hashable | None
    owner: str | None
    timeout: float | None
    retries: int | None
    backoff: float | None
    retry_on: Errors | None
    no_retry_on: Errors | None
    priority: int | None
    again: bool | None
    meta: Mapping[str, Any] | None


def job_options(
    base: JobOptions,
    *,
    retries: int | None = None,
    backoff: float | None = None,
    retry_on: Errors | None = None,
    no_retry_on: Errors | None = None,
    **given: Any,
) -> JobOptions:
    """``base``, with what is given in its place.

    :raises ValueError: for a number that cannot be used.
    :raises TypeError: for an option that there is not.
    """
    unknown = given.keys() - OptionValues.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option: {', '.join(unknown)}; there are {', '.join(OptionValues.__annotations__)}")
    timeout, priority = given.get("timeout"), given.get("priority")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout is {timeout!r}; it must be a number of seconds greater than 0, or math.inf")
    if priority is not None and not isinstance(priority, int):
        raise ValueError(f"priority is {priority!r}; it must be a whole number")
    for text in ("name", "owner"):  # an owner is often a number in a database
        if given.get(text) is not None:
            given[text] = str(given[text])
    meta = given.get("meta")
    if meta is not None:
        if not all(isinstance(name, str) for name in meta):
            raise ValueError(f"the names in meta must be strings: {', '.join(map(repr, meta))}")
        given["meta"] = {**(base.meta or {}), **meta}
    retry: dict[str, Any] = {"retries": retries, "backoff": backoff}
    for name, errors in (("retry_on", retry_on), ("no_retry_on", no_retry_on)):
        retry[name] = (errors,) if isinstance(errors, type) else errors
    retry = {name: value for name, value in retry.items() if value is not None}
    if retry:
        if base.retry is None and "retries" not in retry:
            raise ValueError(f"{', '.join(retry)} without retries: say how often the job may be run again, at most")
        given["retry"] = Retry(**retry) if base.retry is None else replace(base.retry, **retry)
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def delayed(options: JobOptions, seconds: float) -> JobOptions:
    if not (isinstance(seconds, (int, float)) and 0 <= seconds < math.inf):
        raise ValueError(f"seconds is {seconds!r}; it must be a number, 0 or more: submit_later(60, fn, ...)")
    return replace(options, delay=float(seconds))


def check_callable(fn: Any) -> None:
    if not callable(fn):
        raise TypeError(f"a job needs a function to call, not {fn!r}; its arguments follow: submit(fn, 1, 2)")


def check_importable(fn: Any) -> None:
    name = getattr(fn, "__qualname__", "")
    if "<" in name:  # <locals> or <lambda>
        raise NotPicklable(
            f"Can't decorate {name}: worker processes import a job's function by its name, which needs a function "
            "defined with def at the top of a module. Move it there, or use EXECUTOR_TYPE 'thread'."
        )


def checked_key(key: Hashable) -> Hashable:
    if key is None:
        raise ValueError("the future_key is None, which stands for no key; use a string")
    hash(key)  # raises the TypeError that a dict would, before anything is started
    return key
