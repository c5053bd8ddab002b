"""The JSON object in the body of a request, with bounds for what somebody may send."""

from __future__ import annotations

import json
from typing import IO, Any, cast

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.wsgi import LimitedStream

from flask_executor.problems import refuse

_DEEPEST = 64  # levels: what is nested much deeper breaks whoever goes through it


def read_object(request: Request, most: int) -> dict[str, Any]:
    """The object; an empty one for no body.

    :param most: bytes that are allowed; the app's ``MAX_CONTENT_LENGTH`` may allow less.
    :raises HTTPException: the problem: 400, 413 or 415.
    """
    body = _read(request, most)
    if not body:
        return {}
    if not request.is_json:
        refuse(415, "The arguments must be a JSON object: send it with Content-Type: application/json.")
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        refuse(400, f"The body cannot be read as JSON: {str(error)[:200]}.")
    if not isinstance(found, dict):
        refuse(400, "The body must be a JSON object, with the arguments by name.")
    if _depth(found) > _DEEPEST:
        refuse(400, f"The body is nested deeper than the {_DEEPEST} levels that are allowed.")
    return found


def _read(request: Request, most: int) -> bytes:
    """The body, which stays there to be read by others, and may have been read by others."""
    if (request.content_length or 0) > most:
        refuse(413, f"The body has {request.content_length} bytes; {most} are allowed.")
    try:
        if request.content_length is None:  # it ends where it ends: one byte too many is enough to know
            request.stream = cast(IO[bytes], LimitedStream(request.stream, most + 1, is_max=True))
        body = request.get_data(cache=True)
    except RequestEntityTooLarge:
        refuse(413, "The body is larger than this app allows.")
    if len(body) > most:
        refuse(413, f"The body has more than the {most} bytes that are allowed.")
    return body


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


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
