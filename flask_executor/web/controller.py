"""The HTTP face of an executor."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import asdict, dataclass
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
from flask_executor.web.arguments import MismatchError, Parameters, parameters_of
from flask_executor.web.body import read_form, read_object
from flask_executor.web.listing import Query, list_page
from flask_executor.web.negotiation import HTML, document_answer, status_response, wanted
from flask_executor.web.openapi import document as openapi_document
from flask_executor.web.overview import overview
from flask_executor.web.pages import Jobs, jobs_of, register_controller, render_job_page, translator, url_within
from flask_executor.web.problems import nothing, problem, refuse, store_or_problem
from flask_executor.web.same_origin import require_same_origin
from flask_executor.web.status import log_document
from flask_executor.web.tokens import SHOW, JobToken, check_token

if TYPE_CHECKING:
    from flask_executor.executor import Executor, ExecutorJob

F = TypeVar("F", bound=Callable[..., Any])

#: Decides whether the current request may do this with a job: ``authorize("stop", job)``.
Authorize = Callable[[str, "Job | None"], object]

_RUN = (
    f"{RESERVED_PREFIX}run"  # what the keys of jobs begin with that were started here, so that their handles are held
)
_STARTED = f"{RESERVED_PREFIX}started_with"  # in the meta of a job: what it was started as, to be started again
_ACTIONS = ("status", "result", "log", "stop", "retry")  # with one job
_SESSION = "_flask_executor_owner"
_OF_SESSION = "session:"  # what an owner begins with whom only the session knows
_MOST_KEPT = 8 * 1024  # characters of name and arguments that are kept, to start a job again
_GONE = "There was such a job, and its record has expired."
_NONE = "There is no such job, or it is none of yours."


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposed:
    """A function that can be started over HTTP."""

    name: str
    #: What submits it: an executor's job, or a plain function.
    fn: Callable[..., Any]
    parameters: Parameters


class Controller(Blueprint):
    """Start, watch and stop jobs over HTTP.

    .. code-block:: python

        controller = Controller(executor, authorize=lambda action, job: current_user.is_admin)
        controller.expose(render)
        app.register_blueprint(controller, url_prefix="/jobs")

    Denies by default: only what was exposed can be started, and a job is only there for whoever has started it. Each
    route is a method, to be overridden in a class of your own, which calls ``super()`` where it goes on as here.

    :param executor: whose jobs these are.
    :param authorize: called with what is to be done (``"list"``, ``"dashboard"``, ``"health"``, or with a job of
        somebody else's ``"status"``, ``"result"``, ``"log"``, ``"stop"``, ``"retry"``) and the job or None; what it
        returns decides, and it may leave the view by itself. None allows none of these.
    :param owner: tells whose the jobs are that the current request starts, as a string or number; None for nobody
        that is known. By default, and for those, a random token in the signed session does.
    :param name: of the blueprint.
    :param max_body: most bytes of the arguments of a job.
    :param options: further ones of :class:`flask.Blueprint`.
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
        self.exposed: dict[str, Exposed] = {}
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
        """Let this function be started by ``POST /run/<name>``; can be used as a decorator.

        Its arguments come from outside. They are checked against its signature and annotations, by pydantic where that
        is installed.

        :param fn: a function, or what :meth:`Executor.job <flask_executor.Executor.job>` made of one, with its options.
        :param name: how it is called in the url; by default as jobs of it are.
        :raises TypeError: for a function that cannot be called with keyword arguments only.
        :raises ValueError: for a name that is taken or has a slash, and for a job of another executor.
        """
        name = name or callable_name(fn)
        if "/" in name:
            raise ValueError(f"the name {name!r} has a slash; give another one: expose(fn, name=...)")
        if name in self.exposed:
            raise ValueError(f"{name!r} is exposed already; give another name: expose(fn, name=...)")
        if _is_job(fn) and fn.executor is not self.executor:
            raise ValueError(f"{name!r} is a job of another executor; expose it on a controller of that one")
        self.exposed[name] = Exposed(name=name, fn=fn, parameters=parameters_of(fn))
        return fn

    # ---- who may do what ----

    def owner(self) -> str:
        """Whose the jobs are that this request starts.

        :raises ConfigError: when nobody is known, and without a SECRET_KEY no session can tell either.
        """
        owner = self._known_owner()
        if owner is None:
            if not current_app.secret_key:
                raise ConfigError(
                    "SECRET_KEY", None, "set, so that a session can tell whose a job is, or pass owner= to Controller"
                )
            token = session[_SESSION] = secrets.token_urlsafe(16)
            owner = _owner_of_session(token)
        return owner

    def _known_owner(self) -> str | None:
        owner = None if self._owner is None else self._owner()
        if owner is None or owner is False or owner == "":  # what apps say for nobody
            token = session.get(_SESSION)
            return None if token is None else _owner_of_session(token)
        if str(owner).startswith(_OF_SESSION):
            raise ValueError(f"owner() gave {owner!r}; what begins with {_OF_SESSION!r} is for those it does not know")
        return str(owner)

    def may(self, action: str, job: Job | None = None) -> bool:
        """Whether the current request may do this: its own jobs it may do everything with."""
        if job is not None:
            if job.owner is not None and job.owner == self._known_owner():
                return True
            permit = self._permit() if action in ("status", "result") else None
            if permit is not None and permit.id == job.id:
                return True
        return self._authorizes(action, job)

    def _authorizes(self, action: str, job: Job | None) -> bool:
        return self._authorize is not None and bool(self._authorize(action, job))

    def require(self, action: str) -> None:
        """Leave the view if the current request may not do this."""
        if not self.may(action):
            refuse(403, f"This needs authorize({action!r}, None) of the Controller to allow it.")

    def find(self, action: str, id: str) -> Job:
        """The job with this id, if the current request may do this with it; otherwise leave the view, with a 404."""
        records = self.executor.jobs
        job = records.get(id)
        if job is None and records.expired(id):
            refuse(410, _GONE)
        if job is None or not self.may(action, job):
            refuse(404, _NONE)
        return job

    def check_origin(self) -> None:
        """Leave the view if a page of another site has made this request; to be overridden to allow some."""
        require_same_origin(request)

    def _permit(self) -> JobToken | None:
        """What the url permits, whoever has it: to see one job."""
        token = request.args.get("permit")
        permit = None if token is None else check_token(current_app, SHOW, token)
        return permit if permit is not None and permit.executor == self.executor.name else None

    # ---- starting ----

    def run(self, name: str) -> WSGIResponse:
        """``POST /run/<name>``: start what is exposed under this name."""
        self.check_origin()
        if name not in self.exposed:
            refuse(404, f"Nothing is exposed as {name!r}.")
        return self.start(name, read_object(request, self.max_body))

    def check_start(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Called before anything is started, also again: to be overridden by what leaves the view where it is refused.

        :param name: of what is exposed.
        :param arguments: as they came; they fit the signature.
        """

    def start(self, name: str, arguments: Mapping[str, Any], owner: str | None = None) -> WSGIResponse:
        """Start a job in the contexts of the current request, and tell where it is.

        :param owner: whose it is; None for whom :meth:`owner` tells.
        """
        kwargs = self._checked(name, arguments)
        return self._accepted(self._submit(name, arguments, kwargs, self.owner() if owner is None else owner))

    def _checked(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function is to get them."""
        try:
            kwargs = self.exposed[name].parameters.check(arguments)
        except MismatchError as error:
            wrong = [{"pointer": one.pointer, "detail": one.detail} for one in error.args]
            refuse(422, f"The arguments do not fit {name!r}.", errors=wrong)
        self.check_start(name, arguments)
        return kwargs

    def _submit(self, name: str, arguments: Mapping[str, Any], kwargs: dict[str, Any], owner: str | None) -> Job:
        fn = self.exposed[name].fn
        options: dict[str, Any] = {"owner": owner, "key": (_RUN, secrets.token_hex(8))}
        started = json.dumps({"name": name, "arguments": dict(arguments)})
        if len(started) <= _MOST_KEPT:
            options["meta"] = {_STARTED: started}
        submit: Callable[..., FutureProxy[Any]]
        if _is_job(fn):
            submit = fn.options(**options).submit
        else:
            submit = partial(self.executor.options(name=name, **options).submit, fn)
        try:
            return submit(**kwargs).record()
        except QueueFull:
            refuse(503, "So many jobs are waiting that no more are accepted. Try again.", headers={"Retry-After": "5"})
        except ExecutorShutdown:
            refuse(503, "This process ends and accepts no more jobs. Try again.", headers={"Retry-After": "5"})

    def _accepted(self, job: Job) -> WSGIResponse:
        answer = document_answer(request, self.describer(job)(job), 202)
        answer.headers["Location"] = self._url("job", id=job.id)
        return answer

    def _accepted_of(self, job: Job) -> WSGIResponse:
        """The same of a job that may be somebody else's: whoever may only act on it is told no more."""
        return self._accepted(job) if _allows(self.may, "status", job) else Response(status=202)

    def retry(self, id: str) -> WSGIResponse:
        """``POST /<id>/retry``: start a job again that was started here, and has not succeeded.

        The job of somebody else is started without the current request and session: what it does is not to be done
        with the rights of whoever has pressed a button.
        """
        self.check_origin()
        job = self.find("retry", id)
        started = self._started(job)
        if started is None:
            refuse(
                409,
                "Only a job that was started here, with arguments of moderate size, and has ended other than by "
                "success can be started again.",
            )
        if job.owner is not None and job.owner == self._known_owner():
            return self.start(started["name"], started["arguments"])
        kwargs = self._checked(started["name"], started["arguments"])
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        again = partial(self._submit, started["name"], started["arguments"], kwargs, job.owner)
        return self._accepted_of(Context().run(_in_app_context, app, again))

    def _started(self, job: Job) -> dict[str, Any] | None:
        """Name and arguments of a job that can be started again."""
        text = job.meta.get(_STARTED)
        if text is None or not job.status.retryable:
            return None
        started: dict[str, Any] = json.loads(text)
        return started if started["name"] in self.exposed else None

    # ---- one job ----

    def describer(self, job: Job | None = None) -> Callable[[Job], dict[str, Any]]:
        """What makes the status document of a job, with the urls of what the current request may do with it.

        :param job: the only one that it is for: then it can also be used when the request is over.
        """
        base, jobs, permit = self._url("index"), self.jobs, self._permit()
        allowed = None if job is None else self._allowed(job)
        token = quote(request.args.get("permit", ""), safe="")

        def describe(job: Job) -> dict[str, Any]:
            may = self._allowed(job) if allowed is None else allowed
            itself = f"{base}{job.id}"
            permitted = f"?permit={token}" if permit is not None and permit.id == job.id else ""
            links = {"self": itself + permitted, "events": f"{itself}/events{permitted}"} if "status" in may else {}
            if "log" in may:
                links["log"] = f"{itself}/log"
            if "stop" in may and not job.status.ended:
                links["stop"] = itself
            if "result" in may and job.status is JobStatus.SUCCEEDED:
                links["result"] = f"{itself}/result{permitted}"
            if "retry" in may and self._started(job) is not None:
                links["retry"] = f"{itself}/retry"
            return {**jobs.describe(job), "links": links}

        return describe

    def _allowed(self, job: Job) -> set[str]:
        return {action for action in _ACTIONS if _allows(self.may, action, job)}

    def job(self, id: str) -> WSGIResponse:
        """``GET /<id>``: how a job stands, as a document, or as a page."""
        job = self.find("status", id)
        if wanted(request) != HTML:
            return status_response(request, self._reader(job), self.jobs.places)
        page = render_job_page(self.jobs, self.describer(job)(job), turn=False, action=self._url("job", id=id))
        answer = Response(page, mimetype=HTML)
        answer.headers["Cache-Control"] = "no-store"
        answer.vary.add("Accept")
        return answer

    def events(self, id: str) -> WSGIResponse:
        """``GET /<id>/events``: the same as it goes on, as server-sent events."""
        job = self.find("status", id)
        return status_response(request, self._reader(job), self.jobs.places, as_events=True)

    def _reader(self, job: Job) -> Callable[[], Mapping[str, Any] | None]:
        """Reads the status document, also when the request is over."""
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
            return nothing()
        return self._accepted_of(self.executor.jobs.get(id) or job)

    def act(self, id: str) -> WSGIResponse:
        """``POST /<id>``: what the buttons of the job's page do."""
        self.check_origin()
        do = {"stop": self.stop, "retry": self.retry}.get(read_form(request).get("action", ""))
        if do is None:
            refuse(400, "The action is missing: it must be 'stop' or 'retry'.")
        answer = do(id)
        if wanted(request) != HTML:
            return answer
        return redirect(answer.headers.get("Location", self._url("job", id=id)), 303)

    def result(self, id: str) -> WSGIResponse:
        """``GET /<id>/result``: what it has returned."""
        job = self.find("result", id)
        if not job.status.ended:
            refuse(409, f"The job has not ended: it is {job.status}.", headers={"Retry-After": "1"}, job=job.status)
        if job.status is not JobStatus.SUCCEEDED:
            refuse(409, f"The job has no result: its status is {job.status}.", job=job.status)
        future = self.jobs.handle(id)
        try:
            result = None if future is None else future.result(timeout=1)  # it comes a moment after the status
        except concurrent.futures.TimeoutError:
            refuse(503, "The result is not here yet. Try again.", headers={"Retry-After": "1"})
        except (ResultExpired, UntrustedResult, NotPicklable):
            future = None
        if future is None:
            refuse(410, "The result is not kept any more.")
        try:
            body = current_app.json.dumps(result, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            refuse(406, f"The result is a {type(result).__name__}, which JSON does not have.")
        answer = Response(body, mimetype="application/json")
        answer.headers["Cache-Control"] = "private, no-cache"
        answer.add_etag()
        answer.make_conditional(request)
        return answer

    def log(self, id: str) -> WSGIResponse:
        """``GET /<id>/log``: the last lines that it has logged."""
        job = self.find("log", id)
        with_errors = self.jobs.with_errors or _allows(self._authorizes, "log", job)
        lines = [log_document(line, with_error=with_errors) for line in self.executor.jobs.log(id)]
        return _as_json({"lines": lines})

    # ---- all jobs ----

    def index(self) -> WSGIResponse:
        """``GET /``: the jobs, youngest first; browsers get the dashboard."""
        if wanted(request) == HTML:
            self.require("dashboard")
            return self.dashboard()
        self.require("list")
        try:
            query = Query.parse(request.args)
        except ValueError as error:
            refuse(400, str(error))
        jobs, cursor = list_page(self.executor.jobs, query)
        describe = self.describer()
        documents = [{**describe(job), "owner": job.owner, "started_with": job.meta.get(_STARTED)} for job in jobs]
        following = None if cursor is None else self._url("index", **{**query.given(), "before": cursor})
        return _as_json({"jobs": documents, "next": following})

    def dashboard(self) -> WSGIResponse:
        """The page that shows all jobs, and how the executor is doing."""
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
        return _as_json(overview(self.executor.jobs, health, self.jobs.worker_states()))

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
        """``GET /openapi.json``: all of this, as OpenAPI 3.1 describes it."""
        return _as_json(openapi_document(self._url("index"), list(self.exposed.values())))

    # ---- the work ----

    @property
    def jobs(self) -> Jobs:
        """What acts on the jobs of the executor in the current app."""
        return jobs_of(self.executor)

    def _url(self, endpoint: str, **values: Any) -> str:
        mounted, blueprints = request.blueprint, current_app.blueprints
        if mounted is None or blueprints.get(mounted) is not self:  # called by a view of the app
            mounted = next((name for name, blueprint in blueprints.items() if blueprint is self), None)
        if mounted is None:
            raise RuntimeError(f"the controller {self.name!r} is not mounted in this app: app.register_blueprint(...)")
        return url_within(f"{mounted}.{endpoint}", **values)

    def _route(self, rule: str, endpoint: str, **views: Callable[..., WSGIResponse]) -> None:
        """One url; its answers to other methods, and its errors, are problems too."""
        own = [name for name in ("id", "name") if f"<{name}>" in rule]  # beside those of the prefix
        allowed = sorted({*views, "OPTIONS", *(["HEAD"] if "GET" in views else [])})

        def view(**values: str) -> WSGIResponse:
            if request.method == "OPTIONS":
                return nothing({"Allow": ", ".join(allowed)})
            answer = views.get("GET" if request.method == "HEAD" else request.method)
            if answer is None:
                allow = {"Allow": ", ".join(allowed)}
                return problem(405, f"This url takes {', '.join(allowed)}.", headers=allow)
            with store_or_problem():
                return answer(**{name: values[name] for name in own})

        self.add_url_rule(rule, endpoint, view, methods=_METHODS, provide_automatic_options=False)


_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def _allows(rule: Callable[[str, Job | None], bool], action: str, job: Job | None = None) -> bool:
    """What a rule says, where that only decides what is shown: one that leaves the view says no."""
    try:
        return rule(action, job)
    except HTTPException:
        return False


def _owner_of_session(token: str) -> str:
    """Whose the jobs are of a session. Who sees that in a list cannot make the session of it."""
    return _OF_SESSION + hashlib.blake2b(token.encode(), digest_size=9).hexdigest()


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
    """Whether :meth:`Executor.job <flask_executor.Executor.job>` has made this of a function."""
    return hasattr(fn, "executor") and hasattr(fn, "submit_stored")
