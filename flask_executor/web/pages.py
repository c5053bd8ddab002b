"""The pages for browsers: their blueprint with templates, scripts and styles, and what their buttons do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast
from urllib.parse import quote

from flask import Blueprint, Flask, Request, Response, current_app, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as WSGIResponse

from flask_executor.abc import JobRecords, WorkerState
from flask_executor.futures import FutureProxy
from flask_executor.jobs.model import Job
from flask_executor.web.body import read_form
from flask_executor.web.events import WaitSlots
from flask_executor.web.negotiation import HTML, preferred_type, seconds_between_polls, status_response
from flask_executor.web.problems import abort_with_problem, no_content, store_or_problem
from flask_executor.web.same_origin import require_same_origin
from flask_executor.web.tokens import ACT, FOLLOW, JobToken, check_token, sign_token

_NAME = "flask_executor"
_SAFE_IN_QUERY = "%/?:@!$&'()*+,;=~"  # not to be quoted; the query has been encoded already
_JOBS = "flask_executor_jobs"  # in app.extensions: the JobsView of each executor, by its name
_JOBS_OF = "flask_executor_jobs_of"  # the same by executor, because two may have had the same name
_CONTROLLERS = "flask_executor_controllers"  # in app.extensions: name and owner() of each executor's controller


class JobsView(Protocol):
    """The jobs of an executor in one app, as requests see them.

    A port: :class:`flask_executor.executor.jobs_view.AppJobs` implements it, which this layer does not import.
    """

    @property
    def name(self) -> str:
        """The name of the executor."""

    @property
    def records(self) -> JobRecords:
        """The records of its jobs."""

    def stop_job(self, id: str) -> bool | None:
        """Ask a job to stop; False if it has ended, None if it is unknown."""

    def release_failed_key(self, id: str) -> bool | None:
        """Free the key of a job that has ended without success; None if the job is unknown."""

    def document(self, id: str) -> Mapping[str, Any] | None:
        """The status document of a job; None if it is unknown."""

    def describe(self, job: Job) -> Mapping[str, Any]:
        """The status document of a record."""

    def handle(self, id: str) -> FutureProxy[Any] | None:
        """The handle of a job; None if there is none any more."""

    def worker_states(self) -> Sequence[WorkerState]:
        """The workers of this process."""

    @property
    def with_errors(self) -> bool:
        """If true, everybody may see the exceptions of jobs."""

    @property
    def waiting_image(self) -> str | None:
        """The url of the image on the waiting page."""

    @property
    def wait_slots(self) -> WaitSlots:
        """The slots of this process for requests that wait."""


def register_pages(app: Flask, executor: Any, jobs: JobsView) -> None:
    """Register the blueprint of the pages in an app, and the jobs of an executor for their buttons.

    :raises ValueError: if the app has another blueprint of that name.
    """
    app.extensions.setdefault(_JOBS, {})[jobs.name] = jobs
    app.extensions.setdefault(_JOBS_OF, {})[executor] = jobs
    registered = app.blueprints.get(_NAME)
    if registered is not None and registered.import_name != __name__:
        raise ValueError(f"the app has a blueprint {_NAME!r} already; the pages of this package need that name")
    if registered is not None or _has_answered(app):
        return  # too late to add urls; render_job_page() raises the error
    pages = Blueprint(
        _NAME,
        __name__,
        template_folder="templates",  # the app's own templates come first, so that it can replace each of them
        static_folder="static",
        static_url_path="/_executor",
    )
    pages.add_url_rule("/_executor/act", "act", act, methods=["POST"])
    pages.add_url_rule("/_executor/jobs/<token>", "live", status)
    pages.url_defaults(_token_of_job)
    app.register_blueprint(pages)


def _has_answered(app: Flask) -> bool:
    return bool(getattr(app, "_got_first_request", False))


def act() -> WSGIResponse:
    """The answer to a button of a page: stop the job or free its key, and go back to the page."""
    require_same_origin(request)
    form = read_form(request)
    token, jobs = _checked(ACT, form.get("token", ""))
    action = form.get("action", "")
    do = {"stop": jobs.stop_job, "retry": jobs.release_failed_key}.get(action)
    if do is None:
        abort_with_problem(400, "The action is missing: it must be 'stop' or 'retry'.")
    with store_or_problem():
        done = do(token.id)
    if preferred_type(request) == HTML:
        return redirect(token.page, 303)
    if done is None and action == "stop":  # the key of an unknown job is free, which is what a retry needs
        abort_with_problem(404, "This job is not known here (any more).")
    return Response(status=202) if done else no_content()


def status(token: str) -> WSGIResponse:
    """The status of the job that a bar in a page shows. Its endpoint is ``flask_executor.live``."""
    allowed, jobs = _checked(FOLLOW, token)
    with store_or_problem():
        return status_response(request, lambda: jobs.document(allowed.id), jobs.wait_slots)


def _token_of_job(endpoint: str, values: dict[str, Any]) -> None:
    """Make ``url_for("flask_executor.live", job=job)`` in a template a url with a signed token.

    This is a hook of ``url_for`` and not a Jinja global of its own, because adding a global creates the app's Jinja
    environment, and the app may still want to set its options.

    :param values: of the url; its ``job`` is a record, a handle or a status document.
    :raises RuntimeError: if no executor of this app knows the job.
    """
    job = values.pop("job", None)
    if job is None:
        return
    id = job["id"] if isinstance(job, Mapping) else getattr(job, "job_id", None) or job.id
    executors: Mapping[str, JobsView] = current_app.extensions[_JOBS]
    for name, jobs in executors.items():
        if len(executors) == 1 or jobs.document(id) is not None:
            values["token"] = sign_token(current_app, FOLLOW, JobToken(executor=name, id=id))
            return
    raise RuntimeError(f"job {id} cannot be followed: no executor of this app knows it")


def _checked(purpose: str, text: str) -> tuple[JobToken, JobsView]:
    token = check_token(current_app, purpose, text)
    jobs = None if token is None else current_app.extensions[_JOBS].get(token.executor)
    if token is None or jobs is None:
        abort_with_problem(
            403,
            "This page is too old, or it was made by a process with another SECRET_KEY. Load it again; "
            "all processes of an app need the same key.",
        )
    return token, jobs


def render_job_page(jobs: JobsView, document: Mapping[str, Any], *, turn: bool, action: str | None = None) -> str:
    """The page that shows a job at the url of the request.

    :param document: the job's status document.
    :param turn: If true, the page loads itself again when the job has succeeded, to show what the view returns then.
    :param action: the url that the buttons are sent to; by default the one of :func:`act`, with a token for this job.
    :raises RuntimeError: if the executor was bound too late to register the blueprint of the pages.
    """
    if _NAME not in current_app.blueprints:
        raise RuntimeError(
            "The page that waits needs urls for its script and style, and the app had answered its first request "
            "before init_app(app) was called: call it earlier, where the app is made."
        )
    page = _path_of(request)
    token = JobToken(executor=jobs.name, id=document["id"], page=page)
    return render_template(
        "flask_executor/waiting.html",
        job=document,
        url=page,
        turn=turn,
        action=action or url_for(f"{_NAME}.act"),
        token="" if action else sign_token(current_app, ACT, token),
        image=jobs.waiting_image,
        refresh=None if document["ended"] else seconds_between_polls(document) + 1,
        translate=translator(),
    )


def _path_of(request: Request) -> str:
    """Path and query of a request, quoted as in a browser."""
    # Exactly one slash in front, and no backslash: a browser takes //host for another site.
    path = "/" + quote(f"{request.root_path}{request.path}".lstrip("/"), safe="/:@!$&'()*+,;=~")
    query = quote(request.query_string, safe=_SAFE_IN_QUERY)
    return f"{path}?{query}" if query else path


def translator() -> Callable[[str], str]:
    """The app's ``gettext``, as Flask-Babel installs it; without one, texts stay English."""
    return cast("Callable[[str], str]", current_app.jinja_env.globals.get("gettext", str))


def jobs_of(executor: Any) -> JobsView:
    """The jobs of an executor in the current app."""
    jobs: JobsView = current_app.extensions[_JOBS_OF][executor]
    return jobs


# ---- controllers ----


def register_controller(app: Flask, executor_name: str, blueprint_name: str, owner: Callable[[], str]) -> None:
    """Remember under which name the controller of an executor is mounted; if there are several, the first one.

    :param owner: returns the owner of the jobs that the current request starts.
    """
    app.extensions.setdefault(_CONTROLLERS, {}).setdefault(executor_name, (blueprint_name, owner))


def url_within(endpoint: str, **values: Any) -> str:
    """A url of a controller; variables in its ``url_prefix`` have the values of the current url."""
    expects = partial(current_app.url_map.is_endpoint_expecting, endpoint)
    around = {name: value for name, value in (request.view_args or {}).items() if expects(name)}
    return url_for(endpoint, **{**around, **values})


def controller_name(executor_name: str) -> str | None:
    """The name under which the controller of an executor is mounted; None without a controller."""
    found = current_app.extensions.get(_CONTROLLERS, {}).get(executor_name)
    return None if found is None else found[0]


def job_owner(executor_name: str) -> str | None:
    """The owner of jobs that the current request starts, by the controller; None without a controller."""
    found = current_app.extensions.get(_CONTROLLERS, {}).get(executor_name)
    return None if found is None else found[1]()
