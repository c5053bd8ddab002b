"""The ports: what a backend, a store and a channel promise to the rest of the package.

The contract of each stands in its docstrings; :mod:`flask_executor.testing.contract` holds every adapter to it.
"""

from __future__ import annotations

import abc
import concurrent.futures
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flask_executor.exceptions import Unsupported
from flask_executor.jobs.call import Call
from flask_executor.jobs.model import Job, JobMessage, JobStatus, LogLine

if TYPE_CHECKING:
    import weakref

    from flask import Flask


def _unbound(fn: Callable[..., Any], *_: object) -> concurrent.futures.Future[Any]:
    raise RuntimeError("this backend runs jobs of an app, and was made without one")


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendOptions:
    """What a backend is made from."""

    #: Most jobs at a time; None for the backend's own default.
    max_workers: int | None = None
    #: Whether a job that runs in this process is pickled all the same, to find what a worker would refuse.
    pickle: bool = False
    #: The app that the jobs belong to; None for a backend that is used without one.
    app: weakref.ref[Flask] | None = None
    #: What the app's config calls each setting, as ``config_key("EXECUTOR_APP")``.
    config_key: Callable[[str], str] = str
    #: Import string of the app or its factory, for workers that do not inherit it; None to find it.
    app_import: str | None = None
    #: How worker processes are started: ``fork``, ``forkserver`` or ``spawn``; None for the platform's default.
    start_method: str | None = None
    #: Jobs after which a worker process is replaced; None for never.
    max_tasks_per_child: int | None = None
    #: Called in each worker process before its first job, in an app context.
    initializers: Sequence[Callable[[], object]] = ()
    #: Seconds that a worker process which is to end may take for it.
    exit_grace: float = 5.0
    #: The executor's name.
    executor_name: str = ""
    #: Starts a job without contexts, for backends that run jobs only.
    start: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], concurrent.futures.Future[Any]] = _unbound
    #: Where the engine is; None for its own default.
    url: str | None = None
    #: The name of the queue there.
    queue: str = "default"
    #: Seconds that a process which ends gives its jobs.
    shutdown_timeout: float = 30.0
    #: Marks a job that no worker has begun as failed, given its id, the error and its name: the engine has given it up.
    refuse: Callable[[str, Exception, str], object] = lambda *_: None


#: One call on its way through a backend.
PreparedCall = Call


class Backend(concurrent.futures.Executor):
    """What runs jobs: a :class:`concurrent.futures.Executor` that also takes prepared calls.

    Its constructor takes one :class:`BackendOptions`, starts no thread and no process (that waits for the
    first call, so that forking after an import is safe), and raises nothing for a valid configuration.
    """

    def __init__(self, options: BackendOptions) -> None:
        super().__init__()

    #: Whether jobs run in another process, so that functions, arguments and results must be picklable.
    remote: bool = False
    #: Whether ``map`` gains by putting several calls into one job (which is sent as it is, contexts and all).
    chunks: bool = False
    #: Whether a running job can be ended for certain, whatever it does.
    supports_kill: bool = False
    #: Whether jobs of a higher priority start first.
    supports_priority: bool = True
    #: For an engine: whether it can start a job later. Others need not, as jobs then wait in this process.
    supports_delay: bool = True
    #: What the engine is called whose workers run jobs without this process. They write down what becomes of them, in a
    #: store that all share, and a handle finds it there. Calls are packed when they come. None for a backend whose jobs
    #: are this process's.
    engine: str | None = None

    @abc.abstractmethod
    def enqueue(self, call: PreparedCall) -> None:
        """Accept a call, which is then run once or its future cancelled.

        Calls of higher priority go first, those alike in the order in which they came.

        :raises ExecutorShutdown: after :meth:`shutdown`; the call was not accepted.
        :raises NotPicklable: for a call that cannot be sent to where the workers are; it was not accepted.
        """

    def pack(self, call: PreparedCall) -> None:
        """A call will perhaps be enqueued later: what is to be sent of it must be as it is now.

        Whoever sends calls can put it into ``call.packed``, and use that in :meth:`enqueue`.

        :raises NotPicklable: for a call that cannot be sent.
        """

    def withdraw(self, call: PreparedCall) -> bool:
        """Give up a call that has not started, so that it can be cancelled; False when it has started.

        A backend that asks the future just before it runs a call need not do anything.
        """
        return True

    def request_stop(self, call: PreparedCall, attempt: int, reason: JobStatus) -> None:
        """Tell this attempt of a running call that it has to leave, as its job says: STOPPED or TIMED_OUT."""
        call.wake()

    def kill(self, call: PreparedCall, attempt: int) -> None:
        """End this attempt of a running call by force, and nothing else; without ``supports_kill`` if that goes."""
        call.interrupt(attempt)

    def deliver(self, call: PreparedCall, message: JobMessage) -> None:
        """Send a message to a call that has not ended.

        :raises NotPicklable: for one that cannot be sent to where the call runs.
        """
        call.deliver(message)

    def run_user_code(self, fn: Callable[[], object]) -> None:
        """Run code of the user's that must not hold up the backend: callbacks and receivers of signals.

        In the order of the calls. Here and now, unless the calling thread is one that everything depends on.
        """
        fn()

    @property
    def has_pending_user_code(self) -> bool:
        """Whether something that was passed to :meth:`aside` has not run yet."""
        return False

    @classmethod
    def default_store(cls, options: BackendOptions) -> str | None:
        """``EXECUTOR_STORE`` for the jobs of an engine where none was chosen; None where the app has to choose one.

        :raises ConfigError: when the app does not even say where the engine is.
        """
        return options.url

    def work(self, stop: Callable[[str], object], *, processes: int, burst: bool) -> None:
        """Be a worker of the engine, in the main thread, until a signal says to end.

        Calls that were sent are run with :func:`flask_executor.backends.engine.run`.

        :param stop: stops a job, given its id, for engines that can be told to.
        :param processes: how many workers, at one job each.
        :param burst: whether to end when the queue is empty.
        """
        raise NotImplementedError

    def remove_queued(self, job: Job) -> None:
        """A job was cancelled that the engine has: take it off the queue, if it can. Whoever gets it drops it anyway.

        :raises EngineUnavailable: when the engine cannot be reached.
        """

    @property
    def waiting(self) -> int:
        """How many calls wait in the queue of the engine, of whichever process.

        :raises Unsupported: for an engine that does not tell.
        :raises EngineUnavailable: when it cannot be reached.
        """
        raise Unsupported(f"{type(self).__name__} cannot tell how many jobs wait, so that their number has no limit")

    def worker_states(self) -> Sequence[WorkerState]:
        """The worker processes that are alive; none where jobs run in threads of this one."""
        return ()

    def terminate(self, grace: float) -> None:
        """The process ends: end workers by force that have not ended by themselves after ``grace`` seconds."""

    @property
    @abc.abstractmethod
    def workers(self) -> int:
        """How many workers are alive."""

    @property
    @abc.abstractmethod
    def capacity(self) -> int | None:
        """How many jobs can run at a time; None where none ever waits."""


class JobRecords(abc.ABC):
    """The records of an app's jobs, to be read; ``executor.jobs``.

    A record leaves a while after its job has ended (``EXECUTOR_RESULT_TTL``), or before when there are many
    (``EXECUTOR_STORE_MAX_RECORDS``; those that ended first leave first). That of a job that has not ended stays.
    With a shared store each of these may raise :exc:`~flask_executor.StoreUnavailable`.
    """

    @abc.abstractmethod
    def get(self, id: str) -> Job | None:
        """The job with this id; None when there is none (any more)."""

    @abc.abstractmethod
    def find(self, key: Hashable) -> Job | None:
        """The youngest job under this key; None when there is none (any more)."""

    @abc.abstractmethod
    def expired(self, id: str | None = None, *, key: Hashable | None = None) -> bool:
        """Whether there was a job with this id, or under this key, whose record has left.

        That is remembered for a while: as long again as a record is kept, at least an hour.
        """

    @abc.abstractmethod
    def log(self, id: str) -> Sequence[LogLine]:
        """The last lines that the job has written to the log, oldest first; none when there is no such job."""

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
        """What :meth:`list` returns, given what makes sense."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOptions:
    """What a shared store is made from."""

    #: Where it is: ``sqlite:////var/lib/shop/jobs.sqlite``, ``redis://localhost:6379/0``.
    url: str
    #: Whose records these are; others may be in the same place.
    space: str
    #: Seconds that a record is kept after its job has ended.
    result_ttl: float
    #: Most records of ended jobs.
    max_records: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is new about a job, to be written down."""

    job: Job
    #: The process that has the job, see :mod:`flask_executor.stores.leases`.
    holder: str
    #: What came of it, packed; None when nothing has yet.
    outcome: bytes | None = None
    #: Lines of its log that were not written yet.
    log: Sequence[LogLine] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRequest:
    """Somebody wants a job to be stopped that another process has."""

    id: str
    #: Seconds until force is used; None for the default.
    grace: float | None = None
    #: Whether it is to be cancelled if it has not started, and let alone otherwise.
    only_queued: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMessage:
    """A message that somebody has left for a job that another process has."""

    #: The id of the job.
    id: str
    #: Which of the messages of this job it is, as the store has it.
    number: str
    #: What was sent.
    data: bytes


#: Most messages that wait for one job in a store.
MOST_MESSAGES = 1000


class JobStore(JobRecords):
    """Records that all processes of an app see. Safe to call from any thread; may wait, a few seconds at most.

    A process that has jobs is a *holder*, and has a lease that it renews. Whoever reads the record of a job that has
    not ended, and finds that its holder is dead, writes down that the job is ``lost``. What a holder writes about its
    own job is true, also after that.

    A message to a job waits here for the holder, also for one who takes the job over later. If nobody ever receives it,
    it leaves with the record.

    A key belongs to one job at a time: from :meth:`claim` until :meth:`release`, or until its record leaves.

    Its constructor takes one :class:`StoreOptions`, opens nothing, and raises :exc:`ValueError` for a url that it
    cannot use. Everything else may raise :exc:`~flask_executor.StoreUnavailable`; whether it has had an effect is not
    known then, and to do it again does no harm.
    """

    #: Where it is, for messages: no passwords.
    where: str

    @abc.abstractmethod
    def __init__(self, options: StoreOptions) -> None:
        pass

    @abc.abstractmethod
    def claim(self, entry: Entry, *, again: bool = False) -> Job | None:
        """Take the key of a new job, write its record, and give its holder a lease, all or nothing.

        However many ask at once, one gets the key.

        :param again: whether to take the key from a job that has ended other than by success.
        :return: None; the job that has the key, when it is taken.
        """

    @abc.abstractmethod
    def write(self, entries: Sequence[Entry]) -> None:
        """Write down what is new. A record that has left comes back. A job that has no key here takes its key, if it
        has not ended and nobody else has the key."""

    @abc.abstractmethod
    def transfer(self, entry: Entry, former: str | None, *, lost: bool = False, new: bool = True) -> Job | None:
        """Take a job over from the holder who has it, and write this of it, all or nothing; of many one gets it.

        Done again by the same holder it is a success, which changes nothing: the first answer may have been lost.

        :param former: who has it; None to write it only if there is no record.
        :param lost: whether to take it also when it is lost, whoever had it, unless another job has its key by now.
        :param new: whether to write what is not there too: the record has left, or was not written yet.
        :return: None; its record, when it has ended, or somebody else has it.
        """

    @abc.abstractmethod
    def holder(self, id: str) -> str | None:
        """Who has a job that has not ended."""

    @abc.abstractmethod
    def holding_key(self, key: Hashable) -> Job | None:
        """The job that has this key."""

    @abc.abstractmethod
    def release(self, key: Hashable, id: str) -> bool:
        """Free a key, if this job has it, and tell whether it had. The record stays, and does not take it again."""

    @abc.abstractmethod
    def keys(self, within: tuple[Hashable, ...] = ()) -> Sequence[Hashable]:
        """The keys that are taken, oldest first.

        :param within: only those that are longer tuples which begin with this.
        """

    @abc.abstractmethod
    def outcome(self, id: str) -> bytes | None:
        """What came of a job; None when there is nothing."""

    @abc.abstractmethod
    def remove(self, id: str) -> None:
        """Forget a job, as if it had never been."""

    @abc.abstractmethod
    def purge(self, ended_before: float) -> int:
        """Have records leave whose jobs have ended before then (seconds since the epoch); how many did."""

    @abc.abstractmethod
    def find_lost(self) -> None:
        """Find the jobs that are lost, and write it down. Quick while there are none."""

    @abc.abstractmethod
    def sweep(self) -> None:
        """As :meth:`find_lost`, and have the records leave whose time has come."""

    @abc.abstractmethod
    def ask_to_stop(self, request: StopRequest) -> None:
        """Leave a request for the holder of a job, whoever that is when he takes it."""

    @abc.abstractmethod
    def send(self, id: str, data: bytes) -> bool:
        """Leave a message for the holder of a job; False when there is no such job (any more), or it has ended.

        Done again, it is another message.

        :raises QueueFull: when :data:`MOST_MESSAGES` wait for this job.
        """

    @abc.abstractmethod
    def take_requests(self, holder: str) -> Sequence[StopRequest | StoredMessage]:
        """What others want of the jobs of this holder that have not ended. Quick while there is nothing.

        A request to stop is given once. A message is given until it was :meth:`received`; those of a job in the order
        in which they were sent, some at a time.
        """

    @abc.abstractmethod
    def acknowledge(self, holder: str, messages: Sequence[StoredMessage]) -> None:
        """Jobs of this holder have these messages, which are to leave the store."""

    @abc.abstractmethod
    def renew(self, holder: str) -> bool:
        """Renew a lease; False when it had run out, and others may have taken this holder for dead."""

    @abc.abstractmethod
    def drop_lease(self, holder: str) -> None:
        """This holder has no jobs any more."""

    @abc.abstractmethod
    def watch(self) -> Watch:
        """Something to wait with until others have written."""

    @abc.abstractmethod
    def check(self, *, thoroughly: bool = False) -> None:
        """Raise what is wrong with the store, if anything is.

        :param thoroughly: whether to look through all of it; otherwise only whether it can be read and written.
        :raises StoreUnavailable: saying it.
        """

    @property
    @abc.abstractmethod
    def is_private(self) -> bool:
        """Whether nobody but the user that this process runs as can write to it."""

    @abc.abstractmethod
    def after_fork(self) -> None:
        """In the child of a fork: leave to the parent what is the parent's, and open anew what is needed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close what is open. What is called after that opens it again."""


class Watch(abc.ABC):
    """Waits for what others write; for one thread, but for :meth:`wake`."""

    @abc.abstractmethod
    def begin(self, ids: Collection[str]) -> None:
        """Watch these jobs from now on: what is read after this and changes later ends the next :meth:`wait`."""

    @abc.abstractmethod
    def wait(self, timeout: float) -> Collection[str] | None:
        """Wait until one of the jobs may have changed, or :meth:`wake` is called; at most so many seconds.

        :return: the ids of jobs that may have ended, others among them; None for all.
        """

    @abc.abstractmethod
    def wake(self) -> None:
        """End the wait now, or the next one. Never raises."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close what is open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerState:
    """What a worker of this process does."""

    #: Of the process that it is, or is in.
    pid: int
    #: Whether it runs a job.
    busy: bool
    #: The id of that; None where several run.
    job: str | None = None
    #: Whether it is ready for a job.
    ready: bool = True
    #: The name of the service that lives in it; None for one that runs jobs.
    service: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """How an executor is doing, in this process."""

    #: Workers alive; they start when they are needed.
    workers: int
    #: Jobs that run now.
    busy: int
    #: Jobs that wait to start.
    waiting: int
    #: Seconds that the oldest of those has waited; 0.0 with none.
    oldest_wait: float
    #: Whether the store answers; that of one process always does.
    store_reachable: bool
    #: Whether jobs are accepted: not shut down.
    accepting: bool
    #: The services of the app, whichever process looks after them.
    services: tuple[ServiceStatus, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceStatus:
    """How a service is doing."""

    name: str
    #: Ids of its worker processes; none where it does not run.
    pids: tuple[int, ...] = ()
    #: How many workers it is to have, are ready, and handle a message now.
    workers: int = 0
    ready: int = 0
    busy: int = 0
    #: Messages that wait.
    waiting: int = 0
    #: Workers that died, or could not start.
    failures: int = 0
    #: What the last one said, or died of.
    last_error: str | None = None
    #: The id of the process that looks after it.
    supervisor: int | None = None
