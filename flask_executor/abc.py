"""The ports: what a backend, a store and a channel promise to the rest of the package.

The contract of each stands in its docstrings; ``tests/contract`` holds every adapter to it.
"""

from __future__ import annotations

import abc
import concurrent.futures
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flask_executor.jobs import Job, JobStatus, LiveJob


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendOptions:
    """What a backend is made from."""

    #: Most jobs at a time; None for the backend's own default.
    max_workers: int | None = None
    #: Whether a job that runs in this process is pickled all the same, to find what a worker would refuse.
    pickle: bool = False


class PreparedCall(Protocol):
    """One call on its way through a backend; :class:`flask_executor.runner.Call` is the one there is."""

    job: LiveJob
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Any

    @property
    def future(self) -> concurrent.futures.Future[Any]:
        """The handle of the job."""

    def run(self, *unused: object) -> None:
        """Run it here and now, in its contexts, and settle its future. Never raises."""

    def begin(self) -> bool:
        """Claim it for a worker elsewhere; False when it was cancelled."""

    def succeed(self, result: Any) -> None:
        """Settle it with a result."""

    def fail(self, error: BaseException, status: JobStatus = JobStatus.FAILED) -> None:
        """Settle it with an error."""


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

    @abc.abstractmethod
    def enqueue(self, call: PreparedCall) -> None:
        """Accept a call, which is then run once or its future cancelled; first come, first served.

        :raises ExecutorShutdown: after :meth:`shutdown`; the call was not accepted.
        :raises NotPicklable: for a call that cannot be sent to where the workers are; it was not accepted.
        """

    @property
    @abc.abstractmethod
    def workers(self) -> int:
        """How many workers are alive."""

    @property
    @abc.abstractmethod
    def capacity(self) -> int | None:
        """How many jobs can run at a time; None where none ever waits."""


class JobRecords(abc.ABC):
    """The records of an app's jobs, to be read; ``executor.jobs``."""

    @abc.abstractmethod
    def get(self, id: str) -> Job | None:
        """The job with this id; None when there is none (any more)."""

    @abc.abstractmethod
    def find(self, key: Hashable) -> Job | None:
        """The youngest job under this key; None when there is none (any more)."""

    @abc.abstractmethod
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


class JobStore(JobRecords):
    """Where the records live. Safe to call from any thread.

    What is handed in is the live job; an adapter that keeps values rather than the object takes its
    :meth:`~flask_executor.jobs.LiveJob.record`. Jobs that have ended are bounded, the oldest leave first;
    a job that has not ended is never dropped.
    """

    @abc.abstractmethod
    def add(self, job: LiveJob) -> None:
        """Take up a job that is about to be queued."""

    @abc.abstractmethod
    def update(self, job: LiveJob) -> None:
        """The job has taken a step."""

    @abc.abstractmethod
    def remove(self, id: str) -> None:
        """Forget a job, as if it had never been."""

    @abc.abstractmethod
    def after_fork(self) -> None:
        """In the child of a fork: replace what the parent's threads may have held, reopen what is not shared."""

    @abc.abstractmethod
    def reachable(self) -> bool:
        """Whether the store answers."""


class JobChannel(abc.ABC):
    """What connects a running job with those who watch over it. Safe to call from any thread; never raises."""

    @abc.abstractmethod
    def started(self, job: LiveJob) -> None:
        """A worker has taken the job; called in the job's contexts."""

    @abc.abstractmethod
    def ended(self, job: LiveJob) -> None:
        """The job has its final status; its future is not settled yet."""

    @abc.abstractmethod
    def settled(self, future: concurrent.futures.Future[Any]) -> None:
        """The future has its result and its callbacks have run: nothing more will come."""

    @abc.abstractmethod
    def unseen(self, job: LiveJob, error: BaseException) -> None:
        """The job failed and nobody has asked."""

    @abc.abstractmethod
    def in_contexts(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn``, made to run later in a copy of the contexts of whoever calls this now."""


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
    #: Whether the store answers.
    store_reachable: bool
    #: Whether jobs are accepted: not shut down.
    accepting: bool
