"""What workers of RQ, Celery and Dask call to run a job that an app has sent.

.. code-block:: text

    worker of the engine         adapter (rq, celery, dask)         this module           consumer of the executor
      takes a message ──────────> run(destination, id, data) ─────> run() ──────────────> Consumer.run(id, data)
                                    in RQ's or Celery's main          finds the app and     checks the signature, runs
                                    thread, a thread of Dask's        its executor: one     the job in a worker process,
                                                                      of this process       writes down its outcome
      ends the message     <─────── returns                  <─────── None           <───── or
      runs it again later  <─────── raises what the engine   <─────── seconds        <───── gives the job back
                                    has for that

Whoever reaches the queue can write to it. So the :data:`Destination` beside a call is only compared with the names of
the apps that this process was started with; nothing in a message is imported. Executors add their consumers with
:func:`register`.
"""

from __future__ import annotations

import base64
import os
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flask import Flask

from flask_executor.abc import BackendOptions
from flask_executor.exceptions import ConfigError, UntrustedResult
from flask_executor.helpers.app_import import import_app
from flask_executor.helpers.fork_hooks import after_fork_in_child
from flask_executor.helpers.log import logger
from flask_executor.jobs.contexts import current_app_or_none
from flask_executor.jobs.model import JobStatus

if TYPE_CHECKING:
    from flask_executor.executor.consumer import Consumer

_OTHER_WORKER_DELAY = 2.0  # seconds until the engine offers a job again that this worker cannot run
_CONSUMERS = "flask_executor_consumers"  # in app.extensions: the consumers, by the names of their executors

#: The name of an app and that of its executor.
Destination = tuple[str, str]

#: Set when this process was told to end: its consumers begin no more jobs.
shutting_down = threading.Event()

#: The app of this process, if it is a worker of one; see :meth:`flask_executor.abc.Backend.work`.
worker_app: Flask | None = None

_apps: weakref.WeakValueDictionary[int, Flask] = weakref.WeakValueDictionary()  # apps of this process, by their id()


def destination_of(options: BackendOptions) -> Destination:
    """The executor that a backend with these options belongs to."""
    app = None if options.app is None else options.app()
    if app is None:
        raise RuntimeError("workers of other systems run jobs of an app, and this backend was made without one")
    return app.name, options.executor_name


def decode(destination: object, id: object, data: object) -> tuple[Destination, str, bytes]:
    """The arguments of :func:`run`, as they come from a queue of JSON, where anyone may have put anything.

    :param destination: a list of two strings.
    :param id: of the job.
    :param data: bytes in base 64.
    :raises UntrustedResult: if they are something else.
    """
    match destination, id, data:
        case [str(app_name), str(name)], str(id), str(text):
            try:
                return (app_name, name), id, base64.b64decode(text, validate=True)
            except ValueError:
                pass
    raise UntrustedResult("A message in the queue was not written by this version of Flask-Executor, and is not run.")


def run(destination: Destination, id: str, data: bytes) -> float | None:
    """Run a call that an app has sent, and return when its outcome is in the store.

    Called in the thread that the engine's worker runs its tasks in, which it blocks.

    :param destination: the app and the executor, to find out whether it is for this worker.
    :param id: of the job.
    :param data: the call, packed and signed.
    :return: None, or seconds until the engine is to run the call again.
    :raises ConfigError: if this worker has not the app or the executor; see :func:`requeue_elsewhere`.
    :raises UntrustedResult: if the call was not signed with the app's secret key, for this job and this executor.
    :raises NotPicklable: if the call cannot be rebuilt in this worker.
    """
    return _consumer(destination).run(id, data)


def requeue_elsewhere(id: str, error: ConfigError) -> float:
    """This worker cannot run a job, but another one may: seconds until the engine is to offer it again."""
    logger.warning("Job %s goes back into the queue, as it is not for this worker. %s", id, error)
    return _OTHER_WORKER_DELAY


def is_lost(destination: Destination, id: str) -> bool:
    """Return whether the store knows that a job had begun and that the process which ran it is dead.

    :raises StoreUnavailable: if the store does not answer.
    """
    try:
        job = _consumer(destination).tracker.records.get(id)
    except ConfigError:  # the job is for another worker
        return False
    return job is not None and job.status is JobStatus.LOST


def refuse(destination: Destination, id: str, data: bytes, error: Exception) -> None:
    """The engine has given up a job: it fails with ``error``, unless a worker has begun it.

    :raises StoreUnavailable: if the failure cannot be written to the store.
    """
    _consumer(destination).refuse(id, data, error)


def register(app: Flask, name: str, consumer: Consumer) -> None:
    """Have ``consumer`` run the calls that are sent to the executor ``name`` of ``app``."""
    app.extensions.setdefault(_CONSUMERS, {})[name] = consumer
    _apps[id(app)] = app


def _consumer(destination: Destination) -> Consumer:
    app_name, name = destination
    for app in _candidates():
        consumers: dict[str, Consumer] = app.extensions.get(_CONSUMERS, {})
        if app.name == app_name and name in consumers:
            return consumers[name]
    wanted = (
        f"where the app {app_name!r} is, with an executor {name!r} for this engine: a worker runs only jobs of the app "
        "that it was started with. Start one with 'flask --app ... executor worker', or with FLASK_APP set. Give each "
        "app its own EXECUTOR_QUEUE"
    )
    raise ConfigError("FLASK_APP", os.environ.get("FLASK_APP"), wanted)


def _candidates() -> Iterator[Flask]:
    """The apps that this process was started with; at last the one that ``FLASK_APP`` names."""
    here = (reference() for reference in list(_apps.valuerefs()))
    yield from (app for app in (worker_app, current_app_or_none(), *here) if app is not None)
    if worker_app is None and "FLASK_APP" in os.environ:
        yield _imported(os.environ["FLASK_APP"])


_imports: dict[str, Flask] = {}  # by their import strings; while a job runs, nothing else may refer to its app
_import_lock = threading.Lock()  # the threads of a worker of Dask may all come with their first jobs


def _imported(import_string: str) -> Flask:
    """Import an app, once in this process."""
    with _import_lock:
        if import_string not in _imports:
            _imports[import_string] = import_app(import_string, "FLASK_APP")
        return _imports[import_string]


def _reset_lock() -> None:
    """In the child of a fork: another thread of the parent may have held the lock."""
    global _import_lock
    _import_lock = threading.Lock()


after_fork_in_child(_reset_lock)
