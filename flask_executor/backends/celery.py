"""Jobs run by workers of Celery, on any number of machines.

All jobs are calls of one task, ``flask_executor.run``, which workers have that have loaded the app: ``flask executor
worker`` and an app's own ``celery -A shop worker``. Flower and logs show the names of the jobs.

.. code-block:: text

    web app            broker          worker of Celery       its pool process            a worker process of that
      enqueue() ─────> queue ────────> takes a message ─────> run() ─> entrypoint.run() ─> fn()
                         ^             acknowledges it <───── returns: the outcome is in the store
                         └──────────── sends it again  <───── raises Retry(countdown), to run it again later

**Invariant.** A message is acknowledged when the outcome of its job is in the store (``acks_late``), so it may be
delivered twice. The store decides which delivery runs the job.
"""

from __future__ import annotations

import base64
import concurrent.futures
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

from flask_executor.abc import Backend, BackendOptions, PreparedCall
from flask_executor.backends.engine.entrypoint import Destination, decode, destination_of, requeue_elsewhere
from flask_executor.backends.engine.entrypoint import run as run_sent
from flask_executor.exceptions import ConfigError, EngineUnavailable, ExecutorShutdown, MissingExtra, StoreUnavailable
from flask_executor.helpers.fork_hooks import after_fork_in_child
from flask_executor.helpers.log import logger

try:
    import celery
except ImportError as error:
    raise MissingExtra("celery", "celery") from error

from celery import signals
from celery.app.control import Control
from celery.concurrency import get_implementation
from celery.exceptions import Reject
from celery.utils.nodenames import host_format
from celery.worker import state
from kombu.exceptions import KombuError

P = ParamSpec("P")
T = TypeVar("T")

#: What Celery calls the task that runs jobs.
TASK = "flask_executor.run"

_RESPONSE_TIMEOUT = 1.5  # seconds that the broker may take to answer a thread that submits
_STORE_RETRY_DELAY = 1.0  # seconds until Celery delivers a job again whose worker could not reach the store
_REPLY_TIMEOUT = 1.0  # seconds that workers may take to answer a broadcast
_WORKER_COUNT_TTL = 5.0  # seconds for which the number of workers is cached
_EMPTY_POLL_INTERVAL = 0.25  # seconds between two looks of a worker in burst mode whether the queue is empty
_TIME_LIMIT_MARGIN = 60  # seconds that Celery's time limit leaves a job beyond its own timeout
_NO_TIME_LIMIT = 10**8  # seconds; for None, Celery would take the limit that other tasks have
_MAX_CONNECTIONS = 10  # to the broker, as in Celery


class CeleryBackend(Backend):
    """Sends calls to workers of Celery: of the app's own Celery in ``app.extensions["celery"]``, or else of one that is
    made for ``EXECUTOR_URL``.

    Jobs go into the queue ``EXECUTOR_QUEUE``. ``default`` is the queue that Celery routes the task to, which a plain
    ``celery worker`` consumes.

    There are three priorities: above 0, 0, and below 0. Redis always has them. RabbitMQ has them if the queue was
    declared with ``x-max-priority`` (``task_queue_max_priority`` in Celery's settings); other brokers have none. They
    order the jobs in the queue, so workers must not prefetch many: ``flask executor worker`` does not, others need
    ``worker_prefetch_multiplier=1``.
    """

    remote = True
    engine = "celery"
    supports_kill = True

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._shutdown = False
        self._counted_at, self._worker_count = -_WORKER_COUNT_TTL, 0

    @classmethod
    def default_store(cls, options: BackendOptions) -> str:
        own = _celery_of(options)
        url = options.url if own is None else own.conf.broker_write_url
        if url is None:
            allowed = (
                "the url of a broker, such as 'redis://host:6379/0', where app.extensions['celery'] is not set before"
            )
            raise ConfigError(options.config_key("EXECUTOR_URL"), None, allowed)
        return str(url)

    @cached_property
    def _destination(self) -> Destination:
        return destination_of(self._options)

    @cached_property
    def _celery(self) -> celery.Celery:
        return _celery_of(self._options) or _make_celery(self._options)

    @property
    def _queue(self) -> Any:
        name = self._options.queue
        return self._celery.amqp.router.route({} if name == "default" else {"queue": name}, TASK)["queue"]

    @cached_property
    def _connections(self) -> Any:
        """Connections to the broker, one for each thread that is submitting."""
        connections = self._connection().Pool(_MAX_CONNECTIONS)
        _open.add(connections)
        return connections

    def _connection(self) -> Any:
        """A new connection to the broker, with short timeouts."""
        broker = self._celery.conf.broker_write_url
        return self._celery.connection(broker, connect_timeout=_RESPONSE_TIMEOUT, transport_options=_SHORT_TIMEOUTS)

    def enqueue(self, call: PreparedCall) -> None:
        if self._shutdown:
            raise ExecutorShutdown("cannot schedule new futures after shutdown")
        limit = _NO_TIME_LIMIT
        if call.timeout is not None:
            limit = math.ceil(call.timeout + self._options.exit_grace + _TIME_LIMIT_MARGIN)
        with self._translate_errors(), self._connections.acquire(block=True) as connection:
            self._celery.tasks[TASK].apply_async(
                (self._destination, call.job.id, base64.b64encode(call.packed).decode()),
                task_id=call.job.id,
                shadow=call.job.name,
                argsrepr=f"({len(call.packed)} bytes)",
                queue=self._queue,
                priority=self._priority(call.priority),
                countdown=call.delay or None,
                time_limit=limit,
                soft_time_limit=limit,
                ignore_result=True,
                producer=self._celery.amqp.Producer(connection, auto_declare=False),
                retry=True,  # once, immediately, on a new connection: the broker may have been restarted
                retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0},
            )

    def _priority(self, priority: int) -> int:
        """The priority as the broker has it."""
        lower_goes_first = self._connections.connection.transport.driver_type == "redis"
        high, normal, low = (0, 3, 9) if lower_goes_first else (9, 5, 1)
        if priority:
            return high if priority > 0 else low
        usual: int | None = self._celery.conf.task_default_priority
        return normal if usual is None else usual

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise errors of the broker and of the connection as :exc:`EngineUnavailable`."""
        try:
            yield
        except Exception as error:
            broker = self._connections.connection
            if not isinstance(error, (*broker.connection_errors, *broker.channel_errors, KombuError, OSError)):
                raise
            where = self._options.config_key("EXECUTOR_URL")
            raise EngineUnavailable("The broker", broker.as_uri(), where, str(error)) from error

    def work(self, stop: Callable[[str], object], *, processes: int, burst: bool) -> None:
        signals.setup_logging.connect(_leave_logging_alone)
        worker = self._celery.Worker(
            hostname=host_format(f"executor-{os.getpid()}@%h"),
            pool_cls=get_implementation("prefork"),
            concurrency=processes,
            queues=[self._queue.name],
            prefetch_multiplier=1,  # priorities do not order what a worker has prefetched
            loglevel="WARNING",
            quiet=True,
            redirect_stdouts=False,
            without_gossip=True,
            without_mingle=True,
        )
        if burst:
            threading.Thread(target=self._end_when_empty, name="flask-executor-burst", daemon=True).start()
        worker.start()

    def _end_when_empty(self) -> None:
        """Stop the worker when the queue is empty, which Celery cannot do. Runs in a thread of its own."""
        idle = 0
        while idle < 2:  # a message may be between the queue and this worker at the first look
            time.sleep(_EMPTY_POLL_INTERVAL)
            idle = 0 if state.reserved_requests or self.waiting else idle + 1
        state.should_stop = 0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function, outside of all contexts, as any executor does."""
        return self._options.start(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs. Those that were accepted go on without this process."""
        self._shutdown = True
        if "_connections" in self.__dict__:
            self._connections.force_close_all()

    @property
    def waiting(self) -> int:
        """How many messages are in the queue. Delayed ones are not: workers hold them until they are due."""
        with self._translate_errors(), self._connection() as connection:
            try:
                return int(self._queue(connection.default_channel).queue_declare(passive=True).message_count)
            except connection.channel_errors:  # the queue does not exist before the first message
                return 0

    @property
    def workers(self) -> int:
        """How many jobs the workers of the queue can run at a time.

        The workers that answer within a second are counted, at most every five seconds.
        """
        if time.monotonic() > self._counted_at + _WORKER_COUNT_TTL:
            self._worker_count = self._count_workers()
            self._counted_at = time.monotonic() if self._worker_count else -_WORKER_COUNT_TTL
        return self._worker_count

    def _count_workers(self) -> int:
        name, control = self._queue.name, Control(self._celery)
        control.mailbox.producer_pool = None  # Celery's pool would keep the connection open
        # On a new connection: one that was used before may still consume replies, and would take these.
        with self._translate_errors(), self._connection() as connection:

            def ask(what: str, **options: Any) -> dict[str, Any]:
                replies = control.broadcast(what, reply=True, timeout=_REPLY_TIMEOUT, connection=connection, **options)
                return {node: reply for each in replies or () for node, reply in each.items()}

            queues = ask("active_queues")
            nodes = [node for node, those in queues.items() if name in [each["name"] for each in those]]
            stats = ask("stats", destination=nodes, limit=len(nodes)) if nodes else {}
        return sum(of_node["pool"]["max-concurrency"] for of_node in stats.values())

    @property
    def capacity(self) -> None:
        return None


# Options of connections for threads that submit. Each transport ignores the names that it does not know.
_SHORT_TIMEOUTS = {
    "max_retries": 1,
    "interval_start": 0,
    "interval_step": 0,
    "socket_connect_timeout": _RESPONSE_TIMEOUT,  # Redis
    "socket_timeout": _RESPONSE_TIMEOUT,
    "read_timeout": _RESPONSE_TIMEOUT,  # RabbitMQ
    "write_timeout": _RESPONSE_TIMEOUT,
}
_open: weakref.WeakSet[Any] = weakref.WeakSet()  # connection pools that this process has made
_inherited: list[Any] = []  # connection pools that the parent of this forked process has made


def _keep_inherited() -> None:
    """Keep the parent's connections from being collected in a forked child: that would close them at the broker."""
    _inherited.extend(_open)
    _open.clear()


after_fork_in_child(_keep_inherited)


def _celery_of(options: BackendOptions) -> Any:
    """The app's own Celery, or None."""
    app = None if options.app is None else options.app()
    return None if app is None else app.extensions.get("celery")


def _make_celery(options: BackendOptions) -> celery.Celery:
    made = celery.Celery("flask_executor", broker=options.url, set_as_current=False)
    made.conf.update(
        task_default_queue=options.queue,
        task_queue_max_priority=10,  # for RabbitMQ
        broker_connection_retry_on_startup=True,
    )
    return made


def _leave_logging_alone(**_: object) -> None:
    """A receiver of ``setup_logging``: while there is one, Celery does not configure logging itself."""


@celery.shared_task(  # type: ignore[untyped-decorator]
    bind=True, name=TASK, acks_late=True, reject_on_worker_lost=True, ignore_result=True, max_retries=None
)
def run(task: Any, destination: object, id: str, data: str) -> None:
    """The task of all jobs. Called in a pool process of Celery's worker."""
    delay: float | None
    try:
        delay = run_sent(*decode(destination, id, data))
    except StoreUnavailable as error:
        logger.warning("Job %s has to wait: %s", id, error)
        delay = _STORE_RETRY_DELAY
    except ConfigError as error:
        delay = requeue_elsewhere(id, error)
    if delay is not None:
        try:
            task.retry(countdown=delay, argsrepr=task.request.get("argsrepr"))
        except Reject as error:  # the broker cannot be reached: requeue the message, or it would be dropped
            raise Reject(error.reason, requeue=True) from error
