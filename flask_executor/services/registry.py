"""The services of an app, seen from one of its processes."""

from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from flask_executor.abc import BackendOptions, ServiceStatus
from flask_executor.backends.process.protocol import ServiceMessage
from flask_executor.exceptions import ExecutorShutdown, QueueFull, WorkerLost
from flask_executor.futures import FutureProxy
from flask_executor.helpers.log import logger
from flask_executor.jobs.contexts import call_sync
from flask_executor.services.definition import ServiceDefinition
from flask_executor.services.election import PATIENCE, Seat, meeting_place
from flask_executor.services.inbox import Incoming
from flask_executor.services.pool import Crew, Owner, Remote, packed
from flask_executor.services.protocol import SHUT, StopCall

T = TypeVar("T")
Handlers = Mapping[tuple[str, str], Callable[[Any], object]]

_LOOK = 0.01  # seconds between two looks whether something has ended
_LAST_MOMENT = 1.0  # seconds in which services may still send the first message to another, and in which those end
# that could not before, as others that send them messages went on
_LAST_WORDS = 30.0  # seconds in which the process that leads may still answer one that ends


class Services:
    """The services of an app in this process, by name.

    :param definitions: those that the app wants; more may come.
    :param handlers: what the app does with their messages, by service and type; more may come.
    """

    # _crews is changed under _lock.

    def __init__(
        self,
        owner: Owner,
        options: Callable[[], BackendOptions],
        definitions: Mapping[str, ServiceDefinition],
        handlers: Handlers,
    ) -> None:
        self._owner = owner
        self._options = options
        self._definitions = definitions
        self._handlers = handlers
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._crews: dict[str, Crew] = {}
        self._all_started = 0  # how many there were
        self._incoming = Incoming(self._deliver)
        self._seat: Seat | None = None
        self._closed = False  # no more messages are accepted
        self._ended = False  # nor done

    def member(self, name: str) -> Crew | Remote:
        """The workers of a service: those of this process, or the way to those of the one that leads."""
        self._check_open()
        return self._member(name)

    def _member(self, name: str) -> Crew | Remote:
        definition = self._definitions[name]
        if definition.per == "process":
            return self.crew(name)
        seat = self._seat_here()
        if seat.take():
            return self.crew(name)
        return Remote(definition, self._owner, seat.relay)

    def _seat_here(self) -> Seat:
        with self._lock:
            if self._seat is None:
                self._owner.register_for_shutdown()
                identity = self._owner.identity
                self._seat = Seat(lambda: meeting_place(*identity), weakref.ref(self))
                finalizer = weakref.finalize(self, self._seat.close)
                finalizer.atexit = False
            return self._seat

    def _check_open(self) -> None:
        if self._closed:
            raise ExecutorShutdown(SHUT)

    def lead(self) -> None:
        """This process leads from now on."""
        for name, definition in list(self._definitions.items()):
            if definition.per == "app":
                self.crew(name)

    def crew(self, name: str) -> Crew:
        """The workers of a service in this process, started now if they were not.

        :raises KeyError: for a service that there is not.
        :raises ExecutorShutdown: after :meth:`close`.
        """
        with self._lock:
            crew = self._crews.get(name)
            if crew is None:
                if self._ended:
                    raise ExecutorShutdown(SHUT)
                self._owner.register_for_shutdown()
                crew = Crew(self._definitions[name], self._owner, self._options(), self._incoming.take)
                crew.start()
                self._crews[name] = crew
            return crew

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

    def started(self) -> list[Crew]:
        """Those that were."""
        with self._lock:
            return list(self._crews.values())

    def stop(self, name: str, timeout: float | None) -> None:
        """Stop one, whichever process looks after it; it is started again when it is used again."""
        if self._closed or self._definitions[name].per == "process" or self._seat_here().take():
            self.stop_here(name, timeout)
            return
        call = StopCall(name, timeout)
        self._seat_here().relay.enqueue(call)
        with suppress(WorkerLost):  # the process has ended that looked after it, and so has the service
            call.future.result()

    def stop_here(self, name: str, timeout: float | None) -> None:
        """Stop one, if it runs in this process."""
        with self._lock:
            crew = self._crews.pop(name, None)
        if crew is not None:
            crew.stop(timeout)

    def status(self, name: str, deadline: float | None = None) -> ServiceStatus:
        """How one is doing, whichever process looks after it.

        :param deadline: until when to wait for its answer (:func:`time.monotonic`).
        """
        return self._ask(name, deadline) or self.local_status(name)

    def _ask(self, name: str, deadline: float | None = None) -> ServiceStatus | None:
        """What the process says that leads, if it is another one."""
        if self._definitions[name].per == "process" or name in self._crews:
            return None
        seat = self._seat_here()
        patience = PATIENCE if deadline is None else max(0.0, deadline - time.monotonic())
        return None if seat.leading else seat.ask(name, patience)

    def local_status(self, name: str) -> ServiceStatus:
        """How one is doing in this process."""
        crew = self._crews.get(name)
        if crew is not None:
            return crew.status()
        definition = self._definitions.get(name)
        return ServiceStatus(name=name, workers=0 if definition is None else definition.workers)

    def statuses(self) -> tuple[ServiceStatus, ...]:
        """How all are doing."""
        deadline = time.monotonic() + PATIENCE  # for a leader that hangs
        return () if self._closed else tuple(self.status(name, deadline) for name in list(self._definitions))

    def close(self, *, wait: bool) -> None:
        """Accept no more messages, and end when what was accepted is done.

        :param wait: whether to return only then.
        """
        self._closed = True
        if wait:
            self._finish(None)
        elif self._crews or self._seat is not None:
            threading.Thread(target=self._finish, args=(None,), name="flask-executor-closing", daemon=True).start()

    def leave(self, deadline: float) -> None:
        """The process ends: stop all, by force what goes on at ``deadline`` (:func:`time.monotonic`)."""
        self._closed = True
        self._finish(deadline)

    def _finish(self, deadline: float | None) -> None:
        self._drain(deadline)  # if the leader ends too, this process may yet lead
        self._ended = True
        self._end_crews(deadline)
        while len(self._incoming) and (deadline is None or time.monotonic() < deadline):
            time.sleep(_LOOK)
        self._drain(deadline)  # what services here have sent at their end
        self._incoming.close()
        if self._seat is not None:
            self._seat.close()

    def _drain(self, deadline: float | None) -> None:
        if self._seat is not None and not self._seat.leading:
            self._seat.relay.drain(_LAST_WORDS if deadline is None else max(0.0, deadline - time.monotonic()))

    def _end_crews(self, deadline: float | None) -> None:
        """End all workers at once, but those that others send messages to after those others.

        Who sends to whom is known of those that have done so. Others, with nothing to do, wait for it for a moment.
        """
        crews = {crew.definition.name: crew for crew in self.started()}
        left, ending = dict(crews), set[str]()
        moment = time.monotonic() + _LAST_MOMENT
        while left and (deadline is None or time.monotonic() < deadline):
            quiet = time.monotonic() > moment or not any(crew.busy for crew in left.values())
            for name in self._incoming.senders_first(left):
                if name not in ending and (quiet or left[name].busy):
                    ending.add(name)
                    left[name].close(wait=False)
            for name in [name for name in ending if name in left and left[name].ended]:
                if not self._incoming.between:
                    del left[name]
            if left:
                time.sleep(_LOOK)
        for crew in left.values():
            crew.close(wait=False)
        last = time.monotonic() + _LAST_MOMENT
        for crew in crews.values():
            crew.stop(None if deadline is None else max(0.0, last - time.monotonic()))

    def after_fork(self) -> None:
        """In the child of a fork: those of the parent are not here."""
        self._reset()

    def _deliver(self, sender: str, message: ServiceMessage) -> None:
        body = pickle.loads(message.body)
        if message.to is not None:
            try:
                self._member(message.to).send(message.type, packed(message.type, body))
            except (KeyError, ValueError, QueueFull, ExecutorShutdown) as error:
                logger.error("Service %r sent a message to %r, which is lost: %s", sender, message.to, error)
            return
        handler = self._handlers.get((sender, message.type))
        app = self._owner.app
        if handler is None or app is None:
            logger.error(
                "Service %r sent %r to the app, which has no @executor.on(%r, %r) for it.",
                sender,
                message.type,
                sender,
                message.type,
            )
            return
        with app.app_context():
            call_sync(handler, (body,), {})


class ServiceHandle:
    """A service, as the app uses it; what :meth:`Executor.service <flask_executor.Executor.service>` returns.

    :param services: gives the services of the current app.
    """

    def __init__(self, name: str, services: Callable[[], Services]) -> None:
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
        message = packed(type, body)
        return self._do(lambda member: member.call(type, message, timeout))

    def send(self, type: str, body: object = None) -> None:
        """Have one of the workers handle a message, and do not wait for it. An error that it raises is logged.

        With one worker messages are handled in the order in which they were sent, calls included.

        :raises ValueError: when nothing handles messages of this type.
        :raises NotPicklable: for a body that cannot be sent.
        :raises QueueFull: when too many messages wait.
        """
        message = packed(type, body)
        self._do(lambda member: member.send(type, message))

    def broadcast(self, type: str, body: object = None) -> None:
        """Have every worker handle a message, before those that are sent from now on, and before those that wait.

        A worker that is started later does not get it.

        :raises ValueError: when nothing handles messages of this type.
        :raises NotPicklable: for a body that cannot be sent.
        """
        message = packed(type, body)
        self._do(lambda member: member.broadcast(type, message))

    def _do(self, what: Callable[[Crew | Remote], T]) -> T:
        services = self._services()
        member = services.member(self.name)
        while True:
            try:
                return what(member)
            except ExecutorShutdown:
                before, member = member, services.member(self.name)
                if member is before or isinstance(member, Remote):
                    raise
                # it was stopped in between, and is started again

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
