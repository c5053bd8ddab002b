"""The controller's urls as `OpenAPI 3.1 <https://spec.openapis.org/oas/v3.1.0>`_ describes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from flask_executor.jobs.model import JobStatus
from flask_executor.web.arguments import ExposedFunction
from flask_executor.web.listing import MAX_PAGE_SIZE
from flask_executor.web.negotiation import DOCUMENT, EVENTS, HTML, JSON
from flask_executor.web.problems import MIMETYPE as PROBLEM
from flask_executor.web.status import job_schema

Schema = dict[str, Any]


def openapi_document(base: str, exposed: Iterable[ExposedFunction]) -> Schema:
    """The OpenAPI document of a controller.

    :param base: the url of its list of jobs.
    :param exposed: the functions that can be started.
    """
    job = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    paths: dict[str, Schema] = {
        "/": {"get": _list()},
        "/overview": {"get": _operation("overview", "Counts, durations and workers", {200: {"type": "object"}}, 403)},
        "/health": {"get": _health()},
        "/openapi.json": {"get": _operation("openapi", "This document", {200: {"type": "object"}})},
        "/{id}": {"parameters": [job], "get": _status(), "delete": _stop(), "post": _act()},
        "/{id}/result": {"parameters": [job], "get": _result()},
        "/{id}/log": {"parameters": [job], "get": _log()},
        "/{id}/events": {"parameters": [job], "get": _events()},
        "/{id}/retry": {"parameters": [job], "post": _retry()},
    }
    schemas: dict[str, Schema] = {"Job": job_schema(), "Problem": _PROBLEM, "Overview": {"type": "object"}}
    for number, function in enumerate(exposed):
        models = f"run{number}."  # models of two functions may have the same name
        schema = dict(function.parameters.schema(f"#/components/schemas/{models}"))
        schemas.update((f"{models}{name}", model) for name, model in schema.pop("$defs", {}).items())
        paths[f"/run/{quote(function.name)}"] = {"post": _run(function.name, schema)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Jobs", "version": "1"},
        "servers": [{"url": base.rstrip("/") or "/"}],
        "paths": paths,
        "components": {"schemas": schemas},
    }


_TEXT: Schema = {"type": ["string", "null"]}
_PROBLEM: Schema = {
    "type": "object",
    "description": "RFC 9457",
    "properties": {"title": {"type": "string"}, "status": {"type": "integer"}, "detail": {"type": "string"}},
    "required": ["title", "status", "detail"],
}
_JOB_REF: Schema = {"$ref": "#/components/schemas/Job"}
_DESCRIPTIONS = {
    200: "Success.",
    202: "Accepted.",
    204: "Nothing to do.",
    303: "See the other url.",
    304: "Not modified.",
    400: "The request cannot be read.",
    403: "Not allowed, or asked for by a page of another site.",
    404: "Not found, or it belongs to another owner.",
    406: "Not available in this format.",
    409: "The job does not have the status that this needs.",
    410: "The record has expired.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "The arguments do not fit.",
    503: "Not available now; try again.",
}


def _operation(
    name: str, summary: str, good: Mapping[int, Schema | None], *bad: int, types: Iterable[str] = (JSON,)
) -> Schema:
    responses: dict[str, Schema] = {}
    for status, schema in good.items():
        responses[str(status)] = {"description": _DESCRIPTIONS[status]}
        if schema is not None:
            responses[str(status)]["content"] = {mimetype: {"schema": schema} for mimetype in types}
    for status in (*bad, 503):
        content = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        responses.setdefault(str(status), {"description": _DESCRIPTIONS[status], "content": content})
    return {"operationId": name, "summary": summary, "responses": responses}


def _parameter(name: str, schema: Schema, description: str, place: str = "query") -> Schema:
    return {"name": name, "in": place, "required": False, "schema": schema, "description": description}


def _list() -> Schema:
    page = {
        "type": "object",
        "properties": {"jobs": {"type": "array", "items": _JOB_REF}, "next": _TEXT},
        "required": ["jobs", "next"],
    }
    operation = _operation("list", "Jobs, youngest first", {200: page, 304: None}, 400, 403)
    operation["responses"]["200"]["content"][HTML] = {"schema": {"type": "string"}}
    text: Schema = {"type": "string"}
    operation["parameters"] = [
        _parameter("status", {"enum": [status.value for status in JobStatus]}, "only jobs with this status"),
        _parameter("name", text, "only jobs of this name"),
        _parameter("owner", text, "only jobs of this owner"),
        _parameter("key", text, "only the jobs with this key"),
        _parameter("q", text, "only jobs with this text in name, key, owner or id"),
        _parameter(
            "limit", {"type": "integer", "minimum": 1, "maximum": MAX_PAGE_SIZE, "default": 50}, "how many jobs at most"
        ),
        _parameter(
            "before",
            {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?-[0-9a-f]*$"},
            "the cursor from the url in next",
        ),
    ]
    return operation


def _status() -> Schema:
    operation = _operation(
        "status", "The status of a job", {200: _JOB_REF, 304: None}, 404, 410, types=(JSON, DOCUMENT)
    )
    for other in HTML, EVENTS:
        operation["responses"]["200"]["content"][other] = {"schema": {"type": "string"}}
    wait = "wait=N: answer when something has changed, after N seconds (30 at most) at the latest (RFC 7240)"
    operation["parameters"] = [_parameter("Prefer", {"type": "string"}, wait, "header")]
    return operation


def _stop() -> Schema:
    types = (JSON, DOCUMENT)
    return _operation("stop", "Ask a job to stop", {202: _JOB_REF, 204: None}, 403, 404, 410, types=types)


def _act() -> Schema:
    good = {202: _JOB_REF, 204: None, 303: None}
    operation = _operation("act", "What the buttons of a job's page do", good, 400, 403, 404, 409, 410, 422)
    operation["responses"]["202"]["content"][DOCUMENT] = {"schema": _JOB_REF}
    form = {"type": "object", "properties": {"action": {"enum": ["stop", "retry"]}}, "required": ["action"]}
    operation["requestBody"] = {"content": {"application/x-www-form-urlencoded": {"schema": form}}, "required": True}
    return operation


def _result() -> Schema:
    return _operation("result", "What a job has returned", {200: {}, 304: None}, 404, 406, 409, 410)


def _log() -> Schema:
    line = {"type": "object", "properties": dict.fromkeys(("time", "level", "logger", "text"), _TEXT)}
    log = {"type": "object", "properties": {"lines": {"type": "array", "items": line}}, "required": ["lines"]}
    return _operation("log", "The last lines that a job has logged", {200: log, 304: None}, 404, 410)


def _events() -> Schema:
    operation = _operation("events", "The status of a job as server-sent events", {200: None, 304: None}, 404, 410)
    operation["responses"]["200"]["content"] = {
        EVENTS: {"schema": {"type": "string"}},
        JSON: {"schema": _JOB_REF},
        DOCUMENT: {"schema": _JOB_REF},
    }
    again = "the id of the last event that was seen"
    operation["parameters"] = [_parameter("Last-Event-ID", {"type": "string"}, again, "header")]
    return operation


def _retry() -> Schema:
    types = (JSON, DOCUMENT)
    return _operation("retry", "Start a job again", {202: _JOB_REF}, 403, 404, 409, 410, 422, types=types)


def _run(name: str, schema: Schema) -> Schema:
    types = (JSON, DOCUMENT)
    operation = _operation(f"run_{name}", f"Start {name}", {202: _JOB_REF}, 400, 403, 404, 413, 415, 422, types=types)
    location = {"schema": {"type": "string"}, "description": "the job"}
    operation["responses"]["202"]["headers"] = {"Location": location}
    operation["requestBody"] = {"content": {JSON: {"schema": schema}}, "required": bool(schema.get("required"))}
    return operation


def _health() -> Schema:
    health = {
        "type": "object",
        "properties": {"status": {"enum": ["ok", "unavailable"]}},
        "required": ["status"],
    }
    return _operation("health", "Whether jobs are accepted", {200: health, 503: health})
