"""What a Flask context is made of, in Flask 2.3 to 3.1 and from 3.2 on, as far as this package sets it itself."""

from __future__ import annotations

import contextvars
from typing import Any

from flask.ctx import AppContext
from flask.globals import _cv_app

__all__ = ["FLASHES", "MERGED", "REQUEST", "SESSION", "RequestContext", "cv_request"]

MERGED = hasattr(AppContext, "has_request")
if MERGED:
    RequestContext: Any = AppContext
    cv_request: contextvars.ContextVar[Any] = _cv_app
    REQUEST, SESSION, FLASHES = "_request", "_session", "_flashes"
else:
    from flask.ctx import RequestContext
    from flask.globals import _cv_request as cv_request

    # Flask 3.1.3 made the session a property that notes who looks.
    REQUEST, SESSION = "request", "_session" if hasattr(RequestContext, "session") else "session"
    FLASHES = "flashes"
