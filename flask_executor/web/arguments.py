"""Checks the arguments of functions that are started over HTTP, and describes them as a JSON schema."""

from __future__ import annotations

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Union

_PLAIN: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    None: "null",
    type(None): "null",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """One reason why arguments do not fit."""

    #: Which value, as a JSON pointer (RFC 6901): ``/pages/0``.
    pointer: str
    #: What is wrong with it.
    detail: str


class MismatchError(Exception):
    """Arguments do not fit; ``args`` are the reasons, each a :class:`Mismatch`."""


class Parameters(Protocol):
    """The parameters of a function."""

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments to call the function with.

        :raises MismatchError: if they do not fit.
        """

    def schema(self, refs: str = "#/$defs/") -> dict[str, Any]:
        """The JSON schema of the arguments, as one object.

        :param refs: where the schema's ``$defs`` will be: the beginning of each reference to one.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class ExposedFunction:
    """A function that can be started over HTTP."""

    #: Its name in the url.
    name: str
    #: What submits it: an executor's job, or a plain function.
    fn: Callable[..., Any]
    parameters: Parameters


def parameters_of(fn: Callable[..., Any]) -> Parameters:
    """The parameters of ``fn``. Without pydantic only the types that JSON has are checked.

    :raises TypeError: for a function that cannot be called with keyword arguments only, or has annotations that cannot
        be resolved.
    """
    accepted: dict[str, inspect.Parameter] = {}
    has_kwargs = False
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            has_kwargs = True
        elif parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise TypeError(
                f"{fn!r} cannot be exposed: its argument {name!r} can only be given by position, and a JSON object "
                "gives arguments by name"
            )
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            accepted[name] = parameter
    hints = _hints(fn)
    annotated = {name: (hints.get(name, Any), parameter.default) for name, parameter in accepted.items()}
    try:
        import pydantic
    except ImportError:
        return PlainParameters(annotated, has_kwargs)
    return PydanticParameters(pydantic, annotated, has_kwargs)


def _hints(fn: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, as types."""
    fn = inspect.unwrap(fn)
    while isinstance(fn, functools.partial):
        fn = inspect.unwrap(fn.func)
    if not (inspect.isroutine(fn) or inspect.isclass(fn)):  # a callable object
        fn = type(fn).__call__
    try:
        return typing.get_type_hints(fn.__init__ if inspect.isclass(fn) else fn, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"{fn!r} cannot be exposed, as its arguments cannot be checked: {error}. Import what its annotations name "
            "also at run time."
        ) from error


class PlainParameters:
    """Checks names, and the types that JSON has."""

    def __init__(self, annotated: Mapping[str, tuple[Any, Any]], has_kwargs: bool) -> None:
        self._annotated = annotated
        self._has_kwargs = has_kwargs

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        wrong = [
            Mismatch(pointer=_pointer([name]), detail="there is no such argument")
            for name in given
            if name not in self._annotated and not self._has_kwargs
        ]
        for name, (hint, default) in self._annotated.items():
            if name in given:
                if not _fits(given[name], hint):
                    wrong.append(Mismatch(pointer=_pointer([name]), detail=f"must be {_in_words(_schema(hint))}"))
            elif default is inspect.Parameter.empty:
                wrong.append(Mismatch(pointer=_pointer([name]), detail="is missing"))
        if wrong:
            raise MismatchError(*wrong)
        return dict(given)

    def schema(self, refs: str = "#/$defs/") -> dict[str, Any]:
        properties = {name: _schema(hint) for name, (hint, _) in self._annotated.items()}
        required = [name for name, (_, default) in self._annotated.items() if default is inspect.Parameter.empty]
        return {
            "type": "object",
            "properties": properties,
            "additionalProperties": self._has_kwargs,
            **({"required": required} if required else {}),
        }


class PydanticParameters:
    """Checks and converts by pydantic's strict mode for JSON: text becomes a date, but not a number."""

    def __init__(self, pydantic: Any, annotated: Mapping[str, tuple[Any, Any]], has_kwargs: bool) -> None:
        self._pydantic = pydantic
        self._names = {f"argument_{number}": name for number, name in enumerate(annotated)}
        fields: dict[str, Any] = {
            field: (
                annotated[name][0],
                pydantic.Field(
                    **({} if annotated[name][1] is inspect.Parameter.empty else {"default": annotated[name][1]}),
                    alias=name,  # not every argument name is allowed as the name of a field
                ),
            )
            for field, name in self._names.items()
        }
        config = pydantic.ConfigDict(
            extra="allow" if has_kwargs else "forbid", arbitrary_types_allowed=True, allow_inf_nan=False
        )
        self._model = pydantic.create_model("Arguments", __config__=config, **fields)

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        try:
            model = self._model.model_validate_json(json.dumps(given), strict=True)
        except self._pydantic.ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            raise MismatchError(*(Mismatch(pointer=_pointer(one["loc"]), detail=one["msg"]) for one in found)) from None
        arguments = {name: getattr(model, field) for field, name in self._names.items() if name in given}
        return {**arguments, **(model.model_extra or {})}

    def schema(self, refs: str = "#/$defs/") -> dict[str, Any]:
        try:
            schema: dict[str, Any] = self._model.model_json_schema(by_alias=True, ref_template=f"{refs}{{model}}")
        except self._pydantic.errors.PydanticInvalidForJsonSchema:
            return {"type": "object"}
        schema.pop("title", None)
        return schema


def _pointer(path: typing.Iterable[object]) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and its parameters: ``list`` and ``(int,)`` for ``list[int]``."""
    while typing.get_origin(hint) is Annotated:
        hint = hint.__origin__
    origin = typing.get_origin(hint)
    return (Union if origin is types.UnionType else origin or hint), typing.get_args(hint)


def _fits(value: object, hint: Any) -> bool:
    kind, of = _parts(hint)
    if kind is Union:
        return any(_fits(value, one) for one in of)
    if kind is Literal:
        return any(value == one and type(value) is type(one) for one in of)
    if kind not in _PLAIN:
        return True  # JSON has no such type: the function itself has to check
    if kind is None:
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return False
    if of and isinstance(value, list):
        return all(_fits(one, of[0]) for one in value)
    if of and isinstance(value, dict):
        return all(_fits(name, of[0]) and _fits(one, of[1]) for name, one in value.items())
    return True


def _schema(hint: Any) -> dict[str, Any]:
    kind, of = _parts(hint)
    if kind is Union:
        return {"anyOf": [_schema(one) for one in of]}
    if kind is Literal:
        return {"enum": list(of)}
    schema: dict[str, Any] = {"type": _PLAIN[kind]} if kind in _PLAIN else {}
    if kind is list and of:
        schema["items"] = _schema(of[0])
    if kind is dict and of:
        schema["additionalProperties"] = _schema(of[1])
    return schema


def _in_words(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(map(_in_words, schema["anyOf"]))
    elements = schema.get("items") or schema.get("additionalProperties")
    kind = str(schema.get("type", "anything"))
    return f"{kind} of {_in_words(elements)}" if elements else kind
