"""What a Flask context is made of, as far as this package sets it itself instead of calling Flask's ``push()``.

.. code-block:: text

                                Flask 2.3 to 3.1                         Flask 3.2
    context variables           _cv_app: AppContext                      _cv_app: AppContext, with or without
                                _cv_request: RequestContext              a request (has_request)
    of an app context           g, _cv_tokens                            g, _cv_token, _push_count
    of a request context        request, session (3.1.3: _session),      _request, _session, _flashes,
                                flashes, _after_request_functions,       _after_request_functions
                                _cv_tokens

These are private names of Flask. ``tests/jobs/test_flask_internals.py`` has a test for each of them, so that a release
of Flask that changes one says so.
"""

from __future__ import annotations

import contextvars
from typing import Any

from flask.ctx import AppContext
from flask.globals import _cv_app

__all__ = ["FLASHES", "MERGED", "REQUEST", "SESSION", "RequestContext", "cv_request"]

#: If true, the app context is the request context as well: Flask 3.2.
MERGED = hasattr(AppContext, "has_request")
if MERGED:
    RequestContext: Any = AppContext
    cv_request: contextvars.ContextVar[Any] = _cv_app
    REQUEST, SESSION, FLASHES = "_request", "_session", "_flashes"
else:
    from flask.ctx import RequestContext
    from flask.globals import _cv_request as cv_request

    # Flask 3.1.3 made the session a property that notes who reads it.
    REQUEST, SESSION = "request", "_session" if hasattr(RequestContext, "session") else "session"
    FLASHES = "flashes"
