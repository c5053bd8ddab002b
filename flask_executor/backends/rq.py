"""Jobs run by workers of RQ, on any number of machines.

``flask executor worker`` runs RQ's own worker with the app loaded; ``rq worker`` imports it for each job, from
``FLASK_APP``.

.. code-block:: text

    web app          Redis              worker of RQ, main thread                  its worker process
      enqueue() ───> queue ───────────> run() ─> entrypoint.run(), waits ────────> fn()
                       ^                  None: the outcome is in the store  <──── result, error
                       ├─ RQ's scheduler  <─ rq.Retry, to run it again later
                       └─ RQ's clean-up, if the worker died; on_failure() after the last delivery

**Invariants.** Jobs in Redis are JSON, so that nothing is unpickled before its signature was checked, and ``flask
executor worker`` runs no function but :func:`run`. RQ delivers a job again if its worker died or could not begin. The
store decides which delivery runs the job; a job that had begun is lost, and does not run again.
"""

from __future__ import annotations

import base64
import concurrent.futures
import datetime
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

from flask_executor.abc import Backend, BackendOptions, PreparedCall
from flask_executor.backends.engine.entrypoint import (
    Destination,
    decode,
    destination_of,
    is_lost,
    refuse,
    requeue_elsewhere,
    shutting_down,
)
from flask_executor.backends.engine.entrypoint import run as run_sent
from flask_executor.backends.engine.prefork import run_processes
from flask_executor.exceptions import (
    ConfigError,
    EngineUnavailable,
    ExecutorShutdown,
    MissingExtra,
    NotPicklable,
    StoreUnavailable,
    UntrustedResult,
    WorkerLost,
)
from flask_executor.helpers import redact_url
from flask_executor.helpers.log import logger
from flask_executor.jobs.model import Job

try:
    import redis
    import rq
    import rq.exceptions
    from rq.scheduler import RQScheduler
    from rq.serializers import JSONSerializer
except ImportError as error:
    raise MissingExtra("rq", "rq") from error

P = ParamSpec("P")
T = TypeVar("T")

_DEFAULT_URL = "redis://localhost:6379/0"
_RESPONSE_TIMEOUT = 2.0  # seconds that Redis may take to answer a thread that submits
_ENDED_JOB_TTL = 600  # seconds for which RQ shows a job that has ended; its outcome is in the store
_UNLIMITED = 10**9  # retries as RQ counts them: the options of the job decide
_MAX_REDELIVERIES = 3  # of a job that no worker could begin
_STORE_RETRY_DELAY = 1  # seconds until RQ delivers a job again whose worker could not reach the store

# Import strings, which jobs in Redis have.
_RUN = f"{__name__}.run"
_ON_FAILURE = f"{__name__}.on_failure"


class RQBackend(Backend):
    """Enqueues calls for workers of RQ.

    If ``EXECUTOR_QUEUE`` is ``default``, jobs of a priority above 0 go into the queue ``default-high``, those below 0
    into ``default-low``, and the others into ``default``.
    """

    remote = True
    engine = "rq"
    supports_kill = True

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._url = options.url or _DEFAULT_URL
        self._shutdown = False

    @classmethod
    def default_store(cls, options: BackendOptions) -> str:
        return options.url or _DEFAULT_URL

    @cached_property
    def _destination(self) -> Destination:
        return destination_of(self._options)

    @cached_property
    def _queues(self) -> list[rq.Queue]:
        """The queues for high, normal and low priority."""
        connection = redis.Redis.from_url(
            self._url, socket_connect_timeout=_RESPONSE_TIMEOUT, socket_timeout=_RESPONSE_TIMEOUT
        )
        return self._connected_to(connection)

    def _connected_to(self, connection: redis.Redis) -> list[rq.Queue]:
        name = self._options.queue
        return [
            rq.Queue(f"{name}{end}", connection=connection, serializer=JSONSerializer) for end in ("-high", "", "-low")
        ]

    def enqueue(self, call: PreparedCall) -> None:
        if self._shutdown:
            raise ExecutorShutdown("cannot schedule new futures after shutdown")
        queue = self._queues[1 - (call.priority > 0) + (call.priority < 0)]
        job = queue.create_job(
            _RUN,
            (self._destination, call.job.id, base64.b64encode(call.packed).decode()),
            timeout=-1,  # none of RQ's: it would interrupt run(), which enforces the timeout of the job
            result_ttl=_ENDED_JOB_TTL,
            failure_ttl=_ENDED_JOB_TTL,
            description=call.job.name,
            job_id=call.job.id,
            retry=rq.Retry(max=_MAX_REDELIVERIES),
            on_failure=rq.Callback(_ON_FAILURE),
        )
        with self._translate_errors():
            if call.delay:
                due = math.ceil(time.time() + call.delay)  # RQ counts whole seconds
                queue.schedule_job(job, datetime.datetime.fromtimestamp(due, datetime.timezone.utc))
            else:
                with queue.connection.pipeline() as pipeline:  # or RQ would make two round trips
                    queue.enqueue_job(job, pipeline=pipeline)
                    pipeline.execute()

    def remove_queued(self, job: Job) -> None:
        with self._translate_errors(), suppress(rq.exceptions.NoSuchJobError, rq.exceptions.InvalidJobOperation):
            rq.job.Job.fetch(job.id, self._queues[0].connection, JSONSerializer).delete()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            where = self._options.config_key("EXECUTOR_URL")
            raise EngineUnavailable("Redis", str(redact_url(self._url)), where, str(error)) from error

    def work(self, stop: Callable[[str], object], *, processes: int, burst: bool) -> None:
        def work() -> None:
            queues = self._connected_to(redis.Redis.from_url(self._url))
            worker = _Worker(
                queues, connection=queues[0].connection, serializer=JSONSerializer, job_class=_Job, stop=stop
            )
            with _scheduling(queues):
                worker.work(burst=burst, logging_level="WARNING")  # no log lines for each job: it has its record

        with self._translate_errors():
            self._queues[0].connection.ping()
        run_processes(processes, work)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function, outside of all contexts, as any executor does."""
        return self._options.start(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs. Those that were accepted go on without this process."""
        self._shutdown = True
        if "_queues" in self.__dict__:
            self._queues[0].connection.close()

    @property
    def waiting(self) -> int:
        with self._translate_errors():
            return sum(queue.count for queue in self._queues)

    @property
    def workers(self) -> int:
        with self._translate_errors():
            return rq.Worker.count(queue=self._queues[1])

    @property
    def capacity(self) -> None:
        return None


def run(destination: object, id: str, data: str) -> rq.Retry | None:
    """The function of all jobs in RQ. Called in the main thread of its worker."""
    job = rq.get_current_job()
    try:
        to, id, call = decode(destination, id, data)
        redelivered = job is not None and job.retries_left is not None and job.retries_left < _MAX_REDELIVERIES
        if job is not None and redelivered and is_lost(to, id):
            raise WorkerLost(f"Job {job.description} is lost: it had begun when its worker died.")
        delay: float | None = run_sent(to, id, call)
    except StoreUnavailable as error:
        logger.warning("Job %s has to wait: %s", id, error)
        delay = _STORE_RETRY_DELAY
    except ConfigError as error:
        delay = requeue_elsewhere(id, error)
    except (NotPicklable, UntrustedResult, WorkerLost):
        if job is not None:
            job.retries_left = 0  # it would fail again
        raise
    return None if delay is None else rq.Retry(max=_UNLIMITED, interval=round(delay))


def on_failure(job: Any, connection: Any, kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Called by RQ if :func:`run` has raised an error, or its worker has died.

    After the last delivery the job fails, unless the store knows that it has begun: then its record is left alone.
    """
    if not job.should_retry:
        to, id, call = decode(*job.args)
        why = WorkerLost(
            f"Job {job.description} is lost: no worker of RQ could begin with it ({kind.__name__}: {error})."
        )
        refuse(to, id, call, why)


given_up = on_failure  # the name that jobs have in Redis which were queued before it was changed


@contextmanager
def _scheduling(queues: list[rq.Queue]) -> Iterator[None]:
    """Run RQ's scheduler, which queues jobs when they are due. One of all workers has its lock.

    It runs in a thread, as the process that RQ starts for it would outlive a worker that is killed.
    """
    connection = queues[0].connection
    scheduler: Any = RQScheduler(
        queues, connection=connection, logging_level=logging.WARNING, serializer=JSONSerializer
    )
    ended = threading.Event()

    def schedule() -> None:
        while not ended.wait(scheduler.interval):
            try:
                if scheduler.should_reacquire_locks:
                    scheduler.acquire_locks()
                scheduler.enqueue_scheduled_jobs()
                scheduler.heartbeat()
            except (redis.RedisError, OSError) as error:
                logger.warning("Jobs that are to start later have to wait: %s", error)
        with suppress(redis.RedisError, OSError):  # the locks expire
            scheduler.stop()

    thread = threading.Thread(target=schedule, name="flask-executor-scheduler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Job(rq.job.Job):
    """A job from Redis, where anyone may have put it: it runs only if this package has submitted it."""

    def perform(self) -> Any:
        if not self._is_own:
            raise UntrustedResult(
                f"RQ's job {self.id} was not submitted by flask_executor, and this worker runs no others. Give them "
                "another queue, and a worker of RQ's own."
            )
        return super().perform()

    @property
    def _is_own(self) -> bool:
        try:
            return bool(self.func_name == _RUN and self.instance is None)
        except rq.exceptions.DeserializationError:  # pickled, which is RQ's default
            return False

    # RQ would import these functions by the names in Redis.

    @property
    def failure_callback(self) -> Any:
        return on_failure if self._is_own else None

    @property
    def success_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None


class _Worker(rq.SimpleWorker):
    """A worker of RQ with the app loaded. It calls :func:`run` in its main thread, and forks for no job.

    Only :func:`run` starts a process for the job, which can be killed.

    :param stop: stops a job, given its id.
    """

    def __init__(self, *args: Any, stop: Callable[[str], object], **options: Any) -> None:
        super().__init__(*args, **options)
        self._stop = stop
        self._lock = threading.Lock()
        self._execution: tuple[Any, Any] | None = None  # job and execution; changed under _lock
        threading.Thread(target=self._send_heartbeats, name="flask-executor-heartbeat", daemon=True).start()

    def execute_job(self, job: Any, queue: Any) -> None:
        execution = self.prepare_execution(job)
        with self._lock:
            self._execution = job, execution
        try:
            self.perform_job(job, queue, execution)
        finally:
            with self._lock:
                self._execution = None
        self.set_state(rq.worker.WorkerStatus.IDLE)

    def _send_heartbeats(self) -> None:
        """Tell RQ that the job and this worker are alive. Runs in a thread of its own."""
        while True:
            time.sleep(self.job_monitoring_interval)
            with self._lock:
                if self._execution is not None:
                    with suppress(redis.RedisError, OSError):  # the next heartbeat may get through
                        self.maintain_heartbeats(*self._execution)

    def request_stop(self, *signal: Any) -> None:
        shutting_down.set()
        super().request_stop(*signal)  # type: ignore[no-untyped-call]

    def kill_horse(self, *_: Any) -> None:
        """Called for RQ's command to stop a job."""
        id = self.get_current_job_id()
        if id is not None:
            self._stop(id)
