"""What fits the signature of an exposed function, with and without pydantic."""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal, Optional

import pytest
from requirements import require

from flask_executor.web.arguments import (
    Mismatch,
    MismatchError,
    Parameters,
    PlainParameters,
    PydanticParameters,
    parameters_of,
)


def render(
    month: str,
    pages: int = 1,
    scale: float = 1.0,
    draft: bool = False,
    format: Literal["pdf", "html"] = "pdf",
    names: list[str] | None = None,
    _copy: Optional[dict[str, int]] = None,  # noqa: UP045  # as others write it
) -> None: ...


def anything(a, *rest, b=None, **more): ...  # type: ignore[no-untyped-def]


def dated(day: datetime.date) -> None: ...


def unresolved(what: NotThere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


class Opaque: ...


def opaque(what: Opaque) -> None: ...


@pytest.fixture(params=["pydantic", "plain"])
def parameters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Parameters]:
    if request.param == "pydantic":
        require("pydantic")
    else:
        monkeypatch.setitem(sys.modules, "pydantic", None)
    kind = PlainParameters if request.param == "plain" else PydanticParameters

    def make(fn: Callable[..., Any]) -> Parameters:
        made = parameters_of(fn)
        assert type(made) is kind
        return made

    return make


@pytest.mark.parametrize(
    "given",
    [
        {"month": "may"},
        {"month": "", "pages": 3, "scale": 2, "draft": True, "format": "html", "names": ["a"], "_copy": {"x": 1}},
        {"month": "may", "names": None},
    ],
)
def test_what_fits(parameters: Callable[..., Parameters], given: dict[str, Any]) -> None:
    assert parameters(render).check(given) == given


@pytest.mark.parametrize(
    ("given", "pointers"),
    [
        ({}, ["/month"]),
        ({"month": None}, ["/month"]),
        ({"month": 1}, ["/month"]),
        ({"month": "may", "pages": "x"}, ["/pages"]),
        ({"month": "may", "pages": 1.5}, ["/pages"]),
        ({"month": "may", "scale": "x"}, ["/scale"]),
        ({"month": "may", "draft": []}, ["/draft"]),
        ({"month": "may", "draft": "yes"}, ["/draft"]),
        ({"month": "may", "pages": True}, ["/pages"]),
        ({"month": "may", "format": "doc"}, ["/format"]),
        ({"month": "may", "names": {}}, ["/names"]),
        ({"month": "may", "self": 1}, ["/self"]),
        ({"month": "may", "a/b~": 1}, ["/a~1b~0"]),
        ({"pages": [], "more": 1}, ["/month", "/more", "/pages"]),
    ],
)
def test_what_does_not_fit(parameters: Callable[..., Parameters], given: dict[str, Any], pointers: list[str]) -> None:
    with pytest.raises(MismatchError) as caught:
        parameters(render).check(given)
    assert sorted(one.pointer for one in caught.value.args) == pointers
    assert all(one.detail for one in caught.value.args)


def test_more_than_was_named(parameters: Callable[..., Parameters]) -> None:
    given = {"a": [1], "z": {"y": None}, "argument_0": 1}
    assert parameters(anything).check(given) == given
    with pytest.raises(MismatchError):
        parameters(anything).check({"z": 1})
    assert parameters(anything).schema()["additionalProperties"] is True


def test_what_has_no_types_takes_anything(parameters: Callable[..., Parameters]) -> None:
    assert parameters(anything).check({"a": {"x": 1}}) == {"a": {"x": 1}}


def test_what_cannot_be_resolved_is_not_let_through(parameters: Callable[..., Parameters]) -> None:
    with pytest.raises(TypeError, match="its arguments cannot be checked: name 'NotThere' is not defined"):
        parameters(unresolved)


class Callable_:
    def __call__(self, count: int) -> None: ...


@pytest.mark.parametrize("fn", [functools.partial(render, "may"), Callable_()])
def test_partials_and_objects_are_checked_too(parameters: Callable[..., Parameters], fn: Callable[..., Any]) -> None:
    name = "count" if isinstance(fn, Callable_) else "pages"
    assert parameters(fn).check({name: 1}) == {name: 1}
    for wrong in "rm -rf", True, 1.5, None:
        with pytest.raises(MismatchError):
            parameters(fn).check({name: wrong})


def test_pydantic_converts() -> None:
    require("pydantic")
    assert parameters_of(dated).check({"day": "2026-11-21"}) == {"day": datetime.date(2026, 11, 21)}
    assert parameters_of(dated).schema()["properties"]["day"]["format"] == "date"


def test_what_json_cannot_give_never_fits() -> None:
    require("pydantic")
    with pytest.raises(MismatchError):
        parameters_of(opaque).check({"what": {}})
    assert parameters_of(opaque).schema() == {"type": "object"}


def test_by_position_only() -> None:
    def by_position(a: int, /) -> None: ...

    with pytest.raises(TypeError, match="its argument 'a' can only be given by position"):
        parameters_of(by_position)


def test_schemas(parameters: Callable[..., Parameters]) -> None:
    schema = parameters(render).schema()
    assert schema["required"] == ["month"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["month"]["type"] == "string"
    assert schema["properties"]["format"]["enum"] == ["pdf", "html"]


def inside(
    count: Annotated[int, "of pages"],
    numbers: list[int],
    sizes: dict[str, list[float]],
    note: Optional[Annotated[str, "for the printer"]] = None,  # noqa: UP045
) -> None: ...


@pytest.mark.parametrize(
    ("wrong", "pointer", "detail"),
    [
        ({"count": "7"}, "/count", "must be integer"),
        ({"numbers": ["x"]}, "/numbers", "must be array of integer"),
        ({"numbers": [1, True]}, "/numbers", "must be array of integer"),
        ({"sizes": {"a4": [1, "x"]}}, "/sizes", "must be object of array of number"),
        ({"note": 5}, "/note", "must be string or null"),
    ],
)
def test_what_is_inside_does_not_fit(
    parameters: Callable[..., Parameters], wrong: dict[str, Any], pointer: str, detail: str
) -> None:
    fits = {"count": 1, "numbers": [1, 2], "sizes": {"a4": [1, 2.5]}}
    assert parameters(inside).check(fits) == fits
    with pytest.raises(MismatchError) as caught:
        parameters(inside).check({**fits, **wrong})
    assert caught.value.args[0].pointer.startswith(pointer)
    if isinstance(parameters(inside), PlainParameters):
        assert caught.value.args == (Mismatch(pointer=pointer, detail=detail),)


def test_schemas_of_what_is_inside(parameters: Callable[..., Parameters]) -> None:
    properties = parameters(inside).schema()["properties"]
    assert properties["numbers"]["items"] == {"type": "integer"}
    assert properties["sizes"]["additionalProperties"]["items"] == {"type": "number"}
