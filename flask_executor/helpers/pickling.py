"""Pickling in parts, without copying large bytes; and dataclasses that pickle fast."""

from __future__ import annotations

import functools
import operator
import pickle
from collections.abc import Callable
from typing import Any


class CompactPickle:
    """Base of dataclasses with slots that are sent often: pickled as class and fields, at half the cost."""

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


#: Bytes up to which a pickle is small: copied to save a system call, and sent in one packet.
SMALL = 8 * 1024


class _Parts(list[bytes]):
    write = list.append


def pickle_parts(value: object) -> list[bytes]:
    """``value`` pickled, in parts to be joined.

    Large bytes in it are a part of their own, which is not copied. :func:`pickle.dumps` would copy them several times.
    """
    parts = _Parts()
    pickle.Pickler(parts, pickle.HIGHEST_PROTOCOL).dump(value)
    if len(parts) > 1 and total_size(parts) <= SMALL:
        return [b"".join(parts)]
    return parts


def total_size(parts: list[bytes]) -> int:
    """Number of bytes in all parts."""
    return sum(map(len, parts))
