"""The controller does what its OpenAPI document says."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from flask import Flask
from requirements import require

from flask_executor import checkpoint, current_job
from flask_executor.testing.contract.fixtures import MakeExecutor
from flask_executor.web import Controller

pytestmark = pytest.mark.web


def render(month: str, pages: int = 1, format: Literal["pdf", "html"] = "pdf", notes: list[str] | None = None) -> str:
    for page in range(min(pages, 2)):
        current_job.update(progress=page / 2, message=month)
        checkpoint()
    if format == "html":
        raise ValueError(month)
    return month


def anything(**given: Any) -> Any:
    return given


@pytest.fixture
def served(app: Flask, make_executor: MakeExecutor) -> Flask:
    executor = make_executor(max_workers=2, store_max_records=200)
    controller = Controller(executor, authorize=lambda action, job: True)
    controller.expose(render)
    controller.expose(anything, "any thing")
    app.register_blueprint(controller, url_prefix="/jobs")
    return app


def test_the_document_is_valid(served: Flask) -> None:
    require("openapi_spec_validator")
    from openapi_spec_validator import OpenAPIV31SpecValidator

    document = served.test_client().get("/jobs/openapi.json").json
    assert document is not None
    OpenAPIV31SpecValidator(document).validate()
    assert document["servers"] == [{"url": "/jobs"}]
    body = document["paths"]["/run/render"]["post"]["requestBody"]
    assert body["required"] is True
    assert body["content"]["application/json"]["schema"]["required"] == ["month"]


# But the one that gives the document, which schemathesis leaves out.
OPERATIONS = [
    "act",
    "events",
    "health",
    "list",
    "log",
    "overview",
    "result",
    "retry",
    "run_any thing",
    "run_render",
    "status",
    "stop",
]


def test_schemathesis_finds_no_violation(served: Flask) -> None:
    require("schemathesis")
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    client = served.test_client()
    ids = [
        client.post("/jobs/run/render", json={"month": "may", "format": format}).headers["Location"][6:]
        for format in ("pdf", "html")
    ]
    asked = set()
    schema = schemathesis.openapi.from_wsgi("/jobs/openapi.json", served)
    for found in schema.get_all_operations():
        operation = found.ok()  # type: ignore[union-attr]

        @settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            if "id" in case.path_parameters and len(case.path_parameters["id"]) > 1:  # else it is one that is not there
                case.path_parameters["id"] = ids[len(case.path_parameters["id"]) % 2]
            asked.add(case.operation.definition.raw["operationId"])
            response = case.call()
            assert response.status_code < 500
            case.validate_response(response)

        check()
    assert sorted(asked) == OPERATIONS


def test_models_are_found_where_references_lead(app: Flask, make_executor: MakeExecutor) -> None:
    require("pydantic")
    require("openapi_spec_validator")
    import pydantic
    from openapi_spec_validator import OpenAPIV31SpecValidator

    def prints(kind: type[Any]) -> Any:
        def print_all(jobs: Any) -> None: ...

        job = pydantic.create_model("Job", count=(kind, ...))
        print_all.__annotations__["jobs"] = list[job]  # type: ignore[valid-type]
        return print_all

    controller = Controller(make_executor())
    controller.expose(prints(int), "one")
    controller.expose(prints(str), "two")
    app.register_blueprint(controller)
    document = app.test_client().get("/openapi.json").json
    assert document is not None
    OpenAPIV31SpecValidator(document).validate()
    kinds = []
    for name in "one", "two":
        schema = document["paths"][f"/run/{name}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        *place, model = schema["properties"]["jobs"]["items"]["$ref"].split("/")
        assert place == ["#", "components", "schemas"]
        kinds.append(document["components"]["schemas"][model]["properties"]["count"]["type"])
    assert kinds == ["integer", "string"]
    assert "status" in document["components"]["schemas"]["Job"]["properties"]
