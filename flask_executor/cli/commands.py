"""The commands of ``flask executor``: look at jobs, stop them and wait for them, from any shell on any machine.

They see what is in a shared store. The text that a command prints may change; what it prints with ``--json`` is an
interface for scripts.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Hashable
from concurrent import futures
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click
from flask import current_app
from flask.cli import AppGroup, NoAppException

from flask_executor.cli.console import (
    details,
    job_title,
    log_line,
    one_line,
    print_findings,
    screen,
    service_table,
    show_progress,
    styled,
    table,
    terminal_size,
)
from flask_executor.cli.doctor import examine
from flask_executor.exceptions import EngineUnavailable, ExecutorError, ResultExpired
from flask_executor.executor.app_executor import AppExecutor
from flask_executor.executor.extension import Executor
from flask_executor.executor.producer import call_signer
from flask_executor.helpers import safe_repr
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.stores.codec import decode_key, encode_key
from flask_executor.tracking.shared import SharedJobTracker
from flask_executor.web.status import job_document, log_document, timestamp

_STORE_CHECK_INTERVAL = 1.0  # seconds after which "wait" and "stop" make sure that the store still answers
_PROGRESS_INTERVAL = 0.2  # seconds between two updates of the progress that "wait" shows in a terminal
_STOP_MARGIN = 3.0  # seconds beyond its grace within which a job should have stopped
_MAX_GRACE_WAIT = 10.0  # seconds of a job's grace that "stop" waits for
_MAX_COUNTED = 1000  # jobs that "top" counts
_ID_PREFIX = re.compile("[0-9a-f]{4,23}")


class _Commands(AppGroup):
    """Commands in the app's context, which print errors of this package as one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ExecutorError as error:
            raise click.ClickException(str(error)) from error
        except NoAppException as error:
            if isinstance(error.__context__, ExecutorError):  # a missing extra: an ImportError, which Flask has wrapped
                raise click.ClickException(str(error.__context__)) from error
            raise


@click.group("executor", cls=_Commands)
@click.option("--executor", "name", metavar="NAME", help="Which executor; needed when the app has several.")
def group(name: str | None) -> None:
    """Look at background jobs, stop them, and wait for them."""


_job = click.argument("text", metavar="KEY|ID")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


# ---- commands ----


@group.command("list")
@click.option("--status", type=click.Choice([status.value for status in JobStatus]), help="Only jobs with this status.")
@click.option("--name", help="Only jobs of this name.")
@click.option("--owner", help="Only jobs of this owner.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many jobs to list.")
@_json
def list_jobs(status: str | None, name: str | None, owner: str | None, limit: int, as_json: bool) -> None:
    """List jobs, youngest first."""
    app_executor, tracker = _shared_tracker()
    jobs = tracker.records.list(status=status, name=name, owner=owner, limit=limit)
    if as_json:
        _print_json([_job_data(job) for job in jobs])
    elif jobs:
        click.echo("\n".join(table(jobs)))
    else:
        hint = ""
        if app_executor.config.track == "stored":
            hint = f" Jobs without a key are recorded only if {app_executor.config.key('EXECUTOR_TRACK')} is 'all'."
        click.echo(f"No jobs.{hint}", err=True)


@group.command()
@_job
@_json
def show(text: str, as_json: bool) -> None:
    """Show a job with all its details, and its log."""
    app_executor, tracker = _shared_tracker()
    job = _find(app_executor, tracker, text)
    log = tracker.records.log(job.id)
    if as_json:
        _print_json({**_job_data(job), "log": [log_document(line, with_error=True) for line in log]})
        return
    for label, value in details(job):
        click.echo(f"{label:<10} {value}")
    if log:
        click.echo("log")
        for entry in log:
            click.echo(log_line(entry))


@group.command()
@_job
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long the job may take to stop before it is killed; EXECUTOR_STOP_GRACE by default.",
)
@click.option("--wait/--no-wait", default=True, help="Whether to wait some seconds until the job has stopped.")
@_json
@click.pass_context
def stop(context: click.Context, text: str, grace: float | None, wait: bool, as_json: bool) -> None:
    """Stop a job. Exit code 1 if it still runs."""
    app_executor, tracker = _shared_tracker()
    job = _find(app_executor, tracker, text)
    had_ended = job.status.ended
    if not had_ended:
        tracker.handle(job).stop(grace)
        seconds = app_executor.config.stop_grace if grace is None else grace
        if wait:
            job = _wait(app_executor, tracker, job, min(seconds, _MAX_GRACE_WAIT) + _STOP_MARGIN)
    if as_json:
        _print_json(_job_data(job))
    elif had_ended:
        click.echo(f"{job_title(job)} has ended already: {styled(job.status)}.")
    elif job.status.ended:
        click.echo(f"{job_title(job)}: {styled(job.status)}.")
    elif not wait:
        click.echo(f"{job_title(job)} was asked to stop.")
    else:
        click.echo(
            f"{job_title(job)} was asked to stop, and is still {styled(job.status)}: it has to get to a checkpoint."
        )
    context.exit(1 if wait and not job.status.ended else 0)


@group.command()
@_json
def services(as_json: bool) -> None:
    """Show the services and their workers. Exit code 1 if not all workers are ready."""
    _, app_executor = _selected_executor()
    found = app_executor.services.statuses()
    if as_json:
        _print_json([asdict(service) for service in found])
    for line in () if as_json else service_table(found):
        click.echo(line)
    sys.exit(0 if all(service.ready == service.workers for service in found) else 1)


@group.command()
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="How many processes run jobs."
)
@click.option("--burst", is_flag=True, help="Exit when the queue is empty.")
def worker(processes: int, burst: bool) -> None:
    """Run jobs that web apps have sent to a queue, until Ctrl-C or SIGTERM."""
    _, app_executor = _selected_executor()
    if app_executor.consumer is None:
        key = app_executor.config.key("EXECUTOR_TYPE")
        raise click.ClickException(
            f"Jobs are run by the web app itself: set {key} to 'rq', 'celery' or 'dask' to have workers run them."
        )
    call_signer(app_executor.app)  # without SECRET_KEY a worker could verify no job that it takes from the queue
    many = "1 process" if processes == 1 else f"{processes} processes"
    click.echo(
        f"{many} for jobs from {app_executor.backend.engine}, queue {app_executor.config.queue!r}. Ctrl-C to end."
    )
    try:
        app_executor.consumer.serve(processes=processes, burst=burst)
    except EngineUnavailable as error:
        raise click.ClickException(str(error)) from error


@group.command()
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Only records of jobs that ended at least so long ago.",
)
@_json
def purge(older_than: float, as_json: bool) -> None:
    """Delete the records of jobs that have ended, and their results."""
    _, tracker = _shared_tracker()
    tracker.store.sweep()  # finds those that ended with their process
    count = tracker.store.purge(time.time() - older_than)
    if as_json:
        _print_json({"purged": count})
    else:
        click.echo(f"{count} {'record' if count == 1 else 'records'} purged.")


@group.command()
@_job
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="How long to wait at most.")
@_json
@click.pass_context
def wait(context: click.Context, text: str, timeout: float | None, as_json: bool) -> None:
    """Wait until a job has ended. Exit code 0 if it succeeded, 1 if not, 2 after the timeout."""
    app_executor, tracker = _shared_tracker()
    job = _find(app_executor, tracker, text)
    show = show_progress if sys.stderr.isatty() else None
    try:
        job = _wait(app_executor, tracker, job, math.inf if timeout is None else timeout, show)
    finally:
        if show:
            click.echo("\r\x1b[2K", nl=False, err=True)
    if as_json:
        _print_json(_job_data(job))
    elif job.status.ended:
        click.echo(f"{job_title(job)}: {styled(job.status)}.{f' {one_line(job.error)}' if job.error else ''}")
    else:
        click.echo(f"{job_title(job)} is still {styled(job.status)} after {timeout:g} s.", err=True)
    context.exit(2 if not job.status.ended else 0 if job.status is JobStatus.SUCCEEDED else 1)


@group.command()
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, metavar="SECONDS")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many jobs to show.")
@click.option("--once", is_flag=True, help="Print one table and exit.")
@_json
def top(interval: float, limit: int, once: bool, as_json: bool) -> None:
    """Watch jobs until Ctrl-C: those that run, those that wait, and those that have ended last."""
    _, tracker = _shared_tracker()
    terminal = sys.stdout.isatty() and not (once or as_json)
    if terminal:
        limit = min(limit, max(1, terminal_size()[1] - 5))
    with suppress(KeyboardInterrupt), screen(terminal) as draw:
        while True:
            counts, jobs = _overview(tracker, limit)
            if as_json:
                _print_json({"time": timestamp(time.time()), **counts, "jobs": [_job_data(job) for job in jobs]})
            else:
                draw(_headline(tracker, counts), jobs)
            if once:
                return
            time.sleep(interval)


@group.command()
@_json
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Check the app and its environment. Exit code 1 if there is a problem.

    Run it in the folder, and with the environment, of the web server.
    """
    executor, app_executor = _selected_executor()
    findings = examine(current_app._get_current_object(), executor, app_executor)  # type: ignore[attr-defined]
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    context.exit(1 if any(finding.level == "problem" for finding in findings) else 0)


# ---- which executor, which job ----


def _selected_executor() -> tuple[Executor, AppExecutor]:
    """The executor that ``--executor`` selects, and what it has in the app."""
    parent = click.get_current_context().parent
    name = None if parent is None else parent.params.get("name")
    bound: dict[Executor, AppExecutor] = current_app.extensions.get("flask_executor_bindings", {})
    named = {executor.name: (executor, app_executor) for executor, app_executor in bound.items()}
    if not named:
        raise click.ClickException(
            f"The app {current_app.name!r} has no executor: call Executor(app) or executor.init_app(app)."
        )
    if name is None and len(named) == 1:
        return next(iter(named.values()))
    if name not in named:
        names = ", ".join(f"--executor {each or repr('')}" for each in sorted(named))
        what = "has several executors" if name is None else f"has no executor named {name!r}"
        raise click.ClickException(f"The app {current_app.name!r} {what}. Say which, before the command: {names}.")
    return named[name]


def _shared_tracker() -> tuple[AppExecutor, SharedJobTracker]:
    """The selected executor, if its store is a shared one.

    :raises ClickException: if it is not.
    """
    _, app_executor = _selected_executor()
    if not isinstance(app_executor.tracker, SharedJobTracker):
        key = app_executor.config.key("EXECUTOR_STORE")
        raise click.ClickException(
            f"{key} is 'memory': each process keeps its jobs to itself, and this command is a process of its own. "
            f"Set {key} to 'sqlite' (or 'redis://...'), and jobs can be seen from everywhere."
        )
    return app_executor, app_executor.tracker


def _find(app_executor: AppExecutor, tracker: SharedJobTracker, text: str) -> Job:
    """The job with this id, key, or beginning of an id.

    :raises ClickException: if there is none.
    """
    text = text.encode("utf-8", "replace").decode()  # an argument that is not UTF-8 has lone surrogates
    keys = _keys_of(text)
    job = tracker.records.get(text)
    for key in keys:
        job = job or tracker.records.find(key)
    job = job or _beginning_with(tracker, text)
    if job is not None:
        return job
    if tracker.records.expired(text) or any(tracker.records.expired(key=key) for key in keys):
        raise _expired(app_executor, text)
    hint = ""
    if app_executor.config.track == "stored":
        hint = f" Jobs without a key are recorded only if {app_executor.config.key('EXECUTOR_TRACK')} is 'all'."
    raise click.ClickException(f"There is no job with the id or key {text!r}, and none is remembered.{hint}")


def _beginning_with(tracker: SharedJobTracker, text: str) -> Job | None:
    """The job whose id begins like this; None if there is none.

    :raises ClickException: if there are several.
    """
    if not _ID_PREFIX.fullmatch(text):
        return None
    found = [job for job in tracker.records.list() if job.id.startswith(text)]
    if len(found) > 1:
        raise click.ClickException(f"The ids of {len(found)} jobs begin with {text!r}: give more of it.")
    return found[0] if found else None


def _expired(app_executor: AppExecutor, text: str) -> click.ClickException:
    config = app_executor.config
    ttl, most = config.key("EXECUTOR_RESULT_TTL"), config.key("EXECUTOR_STORE_MAX_RECORDS")
    return click.ClickException(
        f"There was a job with the id or key {text!r}, and its record has expired: it was purged, had ended more than "
        f"{config.result_ttl:g} s before ({ttl}), or more than {config.store_max_records} have ended "
        f"since ({most})."
    )


def _keys_of(text: str) -> list[Hashable]:
    """The keys that the text may stand for: itself, and the value of a Python literal such as ``('report', 7)``."""
    keys: list[Hashable] = [text]
    with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        key = decode_key(f"={text}")
        encode_key(key)  # fails for a value that cannot be a key
        keys.append(key)
    return keys


def _wait(
    app_executor: AppExecutor,
    tracker: SharedJobTracker,
    job: Job,
    seconds: float,
    show: Callable[[Job], None] | None = None,
) -> Job:
    """Wait until a job has ended, for ``seconds`` seconds at most; return its record.

    :param show: called with the record again and again while the job has not ended.
    """
    handle = tracker.handle(job)
    deadline = time.monotonic() + seconds
    interval = _STORE_CHECK_INTERVAL if show is None else _PROGRESS_INTERVAL
    try:
        while True:
            now = handle.record()
            if show:
                show(now)
            left = deadline - time.monotonic()
            if now.status.ended or left <= 0:
                return now
            futures.wait([handle], min(interval, left))
    except ResultExpired:
        raise _expired(app_executor, job.id) from None


def _overview(tracker: SharedJobTracker, limit: int) -> tuple[dict[str, int], list[Job]]:
    """How many jobs run and wait, and the jobs to show: these first, then the youngest others."""
    running = tracker.records.list(status=JobStatus.RUNNING, limit=_MAX_COUNTED)
    queued = tracker.records.list(status=JobStatus.QUEUED, limit=_MAX_COUNTED)
    jobs = {job.id: job for job in [*running, *reversed(queued), *tracker.records.list(limit=limit)]}
    return {"running": len(running), "queued": len(queued)}, list(jobs.values())[:limit]


def _headline(tracker: SharedJobTracker, counts: dict[str, int]) -> str:
    numbers = ", ".join(f"{number}{'+' * (number == _MAX_COUNTED)} {status}" for status, number in counts.items())
    return one_line(f"{datetime.now():%H:%M:%S}  {current_app.name}  {tracker.store.where}  {numbers}")


# ---- as JSON ----


def _job_data(job: Job) -> dict[str, Any]:
    """The status document of a job, as over HTTP, and its owner."""
    return {**job_document(job, with_error=True), "owner": job.owner}


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, default=safe_repr))
