"""Content negotiation: the status of a job as JSON, after a long poll, or as a stream of events."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from flask import Request, Response

from flask_executor.web.events import Read, WaitSlots, events, wait_for_change
from flask_executor.web.problems import no_content, problem
from flask_executor.web.status import document_version

HTML = "text/html"
JSON = "application/json"
EVENTS = "text/event-stream"
#: What the script of a page accepts: the status of the job, and never the answer of the view behind it.
DOCUMENT = "application/vnd.flask-executor.job+json"

_MAX_WAIT = 30.0  # seconds, of ``Prefer: wait=N``
_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?=[,;]|$)", re.IGNORECASE)


def preferred_type(request: Request) -> str:
    """The media type to answer with; JSON if the client has no preference, for browsers do have one."""
    return request.accept_mimetypes.best_match([JSON, DOCUMENT, HTML, EVENTS], JSON)


def preferred_wait(request: Request) -> float:
    """Seconds of ``Prefer: wait=N`` (`RFC 7240 <https://www.rfc-editor.org/rfc/rfc7240>`_), at most 30; 0 without."""
    found = _WAIT.search(",".join(request.headers.getlist("Prefer")))
    return 0.0 if found is None else min(float(found[1]), _MAX_WAIT)


def is_multithreaded(request: Request) -> bool:
    """If true, the server handles other requests in this process while this one waits."""
    return bool(request.environ.get("wsgi.multithread"))


def status_response(request: Request, read: Read, slots: WaitSlots, *, as_events: bool = False) -> Response:
    """The status of a job, as the client prefers it: a stream of events if a slot is free, else the document.

    :param read: reads the status document; a stream calls it after the request context has gone.
    :param as_events: If true, a client that accepts both gets a stream.
    """
    if request.method == "GET" and (preferred_type(request) == EVENTS or (as_events and _accepts(request, EVENTS))):
        last = request.headers.get("Last-Event-ID")
        if last is not None and _is_final(read(), last):
            return no_content()  # by the HTML standard this ends the client's attempts to reconnect
        slot = slots.acquire(multithreaded=is_multithreaded(request))
        if slot is not None:
            answer = Response(events(read, last), mimetype=EVENTS)
            answer.call_on_close(slot.release)
            answer.headers["Cache-Control"] = "no-store"
            answer.headers["X-Accel-Buffering"] = "no"  # otherwise nginx buffers the stream
            answer.vary.add("Accept")
            return answer
        if not (_accepts(request, DOCUMENT) or _accepts(request, JSON)):
            detail = "This process holds as many event streams as it may. Ask again, or for the document as JSON."
            return problem(503, detail, headers={"Retry-After": "2"})
    document, has_waited = _long_poll(request, read, slots)
    if document is None:
        return problem(410, "The record of this job has expired.")
    answer = document_answer(request, document)
    if has_waited:
        answer.headers["Preference-Applied"] = "wait"
    return answer


def _is_final(document: Mapping[str, Any] | None, last: str) -> bool:
    """If true, the job has ended, and the client has seen the last version of its document."""
    return document is not None and document["ended"] and document_version(document) == last


def _accepts(request: Request, mimetype: str) -> bool:
    return not request.accept_mimetypes or bool(request.accept_mimetypes[mimetype])


def _long_poll(request: Request, read: Read, slots: WaitSlots) -> tuple[Mapping[str, Any] | None, bool]:
    """Wait for a new version of the document, for as long as the client prefers.

    :return: the document, and whether the request has waited.
    """
    seconds = preferred_wait(request)
    slot = slots.acquire(multithreaded=is_multithreaded(request)) if seconds and request.method == "GET" else None
    if slot is None:
        return read(), False
    try:
        known = next(iter(request.if_none_match.as_set(include_weak=True)), None)
        return wait_for_change(read, known, seconds), True
    finally:
        slot.release()


def document_answer(request: Request, document: Mapping[str, Any], status: int = 200) -> Response:
    """A status document with ``ETag`` and ``Retry-After``; a 304 if the client has this version already."""
    mimetype = DOCUMENT if preferred_type(request) in (DOCUMENT, EVENTS) else JSON
    answer = Response(json.dumps(document), status, mimetype=mimetype)
    answer.headers["Cache-Control"] = "private, no-cache"
    answer.vary.add("Accept")
    answer.set_etag(document_version(document), weak=True)
    if not document["ended"]:
        answer.headers["Retry-After"] = str(seconds_between_polls(document))
    if status < 300:  # RFC 9110, 13.2.1: conditions apply to successful answers only
        answer.make_conditional(request)
    return answer


def seconds_between_polls(document: Mapping[str, Any]) -> int:
    """Whole seconds after which to ask again: the longer a job has run, the less likely it ends in the next second."""
    elapsed = document["elapsed"] or 0.0
    return 1 if elapsed < 15 else 2 if elapsed < 120 else 5
