"""Jobs run by workers of RQ, on any number of machines."""

from __future__ import annotations

import concurrent.futures
import math
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from flask_executor import remote
from flask_executor.abc import Backend, BackendOptions, PreparedCall
from flask_executor.apps import import_string_of
from flask_executor.exceptions import ExecutorShutdown, MissingExtra

try:
    import redis
    import rq
except ImportError as error:
    raise MissingExtra("rq", "rq") from error

P = ParamSpec("P")
T = TypeVar("T")

_URL = "redis://localhost:6379/0"
_SLACK = 60  # seconds beyond its own limits after which RQ ends a job


class RQBackend(Backend):
    """Enqueues calls for workers of RQ: ``rq worker`` or ``flask executor worker``."""

    remote = True
    engine = "rq"

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._shutdown = False
        self._app_import: str | None = None
        connection = redis.Redis.from_url(options.url or _URL)
        self._queue = rq.Queue(options.queue, connection=connection)

    def enqueue(self, call: PreparedCall) -> None:
        if self._shutdown:
            raise ExecutorShutdown("cannot schedule new futures after shutdown")
        if self._app_import is None:
            options = self._options
            app, key = None if options.app is None else options.app(), options.config_key("EXECUTOR_APP")
            self._app_import = import_string_of(app, options.app_import, key, "workers of RQ")
        limit = call.timeout
        self._queue.enqueue_call(
            "flask_executor.remote.run",
            (self._app_import, self._options.executor_name, call.job.id, call.packed),
            timeout=-1 if limit is None else math.ceil(limit + self._options.exit_grace + _SLACK),
            result_ttl=0,
            failure_ttl=3600,
            description=call.job.name,
            job_id=call.job.id,
            at_front=call.priority > 0,
        )

    def work(self, run: Callable[[str, bytes], None], stop: Callable[[str], object], *, burst: bool) -> None:
        remote.serving = run
        _Worker([self._queue], connection=self._queue.connection, stop=stop).work(burst=burst)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function, outside of all contexts, as any executor does."""
        if self._options.start is None:
            raise RuntimeError("workers of RQ run jobs of an app, and this backend was made without one")
        return self._options.start(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more; jobs go on without this process."""
        self._shutdown = True
        self._queue.connection.close()

    @property
    def workers(self) -> int:
        return rq.Worker.count(queue=self._queue)

    @property
    def capacity(self) -> None:
        return None


class _Worker(rq.SimpleWorker):
    """A worker of RQ that has the app loaded, and leaves it to others to run the jobs and to end them by force.

    :param stop: stops a job, given its id.
    """

    def __init__(self, *args: Any, stop: Callable[[str], object], **options: Any) -> None:
        super().__init__(*args, **options)
        self._stop = stop

    def execute_job(self, job: Any, queue: Any) -> None:
        execution = self.prepare_execution(job)
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self.job_monitoring_interval):
                self.maintain_heartbeats(job, execution)

        beats = threading.Thread(target=beat, name="flask-executor-heartbeat", daemon=True)
        beats.start()
        try:
            self.perform_job(job, queue, execution)
        finally:
            ended.set()
            beats.join()
        self.set_state(rq.worker.WorkerStatus.IDLE)

    def kill_horse(self, *_: Any) -> None:
        """RQ's command to stop a job."""
        id = self.get_current_job_id()
        if id is not None:
            self._stop(id)
