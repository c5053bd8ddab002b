"""Jobs in worker processes; the top of :mod:`~flask_executor.backends.process.supervisor` shows how it works."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from flask_executor.abc import Backend, BackendOptions, WorkerState
from flask_executor.backends.process.supervisor import PoolObserver, Supervisor
from flask_executor.backends.process.task import Task
from flask_executor.exceptions import ConfigError
from flask_executor.jobs.call import Call, PlainCall
from flask_executor.jobs.model import JobMessage, JobStatus
from flask_executor.jobs.packing import pack_call, pickle_or_explain

P = ParamSpec("P")
T = TypeVar("T")


class ProcessBackend(concurrent.futures.ProcessPoolExecutor, Backend):
    """A :class:`~concurrent.futures.ProcessPoolExecutor` by type, with the processes of a :class:`Supervisor`.

    :param observer: makes this the pool of a service: a fixed number of workers, each of which hosts a plugin.
    """

    remote = True
    chunks = True
    supports_kill = True

    def __init__(self, options: BackendOptions, observer: PoolObserver | None = None) -> None:
        if sys.platform == "win32":  # where a thread cannot wait for sockets and processes at once
            raise ConfigError(options.config_key("EXECUTOR_TYPE"), "process", "'thread' on Windows")
        # Not the standard pool's constructor, which makes queues.
        self._mp_context = multiprocessing.get_context(options.start_method)
        self._max_workers = options.max_workers or os.cpu_count() or 1
        self._supervisor = Supervisor(options, self._mp_context, self._max_workers, observer)
        self._dispatcher = self._supervisor.dispatcher
        self._fixed_size = observer is not None
        # The workers end when the app is collected.
        finalizer = weakref.finalize(self, self._supervisor.shutdown, wait=False)
        finalizer.atexit = False

    def enqueue(self, call: Call) -> None:
        self._enqueue(call)

    def pack(self, call: Call) -> None:
        call.packed = pack_call(call)

    def enqueue_forwarded(self, call: Call, on_assigned: Callable[[], object]) -> None:
        """As :meth:`enqueue`.

        :param on_assigned: see that of :class:`Task`.
        """
        self._enqueue(call, on_assigned=on_assigned)

    def _enqueue(
        self, call: Call, *, fire_and_forget: bool = False, on_assigned: Callable[[], object] | None = None
    ) -> None:
        parts = call.packed or pack_call(call)
        # The next attempt sends the same bytes, even if the arguments have changed meanwhile.
        call.packed = parts if call.retried else None
        _pack_messages(call)
        task = Task(call, parts, fire_and_forget=fire_and_forget, on_assigned=on_assigned)
        self._supervisor.start()
        self._dispatcher.add(task)

    def start(self) -> None:
        """Start the workers of a pool of fixed size. Those of others start when they are needed."""
        self._supervisor.start()

    def broadcast(self, data: bytes) -> int:
        """Send the plugins of all workers a message.

        :return: the number of workers.
        """
        return self._dispatcher.broadcast(data)

    @property
    def broadcasts(self) -> int:
        """Number of broadcasts that were sent."""
        return self._dispatcher.broadcasts

    @property
    def waiting(self) -> int:
        """Number of calls that were sent to no worker."""
        return self._dispatcher.waiting()

    def withdraw(self, call: Call) -> bool:
        return self._dispatcher.withdraw(call.job.id)

    def request_stop(self, call: Call, attempt: int, reason: JobStatus) -> None:
        self._dispatcher.request_stop(call.job.id, attempt, reason)

    def kill(self, call: Call, attempt: int) -> None:
        self._dispatcher.kill(call.job.id, attempt)

    def deliver(self, call: Call, message: JobMessage) -> None:
        self.deliver_packed(call, _pack_message(call, message))

    def deliver_packed(self, call: Call, data: bytes) -> None:
        """As :meth:`deliver`, of a JobMessage that is pickled."""
        self._dispatcher.deliver(call, data)

    def run_user_code(self, fn: Callable[[], object]) -> None:
        self._supervisor.callbacks.run(fn)

    @property
    def has_pending_user_code(self) -> bool:
        return len(self._supervisor.callbacks) > 0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function in a worker process, outside of all contexts, as any executor does.

        In the pool of a service that is fire-and-forget: it handles a batch of messages.
        """
        call = PlainCall(fn, args, kwargs)
        self._enqueue(call, fire_and_forget=self._fixed_size)
        return call.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._supervisor.shutdown(wait=wait, cancel_futures=cancel_futures)

    def terminate(self, grace: float) -> None:
        self._supervisor.terminate(grace)

    def join(self, timeout: float | None) -> None:
        """After :meth:`shutdown`: wait until all calls and workers have ended, at most ``timeout`` seconds."""
        self._supervisor.join(timeout)

    def worker_states(self) -> Sequence[WorkerState]:
        return self._supervisor.dispatcher.worker_states()

    @property
    def workers(self) -> int:
        return len(self._processes)

    @property
    def capacity(self) -> int:
        return self._max_workers

    @property
    def _processes(self) -> Any:  # type: ignore[override]  # as in the standard pool
        return self._dispatcher.processes()


def _pack_message(call: Call, message: JobMessage) -> bytes:
    return b"".join(pickle_or_explain(message, f"The message for job {call.job.name}"))


def _pack_messages(call: Call) -> None:
    """Pickle the messages that came when a backend in this process was to run the call: the configuration has changed.

    :raises NotPicklable: for one that cannot be sent to a worker process.
    """
    messages = call.undelivered or []
    for number, message in enumerate(messages):
        if not isinstance(message, bytes):
            messages[number] = _pack_message(call, message)
