"""Steps that are remembered from one request to the next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from flask_executor.helpers import callable_name
from flask_executor.jobs.model import RESERVED_PREFIX, JobOptions

if TYPE_CHECKING:
    from flask_executor.executor.app_executor import AppExecutor

P = ParamSpec("P")
T = TypeVar("T")


_FLOW = f"{RESERVED_PREFIX}flow"  # what the key of a step begins with

#: The keys of the steps that run here, one inside the other.
_running: ContextVar[frozenset[Hashable]] = ContextVar("flask_executor_steps", default=frozenset())


class Flow:
    """The steps that were done under a key; what :meth:`flask_executor.Executor.flow` returns.

    A step is told by its function, and by how many calls of the same function came before it in this flow: the same
    code, run from the beginning at each request, meets its own steps again. With a shared store it does so on every web
    worker, and results must be picklable. A step is kept as long as the record of any job.
    """

    def __init__(
        self,
        app_executor: AppExecutor,
        key: Hashable,
        wait_for: Callable[[JobOptions, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
        options_of: Callable[[Callable[..., Any]], JobOptions],
    ) -> None:
        self.key = key
        self._app_executor = app_executor
        self._wait_for = wait_for
        self._options_of = options_of
        self._calls: Counter[str] = Counter()

    def step(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``fn(*args, **kwargs)`` returned when this step was done; it is called now if it was not.

        It is called here, in the contexts of the caller, and once: a second request that comes meanwhile waits. What
        it raises is raised here, and the next request tries again.

        :raises RuntimeError: when this step is what runs here already.
        """
        name, key = self._next(fn)
        running = _running.get()
        if key in running:
            raise RuntimeError(f"step {name} of flow {self.key!r} would wait for itself: it is what runs here")
        token = _running.set(running | {key})
        try:
            options = JobOptions(name=self._options_of(fn).name or name, key=key, again=True, timeout=math.inf)
            return self._app_executor.submission.run_once(options, fn, args, kwargs).result()  # type: ignore[no-any-return]
        finally:
            _running.reset(token)

    def result_or_202(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """As :meth:`step`, but in the background: while it runs the request is answered, as by
        :meth:`Executor.result_or_202 <flask_executor.Executor.result_or_202>`.

        What :meth:`Executor.job <flask_executor.Executor.job>` made of a function brings its options along.

        :raises HTTPException: the answer, while there is no result.
        :raises RuntimeError: outside of a request.
        """
        _, key = self._next(fn)
        return self._wait_for(replace(self._options_of(fn), key=key), fn, args, kwargs)  # type: ignore[no-any-return]

    def _next(self, fn: Callable[..., Any]) -> tuple[str, Hashable]:
        """Name and key of a step that is met now."""
        name = callable_name(fn)
        key = (_FLOW, self.key, name, self._calls[name])
        self._calls[name] += 1
        return name, key

    def reset(self) -> None:
        """Forget all steps."""
        self._calls.clear()
        futures = self._app_executor.tracker.futures
        for key in futures.keys((_FLOW, self.key)):
            futures.pop(key)
