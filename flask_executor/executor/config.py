"""Configuration: read once, in ``init_app``, into one typed object."""

from __future__ import annotations

import difflib
import math
import multiprocessing
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from flask_executor.abc import BackendOptions
from flask_executor.exceptions import ConfigError
from flask_executor.helpers import entry_points, redact_url
from flask_executor.helpers.log import logger
from flask_executor.tracking.local import TrackingOptions

if TYPE_CHECKING:
    import weakref

    from flask import Flask

#: The names that ``EXECUTOR_TYPE`` knows, and where the backends are.
BACKENDS = {
    "thread": "flask_executor.backends.thread:ThreadBackend",
    "process": "flask_executor.backends.process:ProcessBackend",
    "immediate": "flask_executor.backends.immediate:ImmediateBackend",
    "rq": "flask_executor.backends.rq:RQBackend",
    "celery": "flask_executor.backends.celery:CeleryBackend",
    "dask": "flask_executor.backends.dask:DaskBackend",
}
#: What the url in ``EXECUTOR_STORE`` may begin with, and where the stores are.
STORES = {
    "sqlite": "flask_executor.stores.sqlite:SQLiteStore",
    "redis": "flask_executor.stores.redis:RedisStore",
    "rediss": "flask_executor.stores.redis:RedisStore",
    "unix": "flask_executor.stores.redis:RedisStore",
}

_IMPORT_STRING = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z")
_TRUE = frozenset({"true", "t", "yes", "y", "on", "1"})
_FALSE = frozenset({"false", "f", "no", "n", "off", "0", ""})


class _RefusedError(Exception):
    """A value that cannot be used; the argument says what is allowed."""


def _type(value: object) -> str:
    if isinstance(value, str):
        name = value.strip()
        if name in BACKENDS:
            return BACKENDS[name]
        if _IMPORT_STRING.match(name) or name in entry_points.plugin_names(entry_points.BACKENDS):
            return name
    names = dict.fromkeys([*BACKENDS, *entry_points.plugin_names(entry_points.BACKENDS)])
    raise _RefusedError(f"{_one_of(names)}, or 'package.module:Class' for a backend of your own")


def _store(value: object) -> str:
    if isinstance(value, str):
        text = value.strip()
        scheme, _, place = text.partition("://")
        if text in ("memory", "sqlite") or (scheme in STORES and place.strip("/")):
            return text
        if "://" in text and scheme not in STORES and scheme in entry_points.plugin_names(entry_points.STORES):
            return text
    places = [
        "sqlite:///path",
        "redis://host:6379/0",
        *(f"{name}://" for name in entry_points.plugin_names(entry_points.STORES)),
    ]
    raise _RefusedError(f"'memory', 'sqlite' (a file in the instance folder), {_one_of(places, ' or')}")


def _track(value: object) -> str:
    if isinstance(value, str) and value.strip() in ("stored", "all"):
        return value.strip()
    raise _RefusedError("'stored' (jobs with a key) or 'all'")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE or value is None:
        return False
    raise _RefusedError("True or False (or 'yes', 'no', 'on', 'off', '1', '0')")


def _count(value: object) -> int:
    """A positive whole number, as itself or as a string."""
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number > 0:
            return number
    raise _RefusedError("a whole number greater than 0")


def _or_none(coerce: Callable[[object], Any]) -> Callable[[object], Any]:
    """A coercer that takes None as well, also as an empty string or ``"none"``."""

    def coerce_or_none(value: object) -> Any:
        if value is None or (isinstance(value, str) and value.strip().lower() in {"", "none"}):
            return None
        try:
            return coerce(value)
        except _RefusedError as refused:
            raise _RefusedError(f"{refused}, or None") from None

    return coerce_or_none


def _text_or_none(what: str) -> Callable[[object], str | None]:
    """A coercer for strings, of which an empty one stands for None.

    :param what: what is allowed, with an example.
    """

    def coerce(value: object) -> str | None:
        if value is None or isinstance(value, str):
            return (value or "").strip() or None
        raise _RefusedError(f"{what}, or None")

    return coerce


def _length(value: object) -> int:
    length: int | None = _or_none(_count)(value)
    return 50 if length is None else length


def _seconds(value: object) -> float:
    """Seconds, 0 or more, as a number or a string."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if 0 <= number < math.inf:
            return number
    raise _RefusedError("a number of seconds, 0 or more")


def _lifetime(value: object) -> float:
    """Seconds, more than 0, as a number or a string."""
    try:
        seconds = _seconds(value)
    except _RefusedError:
        seconds = 0.0
    if seconds > 0:
        return seconds
    raise _RefusedError("a number of seconds greater than 0")


def _start_method(value: object) -> str:
    methods = multiprocessing.get_all_start_methods()
    if isinstance(value, str) and value.strip() in methods:
        return value.strip()
    raise _RefusedError(f"one of this platform's start methods: {', '.join(map(repr, methods))}")


def _number(value: object) -> int:
    """A whole number, 0 or more, as itself or as a string."""
    if value in (0, "0") and value is not False:
        return 0
    try:
        return _count(value)
    except _RefusedError:
        raise _RefusedError("a whole number, 0 or more") from None


def _name(value: object) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise _RefusedError("a name")


def _one_of(names: Iterable[str], last: str = ",") -> str:
    *others, final = map(repr, names)
    return f"{', '.join(others)}{last} {final}"


def _key(name: str, default: object, coerce: Callable[[object], Any]) -> Any:
    return field(metadata={"name": name, "default": default, "coerce": coerce})


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The settings of one executor in an app's config.

    Each key is read with the executor's name as prefix, in capitals: ``REPORTS_EXECUTOR_TYPE`` for
    ``Executor(app, name="reports")``. A named executor does not look at the keys without prefix.
    """

    #: The executor's name, in capitals and with an underscore, or the empty string.
    prefix: str
    #: The executor's name.
    name: str = ""
    #: Import string of the backend's class, or the name of another package's.
    type: str = _key("EXECUTOR_TYPE", "thread", _type)
    #: Most jobs at a time; None for the standard library's choice.
    max_workers: int | None = _key("EXECUTOR_MAX_WORKERS", None, _or_none(_count))
    #: Most jobs that wait to start; None for no bound.
    max_pending: int | None = _key("EXECUTOR_MAX_PENDING", None, _or_none(_count))
    #: Most handles that ``executor.futures`` holds.
    futures_max_length: int = _key("EXECUTOR_FUTURES_MAX_LENGTH", None, _length)
    #: Whether jobs see a copy of ``g``, and an app context where there is no request.
    push_app_context: bool = _key("EXECUTOR_PUSH_APP_CONTEXT", True, _flag)
    #: Whether a job's exception is raised again in a done callback.
    propagate_exceptions: bool = _key("EXECUTOR_PROPAGATE_EXCEPTIONS", False, _flag)
    #: Whether type ``immediate`` pickles function, arguments and result.
    immediate_pickle: bool = _key("EXECUTOR_IMMEDIATE_PICKLE", False, _flag)
    #: Seconds a job may run; None for as long as it takes.
    timeout: float | None = _key("EXECUTOR_TIMEOUT", None, _or_none(_lifetime))
    #: Seconds between a request to stop and force.
    stop_grace: float = _key("EXECUTOR_STOP_GRACE", 5, _seconds)
    #: Seconds that a process which ends gives its jobs.
    shutdown_timeout: float = _key("EXECUTOR_SHUTDOWN_TIMEOUT", 30, _seconds)
    #: How worker processes are started; None for the platform's default.
    start_method: str | None = _key("EXECUTOR_START_METHOD", None, _or_none(_start_method))
    #: Import string of the app or its factory, for worker processes that do not inherit it; None to find it.
    app: str | None = _key("EXECUTOR_APP", None, _text_or_none("a string such as 'shop:app' or 'shop:create_app()'"))
    #: Jobs after which a worker process is replaced; None for never.
    max_tasks_per_child: int | None = _key("EXECUTOR_MAX_TASKS_PER_CHILD", None, _or_none(_count))
    #: ``memory``, ``sqlite``, or the url of the store.
    store: str = _key("EXECUTOR_STORE", "memory", _store)
    #: Which jobs a shared store records: ``stored`` or ``all``.
    track: str = _key("EXECUTOR_TRACK", "stored", _track)
    #: Seconds that a record and its result are kept after its job has ended.
    result_ttl: float = _key("EXECUTOR_RESULT_TTL", 3600, _lifetime)
    #: Most bytes of a pickled result that a shared store keeps.
    result_max_bytes: int = _key("EXECUTOR_RESULT_MAX_BYTES", 16 * 2**20, _count)
    #: Most records of ended jobs that are kept.
    store_max_records: int = _key("EXECUTOR_STORE_MAX_RECORDS", 10_000, _count)

    #: Where the broker or scheduler of an engine is.
    url: str | None = _key(
        "EXECUTOR_URL", None, _text_or_none("a url such as 'redis://host:6379/0' or 'tcp://host:8786'")
    )
    #: The name of the queue there.
    queue: str = _key("EXECUTOR_QUEUE", "default", _name)

    #: Url of an image on the page that waits, or None.
    waiting_image: str | None = _key("EXECUTOR_WAITING_IMAGE", None, _text_or_none("a url like '/static/wait.gif'"))
    #: Whether type and message of a job's exception are shown on pages and told over HTTP.
    expose_errors: bool = _key("EXECUTOR_EXPOSE_ERRORS", False, _flag)
    #: Most requests of a process that wait for news of a job; None for a quarter of the server's threads, or 8.
    events_max: int | None = _key("EXECUTOR_EVENTS_MAX", None, _or_none(_number))

    @classmethod
    def read(cls, values: dict[str, Any], executor_name: str = "") -> Config:
        """Read ``app.config``, and write the defaults of missing keys into it.

        :raises ConfigError: for the first value that cannot be used.
        """
        prefix = f"{executor_name.upper()}_" if executor_name else ""
        _warn_of_unknown(values, prefix)
        parsed: dict[str, Any] = {}
        for entry in fields(cls):
            if not entry.metadata:
                continue
            key = prefix + entry.metadata["name"]
            value = values.setdefault(key, entry.metadata["default"])
            try:
                parsed[entry.name] = entry.metadata["coerce"](value)
            except _RefusedError as refused:
                raise ConfigError(key, redact_url(value), str(refused)) from None
        return cls(prefix=prefix, name=executor_name, **parsed)

    def changed(self, values: Mapping[str, Any]) -> list[str]:
        """The keys that say something else in ``app.config`` than when it was read."""
        keys = []
        for entry in fields(self):
            key = self.prefix + entry.metadata.get("name", "")
            if entry.metadata and key in values:
                try:
                    same = entry.metadata["coerce"](values[key]) == getattr(self, entry.name)
                except _RefusedError:
                    same = False
                if not same:
                    keys.append(key)
        return keys

    def key(self, name: str) -> str:
        """The key in ``app.config`` that this executor reads: ``key("EXECUTOR_TYPE")``."""
        return self.prefix + name

    def tracking_options(self) -> TrackingOptions:
        """Return the settings for handles and records."""
        return TrackingOptions(
            store=self.store,
            track=self.track,
            futures_max_length=self.futures_max_length,
            max_records=self.store_max_records,
            result_ttl=self.result_ttl,
            result_max_bytes=self.result_max_bytes,
            config_key=self.key,
        )

    def backend_options(
        self, app: weakref.ref[Flask] | None = None, initializers: Sequence[Callable[[], object]] = ()
    ) -> BackendOptions:
        """Return the options that the backend is made from.

        :param app: the app whose config this is.
        :param initializers: called in each worker process before its first job.
        """
        return BackendOptions(
            max_workers=self.max_workers,
            pickle=self.immediate_pickle,
            app=app,
            config_key=self.key,
            app_import=self.app,
            start_method=self.start_method,
            max_tasks_per_child=self.max_tasks_per_child,
            initializers=initializers,
            exit_grace=self.stop_grace,
            executor_name=self.name,
            url=self.url,
            queue=self.queue,
            shutdown_timeout=self.shutdown_timeout,
        )


def _warn_of_unknown(values: Mapping[str, Any], prefix: str) -> None:
    """A misspelt key would be ignored, and its default used."""
    prefix += "EXECUTOR_"
    known = [entry.metadata["name"].removeprefix("EXECUTOR_") for entry in fields(Config) if entry.metadata]
    for key in values:
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {prefix}{close[0]}?" if close else ""
            logger.warning("%s is no setting of Flask-Executor, and is ignored.%s", key, hint)
