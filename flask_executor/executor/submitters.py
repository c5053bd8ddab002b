"""What submits beside the executor itself: an executor with options, and a function that is a job."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from flask_executor.executor.options import OptionValues, _checked_key, _delayed, _options
from flask_executor.futures import FutureProxy
from flask_executor.helpers import callable_name
from flask_executor.jobs.model import JobOptions

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session
    from typing_extensions import Unpack

    from flask_executor.executor.extension import Executor

P = ParamSpec("P")
T = TypeVar("T")


class ExecutorWithOptions:
    """An executor with options for the next jobs; what :meth:`Executor.options` returns."""

    def __init__(self, executor: Executor, options: JobOptions) -> None:
        self._executor = executor
        self._options = options

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """As :meth:`Executor.submit`; with a key as :meth:`Executor.submit_stored`."""
        return self._executor._submit(self._options, fn, args, kwargs)

    def submit_stored(
        self, /, future_key: Hashable, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> FutureProxy[T]:
        """As :meth:`Executor.submit_stored`."""
        return self._executor._submit(self._with_key(future_key), fn, args, kwargs)

    def submit_once(self, /, key: Hashable, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """As :meth:`Executor.submit_once`."""
        return self._executor._submit(self._with_key(key), fn, args, kwargs, once=True)

    def submit_later(self, /, seconds: float, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """As :meth:`Executor.submit_later`; with a key as :meth:`Executor.submit_stored`."""
        return self._executor._submit(_delayed(self._options, seconds), fn, args, kwargs)

    def submit_after_commit(
        self, /, session: Session | scoped_session[Any], fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> FutureProxy[T]:
        """As :meth:`Executor.submit_after_commit`."""
        return self._executor._submit_after_commit(self._options, session, fn, args, kwargs)

    def result_or_202(self, /, key: Hashable, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As :meth:`Executor.result_or_202`."""
        return self._executor._result_or_202(self._with_key(key), fn, args, kwargs)  # type: ignore[no-any-return]

    def map(
        self, /, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """As :meth:`Executor.map`.

        :raises ValueError: with a key: it can belong to one job only.
        """
        if self._options.key is not None:
            raise ValueError(f"map() starts many jobs, which cannot all have the key {self._options.key!r}")
        return self._executor._map(self._options, fn, iterables, timeout, chunksize)

    def _with_key(self, key: Hashable) -> JobOptions:
        return replace(self._options, key=_checked_key(key))


class ExecutorJob(Generic[P, T]):
    """A function that can submit itself; what :meth:`Executor.job` makes of it.

    :param executor: where it is submitted to.
    :param fn: the function.
    :param options: for each job.
    """

    __name__: str
    __qualname__: str

    def __init__(self, executor: Executor, fn: Callable[P, T], options: JobOptions | None = None) -> None:
        self.__qualname__ = callable_name(fn)
        functools.update_wrapper(self, fn)
        self.executor = executor
        self.fn = fn
        self._options = options or JobOptions()
        self._submitter = ExecutorWithOptions(executor, self._options)
        self._submitted: ExecutorJob[P, T] = self

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.fn(*args, **kwargs)

    def submit(self, /, *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """As :meth:`Executor.submit`."""
        return self._submitter.submit(self._submitted, *args, **kwargs)

    def submit_stored(self, /, future_key: Hashable, *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """As :meth:`Executor.submit_stored`."""
        return self._submitter.submit_stored(future_key, self._submitted, *args, **kwargs)

    def submit_once(self, /, key: Hashable, *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """As :meth:`Executor.submit_once`."""
        return self._submitter.submit_once(key, self._submitted, *args, **kwargs)

    def submit_later(self, /, seconds: float, *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """As :meth:`Executor.submit_later`."""
        return self._submitter.submit_later(seconds, self._submitted, *args, **kwargs)

    def submit_after_commit(
        self, /, session: Session | scoped_session[Any], *args: P.args, **kwargs: P.kwargs
    ) -> FutureProxy[T]:
        """As :meth:`Executor.submit_after_commit`."""
        return self._submitter.submit_after_commit(session, self._submitted, *args, **kwargs)

    def result_or_202(self, /, key: Hashable, *args: P.args, **kwargs: P.kwargs) -> T:
        """As :meth:`Executor.result_or_202`."""
        return self._submitter.result_or_202(key, self._submitted, *args, **kwargs)

    def map(self, *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1) -> Iterator[T]:
        """As :meth:`Executor.map`."""
        return self._submitter.map(self._submitted, *iterables, timeout=timeout, chunksize=chunksize)

    def options(self, **options: Unpack[OptionValues]) -> ExecutorJob[P, T]:
        """The same job with other options, those of :meth:`Executor.options`; what is not given stays."""
        job = ExecutorJob(self.executor, self.fn, _options(self._options, **options))
        job._submitted = self._submitted  # worker processes find that one by its name
        return job

    def __reduce__(self) -> str:
        # By reference, as functions are pickled: the module's name for it leads here, not to the function.
        return self.__qualname__

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.__qualname__}>"


def _results(futures: list[FutureProxy[T]], deadline: float | None) -> Iterator[T]:
    """The results in order; those not needed any more, by an error or a closed iterator, are cancelled."""
    futures.reverse()
    try:
        while futures:
            # The last reference, so that a result lives no longer than the one who asked wants it.
            yield _result_or_cancel(futures.pop(), None if deadline is None else deadline - time.monotonic())
    finally:
        for future in futures:
            future.cancel()


def _result_or_cancel(future: FutureProxy[T], timeout: float | None) -> T:
    try:
        return future.result(timeout)
    finally:
        future.cancel()  # it was late, if this has any effect
