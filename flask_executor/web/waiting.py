"""``result_or_202``: the result of a job, or an answer that says how the job stands."""

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
    preferred_type,
    preferred_wait,
    status_response,
)
from flask_executor.web.pages import JobsView, controller_name, job_owner, render_job_page, url_within
from flask_executor.web.problems import store_or_problem
from flask_executor.web.tokens import SHOW, JobToken, sign_token

T = TypeVar("T")
R = TypeVar("R", bound=WSGIResponse)


def require_request() -> None:
    """Check that there is a request to answer.

    :raises RuntimeError: if there is none.
    """
    if not has_request_context():
        raise RuntimeError(
            "result_or_202() answers a request, and there is none here: in a view it can be used, elsewhere use "
            "submit_once(...).result()"
        )


@contextmanager
def store_errors_as_503() -> Iterator[None]:
    """Leave the view with a 503 if the store is unavailable. For browsers the error is left to the app's own handlers.

    :raises HTTPException: the 503.
    """
    with nullcontext() if preferred_type(request) == HTML else store_or_problem():
        yield


def is_retry_request() -> bool:
    """If true, the request runs a failed job again: a POST does, loading a page once more does not."""
    return request.method not in ("GET", "HEAD")


def result_or_answer(jobs: JobsView, future: FutureProxy[T]) -> T:
    """The result of a job that has succeeded; otherwise leave the view with an answer that says how the job stands.

    :raises HTTPException: the answer; its cause is the exception of the job. It has no code, so that no error handler
        of the app takes it for an error.
    """
    if preferred_type(request) in (DOCUMENT, EVENTS) and not is_retry_request():
        if _asks_for_later_job(jobs, future):
            return future.result()
        abort(_status_answer(jobs, future))
    seconds = 0.0 if future.done() else preferred_wait(request)
    if seconds:
        slot = jobs.wait_slots.acquire(multithreaded=is_multithreaded(request))
        if slot is not None:
            try:
                wait([future], seconds)
            finally:
                slot.release()
    job = future.record()
    if job.status is JobStatus.SUCCEEDED:
        return future.result()  # it may arrive a moment after the record
    raise HTTPException(response=_answer(jobs, job)) from _error(future)


def _asks_for_later_job(jobs: JobsView, future: FutureProxy[Any]) -> bool:
    """If true, this job has succeeded, and the page asks for a later one of several that the view waits for in turn."""
    asked_for = request.headers.get("Executor-Job")
    if asked_for in (None, future.job_id) or future.status is not JobStatus.SUCCEEDED:
        return False
    job = jobs.records.get(asked_for)
    return job is not None and job.key != future.key  # the same key: an earlier run of this very job


def _status_answer(jobs: JobsView, future: FutureProxy[Any]) -> Response:
    """The answer to the script of a page: the status, also after the end, and never the rest of the view."""
    id = future.job_id

    def read() -> Mapping[str, Any] | None:
        return jobs.document(id)

    return _no_store(status_response(request, read, jobs.wait_slots))


def _answer(jobs: JobsView, job: Job) -> WSGIResponse:
    """The answer about a job that has no result, or none yet."""
    document = jobs.describe(job)
    as_html = preferred_type(request) == HTML
    if is_retry_request():
        return _redirect_to_job_page(jobs, job, document, as_html=as_html)
    status = _http_status(job)
    if as_html:
        page = render_job_page(jobs, document, turn=True)
        answer = Response(page, status, mimetype=HTML)
        answer.vary.add("Accept")
    else:
        answer = document_answer(request, document, status)
    return _no_store(answer)


def _error(future: FutureProxy[Any]) -> BaseException | None:
    """The exception of a job that has ended. It is logged too, because few views look at the cause of the answer."""
    if not future.done():
        return None
    future.report()
    try:
        return future.exception()
    except CancelledError as cancelled:
        return cancelled


def _http_status(job: Job) -> int:
    """The HTTP status for a job without a result: 202 before its end, 500 if it failed, 409 if it was stopped."""
    if not job.status.ended:
        return 202
    return 500 if job.status.failed else 409


def _redirect_to_job_page(jobs: JobsView, job: Job, document: Mapping[str, Any], *, as_html: bool) -> WSGIResponse:
    """The answer to a form: lead to the job's page, which can be loaded again without sending the form once more."""
    controller = controller_name(jobs.name)
    if controller is None:
        raise RuntimeError(
            f"result_or_202() in answer to a {request.method} leads to the page of the job, and there is none: mount "
            "a Controller (app.register_blueprint(Controller(executor))), or start the job with submit_once() and "
            "redirect to a view that takes GET and calls result_or_202()"
        )
    own = job.owner is not None and job.owner == job_owner(jobs.name)
    # If another user has started the job: the view lets this request see it, so the url carries a token.
    token = sign_token(current_app, SHOW, JobToken(executor=jobs.name, id=document["id"]))
    url = url_within(f"{controller}.job", id=document["id"], permit=None if own else token)
    if as_html:
        return _no_store(redirect(url, 303))
    answer = document_answer(request, document, 202)
    answer.headers["Location"] = url
    return _no_store(answer)


def _no_store(answer: R) -> R:
    answer.headers["Cache-Control"] = "no-store"
    return answer
