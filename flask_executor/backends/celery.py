"""Jobs run by workers of Celery, on any number of machines.

They are calls of one task, ``flask_executor.run``, which every worker has that has loaded the app: the one of ``flask
executor worker``, and an app's own ``celery -A shop worker``. Flower and logs show the names of the jobs.

.. code-block:: text

    web app            broker          worker of Celery       its child               supervised by that
      enqueue() ─────> queue ────────> takes a message ─────> run() ─ remote.run() ─> fn()
                         ^             acknowledges it <───── returns
                         └── again in so many seconds, if <── raises Retry            the store has what came of it
                             it is to be tried again

**Invariant.** A message is acknowledged when what came of its job is in the store (``acks_late``), and so it may come
twice. Which of the two runs is decided in the store.
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
from flask_executor.backends.engine.entrypoint import Address, address_of, requeue_elsewhere
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

_PATIENCE = 1.5  # seconds that the broker may take to answer those who submit
_PAUSE = 1.0  # seconds until a job comes again when it is the store that was not there
_ASK = 1.0  # seconds that workers may take to say that they are there
_KNOWN = 5.0  # seconds for which the answer is good
_LOOK = 0.25  # seconds after which a worker that is to end when the queue is empty looks at it again
_SLACK = 60  # seconds beyond its own limits after which Celery ends a job
_FOREVER = 10**8  # seconds: no limit of Celery's, also if there is one for other tasks
_CONNECTIONS = 10  # most to the broker, as Celery has it


class CeleryBackend(Backend):
    """Sends calls to workers of Celery: of the app's own Celery, if there is one in ``app.extensions["celery"]``, or of
    one that is made for ``EXECUTOR_URL``.

    Jobs go into the queue ``EXECUTOR_QUEUE``. ``default`` there means the queue that Celery takes for the task, which
    is the one that a plain ``celery worker`` looks at.

    There are three priorities: higher than 0, 0, and lower. Redis has them without further ado. RabbitMQ has them for a
    queue that was declared with ``x-max-priority`` (``task_queue_max_priority`` in Celery's settings); other brokers
    have none. They hold between jobs in the queue, so a worker must not take many of them at a time: ``flask executor
    worker`` does not, others need ``worker_prefetch_multiplier=1``.
    """

    remote = True
    engine = "celery"
    supports_kill = True

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._shutdown = False
        self._asked, self._known = -_KNOWN, 0

    @classmethod
    def default_store(cls, options: BackendOptions) -> str:
        theirs = _celery_of(options)
        url = options.url if theirs is None else theirs.conf.broker_write_url
        if url is None:
            allowed = (
                "the url of a broker, such as 'redis://host:6379/0', where app.extensions['celery'] is not set before"
            )
            raise ConfigError(options.config_key("EXECUTOR_URL"), None, allowed)
        return str(url)

    @cached_property
    def _address(self) -> Address:
        return address_of(self._options)

    @cached_property
    def _celery(self) -> celery.Celery:
        return _celery_of(self._options) or _make_celery(self._options)

    @property
    def _queue(self) -> Any:
        name = self._options.queue
        return self._celery.amqp.router.route({} if name == "default" else {"queue": name}, TASK)["queue"]

    @cached_property
    def _connections(self) -> Any:
        """Connections to the broker, one for each thread that submits just now."""
        connections = self._connection().Pool(_CONNECTIONS)
        _open.add(connections)
        return connections

    def _connection(self) -> Any:
        """One that does not wait for long."""
        broker = self._celery.conf.broker_write_url
        return self._celery.connection(broker, connect_timeout=_PATIENCE, transport_options=_IMPATIENT)

    def enqueue(self, call: PreparedCall) -> None:
        if self._shutdown:
            raise ExecutorShutdown("cannot schedule new futures after shutdown")
        limit = _FOREVER if call.timeout is None else math.ceil(call.timeout + self._options.exit_grace + _SLACK)
        with self._translate_errors(), self._connections.acquire(block=True) as connection:
            self._celery.tasks[TASK].apply_async(
                (self._address, call.job.id, base64.b64encode(call.packed).decode()),
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
                retry=True,  # at once, on a new connection, as the broker may have been started again
                retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0},
            )

    def _priority(self, priority: int) -> int:
        """What the broker calls it."""
        lower_goes_first = self._connections.connection.transport.driver_type == "redis"
        high, normal, low = (0, 3, 9) if lower_goes_first else (9, 5, 1)
        if priority:
            return high if priority > 0 else low
        usual: int | None = self._celery.conf.task_default_priority
        return normal if usual is None else usual

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """What goes wrong with the broker becomes our error."""
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
            prefetch_multiplier=1,  # what a worker has taken is not in order any more
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
        """Celery has no such thing."""
        idle = 0
        while idle < 2:  # one may be on its way between the queue and this worker
            time.sleep(_LOOK)
            idle = 0 if state.reserved_requests or self.waiting else idle + 1
        state.should_stop = 0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a plain function, outside of all contexts, as any executor does."""
        return self._options.start(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more; jobs go on without this process."""
        self._shutdown = True
        if "_connections" in self.__dict__:
            self._connections.force_close_all()

    @property
    def waiting(self) -> int:
        """How many messages are in the queue. Those that workers hold back until their time comes are not."""
        with self._translate_errors(), self._connection() as connection:
            try:
                return int(self._queue(connection.default_channel).queue_declare(passive=True).message_count)
            except connection.channel_errors:  # nobody has sent anything yet
                return 0

    @property
    def workers(self) -> int:
        """How many jobs those workers can run at a time that look at the queue, and answer within a second.

        That is not asked more often than every few seconds.
        """
        if time.monotonic() > self._asked + _KNOWN:
            self._known = self._ask_workers()
            self._asked = time.monotonic() if self._known else -_KNOWN
        return self._known

    def _ask_workers(self) -> int:
        name, control = self._queue.name, Control(self._celery)
        control.mailbox.producer_pool = None  # Celery's own keeps its connections
        # On a new connection: the last one may still wait for replies, and would take these.
        with self._translate_errors(), self._connection() as connection:

            def ask(what: str, **options: Any) -> dict[str, Any]:
                replies = control.broadcast(what, reply=True, timeout=_ASK, connection=connection, **options)
                return {node: reply for each in replies or () for node, reply in each.items()}

            queues = ask("active_queues")
            nodes = [node for node, those in queues.items() if name in [each["name"] for each in those]]
            stats = ask("stats", destination=nodes, limit=len(nodes)) if nodes else {}
        return sum(of_node["pool"]["max-concurrency"] for of_node in stats.values())

    @property
    def capacity(self) -> None:
        return None


#: How connections are made by those who must not wait for long. Each broker knows the words that are for it.
_IMPATIENT = {
    "max_retries": 1,
    "interval_start": 0,
    "interval_step": 0,
    "socket_connect_timeout": _PATIENCE,  # Redis
    "socket_timeout": _PATIENCE,
    "read_timeout": _PATIENCE,  # RabbitMQ
    "write_timeout": _PATIENCE,
}
_open: weakref.WeakSet[Any] = weakref.WeakSet()  # pools of connections of this process
_inherited: list[Any] = []  # those of the process that has forked this one


def _keep_inherited() -> None:
    """To be thrown away is to say goodbye to the broker, in the name of the parent."""
    _inherited.extend(_open)
    _open.clear()


after_fork_in_child(_keep_inherited)


def _celery_of(options: BackendOptions) -> Any:
    """The app's own Celery, None if it has none."""
    app = None if options.app is None else options.app()
    return None if app is None else app.extensions.get("celery")


def _make_celery(options: BackendOptions) -> celery.Celery:
    made = celery.Celery("flask_executor", broker=options.url, set_as_current=False)
    made.conf.update(
        task_default_queue=options.queue,
        task_queue_max_priority=10,  # which only RabbitMQ has to know
        broker_connection_retry_on_startup=True,
    )
    return made


def _leave_logging_alone(**_: object) -> None:
    """Celery sets up logging only if nobody has taken that upon him."""


@celery.shared_task(  # type: ignore[untyped-decorator]
    bind=True, name=TASK, acks_late=True, reject_on_worker_lost=True, ignore_result=True, max_retries=None
)
def run(task: Any, address: Address, id: str, data: str) -> None:
    """What Celery runs."""
    import_string, app_name, name = address
    again: float | None
    try:
        again = run_sent((import_string, app_name, name), id, base64.b64decode(data))
    except StoreUnavailable as error:
        logger.warning("Job %s has to wait: %s", id, error)
        again = _PAUSE
    except ConfigError as error:
        again = requeue_elsewhere(id, error)
    if again is not None:
        try:
            task.retry(countdown=again, argsrepr=task.request.get("argsrepr"))
        except Reject as error:  # the broker is not there, and the message would be thrown away
            raise Reject(error.reason, requeue=True) from error
