"""Signed tokens, each of which allows one thing with one job: to follow it, to see its result, or to act on it.

The page of a job carries a token for its buttons. So the access checks of the view that rendered the page guard the
buttons too, although these are sent to another url: a view may not accept POST.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from flask import Flask
from itsdangerous import BadData, URLSafeTimedSerializer

from flask_executor.helpers import is_multiprocess_request, signing_keys
from flask_executor.helpers.log import logger

#: What a token allows: to follow the status; to see the job's page and its result; to stop the job and run it again.
FOLLOW, SHOW, ACT = "follow", "show", "act"
_MAX_AGE = {FOLLOW: 24 * 3600, SHOW: 24 * 3600, ACT: 4 * 3600}  # seconds; the first two are parts of urls
_PROCESS_KEY = "flask_executor_token_key"  # in app.extensions


@dataclass(frozen=True, kw_only=True, slots=True)
class JobToken:
    """What is signed: which job a token is for."""

    #: The name of the executor that has the job.
    executor: str
    #: The id of the job.
    id: str
    #: The path of the page that carries the token, to go back to.
    page: str = ""


def sign_token(app: Flask, purpose: str, token: JobToken) -> str:
    """Sign a token for FOLLOW, SHOW or ACT."""
    return _serializer(app, purpose).dumps([token.executor, token.id, token.page])


def check_token(app: Flask, purpose: str, text: str) -> JobToken | None:
    """The token that was signed as this text; None if it is too old, for another purpose, or not signed by this app."""
    try:
        executor, id, page = _serializer(app, purpose).loads(text, max_age=_MAX_AGE[purpose])
    except BadData:
        return None
    return JobToken(executor=executor, id=id, page=page)


def _serializer(app: Flask, purpose: str) -> URLSafeTimedSerializer:
    keys = signing_keys(app) or [app.extensions.get(_PROCESS_KEY) or _make_process_key(app)]
    return URLSafeTimedSerializer(keys, salt=f"flask-executor.permit.{purpose}")


def _make_process_key(app: Flask) -> bytes:
    """Make the key of an app without SECRET_KEY. Only this process knows it, which is enough if there is no other."""
    if is_multiprocess_request():
        logger.warning(
            "This server has several processes and the app no SECRET_KEY: what a page of one process may do, another "
            "refuses (403). Set SECRET_KEY to the same random value in all of them."
        )
    key: bytes = app.extensions.setdefault(_PROCESS_KEY, secrets.token_bytes(32))
    return key
