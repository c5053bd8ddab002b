"""The classes of backends and stores: of this package, of other packages by entry points, or by import string.

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

from flask_executor.exceptions import ConfigError, MissingExtra
from flask_executor.helpers import describe_error

#: Subclasses of :class:`flask_executor.abc.Backend`, by what ``EXECUTOR_TYPE`` calls them.
BACKENDS = "flask_executor.backends"
#: Subclasses of :class:`flask_executor.abc.JobStore`, by what their urls in ``EXECUTOR_STORE`` begin with.
STORES = "flask_executor.stores"

T = TypeVar("T")


def plugin_names(group: str) -> list[str]:
    """The names in a group, of all installed packages. Slow: this reads files."""
    return sorted({entry_point.name for entry_point in entry_points(group=group)})


def load_class(group: str, name: str, base: type[T], key: str, value: object) -> type[T]:
    """The class that a setting names.

    :param group: the entry points that ``name`` may be one of; of several the one that is first in ``sys.path``.
    :param name: the name of an entry point, or an import string, ``"package.module:Class"``.
    :param base: the class must be a subclass of this.
    :param key: the setting's key in ``app.config``, for the errors.
    :param value: what is there, without passwords.
    :raises ConfigError: when there is no such class, or its module cannot be imported.
    :raises MissingExtra: when a library that it needs is not installed.
    """
    if ":" in name:
        found, of, hint = EntryPoint(name, name, group), name, ""
    else:
        entry_point = next(iter(entry_points(group=group, name=name)), None)
        hint = f" ({group} of installed packages: {', '.join(map(repr, plugin_names(group))) or 'none'})"
        if entry_point is None:
            raise ConfigError(key, value, f"installed{hint}")
        found, of = entry_point, _described(entry_point)
    try:
        loaded = found.load()
    except MissingExtra:
        raise
    except Exception as error:  # whatever a module raises when it is imported
        raise ConfigError(key, value, f"importable: {of} raises {describe_error(error)}{hint}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise ConfigError(key, value, f"a subclass of {base.__module__}.{base.__qualname__}, and {of} is none{hint}")
    return loaded


def _described(entry_point: EntryPoint) -> str:
    of = "" if entry_point.dist is None else f" of {entry_point.dist.name}"
    return f"the entry point {entry_point.name} = {entry_point.value}{of}"
