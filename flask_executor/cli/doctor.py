"""``flask executor doctor``: checks the configuration of an app's executor and the environment of its server.

The checks change nothing. Configuration files of servers are read as text, not executed.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import multiprocessing
import os
import re
import shlex
import shutil
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flask_executor.exceptions import EngineUnavailable, StoreUnavailable
from flask_executor.executor.extension import Executor
from flask_executor.executor.submitters import ExecutorJob
from flask_executor.helpers import describe_error
from flask_executor.helpers.app_import import find_import_string
from flask_executor.stores.leases import new_holder_id
from flask_executor.tracking.shared import SharedJobTracker

if TYPE_CHECKING:
    from flask import Flask

    from flask_executor.abc import Backend, JobStore
    from flask_executor.executor.app_executor import AppExecutor
    from flask_executor.executor.config import Config

_SLOW_ACCESS = 0.1  # seconds; an access to the store that takes longer is worth a warning
_LITTLE_SPACE = 100 * 2**20  # bytes of free disk space
_SHORT_KEY = 16  # characters of SECRET_KEY
_COMMON_KEYS = frozenset({"dev", "development", "secret", "secret_key", "changeme", "change-me", "test", "key"})
_NETWORK = re.compile(r"nfs\d?|cifs|smb.*|9p|afs|ceph|glusterfs|lustre|fuse\.(sshfs|ceph|gluster|s3|gcs|rclone).*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check."""

    level: Literal["ok", "note", "warning", "problem"]
    check: str
    #: What the check has found, in one line.
    found: str
    #: What to do, in one line; empty if there is nothing to do.
    advice: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """What environment and files tell about the web server. A text is empty if they do not tell."""

    #: ``"gunicorn"`` or ``"uwsgi"``.
    name: str = ""
    #: The setting that starts several workers.
    several: str = ""
    #: The setting that loads the app before the workers are forked.
    preload: str = ""
    #: Seconds that gunicorn gives a worker to shut down, and the setting they come from.
    graceful_timeout: float = 30.0
    graceful_by: str = "the default"
    #: If true, its workers run no Python threads besides requests.
    threadless: bool = False


def examine(app: Flask, executor: Executor, app_executor: AppExecutor) -> list[Finding]:
    """Run all checks on an app that was just loaded, in the folder and environment of its server."""
    config, server = app_executor.config, read_server(os.environ, Path.cwd())
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    findings = [*check_type(config)]
    if app_executor.producer is not None:
        findings += check_engine(config, app_executor.backend)
    if isinstance(app_executor.tracker, SharedJobTracker):
        findings += check_store(config, app_executor.tracker.store)
        findings += check_secret_key(config, app.config.get("SECRET_KEY"), signs_jobs=app_executor.producer is not None)
    else:
        findings += check_memory(config, server)
    if app_executor.remote:
        findings += check_start_method(config, start_method(config), threads, sys.version_info[:2])
        findings += check_import_string(config, app, start_method(config))
        findings += check_jobs(executor)
    findings += check_reloader(app)
    findings += check_import_time([future.record().name for future in app_executor.in_flight.futures()])
    findings += check_server(config, server)
    findings += check_bounds(config)
    return findings


# ---- the store ----


def check_memory(config: Config, server: Server) -> Iterator[Finding]:
    """Check whether records in memory are enough for this server."""
    key = config.key("EXECUTOR_STORE")
    advice = f"Set {key} to 'sqlite' (a file in the instance folder, no server needed) or to 'redis://...'."
    if server.several:
        found = f"{key} is 'memory', and {server.several}: each worker knows its own jobs only, and the others answer "
        yield Finding(level="problem", check="store", found=found + "'unknown' for them.", advice=advice)
    else:
        found = f"{key} is 'memory': only the process that runs a job knows it, and forgets it when it ends."
        yield Finding(level="note", check="store", found=found, advice=f"Before there are several workers: {advice}")


def check_store(config: Config, store: JobStore) -> Iterator[Finding]:
    """Check whether a shared store answers, and how fast."""
    holder = new_holder_id()
    try:
        store.check(thoroughly=True)
        begin = time.perf_counter()
        store.list(limit=1)
        read = time.perf_counter() - begin
        store.renew(holder)  # a write as processes with jobs make it; it is taken back at once
        written = time.perf_counter() - begin - read
        store.drop_lease(holder)
    except StoreUnavailable as error:
        advice = f"Mend that, or change {config.key('EXECUTOR_STORE')}; until then submit_stored() raises this error."
        yield Finding(level="problem", check="store", found=f"{error}.".replace("..", "."), advice=advice)
        return
    found = f"{store.where} answers: {read * 1000:.1f} ms to read, {written * 1000:.1f} ms to write."
    if max(read, written) > _SLOW_ACCESS:
        advice = "Every view that looks at a job waits that long: move the store nearer, or to a faster disk."
        yield Finding(level="warning", check="store", found=found, advice=advice)
    else:
        yield Finding(level="ok", check="store", found=found)
    if config.store.startswith("sqlite"):
        yield from check_file(config, Path(store.where))
        yield from check_file_system(config, Path(store.where), _mounts())
    else:
        yield from check_redis(getattr(store, "_redis", None))
    yield from check_records(config, sum(job.status.ended for job in store.list()))


def check_file(config: Config, path: Path) -> Iterator[Finding]:
    """Who can read and write the file, and whether there is space for it to grow."""
    mode = stat.S_IMODE(path.stat().st_mode)
    advice = f"chmod 600 {shlex.quote(str(path))}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        found = f"Others may write to {path} (mode {mode:04o}), and results are unpickled from there."
        yield Finding(level="problem", check="store file", found=found, advice=advice)
    elif mode & 0o077:
        found = f"Others may read {path} (mode {mode:04o}): arguments in names, messages, logs and results."
        yield Finding(level="warning", check="store file", found=found, advice=advice)
    else:
        yield Finding(level="ok", check="store file", found=f"Only its owner can read and write it (mode {mode:04o}).")
    free = shutil.disk_usage(path.parent).free
    if free < _LITTLE_SPACE:
        found = f"{free / 2**20:.0f} MiB are free in {path.parent}; a full disk makes the store unavailable."
        advice = f"Free space, or point {config.key('EXECUTOR_STORE')} elsewhere: 'sqlite:///path'."
        yield Finding(level="problem", check="disk space", found=found, advice=advice)


def check_file_system(config: Config, path: Path, mounts: str) -> Iterator[Finding]:
    """Whether the file is on a network file system, where SQLite's write-ahead mode does not work.

    :param mounts: what ``/proc/mounts`` says.
    """
    kind = _file_system_of(path.resolve(), mounts)
    if kind is not None and _NETWORK.fullmatch(kind):
        yield Finding(
            level="problem",
            check="file system",
            found=f"{path} is on a network file system ({kind}): SQLite breaks there when two machines use the file.",
            advice=f"Put it on a local disk, or set {config.key('EXECUTOR_STORE')} to 'redis://...'.",
        )


def _file_system_of(path: Path, mounts: str) -> str | None:
    longest, kind = -1, None
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        if path.is_relative_to(point) and len(point.parts) >= longest:  # of those at one place the last is on top
            longest, kind = len(point.parts), fields[2]
    return kind


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(errors="replace")
    except OSError:  # not Linux
        return ""


def check_redis(client: Any) -> Iterator[Finding]:
    """Whether Redis may throw records away, and whether it has them after a restart.

    :param client: what can be asked: ``config_get(pattern)``.
    """
    try:
        settings = {**client.config_get("maxmemory*"), **client.config_get("save"), **client.config_get("appendonly")}
    except Exception as error:  # hosted ones do not answer that, each in its own way
        found = f"Redis does not tell how it is configured ({describe_error(error)})."
        advice = "See yourself that maxmemory-policy is noeviction and that it saves what it has."
        yield Finding(level="note", check="redis", found=found, advice=advice)
        return
    policy, memory = settings.get("maxmemory-policy", ""), settings.get("maxmemory", "0")
    if policy.startswith(("allkeys", "volatile")):
        limit = f"maxmemory is {memory}" if memory != "0" else "as soon as maxmemory is set"
        what = "any record" if policy.startswith("allkeys") else "results and leases, so that running jobs seem lost,"
        level: Literal["warning", "problem"] = "problem" if policy.startswith("allkeys") else "warning"
        yield Finding(
            level=level,
            check="redis",
            found=f"maxmemory-policy is {policy}: when memory runs out Redis throws away {what} ({limit}).",
            advice="Set maxmemory-policy to noeviction; a cache belongs into a Redis of its own.",
        )
    if not settings.get("save") and settings.get("appendonly") != "yes":
        found = "Redis saves nothing to disk (no save, no appendonly): a restart forgets all jobs and their results."
        advice = "Set appendonly yes, unless they may be forgotten."
        yield Finding(level="note", check="redis", found=found, advice=advice)


def check_records(config: Config, ended: int) -> Iterator[Finding]:
    """Check whether the store keeps all records for as long as it should."""
    key, most = config.key("EXECUTOR_STORE_MAX_RECORDS"), config.store_max_records
    found = f"{ended} records of ended jobs; {key} is {most}."
    if ended < 0.9 * most:
        yield Finding(level="ok", check="records", found=found)
    else:
        advice = f"The oldest leave before their time: raise it, or lower {config.key('EXECUTOR_RESULT_TTL')}."
        yield Finding(level="warning", check="records", found=found, advice=advice)


def check_secret_key(config: Config, secret_key: Any, *, signs_jobs: bool = False) -> Iterator[Finding]:
    """Check SECRET_KEY, which signs what is unpickled: whoever can forge a signature can run code in the app.

    :param signs_jobs: If true, calls on their way to an engine are signed too.
    """
    advice = """Make one with: python -c "import secrets; print(secrets.token_hex())"; the same for all processes."""
    length = len(secret_key or "")
    text = secret_key.decode(errors="replace") if isinstance(secret_key, bytes) else str(secret_key or "")
    if not length and signs_jobs:
        found = "There is no SECRET_KEY: jobs are signed with it on their way, and submit() refuses to go without."
        yield Finding(level="problem", check="SECRET_KEY", found=found, advice=advice)
    elif not length and config.store.startswith("sqlite"):
        found = "There is no SECRET_KEY: results in the store are not signed, and only its file mode protects them."
        yield Finding(level="warning", check="SECRET_KEY", found=found, advice=advice)
    elif not length:
        found = "There is no SECRET_KEY: results are signed with it, and submit_stored() refuses to go without."
        yield Finding(level="problem", check="SECRET_KEY", found=found, advice=advice)
    elif length < _SHORT_KEY or text.lower() in _COMMON_KEYS:
        found = f"SECRET_KEY can be guessed ({length} characters): whoever does and can write to the store runs code."
        yield Finding(level="warning", check="SECRET_KEY", found=found, advice=advice)
    else:
        yield Finding(level="ok", check="SECRET_KEY", found=f"There is one, of {length} characters.")


# ---- what runs jobs ----


def check_type(config: Config) -> Iterator[Finding]:
    """Name the backend, and warn of one that is for tests."""
    key = config.key("EXECUTOR_TYPE")
    name = config.type.rpartition(":")[2]
    if name == "ImmediateBackend":
        found = f"{key} is 'immediate': jobs run in submit(), and requests wait for them."
        yield Finding(level="warning", check="type", found=found, advice=f"Outside of tests set {key} to 'thread'.")
    else:
        yield Finding(level="ok", check="type", found=f"Jobs run on {name}.")


def check_engine(config: Config, engine: Backend) -> Iterator[Finding]:
    """Check whether the engine answers and has workers."""
    if engine.engine == "dask" and config.url is None:
        found = "Each process that submits jobs starts workers of its own for them."
        yield Finding(level="ok", check="workers", found=found)
        return
    try:
        workers = engine.workers
    except EngineUnavailable as error:
        advice = f"Mend that, or change {config.key('EXECUTOR_URL')}; until then submit() raises this error."
        yield Finding(level="problem", check="workers", found=str(error), advice=advice)
        return
    if workers:
        found = f"{workers} {'worker looks' if workers == 1 else 'workers look'} at queue {config.queue!r}."
        yield Finding(level="ok", check="workers", found=found)
    else:
        found = f"No worker looks at queue {config.queue!r} of {engine.engine}: jobs stay queued until one does."
        same = f"{config.key('EXECUTOR_URL')} and {config.key('EXECUTOR_QUEUE')}"
        advice = f"Start some with 'flask executor worker'; if some run, compare {same}."
        yield Finding(level="warning", check="workers", found=found, advice=advice)


def start_method(config: Config) -> str:
    """The start method of worker processes. Asking for it does not fix the default of this process."""
    default = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return config.start_method or default


def check_start_method(
    config: Config, method: str, threads: Sequence[str], python: tuple[int, ...]
) -> Iterator[Finding]:
    """Check whether a process with threads is forked: its child would inherit locks that no thread releases there.

    :param threads: names of the threads that run beside the main thread once the app is loaded.
    """
    key = config.key("EXECUTOR_START_METHOD")
    advice = f"Set {key} to 'forkserver' (and {config.key('EXECUTOR_APP')}), or start them at the first request."
    if method != "fork":
        yield Finding(level="ok", check="start method", found=f"Worker processes are started by {method}.")
    elif threads:
        found = f"Worker processes are forked, and {len(threads)} threads run once the app is loaded ({_some(threads)})"
        found += ": a worker that inherits a lock which one of them has waits for ever."
        yield Finding(
            level="warning",
            check="start method",
            found=found.replace(" 1 threads run", " 1 thread runs"),
            advice=advice,
        )
    elif python >= (3, 12):
        found = "Worker processes are forked, and Python 3.12 and later warn when a process with threads does that."
        advice = f"If that worries you, set {key} to 'forkserver' and {config.key('EXECUTOR_APP')}."
        yield Finding(level="note", check="start method", found=found, advice=advice)
    else:
        yield Finding(level="ok", check="start method", found="Worker processes are forked; no threads run by then.")


def check_import_string(config: Config, app: Flask, method: str) -> Iterator[Finding]:
    """Check whether worker processes that do not inherit the app can import it."""
    if method == "fork":
        return
    key, where = config.key("EXECUTOR_APP"), config.app or find_import_string(app)
    if where is None:
        found = f"Worker processes (started by {method}) import the app, and where it is cannot be told."
        advice = f"Set {key} to its import string, as for 'flask --app': 'shop:app' or 'shop:create_app()'."
        yield Finding(level="problem", check="app", found=found, advice=advice)
    else:
        yield Finding(level="ok", check="app", found=f"Worker processes import the app from {where!r}.")


def check_jobs(executor: Executor) -> Iterator[Finding]:
    """Check whether worker processes can import the functions that ``@executor.job`` decorates."""
    bad = [name for name, job in sorted(_jobs_of(executor).items()) if not _can_be_imported(job)]
    if bad:
        yield Finding(
            level="problem",
            check="jobs",
            found=f"Worker processes cannot import {_some(bad)}.",
            advice="Define them with def at the top of a module that is imported by its name, under their own name.",
        )


def _jobs_of(executor: Executor) -> dict[str, ExecutorJob[Any, Any]]:
    """The decorated functions of all loaded modules, by module and name."""
    found: dict[str, ExecutorJob[Any, Any]] = {}
    for module in list(sys.modules.values()):
        # type() and not isinstance(), which would look behind proxies such as request.
        for value in list(getattr(module, "__dict__", {}).values()):
            if issubclass(type(value), ExecutorJob) and value.executor is executor:
                job = value._submitted  # the function itself, which a worker imports, and not a copy with options
                found[f"{job.__module__}.{job.__qualname__}"] = job
    return found


def _can_be_imported(job: ExecutorJob[Any, Any]) -> bool:
    place: Any = sys.modules.get(job.__module__)
    for name in job.__qualname__.split("."):
        place = getattr(place, name, None)
    return place is job and job.__module__ != "__main__"


# ---- the server ----


def check_reloader(app: Flask) -> Iterator[Finding]:
    """Warn of debug mode, in which the server restarts whenever a file changes."""
    if app.debug:
        found = "Debug mode is on: the reloader ends the process at every change of a file, and its jobs with it."
        yield Finding(level="note", check="reloader", found=found, advice="flask run --no-reload keeps them.")


def check_import_time(names: Sequence[str]) -> Iterator[Finding]:
    """Warn of jobs that were submitted while the app was loaded.

    :param names: the names of the jobs of this process.
    """
    if names:
        yield Finding(
            level="warning",
            check="import",
            found=f"Loading the app submits jobs ({_some(names)}): every worker, reload and command runs them again.",
            advice="Submit them in a view or a command, or with submit_once() and a shared store.",
        )


def check_server(config: Config, server: Server) -> Iterator[Finding]:
    """Check what the server does to threads and processes."""
    if server.threadless:
        found = "uwsgi.ini has no enable-threads: uWSGI runs no Python threads besides requests, and jobs stand still."
        yield Finding(level="problem", check="uwsgi", found=found, advice="Add 'enable-threads = true' to uwsgi.ini.")
    if server.preload:
        found = f"The app is loaded before the workers are forked ({server.preload}); the executor is made for that."
        advice = "Submit nothing at import: such jobs run in the master, and a worker does not know them."
        yield Finding(level="note", check="preload", found=found, advice=advice)
    if server.name == "gunicorn":
        yield from check_graceful_timeout(config, server)


def check_graceful_timeout(config: Config, server: Server) -> Iterator[Finding]:
    """Check whether gunicorn kills a worker before its jobs have had their time to end."""
    shutdown, grace = config.key("EXECUTOR_SHUTDOWN_TIMEOUT"), config.key("EXECUTOR_STOP_GRACE")
    needed = config.shutdown_timeout + config.stop_grace
    given = f"gunicorn's graceful_timeout is {server.graceful_timeout:g} s ({server.graceful_by})"
    found = (
        f"{given}, and a worker that leaves may need {needed:g} s ({shutdown} {config.shutdown_timeout:g} + {grace} "
    )
    found += f"{config.stop_grace:g})"
    if needed <= server.graceful_timeout:
        yield Finding(level="ok", check="shutdown", found=f"{found}.")
    else:
        advice = f"Set graceful_timeout to {needed + 5:g}, or lower {shutdown}."
        found = f"{found}: then it is killed, and its jobs with it."
        yield Finding(level="warning", check="shutdown", found=found, advice=advice)


def check_bounds(config: Config) -> Iterator[Finding]:
    """Check whether the queue is bounded."""
    if config.max_pending is None and not config.type.endswith(":ImmediateBackend"):
        key = config.key("EXECUTOR_MAX_PENDING")
        found = f"{key} is None: when jobs come faster than they are done, the queue grows until memory ends."
        yield Finding(level="note", check="queue", found=found, advice="Set it, and answer QueueFull with a 503.")


def read_server(environ: Mapping[str, str], folder: Path) -> Server:
    """Read what the environment and the files in a folder tell about the web server."""
    if (folder / "uwsgi.ini").is_file():
        return _read_uwsgi(_text_of(folder / "uwsgi.ini"))
    arguments = _gunicorn_arguments(environ.get("GUNICORN_CMD_ARGS", ""))
    place = folder / str(arguments.pop("config", "gunicorn.conf.py")).removeprefix("file:")
    settings = {name: (value, "GUNICORN_CMD_ARGS") for name, value in arguments.items()}
    for name, value in _assignments(_text_of(place)).items():
        settings.setdefault(name, (value, place.name))
    if "WEB_CONCURRENCY" in environ:  # other servers know this variable too
        settings.setdefault("workers", (environ["WEB_CONCURRENCY"], "the environment (WEB_CONCURRENCY)"))
    workers, said_by = settings.get("workers", ("1", ""))
    preload, preload_by = settings.get("preload_app", ("False", ""))
    graceful, graceful_by = settings.get("graceful_timeout", ("30", "the default"))
    known = graceful.replace(".", "", 1).isdigit()
    return Server(
        name="gunicorn" if place.is_file() or environ.get("GUNICORN_CMD_ARGS") else "",
        several=f"{said_by} says workers = {workers}" if workers not in ("0", "1", "None", "") else "",
        preload=f"preload_app in {preload_by}" if preload not in ("False", "0", "None") else "",
        graceful_timeout=float(graceful) if known else 30.0,
        graceful_by=graceful_by if known else "the default",
    )


def _gunicorn_arguments(text: str) -> dict[str, str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-w", "--workers")
    parser.add_argument("-c", "--config")
    parser.add_argument("--preload", dest="preload_app", action="store_const", const="True")
    parser.add_argument("--graceful-timeout")
    try:
        known, _ = parser.parse_known_args(shlex.split(text))
    except (argparse.ArgumentError, ValueError):  # gunicorn itself will report the error
        return {}
    return {name: value for name, value in vars(known).items() if value is not None}


def _assignments(source: str) -> dict[str, str]:
    """The source text of what a Python file assigns to its global names."""
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, str] = {}
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if value is not None:
            found.update({target.id: ast.unparse(value) for target in targets if isinstance(target, ast.Name)})
    return found


def _read_uwsgi(text: str) -> Server:
    parser = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True)
    try:
        parser.read_string(text)
        options: Mapping[str, str | None] = parser["uwsgi"]
    except (configparser.Error, KeyError):
        return Server(name="uwsgi")
    name = next((name for name in ("processes", "workers", "p") if options.get(name) not in (None, "0", "1")), None)
    return Server(
        name="uwsgi",
        several=f"uwsgi.ini says {name} = {options[name]}" if name else "",
        threadless=not any(_is_on(options, name) for name in ("enable-threads", "threads")),
    )


def _is_on(options: Mapping[str, str | None], name: str) -> bool:
    return name in options and (options[name] or "true").lower() not in {"false", "no", "off", "0"}


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _some(names: Iterable[str]) -> str:
    """At most five of the names: ``render, mail ...``."""
    names = list(names)
    return ", ".join(names[:5]) + " ..." * (len(names) > 5)
