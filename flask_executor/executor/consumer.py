"""What a process does that is a worker of an engine: it runs calls that apps have sent there.

.. code-block:: text

    worker of the engine               Consumer.run()                           worker process (supervised)
      entrypoint.run(address, id, data) ─> unpack, check, take over in the store ─> fn(), in its contexts
      None, or seconds until     <──── write down what came of it <──────────── result, error, reports, log
      the engine is to try again

**Invariants.** One process at a time has a job: it takes it from the engine, or from one that is dead, by compare and
swap in the store. :meth:`Consumer.run` returns when what came of the job is in the store, or when the job is the
engine's again; until then the engine takes it for unfinished, and an engine that sends things twice may do so.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from flask_executor.backends.engine import entrypoint
from flask_executor.backends.process.backend import ProcessBackend
from flask_executor.exceptions import ExecutorShutdown, NotPicklable, StoreUnavailable, UntrustedResult
from flask_executor.executor.engine_message import EngineMessage, unpack_engine_message
from flask_executor.executor.producer import call_signer
from flask_executor.executor.shutdown import register_for_shutdown
from flask_executor.futures import FutureProxy
from flask_executor.helpers.log import logger
from flask_executor.jobs.call import Call, CallState
from flask_executor.jobs.contexts import NO_CONTEXT
from flask_executor.jobs.model import JobState
from flask_executor.tracking.engine_handover import EngineHandover
from flask_executor.tracking.shared import SharedJobTracker

if TYPE_CHECKING:
    from flask_executor.executor.app_executor import AppExecutor

_MAX_WORKERS = 1000  # jobs at a time; it is the engine that gives this process no more than it is to run
_RETRY_DELAY = 1.0  # seconds until it is tried again


class Consumer:
    """Runs calls that were sent, each in a worker process that has the app loaded and can be ended by force."""

    # _pool is made and let go under _lock. Of _retry_delays each job's entry belongs to the thread that runs its call.

    def __init__(self, app_executor: AppExecutor, tracker: SharedJobTracker, handover: EngineHandover) -> None:
        self._app_executor = app_executor
        #: What the engine's jobs are recorded in.
        self.tracker = tracker
        self.handover = handover
        self._lock = threading.Lock()
        self._pool: ProcessBackend | None = None
        self._closed = False
        self._retry_delays: dict[str, float] = {}  # by the id of the job: seconds until the engine is to run it again

    def serve(self, *, processes: int, burst: bool) -> None:
        """Be a worker of the engine until a signal says to end.

        :param processes: how many, at one job each.
        :param burst: whether to end when the queue is empty.
        """
        entrypoint.worker_app = self._app_executor.app
        self._app_executor.backend.work(self._app_executor.jobs.stop_job, processes=processes, burst=burst)

    def run(self, id: str, data: bytes) -> float | None:
        """Run a call that was sent to this worker; see :func:`flask_executor.backends.engine.run`."""
        call, sender = self._unpack(id, data)
        try:
            register_for_shutdown(self._app_executor)
            call.backend = workers = self._workers()  # once the job is ours it may get messages
            if not self._acquire(call, sender):
                return None
        except ExecutorShutdown as error:  # another worker may run it
            logger.warning("Job %s has to wait: %s", id, error)
            return _RETRY_DELAY
        call.enter(CallState.QUEUED)
        try:
            workers.enqueue(call)
        except ExecutorShutdown:
            self.postpone(call, 0.0)
        except Exception as error:  # no worker process can be made: EXECUTOR_APP is wrong, say
            call.fail_finally(error)
        wait([call.future])
        again = self._retry_delays.pop(id, None)
        if again is None:
            self.handover.finish(call.job)
        else:
            self.handover.return_to_engine(call.job)
        return again

    def _acquire(self, call: Call, sender: str) -> bool:
        """Acquire the job; False when it was cancelled, or another worker has it.

        While the store is away this waits: perhaps it has written that the job is this process's and only its answer
        was lost, and then no other worker can acquire the job.

        :raises ExecutorShutdown: when this process ends.
        """
        while not (self._closed or entrypoint.shutting_down.is_set() or call.future.done()):
            self._app_executor.in_flight.add(call, None)  # first: once it is acquired, messages may come for it
            acquired = False
            try:
                acquired = self.handover.acquire(call, sender)
                return acquired
            except StoreUnavailable as error:
                logger.warning("Job %s has to wait: %s", call.job.id, error)
            finally:
                if not acquired:
                    self._app_executor.in_flight.remove(call.future)
            time.sleep(_RETRY_DELAY)
        raise ExecutorShutdown("this worker is ending")

    def postpone(self, call: Call, delay: float) -> bool:
        """The call is to run again in ``delay`` seconds: leave that to the engine, if it has sent it."""
        if not self.handover.is_acquired(call.job.id):
            return False
        self._retry_delays[call.job.id] = delay
        # Only to wake up run(): no user waits with this handle, and nothing is reported.
        Future.set_exception(call.future, ExecutorShutdown("the engine has the job again"))
        return True

    def _unpack(self, id: str, data: bytes) -> tuple[Call, str]:
        """The call, which its worker process unpacks, and the holder that has sent it."""
        try:
            message = self._open(id, data)
        except (NotPicklable, UntrustedResult) as error:
            logger.error("Job %s is refused: %s", id, error)  # what engines make of it is their own
            self.handover.refuse(id, error)
            raise
        options = message.options
        job = JobState(options.name or id, options.key, options.owner, id=id)
        job.queued_at = message.queued_at
        if options.meta is not None:
            job.meta = dict(options.meta)
        channel = self._app_executor.channel
        future: FutureProxy[Any] = FutureProxy(job, channel)
        contexts: Any = NO_CONTEXT  # those of the call are in it
        call = Call(future, job, _unopened, (), {}, contexts, channel, options)
        call.packed = [message.call]
        return call, message.sender

    def _open(self, id: str, data: bytes) -> EngineMessage:
        signer = call_signer(self._app_executor.app)
        return unpack_engine_message(id, data, self._app_executor.destination, signer)

    def refuse(self, id: str, data: bytes, error: Exception) -> None:
        """The engine has given up a job: it fails with ``error``, unless a worker has begun it.

        :raises StoreUnavailable: if the failure cannot be written to the store.
        """
        try:
            name = self._open(id, data).options.name
        except (NotPicklable, UntrustedResult) as refused:  # nobody knows its name, and why it fails is known
            self.handover.refuse(id, refused)
        else:
            self.handover.refuse(id, error, name or id)

    def _workers(self) -> ProcessBackend:
        with self._lock:
            if self._closed:
                raise ExecutorShutdown("this worker is ending")
            if self._pool is None:
                self._pool = ProcessBackend(replace(self._app_executor.worker_options(), max_workers=_MAX_WORKERS))
            return self._pool

    # ---- life ----

    def close(self, *, wait: bool) -> None:
        """Take no more calls."""
        with self._lock:
            self._closed = True
            pool = self._pool
        if pool is not None:
            pool.shutdown(wait=wait)

    def terminate(self, grace: float) -> None:
        """The process ends: end the worker processes, by force after ``grace`` seconds."""
        if self._pool is not None:
            self._pool.terminate(grace)

    def after_fork(self) -> None:
        """In the child of a fork: the parent's worker processes are not ours."""
        self._lock = threading.Lock()
        self._pool = None
        self._retry_delays = {}


def _unopened(*_args: object) -> NoReturn:
    """In the place of the function of a call that only its worker process unpacks."""
    raise RuntimeError("a call from an engine runs in a worker process only")
