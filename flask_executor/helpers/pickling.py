"""Pickling in parts, without copying large bytes, and small dataclasses that pickle fast."""

from __future__ import annotations

import functools
import operator
import pickle
from collections.abc import Callable
from typing import Any


class CompactPickle:
    """Something with fields that travels; pickled as its class and its fields, half the work of a plain dataclass."""

    __slots__: tuple[str, ...] = ()

    def __reduce__(self) -> Any:
        cls: Any = type(self)
        fields = _fields_of(cls)(self)
        return cls, (fields,) if len(cls.__slots__) == 1 else fields


@functools.cache
def _fields_of(cls: Any) -> Callable[[CompactPickle], Any]:
    return operator.attrgetter(*cls.__slots__) if cls.__slots__ else _no_fields


def _no_fields(_: CompactPickle) -> tuple[()]:
    return ()


#: Bytes of a call or a result that count as small: copied when that saves a system call, sent in one packet.
_SMALL = 8 * 1024


class _Parts(list[bytes]):
    write = list.append


def pickle_parts(value: object) -> list[bytes]:
    """``value`` pickled, in parts that belong together.

    Large bytes in it are a part as they are. :func:`pickle.dumps` would copy them, some times over.
    """
    parts = _Parts()
    pickle.Pickler(parts, pickle.HIGHEST_PROTOCOL).dump(value)
    if len(parts) > 1 and _size(parts) <= _SMALL:
        return [b"".join(parts)]
    return parts


def _size(parts: list[bytes]) -> int:
    return sum(map(len, parts))
