"""Values by name that travel to another process: those that can, and word of those that cannot."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from werkzeug.datastructures import ImmutableMultiDict

from flask_executor.helpers import describe_error
from flask_executor.helpers.pickling import CompactPickle

#: Types whose values can always be pickled and rebuilt; and those with which that depends on what is in them.
SIMPLE: frozenset[Any] = frozenset({str, bytes, int, float, bool, type(None)})
CONTAINERS: frozenset[Any] = SIMPLE | {tuple, list, dict, ImmutableMultiDict}


@dataclass(slots=True)
class PartialPickle(CompactPickle):
    """Values by name, pickled one by one: what cannot be pickled stays behind, the rest comes along."""

    simple: dict[str, Any]
    pickle_or_explain: dict[str, bytes] | None
    #: What stayed behind, with the reason.
    left_out: dict[str, str] | None

    @classmethod
    def pack(
        cls, values: dict[str, Any], leave_out: Collection[str] = (), simple: Collection[type] = SIMPLE
    ) -> PartialPickle:
        """Pack ``values``, silently without those in ``leave_out``; those of ``simple`` types are taken as they are."""
        packed = cls({}, None, None)
        for name, value in values.items():
            if name in leave_out:
                continue
            if type(value) in simple:
                packed.simple[name] = value
            else:
                packed._pickle(name, value)
        return packed

    def _pickle(self, name: str, value: Any) -> None:
        try:
            data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # whatever a foreign __reduce__ raises
            self.left_out = {**(self.left_out or {}), name: describe_error(error)}
        else:
            self.pickle_or_explain = {**(self.pickle_or_explain or {}), name: data}

    def unpack(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The values again; and what was left out, also as it cannot be rebuilt here, with the reasons."""
        values, left_out = self.simple.copy(), dict(self.left_out or ())
        for name, data in (self.pickle_or_explain or {}).items():
            try:
                values[name] = pickle.loads(data)
            except Exception as error:
                left_out[name] = f"it cannot be rebuilt, {describe_error(error)}"
        return values, left_out


def with_missing(plain: Any, where: str, left_out: dict[str, str]) -> Any:
    """The same object, but where an attribute was left out it says why, with an :exc:`AttributeError`.

    So that "make one if there is none" works in a job as it does in a view.
    """
    base: Any = type(plain)
    made = object.__new__(_explaining_class(base))
    object.__setattr__(made, "_left_out", left_out)  # g's own __setattr__ knows no slots
    object.__setattr__(made, "_where", where)
    made.__dict__.update(plain.__dict__)
    return made


@functools.cache
def _explaining_class(base: Any) -> Any:
    bases = (_ExplainsMissing, base) if hasattr(base, "__getattr__") else (_ExplainsMissing, base, _NoAttribute)
    return type(base.__name__, bases, {"__slots__": ("_left_out", "_where"), "__module__": base.__module__})


class _ExplainsMissing:
    __slots__ = ()
    _left_out: dict[str, str]
    _where: str

    def __getattr__(self, name: str) -> Any:
        reason = self._left_out.get(name)
        if reason is None:
            return super().__getattr__(name)  # type: ignore[misc]
        raise AttributeError(
            f"{name!r} did not come along from {self._where} of the code that submitted the job: {reason}. "
            "Pass what the job needs as an argument, or make it in the job."
        )


class _NoAttribute:
    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class PartialEnviron(dict[str, Any]):
    """A WSGI environ in a worker process."""

    def __missing__(self, name: str) -> Any:
        raise KeyError(
            f"{name!r} is not in the environ of this request; only texts, numbers and tuples come along to a worker"
        )
