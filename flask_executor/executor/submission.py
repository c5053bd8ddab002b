"""Submitting: from a function and its arguments to a call that the backend has.

.. code-block:: text

    submit ── accept ──> prepare (JobState, FutureProxy, Call; a place among the calls in flight)
                │           └─ with a key: claim it first, or find the job that has it
                └─ start ──> announce (record, default callbacks, job_queued) ──> backend.enqueue
                                └─ with a delay or for a retry: ScheduledCalls, then backend.enqueue
    defer  ── as submit, but the start waits for a transaction (DeferredCall)

**Invariant.** A call that was prepared is either enqueued, scheduled or deferred, or it is taken back: it leaves the
calls in flight, its key is free, and its record is removed. :meth:`Submission._take_back` does that for every step.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from flask_executor.abc import Backend
from flask_executor.exceptions import (
    EngineUnavailable,
    ExecutorShutdown,
    KeyExists,
    QueueFull,
    StoreUnavailable,
    Unsupported,
)
from flask_executor.executor.pending import DeferredCall
from flask_executor.executor.shutdown import register_for_shutdown
from flask_executor.executor.stopping import describe_jobs
from flask_executor.futures import FutureProxy
from flask_executor.helpers import callable_name, is_multiprocess_request
from flask_executor.helpers.log import logger
from flask_executor.jobs.call import Call, CallControl, CallState
from flask_executor.jobs.contexts import CALLER_CONTEXT, NO_CONTEXT, CapturedContext
from flask_executor.jobs.model import JobOptions, JobState
from flask_executor.jobs.packing import ChunkedFunction
from flask_executor.signals import job_queued

if TYPE_CHECKING:
    from flask_executor.executor.app_executor import AppExecutor

_RETRY_DELAY = 1.0  # seconds until an engine or a store that was away is tried again

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Submission:
    """Accepts the jobs of one app's executor. May be called from any thread."""

    def __init__(self, app_executor: AppExecutor) -> None:
        self._app_executor = app_executor
        self._deferred: weakref.WeakSet[DeferredCall] = weakref.WeakSet()
        self._warned_of_memory = False
        self.after_fork()

    def after_fork(self) -> None:
        """In the child of a fork: the calls are the parent's."""
        # Held while a key is claimed, and so perhaps during one request to the store.
        self._key_lock = threading.RLock()
        for deferred in list(self._deferred):
            deferred.forget()
        self._deferred.clear()

    # ---- the ways in ----

    def submit(
        self, context: CapturedContext, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> FutureProxy[Any]:
        """Start a job in these contexts; with a key in the options its handle is kept under the key.

        :raises KeyExists: if the key is taken.
        :raises QueueFull: if too many jobs wait.
        :raises ExecutorShutdown: after a shutdown.
        """
        return self._start(self._accept(context, options, fn, args, kwargs))

    def submit_once(
        self, context: CapturedContext, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> FutureProxy[Any]:
        """Return the job under the key in the options; start it if there is none."""
        found, call = self._find_or_claim(context, options, fn, args, kwargs)
        return found if call is None else self._start(call)

    def run_once(self, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs) -> FutureProxy[Any]:
        """The job under the key in the options; if there is none, it runs in this thread, in the caller's contexts."""
        found, call = self._find_or_claim(CALLER_CONTEXT, options, fn, args, kwargs)
        if call is not None:
            register_for_shutdown(self._app_executor)
            self._app_executor.tracker.add(call)
            with found.retrieving():  # the caller gets what the job raises
                call.run()
        return found

    def submit_to(
        self, control: CallControl, options: JobOptions, fn: Callable[..., Any], args: Args
    ) -> FutureProxy[Any]:
        """Start a job without contexts, and have something else than the backend run it: a service.

        It does not count against ``EXECUTOR_MAX_PENDING``, and is accepted after a shutdown too, as jobs that are still
        running may call services.
        """
        return self._start(self._prepare(NO_CONTEXT, options, fn, args, {}, uncounted=True), control)

    def defer(
        self, context: CapturedContext, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> DeferredCall:
        """Accept a job as :meth:`submit` does, to be started or dropped later.

        Whatever can be wrong with it is raised now: when it is started nobody could do anything about it.
        """
        call = self._accept(context, options, fn, args, kwargs)
        try:
            self._app_executor.in_flight.defer(call.future)
            self._app_executor.backend.pack(call)
            self._announce(call)
            if self._app_executor.producer is not None:
                self._app_executor.producer.hold(call)
        except BaseException as error:
            self._take_back(call.future, error)
        deferred = DeferredCall(call, self._start_deferred, self._drop, self._app_executor.tracker.in_background)
        self._deferred.add(deferred)
        return deferred

    def map(
        self,
        context: CapturedContext,
        options: JobOptions,
        fn: Callable[..., Any],
        calls: Iterable[Args],
        chunksize: int,
    ) -> list[FutureProxy[Any]]:
        """Start a job for every set of arguments; with a ``chunksize``, one for that many sets, which returns a list.

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

    # ---- accepting ----

    def _accept(
        self, context: CapturedContext, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Call:
        if options.key is None:
            return self._prepare(context, options, fn, args, kwargs)
        _, call = self._find_or_claim(context, options, fn, args, kwargs)
        if call is None:
            raise KeyExists(options.key)
        return call

    def _find_or_claim(
        self, context: Any, options: JobOptions, fn: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> tuple[FutureProxy[Any], Call | None]:
        """The handle under the key in the options; and the call to start, if the key was free."""
        tracker, in_flight = self._app_executor.tracker, self._app_executor.in_flight
        self._warn_of_memory()
        with self._claiming():
            if not tracker.shared:  # a shared store is asked by the claim itself: to look first costs as much
                found = tracker.find(options)
                if found is not None:  # looked up first, so that a full queue does not refuse a job that exists
                    return found, None
            call = self._prepare(context, options, fn, args, kwargs)
            try:
                found = tracker.claim(call)
            except BaseException:
                in_flight.discard(call.future)
                raise
            if found is not None:
                in_flight.discard(call.future)
                return found, None
            return call.future, call

    def _claiming(self) -> AbstractContextManager[object]:
        """Return the context within which a key is claimed; one thread at a time may enter it.

        With a bound for the queue only one of many threads that ask at once takes a place in it. Without one a shared
        store needs no lock: its claim is atomic, and threads with other keys need not wait for each other's.
        """
        app_executor = self._app_executor
        if app_executor.tracker.shared and app_executor.config.max_pending is None:
            return nullcontext()
        return self._key_lock

    def _prepare(
        self,
        context: Any,
        options: JobOptions,
        fn: Callable[..., Any],
        args: Args,
        kwargs: Kwargs,
        *,
        uncounted: bool = False,
    ) -> Call:
        """Make the call, with a place among the calls in flight.

        :param uncounted: If true, it is a call of a service: see :meth:`submit_to`.
        """
        app_executor = self._app_executor
        if not uncounted:
            options = self._checked(options)
        elif options.timeout == math.inf:
            options = replace(options, timeout=None)
        job = JobState(options.name or callable_name(fn), options.key, options.owner)
        if options.meta is not None:
            job.meta = dict(options.meta)
        if app_executor.producer is not None and not uncounted and context is not CALLER_CONTEXT:
            return app_executor.producer.prepare(job, fn, args, kwargs, context, options)
        channel = app_executor.channel
        future: FutureProxy[Any] = FutureProxy(job, channel)
        call = Call(future, job, fn, args, kwargs, context, channel, options)
        # What runs in this thread does not wait.
        limit = None if uncounted or context is CALLER_CONTEXT else self._limit()
        if not app_executor.in_flight.add(call, limit, uncounted=uncounted):
            config = app_executor.config
            raise QueueFull(config.key("EXECUTOR_MAX_PENDING"), config.max_pending or 0)
        return call

    def _checked(self, options: JobOptions) -> JobOptions:
        """The options, with the timeout that holds.

        :raises ExecutorShutdown: after a shutdown.
        :raises Unsupported: for what the backend cannot do.
        """
        app_executor = self._app_executor
        if app_executor.closed:
            raise ExecutorShutdown(
                "cannot schedule new futures after shutdown: this executor was shut down in this process"
            )
        if options.priority or options.delay:
            backend, key = app_executor.backend_class, app_executor.config.key("EXECUTOR_TYPE")
            for asked, supported, what in (
                (options.priority, backend.supports_priority, "give jobs a priority"),
                (options.delay, backend.supports_delay, "start jobs later"),
            ):
                if asked and not supported:
                    message = f"{backend.__name__} ({key}) cannot {what}: leave that out, or choose another type"
                    raise Unsupported(message)
        if options.timeout is None:
            default = app_executor.config.timeout
            return options if default is None else replace(options, timeout=default)
        return replace(options, timeout=None) if options.timeout == math.inf else options

    def _limit(self) -> int | None:
        """Most calls in flight: those that run and ``EXECUTOR_MAX_PENDING`` that wait; None for no bound."""
        pending = self._app_executor.config.max_pending
        if pending is None or self._app_executor.producer is not None or self._app_executor.backend.capacity is None:
            return None
        return self._app_executor.backend.capacity + pending

    def _warn_of_memory(self) -> None:
        if self._app_executor.tracker.shared or self._warned_of_memory or not is_multiprocess_request():
            return
        self._warned_of_memory = True
        logger.warning(
            "This server has several processes, and each keeps its jobs to itself: the next request may reach one that "
            "does not know this job. Set %s to 'sqlite' (or 'redis://...'), and every process sees every stored job.",
            self._app_executor.config.key("EXECUTOR_STORE"),
        )

    # ---- starting ----

    def _start(self, call: Call, control: CallControl | None = None) -> FutureProxy[Any]:
        future, producer = call.future, self._app_executor.producer
        try:
            self._announce(call)
            call.backend = target = control or self._app_executor.backend
            if call.delay and isinstance(target, Backend) and target.engine is None and target.capacity is not None:
                self._schedule(call)
            elif producer is not None and producer.owns(future):
                producer.send(call)
            else:
                call.enter(CallState.QUEUED)
                target.enqueue(call)
        except BaseException as error:
            self._take_back(future, error)
        return future

    def _announce(self, call: Call) -> None:
        self._app_executor.tracker.add(call)
        if self._app_executor.own_callbacks or self._app_executor.app_callbacks:
            for callback in (*self._app_executor.own_callbacks, *self._app_executor.app_callbacks):
                call.future.add_done_callback(callback)
        if job_queued.receivers:
            self._app_executor.channel.send(job_queued, call.job.record())

    def _take_back(self, future: FutureProxy[Any], error: BaseException) -> None:
        """The call was not accepted. Another thread may have found it by its key: cancel it, do not just drop it."""
        producer = self._app_executor.producer
        refused = producer is not None and producer.discard_refused(future)
        if not refused and not future.cancel():
            # It has run, or a worker has it all the same: the pool could only not start one more thread.
            if isinstance(error, Exception):
                return
            raise error
        self._app_executor.tracker.remove(future)
        raise error

    def _schedule(self, call: Call) -> None:
        error = ExecutorShutdown(f"job {call.job.name} has not started: its process has ended before its time came")
        self._app_executor.scheduled.add(call, error, call.delay, lambda: self._enqueue_again(call, error))

    def retry(self, call: Call, error: BaseException, delay: float) -> None:
        """The call has failed with ``error``, is queued again, and is to run again in ``delay`` seconds."""
        app_executor = self._app_executor
        if call.future.done():  # cancelled in the instant in which it was queued again
            return
        if app_executor.consumer is not None and app_executor.consumer.postpone(call, delay):
            return
        app_executor.tracker.changed(call.job)
        backend = app_executor.backend_or_none
        if backend is None or backend.capacity is None:
            self._enqueue_again(call, error)
            return
        app_executor.scheduled.add(call, error, delay, lambda: self._enqueue_again(call, error))
        if app_executor.closed and app_executor.scheduled.discard(call):  # close() settled those scheduled before
            call.fail_finally(error)

    def _enqueue_again(self, call: Call, error: BaseException) -> None:
        try:
            call.backend = self._app_executor.backend
            call.enter(CallState.QUEUED)
            call.backend.enqueue(call)
        except ExecutorShutdown:
            call.fail_finally(error)
        except Exception as refused:
            call.fail_finally(refused)

    # ---- deferred calls ----

    def _start_deferred(self, call: Call, *, again: bool = False) -> None:
        """The transaction was committed. Never raises: the code that commits is not to blame for a broker."""
        if Future.done(call.future):  # cancelled meanwhile
            return
        app_executor = self._app_executor
        app_executor.in_flight.release(call.future)
        try:
            call.backend = app_executor.backend
            if app_executor.producer is None:
                call.enter(CallState.QUEUED)
                call.backend.enqueue(call)
            else:
                app_executor.producer.send_held(call)
        except EngineUnavailable as error:  # but the job was accepted, and has to start when the engine is back
            if not again:
                logger.warning("Job %s (%s) was to start after a commit, and waits: %s", *_name_and_id(call), error)
            error.__traceback__ = None  # it refers to the transaction
            self._try_later(call, error, lambda: self._start_deferred(call, again=True))
        except Exception:
            logger.exception("Job %s (%s) was to start after a commit, and cannot.", *_name_and_id(call))
            self._drop(call)

    def _drop(self, call: Call) -> None:
        """Cancel a deferred job; its key is free when the store can be reached. Never raises."""
        try:
            if call.future.cancel():
                self._app_executor.jobs.release_failed_key(call.job.id)
        except StoreUnavailable as error:
            logger.info("Job %s (%s) is cancelled when the store is back: %s", *_name_and_id(call), error)
            self._try_later(call, error, lambda: self._drop(call))
        except Exception:
            logger.exception("Job %s (%s) could not be cancelled.", *_name_and_id(call))

    def _try_later(self, call: Call, error: BaseException, fn: Callable[[], object]) -> None:
        in_background = self._app_executor.tracker.in_background
        self._app_executor.scheduled.add(call, error, _RETRY_DELAY, lambda: in_background(fn))

    # ---- closing ----

    def close(self) -> None:
        """No more jobs: settle what waits for its time, its next attempt or a commit."""
        producer = self._app_executor.producer
        for call, error in self._app_executor.scheduled.clear():
            if producer is not None or call.future.cancelled():  # it waits for the engine, or for the store
                self._drop(call)
            elif call.job.attempt > 1 or not call.future.cancel():
                call.fail_finally(error)
        for deferred in list(self._deferred):
            if deferred.undecided and not Future.done(deferred.future):
                left = describe_jobs([deferred.future])
                logger.warning("The executor is shut down, and %s does not wait for a commit any more.", left)
            deferred.drop()


def _name_and_id(call: Call) -> tuple[str, str]:
    return call.job.name, call.job.id
