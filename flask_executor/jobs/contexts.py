"""Capture Flask's contexts where a job is submitted, restore them where it runs.

What it does instead of Flask's own ``copy_current_request_context``, and why (the private names of Flask that it sets
are in :mod:`flask_executor.jobs.flask_internals`):

- Each call runs in a :class:`contextvars.Context` of its own, in which nothing has to be undone in order. Flask's
  tokens are tied to the thread that pushed, which breaks as soon as two threads share one wrapper.
- ``g``, ``request`` and ``session`` are copied one level deep. The live objects belong to the view, which changes
  and closes them when the request ends.
- What costs time is put off or left out. At submit only dicts are copied; the request and the session are made from
  them when a job first looks at them; and the request is not matched to its route a second time.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import CoroutineType
from typing import TYPE_CHECKING, Any, TypeVar

from flask import Flask, Request
from flask.globals import _cv_app
from flask.signals import appcontext_popped, appcontext_pushed, appcontext_tearing_down, request_tearing_down
from werkzeug.datastructures import EnvironHeaders

from flask_executor.jobs.flask_internals import FLASHES, MERGED, REQUEST, SESSION, cv_request
from flask_executor.jobs.uploads import give_own_streams, keep_uploads_open

if TYPE_CHECKING:
    from flask_executor.jobs.context_snapshot import ContextSnapshot

T = TypeVar("T")


def current_app_or_none() -> Flask | None:
    """The app of the context that is active now, without raising when there is none."""
    context = _cv_app.get(None)
    return None if context is None else context.app


def call_sync(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Call ``fn``; where that gives a coroutine, run it the way the app runs its async views.

    :raises RuntimeError: for a coroutine when Flask's extra ``async`` is not installed.
    """
    result: Any = fn(*args, **kwargs)
    return _run_coroutine(result) if type(result) is CoroutineType else result  # type: ignore[no-any-return]


def _run_coroutine(coroutine: CoroutineType[Any, Any, Any]) -> Any:
    async def finish() -> Any:
        return await coroutine

    app = current_app_or_none()
    try:
        if app is None:
            raise RuntimeError("an async job needs an app context, and EXECUTOR_PUSH_APP_CONTEXT is off")
        run = app.async_to_sync(finish)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return run()
        # Type "immediate" in an async view: this thread has a loop already, which must not be entered again.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(contextvars.copy_context().run, run).result()
    finally:
        coroutine.close()  # if it was not run at all, or Python warns that it was never awaited


# ---- capture ----


class CapturedContext:
    """The contexts that are active where this is made, copied; each :meth:`run` gets a fresh copy of the copy.

    :param app: the app to use where no app context is active.
    :param push_app_context: whether calls see a copy of ``g``. When it is False there is an app context,
        with an empty ``g``, only where there is a request.
    """

    __slots__ = (
        "app_context",
        "flashes",
        "globals",
        "request",
        "request_class",
        "request_context",
        "sent",
        "session_class",
        "session_items",
        "session_state",
        "variables",
    )

    def __init__(self, app: Flask, push_app_context: bool = True) -> None:
        outer = _cv_app.get(None)
        context = cv_request.get(None)
        self.app_context: Any = app.app_context() if outer is None else outer
        self.sent: ContextSnapshot | None = None  # the same as values, made when a worker process is to have them
        self.globals: Any = None  # None where g is empty, as it mostly is
        if outer is not None and push_app_context:
            state = getattr(outer.g, "__dict__", None)
            if state:
                self.globals = state.copy()
            elif state is None:
                self.globals = copy.copy(outer.g)
        self.request_context: Any = context
        if context is None or (MERGED and not context.has_request):
            self.request_context = None
            if not push_app_context:
                self.app_context = None
                self.variables = _variables_without_flask()
                return
        else:
            request, session = getattr(context, REQUEST), getattr(context, SESSION)
            keep_uploads_open(request)
            self.request_class: type[Request] = type(request)
            self.request: dict[str, Any] = request.__dict__.copy()
            self.flashes: Any = getattr(context, FLASHES)
            self.session_class: Any = type(session)
            self.session_items: Any = None
            if isinstance(session, dict):
                self.session_items = _with_own_flashes(dict(session))
                self.session_state: Any = session.__dict__.copy()
            else:
                self.session_state = copy.copy(session)
        self.variables = contextvars.copy_context()

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Call ``fn`` in a copy of these contexts, and the app's teardown functions after it.

        A teardown function that raises is logged, and the result stands.
        """
        variables = self.variables.copy()
        if self.app_context is None:
            return variables.run(fn, *args)
        app_context, request_context = self.make_contexts()
        return variables.run(_run_in, app_context, request_context, fn, args)

    def make_contexts(self) -> tuple[Any, Any]:
        """An app context and a request context (or None) for one call; with Flask 3.2 they may be the same."""
        captured = self.app_context
        request_context: Any = None
        if self.request_context is not None:
            request_context = object.__new__(_job_context_class(self.request_context.__class__))
            request_context._captured = self
            request_context.app = self.request_context.app
        if MERGED and request_context is not None:
            app_context = request_context
        else:
            app_context = object.__new__(type(captured))
            app_context.__dict__ = captured.__dict__.copy()
        app_context.g = self.make_globals()
        return app_context, request_context

    def contents(self) -> dict[str, Any]:
        """Return what a request context of :meth:`make_contexts` lacks: its request, session and the rest."""
        request = object.__new__(self.request_class)
        request.__dict__.update(self.request)
        request.environ = request.environ.copy()
        request.headers = EnvironHeaders(request.environ)
        give_own_streams(request)
        own = {
            REQUEST: request,
            SESSION: self._make_session(),
            FLASHES: self.flashes,
            "_after_request_functions": [],
        }
        return {**self.request_context.__dict__, **own}

    def make_globals(self) -> Any:
        """A ``g`` for one call."""
        made = self.app_context.app.app_ctx_globals_class()
        if type(self.globals) is dict:
            made.__dict__.update(self.globals)
        elif self.globals is not None:
            made = copy.copy(self.globals)
        return made

    def _make_session(self) -> Any:
        if self.session_items is None:
            return copy.copy(self.session_state)
        # Not copy.copy(), which would mark the copy as modified.
        session = self.session_class.__new__(self.session_class)
        dict.update(session, _with_own_flashes(self.session_items.copy()))
        session.__dict__.update(self.session_state)
        return session


class _NoContext:
    """Stands for captured contexts where nothing was captured."""

    app_context = None


NO_CONTEXT = _NoContext()


class _CallerContext(_NoContext):
    """Stands for captured contexts where a call runs in the contexts of its caller."""

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        # ``g``, the request and the session are the same objects in the copy, which is there for current_job only.
        return contextvars.copy_context().run(fn, *args)


CALLER_CONTEXT = _CallerContext()


def _with_own_flashes(items: dict[str, Any]) -> dict[str, Any]:
    """The items of a session; the list that ``flash()`` appends to must not be that of another one."""
    if "_flashes" in items:
        items["_flashes"] = [*items["_flashes"]]
    return items


@functools.cache
def _job_context_class(base: type) -> type:
    """A subclass of an app's request context class that is filled when something is looked up in it.

    Most jobs never look at the request; making it for all would cost more than the rest of their contexts.
    """
    if issubclass(base, _LazyRequestContext):  # a job that submits a job
        return base
    return type(f"Job{base.__name__}", (_LazyRequestContext, base), {})


class _LazyRequestContext:
    _captured: CapturedContext | None

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__
        captured = state.get("_captured")
        if captured is not None:
            # Threads that a job has started may all be here: the first one's contents are everybody's.
            contents: dict[str, Any] = state.setdefault("_contents", captured.contents())
            for key, value in contents.items():
                state.setdefault(key, value)
            state["_captured"] = None
            state.pop("_contents", None)
        return object.__getattribute__(self, name)


def _variables_without_flask() -> contextvars.Context:
    """All context variables but Flask's own: a variable once set cannot be unset."""
    variables = contextvars.Context()
    for variable, value in contextvars.copy_context().items():
        if variable is not _cv_app and variable is not cv_request:
            variables.run(variable.set, value)
    return variables


# ---- restore ----


def _run_in(app_context: Any, request_context: Any, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Call ``fn`` with these contexts pushed, in a :class:`contextvars.Context` that is used for nothing else.

    It does what Flask's own push and pop do, without matching the route and without signals that have no receivers.
    """
    app = app_context.app
    if MERGED:
        app_context._push_count = 1
        app_context._cv_token = _cv_app.set(app_context)
    else:
        # Pushed once, so that the context counts nested pushes right; but a token would refer to this
        # contextvars.Context, which refers to the app context: a cycle for every job.
        app_context._cv_tokens = [None]
        _cv_app.set(app_context)
        if request_context is not None:
            request_context._cv_tokens = [None]
            cv_request.set(request_context)
    error: BaseException | None = None
    try:
        if appcontext_pushed.receivers:
            appcontext_pushed.send(app, _async_wrapper=app.ensure_sync)
        return fn(*args)
    except BaseException as raised:
        error = raised
        raise
    finally:
        if (
            app.teardown_appcontext_funcs
            or app.teardown_request_funcs
            or appcontext_tearing_down.receivers
            or appcontext_popped.receivers
            or request_tearing_down.receivers
            or type(app) is not Flask
            or (request_context is not None and REQUEST in request_context.__dict__)
        ):
            _tear_down(app_context, request_context, error)
        if MERGED:
            app_context._cv_token = None  # refers to this contextvars.Context, which refers back
            app_context._push_count = 0
        error = None  # its traceback refers to this frame


def _tear_down(app_context: Any, request_context: Any, error: BaseException | None) -> None:
    """Run the app's teardown functions, and close the request if there is one that was looked at."""
    app = app_context.app
    passed = (app_context,) if MERGED else ()  # what Flask 3.2 passes along
    # Not pop(): it refuses when the job left a context of its own pushed, or a streaming generator open.
    _cv_app.set(app_context)
    if request_context is not None:
        cv_request.set(request_context)
    try:
        with contextlib.ExitStack() as last_first:
            last_first.callback(appcontext_popped.send, app, _async_wrapper=app.ensure_sync)
            last_first.callback(functools.partial(app.do_teardown_appcontext, *passed, error))
            if request_context is not None:
                if REQUEST in request_context.__dict__:
                    last_first.callback(request_context.request.close)
                last_first.callback(functools.partial(request_context.app.do_teardown_request, *passed, error))
    except BaseException:  # SystemExit too: in a worker thread it would have no effect but to end the job
        app.logger.exception("A teardown function failed after a job; the job's result stands.")
