"""A follower's side: what it sends to the leader, and what comes back; the protocol stands in :mod:`.protocol`."""

from __future__ import annotations

import contextlib
import pickle
import selectors
import socket
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from operator import itemgetter
from typing import TYPE_CHECKING

from flask_executor.backends.process.after_fork import close_in_child
from flask_executor.backends.process.channel import FrameStream
from flask_executor.backends.process.protocol import ProgressReport
from flask_executor.exceptions import ExecutorShutdown, QueueFull, WorkerLost
from flask_executor.helpers.log import logger
from flask_executor.helpers.serial_thread import SerialThread
from flask_executor.jobs.call import Call, CallControl, PlainCall
from flask_executor.jobs.model import JobMessage, JobStatus
from flask_executor.jobs.packing import pickle_or_explain, settle_from_bytes, unpack_error, unpack_meta
from flask_executor.services.protocol import CLOSED, FrameSender, Operation, Reply, Request
from flask_executor.services.send_window import WINDOW_SIZE, CallProgress, Item, PendingCall, SendWindow

if TYPE_CHECKING:
    from flask_executor.services.registry import ServiceRegistry

_MAX_QUEUED = 100_000  # messages and calls for a service that wait in a follower


class StopService(PlainCall):
    """Stops a service, in the process that leads; a follower waits for that as for a call.

    :param timeout: seconds after which force is used; None for never.
    """

    def __init__(self, service: str, timeout: float | None) -> None:
        super().__init__(StopService, (service, "", pickle.dumps(timeout)), {})

    def do(self, registry: ServiceRegistry) -> None:
        """Stop it, in a thread, as it may take long."""
        threading.Thread(target=self._do, args=(registry,), name="flask-executor-service-stop", daemon=True).start()

    def _do(self, registry: ServiceRegistry) -> None:
        service, _, timeout = self.args
        if self.begin():
            try:
                registry.stop_here(service, pickle.loads(timeout))
                self.succeed(None)
            except Exception as error:
                self.fail(error)


class LeaderClient(CallControl):
    """The way to the leader, for the calls and messages of this process.

    Everything is changed under ``_lock``. A call or message waits in the window of its service, or is sent; calls are
    in ``_calls`` until they end, and in ``_sent`` while the leader has them. Once this process leads itself, ``_local``
    gives its registry, where calls and messages go at once.
    """

    def __init__(self) -> None:
        #: Runs the user's callbacks, for the thread that reads.
        self.callbacks = SerialThread("flask-executor-service-callbacks")
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._sender: FrameSender | None = None  # once the leader has said WELCOME
        self._going_away = False  # the leader accepts no more
        self._local: Callable[[], ServiceRegistry | None] | None = None
        self._windows: OrderedDict[str, SendWindow] = OrderedDict()  # the one that has waited longest first
        self._calls: dict[str, PendingCall] = {}  # by the id of the job
        self._sent: dict[int, PendingCall] = {}  # by the number of the request
        self._numbers = count(1)
        self._confirmation: int | None = None  # the number of such a request that is not answered
        self._wakes, self._wake_up = map(close_in_child, socket.socketpair())
        self._wake_up.setblocking(False)
        self._closed = False

    # ---- any thread ----

    def open_window(self, service: str, max_pending: int) -> None:
        """Before anything is sent to a service: say how many messages may wait for it."""
        if service not in self._windows:
            with self._lock:
                self._windows.setdefault(service, SendWindow(min(max_pending, WINDOW_SIZE)))

    def enqueue(self, call: Call) -> None:
        with self._lock:
            self._put(call.args[0], PendingCall(call))

    def send(self, request: Request) -> None:
        """Send a message that has no answer.

        :raises QueueFull: when too many wait in this process.
        """
        with self._lock:
            self._put(request.service, request)

    def _put(self, service: str, item: Item) -> None:
        local = None if self._local is None else self._local()
        if self._closed or (self._local is not None and local is None):
            raise ExecutorShutdown(CLOSED)
        if local is not None:
            self._run_locally(item, local)
            return
        window = self._windows[service]
        if len(window) >= _MAX_QUEUED:
            raise QueueFull("the way to the process that leads", _MAX_QUEUED)
        if isinstance(item, PendingCall):
            self._calls[item.call.job.id] = item
        window.put(item)
        self._send_ready()

    def _send_ready(self) -> None:
        """Send what may be sent, as long as the leader reads it; of each service in turn."""
        sender = self._sender
        while sender is not None and not self._going_away and not sender.pending:
            service = next((service for service, window in self._windows.items() if window.is_ready), None)
            if service is None:
                return
            self._windows.move_to_end(service)
            self._send_first(sender, self._windows[service])

    def _send_first(self, sender: FrameSender, window: SendWindow) -> None:
        item, number = window.pop(), next(self._numbers)
        if isinstance(item, Request):
            window.sent(number, sender.request(item, number), item)
            return
        self._sent[number] = item
        item.number, item.progress = number, CallProgress.SENT
        call = item.call
        service, type, data = call.args
        operation: Operation = "stop" if isinstance(call, StopService) else "call"
        sender.request(Request(operation, service, type, data, call.job.id), number)
        for message in call.undelivered or ():
            self._control("deliver", item, message)

    def withdraw(self, call: Call) -> bool:
        with self._lock:
            pending = self._calls.get(call.job.id)
            if pending is not None:
                if pending.progress is CallProgress.STARTED:
                    return False
                if pending.progress is CallProgress.QUEUED:
                    self._windows[call.args[0]].remove(pending)
                else:
                    self._control("request_stop", pending)
                self._forget(pending)
                return True
        return call.backend is None or call.backend is self or call.backend.withdraw(call)

    def request_stop(self, call: Call, attempt: int, reason: JobStatus) -> None:
        with self._lock:
            pending = self._calls.get(call.job.id)
            if pending is not None:
                self._control("request_stop", pending)

    def kill(self, call: Call, attempt: int) -> None:
        with self._lock:
            pending = self._calls.get(call.job.id)
            if pending is not None:
                pending.forced = True
                self._control("kill", pending)

    def deliver(self, call: Call, message: JobMessage) -> None:
        data = b"".join(pickle_or_explain(message, f"The message for job {call.job.name}"))
        with self._lock:
            pending = self._calls.get(call.job.id)
            if call.backend is None or call.backend is self:
                if pending is None or pending.progress is not CallProgress.STARTED:
                    call.undelivered = [*(call.undelivered or ()), data]  # they go with each request
                if pending is not None:
                    self._control("deliver", pending, data)
                return
        call.backend.deliver(call, message)  # this process leads since

    def _control(self, operation: Operation, pending: PendingCall, data: bytes = b"") -> None:
        if self._sender is not None and pending.number in self._sent:
            self._sender.request(Request(operation, pending.call.args[0], data=data), pending.number)

    def _forget(self, pending: PendingCall) -> None:
        self._sent.pop(pending.number, None)
        self._calls.pop(pending.call.job.id, None)

    def drain(self, timeout: float) -> None:
        """Wait until the leader has accepted everything, and has answered calls; at most ``timeout`` seconds."""
        deadline = time.monotonic() + timeout

        def wait_for(condition: Callable[[], bool]) -> bool:
            return self._changed.wait_for(condition, max(0.0, deadline - time.monotonic()))

        with self._lock:
            while wait_for(self._is_empty) and self._sender is not None and not self._going_away:
                # The last messages were perhaps not accepted: what the leader says of that comes before its answer.
                self._confirmation = number = next(self._numbers)
                self._sender.request(Request("confirm", ""), number)
                if not wait_for(lambda: self._confirmation is None) or self._is_empty():
                    return

    def _is_empty(self) -> bool:
        return not self._sent and not any(map(len, self._windows.values()))

    def end(self) -> None:
        """Accept no more, and have the thread end."""
        with self._lock:
            self._closed = True
        self.wake()

    def wake(self) -> None:
        """Have the thread look at everything."""
        with contextlib.suppress(OSError):
            self._wake_up.send(b"w")

    # ---- the thread that reads, flask-executor-follower ----

    def serve(self, stream: FrameStream) -> None:
        """Talk to the leader, until it is gone."""
        sender = FrameSender(stream, self.wake)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(stream, selectors.EVENT_READ)
                selector.register(self._wakes, selectors.EVENT_READ)
                while not self._closed:
                    selector.modify(stream, sender.events)
                    for key, events in selector.select():
                        if key.fileobj is self._wakes:
                            self._wakes.recv(4096)
                            continue
                        if events & selectors.EVENT_WRITE:
                            sender.flush()
                        if events & selectors.EVENT_READ:
                            self._read(sender)
                    with self._lock:
                        self._send_ready()
                        self._changed.notify_all()
        except (EOFError, OSError):  # the leader is gone
            pass
        finally:
            self._on_disconnect(stream)
            stream.close()

    def _read(self, sender: FrameSender) -> None:
        with contextlib.suppress(BlockingIOError):
            for kind, number, body in sender.stream.receive():
                if kind == Reply.WELCOME:
                    with self._lock:
                        self._sender, self._going_away = sender, False
                elif kind == Reply.CREDIT:
                    with self._lock:
                        self._windows[body.decode()].grant(number)
                elif kind == Reply.GOAWAY:
                    self._on_goaway(number)
                elif kind == Reply.PROGRESS:
                    self._on_progress(number, pickle.loads(body))
                else:
                    self._on_call_event(number, kind, body)

    def _on_progress(self, number: int, report: ProgressReport) -> None:
        pending = self._sent.get(number)
        if pending is not None and pending.progress is CallProgress.STARTED:
            job = pending.call.job
            job.progress, job.message = report.progress, report.message
            if report.meta is not None:
                job.meta = unpack_meta(report.meta)
            pending.call.progressed()

    def _on_call_event(self, number: int, kind: int, body: bytes) -> None:
        with self._lock:
            if number == self._confirmation:
                self._confirmation = None
            pending = self._sent.get(number)
            if pending is None:  # a confirmation, or a call that was cancelled
                return
            if kind == Reply.ASSIGNED:
                pending.progress = CallProgress.ASSIGNED
                return
            if not _start(pending):  # it was cancelled
                self._forget(pending)
                return
            if kind == Reply.STARTED:
                return
            self._forget(pending)
        try:
            _settle(pending, kind, body)
        except BaseException as error:  # also SystemExit: it is not meant for this thread
            logger.exception("Job %s could not be settled.", pending.call.job.id)
            with contextlib.suppress(Exception):
                pending.call.fail(error)

    def _on_goaway(self, last_accepted: int) -> None:
        """The leader accepts no request after this one: take those back that were sent."""
        with self._lock:
            self._going_away, self._confirmation = True, None
            self._requeue(lambda number, _: number > last_accepted)

    def _on_disconnect(self, stream: FrameStream) -> None:
        with self._lock:
            self._sender, self._going_away, self._confirmation = None, False, None
            self._requeue(lambda _, end: end > stream.sent, gone=True)
            lost = list(self._sent.values())
            for pending in lost:
                self._forget(pending)
            self._changed.notify_all()
        for pending in lost:
            if _start(pending):
                error = WorkerLost(f"The process ended that looked after service {pending.call.args[0]!r}.")
                pending.call.fail(error, JobStatus.LOST)

    def _requeue(self, is_refused: Callable[[int, int], bool], *, gone: bool = False) -> None:
        """Have what the leader has not accepted wait for the next one, in its order.

        :param is_refused: says that of a message, by its number and its end.
        :param gone: If true, the leader has gone, and calls that it had not assigned wait as well.
        """
        for service, window in self._windows.items():
            items = window.take_back(is_refused)
            for number, pending in list(self._sent.items()):
                waits = gone and pending.progress is CallProgress.SENT
                if pending.call.args[0] == service and (waits or is_refused(number, 0)):
                    pending.progress, pending.number = CallProgress.QUEUED, 0
                    items.append((number, self._sent.pop(number)))
            window.put_back([item for _, item in sorted(items, key=itemgetter(0))])

    # ---- this process leads, or ends ----

    def lead(self, registry: ServiceRegistry) -> None:
        """This process leads now: what waits is for its own workers, and so is what comes."""
        with self._lock:
            for window in self._windows.values():
                for item in window.clear():
                    try:
                        self._run_locally(item, registry)
                    except Exception as error:
                        if isinstance(item, Request):
                            logger.error("A message for service %r is lost: %s", item.service, error)
                        elif _start(item):
                            item.call.fail(error)
            self._calls.clear()
            self._local = weakref.ref(registry)
            self._changed.notify_all()

    def _run_locally(self, item: Item, registry: ServiceRegistry) -> None:
        if isinstance(item, Request):
            pool = registry.pool(item.service)
            if item.operation == "send":
                pool.send(item.type, item.data, bounded=False)
            else:
                pool.broadcast(item.type, item.data)
            return
        if isinstance(item.call, StopService):
            item.call.do(registry)
        else:
            registry.pool(item.call.args[0]).take_over(item.call)

    def close(self) -> None:
        """Give up what was not sent, and close what is open. The thread has ended."""
        with self._lock:
            items = [item for window in self._windows.values() for item in window.clear()]
            self._calls.clear()
        messages = sum(isinstance(item, Request) for item in items)
        if messages:
            logger.error("%d messages for services are lost, as the process ended.", messages)
        for item in items:
            if isinstance(item, PendingCall) and _start(item):
                error = WorkerLost(f"The process ended before service {item.call.args[0]!r} was asked.")
                item.call.fail(error, JobStatus.LOST)
        self.callbacks.close(wait=False)
        self._wakes.close()
        self._wake_up.close()


def _start(pending: PendingCall) -> bool:
    """A worker begins with the call, or has: claim its future; False when it was cancelled."""
    if pending.progress is not CallProgress.STARTED and pending.call.begin():
        pending.progress = CallProgress.STARTED
        pending.call.undelivered = None
    return pending.progress is CallProgress.STARTED


def _settle(pending: PendingCall, kind: int, body: bytes) -> None:
    call = pending.call
    if kind == Reply.STOPPED:
        call.stopped(forced=pending.forced)
    elif kind == Reply.ERROR:
        error = unpack_error(body)
        call.fail(error, JobStatus.LOST if isinstance(error, WorkerLost) else JobStatus.FAILED)
    else:
        settle_from_bytes(call, kind, body)
