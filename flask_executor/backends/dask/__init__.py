"""Jobs run by workers of Dask: on this machine, or on all those that a scheduler of Dask has.

A process that submits has a line to its scheduler, and looks after its calls there (:mod:`.calls`). Workers run them
(:mod:`.worker`).
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
from flask_executor.backends.engine.entrypoint import Address, address_of
from flask_executor.backends.engine.prefork import run_processes
from flask_executor.exceptions import ConfigError, EngineUnavailable, ExecutorError, ExecutorShutdown, MissingExtra
from flask_executor.helpers import redact_url
from flask_executor.jobs.model import Job

try:
    import dask._task_spec  # noqa: F401
    import distributed  # noqa: F401
except ImportError as error:
    raise MissingExtra("distributed", "dask") from error

from flask_executor.backends.dask.connection import PATIENCE
from flask_executor.backends.dask.submitted import SubmittedCall, SubmittedCalls
from flask_executor.backends.dask.worker import SCHEDULER, serve

P = ParamSpec("P")
T = TypeVar("T")


class DaskBackend(Backend):
    """Has calls run by workers of Dask.

    ``EXECUTOR_URL`` is the address of a scheduler; without, the first job starts a cluster on this machine, which ends
    with this process. ``EXECUTOR_QUEUE``, unless it is ``default``, is a resource that workers must have.

    A call that has to wait, for its delay or for its next attempt, waits on a sleeping thread of a worker, in which
    other calls run meanwhile. When that worker ends, another one waits for a delay, but not for the next attempt.
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
        return None if options.url else "sqlite"  # the workers of a cluster of ours are on this machine

    @cached_property
    def _address(self) -> Address:
        return address_of(self._options)

    @cached_property
    def _resources(self) -> dict[str, float] | None:
        return None if self._options.queue == "default" else {self._options.queue: 1}

    @contextmanager
    def _translate_errors(self) -> Iterator[SubmittedCalls]:
        """The calls of this process, at the scheduler.

        :raises ExecutorShutdown: after :meth:`shutdown`.
        :raises EngineUnavailable: when what is done with them finds that the scheduler cannot be reached.
        """
        try:
            yield self._connection()
        # For asyncio a deadline is another TimeoutError in Python 3.10, and so is one of a future.
        except (OSError, asyncio.TimeoutError, concurrent.futures.TimeoutError) as error:
            where = self._options.config_key("EXECUTOR_URL")
            url = "this machine" if self._url is None else str(redact_url(self._url))
            why = str(error) or f"no answer within {PATIENCE:g} s"
            raise EngineUnavailable("Dask's scheduler", url, where, why) from error

    def _connection(self) -> SubmittedCalls:
        with self._lock:
            if self._shutdown:
                raise ExecutorShutdown("cannot schedule new futures after shutdown")
            if self._calls is None:
                self._calls = SubmittedCalls(self._url, self._options)
            return self._calls

    def enqueue(self, call: PreparedCall) -> None:
        at = time.time() + call.delay if call.delay else 0.0
        arguments = (self._address, call.job.id, call.packed, at)
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
        # Calls that wait keep what they have taken of a resource: it is the threads that are to limit the others.
        resources = self._resources and dict.fromkeys(self._resources, math.inf)
        run_processes(processes, lambda: asyncio.run(serve(url, resources, stop, self._options)))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function, outside of all contexts, as any executor does."""
        return self._options.start(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more. Jobs go on without this process, unless the cluster is its own: that ends after them."""
        with self._lock:
            self._shutdown = True
            calls = self._calls
        if calls is None:
            return
        if cancel_futures:
            for future in calls.futures():
                future.cancel()
        calls.line.end()
        if wait:
            calls.line.join()

    def terminate(self, grace: float) -> None:
        calls = self._calls
        if calls is None:
            return
        line = calls.line
        line.end()
        line.join(self._options.shutdown_timeout if self._url is None else PATIENCE)
        if line.is_alive() and self._url is None:
            for future in calls.futures():
                with suppress(ExecutorError):
                    future.stop(grace)
            line.join(grace + 1)
        line.end(at_once=True)
        line.join(PATIENCE)

    @property
    def waiting(self) -> int:
        return self._look()[1]

    @property
    def workers(self) -> int:
        return self._look()[0]

    def _look(self) -> tuple[int, int]:
        if self._shutdown or (self._url is None and self._calls is None):
            return 0, 0
        with self._translate_errors() as calls:
            return calls.look(self._resources)

    @property
    def capacity(self) -> None:
        return None
