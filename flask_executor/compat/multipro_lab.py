"""The names of multipro_lab, for code that was written for it.

.. code-block:: python

    class Printer(Worker):                             # at the top of a module
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.msg_receiver.register_handler(message_type="print", message_handler=self.show)

        def show(self, message_body=None):
            print(message_body)

    class Program(Main):
        def main_action(self):
            self.msg_router.send_message(
                receiving_object_name="printer", message_type="print", message_body="hello"
            )

    main = Program()
    main.register_worker(worker=Printer(name="printer", block=True))
    main.run()                                         # until SIGINT, SIGTERM or main.exit()

Each worker is a :class:`~flask_executor.Service` of an app that :class:`Main` makes.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import pickle
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from flask import Flask

from flask_executor.exceptions import ExecutorShutdown
from flask_executor.executor.extension import Executor
from flask_executor.services.definition import Service, on
from flask_executor.services.registry import ServiceHandle

__all__ = ["Main", "MessageReceiver", "MessageRouter", "TaskQueue", "Timer", "Worker"]

Handler = Callable[..., object]

logger = logging.getLogger(__name__)

_MAX_HANDLING_TIME = 1.0  # seconds that a backlog of messages may delay main_action()


class Timer:
    """Tells when an interval is over, again and again.

    :param interval: seconds; the first begins now.
    """

    def __init__(self, interval: float = 1) -> None:
        self.interval = interval
        self._begin = time.monotonic()

    def check_timer(self) -> bool:
        """If true, the interval is over, and the next one begins now."""
        now = time.monotonic()
        if now - self._begin < self.interval:
            return False
        self._begin = now
        return True


class MessageReceiver:
    """The handlers of a :class:`Main` or :class:`Worker`, by the type of message.

    :param block: If true, a worker sleeps until there is a message.
    """

    def __init__(self, block: bool = False) -> None:
        self.block = block
        self.message_handler_d: dict[Hashable, Handler] = {}
        self._inbox: queue.SimpleQueue[tuple[Hashable, Any] | None] = (
            queue.SimpleQueue()
        )  # SimpleQueue, because signal handlers may put messages
        self._until = math.inf  # when to stop handling messages (monotonic)

    def __reduce__(self) -> Any:
        return type(self), (self.block,), {"message_handler_d": self.message_handler_d}

    def register_handler(self, message_type: Hashable = None, message_handler: Handler | None = None) -> None:
        """Register the handler of a type of messages; to be called in ``__init__``.

        :param message_handler: takes the body as ``message_body``, or as its first argument if that has another name.
        :raises TypeError: if the handler is not callable.
        """
        if not callable(message_handler):
            raise TypeError(f"the handler of message {message_type!r} cannot be called: {message_handler!r}")
        self.message_handler_d[message_type] = message_handler

    def get_messages(self) -> None:
        """Handle the messages that wait in :class:`Main`. A worker handles its messages as they arrive."""
        self._handle_until(math.inf)

    def _handle_until(self, end: float) -> None:
        for _ in range(self._inbox.qsize()):  # not those that arrive meanwhile: the loop might never end
            if time.monotonic() >= min(end, self._until):
                return
            with contextlib.suppress(queue.Empty):
                self._handle_safely(self._inbox.get_nowait())

    def _handle_for(self, seconds: float | None) -> None:
        """Handle messages for ``seconds`` seconds, and then those that wait; with None, sleep until one arrives."""
        end = None if seconds is None else time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while self._until == math.inf and (end is None or time.monotonic() < end):
                self._handle_safely(self._inbox.get(timeout=None if end is None else max(0.0, end - time.monotonic())))
                if end is None:
                    break
        self._handle_until(time.monotonic() + _MAX_HANDLING_TIME)

    def _close(self, until: float) -> None:
        """Handle only the messages that wait already, and these until then (monotonic)."""
        self._until = min(self._until, until)
        self._inbox.put(None)

    def _handle_safely(self, item: tuple[Hashable, Any] | None) -> None:
        try:
            if item is not None:
                self._handle(*item)
        except Exception:
            logger.exception("Main: a message failed.")

    def _handle(self, type: Hashable, body: Any) -> None:
        handler = self.message_handler_d.get(type)
        if handler is None:
            raise KeyError(f"no handler is registered for {type!r}")
        if _takes_message_body(handler):
            handler(message_body=body)
        else:
            handler(body)


def _takes_message_body(handler: Handler) -> bool:
    try:
        inspect.signature(handler).bind(message_body=None)
    except (TypeError, ValueError):  # another name, or no signature
        return False
    return True


class MessageRouter:
    """Sends messages; ``self.msg_router`` of :class:`Main` and of each :class:`Worker`."""

    _send: Callable[[str, Hashable, Any], None]

    def __init__(self) -> None:
        #: Main and the workers, by name.
        self.message_route_d: dict[str | None, Main | Worker | None] = {}
        self.task_queue: TaskQueue | None = None

    def __reduce__(self) -> Any:
        names = dict.fromkeys(self.message_route_d)
        return type(self), (), {"message_route_d": names, "task_queue": self.task_queue}

    def register_receiving_object(self, receiving_object: Main | Worker) -> None:
        """Send messages to this object by its name from now on."""
        self.message_route_d[receiving_object.name] = receiving_object

    def register_task_queue(self, task_queue: TaskQueue) -> None:
        """Use this queue for tasks."""
        self.task_queue = task_queue

    def send_message(self, receiving_object_name: str, message_type: Hashable = None, message_body: Any = None) -> None:
        """Send a message, and do not wait for it.

        :param receiving_object_name: the name of a worker, or ``"main"``.
        :param message_body: anything that can be pickled.
        :raises KeyError: if there is no worker of this name.
        :raises NotPicklable: if the body cannot be pickled.
        """
        if receiving_object_name not in self.message_route_d:
            raise KeyError(receiving_object_name)
        self._send(receiving_object_name, message_type, message_body)


class TaskQueue:
    """Tasks for the next free worker: ``self.msg_router.task_queue``, with ``Main(task_queue=True)``.

    All tasks wait in the main process. A worker that has asked for one gets the next whenever it is free.
    """

    # _tasks has all waiting tasks in the main process, and in a worker the tasks that it was given.

    def __init__(self) -> None:
        self._tasks: deque[bytes] = deque()
        self._put: Callable[[bytes], object] = self._tasks.append
        self._is_empty: Callable[[], object] = bool

    def __reduce__(self) -> Any:
        return type(self), ()

    def send_task(self, task: Any) -> None:
        """Put a task into the queue.

        :param task: anything that can be pickled.
        """
        self._put(pickle.dumps(task))

    def get_task(self) -> Any:
        """The next task; None if there is none now."""
        try:
            return pickle.loads(self._tasks.popleft())
        except IndexError:
            self._is_empty()
            return None


class Worker:
    """A worker process: a subclass at the top of a module, made in the main process.

    :param name: the address of its messages.
    :param block: If true, :meth:`worker_action` is called only at the beginning and after each message or task, and
        not every :attr:`main_loop_sleep_time`. Meanwhile the process sleeps.
    """

    #: Seconds between two calls of :meth:`worker_action`.
    main_loop_sleep_time: float | None
    msg_router: MessageRouter

    def __init__(self, name: str | None = None, block: bool = False) -> None:
        self.name = name
        self.main_loop_sleep_time = None if block else 0.01
        self.msg_receiver = MessageReceiver(block=block)
        self._exit_flag = False
        self.msg_receiver.register_handler(message_type="exit", message_handler=self._exit)

    def set_msg_router(self, msg_router: MessageRouter) -> None:
        """Use this router for messages; called by :meth:`Main.register_worker`."""
        self.msg_router = msg_router

    def worker_action(self) -> Any:
        """Do regular work, or the task that ``self.msg_router.task_queue.get_task()`` returns."""

    def _exit(self, message_body: Any = None) -> None:
        self._exit_flag = True


class _WorkerService(Service):
    """The service that hosts a worker in its process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._tasks: deque[bytes] = deque()
        self._has_asked = False
        self._has_told = False
        pace = self._pace()
        self.schedule = {} if pace is None else {"act": pace}  # type: ignore[misc]  # an instance has its own schedule

    def setup(self) -> None:
        router = self._worker.msg_router
        router._send = lambda *message: self.main.send("message", message)
        tasks = router.task_queue
        if tasks is not None:
            tasks._tasks = self._tasks  # not the tasks of the main process, which a fork has inherited
            tasks._put = lambda task: self.main.send("task", task)
            tasks._is_empty = self._ask
        self.act()

    def act(self) -> None:
        """Call the action; never raises."""
        with self._reporting_exit():
            if not self._worker._exit_flag:
                try:
                    self._worker.worker_action()
                except Exception:
                    logger.exception("Worker %r: worker_action failed.", self._worker.name)
        pace = self._pace()
        if self.schedule and pace is not None:
            self.schedule["act"] = pace  # type: ignore[index]  # this instance's own dict

    @on("message")
    def message(self, body: tuple[Hashable, Any]) -> None:
        """Handle a message."""
        try:
            with self._reporting_exit():
                if not self._worker._exit_flag:
                    self._worker.msg_receiver._handle(*body)
        finally:
            if not self.schedule:
                self.act()

    @on("task")
    def task(self, task: bytes) -> None:
        """Take a task."""
        self._tasks.append(task)
        self._has_asked = False
        self.act()
        if self._worker._exit_flag:
            while self._tasks:
                self.main.send("task", self._tasks.popleft())
        elif not self._tasks:  # otherwise worker_action() has left some, and asks again when they are done
            self._ask()

    def _ask(self) -> None:
        if not self._has_asked:
            self._has_asked = True
            self.main.send("ask")

    def _pace(self) -> float | None:
        worker = self._worker
        return None if worker.msg_receiver.block else worker.main_loop_sleep_time

    @contextlib.contextmanager
    def _reporting_exit(self) -> Iterator[None]:
        """Report to the main process if the worker exits during this."""
        try:
            yield
        except SystemExit:
            self._worker._exit_flag = True
        finally:
            if self._worker._exit_flag and not self._has_told:
                self._has_told = True
                self.main.send("left")


class _Member:
    """A worker, as the main process sees it."""

    def __init__(self, worker: Worker, handle: ServiceHandle) -> None:
        self.worker = worker
        self.handle = handle
        self._has_left = False
        self._stopper: threading.Thread | None = None
        self._early: list[tuple[str, Any]] | None = []  # messages that were sent before the start
        self._lock = threading.RLock()  # reentrant: a signal handler may send while the lock is held

    def start(self) -> None:
        """Start the process."""
        with self._lock:
            self.handle.start()
            early, self._early = self._early or [], None
            for message in early:
                self.handle.send(*message)

    def send(self, type: str, body: Any) -> bool:
        """Send a message; False if the worker has left, for a message would start it again."""
        with self._lock:
            if self._early is not None:
                self._early.append((type, body))
            elif not self._has_left:
                self.handle.send(type, body)
            return not self._has_left

    def leave(self, timeout: float) -> None:
        """Start to stop the process, by force after ``timeout`` seconds; does not wait."""
        with self._lock:
            if not self._has_left:
                self._has_left = True
                stopper = threading.Thread(target=self.handle.stop, args=(timeout,))
                with contextlib.suppress(RuntimeError):  # Python 3.12 refuses when the main thread has ended
                    stopper.start()
                    self._stopper = stopper

    def stop(self, timeout: float) -> None:
        """Wait until the process has stopped; stop it if :meth:`leave` has not been called."""
        if self._stopper is None:
            self.handle.stop(timeout)
        else:
            self._stopper.join()


class _Dealer:
    """Gives each worker that asks one task of the queue."""

    # _lock is reentrant: a signal handler may put a task while it is held.

    def __init__(self, tasks: TaskQueue) -> None:
        self._tasks = tasks._tasks
        self._asking: deque[_Member] = deque()
        self._lock = threading.RLock()
        tasks._put = self.put

    def put(self, data: bytes) -> None:
        """Add a task; called with each task that is sent."""
        self._tasks.append(data)
        self._deal()

    def asked(self, member: _Member) -> None:
        """Give this worker a task, now or later."""
        with self._lock:
            if member not in self._asking:  # a worker that was restarted has asked before
                self._asking.append(member)
        self._deal()

    def _deal(self) -> None:
        with self._lock:
            while self._tasks and self._asking:
                with contextlib.suppress(IndexError):
                    self._give(self._asking.popleft())

    def _give(self, member: _Member) -> None:
        try:
            task = self._tasks.popleft()
        except IndexError:  # main_action() has taken it
            self._asking.appendleft(member)
        else:
            if not member.send("task", task):
                self._tasks.appendleft(task)


class Main:
    """The main process: a subclass with a :meth:`main_action`.

    :param check_workers: has no effect: workers that die are always started again.
    :param task_queue: If true, there is a :class:`TaskQueue`, ``self.msg_router.task_queue``.
    """

    #: Seconds between two calls of :meth:`main_action`; None to call it only at the beginning and after messages.
    main_loop_sleep_time: float | None = 0.01
    #: Seconds that workers have to stop at the end; after that they are killed.
    exit_timeout: float = 10.0
    name = "main"

    def __init__(self, check_workers: bool = False, task_queue: bool = False) -> None:
        self.check_workers = check_workers
        self.msg_receiver = MessageReceiver()
        self.msg_router = MessageRouter()
        self.msg_router._send = self._route
        self.msg_router.register_receiving_object(self)
        self.worker_arr: list[Worker] = []
        self.task_queue = TaskQueue() if task_queue else None
        self._dealer: _Dealer | None = None
        if self.task_queue is not None:
            self.msg_router.register_task_queue(self.task_queue)
            self._dealer = _Dealer(self.task_queue)
        self._members: dict[Worker, _Member] = {}
        self._exit_flag = False
        self._app = _make_app()
        self._executor = Executor(self._app)
        self._keeper = Executor(self._app, name="main")
        self._keeper.submit(bool)  # its backend starts now, so that it is shut down first when the process ends
        self._is_running = False
        self._signals: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not the main thread: the program itself has to handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._signals[number] = signal.signal(number, self._caught)

    def register_worker(self, worker: Worker) -> None:
        """Add a worker; to be called before :meth:`run`."""
        worker.set_msg_router(self.msg_router)
        self.msg_router.register_receiving_object(worker)
        self.worker_arr.append(worker)
        name = worker.name or type(worker).__name__
        if name in self._executor.services:
            name = f"{name} ({len(self.worker_arr)})"
        handle = self._executor.service(_WorkerService, worker, name=name, per="process", max_pending=sys.maxsize)
        member = self._members[worker] = _Member(worker, handle)
        executor_on = self._executor.on
        executor_on(handle, "message")(lambda body: self._route(*body))
        executor_on(handle, "left")(lambda _: member.leave(self.exit_timeout))
        if self._dealer is not None:
            dealer = self._dealer
            executor_on(handle, "task")(dealer.put)
            executor_on(handle, "ask")(lambda _: dealer.asked(member))

    def main_action(self) -> Any:
        """Do regular work, beside the messages."""

    def run(self) -> None:
        """Start the workers and run until SIGINT, SIGTERM or :meth:`exit`; then stop the workers."""
        thread = threading.current_thread()
        if thread is threading.main_thread() or thread.daemon:
            self._run()
            return
        # As a job: when the main thread ends, the process waits for jobs before it stops services.
        try:
            future = self._keeper.submit(self._run)
        except ExecutorShutdown:  # the main thread has ended, and waits for this one
            self._run()
        else:
            future.result()

    def _run(self) -> None:
        self._is_running = True
        try:
            self._run_workers()
            while not self._exit_flag:
                self.main_action()
                self.msg_receiver._handle_for(self.main_loop_sleep_time)
            self.msg_receiver.get_messages()
        finally:
            self._exit_workers()
            self._is_running = False
            self._release_signals()

    def exit(self) -> None:
        """Let :meth:`run` return after the messages that wait; may be called in any thread or message handler."""
        self._exit_flag = True
        self.msg_receiver._close(time.monotonic() + self.exit_timeout)

    def send_exit_msg(self, worker: Worker) -> None:
        """Let a worker exit after the messages that wait for it."""
        self._members[worker].send("message", ("exit", None))

    def _run_workers(self) -> None:
        for member in self._members.values():
            member.start()

    def _route(self, name: str, type: Hashable, body: Any) -> None:
        receiver = self.msg_router.message_route_d[name]
        if receiver is self:
            self.msg_receiver._inbox.put((type, body))
        elif isinstance(receiver, Worker):
            self._members[receiver].send("message", (type, body))

    def _exit_workers(self) -> None:
        for member in self._members.values():
            member.send("message", ("exit", None))
        for member in self._members.values():
            member.leave(self.exit_timeout)
        for member in self._members.values():
            member.stop(self.exit_timeout)
        self._executor.shutdown()

    def _caught(self, number: int, frame: Any) -> None:
        before = self._signals[number]
        if self._is_running:
            self.exit()
        elif callable(before):  # as without Main
            before(number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(number, before)
            signal.raise_signal(number)

    def _release_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._signals.items():
                signal.signal(number, handler)


def _make_app() -> Flask:
    app = Flask("multipro_lab")
    app.config["EXECUTOR_APP"] = f"{__name__}:_make_app()"
    app.config["MAIN_EXECUTOR_TYPE"] = "immediate"
    app.config["MAIN_EXECUTOR_SHUTDOWN_TIMEOUT"] = 1e9  # as long as it takes
    return app
