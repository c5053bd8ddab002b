"""A service as one process of the app uses it: by the pool of its workers, or by the process that leads."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from flask_executor.abc import BackendOptions, ServiceStatus, WorkerState
from flask_executor.backends.process.backend import ProcessBackend
from flask_executor.backends.process.protocol import ServiceMessage
from flask_executor.backends.process.worker_main import WorkerPlugin
from flask_executor.exceptions import QueueFull, WorkerLost
from flask_executor.futures import FutureProxy
from flask_executor.helpers import describe_error
from flask_executor.helpers.log import logger
from flask_executor.jobs.call import Call, CallControl
from flask_executor.jobs.model import JobOptions, JobStatus
from flask_executor.jobs.packing import pickle_or_explain
from flask_executor.services.batches import MessageBatcher, QueuedMessage
from flask_executor.services.definition import ServiceDefinition
from flask_executor.services.follower import LeaderClient, StopService
from flask_executor.services.protocol import Request
from flask_executor.services.worker import ServiceWorker, handle_call

if TYPE_CHECKING:
    from flask import Flask


class ServiceHost(Protocol):
    """A port: what services need of the executor that they belong to."""

    @property
    def app(self) -> Flask | None:
        """The app; None when it is gone."""

    @property
    def identity(self) -> tuple[object, ...]:
        """Distinguishes the app, and this executor of it, from others on this machine."""

    def register_for_shutdown(self) -> None:
        """Have services end before the process does."""

    def call(
        self, control: CallControl, options: JobOptions, fn: Callable[..., Any], args: tuple[Any, ...]
    ) -> FutureProxy[Any]:
        """Start a job of a service, without contexts, and have ``control`` run it."""


class ServicePoolObserver:
    """Implements :class:`~flask_executor.backends.process.supervisor.PoolObserver` for the pool of a service.

    It must not refer to the pool, which would never be collected.

    :param route: takes the messages that the service sends, with its name.
    """

    def __init__(self, definition: ServiceDefinition, route: Callable[[str, ServiceMessage], None]) -> None:
        self.make_plugin: Callable[[], WorkerPlugin] = functools.partial(
            ServiceWorker, definition.name, definition.cls, definition.args
        )
        self.failures = 0
        self.last_error: str | None = None
        self._name = definition.name
        self._route = route

    def worker_failed(self, error: BaseException, delay: float) -> None:
        """A worker could not start, or died."""
        self.failures += 1
        died = isinstance(error, WorkerLost)
        self.last_error = str(error) if died else describe_error(error)
        logger.error(
            "Service %r: %s Another worker is started in %.1f s.",
            self._name,
            self.last_error,
            delay,
            exc_info=None if died else error,
        )

    def message_received(self, message: ServiceMessage) -> None:
        """The service has sent a message."""
        self._route(self._name, message)


class ServicePool:
    """The workers of one service in this process.

    :param route: takes the messages that the service sends.
    :raises NotPicklable: when its arguments cannot be sent to worker processes, and these do not inherit them.
    """

    def __init__(
        self,
        definition: ServiceDefinition,
        host: ServiceHost,
        options: BackendOptions,
        route: Callable[[str, ServiceMessage], None],
    ) -> None:
        self.definition = definition
        self._host = host
        self._observer = ServicePoolObserver(definition, route)
        if multiprocessing.get_context(options.start_method).get_start_method() != "fork":
            pickle_or_explain(self._observer.make_plugin, f"Service {definition.name!r} with its arguments")
        options = replace(options, max_workers=definition.workers, max_tasks_per_child=None)
        self._backend = ProcessBackend(options, self._observer)
        self._batcher = MessageBatcher(
            definition.name,
            self._backend.submit,
            lambda: self._backend.broadcasts,
            2 * definition.workers,
            in_order=definition.workers == 1,
        )

    def start(self) -> None:
        """Start the workers, if they were not."""
        self._backend.start()

    # ---- messages ----

    def call(self, type: str, message: bytes, timeout: float | None) -> FutureProxy[Any]:
        """Have a worker handle a message; the handle of what it returns."""
        self.check_room()
        args = self._arguments_of_call(type, message)
        return self._host.call(self._backend, _options_of_call(self.definition, type, timeout), handle_call, args)

    def take_over(self, call: Call, assigned: Callable[[], object] | None = None) -> None:
        """Have a worker handle a call of a follower: of another process, or of this one before it led.

        :param assigned: called just before a worker gets it.
        """
        _, type, message = call.args
        call.args = self._arguments_of_call(type, message)
        call.backend = self._backend
        if assigned is None:
            self._backend.enqueue(call)
        else:
            self._backend.enqueue_forwarded(call, assigned)

    def _arguments_of_call(self, type: str, message: bytes) -> tuple[int, bytes]:
        """The arguments of :func:`handle_call` for a call that comes behind everything that was sent."""
        self.definition.check_handler(type)
        self._batcher.flush()
        return self._backend.broadcasts, message

    def send(
        self,
        type: str,
        message: bytes,
        *,
        on_handled: Callable[[int], object] | None = None,
        bounded: bool = True,
    ) -> None:
        """Have a worker handle a message: its type and body, pickled.

        :param on_handled: called when messages with the same one have been handled or dropped: how many.
        :param bounded: If false, accept the message even if ``max_pending`` others wait.
        """
        self.definition.check_handler(type)
        if bounded:
            self.check_room()
        self._batcher.put(QueuedMessage(message, type, on_handled))

    def broadcast(self, type: str, message: bytes) -> None:
        """Have every worker handle a message, before those that are sent from now on."""
        self.definition.check_handler(type)
        self._backend.broadcast(message)

    # ---- calls that were taken over ----

    def deliver(self, call: Call, data: bytes) -> None:
        """Send a message to the job that a call is: a JobMessage, pickled."""
        self._backend.deliver_packed(call, data)

    def stop_call(self, call: Call, *, forced: bool) -> None:
        """Cancel a call, or if it has begun ask it to stop.

        :param forced: If true, end it by force.
        """
        if self._backend.withdraw(call):
            call.future.cancel()
        elif forced:
            self._backend.kill(call, call.job.attempt)
        else:
            self._backend.request_stop(call, call.job.attempt, JobStatus.STOPPED)

    # ---- the pool ----

    def check_room(self) -> None:
        """Raise if there is no room for one more message.

        :raises QueueFull: when ``max_pending`` wait.
        """
        if self._waiting() >= self.definition.max_pending:
            raise QueueFull(f"max_pending of service {self.definition.name!r}", self.definition.max_pending)

    def _waiting(self) -> int:
        """Messages that wait, more or less: those of a batch that is being handled count until it has been."""
        return len(self._batcher) + max(0, self._backend.waiting - self._batcher.batches)

    def status(self) -> ServiceStatus:
        """How it is doing."""
        workers = self._backend.worker_states()
        return ServiceStatus(
            name=self.definition.name,
            pids=tuple(worker.pid for worker in workers),
            workers=self.definition.workers,
            ready=sum(worker.ready for worker in workers),
            busy=sum(worker.busy for worker in workers),
            waiting=self._waiting(),
            failures=self._observer.failures,
            last_error=self._observer.last_error,
            supervisor=os.getpid(),
        )

    def worker_states(self) -> list[WorkerState]:
        """The workers."""
        return [replace(worker, service=self.definition.name) for worker in self._backend.worker_states()]

    @property
    def busy(self) -> bool:
        """If true, there are messages to be handled."""
        return self._waiting() > 0 or any(worker.busy for worker in self._backend.worker_states())

    def close(self, *, wait: bool) -> None:
        """Accept no more messages, and end the workers after what was accepted."""
        self._batcher.close()
        self._backend.shutdown(wait=wait)

    def join(self, timeout: float | None) -> None:
        """After :meth:`close`: wait until all has ended; at most ``timeout`` seconds."""
        self._backend.join(timeout)

    def stop(self, timeout: float | None) -> None:
        """End the workers, after what was accepted; by force, if that takes longer than ``timeout`` seconds."""
        self.close(wait=timeout is None)
        if timeout is not None:
            self._backend.terminate(timeout)


class RemoteService:
    """A service whose workers another process has: the one that leads."""

    def __init__(self, definition: ServiceDefinition, host: ServiceHost, client: LeaderClient) -> None:
        self._definition = definition
        self._host = host
        self._client = client
        client.open_window(definition.name, definition.max_pending)

    def call(self, type: str, message: bytes, timeout: float | None) -> FutureProxy[Any]:
        """Have a worker handle a message; the handle of what it returns."""
        self._definition.check_handler(type)
        args = (self._definition.name, type, message)
        return self._host.call(self._client, _options_of_call(self._definition, type, timeout), handle_call, args)

    def send(self, type: str, message: bytes) -> None:
        """Have a worker handle a message."""
        self._definition.check_handler(type)
        self._client.send(Request("send", self._definition.name, type, message))

    def broadcast(self, type: str, message: bytes) -> None:
        """Have every worker handle a message."""
        self._definition.check_handler(type)
        self._client.send(Request("broadcast", self._definition.name, type, message))

    def stop(self, timeout: float | None) -> None:
        """Stop the workers, behind what was sent; returns when they have ended."""
        stop = StopService(self._definition.name, timeout)
        self._client.enqueue(stop)
        error = stop.future.exception()
        if error is not None and not isinstance(error, WorkerLost):  # or the leader has ended, and so has the service
            raise error


def _options_of_call(definition: ServiceDefinition, type: str, timeout: float | None) -> JobOptions:
    return JobOptions(name=f"{definition.name}.{type}", timeout=timeout)
