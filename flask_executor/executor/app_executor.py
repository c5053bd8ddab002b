"""One executor in one app: its configuration, and the parts that are made from it.

.. code-block:: text

                     ┌─ submission   accepts jobs
    AppExecutor ─────┼─ channel      what calls report to, what futures ask
      config         ├─ stopping     asks jobs to leave, forces them
      backend        ├─ jobs         the jobs as pages and commands see them
      tracker        ├─ services     long-lived workers
                     └─ producer, consumer    both ends of an engine, where there is one
      in_flight, scheduled: the calls that are not settled
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flask_executor.abc import Backend, BackendOptions, Health
from flask_executor.backends.engine.entrypoint import Destination, destination_of, register
from flask_executor.backends.process.after_fork import forking, root_pid
from flask_executor.exceptions import ConfigError, StoreUnavailable
from flask_executor.executor.channel import AppChannel
from flask_executor.executor.consumer import Consumer
from flask_executor.executor.factory import backend_class_of, make_tracker
from flask_executor.executor.jobs_view import AppJobs
from flask_executor.executor.pending import InFlight, ScheduledCalls
from flask_executor.executor.producer import Producer, oldest_wait
from flask_executor.executor.shutdown import register_for_shutdown
from flask_executor.executor.stopping import Stopping, describe_jobs
from flask_executor.executor.submission import Args, Kwargs, Submission
from flask_executor.futures import FutureProxy, propagate_exceptions_callback
from flask_executor.helpers import weak_callback
from flask_executor.helpers.log import logger
from flask_executor.jobs.call import CallControl
from flask_executor.jobs.contexts import NO_CONTEXT
from flask_executor.jobs.current import running_job
from flask_executor.jobs.log_records import install_record_factory
from flask_executor.jobs.model import JobOptions, JobStatus
from flask_executor.services.registry import ServiceRegistry
from flask_executor.stores.leases import engine_holder
from flask_executor.tracking.engine_handover import EngineHandover
from flask_executor.tracking.local import JobTracker
from flask_executor.tracking.shared import SharedJobTracker
from flask_executor.web.events import WaitSlots

if TYPE_CHECKING:
    from flask import Flask

    from flask_executor.executor.config import Config

Callback = Callable[[Future[Any]], object]


class AppExecutor:
    """One executor in one app; :meth:`flask_executor.Executor.init_app` makes it.

    The backend is made when it is first needed and belongs to this process: in the child of a fork :meth:`after_fork`
    drops it, and the jobs of the parent with it.
    """

    def __init__(
        self,
        executor: Any,
        app: Flask,
        config: Config,
        default_callbacks: Sequence[Callback],
        initializers: Sequence[Callable[[], object]],
    ) -> None:
        self.name: str = executor.name
        self.backend_class = backend_class_of(config)
        self.channel = AppChannel(self, executor)
        self.in_flight = InFlight()
        self.scheduled = ScheduledCalls()
        self.submission = Submission(self)
        self.stopping = Stopping(self)
        self.jobs = AppJobs(self)
        self._open(config, app)
        self._executor = executor
        self._app = weakref.ref(app)
        #: What every future gets as done callbacks: the executor's own, and those of the app, which may become more.
        self.own_callbacks: tuple[Callback, ...] = ()
        self.app_callbacks = default_callbacks
        self._initializers = initializers
        #: The backend of this process, if it was needed yet; otherwise :attr:`backend` makes it.
        self.backend_or_none: Backend | None = None
        self._lock = threading.RLock()
        self.services = self._make_services()
        self._set_config(config)
        install_record_factory(running_job)

    # ---- configuration ----

    def _open(self, config: Config, app: Flask) -> None:
        """Open the store; and for an engine, both ends of it."""
        engine = self.backend_class.engine
        default_store = self.backend_class.default_store(config.backend_options(weakref.ref(app)))
        self.tracker: JobTracker = make_tracker(config, app, self.channel, engine, default_store)
        self.producer: Producer | None = None
        self.consumer: Consumer | None = None
        if isinstance(self.tracker, SharedJobTracker) and engine is not None:
            handover = self.tracker.handover = EngineHandover(self.tracker, engine_holder(engine))
            self.producer = Producer(self, self.tracker, handover)
            self.consumer = Consumer(self, self.tracker, handover)
            register(app, self.name, self.consumer)

    def _set_config(self, config: Config) -> None:
        self.backend_class = backend_class_of(config)
        self.config = config
        self.tracker.reconfigure(config.tracking_options())
        self.own_callbacks = (propagate_exceptions_callback,) if config.propagate_exceptions else ()
        self.wait_slots = WaitSlots(config.events_max)
        self._closed = False

    def reconfigure(self, config: Config) -> None:
        """Take another configuration. Handles and records stay; jobs that were accepted end on the old backend.

        The store stays what it is.

        :raises ConfigError: for another engine while jobs of this process have not ended.
        """
        if config == self.config and not self._closed:
            return
        with self._lock:
            if self._closed:
                self.services = self._make_services()
            former = self._change_engine(config)
            self._set_config(config)
            backend, self.backend_or_none = self.backend_or_none, None
        if backend is not None:
            backend.shutdown(wait=False)
        if former is not None:
            former.close(wait=False)

    def _change_engine(self, config: Config) -> JobTracker | None:
        """Make another tracker if another engine, or none, is to have the jobs; the former tracker in that case."""
        app, backend_class = self.app, backend_class_of(config)
        if backend_class.engine == self.backend_class.engine or app is None:
            return None
        left = self.waiting_for()
        if left:
            allowed = f"what it was until {describe_jobs(left)} have ended: call shutdown()"
            raise ConfigError(config.key("EXECUTOR_TYPE"), config.type, allowed)
        former, self.backend_class = self.tracker, backend_class
        self._open(config, app)
        return former

    def _warn_of_late_settings(self) -> None:
        app = self.app
        changed = [] if app is None else self.config.changed(app.config)
        if changed:
            logger.warning(
                "%s changed in app.config after the executor had read it, and what it was then is used. Set it before "
                "Executor(app), or call executor.init_app(app) again.",
                " and ".join(changed),
            )

    # ---- the parts ----

    @property
    def app(self) -> Flask | None:
        """The app, None when it is gone."""
        return self._app()

    @property
    def backend(self) -> Backend:
        """The backend of this process, made now if there was none."""
        backend = self.backend_or_none
        if backend is None:
            with self._lock:
                backend = self.backend_or_none
                if backend is None:
                    backend = self.backend_or_none = self._make_backend()
        return backend

    def _make_backend(self) -> Backend:
        register_for_shutdown(self)
        self._warn_of_late_settings()
        options = replace(self.worker_options(), start=_starter(self))
        if self.tracker.handover is not None:
            options = replace(options, refuse=weak_callback(self.tracker.handover.refuse))
        backend = self.backend_class(options)
        if self._closed:
            backend.shutdown()
        return backend

    def worker_options(self) -> BackendOptions:
        """Return what worker processes are made from."""
        return self.config.backend_options(self._app, self._initializers)

    @cached_property
    def destination(self) -> Destination:
        """What the calls of this executor are for, in the queue of an engine."""
        return destination_of(self.worker_options())

    @property
    def remote(self) -> bool:
        """If true, jobs run in other processes."""
        return self.backend_class.remote

    @property
    def chunks(self) -> bool:
        """If true, ``map`` can put several calls into one job."""
        return self.backend_class.chunks

    @property
    def closed(self) -> bool:
        """If true, it was shut down."""
        return self._closed

    # ---- services ----

    def _make_services(self) -> ServiceRegistry:
        return ServiceRegistry(self, self.worker_options, self._executor.services, self._executor.handlers)

    def start_services(self, sender: object, **_: object) -> None:
        """A request has come: this process serves, and is no reloader or master. Receives ``request_started``."""
        try:
            self.services.start()
        except Exception:  # not this request's fault, and code that uses a service gets the error as well
            logger.exception("The services cannot be started.")

    @property
    def identity(self) -> tuple[object, ...]:
        """Distinguishes the app, and this executor of it, from others on this machine."""
        app = self.app
        if app is None:
            return self.name, self.config.store
        where = app.name, app.root_path, app.instance_path
        # Tests have nothing to do with a server that runs beside them, nor with each other.
        return self.name, self.config.store, where, app.secret_key, root_pid() if app.testing else None

    def register_for_shutdown(self) -> None:
        """Have jobs and services end before the process does."""
        register_for_shutdown(self)

    def call(self, control: CallControl, options: JobOptions, fn: Callable[..., Any], args: Args) -> FutureProxy[Any]:
        """Start a job of a service, and have ``control`` run it."""
        return self.submission.submit_to(control, options, fn, args)

    # ---- looking ----

    def waiting_for(self) -> list[FutureProxy[Any]]:
        """The handles of this process whose jobs have not ended, oldest first."""
        sent = [] if self.producer is None else self.producer.unfinished()
        return [*self.in_flight.futures(), *sent]

    def wait(self, timeout: float | None) -> bool:
        """Wait until no job of this process is left.

        :param timeout: most seconds to wait; None for as long as it takes.
        :return: whether none is left.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self.in_flight.wait(timeout):
            return False
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return self.producer is None or self.producer.wait(left)

    def health(self) -> Health:
        """Return its health: workers, jobs running and waiting."""
        jobs = [future.record() for future in self.in_flight.futures()]
        waiting = [job for job in jobs if job.status == JobStatus.QUEUED]
        health = Health(
            workers=self.backend_or_none.workers if self.backend_or_none and self.producer is None else 0,
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

    # ---- life ----

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
            backend = self.backend_or_none
        self.submission.close()
        if self.consumer is not None:
            self.consumer.close(wait=wait)
        if self.producer is not None and cancel_futures:
            self.producer.cancel_all()
        if backend is not None:
            backend.shutdown(wait=wait, cancel_futures=cancel_futures)

    def terminate(self, deadline: float) -> None:
        """The process ends: let jobs end until ``deadline`` (:func:`time.monotonic`), stop them, then force them."""
        self._close(wait=False)
        left = self.in_flight.futures()
        if left:
            logger.info("The process ends; %s may go on for %.0f s.", describe_jobs(left), deadline - time.monotonic())
            if not self.in_flight.wait(deadline - time.monotonic()):
                self.stopping.cut_off()
        grace = 0.0 if self.in_flight.futures() else self.config.stop_grace
        if self.backend_or_none is not None:
            self.backend_or_none.terminate(grace)
        if self.consumer is not None:
            self.consumer.terminate(grace)
        self.services.terminate(max(deadline, time.monotonic() + self.config.stop_grace))
        self.tracker.abandon_unfinished(self.config.stop_grace)
        self.tracker.close(wait=False)

    def after_fork(self) -> None:
        """In the child of a fork: start anew, without the threads and the jobs of the parent."""
        self._lock = threading.RLock()
        self.scheduled = ScheduledCalls()
        self.submission.after_fork()
        self.backend_or_none = None
        if self.producer is not None:
            self.producer.after_fork()
        if self.consumer is not None:
            self.consumer.after_fork()
        self.services.after_fork()
        if getattr(forking, "worker", False):  # nobody in a worker process has a handle of these jobs
            self.in_flight = InFlight()
        self.wait_slots = WaitSlots(self.config.events_max)
        self.tracker.after_fork()
        inherited, self.in_flight = self.in_flight.futures(), InFlight()
        for future in inherited:
            self.tracker.abandoned(future.abandon())


def _starter(app_executor: AppExecutor) -> Callable[[Callable[..., Any], Args, Kwargs], FutureProxy[Any]]:
    """Return a function that starts a job without contexts.

    It holds only a weak reference, so that app and backend can be collected.
    """
    reference = weakref.ref(app_executor)

    def start(fn: Callable[..., Any], args: Args, kwargs: Kwargs) -> FutureProxy[Any]:
        alive = reference()
        if alive is None:
            raise RuntimeError("the app of this backend is gone")
        return alive.submission.submit(NO_CONTEXT, JobOptions(), fn, args, kwargs)  # type: ignore[arg-type]

    return start
