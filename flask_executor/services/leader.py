"""The process that leads, and does the errands of the others."""

from __future__ import annotations

import contextlib
import pickle
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from flask_executor.backends.process.after_fork import close_in_child
from flask_executor.backends.process.channel import FrameStream
from flask_executor.backends.process.protocol import ProgressReport
from flask_executor.exceptions import ExecutorShutdown, JobStopped, QueueFull
from flask_executor.helpers.log import logger
from flask_executor.helpers.pickling import pickle_parts
from flask_executor.jobs.call import Call
from flask_executor.jobs.model import JobState
from flask_executor.jobs.packing import pack_error, pickle_or_explain
from flask_executor.services.protocol import WELCOME, Errand, Leader, RelayFrame, StopCall, Talk, Workforce

_GOODBYE = 2.0  # seconds in which others may still be given back what they have sent
_CARE = 3600.0  # seconds after which one sees to it that the files are not taken for forgotten


class Visitor(Talk):
    """Another process, seen from the leader."""

    def __init__(self, wire: FrameStream, wake: Callable[[], object]) -> None:
        super().__init__(wire, wake)
        #: What it has asked for and waits for, by number.
        self.calls: dict[int, tuple[Workforce, Call]] = {}
        #: Services for which something was given back: so is what comes behind it, until the visitor asks again.
        self.refused: set[str] = set()

    def give_back(self, number: int, errand: Errand) -> None:
        """This is not done, and nothing that comes behind it for the same service."""
        self.refused.add(errand.service)
        self.send(RelayFrame.MESSAGE, pickle_parts(errand), number)

    def reply(self, number: int, future: Future[Any]) -> None:
        """A call has ended."""
        self.calls.pop(number, None)
        if future.cancelled():  # as the other process wanted, which waits for it no more
            return
        error = future.exception()
        if isinstance(error, JobStopped):
            self.send(RelayFrame.STOPPED, [], number)
        elif error is not None:
            self.send(RelayFrame.ERROR, [pack_error(error)], number)
        else:
            try:
                self.send(RelayFrame.RESULT, pickle_or_explain(future.result(), "The result"), number)
            except Exception as refused:
                self.send(RelayFrame.ERROR, [pack_error(refused)], number)


class Teller:
    """Tells a visitor of one of its calls."""

    def __init__(self, visitor: Visitor, number: int) -> None:
        self._visitor = visitor
        self._number = number

    def given(self) -> None:
        """A worker gets it now."""
        self._visitor.send(RelayFrame.GIVEN, [], self._number)

    def begun(self) -> None:
        """A worker begins with it."""
        self._visitor.send(RelayFrame.BEGUN, [], self._number)

    def progressed(self, job: JobState) -> None:
        """It has something new to report."""
        if not self._visitor.wire.pending:  # or it reads slowly: later, with what is new then
            with contextlib.suppress(Exception):  # what cannot be pickled again
                meta = None if job.meta is None else b"".join(pickle_parts(job.meta))
                message = ProgressReport(job.id, job.progress, job.message, meta)
                self._visitor.send(RelayFrame.MESSAGE, pickle_parts(message), self._number)


class Desk:
    """Does the errands of other processes, in a thread of its own.

    Only that thread knows the visitors; their calls end in threads of the workers' supervisors, which send the replies.

    :param leader: gives the services of this process; None when the app is gone.
    :param care: called every hour.
    """

    def __init__(
        self, listener: socket.socket, leader: Callable[[], Leader | None], care: Callable[[], object]
    ) -> None:
        self._listener = listener
        self._leader = leader
        self._care = care
        self._wakes, self._wake_up = map(close_in_child, socket.socketpair())
        self._wake_up.setblocking(False)
        self._closing = False
        self._visitors: set[Visitor] = set()
        self._thread = threading.Thread(target=self._run, name="flask-executor-leader", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Have the thread look at everything."""
        with contextlib.suppress(OSError):
            self._wake_up.send(b"w")

    def close(self) -> None:
        """Give back what is not done, send what is left, and end."""
        self._closing = True
        self.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(2 * _GOODBYE)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wakes, selectors.EVENT_READ)
            while not self._closing:
                self._serve(selector, _CARE)
                self._care()
            selector.unregister(self._listener)
            for visitor in self._visitors:
                visitor.send(RelayFrame.MESSAGE, pickle_parts(Errand("close", "")), 0)
            deadline = time.monotonic() + _GOODBYE
            while self._visitors and time.monotonic() < deadline:  # until all have got back what they still sent
                self._serve(selector, 0.1)
        for visitor in self._visitors:
            visitor.wire.close()
        for line in (self._listener, self._wakes, self._wake_up):
            line.close()

    def _serve(self, selector: selectors.BaseSelector, patience: float) -> None:
        for visitor in self._visitors:
            selector.modify(visitor.wire, visitor.events(), visitor)
        for key, events in selector.select(patience):
            if key.fileobj is self._wakes:
                self._wakes.recv(4096)
            elif key.data is None:
                self._welcome(selector)
            elif not self._attend(key.data, events):
                selector.unregister(key.fileobj)
                self._visitors.discard(key.data)
                key.data.wire.close()

    def _welcome(self, selector: selectors.BaseSelector) -> None:
        try:
            end = self._listener.accept()[0]
        except OSError as error:
            logger.error("Another process of the app could not be let in: %s", error)
            time.sleep(0.1)  # most likely there are too many open files, and it is asked again at once
            return
        visitor = Visitor(FrameStream(close_in_child(end)), self.wake)
        self._visitors.add(visitor)
        selector.register(visitor.wire, selectors.EVENT_READ, visitor)
        visitor.send(RelayFrame.BEGUN, [], WELCOME)

    def _attend(self, visitor: Visitor, events: int) -> bool:
        """Hear what a visitor wants; False when it has gone."""
        if events & selectors.EVENT_WRITE:
            visitor.flush()
        if events & selectors.EVENT_READ:
            try:
                for _, number, body in visitor.wire.receive():
                    self._do(visitor, number, pickle.loads(body))
            except BlockingIOError:
                pass
            except Exception as error:
                if not isinstance(error, EOFError):
                    logger.exception("Another process of the app cannot be understood.")
                return False
        return True

    def _do(self, visitor: Visitor, number: int, errand: Errand) -> None:
        try:
            if errand.verb in ("ready", "again"):
                visitor.refused.discard(errand.service)
                visitor.send(RelayFrame.RESULT, pickle_parts(None), number)
            elif errand.verb in ("tell", "leave", "kill"):
                self._do_for_call(visitor.calls.get(number), errand)
            elif errand.verb == "status":
                visitor.send(RelayFrame.RESULT, pickle_parts(self._services().local_status(errand.service)), number)
            elif errand.service in visitor.refused:
                visitor.give_back(number, errand)
            elif errand.verb == "stop":
                stop = StopCall(errand.service, pickle.loads(errand.data))
                stop.future.add_done_callback(lambda future: visitor.reply(number, future))
                stop.do(self._services())
            else:
                self._do_with(self._services().crew(errand.service), visitor, number, errand)
        except Exception as error:
            full = isinstance(error, QueueFull) and errand.verb == "send"
            if full or (isinstance(error, ExecutorShutdown) and errand.verb in ("call", "send", "broadcast", "stop")):
                visitor.give_back(number, errand)  # for the next leader, or when there is room
            elif errand.verb in ("call", "status"):
                visitor.send(RelayFrame.ERROR, [pack_error(error)], number)
            else:
                logger.error("A message for service %r from another process is lost: %s", errand.service, error)

    def _services(self) -> Leader:
        leader = self._leader()
        if leader is None:
            raise ExecutorShutdown("the app is gone")
        return leader

    def _do_for_call(self, there: tuple[Workforce, Call] | None, errand: Errand) -> None:
        if there is not None:  # or it has ended
            workforce, call = there
            if errand.verb == "tell":
                workforce.tell(call, errand.data)
            else:
                workforce.leave(call, forced=errand.verb == "kill")

    def _do_with(self, workforce: Workforce, visitor: Visitor, number: int, errand: Errand) -> None:
        if errand.verb == "call":
            call = workforce.start_call(errand.type, errand.data, errand.job, Teller(visitor, number))
            visitor.calls[number] = workforce, call
            call.future.add_done_callback(lambda future: visitor.reply(number, future))
        elif errand.verb == "send":
            workforce.send(errand.type, errand.data)
        elif errand.verb == "broadcast":
            workforce.broadcast(errand.type, errand.data)
