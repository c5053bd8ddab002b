"""The ports: what a backend and a store promise to the rest of the package.

The docstrings are the contract; the suites in :mod:`flask_executor.testing.contract` hold every adapter to it.
"""

from __future__ import annotations

import abc
import concurrent.futures
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flask_executor.exceptions import Unsupported
from flask_executor.jobs.call import Call, CallControl
from flask_executor.jobs.model import Job, JobMessage, JobStatus, LogLine

if TYPE_CHECKING:
    import weakref

    from flask import Flask


def _unbound(fn: Callable[..., Any], *_: object) -> concurrent.futures.Future[Any]:
    raise RuntimeError("this backend runs jobs of an app, and was made without one")


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendOptions:
    """What a backend is made from."""

    #: Most jobs that run at a time; None for the backend's own default.
    max_workers: int | None = None
    #: If true, a job that runs in this process is pickled all the same, to find what a worker process would refuse.
    pickle: bool = False
    #: The app that the jobs belong to; None for a backend that is used without one.
    app: weakref.ref[Flask] | None = None
    #: Returns the name that a setting has in this app's config: ``config_key("EXECUTOR_APP")``. For error messages.
    config_key: Callable[[str], str] = str
    #: Import string of the app or its factory, for worker processes that do not inherit the app; None to guess it.
    app_import: str | None = None
    #: How worker processes are started: ``fork``, ``forkserver`` or ``spawn``; None for the platform's default.
    start_method: str | None = None
    #: Jobs after which a worker process is replaced; None for never.
    max_tasks_per_child: int | None = None
    #: Called in each worker process before its first job, in an app context.
    initializers: Sequence[Callable[[], object]] = ()
    #: Seconds that a worker process has to end in, before it is killed.
    exit_grace: float = 5.0
    #: The executor's name.
    executor_name: str = ""
    #: Starts a job without contexts and returns its future: ``submit`` of backends that run nothing but jobs.
    start: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], concurrent.futures.Future[Any]] = _unbound
    #: Url of the engine's broker or scheduler; None for the engine's own default.
    url: str | None = None
    #: Name of the engine's queue.
    queue: str = "default"
    #: Seconds that jobs which run have to end in when their process shuts down.
    shutdown_timeout: float = 30.0
    #: Marks a job as failed that the engine has dropped before a worker began it: given its id, the error, its name.
    refuse: Callable[[str, Exception, str], object] = lambda *_: None


#: What a backend runs: a call with its job, contexts and future.
PreparedCall = Call


class Backend(concurrent.futures.Executor, CallControl):
    """What runs jobs: a :class:`concurrent.futures.Executor` that also takes prepared calls.

    Its constructor takes one :class:`BackendOptions` and raises nothing for a valid configuration. It starts no thread
    and no process: the first call does, so that forking after an import is safe. Apart from :meth:`work`, all methods
    may be called from any thread.
    """

    def __init__(self, options: BackendOptions) -> None:
        super().__init__()

    #: If true, jobs run in another process: functions, arguments, results and messages have to be picklable.
    remote: bool = False
    #: If true, ``map`` puts several calls into one job where that is asked for, as sending a job is expensive.
    chunks: bool = False
    #: If true, :meth:`kill` ends a running job for certain, whatever it does.
    supports_kill: bool = False
    #: If true, jobs of a higher priority start first.
    supports_priority: bool = True
    #: If true, the engine can start a job at a later time. Only engines need to: other jobs wait in this process.
    supports_delay: bool = True
    #: The name of the engine whose own workers run the jobs, as ``rq``. They write the records into a shared store,
    #: from which futures read them, and calls come to :meth:`enqueue` packed. None for a backend that runs jobs itself.
    engine: str | None = None

    @abc.abstractmethod
    def enqueue(self, call: PreparedCall) -> None:
        """Accept a call: either run it once, or cancel its future.

        Calls of higher priority start first, calls of the same priority in the order in which they came.

        :raises ExecutorShutdown: after :meth:`shutdown`; the call was not accepted.
        :raises NotPicklable: for a call that cannot be sent to where the workers are; it was not accepted.
        """

    def pack(self, call: PreparedCall) -> None:
        """Pickle a call that may be enqueued later, so that what is sent is as it was at its submission.

        A backend that sends calls puts the bytes into ``call.packed``, and sends them in :meth:`enqueue`. Others need
        not do anything.

        :raises NotPicklable: for a call that cannot be sent.
        """

    def withdraw(self, call: PreparedCall) -> bool:
        """Take a call back that has not started, so that its future can be cancelled.

        A backend that claims the future right before it runs the call need not do anything.

        :return: False if the call has started.
        """
        return True

    def request_stop(self, call: PreparedCall, attempt: int, reason: JobStatus) -> None:
        """Ask an attempt of a running call to end at its next checkpoint, and wake it if it sleeps.

        :param reason: the status that its job will have: STOPPED or TIMED_OUT.
        """
        call.wake()

    def kill(self, call: PreparedCall, attempt: int) -> None:
        """End an attempt of a running call by force, and no other call; or try to without ``supports_kill``."""
        call.interrupt(attempt)

    def deliver(self, call: PreparedCall, message: JobMessage) -> None:
        """Send a message to a call that has not ended; its job receives it now, or when it starts.

        Messages of one thread arrive in the order in which they were sent.

        :raises NotPicklable: for a message that cannot be sent to the process that runs the call.
        """
        call.deliver(message)

    def run_user_code(self, fn: Callable[[], object]) -> None:
        """Run a done-callback or a signal receiver without blocking the backend.

        Runs it in the calling thread. If that thread drives the backend, as the supervisor of a process pool does, it
        is queued to a thread of its own instead. Order is kept.
        """
        fn()

    @property
    def has_pending_user_code(self) -> bool:
        """Whether something that was passed to :meth:`run_user_code` has not run yet."""
        return False

    @classmethod
    def default_store(cls, options: BackendOptions) -> str | None:
        """The default of ``EXECUTOR_STORE`` for an engine; None if the app has to choose a store.

        :raises ConfigError: if the engine's url is missing too.
        """
        return options.url

    def work(self, stop: Callable[[str], object], *, processes: int, burst: bool) -> None:
        """Run workers of the engine until a signal ends them; ``flask executor worker`` calls it in the main thread.

        The workers run each call with :func:`flask_executor.backends.engine.run`.

        :param stop: stops a job of this process, given its id, for engines that have a command for that.
        :param processes: number of workers, each of which runs one job at a time.
        :param burst: if true, end when the queue is empty.
        """
        raise NotImplementedError

    def remove_queued(self, job: Job) -> None:
        """Take a cancelled job off the engine's queue, if the engine can. A worker that gets it would drop it.

        :raises EngineUnavailable: if the engine cannot be reached.
        """

    @property
    def waiting(self) -> int:
        """How many calls wait in the queue of the engine, those of other processes among them.

        :raises Unsupported: for an engine that cannot tell.
        :raises EngineUnavailable: if the engine cannot be reached.
        """
        raise Unsupported(f"{type(self).__name__} cannot tell how many jobs wait, so that their number has no limit")

    def worker_states(self) -> Sequence[WorkerState]:
        """The worker processes that are alive; none if jobs run in threads of this process."""
        return ()

    def terminate(self, grace: float) -> None:
        """This process is about to end: kill the workers that have not ended by themselves in ``grace`` seconds."""

    @property
    @abc.abstractmethod
    def workers(self) -> int:
        """How many workers are alive."""

    @property
    @abc.abstractmethod
    def capacity(self) -> int | None:
        """How many jobs can run at a time; None if a job never has to wait for another one."""


class JobRecords(abc.ABC):
    """The records of an app's jobs, to be read; ``executor.jobs``.

    The record of a job that has not ended stays. After its end it expires: ``EXECUTOR_RESULT_TTL`` seconds later, or
    earlier if there are more than ``EXECUTOR_STORE_MAX_RECORDS``; those of the jobs that ended first go first. With a
    shared store all methods may raise :exc:`~flask_executor.StoreUnavailable`.
    """

    @abc.abstractmethod
    def get(self, id: str) -> Job | None:
        """The job with this id; None if there is no record, or it has expired."""

    @abc.abstractmethod
    def find(self, key: Hashable) -> Job | None:
        """The youngest job under this key; None if there is no record, or it has expired."""

    @abc.abstractmethod
    def expired(self, id: str | None = None, *, key: Hashable | None = None) -> bool:
        """Whether there was a job with this id, or under this key, whose record has expired.

        That is remembered as long again as a record is kept, but an hour at least.
        """

    @abc.abstractmethod
    def log(self, id: str) -> Sequence[LogLine]:
        """The last lines that the job has logged, oldest first; none if there is no such job."""

    def list(
        self,
        *,
        status: JobStatus | str | None = None,
        name: str | None = None,
        owner: str | None = None,
        limit: int | None = None,
    ) -> Sequence[Job]:
        """Jobs that match all that is given, youngest first.

        :param limit: most records to return.
        :raises ValueError: for a status that does not exist or a negative limit.
        """
        if limit is not None and limit < 0:
            raise ValueError(f"limit is {limit}; it must be 0 or more, or None")
        owner = None if owner is None else str(owner)
        return self._list(None if status is None else JobStatus(status), name, owner, limit)

    @abc.abstractmethod
    def _list(self, status: JobStatus | None, name: str | None, owner: str | None, limit: int | None) -> Sequence[Job]:
        """What :meth:`list` returns; the arguments were checked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOptions:
    """What a shared store is made from."""

    #: Where the records are: ``sqlite:////var/lib/shop/jobs.sqlite``, ``redis://localhost:6379/0``.
    url: str
    #: Whose records these are. Stores of other spaces may be in the same place, and do not see them.
    space: str
    #: Seconds that a record is kept after its job has ended.
    result_ttl: float
    #: Most records of ended jobs to keep.
    max_records: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is new about a job, to be written."""

    job: Job
    #: The process that has the job, or its engine; see :mod:`flask_executor.stores.leases`.
    holder: str
    #: The result or the error, packed and signed; None if there is none yet.
    outcome: bytes | None = None
    #: Lines of the job's log that were not written yet.
    log: Sequence[LogLine] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRequest:
    """A request to stop a job, for the process that has it."""

    id: str
    #: Seconds until force is used; None for ``EXECUTOR_STOP_GRACE``.
    grace: float | None = None
    #: If true, the job is cancelled if it has not started, and left alone otherwise.
    only_queued: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMessage:
    """A message to a job, for the process that has it."""

    #: The id of the job.
    id: str
    #: What the store calls this message.
    number: str
    #: The message, packed and signed.
    data: bytes


#: Most messages that wait for one job in a store.
MOST_MESSAGES = 1000


class JobStore(JobRecords):
    """Records that all processes of an app see.

    All methods may be called from any thread, and may wait for a few seconds.

    A process that has jobs is a *holder*. It has a lease, which it renews. Any process that reads the record of a job
    that has not ended, and finds its holder dead, writes that the job is ``lost``. What a holder writes about its own
    job counts, also after that. A holder is dead if its process is gone from this machine, or if it is of another
    machine and its lease has run out; an engine, which has the jobs in its queue, never is.

    A key belongs to one job at a time: from :meth:`claim` until :meth:`release`, or until the record expires.

    A message to a job waits in the store until its holder fetches it, also for a holder that takes the job over later.
    A message that is never fetched expires with the record.

    The constructor takes one :class:`StoreOptions`, opens nothing, and raises :exc:`ValueError` for a url that it
    cannot use. All methods may raise :exc:`~flask_executor.StoreUnavailable`. It is not known then whether the call has
    had an effect, and so it may be repeated without harm.
    """

    #: Where the records are, for error messages; without passwords.
    where: str

    @abc.abstractmethod
    def __init__(self, options: StoreOptions) -> None:
        pass

    @abc.abstractmethod
    def claim(self, entry: Entry, *, again: bool = False) -> Job | None:
        """Take the key of a new job, write its record, and give its holder a lease; all or nothing.

        Of many processes that claim a key at once, one gets it.

        :param again: if true, take the key from a job that has ended without success.
        :return: None if the job has the key now; the job that has it otherwise.
        """

    @abc.abstractmethod
    def write(self, entries: Sequence[Entry]) -> None:
        """Write what is new about jobs that the caller has, in this order.

        A record that is not there is created, with its key if the job has not ended and no other job has that key.
        """

    @abc.abstractmethod
    def transfer(self, entry: Entry, former: str | None, *, lost: bool = False, new: bool = True) -> Job | None:
        """Make ``entry.holder`` the holder of a job, if ``former`` has it, and write the entry; all or nothing.

        A compare-and-set: of many processes that call it at once, one succeeds. A call that is repeated with the same
        entry succeeds again and changes nothing, as the first answer may have been lost.

        Five combinations of the arguments are used. All of them succeed, and write, if ``former`` has the job and it
        has not ended. All of them are refused if another holder has the job, or if it has ended, unless as lost:

        ==============================  =============  =====================  =======================================
        arguments after the entry       no record      the job is lost        used for
        ==============================  =============  =====================  =======================================
        ``None``                        creates it     refused                recording a job that an engine will get
        ``former``                      creates it     refused                taking, cancelling or failing a job
        ``former, new=False``           does nothing   refused                handing a job over to an engine
        ``former, lost=True``           creates it     takes it from anybody  taking over from a dead worker
        ``former, lost=True,``          does nothing   takes it from anybody  handing a job over, or writing it, whose
        ``new=False``                                                         holder may have been taken for dead
        ==============================  =============  =====================  =======================================

        :param former: the holder that has the job; None if there must not be a record.
        :param lost: if true, also succeed if the job is lost, unless another job has its key by now.
        :param new: if true, create the record if the store has none: it has expired, or its first write is pending.
        :return: None, also if there was nothing to do; the record of the job if it was refused.
        """

    @abc.abstractmethod
    def holder(self, id: str) -> str | None:
        """The holder of a job; None if there is no record, or the job has ended."""

    @abc.abstractmethod
    def holding_key(self, key: Hashable) -> Job | None:
        """The job that has this key; None if no job has it."""

    @abc.abstractmethod
    def release(self, key: Hashable, id: str) -> bool:
        """Free a key if this job has it. The record stays, and later writes do not take the key again.

        :return: whether the job had the key.
        """

    @abc.abstractmethod
    def keys(self, within: tuple[Hashable, ...] = ()) -> Sequence[Hashable]:
        """The keys that jobs have, those that were taken first before the others.

        :param within: if not empty, only the keys that are longer tuples and begin with this one.
        """

    @abc.abstractmethod
    def outcome(self, id: str) -> bytes | None:
        """The outcome of a job as it was written; None if there is none."""

    @abc.abstractmethod
    def remove(self, id: str) -> None:
        """Forget a job as if it had never existed: :meth:`expired` does not know it."""

    @abc.abstractmethod
    def purge(self, ended_before: float) -> int:
        """Let the records expire of jobs that ended before then.

        :param ended_before: seconds since the epoch.
        :return: how many expired.
        """

    @abc.abstractmethod
    def find_lost(self) -> None:
        """Mark the jobs of dead holders as lost. Quick if there are none."""

    @abc.abstractmethod
    def sweep(self) -> None:
        """As :meth:`find_lost`, and remove what has expired."""

    @abc.abstractmethod
    def ask_to_stop(self, request: StopRequest) -> None:
        """Leave a request for the process that has the job by the time it calls :meth:`take_requests`."""

    @abc.abstractmethod
    def send(self, id: str, data: bytes) -> bool:
        """Leave a message for the holder of a job. Unlike other calls, a repeated one has an effect: another message.

        :return: False if there is no record of the job, or it has ended.
        :raises QueueFull: if :data:`MOST_MESSAGES` wait for this job.
        """

    @abc.abstractmethod
    def take_requests(self, holder: str) -> Sequence[StopRequest | StoredMessage]:
        """Requests and messages to the jobs of this holder that have not ended. Quick if there are none.

        A request to stop is returned once. A message is returned until :meth:`acknowledge` is called with it; those to
        one job come in the order in which they were sent, a limited number at a time.
        """

    @abc.abstractmethod
    def acknowledge(self, holder: str, messages: Sequence[StoredMessage]) -> None:
        """Remove messages that jobs of this holder have received."""

    @abc.abstractmethod
    def renew(self, holder: str) -> bool:
        """Renew a lease.

        :return: False if it had run out, so that other processes may have taken this holder for dead.
        """

    @abc.abstractmethod
    def drop_lease(self, holder: str) -> None:
        """End a lease: this holder has no jobs any more."""

    @abc.abstractmethod
    def watch(self) -> Watch:
        """A way to wait for what other processes write."""

    @abc.abstractmethod
    def check(self, *, thoroughly: bool = False) -> None:
        """Check that the store can be read and written.

        :param thoroughly: if true, check all of its contents too, which takes time.
        :raises StoreUnavailable: if something is wrong; it says what.
        """

    @property
    @abc.abstractmethod
    def is_private(self) -> bool:
        """Whether no other user of the machine can write to it, so that its contents need no signature."""

    @abc.abstractmethod
    def after_fork(self) -> None:
        """In the child of a fork: abandon the parent's connections without closing them; new ones open when needed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close all connections. A call after that opens them again."""


class Watch(abc.ABC):
    """Waits for what other processes write. One thread uses it; any thread may call :meth:`wake`."""

    @abc.abstractmethod
    def begin(self, ids: Collection[str]) -> None:
        """Watch these jobs, and no others, from now on.

        What the caller reads from the store after this call, and what then changes, ends the next :meth:`wait`.
        """

    @abc.abstractmethod
    def wait(self, timeout: float) -> Collection[str] | None:
        """Wait until one of the jobs may have changed, or :meth:`wake` is called.

        :param timeout: most seconds to wait.
        :return: the ids of jobs that may have ended, possibly of other jobs too; None if it may be any of them.
        """

    @abc.abstractmethod
    def wake(self) -> None:
        """End :meth:`wait` now, or the next one if no thread waits. Never raises."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close its connection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerState:
    """What a worker does."""

    #: The id of the process that it is, or runs in.
    pid: int
    #: If true, it runs a job.
    busy: bool
    #: The id of the job; None if it runs none, or several.
    job: str | None = None
    #: If true, it has started and can take a job.
    ready: bool = True
    #: The name of the service that it belongs to; None for a worker that runs jobs.
    service: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """The state of an executor in this process."""

    #: Workers that are alive. They start when they are needed.
    workers: int
    #: Jobs that run.
    busy: int
    #: Jobs that wait to start.
    waiting: int
    #: Seconds that the oldest of the waiting jobs has waited; 0.0 if there are none.
    oldest_wait: float
    #: If true, the store answers. That of one process always does.
    store_reachable: bool
    #: If true, jobs are accepted: the executor was not shut down.
    accepting: bool
    #: The services of the app, those that another process runs among them.
    services: tuple[ServiceStatus, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceStatus:
    """The state of a service."""

    name: str
    #: Ids of its worker processes; none if it does not run.
    pids: tuple[int, ...] = ()
    #: How many workers it should have, how many are ready, and how many handle a message now.
    workers: int = 0
    ready: int = 0
    busy: int = 0
    #: Messages that wait for a worker.
    waiting: int = 0
    #: How many times a worker has died, or could not start.
    failures: int = 0
    #: The error of the last of these failures.
    last_error: str | None = None
    #: The id of the process that supervises the workers.
    supervisor: int | None = None
