"""The leader's side: it does what followers request; the protocol stands in :mod:`.protocol`."""

from __future__ import annotations

import contextlib
import functools
import pickle
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from flask_executor.backends.process.after_fork import close_in_child
from flask_executor.backends.process.channel import FrameStream
from flask_executor.backends.process.protocol import ProgressReport
from flask_executor.exceptions import ExecutorShutdown, JobStopped
from flask_executor.helpers.log import logger
from flask_executor.helpers.pickling import pickle_parts
from flask_executor.jobs.call import Call, PlainCall
from flask_executor.jobs.model import JobState
from flask_executor.jobs.packing import pack_error, pickle_or_explain
from flask_executor.services.follower import StopService
from flask_executor.services.protocol import FrameSender, Reply, Request
from flask_executor.services.worker import handle_call

if TYPE_CHECKING:
    from flask_executor.services.pool import ServicePool
    from flask_executor.services.registry import ServiceRegistry

_CLOSE_TIMEOUT = 2.0  # seconds that followers have to read what is left for them
_TOUCH_INTERVAL = 3600.0  # seconds after which the files are touched, so that nobody deletes them as stale
_ACCEPT_RETRY_DELAY = 0.1  # seconds after a connection could not be accepted, most likely for too many open files


class FollowerConnection(FrameSender):
    """A follower, as the leader sees it. The leader's thread changes it; supervisor threads send."""

    def __init__(self, stream: FrameStream, wake: Callable[[], object]) -> None:
        super().__init__(stream, wake)
        #: The calls that it has requested and that have not ended, by number, with their pools.
        self.calls: dict[int, tuple[ServicePool, Call]] = {}
        #: The number of the last request that was accepted.
        self.last_accepted = 0
        #: Whether no more are accepted.
        self.going_away = False
        #: By service: grants credits for a number of messages.
        self.grants: dict[str, Callable[[int], object]] = {}

    def grant(self, service: str) -> Callable[[int], object]:
        """Return a function that grants credits for messages to this service."""
        if service not in self.grants:
            self.grants[service] = functools.partial(self.send, Reply.CREDIT, [service.encode()])
        return self.grants[service]

    def go_away(self) -> None:
        """Accept no more requests."""
        if not self.going_away:
            self.going_away = True
            self.send(Reply.GOAWAY, [], self.last_accepted)

    def reply(self, number: int, future: Future[Any]) -> None:
        """A call has ended."""
        self.calls.pop(number, None)
        if future.cancelled():  # as the follower wanted, which waits for it no more
            return
        error = future.exception()
        if isinstance(error, JobStopped):
            self.send(Reply.STOPPED, [], number)
        elif error is not None:
            self.send(Reply.ERROR, [pack_error(error)], number)
        else:
            try:
                self.send(Reply.RESULT, pickle_or_explain(future.result(), "The result"), number)
            except Exception as refused:
                self.send(Reply.ERROR, [pack_error(refused)], number)


class ForwardedCall(PlainCall):
    """A call that a follower waits for, and is told of."""

    def __init__(self, connection: FollowerConnection, number: int, request: Request) -> None:
        super().__init__(handle_call, (request.service, request.type, request.data), {})
        self.job = JobState(f"{request.service}.{request.type}", id=request.job)
        self._connection = connection
        self._number = number

    def assigned(self) -> None:
        """A worker gets it now, and may begin at any time."""
        self._connection.send(Reply.ASSIGNED, [], self._number)

    def begin(self) -> bool:
        first, claimed = self._claimed is None, super().begin()
        if first and claimed:
            self._connection.send(Reply.STARTED, [], self._number)
        return claimed

    def progressed(self) -> None:
        if not self._connection.pending:  # or the follower reads slowly: later, with what is new then
            job = self.job
            with contextlib.suppress(Exception):  # of what cannot be pickled again
                meta = None if job.meta is None else b"".join(pickle_parts(job.meta))
                report = ProgressReport(job.id, job.progress, job.message, meta)
                self._connection.send(Reply.PROGRESS, pickle_parts(report), self._number)


class LeaderServer:
    """Does what followers request, in a thread of its own.

    :param registry: gives the services of this process; None when the app is gone.
    :param touch_files: called every hour.
    """

    # Only that thread knows the connections. Calls end in supervisor threads of pools, which send the replies.

    def __init__(
        self, listener: socket.socket, registry: Callable[[], ServiceRegistry | None], touch_files: Callable[[], object]
    ) -> None:
        self._listener = listener
        self._get_registry = registry
        self._touch_files = touch_files
        self._wakes, self._wake_up = map(close_in_child, socket.socketpair())
        self._wake_up.setblocking(False)
        self._closing = False
        self._connections: set[FollowerConnection] = set()
        self._thread = threading.Thread(target=self._run, name="flask-executor-leader", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Have the thread look at everything."""
        with contextlib.suppress(OSError):
            self._wake_up.send(b"w")

    def close(self) -> None:
        """Accept no more requests, send what is left, and end."""
        self._closing = True
        self.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(2 * _CLOSE_TIMEOUT)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wakes, selectors.EVENT_READ)
            while not self._closing:
                self._serve(selector, _TOUCH_INTERVAL)
                self._touch_files()
            selector.unregister(self._listener)
            for connection in self._connections:
                connection.go_away()
            deadline = time.monotonic() + _CLOSE_TIMEOUT
            while any(connection.pending for connection in self._connections) and time.monotonic() < deadline:
                self._serve(selector, max(0.0, deadline - time.monotonic()))
        for connection in self._connections:
            connection.stream.close()
        for line in (self._listener, self._wakes, self._wake_up):
            line.close()

    def _serve(self, selector: selectors.BaseSelector, timeout: float) -> None:
        for connection in self._connections:
            selector.modify(connection.stream, connection.events, connection)
        for key, events in selector.select(timeout):
            if key.fileobj is self._wakes:
                self._wakes.recv(4096)
            elif key.data is None:
                self._accept_connection(selector)
            elif not self._read(key.data, events):
                selector.unregister(key.fileobj)
                self._connections.discard(key.data)
                key.data.stream.close()

    def _accept_connection(self, selector: selectors.BaseSelector) -> None:
        try:
            end = self._listener.accept()[0]
        except OSError as error:
            logger.error("Another process of the app could not be let in: %s", error)
            time.sleep(_ACCEPT_RETRY_DELAY)
            return
        connection = FollowerConnection(FrameStream(close_in_child(end)), self.wake)
        self._connections.add(connection)
        selector.register(connection.stream, selectors.EVENT_READ, connection)
        connection.send(Reply.WELCOME, [], 0)

    def _read(self, connection: FollowerConnection, events: int) -> bool:
        """Do what a follower requests; False when it has gone."""
        if events & selectors.EVENT_WRITE:
            connection.flush()
        if events & selectors.EVENT_READ:
            try:
                for _, number, body in connection.stream.receive():
                    self._handle(connection, number, pickle.loads(body))
            except BlockingIOError:
                pass
            except Exception as error:
                if not isinstance(error, EOFError):
                    logger.exception("Another process of the app cannot be understood.")
                return False
        return True

    def _handle(self, connection: FollowerConnection, number: int, request: Request) -> None:
        if request.operation in ("deliver", "request_stop", "kill"):
            self._control_call(connection.calls.get(number), request)
        elif request.operation == "status":
            self._reply_status(connection, number, request.service)
        elif not connection.going_away:
            try:
                self._accept(connection, number, request)
            except ExecutorShutdown:
                connection.go_away()
            else:
                connection.last_accepted = number

    def _registry(self) -> ServiceRegistry:
        registry = self._get_registry()
        if registry is None:
            raise ExecutorShutdown("the app is gone")
        return registry

    def _reply_status(self, connection: FollowerConnection, number: int, service: str) -> None:
        try:
            connection.send(Reply.RESULT, pickle_parts(self._registry().local_status(service)), number)
        except ExecutorShutdown as error:
            connection.send(Reply.ERROR, [pack_error(error)], number)

    def _control_call(self, accepted: tuple[ServicePool, Call] | None, request: Request) -> None:
        if accepted is not None:  # or it has ended
            pool, call = accepted
            if request.operation == "deliver":
                pool.deliver(call, request.data)
            else:
                pool.stop_call(call, forced=request.operation == "kill")

    def _accept(self, connection: FollowerConnection, number: int, request: Request) -> None:
        """Do what is requested.

        :raises ExecutorShutdown: when this process is shutting down, and does not do it.
        """
        registry, operation = self._registry(), request.operation
        try:
            if operation == "confirm":
                connection.send(Reply.RESULT, pickle_parts(None), number)
            elif operation == "stop":
                self._stop_service(registry, connection, number, request)
            else:
                registry.use_pool(request.service, lambda pool: _hand_over(pool, connection, number, request))
        except ExecutorShutdown:
            raise
        except Exception as error:
            if operation == "call":
                connection.send(Reply.ERROR, [pack_error(error)], number)
            else:
                logger.error("A message for service %r from another process is lost: %s", request.service, error)
                connection.grant(request.service)(1)

    def _stop_service(
        self, registry: ServiceRegistry, connection: FollowerConnection, number: int, request: Request
    ) -> None:
        stop = StopService(request.service, pickle.loads(request.data))
        stop.future.add_done_callback(lambda future: connection.reply(number, future))
        stop.do(registry)


def _hand_over(pool: ServicePool, connection: FollowerConnection, number: int, request: Request) -> None:
    grant = connection.grant(request.service)
    if request.operation == "send":
        pool.send(request.type, request.data, on_handled=grant, bounded=False)
    elif request.operation == "broadcast":
        pool.broadcast(request.type, request.data)
        grant(1)
    else:
        call = ForwardedCall(connection, number, request)
        pool.check_room()
        pool.take_over(call, call.assigned)
        connection.calls[number] = pool, call
        call.future.add_done_callback(lambda future: connection.reply(number, future))
