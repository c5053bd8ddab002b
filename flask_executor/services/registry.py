"""The services of an app, seen from one of its processes."""

from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flask_executor.abc import BackendOptions, ServiceStatus
from flask_executor.backends.process.protocol import ServiceMessage
from flask_executor.exceptions import ExecutorShutdown, QueueFull
from flask_executor.futures import FutureProxy
from flask_executor.helpers.log import logger
from flask_executor.jobs.contexts import call_sync
from flask_executor.services.definition import ServiceDefinition
from flask_executor.services.election import LeaderElection, runtime_dir
from flask_executor.services.inbox import ServiceInbox
from flask_executor.services.pool import RemoteService, ServiceHost, ServicePool
from flask_executor.services.protocol import CLOSED
from flask_executor.services.worker import pack_message

T = TypeVar("T")
M = TypeVar("M", ServicePool, "ServicePool | RemoteService")
Handlers = Mapping[tuple[str, str], Callable[[Any], object]]

_STATUS_TIMEOUT = 5.0  # seconds that the leader has to tell how its services are doing
_FORCED_STOP_DELAY = 1.0  # seconds in which services that could not end before the deadline may still do so
_DRAIN_TIMEOUT = 30.0  # seconds in which the leader may still answer a follower that shuts down


class ServiceRegistry:
    """The services of an app in this process, by name.

    :param options: gives what worker processes are made from.
    :param definitions: the services that the app wants; more may come.
    :param handlers: what the app does with messages of services, by service and type; more may come.
    """

    # _pools is changed under _lock.

    def __init__(
        self,
        host: ServiceHost,
        options: Callable[[], BackendOptions],
        definitions: Mapping[str, ServiceDefinition],
        handlers: Handlers,
    ) -> None:
        self._host = host
        self._options = options
        self._definitions = definitions
        self._handlers = handlers
        self.after_fork()

    def after_fork(self) -> None:
        """In the child of a fork: the services of the parent are not here."""
        self._lock = threading.RLock()
        self._pools: dict[str, ServicePool] = {}
        self._all_started = 0  # how many there were
        self._inbox = ServiceInbox(self._deliver)
        self._election: LeaderElection | None = None
        self._closed = False  # If true, no more messages of this process are accepted
        self._ended = False  # If true, nor are those of followers and of services

    # ---- finding and starting ----

    def member(self, name: str) -> ServicePool | RemoteService:
        """A service: its pool in this process, or the way to the process that leads.

        :raises ExecutorShutdown: after :meth:`close`.
        """
        if self._closed:
            raise ExecutorShutdown(CLOSED)
        return self._member(name)

    def _member(self, name: str) -> ServicePool | RemoteService:
        return self.pool(name) if self._is_local(name) else self._remote(name)

    def _is_local(self, name: str) -> bool:
        return self._definitions[name].per == "process" or self._get_election().join()

    def _remote(self, name: str) -> RemoteService:
        return RemoteService(self._definitions[name], self._host, self._get_election().client)

    def _get_election(self) -> LeaderElection:
        with self._lock:
            if self._election is None:
                self._host.register_for_shutdown()
                identity = self._host.identity
                self._election = LeaderElection(lambda: runtime_dir(*identity), weakref.ref(self))
                finalizer = weakref.finalize(self, self._election.close)
                finalizer.atexit = False
            return self._election

    def pool(self, name: str) -> ServicePool:
        """The pool of a service in this process, started now if it was not.

        :raises KeyError: when there is no such service.
        :raises ExecutorShutdown: when this process has ended its services.
        """
        with self._lock:
            pool = self._pools.get(name)
            if pool is None:
                if self._ended:
                    raise ExecutorShutdown(CLOSED)
                self._host.register_for_shutdown()
                pool = ServicePool(self._definitions[name], self._host, self._options(), self._inbox.put)
                pool.start()
                self._pools[name] = pool
            return pool

    def use(self, name: str, act: Callable[[ServicePool | RemoteService], T]) -> T:
        """Do something with a service, started again if it is stopped in between."""
        return _retry_if_stopped(lambda: self.member(name), act)

    def use_pool(self, name: str, act: Callable[[ServicePool], T]) -> T:
        """As :meth:`use`, with a service whose pool is in this process."""
        return _retry_if_stopped(lambda: self.pool(name), act)

    def start(self) -> None:
        """Start all that were not; called at every request."""
        if self._all_started != len(self._definitions):
            self._all_started = len(self._definitions)
            errors = []
            for name in list(self._definitions):
                try:
                    self.member(name)
                except Exception as error:  # the others are to start all the same
                    errors.append(error)
            if errors:
                raise errors[0]

    def start_shared(self) -> None:
        """This process leads now: start the services that it has for all processes."""
        for name, definition in list(self._definitions.items()):
            if definition.per == "app":
                self.pool(name)

    def started(self) -> list[ServicePool]:
        """The pools in this process."""
        with self._lock:
            return list(self._pools.values())

    # ---- status ----

    def status(self, name: str, deadline: float | None = None) -> ServiceStatus:
        """How a service is doing, whichever process has its workers.

        :param deadline: until when to wait for the answer of that one (:func:`time.monotonic`).
        """
        if self._definitions[name].per == "app" and name not in self._pools:
            election = self._get_election()
            timeout = _STATUS_TIMEOUT if deadline is None else max(0.0, deadline - time.monotonic())
            status = None if election.leading else election.ask_status(name, timeout)
            if status is not None:
                return status
        return self.local_status(name)

    def local_status(self, name: str) -> ServiceStatus:
        """How a service is doing in this process."""
        pool = self._pools.get(name)
        if pool is not None:
            return pool.status()
        definition = self._definitions.get(name)
        return ServiceStatus(name=name, workers=0 if definition is None else definition.workers)

    def statuses(self) -> tuple[ServiceStatus, ...]:
        """How all services are doing."""
        deadline = time.monotonic() + _STATUS_TIMEOUT  # for all of them, as the leader may hang
        return () if self._closed else tuple(self.status(name, deadline) for name in list(self._definitions))

    # ---- stopping ----

    def stop(self, name: str, timeout: float | None) -> None:
        """Stop a service, whichever process has its workers; it is started again when it is used again."""
        if self._closed or self._is_local(name):
            self.stop_here(name, timeout)
        else:
            self._remote(name).stop(timeout)

    def stop_here(self, name: str, timeout: float | None) -> None:
        """Stop a service, if it runs in this process; return when it has ended.

        :param timeout: seconds after which force is used; None for never.
        """
        with self._lock:
            pool = self._pools.pop(name, None)
        if pool is not None:
            pool.stop(timeout)

    def close(self, *, wait: bool) -> None:
        """Accept no more messages, and end when what was accepted is done.

        :param wait: If true, return only then.
        """
        self._closed = True
        if wait:
            self._finish(None)
        elif self._pools or self._election is not None:
            name = "flask-executor-services-shutdown"
            threading.Thread(target=self._finish, args=(None,), name=name, daemon=True).start()

    def terminate(self, deadline: float) -> None:
        """The process ends: stop all, by force what goes on at ``deadline`` (:func:`time.monotonic`)."""
        self._closed = True
        self._finish(deadline)

    def _finish(self, deadline: float | None) -> None:
        self._drain(deadline)  # if the leader ends too, this process may yet lead
        self._ended = True
        self._stop_senders_first(deadline)
        self._inbox.flush(deadline)
        self._drain(deadline)  # what services here have sent at their end
        self._inbox.close()
        if self._election is not None:
            self._election.close()

    def _drain(self, deadline: float | None) -> None:
        if self._election is not None and not self._election.leading:
            self._election.client.drain(_DRAIN_TIMEOUT if deadline is None else _seconds_until(deadline))

    def _stop_senders_first(self, deadline: float | None) -> None:
        """End all workers; those of a service that others send messages to after those of the others.

        Who sends to whom is known of services that have done so. One with nothing to do ends after those that are
        busy, and may yet send it something.
        """
        pools = {pool.definition.name: pool for pool in self.started()}
        left = dict(pools)
        while left:
            self._inbox.flush_to_services(deadline)
            first = self._inbox.independent(left)
            ending = [left.pop(name) for name in [name for name in first if left[name].busy] or first]
            for pool in ending:
                pool.close(wait=False)
            for pool in ending:
                pool.join(None if deadline is None else _seconds_until(deadline))
        last = time.monotonic() + _FORCED_STOP_DELAY
        for pool in pools.values():
            pool.stop(None if deadline is None else _seconds_until(last))

    # ---- messages from services ----

    def _deliver(self, sender: str, message: ServiceMessage) -> None:
        """Deliver a message; in a thread of the inbox."""
        if message.to is None:
            self._handle(sender, message)
            return
        try:
            self._member(message.to).send(message.type, message.data)
        except (KeyError, ValueError, QueueFull, ExecutorShutdown) as error:
            logger.error("Service %r sent a message to %r, which is lost: %s", sender, message.to, error)

    def _handle(self, sender: str, message: ServiceMessage) -> None:
        handler = self._handlers.get((sender, message.type))
        app = self._host.app
        if handler is None or app is None:
            what = "Service %r sent %r to the app, which has no @executor.on(%r, %r) for it."
            logger.error(what, sender, message.type, sender, message.type)
            return
        _, body = pickle.loads(message.data)
        with app.app_context():
            call_sync(handler, (body,), {})


def _seconds_until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _retry_if_stopped(find: Callable[[], M], act: Callable[[M], T]) -> T:
    member = find()
    while True:
        try:
            return act(member)
        except ExecutorShutdown:
            former, member = member, find()
            if member is former or isinstance(member, RemoteService):
                raise


class ServiceHandle:
    """A service, as the app uses it; what :meth:`Executor.service <flask_executor.Executor.service>` returns.

    :param services: gives the services of the current app.
    """

    def __init__(self, name: str, services: Callable[[], ServiceRegistry]) -> None:
        self.name = name
        self._services = services

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def call(self, type: str, body: object = None, *, timeout: float | None = None) -> FutureProxy[Any]:
        """Have one of the workers handle a message.

        :param type: which of its handlers: ``@on(type)``.
        :param body: anything that can be pickled.
        :param timeout: seconds that the handler may take; then it has to leave as a job that is asked to stop, and the
            result is a :exc:`~flask_executor.JobTimeout`. None for no limit.
        :return: the handle of what it returns or raises; a :exc:`~flask_executor.WorkerLost` when its process dies.
        :raises ValueError: when nothing handles messages of this type, and for a timeout that cannot be used.
        :raises NotPicklable: for a body that cannot be sent.
        :raises QueueFull: when too many messages wait; where another process looks after the service it is the result.
        """
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}; it must be a number of seconds greater than 0, or None")
        message = pack_message(type, body)
        return self._use(lambda member: member.call(type, message, timeout))

    def send(self, type: str, body: object = None) -> None:
        """Have one of the workers handle a message, and do not wait for it. An error that it raises is logged.

        With one worker messages are handled in the order in which they were sent, calls included.

        :raises ValueError: when nothing handles messages of this type.
        :raises NotPicklable: for a body that cannot be sent.
        :raises QueueFull: when too many messages wait.
        """
        message = pack_message(type, body)
        self._use(lambda member: member.send(type, message))

    def broadcast(self, type: str, body: object = None) -> None:
        """Have every worker handle a message, before those that are sent from now on, and before those that wait.

        A worker that is started later does not get it.

        :raises ValueError: when nothing handles messages of this type.
        :raises NotPicklable: for a body that cannot be sent.
        """
        message = pack_message(type, body)
        self._use(lambda member: member.broadcast(type, message))

    def _use(self, act: Callable[[ServicePool | RemoteService], T]) -> T:
        return self._services().use(self.name, act)

    def start(self) -> None:
        """Start the workers now, and not at the first request; or see to it that another process has."""
        self._services().member(self.name)

    def status(self) -> ServiceStatus:
        """How it is doing."""
        return self._services().status(self.name)

    def stop(self, timeout: float | None = None) -> None:
        """End the workers after what was accepted; each runs ``teardown``. They start again when it is used again.

        :param timeout: seconds after which they are ended by force; None for as long as it takes.
        """
        self._services().stop(self.name, timeout)
