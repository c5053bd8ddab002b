"""The names of Flask-Multiprocess-Controller, for code that was written for it; extra ``restful``.

.. code-block:: python

    class SampleTask(MetaMPTask):                      # at the top of a module
        def execute(self, *args, **kwargs):
            self.upload_status("some_msg")
            self.checkpoint()

    SampleController = TemplateFactory.MPController(name="Sample")
    controller = SampleController(target_task=SampleTask, max_num_process=2)
    api.add_resource(TemplateFactory.MPResource(), "/sample", resource_class_args=(controller,))

Each controller has an :class:`~flask_executor.Executor` of type ``process``. Its name is the controller's, which is
also the prefix of its configuration: ``SAMPLE_EXECUTOR_STORE``.
"""

from __future__ import annotations

import abc
import functools
import inspect
import itertools
import json
import logging
import re
import sys
import threading
import urllib.request
import uuid
import weakref
from collections.abc import Callable
from typing import Any, ClassVar
from urllib.parse import urlsplit

from flask import Flask, Request, current_app, request
from werkzeug.exceptions import MethodNotAllowed

from flask_executor.abc import Health
from flask_executor.exceptions import ExecutorError, JobExit, MissingExtra, QueueFull, StoreUnavailable
from flask_executor.executor.extension import Executor
from flask_executor.jobs.current import checkpoint, current_job
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.signals import job_finished, job_started
from flask_executor.web.pages import jobs_of
from flask_executor.web.problems import abort_with_problem

try:
    from flask_restful import Resource
except ImportError as error:
    raise MissingExtra("flask_restful", "restful") from error

__all__ = [
    "AbortException",
    "MetaMPController",
    "MetaMPLoggerConfigurator",
    "MetaMPResource",
    "MetaMPTask",
    "TemplateFactory",
]

Method = Callable[..., Any]

#: What :meth:`MetaMPTask.checkpoint` raises, under its name in that package.
AbortException = JobExit

_METHODS = ("get", "head", "post", "put", "patch", "delete", "options", "trace")
_CALLBACK_TIMEOUT = 10.0  # seconds for each step of a callback: to connect, to be answered
_CALLBACK_RETRIES = 2  # of the callback that reports the end of a task
_CALLBACK_SHUTDOWN_TIMEOUT = 60  # seconds; more than the tasks have that the callbacks report


class MetaMPTask(abc.ABC):
    """A task: a subclass at the top of a module, whose :meth:`execute` does the work.

    The worker process makes an object of it, without arguments.

    :param task_name: class keyword: the name of its jobs; the name of the class by default.
    :param logger: class keyword: ``self.logger``; by default the logger with the name of the class.
    """

    task_name: ClassVar[str]
    logger: ClassVar[logging.Logger]
    #: The number of this task in its controller, from 1.
    counter: int = 0

    def __init_subclass__(cls, task_name: str | None = None, logger: logging.Logger | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.task_name = task_name or cls.__name__
        cls.logger = logger or logging.getLogger(cls.__name__)

    @abc.abstractmethod
    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Do the work, with the arguments of the request. What it returns or raises is kept."""

    def upload_status(self, msg: object) -> None:
        """Report how far the task is. Only the last report counts."""
        current_job.update(message=str(msg))

    def checkpoint(self) -> None:
        """Leave the task if it was asked to stop.

        :raises JobExit: to leave; it is a :exc:`BaseException`.
        """
        checkpoint()

    set_checkpoint = checkpoint


class MetaMPLoggerConfigurator(abc.ABC):
    """Sets up logging once, when the first controller is made with it. Records of tasks come there too."""

    @staticmethod
    @abc.abstractmethod
    def listener_log_setup() -> Any:
        """Set up levels and handlers, in the web worker."""


def _log_calls(method: Method) -> Method:
    """The decorator of a controller's methods that logs each call; used if the controller names no other."""

    @functools.wraps(method)
    def logging_method(self: MetaMPController, /, *args: Any, **kwargs: Any) -> Any:
        answer = method(self, *args, **kwargs)
        self._logger.info("%s of %s: called with %.1000s, answers %.1000s", method.__name__, self._name, kwargs, answer)
        return answer

    return logging_method


class MetaMPController:
    """Starts, shows and stops tasks: one method for each HTTP method, called with the arguments of the request.

    Subclasses override them as needed. A controller needs an app context, as every request has.

    :param target_task: the task that :meth:`post` starts.
    :param callback_url: an ``http`` or ``https`` url that is sent JSON by POST when a task begins and ends.
    :param max_num_process: how many tasks run at a time, in each process of the server.
    :param max_num_queue: how many tasks may wait; 0 or less for no bound.
    :param logger_configurator_cls: sets up logging; None leaves it to the app.
    :param controller_name: class keyword: the name; by default the name of the class.
    :param logger: class keyword: logs each call; by default the logger with the name of the class.
    :param decorator: class keyword: decorates all methods, also of subclasses, instead of the decorator that logs.
    :raises TypeError: if ``target_task`` is not a task that worker processes can import.
    :raises ValueError: if ``callback_url`` or ``max_num_process`` is not valid.
    """

    _name: ClassVar[str] = "Basic"
    _logger: ClassVar[logging.Logger] = logging.getLogger(__name__)
    _decorator: ClassVar[Callable[[Method], Method]] = _log_calls
    _decorated: ClassVar[frozenset[Method]] = frozenset()
    _allowed: ClassVar[frozenset[str]] = frozenset({"GET", "POST", "DELETE"})

    def __init_subclass__(
        cls,
        controller_name: str | None = None,
        logger: logging.Logger | None = None,
        decorator: Callable[[Method], Method] | None = None,
        **more: Any,
    ) -> None:
        super().__init_subclass__(**more)
        cls._name = controller_name or cls.__name__
        cls._logger = logger or logging.getLogger(cls.__name__)
        if decorator is not None:
            cls._decorator = decorator
        for name in _METHODS:
            method = getattr(cls, name)
            is_new = method not in cls._decorated  # by a parent class
            if is_new and method is not MetaMPController.head:
                cls._allowed |= {name.upper()}
            if is_new or decorator is not None:
                setattr(cls, name, cls._decorator(method))
        cls._decorated = frozenset(getattr(cls, name) for name in _METHODS)

    def __init__(
        self,
        target_task: type[MetaMPTask],
        callback_url: str | None = None,
        max_num_process: int = 1,
        max_num_queue: int = -1,
        logger_configurator_cls: type[MetaMPLoggerConfigurator] | None = None,
    ) -> None:
        _check_task(target_task)
        if max_num_process < 1:
            raise ValueError(f"max_num_process is {max_num_process}; it must be 1 or more")
        self._task = target_task
        self._callback_url = callback_url or ""
        self._max_num_process = max_num_process
        self._max_num_queue = max_num_queue
        self._numbers = itertools.count(1)
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        self._prefix = re.sub(r"\W", "_", self._name, flags=re.ASCII)
        name = _name_for(self._prefix, _place_of(self, target_task))
        self._executor = Executor(name=name)
        self._callbacks = Executor(name=f"{name}_callback")
        if callback_url:
            _check_url(callback_url)
            job_started.connect(self._tell_begin, self._executor)
            job_finished.connect(self._tell_end, self._executor)
        if logger_configurator_cls is not None:
            _set_up_logging(logger_configurator_cls)

    @property
    def executor(self) -> Executor:
        """The executor of the tasks. The uuid of a task is its key: ``controller.executor.futures.result(uuid)``."""
        app = current_app._get_current_object()  # type: ignore[attr-defined]
        if app not in self._apps:
            with _binding:
                if app not in self._apps:
                    self._bind(app)
                    self._apps.add(app)
        return self._executor

    def health(self) -> Health:
        """The health of the executor in this process: how many tasks run and how many wait."""
        return self.executor.health()

    # ---- the HTTP methods ----

    def get(self, /, *args: Any, **kwargs: Any) -> Any:
        """The status of a task.

        :param uuid: which task; :meth:`post` has answered with it.
        """
        if kwargs.get("uuid") is None:
            return {"msg": f"Invalid request: {kwargs}"}
        job = self.executor.jobs.find(str(kwargs["uuid"]))
        if job is None or job.status.ended:
            return self._nothing_runs(str(kwargs["uuid"]), job)
        verb = "waiting" if job.status is JobStatus.QUEUED else "running"
        return {"msg": f"Process is {verb} with uuid {job.key}.", **_describe(job, self.executor)}

    def post(self, /, *args: Any, **kwargs: Any) -> Any:
        """Start a task; all keyword arguments are passed to its :meth:`~MetaMPTask.execute`.

        :param priority: a whole number; lower ones start first. 0 by default.
        :raises QueueFull: if ``max_num_queue`` tasks wait already.
        """
        priority = kwargs.get("priority", 0)
        if not isinstance(priority, int):
            abort_with_problem(400, "The priority must be a whole number.")
        number, key = next(self._numbers), str(uuid.uuid4())
        options = self.executor.options(name=self._task.task_name, key=key, priority=-priority)
        options.submit(_execute, self._task, number, kwargs)
        return {
            "msg": f"Internal UUID {key} for {self._name} task put in the queue.",
            "uuid": key,
            "requestParams": str(kwargs),
            "taskCounter": str(number),
        }

    def delete(self, /, *args: Any, **kwargs: Any) -> Any:
        """Stop a task: at its next checkpoint, or by force after ``EXECUTOR_STOP_GRACE`` seconds.

        :param uuid: which task; :meth:`post` has answered with it.
        """
        if kwargs.get("uuid") is None:
            return {"msg": f"Invalid request: {kwargs}"}
        key = str(kwargs["uuid"])
        if self.executor.futures.stop(key):
            return {"msg": f"Stop signal sent to this uuid {key}."}
        return self._nothing_runs(key, self.executor.jobs.find(key))

    def head(self, /, *args: Any, **kwargs: Any) -> Any:
        """Answer with 405, as ``options``, ``put``, ``patch`` and ``trace`` do."""
        raise MethodNotAllowed(sorted(self._allowed))

    options = put = patch = trace = head

    # ---- the work ----

    def _bind(self, app: Flask) -> None:
        bound = self._max_num_queue if self._max_num_queue > 0 else None
        fixed = {"TYPE": "process", "MAX_WORKERS": self._max_num_process, "MAX_PENDING": bound}
        # A new process for each task; the handles stay for as long as the records.
        defaults = {"MAX_TASKS_PER_CHILD": 1, "FUTURES_MAX_LENGTH": 10_000, **_config_of(self._prefix, app)}
        _configure(self._executor, app, fixed, defaults)
        if self._callback_url:
            # One thread, so that the end of a task is reported after its beginning.
            fixed = {"TYPE": "thread", "MAX_WORKERS": 1}
            defaults = {"MAX_PENDING": 1000, "SHUTDOWN_TIMEOUT": _CALLBACK_SHUTDOWN_TIMEOUT}
            _configure(self._callbacks, app, fixed, {**defaults, **_config_of(f"{self._prefix}_callback", app)})

    def _nothing_runs(self, key: str, job: Job | None) -> dict[str, Any]:
        """The answer about a task that has ended, or is not known."""
        nothing = f"No process linked to this uuid {key}"
        if job is None and self.executor.jobs.expired(key=key):
            return {"msg": f"{nothing} any more.", "uuid": key, "status": "expired"}
        if job is None:
            return {"msg": f"{nothing}.", "uuid": key, "status": "unknown"}
        ended = {"msg": f"{nothing} any more: its task has ended.", **_describe(job, self.executor)}
        if job.status is JobStatus.SUCCEEDED:
            try:
                result = self.executor.futures.result(key, 10)
                json.dumps(result, allow_nan=False)
            except (TypeError, ValueError, RecursionError, ExecutorError):  # the result is not kept, or cannot be JSON
                return ended
            ended["result"] = result
        return ended

    def _tell_begin(self, executor: Executor, job: Job) -> None:
        # No retries: a late report of the beginning could come after the one of the end.
        self._tell(f"Task with internal uuid {job.key} begin to process", job, retries=0)

    def _tell_end(self, executor: Executor, job: Job) -> None:
        self._tell(f"Task with internal uuid {job.key} ended", job, retries=_CALLBACK_RETRIES)

    def _tell(self, msg: str, job: Job, *, retries: int) -> None:
        document = {"msg": msg, **_describe(job, self._executor)}
        options = self._callbacks.options(name=f"{self._name} callback", retries=retries, backoff=1.0)
        options.submit(_post, self._callback_url, document)


class MetaMPResource(Resource):  # type: ignore[misc]  # Flask-RESTful has no types
    """Calls the methods of a controller: ``api.add_resource(resource, "/sample", resource_class_args=(controller,))``.

    Their arguments are the JSON object in the body of the request.
    """

    def __init__(self, controller: MetaMPController) -> None:
        super().__init__()
        self._controller = controller

    def get(self) -> Any:
        """The status of a task."""
        return self._call("get")

    def post(self) -> Any:
        """Start a task."""
        return self._call("post")

    def delete(self) -> Any:
        """Stop a task."""
        return self._call("delete")

    def head(self) -> Any:
        """Call the controller."""
        return self._call("head")

    def options(self) -> Any:
        """Call the controller."""
        return self._call("options")

    def put(self) -> Any:
        """Call the controller."""
        return self._call("put")

    def patch(self) -> Any:
        """Call the controller."""
        return self._call("patch")

    def trace(self) -> Any:
        """Call the controller."""
        return self._call("trace")

    def _call(self, name: str) -> Any:
        arguments = self._get_request_dict(request)
        try:
            return getattr(self._controller, name)(**arguments)
        except QueueFull:
            abort_with_problem(503, "As many tasks wait as are allowed. Try again later.", headers={"Retry-After": "2"})
        except StoreUnavailable:
            abort_with_problem(503, "The tasks cannot be reached now. Try again.", headers={"Retry-After": "2"})

    @staticmethod
    def _get_request_dict(request: Request) -> dict[str, Any]:
        try:
            arguments = json.loads(request.data or b"{}")
        except (ValueError, RecursionError):
            abort_with_problem(400, "The body cannot be read as JSON.")
        if not isinstance(arguments, dict):
            abort_with_problem(400, "The body must be a JSON object, with the arguments by name.")
        return arguments


class TemplateFactory:
    """Makes subclasses of :class:`MetaMPController` and :class:`MetaMPResource` that override nothing."""

    @staticmethod
    def MPController(name: str | None = None) -> type[MetaMPController]:  # noqa: N802  # its name in that package
        """A subclass of :class:`MetaMPController`.

        :param name: the controller's name, and the prefix of its configuration; without one the name is random.
        """
        return type(name or f"Controller_{uuid.uuid4().hex}", (MetaMPController,), {})

    @staticmethod
    def MPResource(name: str | None = None) -> type[MetaMPResource]:  # noqa: N802
        """A subclass of :class:`MetaMPResource`.

        :param name: has to be given if an Api has several resources: it refuses two of the same name.
        """
        return type(name or f"Resource_{uuid.uuid4().hex}", (MetaMPResource,), {})


_binding = threading.Lock()
_configured: set[type] = set()
_Place = tuple[str, int, int, str]  # a file, a line and an instruction there, and the task
_places: dict[str, list[_Place]] = {}  # where controllers of the same name are made


def _place_of(controller: MetaMPController, task: type[MetaMPTask]) -> _Place:
    """Where a controller is made, and for what: an app factory that is called again makes the same ones again."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_locals.get("self") is controller:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_lasti, f"{task.__module__}.{task.__qualname__}"


def _name_for(name: str, place: _Place) -> str:
    """The executor's name: the controller's, with a number if several have that name; the same in all processes."""
    with _binding:
        places = _places.setdefault(name, [])
        if place not in places:
            places.append(place)
        number = places.index(place) + 1
    return name if number == 1 else f"{name}_{number}"


def _config_of(name: str, app: Flask) -> dict[str, Any]:
    """The app's configuration for the controllers of that name; keys without prefix."""
    prefix = f"{name.upper()}_EXECUTOR_"
    return {key.removeprefix(prefix): value for key, value in app.config.items() if key.startswith(prefix)}


def _configure(executor: Executor, app: Flask, fixed: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Bind an app, which may have answered requests already.

    :param fixed: configuration that the controller's arguments decide; keys without prefix.
    :param defaults: configuration that the app may change.
    """
    prefix = f"{executor.name.upper()}_EXECUTOR_"
    app.config.update({prefix + key: value for key, value in fixed.items()})
    for key, value in defaults.items():
        app.config.setdefault(prefix + key, value)
    executor.init_app(app)


def _set_up_logging(configurator: type[MetaMPLoggerConfigurator]) -> None:
    with _binding:
        if configurator not in _configured:
            _configured.add(configurator)
            configurator.listener_log_setup()


def _check_task(task: Any) -> None:
    if not (isinstance(task, type) and issubclass(task, MetaMPTask)):
        raise TypeError(f"target_task is {task!r}; it must be a subclass of MetaMPTask")
    if inspect.isabstract(task):
        raise TypeError(f"{task.__qualname__} has no execute()")
    if "<locals>" in task.__qualname__:
        raise TypeError(f"{task.__qualname__} must stand at the top of a module, where worker processes can import it")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError("the callback_url must be absolute, with http or https and without a password")


def _execute(task: type[MetaMPTask], number: int, arguments: dict[str, Any]) -> Any:
    """Run a task; called in a worker process."""
    made = task()
    made.counter = number
    return made.execute(**arguments)


def _describe(job: Job, executor: Executor) -> dict[str, Any]:
    """The status of a task. It has a ``progressNum`` until the task has ended: clients see the end by that."""
    document: dict[str, Any] = {"uuid": job.key, "status": job.status.value}
    if not job.status.ended:
        document["progressNum"] = job.message or "0"
    if job.error is not None and jobs_of(executor).with_errors:
        document["error"] = job.error
    return document


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Raises an error for a redirect, which urllib would follow with a GET."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _post(url: str, document: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    message = urllib.request.Request(url, json.dumps(document).encode(), headers)  # noqa: S310  # see _check_url()
    urllib.request.build_opener(_NoRedirects).open(message, timeout=_CALLBACK_TIMEOUT).close()
