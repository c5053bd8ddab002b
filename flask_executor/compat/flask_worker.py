"""The API of `Flask-Worker <https://pypi.org/project/flask-worker/>`_ 0.0.4; extra ``flask-worker``.

.. code-block:: python

    from flask_executor.compat.flask_worker import Manager, RouterMixin, WorkerMixin, set_route

Jobs run on ``app.task_queue``, a queue of RQ; in an app that has none, on its executor.

The row of a worker holds the status of its job. Without a ``job_id`` there is nothing to wait for; with one the job is
in progress, or finished, or, if it is neither, has failed.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urljoin, urlsplit, urlunsplit

from flask import Flask, Response, abort, current_app, jsonify, render_template, request, url_for
from itsdangerous import BadSignature, Signer
from markupsafe import Markup
from werkzeug.utils import import_string

from flask_executor.exceptions import MissingExtra, NotPicklable, UntrustedResult
from flask_executor.executor.extension import Executor
from flask_executor.helpers import signing_keys
from flask_executor.jobs.model import JobStatus

try:
    import sqlalchemy
    from sqlalchemy import PickleType
    from sqlalchemy.ext.mutable import MutableDict, MutableList
    from sqlalchemy.orm import InstanceState, Mapped, mapped_column
except ImportError as error:
    raise MissingExtra("sqlalchemy", "flask-worker") from error

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound="RouterMixin")

_RQ_STATUSES = {
    "started": JobStatus.RUNNING,
    "finished": JobStatus.SUCCEEDED,
    "failed": JobStatus.FAILED,
    "stopped": JobStatus.STOPPED,
    "canceled": JobStatus.CANCELLED,
}
_WORKER_JOB_ID = re.compile(r"[0-9a-f]{32}-(?P<at>[0-9]{1,12})")
_START_TIMEOUT = 60  # seconds from the claim; a job that its runner does not know by then was never sent


class Manager:
    """The settings of workers: the database, the socket, and their pages.

    It makes an :class:`~flask_executor.Executor` for an app that has none. If jobs run on that, ``EXECUTOR_STORE`` is
    ``sqlite`` by default: the rows of workers outlive the process, so the records of their jobs have to as well.

    :param app: the app to bind at once, as :meth:`init_app` does.
    :param settings: ``db``, the Flask-SQLAlchemy object; ``socketio``, which sends events about jobs; ``app_import``,
        the import string of the app for workers of RQ (``"app.app"``); ``loading_img``, a file in the app's static
        folder (``"worker_loading.gif"``); ``template``, the one of the waiting page.
    :raises TypeError: for another setting.
    """

    def __init__(self, app: Flask | None = None, **settings: Any) -> None:
        self.db: Any = None
        self.socketio: Any = None
        self.app_import = "app.app"
        self.loading_img: str | None = "worker_loading.gif"
        self.template = "flask_executor/flask_worker.html"
        self._set(settings)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, **settings: Any) -> None:
        """Bind an app, after ``app.task_queue`` was set if it has one.

        :param settings: as for the class.
        :raises TypeError: for another setting.
        """
        self._set(settings)
        app.extensions["manager"] = self
        app.add_url_rule("/_check_job_status", "_check_job_status", _check_job_status)
        if "executor" not in app.extensions:
            if not hasattr(app, "task_queue"):
                app.config.setdefault("EXECUTOR_STORE", "sqlite")
            Executor(app)

    def _set(self, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            if name not in vars(self):
                raise TypeError(f"no such setting: {name}; there are {', '.join(vars(self))}")
            setattr(self, name, value)


def _manager() -> Manager:
    manager: Manager = current_app.extensions["manager"]
    return manager


# ---- arguments in the database ----


@dataclass(frozen=True)
class ModelReference:
    """Stands for a model among stored arguments, until the arguments are used.

    :param model: the class of the model.
    :param identity: its primary key.
    """

    model: type[Any]
    identity: tuple[Any, ...]

    def load(self) -> Any:
        """The model; None if it was deleted."""
        return _manager().db.session.get(self.model, self.identity)


class _ArgumentPickler(pickle.Pickler):
    """Pickles a reference in place of each model."""

    def reducer_override(self, value: Any) -> Any:
        state = sqlalchemy.inspect(value, raiseerr=False)
        if not isinstance(state, InstanceState):
            return NotImplemented
        if state.identity is None:
            raise NotPicklable(f"{value!r} has no primary key yet, and cannot be an argument: flush the session first")
        return ModelReference, (type(value), tuple(state.identity))

    @staticmethod
    def dumps(value: Any, protocol: int) -> bytes:
        signer = _signer()
        with io.BytesIO() as file:
            _ArgumentPickler(file, protocol).dump(value)
            return file.getvalue() if signer is None else signer.sign(file.getvalue())

    @staticmethod
    def loads(data: bytes) -> Any:
        signer = _signer()
        try:
            return pickle.loads(data if signer is None else signer.unsign(data))
        except BadSignature:
            raise UntrustedResult(
                "Arguments in the database were not signed with this app's SECRET_KEY, and are not unpickled. All "
                "processes of an app need the same key; a former one goes into SECRET_KEY_FALLBACKS."
            ) from None


def _signer() -> Signer | None:
    """Signs arguments, as unpickling them runs code. None without a ``SECRET_KEY``."""
    keys = signing_keys(current_app)
    return Signer(keys, salt="flask-executor.flask-worker", digest_method=hashlib.sha256) if keys else None


def _with_models(value: Any) -> Any:
    """A copy of stored arguments, with the models in them."""
    if isinstance(value, ModelReference):
        return value.load()
    if isinstance(value, dict):
        return {name: _with_models(item) for name, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(_with_models, value))
    return value


class _Call:
    """The columns that hold the arguments of a call."""

    args: Mapped[list[Any] | None] = mapped_column(MutableList.as_mutable(PickleType(pickler=_ArgumentPickler)))
    kwargs: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(PickleType(pickler=_ArgumentPickler)))

    def _call(self, name: str | None, model: Any) -> Any:
        if model is None or name is None:
            return None
        return getattr(model, name)(*_with_models(list(self.args or ())), **_with_models(self.kwargs or {}))


# ---- workers ----


class WorkerMixin(_Call):
    """A model that runs a method of another model, its ``employer``, in the background, and shows a waiting page.

    .. code-block:: python

        class Worker(WorkerMixin, db.Model):
            id = db.Column(db.Integer, primary_key=True)
            employer_id = db.Column(db.Integer, db.ForeignKey("employer.id"))

    :param method_name: the method of the employer.
    :param args: its arguments, as are ``kwargs``; a model among them must have a primary key.
    :param callback: the url on this site that follows when the job is done; by default the one of the page.
    :param loading_img: overrides the manager's, as does ``template``.
    :param columns: other columns of the model.
    """

    method_name: Mapped[str | None]
    callback: Mapped[str | None]
    job_finished: Mapped[bool | None] = mapped_column(default=False)
    job_in_progress: Mapped[bool | None] = mapped_column(default=False)
    job_id: Mapped[str | None] = mapped_column(index=True)
    _loading_img: Mapped[str | None]
    _template: Mapped[str | None]

    if TYPE_CHECKING:
        employer: Any  # a relationship that the subclass defines

    def __init__(
        self,
        method_name: str | None = None,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        callback: str | None = None,
        loading_img: str | None = None,
        template: str | None = None,
        **columns: Any,
    ) -> None:
        super().__init__(**columns)
        self.method_name = method_name
        self.args = list(args)
        self.kwargs = dict(kwargs or {})
        self.callback = callback
        self.loading_img = loading_img
        self.template = template
        self.reset()

    @property
    def loading_img(self) -> str | None:
        """The image of the waiting page: a file in the app's static folder."""
        return self._loading_img or _manager().loading_img

    @loading_img.setter
    def loading_img(self, name: str | None) -> None:
        self._loading_img = name

    @property
    def template(self) -> str:
        """The template of the waiting page. It gets the ``worker``, and has ``worker.script()`` in its head."""
        return self._template or _manager().template

    @template.setter
    def template(self, name: str | None) -> None:
        self._template = name

    @property
    def model_id(self) -> str:
        """Name and primary key of the model; with a slash in front, the namespace of its events on the socket."""
        return f"{type(self).__name__}-{_identity(self)[0]}"

    def reset(self) -> None:
        """Forget the job, so that the next call of the worker starts another one."""
        self.job_finished = self.job_in_progress = False
        self.job_id = None

    def __call__(self) -> str:
        """Start the job, unless it is in progress; commits the session then.

        :return: the waiting page. If the job fails, the page says so; loading it again starts the job again.
        :raises HTTPException: 400 if the callback leads to another site.
        """
        self._destination()
        session = _manager().db.session
        session.add(self)
        session.flush()
        if not self._is_in_progress() and self._claim():
            self._start()
        has_image = self.loading_img and current_app.has_static_folder
        return render_template(
            self.template,
            worker=self,
            job=_document(self, self.job_id),
            url=self._status_url(),
            image=url_for("static", filename=self.loading_img) if has_image else None,
        )

    def script(self) -> Markup:
        """The script for the head of a template: it opens the next page when the job is done."""
        return Markup(  # noqa: S704  # the template escapes
            render_template(
                "flask_executor/flask_worker_script.html", url=self._status_url(), callback=self._destination()
            )
        )

    def execute_job(self) -> Any:
        """Call the method; this is what runs in the background."""
        return self._call(self.method_name, self.employer)

    def _is_in_progress(self) -> bool:
        if self.job_finished or not self.job_in_progress:
            return False
        status = JobStatus(_document(self, self.job_id)["status"])
        # If it has succeeded since the view has asked, the page opens the next one at once.
        return not status.ended or status is JobStatus.SUCCEEDED

    def _claim(self) -> bool:
        """Give the job a new id; False if another request was faster."""
        session, mapper = _manager().db.session, sqlalchemy.inspect(type(self))
        is_this = [column == value for column, value in zip(mapper.primary_key, _identity(self), strict=True)]
        claimed = session.execute(
            sqlalchemy.update(type(self))
            .where(*is_this, type(self).job_id == self.job_id)
            .values(job_id=_new_id(), job_in_progress=True, job_finished=False),
            execution_options={"synchronize_session": False},
        )
        session.commit()
        session.refresh(self)
        return bool(claimed.rowcount)

    def _start(self) -> None:
        job_id, queue = self.job_id, getattr(current_app, "task_queue", None)
        try:
            if queue is not None:
                queue.enqueue(_run_on_queue, _manager().app_import, job_id, job_id=job_id)
            else:
                executor = current_app.extensions["executor"]
                executor.options(name=self.method_name).submit_stored(job_id, _run, job_id)
        except Exception:
            _settle(self, job_id, finished=False)
            raise

    def _destination(self) -> str:
        """The path of the callback; empty for the page itself."""
        return _path_here(self.callback) if self.callback else ""

    def _status_url(self) -> str:
        return url_for("_check_job_status", job_id=self.job_id)


def _new_id() -> str:
    """A job id that cannot be guessed, with the time when it was made."""
    return f"{secrets.token_hex(16)}-{time.time():.0f}"


def _is_fresh(job_id: str | None) -> bool:
    """If true, the job is so new that its runner may not know it yet."""
    made = _WORKER_JOB_ID.fullmatch(job_id or "")
    return made is not None and time.time() < int(made["at"]) + _START_TIMEOUT


def _identity(model: Any) -> Sequence[Any]:
    identity: Sequence[Any] = sqlalchemy.inspect(model).identity
    return identity


def _path_here(url: str) -> str:
    """The path of a url relative to the page, resolved as browsers do it.

    :raises HTTPException: 400 if it leads to another site.
    """
    read = re.sub(r"[\t\r\n]", "", url).strip("".join(map(chr, range(33)))).replace("\\", "/")
    try:
        scheme, host, path, query, fragment = urlsplit(urljoin(request.base_url, read))
    except ValueError:  # the host is not valid
        scheme = host = path = query = fragment = ""
    if (scheme, host) != (request.scheme, request.host):
        abort(400, "The callback of this worker leads to another site.")
    return urlunsplit(("", "", f"/{path.lstrip('/')}", query, fragment))


# ---- jobs ----


def _run_on_queue(app_import: str, job_id: str) -> None:
    """The function that a worker of RQ runs."""
    app: Flask = import_string(app_import)
    with app.app_context():
        _run(job_id)


def _run(job_id: str) -> None:
    worker = _worker_of(job_id)
    if worker is None:  # it was reset before the job began
        return
    namespace = f"/{worker.model_id}"
    _tell("job_started", namespace)
    try:
        worker.execute_job()
        _settle(worker, job_id, finished=True)
    except Exception:
        _manager().db.session.rollback()
        _settle(worker, job_id, finished=False)
        _tell("job_failed", namespace)
        raise
    _tell("job_finished", namespace)


def _tell(event: str, namespace: str) -> None:
    socketio = _manager().socketio
    if socketio is not None:
        socketio.emit(event, namespace=namespace)


def _settle(worker: WorkerMixin, job_id: str | None, *, finished: bool) -> None:
    """Store how the job has ended, unless the worker was reset. Commits the session, with the changes of the job."""
    session, model = _manager().db.session, type(worker)
    session.execute(
        sqlalchemy.update(model).where(model.job_id == job_id).values(job_finished=finished, job_in_progress=False)
    )
    session.commit()


def _worker_of(job_id: str) -> WorkerMixin | None:
    """The worker that has this job; None if it was reset."""
    db = _manager().db
    for mapper in db.Model.registry.mappers:
        if issubclass(mapper.class_, WorkerMixin):
            worker: WorkerMixin | None = db.session.scalar(sqlalchemy.select(mapper).filter_by(job_id=job_id))
            if worker is not None:
                return worker
    return None


def _check_job_status() -> Response:
    """The status of a job, for everybody who has its id."""
    job_id = request.args.get("job_id", "")
    # Only ids of workers' jobs: on the executor they are keys, and the keys of other jobs can be guessed.
    document = _document(_worker_of(job_id), job_id) if _WORKER_JOB_ID.fullmatch(job_id) else {}
    if not document:
        abort(404)
    answer = jsonify(document)
    answer.headers["Cache-Control"] = "no-store"
    return answer


def _document(worker: WorkerMixin | None, job_id: str | None) -> dict[str, Any]:
    """The status of a job for the script of the page; empty if the job is not known."""
    document = _document_of_runner(job_id)
    if worker is not None:
        if worker.job_finished:
            document["status"] = JobStatus.SUCCEEDED
        elif not worker.job_in_progress:
            document["status"] = JobStatus.FAILED
        elif not document:
            document["status"] = JobStatus.QUEUED if _is_fresh(job_id) else JobStatus.LOST
    if document:
        status: JobStatus = document["status"]
        document |= {
            "id": job_id,
            "ended": status.ended,
            "failed": status.failed,
            "job_finished": status is JobStatus.SUCCEEDED,
        }
    return document


def _document_of_runner(job_id: str | None) -> dict[str, Any]:
    queue = getattr(current_app, "task_queue", None)
    if queue is not None:
        queued = queue.fetch_job(job_id)
        return {} if queued is None else {"status": _RQ_STATUSES.get(queued.get_status(), JobStatus.QUEUED)}
    job = current_app.extensions["executor"].jobs.find(job_id)
    return {} if job is None else {"status": job.status, "progress": job.progress, "message": job.message}


# ---- routers ----


def set_route(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """Decorator: the router's next request begins with this method and the same arguments."""

    @functools.wraps(method)
    def bookmarked(router: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        router.current_route = method.__name__
        router.args = list(args)
        router.kwargs = dict(kwargs)
        return method(router, *args, **kwargs)

    return bookmarked


class RouterMixin(_Call):
    """A model that stores which of its methods answers the next request, and with which arguments.

    :param columns: other columns of the model.
    """

    current_route: Mapped[str | None]

    def __init__(self, **columns: Any) -> None:
        super().__init__(**columns)
        self.args = self.args or []
        self.kwargs = self.kwargs or {}

    def route(self) -> Any:
        """Call the current method and return its answer; commits the session."""
        page = self._call(self.current_route, self)
        _manager().db.session.commit()
        return page

    def run_worker(
        self,
        worker: WorkerMixin,
        next_route: Callable[..., Any],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The waiting page until the worker has finished; after that, what ``next_route(*args, **kwargs)`` returns."""
        return next_route(*args, **kwargs or {}) if worker.job_finished else worker()
