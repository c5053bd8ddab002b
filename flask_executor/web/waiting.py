"""The answer to a request whose job has not ended: 202, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from flask import Response, abort, current_app, has_request_context, redirect, request
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WSGIResponse

from flask_executor.futures import FutureProxy
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.web.negotiation import (
    DOCUMENT,
    EVENTS,
    HTML,
    document_answer,
    is_multithreaded,
    preferred_wait,
    status_response,
    wanted,
)
from flask_executor.web.pages import Jobs, controller_name, job_owner, render_job_page, url_within
from flask_executor.web.problems import store_or_problem
from flask_executor.web.tokens import SHOW, JobToken, sign_permit

T = TypeVar("T")
R = TypeVar("R", bound=WSGIResponse)


def require_request() -> None:
    """Refuse to wait where nobody can be answered.

    :raises RuntimeError: saying what to do.
    """
    if not has_request_context():
        raise RuntimeError(
            "result_or_202() answers a request, and there is none here: in a view it can be used, elsewhere use "
            "submit_once(...).result()"
        )


@contextmanager
def store_errors_as_503() -> Iterator[None]:
    """Where the jobs cannot be reached, tell those who can ask again; what browsers see is the app's to say.

    :raises HTTPException: the 503.
    """
    with nullcontext() if wanted(request) == HTML else store_or_problem():
        yield


def is_retry_request() -> bool:
    """Whether the request asks for a new start of what has failed: a POST does, loading a page again does not."""
    return request.method not in ("GET", "HEAD")


def result_or_answer(jobs: Jobs, future: FutureProxy[T]) -> T:
    """What the job returned; if that is not there yet, leave the view with an answer that says how the job stands.

    Errors of the job are part of that answer, and its cause.

    :raises HTTPException: the answer. It has no code, so that no error handler of the app takes it for an error.
    """
    if wanted(request) in (DOCUMENT, EVENTS) and not is_retry_request():
        if _is_for_a_later_one(jobs, future):
            return future.result()
        abort(_report(jobs, future))
    seconds = 0.0 if future.done() else preferred_wait(request)
    if seconds:
        place = jobs.places.take(multithreaded=is_multithreaded(request))
        if place is not None:
            try:
                wait([future], seconds)
            finally:
                place.give_back()
    job = future.record()
    if job.status is JobStatus.SUCCEEDED:
        return future.result()  # which may come a moment later
    raise HTTPException(response=_answer(jobs, job)) from _error(future)


def _is_for_a_later_one(jobs: Jobs, future: FutureProxy[Any]) -> bool:
    """Whether the view waits for several jobs, this one has ended, and the page asks for one behind it."""
    asked_for = request.headers.get("Executor-Job")
    if asked_for in (None, future.job_id) or future.status is not JobStatus.SUCCEEDED:
        return False
    job = jobs.records.get(asked_for)
    return job is not None and job.key != future.key  # else it is this one, as it was before it was tried again


def _report(jobs: Jobs, future: FutureProxy[Any]) -> Response:
    """To a page that asks how the job stands: this, also when it has ended, and never the rest of the view."""
    id = future.job_id

    def read() -> Mapping[str, Any] | None:
        return jobs.document(id)

    return _unstored(status_response(request, read, jobs.places))


def _answer(jobs: Jobs, job: Job) -> WSGIResponse:
    """How a job stands that has no result to go on with."""
    document = jobs.describe(job)
    as_html = wanted(request) == HTML
    if is_retry_request():
        return _redirect_to_job_page(jobs, job, document, as_html=as_html)
    status = _status(job)
    if as_html:
        page = render_job_page(jobs, document, turn=True)
        answer = Response(page, status, mimetype=HTML)
        answer.vary.add("Accept")
    else:
        answer = document_answer(request, document, status)
    return _unstored(answer)


def _error(future: FutureProxy[Any]) -> BaseException | None:
    """What a job has raised that has ended; it stands in the log all the same, as few views look at the cause."""
    if not future.done():
        return None
    future.report()
    try:
        return future.exception()
    except CancelledError as cancelled:
        return cancelled


def _status(job: Job) -> int:
    """The HTTP status that says how a job stands which has no result."""
    if not job.status.ended:
        return 202
    return 500 if job.status.failed else 409


def _redirect_to_job_page(jobs: Jobs, job: Job, document: Mapping[str, Any], *, as_html: bool) -> WSGIResponse:
    """A form was sent: lead to a page that can be loaded again without sending it once more."""
    controller = controller_name(jobs.name)
    if controller is None:
        raise RuntimeError(
            f"result_or_202() in answer to a {request.method} leads to the page of the job, and there is none: mount "
            "a Controller (app.register_blueprint(Controller(executor))), or start the job with submit_once() and "
            "redirect to a view that takes GET and calls result_or_202()"
        )
    own = job.owner is not None and job.owner == job_owner(jobs.name)
    # The job may have been started by somebody else, and the view has let this request see it.
    permit = sign_permit(current_app, SHOW, JobToken(executor=jobs.name, id=document["id"]))
    url = url_within(f"{controller}.job", id=document["id"], permit=None if own else permit)
    if as_html:
        return _unstored(redirect(url, 303))
    answer = document_answer(request, document, 202)
    answer.headers["Location"] = url
    return _unstored(answer)


def _unstored(answer: R) -> R:
    answer.headers["Cache-Control"] = "no-store"
    return answer
