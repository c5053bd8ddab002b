"""Everything that this package raises on its own account.

.. code-block:: text

    ExecutorError
    ├── ConfigError        (also a ValueError)
    ├── AppNotFound        (also a RuntimeError)
    ├── ExecutorShutdown   (also a RuntimeError)
    ├── KeyExists          (also a ValueError)
    ├── QueueFull
    ├── MissingExtra       (also an ImportError)
    ├── NotPicklable       (also a TypeError)
    ├── ResultTooLarge     (also a ValueError)
    ├── ResultExpired      (also a LookupError)
    ├── UntrustedResult
    ├── StoreUnavailable   (also a ConnectionError)
    ├── JobStopped         (also a concurrent.futures.CancelledError)
    ├── JobTimeout         (also a TimeoutError)
    ├── RemoteTraceback    (only as the cause of another error)
    └── WorkerLost

    BaseException
    └── JobExit            (only inside a job that has to leave)
"""

from __future__ import annotations

import concurrent.futures
import signal
from collections.abc import Hashable


class ExecutorError(Exception):
    """The base of this package's errors."""


class ConfigError(ExecutorError, ValueError):
    """A value in ``app.config`` cannot be used.

    :param key: the key in ``app.config``, with the executor's prefix.
    :param value: what was found there.
    :param allowed: what would be accepted, as the end of a sentence.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(key, value, allowed)
        self.key = key
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.key} is {self.value!r}; it must be {self.allowed}."


class AppNotFound(ExecutorError, RuntimeError):
    """It cannot be told for which app a job is meant."""


class ExecutorShutdown(ExecutorError, RuntimeError):
    """A job was submitted after :meth:`~flask_executor.Executor.shutdown`."""


class KeyExists(ExecutorError, ValueError):
    """A key is taken by another job; the new one did not run.

    :param key: the key that is taken.
    """

    def __init__(self, key: Hashable) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return (
            f"future_key {self.key!r} already exists and nothing was started. Collect the job "
            f"with executor.futures.pop({self.key!r}), choose another key, or use submit_once() "
            "to get the job that is there."
        )


class QueueFull(ExecutorError):
    """Too many jobs are waiting, so another one was refused; or too many messages for one job.

    :param key: the config key that sets the bound.
    :param limit: the bound, in waiting jobs.
    :param text: what to say instead, where no jobs wait.
    """

    def __init__(self, key: str, limit: int, text: str | None = None) -> None:
        super().__init__(key, limit, text)
        self.key = key
        self.limit = limit
        self.text = text

    def __str__(self) -> str:
        if self.text is not None:
            return self.text
        return (
            f"As many jobs wait as {self.key} allows ({self.limit}); this one was not accepted. "
            "Try again later (in a view: answer 503 with Retry-After), or raise the limit."
        )


class MissingExtra(ExecutorError, ImportError):
    """An optional dependency is not installed.

    :param package: the module that could not be imported.
    :param extra: the extra of this package that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(package, extra)
        self.package = package
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.package} is not installed: pip install flask-executor[{self.extra}]"


class NotPicklable(ExecutorError, TypeError):
    """A function, an argument or a result cannot be sent to another process."""


class ResultTooLarge(ExecutorError, ValueError):
    """A result is larger than the store takes.

    :param name: what the job is called.
    :param size: bytes of the pickled result.
    :param limit: bytes allowed.
    :param key: the config key that sets the limit.
    """

    def __init__(self, name: str, size: int, limit: int, key: str) -> None:
        super().__init__(name, size, limit, key)
        self.name = name
        self.size = size
        self.limit = limit
        self.key = key

    def __str__(self) -> str:
        return (
            f"The result of job {self.name} has {self.size} bytes and {self.key} allows {self.limit}. Write it to a "
            "file or a database and return where it is, or raise the limit."
        )


class ResultExpired(ExecutorError, LookupError):
    """The record of a job is gone from the store, and its result with it.

    :param job_id: the id of the job.
    """

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"Job {self.job_id} is not in the store any more. Records leave it EXECUTOR_RESULT_TTL seconds after the "
            "job has ended, or before, when there are more than EXECUTOR_STORE_MAX_RECORDS."
        )


class UntrustedResult(ExecutorError):
    """A result or arguments that are stored were not signed with this app's ``SECRET_KEY``, and are not unpickled."""


class StoreUnavailable(ExecutorError, ConnectionError):
    """The store cannot be read or written now. Jobs go on, and what they do is written when it is back.

    :param where: the store, without passwords.
    :param why: what is wrong, as a sentence.
    """

    def __init__(self, where: str, why: str) -> None:
        super().__init__(where, why)
        self.where = where
        self.why = why

    def __str__(self) -> str:
        return f"The job store {self.where} is not available: {self.why}"


class Unsupported(ExecutorError, NotImplementedError):
    """The backend cannot do what was asked for."""


class EngineUnavailable(ExecutorError, ConnectionError):
    """The broker or scheduler that jobs are sent to cannot be reached; the job was not accepted.

    :param what: what is there: Redis, a broker, a scheduler.
    :param url: where.
    :param key: the config key that says where.
    :param why: what is wrong.
    """

    def __init__(self, what: str, url: str, key: str, why: str) -> None:
        super().__init__(what, url, key, why)
        self.what, self.url, self.key, self.why = what, url, key, why

    def __str__(self) -> str:
        return f"{self.what} at {self.url} ({self.key}) cannot be reached: {self.why}"


class RemoteTraceback(ExecutorError):
    """The traceback that an error had in the worker process, as text; the ``__cause__`` of that error here."""


class JobStopped(ExecutorError, concurrent.futures.CancelledError):
    """The job was asked to stop, and did or was forced to: ``future.status`` tells which."""


class JobTimeout(ExecutorError, TimeoutError):
    """The job ran longer than it was allowed to.

    Not to be confused with the :exc:`TimeoutError` of ``future.result(timeout=...)``, which only stops waiting.
    """


class WorkerLost(ExecutorError):
    """The process that was to run a job is gone.

    :param what: what was lost, as a sentence.
    :param pid: the process id of the worker, None where it is not known.
    :param exit_code: how it ended: its exit code, or the number of the signal that killed it, negative.
    """

    def __init__(self, what: str, pid: int | None = None, exit_code: int | None = None) -> None:
        super().__init__(what, pid, exit_code)
        self.what = what
        self.pid = pid
        self.exit_code = exit_code
        #: What a service's worker had marked last of what it did.
        self.mark = 0

    @property
    def signal(self) -> str | None:
        """The name of the signal that killed the worker, ``"SIGKILL"``; None when it was not killed."""
        if self.exit_code is None or self.exit_code >= 0:
            return None
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:  # a real-time signal has no name
            return f"signal {-self.exit_code}"

    def __str__(self) -> str:
        if self.pid is None:
            return self.what
        if self.signal is None:
            return f"{self.what} Worker process {self.pid} ended with exit code {self.exit_code}."
        memory = " (as the system does when memory runs out)" if self.signal == "SIGKILL" else ""
        return f"{self.what} Worker process {self.pid} was killed by {self.signal}{memory}."


class JobExit(BaseException):
    """Leaves a job that was asked to stop or is out of time: what :func:`~flask_executor.checkpoint` raises.

    Not an :exc:`Exception`, so that ``except Exception`` in a job does not swallow it. Use ``finally`` to clean up.
    """
