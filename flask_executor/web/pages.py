"""The pages that people see: their templates, scripts and styles, and what their buttons do."""

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
from flask_executor.web.negotiation import HTML, seconds_between_polls, status_response, wanted
from flask_executor.web.problems import nothing, refuse, store_or_problem
from flask_executor.web.same_origin import require_same_origin
from flask_executor.web.tokens import ACT, FOLLOW, JobToken, check_token, sign_permit

_NAME = "flask_executor"
_QUERY = "%/?:@!$&'()*+,;=~"  # what stays as it is in a query, which was encoded already
_JOBS = "flask_executor_jobs"  # in app.extensions: what acts on jobs, by the name of the executor
_JOBS_OF = "flask_executor_jobs_of"  # the same by the executor, as one before may have had the same name
_CONTROLLERS = "flask_executor_controllers"  # in app.extensions: the blueprint's name, by that of the executor


class Jobs(Protocol):
    """What requests need of an executor in one app."""

    @property
    def name(self) -> str:
        """The name of the executor."""

    @property
    def records(self) -> JobRecords:
        """The records of its jobs."""

    def stop_job(self, id: str) -> bool | None:
        """Ask this job to stop; False when it has ended, None when there is none."""

    def release_failed_key(self, id: str) -> bool | None:
        """Free the key of a job that has failed; None when there is none."""

    def document(self, id: str) -> Mapping[str, Any] | None:
        """The status document of a job; None when there is none."""

    def describe(self, job: Job) -> Mapping[str, Any]:
        """The status document of a record."""

    def handle(self, id: str) -> FutureProxy[Any] | None:
        """The handle of a job, if it is kept somewhere."""

    def worker_states(self) -> Sequence[WorkerState]:
        """The workers of this process."""

    @property
    def with_errors(self) -> bool:
        """Whether everybody may see what a job has raised."""

    @property
    def waiting_image(self) -> str | None:
        """Url of an image to show while a job runs."""

    @property
    def places(self) -> WaitSlots:
        """Those of this process for requests that wait."""


def register_pages(app: Flask, executor: Any, jobs: Jobs) -> None:
    """Have an app serve what pages need, and their buttons act on the jobs of an executor."""
    app.extensions.setdefault(_JOBS, {})[jobs.name] = jobs
    app.extensions.setdefault(_JOBS_OF, {})[executor] = jobs
    there = app.blueprints.get(_NAME)
    if there is not None and there.import_name != __name__:
        raise ValueError(f"the app has a blueprint {_NAME!r} already; the pages of this package need that name")
    if there is not None or _has_begun(app):
        return  # too late for new urls; a page will say so
    pages = Blueprint(
        _NAME,
        __name__,
        template_folder="templates",  # behind the app's own, which can replace each of them
        static_folder="static",
        static_url_path="/_executor",
    )
    pages.add_url_rule("/_executor/act", "act", act, methods=["POST"])
    pages.add_url_rule("/_executor/jobs/<token>", "live", live)
    pages.url_defaults(_permit_job)
    app.register_blueprint(pages)


def _has_begun(app: Flask) -> bool:
    return bool(getattr(app, "_got_first_request", False))


def act() -> WSGIResponse:
    """Do what a button of a page says, and go back to the page."""
    require_same_origin(request)
    form = read_form(request)
    permit, jobs = _permitted(ACT, form.get("token", ""))
    action = form.get("action", "")
    do = {"stop": jobs.stop_job, "retry": jobs.release_failed_key}.get(action)
    if do is None:
        refuse(400, "The action is missing: it must be 'stop' or 'retry'.")
    with store_or_problem():
        done = do(permit.id)
    if wanted(request) == HTML:
        return redirect(permit.page, 303)
    if done is None and action == "stop":  # else the key is free, as it should be
        refuse(404, "This job is not known here (any more).")
    return Response(status=202) if done else nothing()


def live(token: str) -> WSGIResponse:
    """How the job stands that a page shows."""
    permit, jobs = _permitted(FOLLOW, token)
    with store_or_problem():
        return status_response(request, lambda: jobs.document(permit.id), jobs.places)


def _permit_job(endpoint: str, values: dict[str, Any]) -> None:
    """In templates, ``url_for("flask_executor.live", job=job)``: give whoever sees the url the permit to use it.

    A function of our own among Jinja's globals would need the app's Jinja environment, which is not to be made before
    the app has set its options.

    :param values: with the record, handle or status document of a job.
    :raises RuntimeError: when no executor of this app knows the job.
    """
    job = values.pop("job", None)
    if job is None:
        return
    id = job["id"] if isinstance(job, Mapping) else getattr(job, "job_id", None) or job.id
    executors: Mapping[str, Jobs] = current_app.extensions[_JOBS]
    for name, jobs in executors.items():
        if len(executors) == 1 or jobs.document(id) is not None:
            values["token"] = sign_permit(current_app, FOLLOW, JobToken(executor=name, id=id))
            return
    raise RuntimeError(f"job {id} cannot be followed: no executor of this app knows it")


def _permitted(what: str, token: str) -> tuple[JobToken, Jobs]:
    permit = check_token(current_app, what, token)
    jobs = None if permit is None else current_app.extensions[_JOBS].get(permit.executor)
    if permit is None or jobs is None:
        refuse(
            403,
            "This page is too old, or it was made by a process with another SECRET_KEY. Load it again; "
            "all processes of an app need the same key.",
        )
    return permit, jobs


def render_job_page(jobs: Jobs, document: Mapping[str, Any], *, turn: bool, action: str | None = None) -> str:
    """The page that shows how a job goes on, at the url of the request.

    :param document: the job's status document.
    :param turn: whether the page becomes another one when the job has succeeded: what the view will return then.
    :param action: where the buttons lead; by default to where they are allowed what this page may.
    """
    if _NAME not in current_app.blueprints:
        raise RuntimeError(
            "The page that waits needs urls for its script and style, and the app had answered its first request "
            "before init_app(app) was called: call it earlier, where the app is made."
        )
    page = _path_of(request)
    permit = JobToken(executor=jobs.name, id=document["id"], page=page)
    return render_template(
        "flask_executor/waiting.html",
        job=document,
        url=page,
        turn=turn,
        action=action or url_for(f"{_NAME}.act"),
        token="" if action else sign_permit(current_app, ACT, permit),
        image=jobs.waiting_image,
        refresh=None if document["ended"] else seconds_between_polls(document) + 1,
        translate=translator(),
    )


def _path_of(request: Request) -> str:
    """The url of a request without the host, as a browser has it."""
    # With one slash only in front, and none of what browsers take for one: two would lead to another site.
    path = "/" + quote(f"{request.root_path}{request.path}".lstrip("/"), safe="/:@!$&'()*+,;=~")
    query = quote(request.query_string, safe=_QUERY)
    return f"{path}?{query}" if query else path


def translator() -> Callable[[str], str]:
    """What translates a text: the app's ``gettext``, as Flask-Babel has it, or nothing."""
    return cast("Callable[[str], str]", current_app.jinja_env.globals.get("gettext", str))


def jobs_of(executor: Any) -> Jobs:
    """What acts on the jobs of an executor in the current app."""
    jobs: Jobs = current_app.extensions[_JOBS_OF][executor]
    return jobs


# ---- controllers ----


def register_controller(app: Flask, executor_name: str, blueprint_name: str, owner: Callable[[], str]) -> None:
    """Remember under which name the controller of an executor is mounted; the first one counts.

    :param owner: tells whose the jobs are that the current request starts.
    """
    app.extensions.setdefault(_CONTROLLERS, {}).setdefault(executor_name, (blueprint_name, owner))


def url_within(endpoint: str, **values: Any) -> str:
    """A url, where a variable of the prefix that a controller is mounted under has the value of the current url."""
    expects = partial(current_app.url_map.is_endpoint_expecting, endpoint)
    around = {name: value for name, value in (request.view_args or {}).items() if expects(name)}
    return url_for(endpoint, **{**around, **values})


def controller_name(executor_name: str) -> str | None:
    """Under which name the controller of an executor is mounted; None without a controller."""
    found = current_app.extensions.get(_CONTROLLERS, {}).get(executor_name)
    return None if found is None else found[0]


def job_owner(executor_name: str) -> str | None:
    """Whose the jobs are that the current request starts, as the controller has it; None without a controller."""
    found = current_app.extensions.get(_CONTROLLERS, {}).get(executor_name)
    return None if found is None else found[1]()
