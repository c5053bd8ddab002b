"""Reads the body of a request: a JSON object or a form, of bounded size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import IO, Any, cast

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.wsgi import LimitedStream

from flask_executor.web.problems import abort_with_problem

_MAX_FORM_BYTES = 16 * 1024  # a token and an action
_MAX_DEPTH = 64  # levels; functions that walk through an object by recursion would fail on much deeper ones


def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object; an empty one for no body.

    :param max_bytes: how many bytes are allowed; the app's ``MAX_CONTENT_LENGTH`` may allow less.
    :raises HTTPException: the problem: 400, 413 or 415.
    """
    body = _read(request, max_bytes)
    if not (body or request.content_length):
        return {}
    if not request.is_json:
        abort_with_problem(415, "The arguments must be a JSON object: send it with Content-Type: application/json.")
    if not body:
        abort_with_problem(400, "There is a body, and something in this app has read it before: get_data(cache=False).")
    try:
        found = json.loads(body, parse_constant=_reject_constant, parse_float=_finite_float)
    except (ValueError, RecursionError) as error:
        abort_with_problem(400, f"The body cannot be read as JSON: {str(error)[:200]}.")
    if not isinstance(found, dict):
        abort_with_problem(400, "The body must be a JSON object, with the arguments by name.")
    if _depth(found) > _MAX_DEPTH:
        abort_with_problem(400, f"The body is nested deeper than the {_MAX_DEPTH} levels that are allowed.")
    return found


def read_form(request: Request) -> Mapping[str, str]:
    """Read the form that a button sends.

    :raises HTTPException: the problem: 413.
    """
    _read(request, _MAX_FORM_BYTES)
    try:
        return request.form
    except RequestEntityTooLarge:
        abort_with_problem(413, "The form is larger than this app allows.")


def _read(request: Request, max_bytes: int) -> bytes:
    """The body. It is cached in the request: other code of the app may have read it before, or may read it after."""
    if (request.content_length or 0) > max_bytes:
        abort_with_problem(413, f"The body has {request.content_length} bytes; {max_bytes} are allowed.")
    try:
        # A body may come without a length: reading one byte more than allowed tells that it is too large.
        request.stream = cast(IO[bytes], LimitedStream(request.stream, max_bytes + 1, is_max=True))
        body = request.get_data(cache=True)
    except RequestEntityTooLarge:
        abort_with_problem(413, "The body is larger than this app allows.")
    if len(body) > max_bytes:
        abort_with_problem(413, f"The body has more than the {max_bytes} bytes that are allowed.")
    return body


def _reject_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _finite_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large a number")
    return number


def _depth(value: object) -> int:
    """How many levels of objects and arrays a value has; counted without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
    return depth - 1
