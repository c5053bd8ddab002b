"""Small tools that know nothing of jobs."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec

from flask import Flask, has_request_context, request

P = ParamSpec("P")

_MAX_DESCRIPTION = 5000  # characters of the description of an error


def describe_error(error: BaseException) -> str:
    """An error as one line, ``ValueError: no such page``; never raises, whatever its ``__str__`` does."""
    return traceback.format_exception_only(type(error), error)[-1].strip()[:_MAX_DESCRIPTION]


def safe_repr(value: object) -> str:
    """``repr(value)``, or the name of its type if that raises."""
    try:
        return repr(value)
    except Exception:  # whatever a __repr__ of the user's raises
        return f"<{type(value).__name__}>"


def signing_keys(app: Flask | None) -> list[bytes]:
    """The app's secret keys, the current one last, as itsdangerous takes them; none without a ``SECRET_KEY``."""
    if app is None or not app.secret_key:
        return []
    keys = [*(app.config.get("SECRET_KEY_FALLBACKS") or ()), app.secret_key]
    return [key.encode() if isinstance(key, str) else key for key in keys]


def is_multiprocess_request() -> bool:
    """If true, the server says that the present request is handled by one of several processes."""
    return has_request_context() and bool(request.environ.get("wsgi.multiprocess"))


def callable_name(fn: Any) -> str:
    """The name of a job that runs ``fn``: its qualified name, also for partials and callable objects."""
    while True:
        try:
            return str(fn.__qualname__).rpartition("<locals>.")[2]
        except AttributeError:
            wrapped = getattr(fn, "func", None)
            if wrapped is None:
                return callable_name(type(fn))
            fn = wrapped


def redact_url(value: object) -> object:
    """A url without its user, password and query, to be shown and logged; anything else as it is."""
    if not isinstance(value, str) or "://" not in value:
        return value
    scheme, _, rest = value.partition("://")
    place, query, _ = rest.partition("?")
    host = f"***@{place.rpartition('@')[2]}" if "@" in place else place
    return f"{scheme}://{host}{query and '?...'}"


class InstanceProxy:
    """Stands in front of another object: what it lacks itself is looked up there.

    ``isinstance`` sees the class of the object behind (and the proxy's own), so a proxy passes
    wherever the object does.

    :param target: the object behind, readable as ``_self``.
    """

    def __init__(self, target: object) -> None:
        self._target = target

    @property
    def _self(self) -> Any:
        return self._target

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        target = self._self
        return type(self) if target is None else type(target)

    def __getattr__(self, name: str) -> Any:
        if name == "_target":  # not set yet: a copy, an unpickled or half-built object
            raise AttributeError(name)
        target = self._self
        if target is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(target, name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}({self._self!r})>"


def weak_callback(method: Callable[P, None]) -> Callable[P, None]:
    """A callback that calls ``method`` as long as its object is alive, and does not keep it alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        alive = reference()
        if alive is not None:
            alive(*args, **kwargs)

    return call
