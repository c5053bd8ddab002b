"""Jobs run by workers of RQ, on any number of machines.

``flask executor worker`` runs RQ's own worker with the app loaded; ``rq worker`` imports the app for each job.

**Invariants.** What lies in Redis is JSON, so that nothing is unpickled before its signature was looked at, and our
worker runs nothing but :func:`run`. RQ delivers a job again whose worker died, or could not begin: which of the two
has it is decided in the store, and one that had begun is lost and does not run again.
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
    Address,
    address_of,
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

_URL = "redis://localhost:6379/0"
_PATIENCE = 2.0  # seconds that Redis may take to answer those who submit
_REMEMBERED = 600  # seconds for which RQ shows a job that has ended; what came of it is in our store
_FOREVER = 10**9  # how often RQ lets a job run again: it is our options that count
_AGAIN = 3  # how often RQ delivers a job again that no worker could begin with
_PAUSE = 1  # seconds until then, when it is the store that was not there
_RUN = f"{__name__}.run"
_GIVEN_UP = f"{__name__}.given_up"


class RQBackend(Backend):
    """Enqueues calls for workers of RQ.

    Of three queues: those of a higher priority than 0 go into ``default-high`` (``EXECUTOR_QUEUE`` being ``default``),
    those of a lower one into ``default-low``.
    """

    remote = True
    engine = "rq"
    supports_kill = True

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._url = options.url or _URL
        self._shutdown = False

    @classmethod
    def default_store(cls, options: BackendOptions) -> str:
        return options.url or _URL

    @cached_property
    def _address(self) -> Address:
        return address_of(self._options)

    @cached_property
    def _queues(self) -> list[rq.Queue]:
        """Those of higher priority first."""
        connection = redis.Redis.from_url(self._url, socket_connect_timeout=_PATIENCE, socket_timeout=_PATIENCE)
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
            (self._address, call.job.id, base64.b64encode(call.packed).decode()),
            timeout=-1,  # ours ends a job, wherever it is; RQ's would end what sees to that
            result_ttl=_REMEMBERED,
            failure_ttl=_REMEMBERED,
            description=call.job.name,
            job_id=call.job.id,
            retry=rq.Retry(max=_AGAIN),
            on_failure=rq.Callback(_GIVEN_UP),
        )
        with self._translate_errors():
            if call.delay:
                due = math.ceil(time.time() + call.delay)  # RQ counts whole seconds
                queue.schedule_job(job, datetime.datetime.fromtimestamp(due, datetime.timezone.utc))
            else:
                with queue.connection.pipeline() as pipeline:  # or it would ask Redis twice
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
                worker.work(burst=burst, logging_level="WARNING")  # no lines for each job: the store has them

        with self._translate_errors():
            self._queues[0].connection.ping()
        run_processes(processes, work)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function, outside of all contexts, as any executor does."""
        return self._options.start(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more; jobs go on without this process."""
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


def run(address: Address, id: str, data: str) -> rq.Retry | None:
    """What RQ runs."""
    import_string, app_name, name = address
    there = import_string, app_name, name  # JSON knows no tuples
    job = rq.get_current_job()
    try:
        if job is not None and job.retries_left is not None and job.retries_left < _AGAIN and is_lost(there, id):
            raise WorkerLost(f"Job {job.description} is lost: it had begun when its worker died.")
        again: float | None = run_sent(there, id, base64.b64decode(data))
    except StoreUnavailable as error:
        logger.warning("Job %s has to wait: %s", id, error)
        again = _PAUSE
    except ConfigError as error:
        again = requeue_elsewhere(id, error)
    except (NotPicklable, UntrustedResult, WorkerLost):
        if job is not None:
            job.retries_left = 0  # it would be the same again
        raise
    return None if again is None else rq.Retry(max=_FOREVER, interval=round(again))


def on_failure(job: Any, connection: Any, kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """A job has failed in RQ, or nobody knows what has become of it: what RQ calls then.

    One that has begun is in the store, with what came of it, and that stays.
    """
    if not job.should_retry:
        (import_string, app_name, name), id, _ = job.args
        why = WorkerLost(
            f"Job {job.description} is lost: no worker of RQ could begin with it ({kind.__name__}: {error})."
        )
        refuse((import_string, app_name, name), id, why, job.description)


@contextmanager
def _scheduling(queues: list[rq.Queue]) -> Iterator[None]:
    """Have jobs queued whose time has come, by one of all workers.

    In a thread: the process that RQ starts for that would outlive a worker that is killed.
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
        with suppress(redis.RedisError, OSError):  # the locks end by themselves
            scheduler.stop()

    thread = threading.Thread(target=schedule, name="flask-executor-scheduler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Job(rq.job.Job):
    """A job as our worker takes it from Redis, where others may have put it: it runs nothing that is not ours."""

    def perform(self) -> Any:
        if not self._is_ours:
            raise UntrustedResult(
                f"RQ's job {self.id} was not submitted by flask_executor, and this worker runs no others. Give them "
                "another queue, and a worker of RQ's own."
            )
        return super().perform()

    @property
    def _is_ours(self) -> bool:
        try:
            return bool(self.func_name == _RUN and self.instance is None)
        except rq.exceptions.DeserializationError:  # pickled, as RQ does if it is not told otherwise
            return False

    # Redis has names of functions here, too.

    @property
    def failure_callback(self) -> Any:
        return on_failure if self._is_ours else None

    @property
    def success_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None


class _Worker(rq.SimpleWorker):
    """A worker of RQ that has the app loaded, and leaves it to others to run the jobs and to end them by force.

    :param stop: stops a job, given its id.
    """

    def __init__(self, *args: Any, stop: Callable[[str], object], **options: Any) -> None:
        super().__init__(*args, **options)
        self._stop = stop

        self._beating = threading.Lock()
        self._runs: tuple[Any, Any] | None = None  # job and execution; changed under _beating
        threading.Thread(target=self._beat, name="flask-executor-heartbeat", daemon=True).start()

    def execute_job(self, job: Any, queue: Any) -> None:
        execution = self.prepare_execution(job)
        with self._beating:
            self._runs = job, execution
        try:
            self.perform_job(job, queue, execution)
        finally:
            with self._beating:
                self._runs = None
        self.set_state(rq.worker.WorkerStatus.IDLE)

    def _beat(self) -> None:
        """Have RQ know that the job is alive, and this worker."""
        while True:
            time.sleep(self.job_monitoring_interval)
            with self._beating:
                if self._runs is not None:
                    with suppress(redis.RedisError, OSError):  # the next one may get through
                        self.maintain_heartbeats(*self._runs)

    def request_stop(self, *signal: Any) -> None:
        shutting_down.set()
        super().request_stop(*signal)  # type: ignore[no-untyped-call]

    def kill_horse(self, *_: Any) -> None:
        """RQ's command to stop a job."""
        id = self.get_current_job_id()
        if id is not None:
            self._stop(id)
