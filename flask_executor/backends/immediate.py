"""Jobs run inside ``submit()``: for tests, and to step through a job with a debugger."""

from __future__ import annotations

import concurrent.futures
import pickle
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from flask_executor.abc import Backend, BackendOptions, PreparedCall
from flask_executor.exceptions import ExecutorShutdown
from flask_executor.jobs.contexts import call_sync
from flask_executor.jobs.packing import pickle_or_explain, pickle_roundtrip

P = ParamSpec("P")
T = TypeVar("T")


class ImmediateBackend(Backend):
    """Runs each call in the thread that submits it, before ``submit`` returns."""

    def __init__(self, options: BackendOptions) -> None:
        self._pickle = options.pickle
        self._shutdown = False

    def enqueue(self, call: PreparedCall) -> None:
        if self._shutdown:
            raise ExecutorShutdown("cannot schedule new futures after shutdown")
        if not call.packed:
            self.pack(call)
        future = call.future
        call.run()
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise error  # Ctrl-C, and what ends a test in test frameworks, are meant for this thread

    def pack(self, call: PreparedCall) -> None:
        if self._pickle:
            call.fn, call.args, call.kwargs = pickle_roundtrip(call)
            call.fn = _PickledResult(call.fn)
            call.packed = True

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function, outside of all contexts, as any executor does."""
        if self._shutdown:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._shutdown = True

    @property
    def workers(self) -> int:
        return 0

    @property
    def capacity(self) -> None:
        return None


class _PickledResult:
    """Calls a function and puts what it returns through pickle."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return pickle.loads(b"".join(pickle_or_explain(call_sync(self._fn, args, kwargs), "The result of a job")))
