"""Error answers after `RFC 9457 <https://www.rfc-editor.org/rfc/rfc9457>`_, and the answer without content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NoReturn

from flask import Response, abort

from flask_executor.exceptions import StoreUnavailable

MIMETYPE = "application/problem+json"


def problem(status: int, detail: str, *, headers: dict[str, str] | None = None, **members: Any) -> Response:
    """An error answer.

    :param status: the HTTP status.
    :param detail: what is wrong and what to do, for people.
    :param members: further members of the document.
    """
    document = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail, **members}
    answer = Response(json.dumps(document), status, mimetype=MIMETYPE)
    answer.headers["Cache-Control"] = "no-store"
    answer.headers.update(headers or {})
    return answer


def no_content(headers: dict[str, str] | None = None) -> Response:
    """The answer 204."""
    answer = Response(status=204, headers=headers)
    del answer.headers["Content-Type"]
    return answer


def abort_with_problem(status: int, detail: str, *, headers: dict[str, str] | None = None, **members: Any) -> NoReturn:
    """Leave the view with a :func:`problem`. It is a complete response, which the app's error handlers do not see.

    :raises HTTPException: the problem.
    """
    abort(problem(status, detail, headers=headers, **members))


@contextmanager
def store_or_problem() -> Iterator[None]:
    """Leave the view with a 503 if the store is unavailable.

    :raises HTTPException: the problem.
    """
    try:
        yield
    except StoreUnavailable:
        abort_with_problem(503, "The jobs cannot be reached now. Try again.", headers={"Retry-After": "2"})
