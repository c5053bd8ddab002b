"""What workers of other systems run: a call that an app has sent there, in that app."""

from __future__ import annotations

import functools
import threading
from typing import Protocol

from flask import Flask

from flask_executor.abc import BackendOptions, JobRecords
from flask_executor.exceptions import ConfigError
from flask_executor.helpers.app_import import find_import_string, import_app
from flask_executor.helpers.log import logger
from flask_executor.jobs.contexts import current_app_or_none
from flask_executor.jobs.model import JobStatus

_ELSEWHERE = 2.0  # seconds until a job may come back that is not for this worker
_CONSUMERS = "flask_executor_consumers"  # in app.extensions: what runs calls, by the executor's name

#: Import string of an app or None, the app's name, the name of the executor there.
Address = tuple[str | None, str, str]

#: Set when this process was told to end, and is to begin with no more jobs.
shutting_down = threading.Event()

#: The app of this process, if it is a worker of one; see :meth:`flask_executor.abc.Backend.work`.
worker_app: Flask | None = None


def address_of(options: BackendOptions) -> Address:
    """Where workers find the app, and the executor in it, of a backend that has these options."""
    app = None if options.app is None else options.app()
    if app is None:
        raise RuntimeError("workers of other systems run jobs of an app, and this backend was made without one")
    return options.app_import or find_import_string(app), app.name, options.executor_name


def run(address: Address, id: str, data: bytes) -> float | None:
    """Run a call that an app has sent, and return when what came of it is written down.

    :param address: where the app is; in a worker that has it loaded already only the names count.
    :param id: of the job.
    :param data: the call, packed and signed.
    :return: None; in how many seconds the engine is to run it again.
    :raises ConfigError: when there is no such app or executor here; see :func:`requeue_elsewhere`.
    :raises UntrustedResult: when the call was not signed with the app's secret key, or packed by another version.
    :raises NotPicklable: when it cannot be rebuilt here.
    """
    return _consumer(address).run(id, data)


def requeue_elsewhere(id: str, error: ConfigError) -> float:
    """A job is not for this worker, and perhaps for another: in how many seconds the engine is to give it to one."""
    logger.warning("Job %s goes back into the queue, as it is not for this worker. %s", id, error)
    return _ELSEWHERE


def is_lost(address: Address, id: str) -> bool:
    """Whether it is known that a job had begun, and the process is gone that had it.

    :raises StoreUnavailable: when nobody can tell.
    """
    try:
        job = _consumer(address).tracker.records.get(id)
    except ConfigError:  # it is for another worker
        return False
    return job is not None and job.status is JobStatus.LOST


def refuse(address: Address, id: str, error: Exception, name: str) -> None:
    """An engine has given up a job. It fails with ``error`` if nobody has begun with it.

    :param name: what it is called, for one that has no record yet.
    :raises StoreUnavailable: when that cannot be written down.
    """
    _consumer(address).tracker.refuse(id, error, name)


class Records(Protocol):
    """Where it is written down what comes of calls; :class:`flask_executor.sharing.SharedJobTracker`."""

    @property
    def records(self) -> JobRecords:
        """What is known of jobs."""

    def refuse(self, id: str, error: Exception, name: str = ...) -> None:
        """A job that waits in the queue of an engine cannot be run."""


class Consumes(Protocol):
    """What runs the calls that were sent to an executor; :class:`flask_executor.consumer.Consumer`."""

    @property
    def tracker(self) -> Records:
        """What the engine's jobs are recorded in."""

    def run(self, id: str, data: bytes) -> float | None:
        """Run a call."""


def register(app: Flask, name: str, consumer: Consumes) -> None:
    """Have calls that are sent to this executor of the app run by ``consumer``."""
    app.extensions.setdefault(_CONSUMERS, {})[name] = consumer


def _consumer(address: Address) -> Consumes:
    import_string, app_name, name = address
    for app in (worker_app, current_app_or_none()):
        if app is not None and app.name == app_name and name in app.extensions.get(_CONSUMERS, ()):
            return _registered(app, name)
    if import_string is None:
        raise ConfigError(
            "EXECUTOR_APP",
            None,
            f"set where jobs are submitted, to the import string of the app or its factory ('shop:create_app()'): this "
            f"worker has no app {app_name!r} loaded",
        )
    app = _imported(import_string)
    if app.name != app_name:
        raise ConfigError(
            "EXECUTOR_APP",
            import_string,
            f"where the app {app_name!r} is: here it is {app.name!r}. Give each app its own EXECUTOR_QUEUE",
        )
    if name not in app.extensions.get(_CONSUMERS, ()):
        raise ConfigError("EXECUTOR_APP", import_string, f"an app that has an executor {name!r} for an engine")
    return _registered(app, name)


def _registered(app: Flask, name: str) -> Consumes:
    consumer: Consumes = app.extensions[_CONSUMERS][name]
    return consumer


@functools.cache
def _imported(import_string: str) -> Flask:
    return import_app(import_string, "EXECUTOR_APP")
