"""What the buttons of a page may do: stop a job, or have it run again.

A page is given a token for its own job. Whoever could see the page may use it: so the access checks of the view that
the page belongs to guard the buttons too, which have a url of their own, as a view may take no POST.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from flask import Flask
from itsdangerous import BadData, URLSafeTimedSerializer

_SALT = "flask-executor.action"
_LIFE = 24 * 3600  # seconds for which a token is good
_MADE_UP = "flask_executor_action_key"  # in app.extensions


@dataclass(frozen=True, kw_only=True, slots=True)
class Permit:
    """To stop one job, or to have it run again."""

    #: The name of the executor that has the job.
    executor: str
    #: The id of the job.
    id: str
    #: The path of the page that was given it, to go back to.
    page: str


def sign_permit(app: Flask, permit: Permit) -> str:
    """The permit as a token."""
    return _serializer(app).dumps([permit.executor, permit.id, permit.page])


def check_permit(app: Flask, token: str) -> Permit | None:
    """The permit that this is a token for; None when it is none of ours, or too old."""
    try:
        executor, id, page = _serializer(app).loads(token, max_age=_LIFE)
    except BadData:
        return None
    return Permit(executor=executor, id=id, page=page)


def _serializer(app: Flask) -> URLSafeTimedSerializer:
    fallbacks = app.config.get("SECRET_KEY_FALLBACKS") or ()
    # Without a secret key jobs are seen by this process alone, or it is told where they are shared; so is this.
    key = app.secret_key or app.extensions.setdefault(_MADE_UP, secrets.token_bytes(32))
    return URLSafeTimedSerializer([*fallbacks, key], salt=_SALT)
