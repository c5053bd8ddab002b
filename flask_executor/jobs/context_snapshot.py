"""The contexts of a call as values that can be sent to another process, and rebuilt there."""

from __future__ import annotations

import contextvars
import functools
import io
import pickle
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from flask import Flask

from flask_executor.helpers.pickling import CompactPickle
from flask_executor.jobs.contexts import (
    CapturedContext,
    _job_context_class,
    _NoContext,
    _run_in,
    call_sync,
)
from flask_executor.jobs.flask_internals import MERGED, REQUEST, SESSION, RequestContext, cv_request
from flask_executor.jobs.partial_pickle import CONTAINERS, SIMPLE, PartialEnviron, PartialPickle, with_missing
from flask_executor.jobs.uploads import STATE_KEY, UploadSnapshot, rebuild_uploads, snapshot_uploads

T = TypeVar("T")


# ---- for worker processes ----


@dataclass(slots=True)
class RequestSnapshot(CompactPickle):
    """A request as values."""

    environ: dict[str, Any]
    attributes: PartialPickle
    session_class: bytes | None
    session: PartialPickle | None
    uploads: list[UploadSnapshot]


@dataclass(slots=True)
class ContextSnapshot(CompactPickle):
    """Captured contexts in a form that can be sent to another process."""

    #: What was on ``g``, None for nothing.
    globals: PartialPickle | None
    #: A :class:`RequestSnapshot`, pickled, as most jobs never look at it; None where there was no request.
    request: bytes | None

    def call(self, app: Flask, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        """In a worker process: call ``fn`` in contexts made anew from this."""
        request_context: Any = None
        if self.request is not None:
            request_context = object.__new__(_job_context_class(RequestContext))
            request_context.app = app
        merged = MERGED and request_context is not None
        app_context = request_context if merged else app.app_context()
        made: Any = app.app_ctx_globals_class()
        if self.globals is not None:
            values, left_out = self.globals.unpack()
            if left_out:
                made = with_missing(made, "g", left_out)
            for name, value in values.items():
                setattr(made, name, value)
        app_context.g = made
        if request_context is not None:
            request_context._captured = _RequestFromSnapshot(app, self.request, made)
        result: T = _run_in(app_context, request_context, call_sync, (fn, args, kwargs))
        return result


# Rebuilt in the worker, or bound to objects of this process.
_NOT_SENT = frozenset(
    {"environ", "headers", "stream", "files", "json_module", "url_rule", "shallow", "close", STATE_KEY}
)


def snapshot(captured: CapturedContext | _NoContext) -> ContextSnapshot | None:
    """The same contexts as values; None where there are none to be pushed."""
    if isinstance(captured, _NoContext) or captured.app_context is None:
        return None
    if captured.sent is None:
        values = captured.globals if isinstance(captured.globals, dict) else None
        request = None if captured.request_context is None else _pickled_request(captured)
        captured.sent = ContextSnapshot(PartialPickle.pack(values) if values else None, request)
    return captured.sent


def _pickled_request(captured: CapturedContext) -> bytes:
    try:
        return pickle.dumps(_snapshot_request(captured, CONTAINERS), pickle.HIGHEST_PROTOCOL)
    except Exception:  # then one by one, so that one bad value does not keep the others back
        return pickle.dumps(_snapshot_request(captured, SIMPLE), pickle.HIGHEST_PROTOCOL)


@functools.lru_cache(maxsize=64)
def _pickled_class(cls: Any) -> bytes | None:
    try:
        return pickle.dumps(cls)
    except Exception:  # whatever a metaclass does: the session stays behind
        return None


def _snapshot_request(captured: CapturedContext, simple: Collection[type]) -> RequestSnapshot:
    state = captured.request
    items = captured.session_items
    return RequestSnapshot(
        # The rest are streams, sockets and other parts of the server.
        environ={name: value for name, value in state["environ"].items() if isinstance(value, (str, int, tuple))},
        attributes=PartialPickle.pack(state, _NOT_SENT, simple),
        # Flask's own holds a callback, so that it is rebuilt from its items.
        session_class=None if items is None else _pickled_class(captured.session_class),
        session=PartialPickle.pack(items, (), simple) if items else None,
        uploads=snapshot_uploads(state),
    )


class _RequestFromSnapshot:
    """The request of a call, rebuilt when something is first looked up in it; see ``_LazyRequestContext``."""

    def __init__(self, app: Flask, request: bytes | None, globals: Any) -> None:
        self.app = app
        self.request = request
        self.globals = globals

    def contents(self) -> dict[str, Any]:
        """Return what a request context lacks: its request, session and the rest."""
        sent: RequestSnapshot = pickle.loads(self.request or b"")
        # Bodies are sent as attributes, so there is nothing to read from the environ.
        environ = PartialEnviron(sent.environ, **{"wsgi.input": io.BytesIO(), "wsgi.errors": sys.stderr})
        context: Any = self.app.request_context(environ)
        if MERGED:
            context.g = self.globals
        # Converters of routes may look at the contexts, and these are not complete yet.
        contextvars.copy_context().run(self._fill, context, sent)
        contents: dict[str, Any] = context.__dict__
        return contents

    def _fill(self, context: Any, sent: RequestSnapshot) -> None:
        cv_request.set(context)
        if sent.session_class is None:
            session: Any = self.app.session_interface.make_null_session(self.app)
        else:
            session = pickle.loads(sent.session_class)({} if sent.session is None else sent.session.unpack()[0])
        context.__dict__[SESSION] = session
        if context.url_adapter is not None:
            context.match_request()
        values, left_out = sent.attributes.unpack()
        request = context.request
        if left_out:
            request = context.__dict__[REQUEST] = with_missing(request, "the request", left_out)
        request.__dict__.update(values)
        rebuild_uploads(request, sent.uploads)
