"""What somebody may do who was given a page or a url: follow a job, see what came of it, or stop it and run it again.

A page is given a token for its own job. So the access checks of the view that has made the page guard its buttons too,
as far as they can be made beforehand: the buttons have a url of their own, as a view may take no POST.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from flask import Flask
from itsdangerous import BadData, URLSafeTimedSerializer

from flask_executor.helpers import is_multiprocess_request
from flask_executor.helpers.log import logger

#: What a permit is for: a bar that follows a job; the job's page and its result; the buttons of a page.
FOLLOW, SHOW, ACT = "follow", "show", "act"
_LIFE = {FOLLOW: 24 * 3600, SHOW: 24 * 3600, ACT: 4 * 3600}  # seconds; the first two stand in urls, and so in logs
_MADE_UP = "flask_executor_permit_key"  # in app.extensions


@dataclass(frozen=True, kw_only=True, slots=True)
class JobToken:
    """To do something with one job."""

    #: The name of the executor that has the job.
    executor: str
    #: The id of the job.
    id: str
    #: The path of the page that was given it, to go back to.
    page: str = ""


def sign_permit(app: Flask, what: str, permit: JobToken) -> str:
    """The permit as a token, for what it is: FOLLOW, SHOW or ACT."""
    return _serializer(app, what).dumps([permit.executor, permit.id, permit.page])


def check_token(app: Flask, what: str, token: str) -> JobToken | None:
    """The permit for this that a token is; None when it is none of ours, or too old."""
    try:
        executor, id, page = _serializer(app, what).loads(token, max_age=_LIFE[what])
    except BadData:
        return None
    return JobToken(executor=executor, id=id, page=page)


def _serializer(app: Flask, what: str) -> URLSafeTimedSerializer:
    fallbacks = app.config.get("SECRET_KEY_FALLBACKS") or ()
    key = app.secret_key or app.extensions.get(_MADE_UP) or _make_up(app)
    return URLSafeTimedSerializer([*fallbacks, key], salt=f"flask-executor.permit.{what}")


def _make_up(app: Flask) -> bytes:
    """A key of this process, which does where it is the only one."""
    if is_multiprocess_request():
        logger.warning(
            "This server has several processes and the app no SECRET_KEY: what a page of one process may do, another "
            "refuses (403). Set SECRET_KEY to the same random value in all of them."
        )
    key: bytes = app.extensions.setdefault(_MADE_UP, secrets.token_bytes(32))
    return key
