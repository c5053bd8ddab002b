"""The Flask extension."""

from __future__ import annotations

import concurrent.futures
import gc
import inspect
import re
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from flask import Flask, request_started

from flask_executor.abc import Health, JobRecords
from flask_executor.exceptions import AppNotFound
from flask_executor.executor.after_commit import commits_of
from flask_executor.executor.app_executor import AppExecutor
from flask_executor.executor.config import Config
from flask_executor.executor.flow import Flow
from flask_executor.executor.options import (
    Errors,
    OptionValues,
    _check_callable,
    _check_importable,
    _checked_key,
    _delayed,
    _options,
)
from flask_executor.executor.shutdown import exit_on_sigterm
from flask_executor.executor.submitters import ExecutorJob, ExecutorWithOptions, _results
from flask_executor.futures import FutureCollection, FutureProxy, propagate_exceptions_callback
from flask_executor.helpers import InstanceProxy
from flask_executor.helpers.fork_hooks import after_fork_in_child, run_missed_hooks
from flask_executor.jobs.contexts import CapturedContext, current_app_or_none
from flask_executor.jobs.model import JobOptions
from flask_executor.services.definition import Service, ServiceDefinition
from flask_executor.services.registry import ServiceHandle, Services
from flask_executor.web.pages import job_owner, register_pages
from flask_executor.web.waiting import is_retry_request, require_request, result_or_answer, store_errors_as_503

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session
    from typing_extensions import Unpack

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[[], object])
H = TypeVar("H", bound=Callable[[Any], object])

__all__ = ["Executor", "ExecutorJob", "ExecutorWithOptions", "propagate_exceptions_callback"]


_BINDINGS = "flask_executor_bindings"  # in app.extensions: what each executor has there
_executors: weakref.WeakSet[Executor] = weakref.WeakSet()


class Executor(InstanceProxy, concurrent.futures.Executor):
    """Runs functions in the background, in copies of the contexts they were submitted from.

    .. code-block:: python

        app = Flask(__name__)
        executor = Executor(app)

        @app.post("/reports")
        def start():
            executor.submit_stored("report", render, request.form["month"])
            return "started", 202

    It stands in front of one backend per app: ``isinstance(executor, ThreadPoolExecutor)`` is true for type
    ``thread``, and attributes it lacks itself are the backend's.

    :param app: the app to bind at once, as :meth:`init_app` does.
    :param name: letters, digits and underscores; tells several executors of one app apart, and is the prefix
        of their config keys.
    :raises ValueError: for another name.
    :raises ConfigError: for a value in ``app.config`` that cannot be used.
    """

    def __init__(self, app: Flask | None = None, name: str = "") -> None:
        if not re.fullmatch(r"\w*", name, re.ASCII):
            raise ValueError(f"the executor's name is {name!r}; it may only have letters, digits and underscores")
        self.name = name
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        self._default_done_callbacks: list[Callable[[concurrent.futures.Future[Any]], object]] = []
        self._worker_initializers: list[Callable[[], object]] = []
        self._defaults = JobOptions()
        #: What lives in processes of its own, and what the app does with messages from there.
        self.services: dict[str, ServiceDefinition] = {}
        self.handlers: dict[tuple[str, str], Callable[[Any], object]] = {}
        _executors.add(self)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Bind an app: read its config and register as ``app.extensions[name + "executor"]``.

        Any number of apps can be bound. Binding one again reads its config anew; jobs that were accepted go on.

        :raises ConfigError: for a value in ``app.config`` that cannot be used.
        :raises ValueError: for an app that has another executor of the same name, unless that was shut down.
        """
        config = Config.read(app.config, self.name)
        # The app owns what is bound to it, so that an app that is thrown away takes its jobs and threads along.
        bindings: dict[Executor, AppExecutor] = app.extensions.setdefault(_BINDINGS, {})
        self._check_name(bindings)
        if self in bindings:
            bindings[self].reconfigure(config)
        else:
            bindings[self] = AppExecutor(self, app, config, self._default_done_callbacks, self._worker_initializers)
            self._apps.add(app)
        app.extensions[f"{self.name}executor"] = self
        register_pages(app, self, bindings[self])
        if self.services:
            request_started.connect(bindings[self].start_services, app)

    def _check_name(self, bindings: Mapping[Executor, AppExecutor]) -> None:
        """Urls and stores tell the executors of an app apart by their names."""
        others = [(executor.name, binding) for executor, binding in bindings.items() if executor is not self]
        if any(name == self.name and not binding.closed for name, binding in others):
            raise ValueError(
                f"the app has an executor named {self.name!r} already: use that one, or tell them apart by a name: "
                "Executor(app, name='reports')"
            )

    # ---- submitting ----

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """Run ``fn(*args, **kwargs)`` in the background.

        :param fn: the function; an ``async def`` one runs as the app runs its async views.
        :return: the handle of the job.
        :raises TypeError: if ``fn`` cannot be called.
        :raises AppNotFound: if there is no app context and not exactly one app is bound.
        :raises QueueFull: if ``EXECUTOR_MAX_PENDING`` jobs wait.
        :raises ExecutorShutdown: after :meth:`shutdown`.
        """
        return self._submit(self._defaults, fn, args, kwargs)

    def submit_stored(
        self, /, future_key: Hashable, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> FutureProxy[T]:
        """As :meth:`submit`, with the handle kept in :attr:`futures` under a key.

        :param future_key: the key, free again when it was popped from :attr:`futures`.
        :raises KeyExists: if the key is taken (a :exc:`ValueError`); ``fn`` does not run.
        """
        return self._submit(replace(self._defaults, key=_checked_key(future_key)), fn, args, kwargs)

    def submit_once(self, /, key: Hashable, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """The job under this key, started now if there is none.

        However often and from however many threads this is called, ``fn`` runs once, until the key is popped or the
        record has expired; with a shared store from however many processes. Also a job that has failed is found;
        ``options(again=True).submit_once(...)`` starts it anew.
        """
        return self._submit(replace(self._defaults, key=_checked_key(key)), fn, args, kwargs, once=True)

    def submit_later(self, /, seconds: float, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> FutureProxy[T]:
        """As :meth:`submit`, with a job that does not start before ``seconds`` have passed; it is queued until then.

        With type ``rq``, ``celery`` or ``dask`` it waits there, and does not need this process. With ``thread`` and
        ``process`` it waits in the memory of this process, and is cancelled when that ends. With ``immediate`` it does
        not wait.

        :raises ValueError: for a number of seconds that cannot be used.
        """
        return self._submit(_delayed(self._defaults, seconds), fn, args, kwargs)

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
        return self._submit_after_commit(self._defaults, session, fn, args, kwargs)

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
        options = replace(self._defaults, key=_checked_key(key))
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
        """
        return self._map(self._defaults, fn, iterables, timeout, chunksize)

    def options(
        self,
        *,
        name: str | None = None,
        key: Hashable | None = None,
        owner: str | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        backoff: float | None = None,
        retry_on: Errors | None = None,
        no_retry_on: Errors | None = None,
        priority: int | None = None,
        again: bool | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> ExecutorWithOptions:
        """The same executor with options for the jobs submitted through it.

        .. code-block:: python

            executor.options(name="monthly report", owner=current_user.id, timeout=60).submit(render, "may")
            executor.options(retries=3, backoff=1.0, retry_on=ConnectionError).submit(fetch, url)

        :param name: what to call the job, instead of its function's name.
        :param key: keep the handle under this key, as :meth:`submit_stored` does.
        :param owner: whose job it is.
        :param timeout: seconds that it may run, each time; then it has to leave as if it was asked to stop, and its
            result is a :exc:`~flask_executor.JobTimeout`. None for ``EXECUTOR_TIMEOUT``, ``math.inf`` for no limit.
        :param retries: how often it is run again, at most, when it fails.
        :param backoff: seconds to wait before the first retry, and twice as long before each further one, less a
            random part.
        :param retry_on: the exceptions after which it is run again; all by default.
        :param no_retry_on: those of them after which it is not.
        :param priority: higher ones start first, those alike in the order of submission; 0 by default.
        :param again: whether a job under the same key that has failed, was stopped or is lost makes room for this one.
        :param meta: what is to be known of the job from the beginning, as ``current_job.update(**meta)`` reports it.
        :raises ValueError: for a number that cannot be used.
        """
        return ExecutorWithOptions(
            self,
            _options(
                self._defaults,
                name=name,
                key=key,
                owner=owner,
                timeout=timeout,
                retries=retries,
                backoff=backoff,
                retry_on=retry_on,
                no_retry_on=no_retry_on,
                priority=priority,
                again=again,
                meta=meta,
            ),
        )

    @overload
    def job(self, fn: Callable[P, T], /) -> ExecutorJob[P, T]: ...

    @overload
    def job(
        self, fn: None = None, /, **options: Unpack[OptionValues]
    ) -> Callable[[Callable[P, T]], ExecutorJob[P, T]]: ...

    def job(self, fn: Any = None, /, **options: Any) -> Any:
        """Decorator: give a function ``submit`` and its relatives, ``map`` and ``options``.

        It stays an ordinary function otherwise. Works before and after :meth:`init_app`.

        .. code-block:: python

            @executor.job(timeout=30, retries=3)
            def render(month): ...

            render("may")                          # here and now
            render.submit("may")                   # in the background
            render.submit_stored("report", "may")

        :param options: those of :meth:`options`, but ``key``.
        :raises TypeError: for what cannot be called, and where jobs run in other processes for a function
            that they cannot import.
        """
        if "key" in options:
            raise TypeError("a key can belong to one job only: give it to submit_stored() or options()")
        given = _options(self._defaults, **options)

        def decorate(fn: Any) -> Any:
            _check_callable(fn)
            if any(binding.remote for _, binding in self._bound()):
                _check_importable(fn)
            return ExecutorJob(self, fn, given)

        return decorate if fn is None else decorate(fn)

    def worker_init(self, fn: F) -> F:
        """Decorator: call ``fn`` in each worker process before its first job, in an app context; for type ``process``.

        .. code-block:: python

            @executor.worker_init
            def load():
                global model
                model = joblib.load("model.joblib")      # once per process, and not for every job

        When it raises, a job that waits gets that error. Workers that are there already do not call it.

        :raises TypeError: if ``fn`` cannot be called.
        """
        _check_callable(fn)
        self._worker_initializers.append(fn)
        return fn

    def flow(self, key: Hashable) -> Flow:
        """The steps that were done under this key, to be remembered from one request to the next.

        .. code-block:: python

            flow = executor.flow(f"order {id}")
            order = flow.step(load, id)      # runs at the first request, and is recalled at later ones
            flow.step(reserve, order)
            flow.reset()                     # forgets, so that all runs again

        """
        return Flow(self._binding()[1], _checked_key(key), self._result_or_202, self._options_of)

    def service(
        self,
        cls: type[Service],
        *args: Any,
        workers: int = 1,
        name: str | None = None,
        per: str = "app",
        max_pending: int = 100_000,
    ) -> ServiceHandle:
        """Have a :class:`Service` live in worker processes beside the app.

        .. code-block:: python

            model = executor.service(Model, "model.joblib", workers=2)

            model.call("predict", x, timeout=5).result()    # one of the workers
            model.send("learn", x)                          # nobody waits for it
            model.broadcast("reload")                       # every worker

        The processes are started at the app's first request, or when the service is first used. One that dies is
        started again. So that they end in order, ``SIGTERM`` then raises :exc:`SystemExit` in the main thread, if it
        has no handler.

        :param args: what ``cls`` is made with, in each worker process.
        :param workers: how many processes.
        :param name: what it is called; by default as its class.
        :param per: ``"app"`` for one set of workers, however many processes the app has on this machine; ``"process"``
            for a set of workers in each of them.
        :param max_pending: most messages that wait; one more raises :exc:`~flask_executor.QueueFull`.
        :raises TypeError: for what is no :class:`Service`.
        :raises ValueError: for a name that another service has, and numbers that cannot be used.
        """
        if not (isinstance(cls, type) and issubclass(cls, Service)):
            raise TypeError(f"{cls!r} is no service: it must be a subclass of flask_executor.Service")
        name = name or cls.__name__
        if per not in ("app", "process"):
            raise ValueError(f"per is {per!r}; it must be 'app' or 'process'")
        for what, number in (("workers", workers), ("max_pending", max_pending)):
            if number < 1:
                raise ValueError(f"{what} is {number}; it must be 1 or more")
        definition = ServiceDefinition(name=name, cls=cls, args=args, workers=workers, per=per, max_pending=max_pending)
        if self.services.setdefault(name, definition) != definition:  # a factory may be called again
            raise ValueError(f"there is another service {name!r} already; give another name: service(..., name=...)")
        exit_on_sigterm()
        for app, binding in self._bound():
            request_started.connect(binding.start_services, app)
        return ServiceHandle(name, self._services)

    def on(self, service: str | ServiceHandle | type[Service], type: str) -> Callable[[H], H]:
        """Decorator: have a function of the app handle the messages of a type that a service sends to ``self.main``.

        .. code-block:: python

            @executor.on("Model", "drifted")
            def drifted(body):
                app.logger.warning("the model drifts: %s", body)

        It is called in an app context, in the process that looks after the service, one message after the other.

        :raises ValueError: if there is another one already. A factory that is called again replaces its own.
        """
        name = service if isinstance(service, str) else service.__name__ if inspect.isclass(service) else service.name

        def decorate(fn: H) -> H:
            if not _is_made_again(fn, self.handlers.get((name, type), fn)):
                raise ValueError(f"there is a handler for {type!r} of service {name!r} already")
            self.handlers[name, type] = fn
            return fn

        return decorate

    def _services(self) -> Services:
        return self._binding()[1].services

    def add_default_done_callback(self, fn: Callable[[concurrent.futures.Future[Any]], object]) -> None:
        """Add a callback to every future made from now on, as ``future.add_done_callback(fn)`` does.

        :raises TypeError: if ``fn`` cannot be called.
        """
        _check_callable(fn)
        self._default_done_callbacks.append(fn)

    # ---- looking ----

    @property
    def app(self) -> Flask | None:
        """The app that is bound, None when there is none or several."""
        apps = list(self._apps)
        return apps[0] if len(apps) == 1 else None

    @property
    def futures(self) -> FutureCollection[FutureProxy[Any]]:
        """The handles of stored jobs, by key."""
        return self._binding()[1].tracker.futures

    @property
    def jobs(self) -> JobRecords:
        """The records of the app's jobs, also of those that have ended."""
        return self._binding()[1].tracker.records

    def health(self) -> Health:
        """How the executor is doing in this process: workers, jobs running and waiting."""
        return self._binding()[1].health()

    def unfinished(self) -> list[FutureProxy[Any]]:
        """The handles of all jobs in this process that have not ended, of all apps."""
        return [*chain.from_iterable(binding.waiting_for() for _, binding in self._bound())]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no job is left in this process, its callbacks included, of all apps, and the store knows it.

        :param timeout: most seconds to wait; None for as long as it takes.
        :return: whether that is so.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for _, binding in self._bound():
            if not binding.wait(None if deadline is None else deadline - time.monotonic()):
                return False
            if not binding.tracker.flush(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return False
        return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs, from any app. Those that were accepted still run.

        :param wait: whether to return only when they have ended.
        :param cancel_futures: whether to cancel those that have not started.
        """
        for _, binding in self._bound():
            binding.shutdown(wait, cancel_futures=cancel_futures)

    @property
    def _self(self) -> Any:
        """The backend, None where it cannot be told for which app."""
        app = current_app_or_none() or self.app
        binding = None if app is None else self._bound_to(app)
        return None if binding is None else binding.backend

    # ---- the work ----

    def _bound(self) -> list[tuple[Flask, AppExecutor]]:
        found = [(app, self._bound_to(app)) for app in list(self._apps)]
        return [(app, binding) for app, binding in found if binding is not None]

    def _bound_to(self, app: Flask) -> AppExecutor | None:
        binding: AppExecutor | None = app.extensions.get(_BINDINGS, {}).get(self)
        return binding

    def _binding(self) -> tuple[Flask, AppExecutor]:
        """The app meant and what is bound to it.

        :raises AppNotFound: saying what to do.
        """
        run_missed_hooks()
        app = current_app_or_none()
        if app is not None:
            binding = self._bound_to(app)
            if binding is None:
                raise AppNotFound(
                    f"This executor is not bound to the current app, {app.name!r}: pass the app to Executor(app), "
                    "or call executor.init_app(app) in the app's factory."
                )
            return app, binding
        apps = self._bound()
        if len(apps) > 1:
            apps.clear()  # what is referred to stays
            gc.collect()  # apps of earlier tests are cycles that nobody refers to any more
            apps = self._bound()
        if len(apps) == 1:
            return apps[0]
        if not apps:
            raise AppNotFound(
                "This executor is not bound to an app, or its app is gone: pass the app to Executor(app) or call "
                "executor.init_app(app), and keep a reference to the app."
            )
        names = ", ".join(repr(app.name) for app, _ in apps)
        raise AppNotFound(
            f"This executor is bound to {len(apps)} apps ({names}) and no app context tells which is meant: "
            "do this in a view, or inside 'with app.app_context():'."
        )

    def _submit(
        self,
        options: JobOptions,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        once: bool = False,
    ) -> FutureProxy[Any]:
        _check_callable(fn)
        app, binding = self._binding()
        if once:
            there = binding.find(options)
            if there is not None:
                return there
        context = CapturedContext(app, binding.config.push_app_context)
        submit = binding.submit_once if once else binding.submit
        return submit(context, options, fn, args, kwargs)

    def _submit_after_commit(
        self, options: JobOptions, session: Any, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> FutureProxy[Any]:
        _check_callable(fn)
        app, binding = self._binding()
        commits = commits_of(session)
        held = binding.hold(CapturedContext(app, binding.config.push_app_context), options, fn, args, kwargs)
        commits.add(held)
        return held.future

    def _options_of(self, fn: Callable[..., Any]) -> JobOptions:
        """The options that a function brings along."""
        return fn._options if isinstance(fn, ExecutorJob) else self._defaults

    def _result_or_202(
        self, options: JobOptions, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        require_request()
        if is_retry_request():
            owner = options.owner or job_owner(self.name)  # or the job's page would not be shown
            options = replace(options, again=True, owner=owner)
        options = replace(options, pinned=True)
        with store_errors_as_503():
            future = self._submit(options, fn, args, kwargs, once=True)
            return result_or_answer(self._binding()[1], future)

    def _map(
        self,
        options: JobOptions,
        fn: Callable[..., T],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        chunksize: int,
    ) -> Iterator[T]:
        if chunksize < 1:
            raise ValueError(f"chunksize is {chunksize}; it must be 1 or more")
        _check_callable(fn)
        app, binding = self._binding()
        deadline = None if timeout is None else time.monotonic() + timeout
        context = CapturedContext(app, binding.config.push_app_context)
        chunksize = chunksize if binding.chunks else 1
        jobs = binding.map(context, options, fn, zip(*iterables), chunksize)  # noqa: B905  # as map() does
        results = _results(jobs, deadline)
        return results if chunksize == 1 else chain.from_iterable(results)


def _reset_after_fork() -> None:
    for executor in list(_executors):
        for _, binding in executor._bound():
            binding.after_fork()


after_fork_in_child(_reset_after_fork)


def _is_made_again(fn: Callable[..., Any], before: Callable[..., Any]) -> bool:
    """Whether a factory that is called again has made this function, as it has made the other one before."""
    place, former = ((each.__module__, getattr(each, "__qualname__", "")) for each in (fn, before))
    return fn is before or (place == former and re.search(r"<locals>\.\w+$", place[1]) is not None)
