"""What is in the body of a request, with bounds for what somebody may send."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import IO, Any, cast

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.wsgi import LimitedStream

from flask_executor.web.problems import refuse

_MOST_OF_A_FORM = 16 * 1024  # bytes: a token and an action
_DEEPEST = 64  # levels: what is nested much deeper breaks whoever goes through it


def read_object(request: Request, most: int) -> dict[str, Any]:
    """The object; an empty one for no body.

    :param most: bytes that are allowed; the app's ``MAX_CONTENT_LENGTH`` may allow less.
    :raises HTTPException: the problem: 400, 413 or 415.
    """
    body = _read(request, most)
    if not (body or request.content_length):
        return {}
    if not request.is_json:
        refuse(415, "The arguments must be a JSON object: send it with Content-Type: application/json.")
    if not body:
        refuse(400, "There is a body, and something in this app has read it before, with get_data(cache=False) say.")
    try:
        found = json.loads(body, parse_constant=_no_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        refuse(400, f"The body cannot be read as JSON: {str(error)[:200]}.")
    if not isinstance(found, dict):
        refuse(400, "The body must be a JSON object, with the arguments by name.")
    if _depth(found) > _DEEPEST:
        refuse(400, f"The body is nested deeper than the {_DEEPEST} levels that are allowed.")
    return found


def read_form(request: Request) -> Mapping[str, str]:
    """The form that a button sends.

    :raises HTTPException: the problem: 413.
    """
    _read(request, _MOST_OF_A_FORM)
    try:
        return request.form
    except RequestEntityTooLarge:
        refuse(413, "The form is larger than this app allows.")


def _read(request: Request, most: int) -> bytes:
    """The body, which stays there to be read by others, and may have been read by others."""
    if (request.content_length or 0) > most:
        refuse(413, f"The body has {request.content_length} bytes; {most} are allowed.")
    try:
        # Not every body has a length: one byte too many is enough to know.
        request.stream = cast(IO[bytes], LimitedStream(request.stream, most + 1, is_max=True))
        body = request.get_data(cache=True)
    except RequestEntityTooLarge:
        refuse(413, "The body is larger than this app allows.")
    if len(body) > most:
        refuse(413, f"The body has more than the {most} bytes that are allowed.")
    return body


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large a number")
    return number


def _depth(value: object) -> int:
    """How many levels a value has, without going down by recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
    return depth - 1
