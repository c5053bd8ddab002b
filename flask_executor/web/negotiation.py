"""Answers that say how a job stands: once, later, or as it goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from flask import Request, Response

from flask_executor.web.events import Read, WaitSlots, events, hold
from flask_executor.web.problems import nothing, problem
from flask_executor.web.status import document_version

HTML = "text/html"
JSON = "application/json"
EVENTS = "text/event-stream"
#: What a page asks for that wants to know how the job stands, and not what came of it.
DOCUMENT = "application/vnd.flask-executor.job+json"

_MOST_WAIT = 30.0  # seconds, of ``Prefer: wait=N``
_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?=[,;]|$)", re.IGNORECASE)


def wanted(request: Request) -> str:
    """The media type to answer with; JSON for a client that has no preference, as browsers do have one."""
    return request.accept_mimetypes.best_match([JSON, DOCUMENT, HTML, EVENTS], JSON)


def preferred_wait(request: Request) -> float:
    """The seconds that the client would wait (`RFC 7240 <https://www.rfc-editor.org/rfc/rfc7240>`_), at most 30."""
    found = _WAIT.search(",".join(request.headers.getlist("Prefer")))
    return 0.0 if found is None else min(float(found[1]), _MOST_WAIT)


def is_multithreaded(request: Request) -> bool:
    """Whether the server handles other requests of this process while one waits."""
    return bool(request.environ.get("wsgi.multithread"))


def status_response(request: Request, read: Read, places: WaitSlots, *, as_events: bool = False) -> Response:
    """The status document, or a stream of them: what the client asks for, and there is room for.

    :param read: reads the document, also when the request is over.
    :param as_events: whether this url gives streams, where the client has no other wish.
    """
    if request.method == "GET" and (wanted(request) == EVENTS or (as_events and _takes(request, EVENTS))):
        last = request.headers.get("Last-Event-ID")
        if last is not None and _is_the_end(read(), last):
            return nothing()  # by which the standard tells a client not to ask again
        place = places.take(multithreaded=is_multithreaded(request))
        if place is not None:
            answer = Response(events(read, last), mimetype=EVENTS)
            answer.call_on_close(place.give_back)
            answer.headers["Cache-Control"] = "no-store"
            answer.headers["X-Accel-Buffering"] = "no"  # or nginx would collect it
            answer.vary.add("Accept")
            return answer
        if not (_takes(request, DOCUMENT) or _takes(request, JSON)):
            detail = "This process holds as many event streams as it may. Ask again, or for the document as JSON."
            return problem(503, detail, headers={"Retry-After": "2"})
    document, waited = _held(request, read, places)
    if document is None:
        return problem(410, "The record of this job has expired.")
    answer = document_answer(request, document)
    if waited:
        answer.headers["Preference-Applied"] = "wait"
    return answer


def _is_the_end(document: Mapping[str, Any] | None, last: str) -> bool:
    """Whether a client has seen all there is."""
    return document is not None and document["ended"] and document_version(document) == last


def _takes(request: Request, mimetype: str) -> bool:
    return not request.accept_mimetypes or bool(request.accept_mimetypes[mimetype])


def _held(request: Request, read: Read, places: WaitSlots) -> tuple[Mapping[str, Any] | None, bool]:
    """The document, when there is news or the time is over that the client would wait; whether it was waited."""
    seconds = preferred_wait(request)
    place = places.take(multithreaded=is_multithreaded(request)) if seconds and request.method == "GET" else None
    if place is None:
        return read(), False
    try:
        return hold(read, next(iter(request.if_none_match.as_set(include_weak=True)), None), seconds), True
    finally:
        place.give_back()


def document_answer(request: Request, document: Mapping[str, Any], status: int = 200) -> Response:
    """A status document, with what a client needs to ask again; 304 if it has not changed."""
    mimetype = DOCUMENT if wanted(request) in (DOCUMENT, EVENTS) else JSON
    answer = Response(json.dumps(document), status, mimetype=mimetype)
    answer.headers["Cache-Control"] = "private, no-cache"
    answer.vary.add("Accept")
    answer.set_etag(document_version(document), weak=True)
    if not document["ended"]:
        answer.headers["Retry-After"] = str(seconds_between_polls(document))
    if status < 300:  # RFC 9110, 13.2.1: others are what they are
        answer.make_conditional(request)
    return answer


def seconds_between_polls(document: Mapping[str, Any]) -> int:
    """Whole seconds after which to ask again: a job that has run for long is not over in the next second."""
    elapsed = document["elapsed"] or 0.0
    return 1 if elapsed < 15 else 2 if elapsed < 120 else 5
