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
    ├── RemoteTraceback    (only as the cause of another error)
    └── WorkerLost
"""

from __future__ import annotations

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
    """So many jobs are waiting that another one was refused.

    :param key: the config key that sets the bound.
    :param limit: the bound, in waiting jobs.
    """

    def __init__(self, key: str, limit: int) -> None:
        super().__init__(key, limit)
        self.key = key
        self.limit = limit

    def __str__(self) -> str:
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


class RemoteTraceback(ExecutorError):
    """The traceback that an error had in the worker process, as text; the ``__cause__`` of that error here."""


class WorkerLost(ExecutorError):
    """The process that was to run a job is gone."""
