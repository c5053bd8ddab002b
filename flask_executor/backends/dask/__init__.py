"""Jobs run by workers of Dask: on this machine, or on all machines that a Dask scheduler has workers on.

A process that submits has a connection to its scheduler (:mod:`.connection`), and keeps the calls that it has submitted
until they have run (:mod:`.submitted`, with a diagram). Workers run them (:mod:`.worker`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import ParamSpec, TypeVar

from flask_executor.abc import Backend, BackendOptions, PreparedCall
from flask_executor.backends.engine.entrypoint import Destination, destination_of
from flask_executor.backends.engine.prefork import run_processes
from flask_executor.exceptions import ConfigError, EngineUnavailable, ExecutorError, ExecutorShutdown, MissingExtra
from flask_executor.helpers import redact_url
from flask_executor.jobs.model import Job

try:
    import dask._task_spec  # noqa: F401
    import distributed  # noqa: F401
except ImportError as error:
    raise MissingExtra("distributed", "dask") from error

from flask_executor.backends.dask.connection import RESPONSE_TIMEOUT
from flask_executor.backends.dask.submitted import SubmittedCall, SubmittedCalls
from flask_executor.backends.dask.worker import SCHEDULER, serve

P = ParamSpec("P")
T = TypeVar("T")


class DaskBackend(Backend):
    """Submits calls to a Dask scheduler, whose workers run them.

    ``EXECUTOR_URL`` is the address of the scheduler. Without one, the first job starts a cluster on this machine, which
    ends with this process. ``EXECUTOR_QUEUE``, unless it is ``default``, is a resource that workers must have.

    A call with a delay, or one that waits for its next attempt, sleeps in a thread of a worker, which runs other calls
    meanwhile. If that worker ends, another one sleeps for the rest of a delay, but begins a next attempt at once.
    """

    remote = True
    engine = "dask"
    supports_kill = True

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._url = options.url or os.environ.get(SCHEDULER)
        self._shutdown = False
        self._lock = threading.Lock()
        self._calls: SubmittedCalls | None = None

    @classmethod
    def default_store(cls, options: BackendOptions) -> str | None:
        return None if options.url else "sqlite"  # the workers of a local cluster are on this machine

    @cached_property
    def _destination(self) -> Destination:
        return destination_of(self._options)

    @cached_property
    def _resources(self) -> dict[str, float] | None:
        return None if self._options.queue == "default" else {self._options.queue: 1}

    @contextmanager
    def _translate_errors(self) -> Iterator[SubmittedCalls]:
        """The calls of this process, and errors of the connection as :exc:`EngineUnavailable`.

        :raises ExecutorShutdown: after :meth:`shutdown`.
        :raises EngineUnavailable: if the scheduler cannot be reached.
        """
        try:
            yield self._submitted_calls()
        # In Python 3.10 the TimeoutErrors of asyncio and of futures are classes of their own.
        except (OSError, asyncio.TimeoutError, concurrent.futures.TimeoutError) as error:
            where = self._options.config_key("EXECUTOR_URL")
            url = "this machine" if self._url is None else str(redact_url(self._url))
            why = str(error) or f"no answer within {RESPONSE_TIMEOUT:g} s"
            raise EngineUnavailable("Dask's scheduler", url, where, why) from error

    def _submitted_calls(self) -> SubmittedCalls:
        with self._lock:
            if self._shutdown:
                raise ExecutorShutdown("cannot schedule new futures after shutdown")
            if self._calls is None:
                self._calls = SubmittedCalls(self._url, self._options)
            return self._calls

    def enqueue(self, call: PreparedCall) -> None:
        at = time.time() + call.delay if call.delay else 0.0
        arguments = (self._destination, call.job.id, call.packed, at)
        sent = SubmittedCall(
            call.job.id, call.job.name, arguments, call.priority, self._resources, weakref.ref(call.future)
        )
        with self._translate_errors() as calls:
            calls.send(sent)

    def remove_queued(self, job: Job) -> None:
        if self._shutdown or (self._url is None and self._calls is None):
            return
        with self._translate_errors() as calls:
            calls.drop(job)

    def work(self, stop: Callable[[str], object], *, processes: int, burst: bool) -> None:
        url = self._url
        if url is None:
            allowed = "the address of a scheduler ('tcp://host:8786'): without, each web process has workers of its own"
            raise ConfigError(self._options.config_key("EXECUTOR_URL"), None, allowed)
        if burst:
            raise ExecutorError("Dask's workers cannot end when there are no more jobs: leave out --burst.")
        # A sleeping call keeps its share of a resource. The threads alone are to limit how many calls run.
        resources = self._resources and dict.fromkeys(self._resources, math.inf)
        run_processes(processes, lambda: asyncio.run(serve(url, resources, stop, self._options)))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function, outside of all contexts, as any executor does."""
        return self._options.start(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls. Jobs go on without this process; a local cluster ends after its jobs."""
        with self._lock:
            self._shutdown = True
            calls = self._calls
        if calls is None:
            return
        if cancel_futures:
            for future in calls.futures():
                future.cancel()
        calls.connection.close()
        if wait:
            calls.connection.join()

    def terminate(self, grace: float) -> None:
        calls = self._calls
        if calls is None:
            return
        connection = calls.connection
        connection.close()
        connection.join(self._options.shutdown_timeout if self._url is None else RESPONSE_TIMEOUT)
        if connection.is_alive() and self._url is None:
            for future in calls.futures():
                with suppress(ExecutorError):
                    future.stop(grace)
            connection.join(grace + 1)
        connection.close(at_once=True)
        connection.join(RESPONSE_TIMEOUT)

    @property
    def waiting(self) -> int:
        return self._count()[1]

    @property
    def workers(self) -> int:
        return self._count()[0]

    def _count(self) -> tuple[int, int]:
        if self._shutdown or (self._url is None and self._calls is None):
            return 0, 0
        with self._translate_errors() as calls:
            return calls.count(self._resources)

    @property
    def capacity(self) -> None:
        return None
