"""The controller: the jobs of an executor over HTTP."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast
from urllib.parse import quote

from flask import Blueprint, Flask, Response, current_app, redirect, render_template, request, session
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WSGIResponse

from flask_executor.exceptions import (
    ConfigError,
    ExecutorShutdown,
    NotPicklable,
    QueueFull,
    ResultExpired,
    UntrustedResult,
)
from flask_executor.futures import FutureProxy
from flask_executor.helpers import callable_name
from flask_executor.jobs.model import RESERVED_PREFIX, Job, JobStatus
from flask_executor.web.arguments import ExposedFunction, MismatchError, parameters_of
from flask_executor.web.body import read_form, read_object
from flask_executor.web.dashboard import dashboard_data
from flask_executor.web.listing import Query, list_page
from flask_executor.web.negotiation import HTML, document_answer, preferred_type, status_response
from flask_executor.web.openapi import openapi_document
from flask_executor.web.pages import JobsView, jobs_of, register_controller, render_job_page, translator, url_within
from flask_executor.web.problems import abort_with_problem, no_content, problem, store_or_problem
from flask_executor.web.same_origin import require_same_origin
from flask_executor.web.status import log_document
from flask_executor.web.tokens import SHOW, JobToken, check_token

if TYPE_CHECKING:
    from flask_executor.executor import Executor, ExecutorJob

F = TypeVar("F", bound=Callable[..., Any])

#: Returns whether the current request may do this with a job: ``authorize("stop", job)``.
Authorize = Callable[[str, "Job | None"], object]

_RUN_KEY = f"{RESERVED_PREFIX}run"  # begins the key of each job started here: a job with a key keeps its handle
_STARTED_WITH = f"{RESERVED_PREFIX}started_with"  # in the meta of a job: name and arguments, to start it again
_ACTIONS = ("status", "result", "log", "stop", "retry")  # what authorize() is asked about a job
_SESSION_KEY = "_flask_executor_owner"
_SESSION_PREFIX = "session:"  # begins the owner of jobs that belong to a session
_MAX_STARTED_WITH = 8 * 1024  # characters; a job with larger arguments cannot be started again
_EXPIRED = "There was such a job, and its record has expired."
_NOT_FOUND = "There is no such job, or it is none of yours."


class Controller(Blueprint):
    """Start, watch and stop jobs over HTTP.

    .. code-block:: python

        controller = Controller(executor, authorize=lambda action, job: current_user.is_admin)
        controller.expose(render)
        app.register_blueprint(controller, url_prefix="/jobs")

    It denies by default: only exposed functions can be started, and only its owner can see a job. Each route is a
    method, which a subclass can override; it calls ``super()`` for what the controller does.

    :param executor: the executor that has the jobs.
    :param authorize: called with an action and a job: with ``"list"``, ``"dashboard"`` or ``"health"`` and None, or
        with ``"status"``, ``"result"``, ``"log"``, ``"stop"`` or ``"retry"`` and the job of another owner. If it
        returns a true value, the request may do this. It may also leave the view. None denies all of these.
    :param owner: returns the owner of the jobs that the current request starts, a string or number; None if nobody is
        logged in. Without an owner the jobs belong to the signed session, by a random token in it.
    :param name: the name of the blueprint.
    :param max_body: how many bytes the arguments of a job may have.
    :param options: further options of :class:`flask.Blueprint`.
    """

    def __init__(
        self,
        executor: Executor,
        authorize: Authorize | None = None,
        owner: Callable[[], object] | None = None,
        name: str = "executor",
        *,
        max_body: int = 1024 * 1024,
        **options: Any,
    ) -> None:
        super().__init__(name, __name__, **options)
        self.executor = executor
        self.max_body = max_body
        self.exposed: dict[str, ExposedFunction] = {}
        self._authorize = authorize
        self._owner = owner
        self._route("/", "index", GET=self.index)
        self._route("/overview", "overview", GET=self.overview)
        self._route("/health", "health", GET=self.health)
        self._route("/openapi.json", "openapi", GET=self.openapi)
        self._route("/run/<name>", "run", POST=self.run)
        self._route("/<id>", "job", GET=self.job, DELETE=self.stop, POST=self.act)
        self._route("/<id>/result", "result", GET=self.result)
        self._route("/<id>/log", "log", GET=self.log)
        self._route("/<id>/events", "events", GET=self.events)
        self._route("/<id>/retry", "retry", POST=self.retry)
        self.record(self._mounted)

    def _mounted(self, state: BlueprintSetupState) -> None:
        name = f"{state.name_prefix}.{state.name}".lstrip(".")
        register_controller(cast(Flask, state.app), self.executor.name, name, self.owner)

    def expose(self, fn: F, name: str | None = None) -> F:
        """Let ``POST /run/<name>`` start this function; can be used as a decorator.

        The arguments of a request are checked against signature and annotations, by pydantic if it is installed.

        :param fn: a function, or one decorated with :meth:`Executor.job <flask_executor.Executor.job>`, whose options
            apply.
        :param name: the name in the url; by default the one of its jobs.
        :raises TypeError: if the function cannot be called with keyword arguments only.
        :raises ValueError: if the name is taken or has a slash, or the job is one of another executor.
        """
        name = name or callable_name(fn)
        if "/" in name:
            raise ValueError(f"the name {name!r} has a slash; give another one: expose(fn, name=...)")
        if name in self.exposed:
            raise ValueError(f"{name!r} is exposed already; give another name: expose(fn, name=...)")
        if _is_job(fn) and fn.executor is not self.executor:
            raise ValueError(f"{name!r} is a job of another executor; expose it on a controller of that one")
        self.exposed[name] = ExposedFunction(name=name, fn=fn, parameters=parameters_of(fn))
        return fn

    # ---- who may do what ----

    def owner(self) -> str:
        """The owner of the jobs that this request starts.

        :raises ConfigError: if ``owner()`` returns none, and there is no SECRET_KEY for a session.
        """
        owner = self._known_owner()
        if owner is None:
            if not current_app.secret_key:
                raise ConfigError(
                    "SECRET_KEY", None, "set, so that a session can tell whose a job is, or pass owner= to Controller"
                )
            token = session[_SESSION_KEY] = secrets.token_urlsafe(16)
            owner = _owner_of_session(token)
        return owner

    def _known_owner(self) -> str | None:
        owner = None if self._owner is None else self._owner()
        if owner is None or owner is False or owner == "":  # what apps return if nobody is logged in
            token = session.get(_SESSION_KEY)
            return None if token is None else _owner_of_session(token)
        if str(owner).startswith(_SESSION_PREFIX):
            raise ValueError(
                f"owner() gave {owner!r}; owners that begin with {_SESSION_PREFIX!r} are those of sessions"
            )
        return str(owner)

    def may(self, action: str, job: Job | None = None) -> bool:
        """If true, the current request may do this; with jobs of its own it may do everything."""
        if job is not None:
            if job.owner is not None and job.owner == self._known_owner():
                return True
            token = self._token() if action in ("status", "result") else None
            if token is not None and token.id == job.id:
                return True
        return self._authorizes(action, job)

    def _authorizes(self, action: str, job: Job | None) -> bool:
        return self._authorize is not None and bool(self._authorize(action, job))

    def require(self, action: str) -> None:
        """Leave the view with a 403 if the current request may not do this."""
        if not self.may(action):
            abort_with_problem(403, f"This needs authorize({action!r}, None) of the Controller to allow it.")

    def find(self, action: str, id: str) -> Job:
        """The job with this id; leave the view with a 404 if the current request may not do this with it."""
        records = self.executor.jobs
        job = records.get(id)
        if job is None and records.expired(id):
            abort_with_problem(410, _EXPIRED)
        if job is None or not self.may(action, job):
            abort_with_problem(404, _NOT_FOUND)
        return job

    def check_origin(self) -> None:
        """Leave the view if a page of another site has made this request; override it to allow some sites."""
        require_same_origin(request)

    def _token(self) -> JobToken | None:
        """The token in the url, which lets any user who has that url see one job; None without a valid one."""
        text = request.args.get("permit")
        token = None if text is None else check_token(current_app, SHOW, text)
        return token if token is not None and token.executor == self.executor.name else None

    # ---- starting ----

    def run(self, name: str) -> WSGIResponse:
        """``POST /run/<name>``: start the function that is exposed under this name."""
        self.check_origin()
        if name not in self.exposed:
            abort_with_problem(404, f"Nothing is exposed as {name!r}.")
        return self.start(name, read_object(request, self.max_body))

    def check_start(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Called before a job is started or started again; override it to refuse some, by leaving the view.

        :param name: the name of the exposed function.
        :param arguments: as they were sent; they fit the signature.
        """

    def start(self, name: str, arguments: Mapping[str, Any], owner: str | None = None) -> WSGIResponse:
        """Start a job in the contexts of the current request, and answer with its url.

        :param owner: the owner of the job; None for the one that :meth:`owner` returns.
        """
        kwargs = self._checked(name, arguments)
        return self._accepted(self._submit(name, arguments, kwargs, self.owner() if owner is None else owner))

    def _checked(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, checked and converted for the function."""
        try:
            kwargs = self.exposed[name].parameters.check(arguments)
        except MismatchError as error:
            wrong = [{"pointer": mismatch.pointer, "detail": mismatch.detail} for mismatch in error.args]
            abort_with_problem(422, f"The arguments do not fit {name!r}.", errors=wrong)
        self.check_start(name, arguments)
        return kwargs

    def _submit(self, name: str, arguments: Mapping[str, Any], kwargs: dict[str, Any], owner: str | None) -> Job:
        fn = self.exposed[name].fn
        options: dict[str, Any] = {"owner": owner, "key": (_RUN_KEY, secrets.token_hex(8))}
        started = json.dumps({"name": name, "arguments": dict(arguments)})
        if len(started) <= _MAX_STARTED_WITH:
            options["meta"] = {_STARTED_WITH: started}
        submit: Callable[..., FutureProxy[Any]]
        if _is_job(fn):
            submit = fn.options(**options).submit
        else:
            submit = partial(self.executor.options(name=name, **options).submit, fn)
        try:
            return submit(**kwargs).record()
        except QueueFull:
            abort_with_problem(503, "The queue of jobs is full. Try again.", headers={"Retry-After": "5"})
        except ExecutorShutdown:
            abort_with_problem(503, "This process is shutting down. Try again.", headers={"Retry-After": "5"})

    def _accepted(self, job: Job) -> WSGIResponse:
        answer = document_answer(request, self.describer(job)(job), 202)
        answer.headers["Location"] = self._url("job", id=job.id)
        return answer

    def _accepted_or_bare(self, job: Job) -> WSGIResponse:
        """The same without document and url, if the current request may act on the job but not see it."""
        return self._accepted(job) if _allows(self.may, "status", job) else Response(status=202)

    def retry(self, id: str) -> WSGIResponse:
        """``POST /<id>/retry``: start a job again that was started here and has ended without success.

        The job of another owner runs without the current request and session, so that it does not get the rights of
        the user who has pressed the button.
        """
        self.check_origin()
        job = self.find("retry", id)
        started = self._started(job)
        if started is None:
            abort_with_problem(
                409,
                "Only a job that was started here, with arguments of moderate size, and has ended other than by "
                "success can be started again.",
            )
        if job.owner is not None and job.owner == self._known_owner():
            return self.start(started["name"], started["arguments"])
        kwargs = self._checked(started["name"], started["arguments"])
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        again = partial(self._submit, started["name"], started["arguments"], kwargs, job.owner)
        return self._accepted_or_bare(Context().run(_in_app_context, app, again))

    def _started(self, job: Job) -> dict[str, Any] | None:
        """Name and arguments of a job that can be started again; None for other jobs."""
        text = job.meta.get(_STARTED_WITH)
        if text is None or not job.status.retryable:
            return None
        started: dict[str, Any] = json.loads(text)
        return started if started["name"] in self.exposed else None

    # ---- one job ----

    def describer(self, job: Job | None = None) -> Callable[[Job], dict[str, Any]]:
        """A function that makes status documents, with links to what the current request may do with each job.

        :param job: If given, the function is for this job only, and can be called after the request context has gone.
        """
        base, jobs, token = self._url("index"), self.jobs, self._token()
        allowed = None if job is None else self._allowed(job)
        query = f"?permit={quote(request.args.get('permit', ''), safe='')}"

        def describe(job: Job) -> dict[str, Any]:
            may = self._allowed(job) if allowed is None else allowed
            itself = f"{base}{job.id}"
            with_token = query if token is not None and token.id == job.id else ""
            links = {"self": itself + with_token, "events": f"{itself}/events{with_token}"} if "status" in may else {}
            if "log" in may:
                links["log"] = f"{itself}/log"
            if "stop" in may and not job.status.ended:
                links["stop"] = itself
            if "result" in may and job.status is JobStatus.SUCCEEDED:
                links["result"] = f"{itself}/result{with_token}"
            if "retry" in may and self._started(job) is not None:
                links["retry"] = f"{itself}/retry"
            return {**jobs.describe(job), "links": links}

        return describe

    def _allowed(self, job: Job) -> set[str]:
        return {action for action in _ACTIONS if _allows(self.may, action, job)}

    def job(self, id: str) -> WSGIResponse:
        """``GET /<id>``: the status document, or the job's page for browsers."""
        job = self.find("status", id)
        if preferred_type(request) != HTML:
            return status_response(request, self._reader(job), self.jobs.wait_slots)
        page = render_job_page(self.jobs, self.describer(job)(job), turn=False, action=self._url("job", id=id))
        answer = Response(page, mimetype=HTML)
        answer.headers["Cache-Control"] = "no-store"
        answer.vary.add("Accept")
        return answer

    def events(self, id: str) -> WSGIResponse:
        """``GET /<id>/events``: the status document as server-sent events."""
        job = self.find("status", id)
        return status_response(request, self._reader(job), self.jobs.wait_slots, as_events=True)

    def _reader(self, job: Job) -> Callable[[], Mapping[str, Any] | None]:
        """A function that reads the status document, also after the request context has gone."""
        id, records, describe = job.id, self.executor.jobs, self.describer(job)

        def read() -> Mapping[str, Any] | None:
            job = records.get(id)
            return None if job is None else describe(job)

        return read

    def stop(self, id: str) -> WSGIResponse:
        """``DELETE /<id>``: ask a job to stop."""
        self.check_origin()
        job = self.find("stop", id)
        if not self.jobs.stop_job(id):
            return no_content()
        return self._accepted_or_bare(self.executor.jobs.get(id) or job)

    def act(self, id: str) -> WSGIResponse:
        """``POST /<id>``: the buttons of the job's page."""
        self.check_origin()
        do = {"stop": self.stop, "retry": self.retry}.get(read_form(request).get("action", ""))
        if do is None:
            abort_with_problem(400, "The action is missing: it must be 'stop' or 'retry'.")
        answer = do(id)
        if preferred_type(request) != HTML:
            return answer
        return redirect(answer.headers.get("Location", self._url("job", id=id)), 303)

    def result(self, id: str) -> WSGIResponse:
        """``GET /<id>/result``: what the job has returned, as JSON."""
        job = self.find("result", id)
        if not job.status.ended:
            abort_with_problem(
                409, f"The job has not ended: it is {job.status}.", headers={"Retry-After": "1"}, job=job.status
            )
        if job.status is not JobStatus.SUCCEEDED:
            abort_with_problem(409, f"The job has no result: its status is {job.status}.", job=job.status)
        future = self.jobs.handle(id)
        try:
            result = None if future is None else future.result(timeout=1)  # it may arrive a moment after the status
        except concurrent.futures.TimeoutError:
            abort_with_problem(503, "The result is not here yet. Try again.", headers={"Retry-After": "1"})
        except (ResultExpired, UntrustedResult, NotPicklable):
            future = None
        if future is None:
            abort_with_problem(410, "The result is not kept any more.")
        try:
            body = current_app.json.dumps(result, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            abort_with_problem(406, f"The result is a {type(result).__name__}, which JSON does not have.")
        answer = Response(body, mimetype="application/json")
        answer.headers["Cache-Control"] = "private, no-cache"
        answer.add_etag()
        answer.make_conditional(request)
        return answer

    def log(self, id: str) -> WSGIResponse:
        """``GET /<id>/log``: the last lines that the job has logged."""
        job = self.find("log", id)
        with_errors = self.jobs.with_errors or _allows(self._authorizes, "log", job)
        lines = [log_document(line, with_error=with_errors) for line in self.executor.jobs.log(id)]
        return _as_json({"lines": lines})

    # ---- all jobs ----

    def index(self) -> WSGIResponse:
        """``GET /``: the jobs, youngest first; browsers get the dashboard."""
        if preferred_type(request) == HTML:
            self.require("dashboard")
            return self.dashboard()
        self.require("list")
        try:
            query = Query.parse(request.args)
        except ValueError as error:
            abort_with_problem(400, str(error))
        jobs, cursor = list_page(self.executor.jobs, query)
        describe = self.describer()
        documents = [{**describe(job), "owner": job.owner, "started_with": job.meta.get(_STARTED_WITH)} for job in jobs]
        following = None if cursor is None else self._url("index", **{**query.given(), "before": cursor})
        return _as_json({"jobs": documents, "next": following})

    def dashboard(self) -> WSGIResponse:
        """The dashboard: the page that shows all jobs."""
        page = render_template(
            "flask_executor/dashboard.html",
            title=f"{self.executor.name or current_app.name}: jobs",
            list_url=self._url("index"),
            overview_url=self._url("overview"),
            statuses=[status.value for status in JobStatus],
            engine=self.executor.engine,
            translate=translator(),
        )
        answer = Response(page, mimetype=HTML)
        answer.headers["Cache-Control"] = "no-store"
        answer.vary.add("Accept")
        return answer

    def overview(self) -> WSGIResponse:
        """``GET /overview``: counts, durations and workers, for the dashboard."""
        self.require("dashboard")
        health = self.executor.health()
        return _as_json(dashboard_data(self.executor.jobs, health, self.jobs.worker_states()))

    def health(self) -> WSGIResponse:
        """``GET /health``: 200 while jobs are accepted and the store answers, else 503."""
        health = self.executor.health()
        good = health.accepting and health.store_reachable
        document: dict[str, Any] = {"status": "ok" if good else "unavailable"}
        if _allows(self.may, "health"):
            document.update(asdict(health))
        answer = Response(json.dumps(document), 200 if good else 503, mimetype="application/json")
        answer.headers["Cache-Control"] = "no-store"
        return answer

    def openapi(self) -> WSGIResponse:
        """``GET /openapi.json``: a description of all routes in OpenAPI 3.1."""
        return _as_json(openapi_document(self._url("index"), list(self.exposed.values())))

    # ---- the work ----

    @property
    def jobs(self) -> JobsView:
        """The jobs of the executor in the current app."""
        return jobs_of(self.executor)

    def _url(self, endpoint: str, **values: Any) -> str:
        mounted, blueprints = request.blueprint, current_app.blueprints
        if mounted is None or blueprints.get(mounted) is not self:  # called by a view of the app
            mounted = next((name for name, blueprint in blueprints.items() if blueprint is self), None)
        if mounted is None:
            raise RuntimeError(f"the controller {self.name!r} is not mounted in this app: app.register_blueprint(...)")
        return url_within(f"{mounted}.{endpoint}", **values)

    def _route(self, rule: str, endpoint: str, **views: Callable[..., WSGIResponse]) -> None:
        """Add a route, whose answers to other methods and whose errors are problems too."""
        own = [name for name in ("id", "name") if f"<{name}>" in rule]  # the others are variables of the prefix
        allowed = sorted({*views, "OPTIONS", *(["HEAD"] if "GET" in views else [])})

        def view(**values: str) -> WSGIResponse:
            if request.method == "OPTIONS":
                return no_content({"Allow": ", ".join(allowed)})
            answer = views.get("GET" if request.method == "HEAD" else request.method)
            if answer is None:
                allow = {"Allow": ", ".join(allowed)}
                return problem(405, f"This url takes {', '.join(allowed)}.", headers=allow)
            with store_or_problem():
                return answer(**{name: values[name] for name in own})

        self.add_url_rule(rule, endpoint, view, methods=_METHODS, provide_automatic_options=False)


_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def _allows(rule: Callable[[str, Job | None], bool], action: str, job: Job | None = None) -> bool:
    """If true, the rule allows this. For what is only shown, a rule that leaves the view counts as no."""
    try:
        return rule(action, job)
    except HTTPException:
        return False


def _owner_of_session(token: str) -> str:
    """The owner of a session's jobs: a hash, so that the session cannot be made from the owner shown in a list."""
    return _SESSION_PREFIX + hashlib.blake2b(token.encode(), digest_size=9).hexdigest()


def _in_app_context(app: Flask, fn: Callable[[], Job]) -> Job:
    with app.app_context():
        return fn()


def _as_json(value: Any) -> Response:
    answer = Response(json.dumps(value), mimetype="application/json")
    answer.headers["Cache-Control"] = "private, no-cache"
    answer.vary.add("Accept")
    answer.add_etag(weak=True)
    answer.make_conditional(request)
    return answer


def _is_job(fn: Callable[..., Any]) -> TypeGuard[ExecutorJob[..., Any]]:
    """If true, the function was decorated with :meth:`Executor.job <flask_executor.Executor.job>`."""
    return hasattr(fn, "executor") and hasattr(fn, "submit_stored")
