"""Steps that are remembered from one request to the next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any, ParamSpec, Protocol, TypeVar

from flask_executor.futures import FutureCollection, FutureProxy
from flask_executor.helpers import callable_name
from flask_executor.jobs import JobOptions
from flask_executor.ledger import FLOW, Ledger

P = ParamSpec("P")
T = TypeVar("T")


#: The keys of the steps that run here, one inside the other.
_running: ContextVar[frozenset[Hashable]] = ContextVar("flask_executor_steps", default=frozenset())


class RunsOnce(Protocol):
    """What a flow needs of an executor."""

    ledger: Ledger

    def run_once(
        self, options: JobOptions, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> FutureProxy[Any]:
        """The job under the key in the options; if there is none it is run here and now."""


class Flow:
    """The steps that were done under a key; what :meth:`flask_executor.Executor.flow` returns.

    A step is told by its function, and by how many calls of the same function came before it in this flow: the same
    code, run from the beginning at each request, meets its own steps again. With a shared store it does so on every web
    worker, and results must be picklable. A step is kept as long as the record of any job.
    """

    def __init__(self, binding: RunsOnce, key: Hashable) -> None:
        self.key = key
        self._binding = binding
        self._calls: Counter[str] = Counter()

    def step(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``fn(*args, **kwargs)`` returned when this step was done; it is called now if it was not.

        It is called here, in the contexts of the caller, and once: a second request that comes meanwhile waits. What
        it raises is raised here, and the next request tries again.

        :raises RuntimeError: when this step is what runs here already.
        """
        name = callable_name(fn)
        key = (FLOW, self.key, name, self._calls[name])
        self._calls[name] += 1
        running = _running.get()
        if key in running:
            raise RuntimeError(f"step {name} of flow {self.key!r} would wait for itself: it is what runs here")
        token = _running.set(running | {key})
        try:
            options = JobOptions(name=name, key=key, again=True, timeout=math.inf)
            return self._binding.run_once(options, fn, args, kwargs).result()  # type: ignore[no-any-return]
        finally:
            _running.reset(token)

    def reset(self) -> None:
        """Forget all steps."""
        self._calls.clear()
        steps: FutureCollection[FutureProxy[Any]] = self._binding.ledger.steps
        for key in steps.keys((FLOW, self.key)):
            steps.pop(key)
