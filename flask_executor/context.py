"""Capture Flask's contexts where a job is submitted, restore them where it runs.

The only module that touches Flask's context internals. What it does instead of Flask's own
``copy_current_request_context``, and why:

- A job gets its own :class:`contextvars.Context`, in which nothing has to be undone in order; Flask's
  tokens are tied to the thread that pushed, which breaks as soon as two threads share one wrapper.
- ``g``, ``request`` and ``session`` are copied one level deep. The live objects belong to the view,
  which changes and closes them when the request ends.
- Copies are made by copying attributes, and the request is not matched to its route again. Pushing a
  second request context costs more than most jobs' bookkeeping.

Flask up to 3.1 keeps two context variables, one for the app and one for the request; Flask 3.2 merges them into one.
"""

from __future__ import annotations

import contextvars
import copy
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import CoroutineType
from typing import Any, TypeVar

from flask import Flask, Request
from flask.ctx import AppContext
from flask.globals import _cv_app
from flask.signals import appcontext_pushed
from werkzeug.datastructures import EnvironHeaders

from flask_executor.uploads import (
    UploadSnapshot,
    keep_uploads,
    own_uploads,
    read_body,
    rebuild_uploads,
    snapshot_uploads,
)

T = TypeVar("T")

_MERGED = hasattr(AppContext, "has_request")
if _MERGED:
    _cv_request: contextvars.ContextVar[Any] = _cv_app  # type: ignore[assignment]
else:
    from flask.globals import _cv_request  # type: ignore[no-redef]


def current_app_or_none() -> Flask | None:
    """The app of the context that is active now, without raising when there is none."""
    context = _cv_app.get(None)
    return None if context is None else context.app


def call_to_end(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Call ``fn``; where that gives a coroutine, run it the way the app runs its async views.

    :raises RuntimeError: for a coroutine when Flask's extra ``async`` is not installed.
    """
    result: Any = fn(*args, **kwargs)
    if isinstance(result, CoroutineType):
        app = current_app_or_none()
        if app is None:
            result.close()
            raise RuntimeError("an async job needs an app context; EXECUTOR_PUSH_APP_CONTEXT is off")
        try:
            run = app.async_to_sync(_await)
        except RuntimeError:
            result.close()
            raise
        return run(result)  # type: ignore[no-any-return]
    return result  # type: ignore[no-any-return]


async def _await(coroutine: Any) -> Any:
    return await coroutine


class CapturedContext:
    """The contexts of whoever made it, copied, for one call.

    :param app: the app to use where no app context is active.
    :param push_app_context: whether the call sees a copy of ``g``; when it is False there is an app context,
        with an empty ``g``, only where there is a request.
    """

    __slots__ = ("_contexts", "_variables")

    def __init__(self, app: Flask, push_app_context: bool = True) -> None:
        self._contexts = _capture(app, push_app_context)
        self._variables = contextvars.copy_context() if self._contexts else _variables_without_flask()

    def fresh(self) -> CapturedContext:
        """Another copy of what was captured, for another call; only good before this one has run."""
        new = object.__new__(CapturedContext)
        new._contexts = self._contexts.copy() if self._contexts else None
        new._variables = self._variables.copy()
        return new

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Call ``fn`` in these contexts, and the app's teardown functions after it; once only.

        A teardown function that raises is logged, and the result stands.
        """
        if self._contexts is None:
            return self._variables.run(fn, *args)
        return self._variables.run(self._contexts.run, fn, args)


class _Contexts:
    """The app context and request context of one call; :meth:`run` in a :class:`contextvars.Context` of its own."""

    __slots__ = ("app_context", "request_context")

    def __init__(self, app_context: AppContext, request_context: Any) -> None:
        self.app_context = app_context
        self.request_context = request_context

    def copy(self) -> _Contexts:
        app_context = _copy_app_context(self.app_context)
        if _MERGED:
            return _Contexts(app_context, app_context if self.request_context else None)
        request_context = self.request_context
        return _Contexts(app_context, request_context and _copy_request_context(request_context))

    def run(self, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
        self._enter()
        error: BaseException | None = None
        try:
            return fn(*args)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._leave(error)
            error = None  # the error's traceback refers to this frame

    def _enter(self) -> None:
        app_context = self.app_context
        if _MERGED:
            # As AppContext.push(), without matching the request to its route once more.
            app_context._push_count = 1  # type: ignore[attr-defined]
            app_context._cv_token = _cv_app.set(app_context)  # type: ignore[attr-defined]
            if appcontext_pushed.receivers:
                appcontext_pushed.send(app_context.app, _async_wrapper=app_context.app.ensure_sync)
            return
        app_context.push()
        # In a context of our own nothing has to be restored, so no token is kept.
        if self.request_context is not None:
            _cv_request.set(self.request_context)

    def _leave(self, error: BaseException | None) -> None:
        if self.request_context is not None and not _MERGED:
            self._teardown(self._leave_request, error)
        self._teardown(self.app_context.pop, error)

    def _leave_request(self, error: BaseException | None) -> None:
        try:
            self.request_context.app.do_teardown_request(error)
        finally:
            self.request_context.request.close()

    def _teardown(self, leave: Callable[[BaseException | None], None], error: BaseException | None) -> None:
        try:
            leave(error)
        except Exception:
            self.app_context.app.logger.exception("A teardown function failed after a job; the job's result stands.")


def _capture(app: Flask, push_app_context: bool) -> _Contexts | None:
    outer = _cv_app.get(None)
    request_context = _cv_request.get(None)
    if _MERGED and request_context is not None and not request_context.has_request:
        request_context = None
    if request_context is not None:
        read_body(request_context.request)
        keep_uploads(request_context.request)
    elif not push_app_context:
        return None
    if outer is None:
        return _Contexts(app.app_context(), None)
    app_context = _copy_app_context(outer)
    if not push_app_context:
        app_context.g = outer.app.app_ctx_globals_class()
    if _MERGED:
        return _Contexts(app_context, app_context if request_context is not None else None)
    return _Contexts(app_context, request_context and _copy_request_context(request_context))


def _variables_without_flask() -> contextvars.Context:
    """All context variables but Flask's own: a variable once set cannot be unset."""
    variables = contextvars.Context()
    for variable, value in contextvars.copy_context().items():
        if variable is not _cv_app and variable is not _cv_request:
            variables.run(variable.set, value)
    return variables


def _shallow_copy(original: T) -> T:
    """As :func:`copy.copy` for instances whose state is their ``__dict__``, at a fifth of the cost."""
    new = object.__new__(type(original))
    new.__dict__.update(original.__dict__)
    return new


def _copy_app_context(original: AppContext) -> AppContext:
    new = _shallow_copy(original)
    new.g = _copy_globals(original.g)
    if _MERGED:
        state: Any = new
        state._cv_token = None
        state._push_count = 0
        state._after_request_functions = []
        if state._request is not None:
            state._request = _copy_request(state._request)
            state._session = _copy_session(state._session)
    else:
        new._cv_tokens = []
    return new


def _copy_globals(original: Any) -> Any:
    if type(original).__dict__.get("__slots__"):
        return copy.copy(original)
    return _shallow_copy(original)


def _copy_request_context(original: Any) -> Any:
    new = _shallow_copy(original)
    new.request = _copy_request(original.request)
    new._cv_tokens = []
    new._after_request_functions = []
    state = new.__dict__
    session = "_session" if "_session" in state else "session"  # Flask 3.1.3 made it a property
    state[session] = _copy_session(state[session])
    return new


def _copy_request(original: Request) -> Request:
    new = _shallow_copy(original)
    new.environ = dict(original.environ)
    new.headers = EnvironHeaders(new.environ)
    own_uploads(new)
    return new


def _copy_session(original: Any) -> Any:
    if not isinstance(original, dict):
        return copy.copy(original)
    # By hand: copy.copy() would store item by item and so mark the copy as modified.
    new = type(original).__new__(type(original))
    dict.update(new, original)
    if hasattr(original, "__dict__"):
        new.__dict__.update(original.__dict__)
    return new


# ---- for worker processes ----

_apps: weakref.WeakValueDictionary[int, Flask] = weakref.WeakValueDictionary()


def register_app(app: Flask) -> None:
    """Let worker processes that are forked from this one find ``app`` again."""
    _apps[id(app)] = app


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestSnapshot:
    """A request as values: what :meth:`Snapshot.restore` builds it from."""

    environ: dict[str, Any]
    attributes: dict[str, bytes]
    session: bytes | None
    uploads: list[UploadSnapshot]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Captured contexts in a form that can be sent to another process; values are pickled one by one.

    What cannot be pickled is left out: a database connection on ``g`` must not keep a job from running.
    """

    app: int
    globals: dict[str, bytes] | None
    request: RequestSnapshot | None

    def call(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        """In a worker process: restore the contexts and call ``fn`` in them."""
        app = _apps.get(self.app)
        if app is None or self.globals is None:
            # Not forked from the process that has the app, or contexts are off: nothing to push.
            return contextvars.Context().run(call_to_end, fn, args, kwargs)
        contexts = self._restore(app)
        return contextvars.Context().run(contexts.run, call_to_end, (fn, args, kwargs))

    def _restore(self, app: Flask) -> _Contexts:
        app_context: Any
        if self.request is None:
            app_context, request_context = app.app_context(), None
        else:
            request_context = _rebuild_request_context(app, self.request)
            app_context = request_context if _MERGED else app.app_context()
        for name, value in (self.globals or {}).items():
            setattr(app_context.g, name, pickle.loads(value))
        return _Contexts(app_context, request_context)


def snapshot(captured: CapturedContext, app: Flask) -> Snapshot:
    """The same contexts as values."""
    contexts = captured._contexts
    if contexts is None:
        return Snapshot(app=id(app), globals=None, request=None)
    return Snapshot(
        app=id(contexts.app_context.app),
        globals=_picklable(contexts.app_context.g.__dict__),
        request=_snapshot_request(contexts.request_context) if contexts.request_context is not None else None,
    )


# Rebuilt in the worker, or bound to objects of this process.
_NOT_SENT = frozenset({"environ", "headers", "stream", "files", "json_module", "url_rule", "view_args", "shallow"})


def _snapshot_request(context: Any) -> RequestSnapshot:
    request = context.request
    state = {name: value for name, value in request.__dict__.items() if name not in _NOT_SENT}
    session = context.__dict__.get("_session", context.__dict__.get("session"))
    return RequestSnapshot(
        environ={name: value for name, value in request.environ.items() if isinstance(value, (str, int, tuple))},
        attributes=_picklable(state),
        # As a plain dict: Flask's session class holds a callback that cannot be pickled.
        session=_picklable({"session": (type(session), dict(session))}).get("session"),
        uploads=snapshot_uploads(request),
    )


def _rebuild_request_context(app: Flask, sent: RequestSnapshot) -> Any:
    context: Any = app.request_context(dict(sent.environ))
    request = context.request
    for name, value in sent.attributes.items():
        request.__dict__[name] = pickle.loads(value)
    rebuild_uploads(request, sent.uploads)
    if sent.session is None:
        session = app.session_interface.make_null_session(app)
    else:
        session_class, values = pickle.loads(sent.session)
        session = session_class(values)
    context.__dict__["session" if "session" in context.__dict__ else "_session"] = session
    if context.url_adapter is not None:
        context.match_request()
    return context


def _picklable(state: dict[str, Any]) -> dict[str, bytes]:
    pickled = {}
    for name, value in state.items():
        try:
            pickled[name] = pickle.dumps(value)
        except Exception:  # whatever a foreign __reduce__ raises: this value stays behind
            continue
    return pickled
