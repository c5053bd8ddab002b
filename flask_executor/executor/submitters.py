"""What submits: the methods that an executor has, an executor with options, and a function that is a job."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from flask_executor.executor.options import OptionValues, checked_key, delayed, job_options
from flask_executor.futures import FutureProxy
from flask_executor.helpers import callable_name
from flask_executor.jobs.model import JobOptions

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session
    from typing_extensions import Unpack

    from flask_executor.executor.extension import Executor

P = ParamSpec("P")
T = TypeVar("T")


class Submitter:
    """The ways to start jobs: of an executor, and of one with options for the next jobs."""

    _options: JobOptions
    #: The work: methods of the executor.
    _submit: Callable[..., FutureProxy[Any]]
    _submit_after_commit: Callable[..., FutureProxy[Any]]
    _result_or_202: Callable[..., Any]
    _map: Callable[..., Iterator[Any]]

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """Run ``fn(*args, **kwargs)`` in the background.

        :param fn: the function; an ``async def`` one runs as the app runs its async views.
        :return: the handle of the job.
        :raises TypeError: if ``fn`` cannot be called.
        :raises AppNotFound: if there is no app context and not exactly one app is bound.
        :raises QueueFull: if ``EXECUTOR_MAX_PENDING`` jobs wait.
        :raises ExecutorShutdown: after :meth:`shutdown`.
        """
        return self._submit(self._options, fn, args, kwargs)

    def submit_stored(
        self, /, future_key: Hashable, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> FutureProxy[T]:
        """As :meth:`submit`, with the handle kept in :attr:`futures` under a key.

        :param future_key: the key, free again when it was popped from :attr:`futures`.
        :raises KeyExists: if the key is taken (a :exc:`ValueError`); ``fn`` does not run.
        """
        return self._submit(self._with_key(future_key), fn, args, kwargs)

    def submit_once(self, /, key: Hashable, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """The job under this key, started now if there is none.

        However often and from however many threads this is called, ``fn`` runs once, until the key is popped or the
        record has expired; with a shared store from however many processes. Also a job that has failed is found;
        ``options(again=True).submit_once(...)`` starts it anew.
        """
        return self._submit(self._with_key(key), fn, args, kwargs, once=True)

    def submit_later(self, /, seconds: float, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """As :meth:`submit`, with a job that does not start before ``seconds`` have passed; it is queued until then.

        With type ``rq``, ``celery`` or ``dask`` it waits there, and does not need this process. With ``thread`` and
        ``process`` it waits in the memory of this process, and is cancelled when that ends. With ``immediate`` it does
        not wait.

        :raises ValueError: for a number of seconds that cannot be used.
        """
        return self._submit(delayed(self._options, seconds), fn, args, kwargs)

    def submit_after_commit(
        self, /, session: Session | scoped_session[Any], fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> FutureProxy[T]:
        """As :meth:`submit`, but the job starts when a session of SQLAlchemy has committed, and not if it rolls back.

        .. code-block:: python

            @app.post("/orders")
            def order():
                order = Order(**request.form)
                db.session.add(order)
                db.session.flush()      # gives it its id
                executor.submit_after_commit(db.session, send_receipt, order.id)
                db.session.commit()     # starts the job
                return "thanks", 201

        It starts at the end of the outermost transaction that the session is in, or else begins now, so that it finds
        in the database what was committed; several start in the order of these calls. When that transaction is rolled
        back, or the savepoint in which this was called, or the session is closed or thrown away, the job is cancelled
        and its key is free.

        All but the start happens now: the contexts are captured, a place in the queue and the key are taken, and what
        goes to a worker process is pickled. So what can be refused is refused while it can still be rolled back, and
        ``commit()`` raises nothing on account of a job. What goes wrong there all the same, with a broker that cannot
        be reached, say, is logged, and the job is cancelled.

        :param session: a :class:`sqlalchemy.orm.Session`, or a ``scoped_session`` such as ``db.session`` of
            Flask-SQLAlchemy.
        :return: the handle of the job, ``queued`` until then. To wait for it before the commit is to wait for ever;
            :meth:`wait` and :func:`~flask_executor.testing.drain` do not.
        :raises TypeError: for what is no session.
        :raises RuntimeError: for a session that begins no transactions by itself, and is in none.
        :raises MissingExtra: without SQLAlchemy.
        :raises NotPicklable: for a job that cannot be sent to a worker process.
        """
        return self._submit_after_commit(self._options, session, fn, args, kwargs)

    def result_or_202(self, /, key: Hashable, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of the job under this key, started now if there is none; in a view.

        .. code-block:: python

            @app.get("/reports/<month>")
            def report(month):
                pages = executor.result_or_202(f"report {month}", render, month)
                return render_template("report.html", pages=pages)

        While there is no result the view goes no further, and the request is answered with a 202: browsers get a page
        that shows how the job goes on, and becomes the view's own when it is done; other clients a document in JSON.
        When the job has failed they get that with an error's status, and can have it run again. In answer to a POST
        browsers are sent to the job's page of the :class:`~flask_executor.web.Controller`.

        :raises HTTPException: the answer, while there is no result; with the job's exception as its cause.
        :raises RuntimeError: outside of a request, and for a POST where no controller is mounted.
        """
        options = self._with_key(key)
        return self._result_or_202(options, fn, args, kwargs)  # type: ignore[no-any-return]

    def map(
        self, /, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """As the built-in :func:`map`, with the calls running at the same time, each in contexts of its own.

        All calls are submitted at once; the results come in order.

        :param timeout: most seconds to wait for the results, counted from this call.
        :param chunksize: calls per job. For many short calls a larger one is faster; type ``immediate`` ignores it.
        :raises concurrent.futures.TimeoutError: from the iterator, when a result is not there in time.
        :raises QueueFull: when not all calls fit; those that have not started are cancelled.
        :raises ValueError: with a key in the options: it can belong to one job only.
        """
        if self._options.key is not None:
            raise ValueError(f"map() starts many jobs, which cannot all have the key {self._options.key!r}")
        return self._map(self._options, fn, iterables, timeout, chunksize)

    def _with_key(self, key: Hashable) -> JobOptions:
        return replace(self._options, key=checked_key(key))


class ExecutorWithOptions(Submitter):
    """An executor with options for the next jobs; what :meth:`Executor.options` returns.

    With a key in the options :meth:`submit` and its relatives do what :meth:`submit_stored` does.
    """

    def __init__(self, executor: Executor, options: JobOptions) -> None:
        self._options = options
        self._submit = executor._submit
        self._submit_after_commit = executor._submit_after_commit
        self._result_or_202 = executor._result_or_202
        self._map = executor._map


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
        job = ExecutorJob(self.executor, self.fn, job_options(self._options, **options))
        job._submitted = self._submitted  # worker processes find that one by its name
        return job

    def __reduce__(self) -> str:
        # By reference, as functions are pickled: the module's name for it leads here, not to the function.
        return self.__qualname__

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.__qualname__}>"


def results_in_order(futures: list[FutureProxy[T]], deadline: float | None) -> Iterator[T]:
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
