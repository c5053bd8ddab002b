"""The workers of one service: those of this process, or of another one."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from flask_executor.abc import Backend, BackendOptions, ServiceStatus, WorkerState
from flask_executor.backends.process.backend import ProcessBackend
from flask_executor.backends.process.protocol import ServiceMessage
from flask_executor.backends.process.worker_main import WorkerPlugin
from flask_executor.exceptions import QueueFull, WorkerLost
from flask_executor.futures import FutureProxy
from flask_executor.helpers import describe_error
from flask_executor.helpers.log import logger
from flask_executor.jobs.call import Call, PlainCall
from flask_executor.jobs.model import JobOptions, JobState, JobStatus
from flask_executor.jobs.packing import pickle_or_explain
from flask_executor.services.batches import Mailbox
from flask_executor.services.definition import ServiceDefinition, check_handler
from flask_executor.services.follower import Relay
from flask_executor.services.protocol import Errand, Watcher
from flask_executor.services.worker import ServiceResident, answer

if TYPE_CHECKING:
    from flask import Flask


class Owner(Protocol):
    """What a crew needs of the binding it belongs to."""

    @property
    def app(self) -> Flask | None:
        """The app, None when it is gone."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells the app, and this executor of it, from others on this machine."""

    def register_for_shutdown(self) -> None:
        """See to it that services end before the process does."""

    def call(
        self, backend: Backend, options: JobOptions, fn: Callable[..., Any], args: tuple[Any, ...]
    ) -> FutureProxy[Any]:
        """Start a job of a service on the backend of that."""


class Tenant:
    """A service, for the supervisor of its workers; who must not refer to the crew, or it would never be collected.

    :param route: takes the messages that the service sends, with its name.
    """

    def __init__(self, definition: ServiceDefinition, route: Callable[[str, ServiceMessage], None]) -> None:
        self.make_plugin: Callable[[], WorkerPlugin] = functools.partial(
            ServiceResident, definition.name, definition.cls, definition.args
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


class RelayedCall(PlainCall):
    """A call that another process waits for.

    :param job: as it is called there.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        job: JobState,
        watcher: Watcher,
    ) -> None:
        super().__init__(answer, args, {})
        self.job = job
        self._watcher = watcher

    def begin(self) -> bool:
        first, claimed = self._claimed is None, super().begin()
        if first and claimed:
            self._watcher.begun()
        return claimed

    def progressed(self) -> None:
        self._watcher.progressed(self.job)


class Crew:
    """The workers of one service in this process.

    :param route: takes the messages that the service sends.
    :raises NotPicklable: when its arguments cannot be sent to worker processes, and these do not inherit them.
    """

    def __init__(
        self,
        definition: ServiceDefinition,
        owner: Owner,
        options: BackendOptions,
        route: Callable[[str, ServiceMessage], None],
    ) -> None:
        self.definition = definition
        self._owner = owner
        self._tenant = Tenant(definition, route)
        if multiprocessing.get_context(options.start_method).get_start_method() != "fork":
            pickle_or_explain(self._tenant.make_plugin, f"Service {definition.name!r} with its arguments")
        options = replace(options, max_workers=definition.workers, max_tasks_per_child=None)
        self._backend = ProcessBackend(options, self._tenant)
        self._mailbox = Mailbox(
            definition.name,
            self._backend.submit,
            lambda: self._backend.broadcasts,
            2 * definition.workers,
            in_order=definition.workers == 1,
        )

    def start(self) -> None:
        """Start the workers, if they were not."""
        self._backend.start()

    def call(self, type: str, message: bytes, timeout: float | None) -> FutureProxy[Any]:
        """Have a worker handle a message; what it says."""
        self._check_room()
        args = self._next_call(type, message)
        return self._owner.call(self._backend, options_of(self.definition, type, timeout), answer, args)

    def _next_call(self, type: str, message: bytes) -> tuple[int, bytes]:
        """What a worker needs to know of a call that comes behind all there is."""
        check_handler(self.definition.cls, self.definition.name, type)
        self._mailbox.flush()
        return self._backend.broadcasts, message

    def send(self, type: str, message: bytes, *, anyway: bool = False) -> None:
        """Have a worker handle a message: its type and body, pickled.

        :param anyway: also if too many wait.
        """
        check_handler(self.definition.cls, self.definition.name, type)
        if not anyway:
            self._check_room()
        self._mailbox.put(type, message)

    def broadcast(self, type: str, message: bytes) -> None:
        """Have every worker handle a message, before those that come from now on."""
        check_handler(self.definition.cls, self.definition.name, type)
        self._backend.broadcast(message)

    # ---- for other processes ----

    def start_call(self, type: str, message: bytes, id: str, watcher: Watcher) -> Call:
        """Have a worker handle a message for another process, which is told how it goes on."""
        self._check_room()
        job = JobState(name_of(self.definition, type), id=id)
        call = RelayedCall(self._next_call(type, message), job, watcher)
        self._backend.enqueue_relayed(call, watcher.given)
        return call

    def tell(self, call: Call, data: bytes) -> None:
        """Send a message to the job that a call is: a JobMessage, pickled."""
        self._backend.deliver_packed(call, data)

    def adopt(self, call: Call) -> None:
        """Take over a call that was to be sent to another process."""
        _, type, message = call.args
        call.args = self._next_call(type, message)
        call.backend = self._backend
        self._backend.enqueue(call)

    def leave(self, call: Call, *, forced: bool) -> None:
        """Have a call leave, or end it by force."""
        if self._backend.withdraw(call):
            call.future.cancel()
        elif forced:
            self._backend.kill(call, call.job.attempt)
        else:
            self._backend.request_stop(call, call.job.attempt, JobStatus.STOPPED)

    # ---- the work ----

    def _check_room(self) -> None:
        if self._waiting() >= self.definition.max_pending:
            raise QueueFull(f"max_pending of service {self.definition.name!r}", self.definition.max_pending)

    def _waiting(self) -> int:
        """Messages that wait, more or less: those of a batch that is being handled count until it has been."""
        return len(self._mailbox) + max(0, self._backend.waiting - self._mailbox.batches)

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
            failures=self._tenant.failures,
            last_error=self._tenant.last_error,
            supervisor=os.getpid(),
        )

    def crew(self) -> list[WorkerState]:
        """The workers."""
        return [replace(worker, service=self.definition.name) for worker in self._backend.worker_states()]

    @property
    def busy(self) -> bool:
        """Whether there are messages to be handled."""
        return self._waiting() > 0 or any(worker.busy for worker in self._backend.worker_states())

    @property
    def ended(self) -> bool:
        """Whether all has ended; after :meth:`close`."""
        return self._backend.ended

    def close(self, *, wait: bool) -> None:
        """Accept no more messages, and end the workers after what was accepted."""
        self._mailbox.close()
        self._backend.shutdown(wait=wait)

    def stop(self, timeout: float | None) -> None:
        """End the workers, after what was accepted; by force, if that takes longer than so many seconds."""
        self.close(wait=timeout is None)
        if timeout is not None:
            self._backend.terminate(timeout)


class Remote:
    """A service whose workers are in the care of another process."""

    def __init__(self, definition: ServiceDefinition, owner: Owner, relay: Relay) -> None:
        self._definition = definition
        self._owner = owner
        self._relay = relay

    def call(self, type: str, message: bytes, timeout: float | None) -> FutureProxy[Any]:
        """Have a worker handle a message; what it says."""
        check_handler(self._definition.cls, self._definition.name, type)
        args = (self._definition.name, type, message)
        return self._owner.call(self._relay, options_of(self._definition, type, timeout), answer, args)

    def send(self, type: str, message: bytes) -> None:
        """Have a worker handle a message."""
        self._post("send", type, message)

    def broadcast(self, type: str, message: bytes) -> None:
        """Have every worker handle a message."""
        self._post("broadcast", type, message)

    def _post(self, verb: str, type: str, message: bytes) -> None:
        check_handler(self._definition.cls, self._definition.name, type)
        self._relay.post(Errand(verb, self._definition.name, type, message))


def options_of(definition: ServiceDefinition, type: str, timeout: float | None) -> JobOptions:
    """Those of the job that a call is."""
    return JobOptions(name=name_of(definition, type), timeout=timeout)


def name_of(definition: ServiceDefinition, type: str) -> str:
    """What the job is called that a call is."""
    return f"{definition.name}.{type}"


def packed(type: str, body: object) -> bytes:
    """A message as bytes.

    :raises NotPicklable: for a body that cannot be sent.
    """
    return b"".join(pickle_or_explain((type, body), f"The body of message {type!r}", "be sent to a worker process"))
