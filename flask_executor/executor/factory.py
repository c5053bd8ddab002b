"""Makes what the configuration says: the class of the backend, and the tracker with its store."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from flask_executor.abc import Backend, JobStore, StoreOptions
from flask_executor.exceptions import ConfigError
from flask_executor.executor.config import STORES, Config
from flask_executor.helpers import entry_points, redact_url
from flask_executor.jobs.call import JobChannel
from flask_executor.tracking.local import JobTracker
from flask_executor.tracking.shared import SharedJobTracker

if TYPE_CHECKING:
    from flask import Flask


def backend_class_of(config: Config) -> type[Backend]:
    """The class that ``EXECUTOR_TYPE`` names: this package's, an installed package's, or any that can be imported.

    :raises ConfigError: when there is none, or it is no backend.
    :raises MissingExtra: when the library is not installed that it needs.
    """
    key = config.key("EXECUTOR_TYPE")
    return entry_points.load_class(entry_points.BACKENDS, config.type, Backend, key, config.type)  # type: ignore[type-abstract]


def make_tracker(
    config: Config, app: Flask, channel: JobChannel, engine: str | None = None, default_store: str | None = None
) -> JobTracker:
    """The tracker of an executor with this configuration, with its store.

    :param engine: the engine whose workers run the jobs; None for a backend of this process.
    :param default_store: the url of the store for an engine's jobs, if none was chosen; None if there is none.
    :raises ConfigError: for a store that cannot be used.
    :raises MissingExtra: for one whose library is not installed.
    """
    url = config.store
    if url == "memory" and engine is not None:
        url = _default_store(config, default_store)
    if url == "memory":
        return JobTracker(config.tracking_options())
    if url == "sqlite":
        url = f"sqlite:///{config.prefix.lower()}executor.sqlite"
    scheme, _, place = url.partition("://")
    if scheme == "sqlite":
        url = f"sqlite:///{Path(app.instance_path) / place.removeprefix('/')}"
    store_class = store_class_of(url, config.key("EXECUTOR_STORE"))
    space = f"{app.name}:{config.prefix.lower()}".rstrip(":_")
    options = StoreOptions(url=url, space=space, result_ttl=config.result_ttl, max_records=config.store_max_records)
    try:
        store = store_class(options)
    except (TypeError, ValueError):  # its text may have the password in it
        allowed = "a url that can be used, such as 'sqlite:///jobs.sqlite' or 'redis://user:password@host:6379/0'"
        raise ConfigError(config.key("EXECUTOR_STORE"), redact_url(config.store), allowed) from None
    return SharedJobTracker(config.tracking_options(), store, weakref.ref(app), channel)


def store_class_of(url: str, key: str = "EXECUTOR_STORE") -> type[JobStore]:
    """The class of the shared store that has such a url: this package's, or that of another which is installed.

    :param key: where in ``app.config`` the url stands.
    :raises ConfigError: when there is none, or it cannot be used.
    :raises MissingExtra: when the library is not installed that it needs.
    """
    scheme = url.partition("://")[0]
    name = STORES.get(scheme, scheme)
    return entry_points.load_class(entry_points.STORES, name, JobStore, key, redact_url(url))  # type: ignore[type-abstract]


def _default_store(config: Config, url: str | None) -> str:
    """The store for jobs of an engine, where none was chosen."""
    if url is None or url.partition("://")[0] not in STORES:
        key, allowed = config.key("EXECUTOR_STORE"), "'redis://host:6379/0' or another store that the workers share"
        raise ConfigError(key, config.store, f"{allowed}: {config.key('EXECUTOR_TYPE')} has them run elsewhere")
    return url
