"""Backends and stores of other packages, which are found by their entry points.

.. code-block:: ini

    [options.entry_points]
    flask_executor.backends =
        ray = shop_ray:RayBackend
    flask_executor.stores =
        mongodb = shop_mongodb:MongoStore
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from flask_executor.exceptions import ConfigError
from flask_executor.helpers import describe_error

#: Subclasses of :class:`flask_executor.abc.Backend`, by what ``EXECUTOR_TYPE`` calls them.
BACKENDS = "flask_executor.backends"
#: Subclasses of :class:`flask_executor.abc.JobStore`, by what their urls in ``EXECUTOR_STORE`` begin with.
STORES = "flask_executor.stores"

T = TypeVar("T")


def plugin_names(group: str) -> list[str]:
    """The names in a group, of all packages that are installed. It reads files: to be asked only if need be."""
    return sorted({entry_point.name for entry_point in entry_points(group=group)})


def load_plugin(group: str, name: str, base: type[T], key: str, value: object) -> type[T]:
    """The class with this name in a group; of several that which comes first in ``sys.path``.

    :param base: what it must be a subclass of.
    :param key: the key in ``app.config`` that asks for it.
    :param value: what is there, without passwords.
    :raises ConfigError: when it cannot be imported, or is something else.
    """
    found = next(iter(entry_points(group=group, name=name)), None)
    if found is None:
        raise ConfigError(key, value, f"installed ({_found(group)})")
    try:
        loaded = found.load()
    except Exception as error:  # whatever its module does when it is imported
        why = f"importable: {_described(found)} raises {describe_error(error)} ({_found(group)})"
        raise ConfigError(key, value, why) from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        wanted = f"a subclass of {base.__module__}.{base.__qualname__}"
        raise ConfigError(key, value, f"{wanted}, and {_described(found)} is none ({_found(group)})")
    return loaded


def _described(entry_point: EntryPoint) -> str:
    of = "" if entry_point.dist is None else f" of {entry_point.dist.name}"
    return f"the entry point {entry_point.name} = {entry_point.value}{of}"


def _found(group: str) -> str:
    return f"{group} of installed packages: {', '.join(map(repr, plugin_names(group))) or 'none'}"
