"""One executor in one app: the configuration read there, the backend, the store and the handles."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from werkzeug.utils import ImportStringError, import_string

from flask_executor.abc import Backend, BackendOptions, Health, JobRecords, WorkerState
from flask_executor.backends.engine.entrypoint import register
from flask_executor.backends.process.after_fork import forking, root_pid
from flask_executor.exceptions import (
    ConfigError,
    EngineUnavailable,
    ExecutorShutdown,
    KeyExists,
    MissingExtra,
    QueueFull,
    StoreUnavailable,
    Unsupported,
)
from flask_executor.executor.consumer import Consumer
from flask_executor.executor.factory import make_tracker
from flask_executor.executor.pending import DeferredCall, InFlight, ScheduledCalls
from flask_executor.executor.producer import Producer, oldest_wait
from flask_executor.executor.shutdown import register_for_shutdown
from flask_executor.futures import FutureProxy, propagate_exceptions_callback
from flask_executor.helpers import callable_name, entry_points, is_multiprocess_request, weak_callback
from flask_executor.helpers.log import logger
from flask_executor.helpers.serial_thread import get_thread_callbacks
from flask_executor.jobs.call import Call, JobChannel
from flask_executor.jobs.contexts import CALLER_CONTEXT, NO_CONTEXT, CapturedContext, call_sync, current_app_or_none
from flask_executor.jobs.current import RunningJob, running_job
from flask_executor.jobs.log_records import install_record_factory, log_failure
from flask_executor.jobs.model import Job, JobMessage, JobOptions, JobState, JobStatus
from flask_executor.jobs.packing import ChunkedFunction
from flask_executor.services.registry import Services
from flask_executor.signals import job_failed, job_finished, job_queued, job_started
from flask_executor.stores.leases import engine_holder
from flask_executor.tracking.engine_handover import EngineHandover
from flask_executor.tracking.local import JobTracker
from flask_executor.tracking.shared import SharedJobTracker
from flask_executor.web.events import WaitSlots
from flask_executor.web.status import job_document

if TYPE_CHECKING:
    from blinker import NamedSignal
    from flask import Flask

    from flask_executor.executor.config import Config

_AGAIN = 1.0  # seconds until it is looked again whether an engine is back

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Callback = Callable[[Future[Any]], object]


class AppExecutor(JobChannel):
    """What :meth:`flask_executor.Executor.init_app` makes for an app.

    The backend is made when it is first needed and belongs to this process: in the child of a fork
    :meth:`after_fork` drops it, and the jobs of the parent with it.
    """

    def __init__(
        self,
        executor: Any,
        app: Flask,
        config: Config,
        default_callbacks: Sequence[Callback],
        initializers: Sequence[Callable[[], object]],
    ) -> None:
        self._backend_class = _backend_class(config)
        self.name: str = executor.name
        self._open(config, app)
        self.unfinished = InFlight()
        self._executor = executor
        self._app = weakref.ref(app)
        self._default_callbacks = default_callbacks
        self._backend: Backend | None = None
        self._lock = threading.RLock()
        self._key_lock = threading.RLock()  # who has it may wait for the store
        self._warned = False
        self._waiting = ScheduledCalls()
        self._held: weakref.WeakSet[DeferredCall] = weakref.WeakSet()
        self.initializers = initializers
        self.services = self._make_services()
        self._set_config(config)
        install_record_factory(running_job)

    def _open(self, config: Config, app: Flask) -> None:
        """Open the store; and for an engine, both ends of it."""
        engine = self._backend_class.engine
        beside = self._backend_class.default_store(config.backend_options(weakref.ref(app)))
        self.tracker: JobTracker = make_tracker(config, app, self, engine, beside)
        self.producer: Producer | None = None
        self.consumer: Consumer | None = None
        if isinstance(self.tracker, SharedJobTracker) and engine is not None:
            handover = self.tracker.handover = EngineHandover(self.tracker, engine_holder(engine))
            self.producer = Producer(self, self.tracker, handover)
            self.consumer = Consumer(self, self.tracker, handover)
            register(app, self.name, self.consumer)

    def _set_config(self, config: Config) -> None:
        self._backend_class = _backend_class(config)
        self.config = config
        self.tracker.reconfigure(config.tracking_options())
        self.wait_slots = WaitSlots(config.events_max)
        self._own_callbacks: Sequence[Callback] = (
            (propagate_exceptions_callback,) if config.propagate_exceptions else ()
        )
        self._closed = False

    def reconfigure(self, config: Config) -> None:
        """Take another configuration. Handles and records stay; jobs that were accepted end on the old backend.

        The store stays what it is.
        """
        if config == self.config and not self._closed:
            return
        with self._lock:
            if self._closed:
                self.services = self._make_services()
            former = self._change_engine(config)
            self._set_config(config)
            backend, self._backend = self._backend, None
        if backend is not None:
            backend.shutdown(wait=False)
        if former is not None:
            former.close(wait=False)

    def _change_engine(self, config: Config) -> JobTracker | None:
        """Where jobs are recorded depends on whose they are, an engine's or ours; the former ledger, if it changes."""
        app, backend_class = self.app, _backend_class(config)
        if backend_class.engine == self._backend_class.engine or app is None:
            return None
        left = self.waiting_for()
        if left:
            allowed = f"what it was until {_names(left)} have ended: call shutdown()"
            raise ConfigError(config.key("EXECUTOR_TYPE"), config.type, allowed)
        former, self._backend_class = self.tracker, backend_class
        self._open(config, app)
        return former

    @property
    def backend(self) -> Backend:
        """The backend of this process, made now if there was none."""
        backend = self._backend
        if backend is None:
            with self._lock:
                backend = self._backend
                if backend is None:
                    register_for_shutdown(self)
                    self._warn_of_late_settings()
                    options = self.config.backend_options(self._app, self.initializers)
                    if self.tracker.handover is not None:
                        options = replace(options, refuse=weak_callback(self.tracker.handover.refuse))
                    backend = self._backend_class(replace(options, start=_starter(self)))
                    if self._closed:
                        backend.shutdown()
                    self._backend = backend
        return backend

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells the app, and this executor of it, from others on this machine."""
        app = self.app
        if app is None:
            return self.name, self.config.store
        where = app.name, app.root_path, app.instance_path
        # Tests have nothing to do with a server that runs beside them, nor with each other.
        return self.name, self.config.store, where, app.secret_key, root_pid() if app.testing else None

    def register_for_shutdown(self) -> None:
        """See to it that jobs and services end before the process does."""
        register_for_shutdown(self)

    def start_services(self, sender: object, **_: object) -> None:
        """A request has come: this process is one that serves, and no reloader or master."""
        try:
            self.services.start()
        except Exception:  # the request is not to blame, and whoever uses a service gets it as well
            logger.exception("The services cannot be started.")

    def _make_services(self) -> Services:
        return Services(self, self.worker_options, self._executor.services, self._executor.handlers)

    def worker_options(self) -> BackendOptions:
        """What worker processes are made from."""
        return self.config.backend_options(self._app, self.initializers)

    @property
    def app(self) -> Flask | None:
        """The app, None when it is gone."""
        return self._app()

    @property
    def remote(self) -> bool:
        """Whether jobs run in other processes."""
        return self._backend_class.remote

    @property
    def chunks(self) -> bool:
        """Whether :meth:`map` can put several calls into one job."""
        return self._backend_class.chunks

    @property
    def closed(self) -> bool:
        """Whether it was shut down."""
        return self._closed

    # ---- submitting ----

    def submit(
        self, context: CapturedContext, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> FutureProxy[Any]:
        """Start a job in these contexts; with a key in the options its handle is kept under it.

        :raises KeyExists: if the key is taken.
        :raises QueueFull: if too many jobs wait.
        :raises ExecutorShutdown: after :meth:`shutdown`.
        """
        return self._start(self._accept(context, options, fn, args, kwargs))

    def _accept(
        self, context: CapturedContext, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Call:
        if options.key is None:
            return self._prepare(context, options, fn, args, kwargs, self._limit())
        _, call = self._take_key(options, lambda: self._prepare(context, options, fn, args, kwargs, self._limit()))
        if call is None:
            raise KeyExists(options.key)
        return call

    def hold(
        self, context: CapturedContext, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> DeferredCall:
        """Accept a job as :meth:`submit` does, for somebody else to start or to drop.

        Whatever can be wrong with it is raised now; when it is started nobody could do anything about it.
        """
        call = self._accept(context, options, fn, args, kwargs)
        try:
            self.unfinished.hold(call.future)
            self.backend.pack(call)
            self._announce(call)
            if self.producer is not None:
                self.producer.keep(call)
        except BaseException as error:
            self._refuse(call.future, error)
        held = DeferredCall(call, self._start_held, self._drop, self.tracker.in_background)
        self._held.add(held)
        return held

    def _start_held(self, call: Call, *, again: bool = False) -> None:
        if Future.done(call.future):  # cancelled meanwhile
            return
        self.unfinished.release(call.future)
        try:
            call.backend = self.backend
            if self.producer is None:
                call.backend.enqueue(call)
            else:
                self.producer.send_kept(call)
        except EngineUnavailable as error:  # but the job was accepted, and has to start when the engine is back
            if not again:
                logger.warning("Job %s (%s) was to start after a commit, and waits: %s", *_called(call), error)
            error.__traceback__ = None  # which has the transaction
            self._waiting.add(
                call, error, _AGAIN, lambda: self.tracker.in_background(lambda: self._start_held(call, again=True))
            )
        except Exception:  # whoever has committed is not to blame, and must not believe that it went wrong
            logger.exception("Job %s (%s) was to start after a commit, and cannot.", *_called(call))
            self._drop(call)

    def _drop(self, call: Call) -> None:
        """Cancel a job that was to start later; its key is free, when the store is there."""
        try:
            if call.future.cancel():
                self.release_failed_key(call.job.id)
        except StoreUnavailable as error:
            logger.info("Job %s (%s) is cancelled when the store is back: %s", *_called(call), error)
            self._waiting.add(call, error, _AGAIN, lambda: self.tracker.in_background(lambda: self._drop(call)))
        except Exception:
            logger.exception("Job %s (%s) could not be cancelled.", *_called(call))

    def submit_once(
        self, context: CapturedContext, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> FutureProxy[Any]:
        """The job under the key in the options, started if there is none."""
        there, call = self._take_key(options, lambda: self._prepare(context, options, fn, args, kwargs, self._limit()))
        return there if call is None else self._start(call)

    def run_once(self, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs) -> FutureProxy[Any]:
        """The job under the key in the options; if there is none it is run here and now, in the caller's contexts."""
        there, call = self._take_key(options, lambda: self._prepare(CALLER_CONTEXT, options, fn, args, kwargs, None))
        if call is not None:
            register_for_shutdown(self)
            self.tracker.add(call)
            with there.retrieving():  # by whoever has called this, and gets what it raises
                call.run()
        return there

    def call(self, backend: Backend, options: JobOptions, fn: Callable[..., Any], args: Args) -> FutureProxy[Any]:
        """Start a job of a service, without contexts, on the backend of that."""
        call = self._prepare(NO_CONTEXT, options, fn, args, {}, None, uncounted=True)
        return self._start(call, backend)

    def find(self, options: JobOptions) -> FutureProxy[Any] | None:
        """The job under the key in the options; None when one would be started now."""
        return self.tracker.find(options)

    def _take_key(self, options: JobOptions, prepare: Callable[[], Call]) -> tuple[FutureProxy[Any], Call | None]:
        """The handle under the key in the options; and the call to start, if it was not there already."""
        self._warn_of_memory()
        with self._key_lock:  # of many who ask at once only one takes a place in the queue
            if not self.tracker.shared:  # where to look costs as much as to take it
                there = self.tracker.find(options)
                if there is not None:
                    return there, None
            call = prepare()
            try:
                there = self.tracker.take(call)
            except BaseException:
                self.unfinished.discard(call.future)
                raise
            if there is not None:
                self.unfinished.discard(call.future)
                return there, None
            return call.future, call

    def _warn_of_memory(self) -> None:
        if self.tracker.shared or self._warned or not is_multiprocess_request():
            return
        self._warned = True
        logger.warning(
            "This server has several processes, and each keeps its jobs to itself: the next request may reach one that "
            "does not know this job. Set %s to 'sqlite' (or 'redis://...'), and every process sees every stored job.",
            self.config.key("EXECUTOR_STORE"),
        )

    def _warn_of_late_settings(self) -> None:
        app = self.app
        changed = [] if app is None else self.config.changed(app.config)
        if changed:
            logger.warning(
                "%s changed in app.config after the executor had read it, and what it was then is used. Set it before "
                "Executor(app), or call executor.init_app(app) again.",
                " and ".join(changed),
            )

    def map(
        self,
        context: CapturedContext,
        options: JobOptions,
        fn: Callable[..., Any],
        calls: Iterable[Args],
        chunksize: int,
    ) -> list[FutureProxy[Any]]:
        """Start a job for every set of arguments; with a chunksize, for so many together, each giving a list.

        When one is refused, those that have not started are cancelled.
        """
        if chunksize > 1:
            options = replace(options, name=options.name or callable_name(fn))
            fn = ChunkedFunction(fn, context)
            items = iter(calls)
            calls = ((chunk,) for chunk in iter(lambda: tuple(islice(items, chunksize)), ()))
        futures: list[FutureProxy[Any]] = []
        try:
            for args in calls:
                futures.append(self.submit(context, options, fn, args, {}))  # noqa: PERF401  # cancelled below
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return futures

    def _prepare(
        self,
        context: Any,
        options: JobOptions,
        fn: Callable[..., Any],
        args: Args,
        kwargs: Kwargs,
        limit: int | None,
        *,
        uncounted: bool = False,
    ) -> Call:
        if self._closed and not uncounted:  # jobs that go on when the process ends may still use services
            raise ExecutorShutdown(
                "cannot schedule new futures after shutdown: this executor was shut down in this process"
            )
        if options.timeout is None:
            if self.config.timeout is not None and not uncounted:
                options = replace(options, timeout=self.config.timeout)
        elif options.timeout == math.inf:
            options = replace(options, timeout=None)
        if not uncounted:
            self._check_supported(options)
        job = JobState(options.name or callable_name(fn), options.key, options.owner)
        if options.meta is not None:
            job.meta = dict(options.meta)
        if self.producer is not None and not uncounted and context is not CALLER_CONTEXT:
            return self.producer.prepare(job, fn, args, kwargs, context, options)
        future: FutureProxy[Any] = FutureProxy(job, self)
        call = Call(future, job, fn, args, kwargs, context, self, options)
        if not self.unfinished.add(call, limit, uncounted=uncounted):
            raise QueueFull(self.config.key("EXECUTOR_MAX_PENDING"), self.config.max_pending or 0)
        return call

    def _check_supported(self, options: JobOptions) -> None:
        backend = self._backend_class
        for asked, supported, what in (
            (options.priority, backend.supports_priority, "give jobs a priority"),
            (options.delay, backend.supports_delay, "start jobs later"),
        ):
            if asked and not supported:
                key = self.config.key("EXECUTOR_TYPE")
                raise Unsupported(f"{backend.__name__} ({key}) cannot {what}: leave that out, or choose another type")

    def waiting_for(self) -> list[FutureProxy[Any]]:
        """The handles of this process whose jobs have not ended, oldest first."""
        sent = [] if self.producer is None else self.producer.unfinished()
        return [*self.unfinished.all(), *sent]

    def wait(self, timeout: float | None) -> bool:
        """Wait until there is none left, at most so many seconds; whether that is so."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self.unfinished.wait(timeout):
            return False
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return self.producer is None or self.producer.wait(left)

    def _limit(self) -> int | None:
        pending = self.config.max_pending
        if pending is None or self.producer is not None or self.backend.capacity is None:
            return None
        return self.backend.capacity + pending

    def _start(self, call: Call, backend: Backend | None = None) -> FutureProxy[Any]:
        future = call.future
        try:
            self._announce(call)
            call.backend = backend or self.backend
            if call.delay and call.backend.engine is None and call.backend.capacity is not None:
                self._start_later(call)
            elif self.producer is not None and self.producer.owns(future):
                self.producer.send(call)
            else:
                call.backend.enqueue(call)
        except BaseException as error:
            self._refuse(future, error)
        return future

    def _start_later(self, call: Call) -> None:
        error = ExecutorShutdown(f"job {call.job.name} has not started: its process has ended before its time came")
        self._waiting.add(call, error, call.delay, lambda: self._run_again(call, error))

    def _announce(self, call: Call) -> None:
        self.tracker.add(call)
        if self._own_callbacks or self._default_callbacks:
            for callback in (*self._own_callbacks, *self._default_callbacks):
                call.future.add_done_callback(callback)
        if job_queued.receivers:
            self._send(job_queued, call.job.record())

    def _refuse(self, future: FutureProxy[Any], error: BaseException) -> None:
        """A call was not accepted. Somebody may have found it by key meanwhile: end it, do not just drop it."""
        refused = self.producer is not None and self.producer.discard_refused(future)
        if not refused and not future.cancel():
            # It has run, or a worker has got it all the same: a pool that could not start one more thread.
            if isinstance(error, Exception):
                return
            raise error
        self.tracker.remove(future)
        raise error

    def worker_states(self) -> Sequence[WorkerState]:
        """The workers of this process: worker processes, and where there are none the process itself."""
        services = [worker for crew in self.services.started() for worker in crew.crew()]
        crew = () if self._backend is None else self._backend.worker_states()
        if crew or self.remote:
            return [*crew, *services]
        running = [future.job_id for future in self.unfinished.all() if future.status is JobStatus.RUNNING]
        return [
            WorkerState(pid=os.getpid(), busy=bool(running), job=running[0] if len(running) == 1 else None),
            *services,
        ]

    # ---- one job, by its id ----

    @property
    def records(self) -> JobRecords:
        """The records of the app's jobs."""
        return self.tracker.records

    @property
    def waiting_image(self) -> str | None:
        """Url of an image to show while a job runs."""
        return self.config.waiting_image

    @property
    def with_errors(self) -> bool:
        """Whether everybody may see what a job has raised."""
        return self.config.expose_errors

    def describe(self, job: Job) -> dict[str, Any]:
        """The status document of a record."""
        return job_document(job, with_error=self.with_errors)

    def document(self, id: str) -> dict[str, Any] | None:
        """The status document of a job; None when there is none."""
        job = self.tracker.records.get(id)
        return None if job is None else self.describe(job)

    def handle(self, id: str) -> FutureProxy[Any] | None:
        """The handle of a job, if it is kept somewhere."""
        for future in self.unfinished.all():
            if future.job_id == id:
                return future
        job = self.tracker.records.get(id)
        return None if job is None else self.tracker.handle(job)

    def stop_job(self, id: str) -> bool | None:
        """Ask a job to stop; False when it has ended, None when there is none."""
        future = self.handle(id)
        if future is None:
            return None if self.tracker.records.get(id) is None else False
        return future.stop()

    def release_failed_key(self, id: str) -> bool | None:
        """Free the key of a job that has failed, so that it starts anew; None when there is none."""
        job = self.tracker.records.get(id)
        if job is None:
            return None
        if job.key is None or not job.status.retryable:
            return False
        futures = self.tracker.futures
        with self._key_lock:
            there = futures.get(job.key)
            if there is None or there.job_id != id:  # somebody was faster
                return False
            futures.pop(job.key)
        return True

    # ---- the channel ----

    @property
    def channel(self) -> JobChannel:
        """What calls report to."""
        return self

    def started(self, job: JobState) -> None:
        self.tracker.changed(job)
        if job_started.receivers:
            self._tell(job_started, job)

    def reporter(self, job: JobState) -> Callable[[RunningJob], None] | None:
        return self.tracker.reporter(job)

    def progressed(self, job: JobState) -> None:
        self.tracker.changed(job)

    def pack_result(self, job: JobState, result: Any, packed: bytes | None) -> bytes | None:
        return self.tracker.pack_result(job, result, packed)

    def ended(self, job: JobState, error: BaseException | None, outcome: bytes | None) -> None:
        self.tracker.ended(job, error, outcome)
        if job.error is not None and job_failed.receivers:
            self._tell(job_failed, job)
        if job_finished.receivers:
            self._tell(job_finished, job)

    def settled(self, future: Future[Any], call_back: Callable[[], object] | None) -> None:
        if call_back is not None:
            self._run_user_code(call_back)
        callbacks = get_thread_callbacks()
        if callbacks or (self._backend is not None and self._backend.has_pending_user_code):
            self._run_user_code(lambda: self.unfinished.discard(future))  # behind what was passed there
        else:
            self.unfinished.discard(future)

    def unseen(self, job: JobState, error: BaseException) -> None:
        log_failure(self.app, job.name, job.id, job.key, error)

    def in_contexts(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        app = self.app
        if app is None:
            return fn
        context = CapturedContext(app, self.config.push_app_context)
        return lambda future: context.run(fn, future)

    def withdraw(self, future: Future[Any]) -> bool:
        call = self.unfinished.get(future)
        if call is None or self._waiting.discard(call):
            return True
        return call.backend is None or call.backend.withdraw(call)

    def stop(self, future: Future[Any], grace: float | None) -> bool:
        call = self.unfinished.get(future)
        while call is not None and not call.job.status.ended:
            if future.cancel():
                return True
            attempt = call.job.attempt
            if self._ask_to_leave(call, attempt, JobStatus.STOPPED):
                self._force_after(self._grace(call) if grace is None else grace, call, attempt)
                return True
        return False

    def deliver(self, future: Future[Any], message: JobMessage) -> bool:
        call = self.unfinished.get(future)
        if call is None or call.job.status.ended:
            return False
        (call.backend or self.backend).deliver(call, message)
        return True

    def out_of_time(self, call: Call, attempt: int) -> None:
        if self._ask_to_leave(call, attempt, JobStatus.TIMED_OUT):
            self._force_after(self._grace(call), call, attempt)

    def _grace(self, call: Call) -> float:
        return self.config.stop_grace if call.grace is None else call.grace

    def _ask_to_leave(self, call: Call, attempt: int, reason: JobStatus) -> bool:
        """Ask a running job to leave; False when this attempt does not run any more."""
        future = getattr(call, "future", None)  # a call that has failed lets go of it
        if future is None or call.backend is None or not future.request_stop(reason, attempt):
            return False
        self.tracker.changed(call.job)
        call.backend.request_stop(call, attempt, reason)
        return True

    def _force_after(self, grace: float, call: Call, attempt: int) -> None:
        if grace:
            call.call_later(grace, lambda: self._force(call, attempt))
        else:
            self._force(call, attempt)

    def _force(self, call: Call, attempt: int) -> None:
        if call.job.status is JobStatus.RUNNING and call.job.attempt == attempt and call.backend is not None:
            call.backend.kill(call, attempt)

    def retry(self, call: Call, error: BaseException, delay: float) -> None:
        if call.future.done():  # cancelled in the instant in which it was queued again
            return
        if self.consumer is not None and self.consumer.postpone(call, delay):
            return
        self.tracker.changed(call.job)
        if self._backend is None or self._backend.capacity is None:
            self._run_again(call, error)
            return
        self._waiting.add(call, error, delay, lambda: self._run_again(call, error))
        if self._closed and self._waiting.discard(call):  # shutdown() gave up those that waited before
            call.fail_finally(error)

    def _run_again(self, call: Call, error: BaseException) -> None:
        try:
            call.backend = self.backend
            call.backend.enqueue(call)
        except ExecutorShutdown:
            call.fail_finally(error)
        except Exception as refused:
            call.fail_finally(refused)

    def _tell(self, signal: NamedSignal, job: JobState) -> None:
        record = job.record()
        self._run_user_code(lambda: self._send(signal, record))

    def _run_user_code(self, fn: Callable[[], object]) -> None:
        backend, callbacks = self._backend, get_thread_callbacks()
        if callbacks is not None:  # as in the threads that look after worker processes
            callbacks.run(fn)
        elif backend is not None:
            backend.run_user_code(fn)
        else:
            fn()

    def _send(self, signal: NamedSignal, record: Job) -> None:
        app = self.app
        receivers = list(signal.receivers_for(self._executor))
        if receivers and app is not None and current_app_or_none() is not app:  # for a job in another process, say
            try:
                with app.app_context():
                    self._send(signal, record)
            except Exception:  # a receiver of Flask's own signals; the job must be settled all the same
                logger.exception("%s could not be sent for job %s.", signal.name, record.id)
            return
        for receiver in receivers:
            try:
                call_sync(receiver, (self._executor,), {"job": record})
            except Exception:
                logger.exception("A receiver of %s failed for job %s (%s).", signal.name, record.name, record.id)

    # ---- life ----

    def health(self) -> Health:
        """How it is doing now."""
        jobs = [future.record() for future in self.unfinished.all()]
        waiting = [job for job in jobs if job.status == JobStatus.QUEUED]
        health = Health(
            workers=self._backend.workers if self._backend and self.producer is None else 0,
            busy=sum(job.status == JobStatus.RUNNING for job in jobs),
            waiting=len(waiting),
            oldest_wait=oldest_wait(waiting),
            store_reachable=self._store_is_reachable(),
            accepting=not self._closed,
            services=self.services.statuses(),
        )
        return health if self.producer is None else self.producer.health(health)

    def _store_is_reachable(self) -> bool:
        try:
            self.tracker.check()
        except StoreUnavailable as error:
            logger.info("%s", error)
            return False
        return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs, and let those that were accepted end."""
        if self.producer is not None and wait and not cancel_futures and not self._closed:
            self.producer.check_workers()
        self._close(wait=wait, cancel_futures=cancel_futures)
        if wait:
            self.wait(None)
        self.services.close(wait=wait)  # after the jobs, which may use them
        self.tracker.close(wait=wait)

    def _close(self, *, wait: bool, cancel_futures: bool = False) -> None:
        with self._lock:
            self._closed = True
            backend = self._backend
        for call, error in self._waiting.clear():
            if self.producer is not None or call.future.cancelled():  # it waits for the engine, or the store
                self._drop(call)
            elif call.job.attempt > 1 or not call.future.cancel():
                call.fail_finally(error)
        if self.consumer is not None:
            self.consumer.close(wait=wait)
        for held in list(self._held):
            if held.waits and not Future.done(held.future):
                left = _names([held.future])
                logger.warning("The executor is shut down, and %s does not wait for a commit any more.", left)
            held.drop()
        if self.producer is not None and cancel_futures:
            self.producer.cancel_all()
        if backend is not None:
            backend.shutdown(wait=wait, cancel_futures=cancel_futures)

    def leave(self, deadline: float) -> None:
        """The process ends: let jobs end until ``deadline`` (:func:`time.monotonic`), stop them, then force them."""
        self._close(wait=False)
        left = self.unfinished.all()
        if left:
            logger.info("The process ends; %s may go on for %.0f s.", _names(left), deadline - time.monotonic())
            if not self.unfinished.wait(deadline - time.monotonic()):
                self._cut_off()
        if self._backend is not None:
            self._backend.terminate(0.0 if self.unfinished.all() else self.config.stop_grace)
        if self.consumer is not None:
            self.consumer.abandon(0.0 if self.unfinished.all() else self.config.stop_grace)
        self.services.leave(max(deadline, time.monotonic() + self.config.stop_grace))
        self.tracker.give_up(self.config.stop_grace)
        self.tracker.close(wait=False)

    def _cut_off(self) -> None:
        left = [future for future in self.unfinished.all() if not future.done()]
        logger.warning(
            "The process ends and %s did not end within %s (%g s): stopping.",
            _names(left),
            self.config.key("EXECUTOR_SHUTDOWN_TIMEOUT"),
            self.config.shutdown_timeout,
        )
        running = [future for future in left if not future.cancel()]
        calls = [call for call in map(self.unfinished.get, running) if call is not None]
        for call in calls:
            self._ask_to_leave(call, call.job.attempt, JobStatus.STOPPED)
        # No appointments: Python 3.12 starts no threads when the interpreter ends.
        if not self.unfinished.wait(self.config.stop_grace):
            for call in calls:
                self._force(call, call.job.attempt)
            if not self.unfinished.wait(1.0):
                left = [future for future in left if not future.done()]
                logger.warning("The process ends and %s did not stop: cut off.", _names(left))

    def after_fork(self) -> None:
        """In the child of a fork: start anew, without the threads and the jobs of the parent."""
        self._lock = threading.RLock()
        self._waiting = ScheduledCalls()
        for held in list(self._held):  # the parent's
            held.forget()
        self._held.clear()
        self._backend = None
        if self.producer is not None:
            self.producer.after_fork()
        if self.consumer is not None:
            self.consumer.after_fork()
        self.services.after_fork()
        if getattr(forking, "worker", False):  # nobody in a worker process has a handle of these jobs
            self.unfinished = InFlight()
        self._key_lock = threading.RLock()
        self.wait_slots = WaitSlots(self.config.events_max)
        self.tracker.after_fork()
        inherited, self.unfinished = self.unfinished.all(), InFlight()
        for future in inherited:
            self.tracker.abandoned(future.abandon())


def _starter(binding: AppExecutor) -> Callable[[Callable[..., Any], Args, Kwargs], FutureProxy[Any]]:
    """What starts a job without contexts; without keeping the app alive, which takes its backend along."""
    reference = weakref.ref(binding)

    def start(fn: Callable[..., Any], args: Args, kwargs: Kwargs) -> FutureProxy[Any]:
        alive = reference()
        if alive is None:
            raise RuntimeError("the app of this backend is gone")
        return alive.submit(NO_CONTEXT, JobOptions(), fn, args, kwargs)  # type: ignore[arg-type]

    return start


def _called(call: Call) -> tuple[str, str]:
    return call.job.name, call.job.id


def _names(futures: Sequence[FutureProxy[Any]]) -> str:
    """Some jobs in words: ``3 jobs (render, render, mail)``."""
    names = [future.name for future in futures[:5]] + ["..."] * (len(futures) > 5)
    return f"{len(futures)} {'job' if len(futures) == 1 else 'jobs'} ({', '.join(names)})"


def _backend_class(config: Config) -> type[Backend]:
    if ":" not in config.type:
        key = config.key("EXECUTOR_TYPE")
        return entry_points.load_plugin(entry_points.BACKENDS, config.type, Backend, key, config.type)  # type: ignore[type-abstract]
    try:
        backend_class = import_string(config.type)
    except ImportStringError as error:
        if isinstance(error.exception, MissingExtra):
            raise error.exception from error
        raise ConfigError(config.key("EXECUTOR_TYPE"), config.type, f"importable ({error.exception})") from error
    if not (isinstance(backend_class, type) and issubclass(backend_class, Backend)):
        raise ConfigError(config.key("EXECUTOR_TYPE"), config.type, "a subclass of flask_executor.abc.Backend")
    return backend_class
