"""Answers without content: errors, as `RFC 9457 <https://www.rfc-editor.org/rfc/rfc9457>`_ has them, and the 204."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NoReturn

from flask import Response, abort

from flask_executor.exceptions import StoreUnavailable

MIMETYPE = "application/problem+json"


def problem(status: int, detail: str, *, headers: dict[str, str] | None = None, **more: Any) -> Response:
    """An answer that says what is wrong, and what to do.

    :param status: the HTTP status.
    :param more: further members of the document.
    """
    members = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    answer = Response(json.dumps(members), status, mimetype=MIMETYPE)
    answer.headers["Cache-Control"] = "no-store"
    answer.headers.update(headers or {})
    return answer


def nothing(headers: dict[str, str] | None = None) -> Response:
    """The answer 204: all is well, and there is nothing to say."""
    answer = Response(status=204, headers=headers)
    del answer.headers["Content-Type"]
    return answer


def refuse(status: int, detail: str, *, headers: dict[str, str] | None = None, **more: Any) -> NoReturn:
    """Leave the view with a :func:`problem`, which no error handler of the app takes for one of its own."""
    abort(problem(status, detail, headers=headers, **more))


@contextmanager
def store_or_problem() -> Iterator[None]:
    """Leave the view with a 503 where the jobs cannot be reached.

    :raises HTTPException: the problem.
    """
    try:
        yield
    except StoreUnavailable:
        refuse(503, "The jobs cannot be reached now. Try again.", headers={"Retry-After": "2"})
