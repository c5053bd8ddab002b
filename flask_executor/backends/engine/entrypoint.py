"""What workers of RQ, Celery and Dask call to run a job that an app has sent.

.. code-block:: text

    worker of the engine         adapter (rq, celery, dask)         this module           consumer of the executor
      takes a message ──────────> run(address, id, data) ─────────> run() ──────────────> Consumer.run(id, data)
                                    in RQ's or Celery's main          finds the app and     runs the job in a worker
                                    thread, a thread of Dask's        its executor: the     process, writes down its
                                                                      worker's own app,     outcome
      ends the message     <─────── returns                  <─────── None           <───── or
      runs it again later  <─────── raises what the engine   <─────── seconds        <───── gives the job back
                                    has for that

An :data:`Address` travels with each call, so that a worker that has not loaded the app can import it. Executors add
their consumers with :func:`register`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from flask import Flask

from flask_executor.abc import BackendOptions
from flask_executor.exceptions import ConfigError
from flask_executor.helpers.app_import import find_import_string, import_app
from flask_executor.helpers.fork_hooks import after_fork_in_child
from flask_executor.helpers.log import logger
from flask_executor.jobs.contexts import current_app_or_none
from flask_executor.jobs.model import JobStatus

if TYPE_CHECKING:
    from flask_executor.executor.consumer import Consumer

_OTHER_WORKER_DELAY = 2.0  # seconds until the engine offers a job again that this worker cannot run
_CONSUMERS = "flask_executor_consumers"  # in app.extensions: the consumers, by the names of their executors

#: Import string of an app or None, the app's name, the name of the executor there.
Address = tuple[str | None, str, str]

#: Set when this process was told to end: its consumers begin no more jobs.
shutting_down = threading.Event()

#: The app of this process, if it is a worker of one; see :meth:`flask_executor.abc.Backend.work`.
worker_app: Flask | None = None


def address_of(options: BackendOptions) -> Address:
    """The address of the executor that a backend with these options belongs to."""
    app = None if options.app is None else options.app()
    if app is None:
        raise RuntimeError("workers of other systems run jobs of an app, and this backend was made without one")
    return options.app_import or find_import_string(app), app.name, options.executor_name


def run(address: Address, id: str, data: bytes) -> float | None:
    """Run a call that an app has sent, and return when its outcome is in the store.

    Called in the thread that the engine's worker runs its tasks in, which it blocks.

    :param address: where the app is; a worker that has loaded the app compares the names only.
    :param id: of the job.
    :param data: the call, packed and signed.
    :return: None, or seconds until the engine is to run the call again.
    :raises ConfigError: if this worker cannot find the app or the executor; see :func:`requeue_elsewhere`.
    :raises UntrustedResult: if the call was not signed with the app's secret key, or packed by another version.
    :raises NotPicklable: if the call cannot be rebuilt in this worker.
    """
    return _consumer(address).run(id, data)


def requeue_elsewhere(id: str, error: ConfigError) -> float:
    """This worker cannot run a job, but another one may: seconds until the engine is to offer it again."""
    logger.warning("Job %s goes back into the queue, as it is not for this worker. %s", id, error)
    return _OTHER_WORKER_DELAY


def is_lost(address: Address, id: str) -> bool:
    """Return whether the store knows that a job had begun and that the process which ran it is dead.

    :raises StoreUnavailable: if the store does not answer.
    """
    try:
        job = _consumer(address).tracker.records.get(id)
    except ConfigError:  # the job is for another worker
        return False
    return job is not None and job.status is JobStatus.LOST


def refuse(address: Address, id: str, error: Exception, name: str) -> None:
    """The engine has given up a job: it fails with ``error``, unless a worker has begun it.

    :param name: the job's name, for a job that has no record yet.
    :raises StoreUnavailable: if the failure cannot be written to the store.
    """
    _consumer(address).handover.refuse(id, error, name)


def register(app: Flask, name: str, consumer: Consumer) -> None:
    """Have ``consumer`` run the calls that are sent to the executor ``name`` of ``app``."""
    app.extensions.setdefault(_CONSUMERS, {})[name] = consumer


def _consumer(address: Address) -> Consumer:
    import_string, app_name, name = address
    for app in (worker_app, current_app_or_none()):
        if app is not None and app.name == app_name and (consumer := _registered(app, name)) is not None:
            return consumer
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
    consumer = _registered(app, name)
    if consumer is None:
        raise ConfigError("EXECUTOR_APP", import_string, f"an app that has an executor {name!r} for an engine")
    return consumer


def _registered(app: Flask, name: str) -> Consumer | None:
    consumers: dict[str, Consumer] = app.extensions.get(_CONSUMERS, {})
    return consumers.get(name)


_apps: dict[str, Flask] = {}  # by their import strings; while a job runs, nothing else may refer to its app
_import_lock = threading.Lock()  # the threads of a worker of Dask may all come with their first jobs


def _imported(import_string: str) -> Flask:
    """Import an app, once in this process."""
    with _import_lock:
        if import_string not in _apps:
            _apps[import_string] = import_app(import_string, "EXECUTOR_APP")
        return _apps[import_string]


def _reset_lock() -> None:
    """In the child of a fork: another thread of the parent may have held the lock."""
    global _import_lock
    _import_lock = threading.Lock()


after_fork_in_child(_reset_lock)
