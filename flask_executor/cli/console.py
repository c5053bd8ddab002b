"""Jobs as text for a terminal: tables, colours, bars, and the screen of ``flask executor top``."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import click

from flask_executor.abc import ServiceStatus
from flask_executor.cli.doctor import Finding
from flask_executor.jobs.model import Job, JobStatus, LogLine
from flask_executor.web.status import key_text

_STYLES: dict[str, dict[str, Any]] = {
    JobStatus.QUEUED: {"fg": "cyan"},
    JobStatus.RUNNING: {"fg": "blue", "bold": True},
    JobStatus.SUCCEEDED: {"fg": "green"},
    JobStatus.FAILED: {"fg": "red"},
    JobStatus.STOPPED: {"fg": "yellow"},
    JobStatus.KILLED: {"fg": "yellow"},
    JobStatus.TIMED_OUT: {"fg": "magenta"},
    JobStatus.LOST: {"fg": "red", "bold": True},
    JobStatus.CANCELLED: {"dim": True},
    "ok": {"fg": "green"},
    "note": {"fg": "cyan"},
    "warning": {"fg": "yellow"},
    "problem": {"fg": "red", "bold": True},
}
_HEADINGS = ("ID", "NAME", "KEY", "STATUS", "DONE", "AGE", "TOOK", "OWNER", "MESSAGE")
_STATUS = _HEADINGS.index("STATUS")


# ---- as text ----


def terminal_size() -> tuple[int, int]:
    """Columns and lines of the terminal; 80 and 24 if they are not known."""
    columns, lines = shutil.get_terminal_size()
    return columns or 80, lines or 24  # Python 3.10 returns zeros for a terminal without a size


def one_line(value: object) -> str:
    """A text as one line, without control characters."""
    return "".join(sign if sign.isprintable() else " " for sign in str(value))


def job_title(job: Job) -> str:
    """A job in a sentence, by key, name and id."""
    key = key_text(job.key)
    return one_line(f"Job {job.id} ({job.name})" if key is None else f"Job {key} ({job.name}, {job.id})")


def styled(text: str) -> str:
    """A text that begins with a status or a level, in the colour of that."""
    return click.style(text, **_STYLES[text.split()[0]])


def _seconds(seconds: float) -> str:
    """``0.2s``, ``42s``, ``3m05s``, ``2h10m``, ``4d03h``"""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f}s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 1:
        return f"{int(seconds)}s"
    if hours < 1:
        return f"{int(minutes)}m{int(seconds % 60):02}s"
    return f"{int(hours)}h{int(minutes % 60):02}m" if days < 1 else f"{int(days)}d{int(hours % 24):02}h"


def _row(job: Job, now: float) -> tuple[str, ...]:
    took = "" if job.started_at is None else _seconds((job.ended_at or now) - job.started_at)
    asked = " (stopping)" if job.stop_requested and not job.status.ended else ""
    message = job.error if job.error and job.status.ended else job.message
    return (
        job.id,
        one_line(job.name),
        one_line(key_text(job.key) or ""),
        f"{job.status.value}{asked}",
        "" if job.progress is None else _percent(job.progress),
        _seconds(now - job.queued_at),
        took,
        one_line(job.owner or ""),
        one_line(message or ""),
    )


def table(jobs: Sequence[Job]) -> Iterator[str]:
    """The lines of a table of jobs; cut to the width of the terminal, if standard output is one."""
    now = time.time()
    rows = [_HEADINGS, *(_row(job, now) for job in jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    width = terminal_size()[0] if sys.stdout.isatty() else sys.maxsize
    for row in rows:
        cells = [cell.ljust(size) for cell, size in zip(row, widths, strict=True)]
        before, after = "  ".join(cells[:_STATUS]) + "  ", "  " + "  ".join(cells[_STATUS + 1 :])
        status, left = cells[_STATUS], width - len(before)
        if left < len(status):  # a narrow terminal
            yield before[:width]
            continue
        coloured = click.style(status, bold=True) if row is _HEADINGS else styled(status)
        yield before + coloured + after[: left - len(status)].rstrip()


def service_table(services: Sequence[ServiceStatus]) -> Iterator[str]:
    """The lines of a table of services."""
    rows = [("SERVICE", "READY", "BUSY", "WAITING", "RESTARTS", "SUPERVISOR", "LAST ERROR")]
    rows += [
        (
            one_line(service.name),
            f"{service.ready}/{service.workers}",
            str(service.busy),
            str(service.waiting),
            str(service.failures),
            "-" if service.supervisor is None else str(service.supervisor),
            one_line(service.last_error or "-"),
        )
        for service in services
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def details(job: Job) -> Iterator[tuple[str, str]]:
    """Labels and values of all that a record has."""
    now = time.time()
    asked = " (asked to stop)" if job.stop_requested and not job.status.ended else ""
    yield "id", job.id
    yield "name", one_line(job.name)
    yield "key", one_line(key_text(job.key) or "-")
    yield "owner", one_line(job.owner or "-")
    yield "status", styled(job.status) + asked
    yield "progress", "-" if job.progress is None else _bar(job.progress)
    yield "message", one_line(job.message or "-")
    yield "error", one_line(job.error or "-")
    yield "attempt", str(job.attempt)
    for label, moment in (("queued", job.queued_at), ("started", job.started_at), ("ended", job.ended_at)):
        yield label, "-" if moment is None else f"{_moment(moment)} ({_seconds(now - moment)} ago)"
    if job.started_at is not None:
        yield "took", _seconds((job.ended_at or now) - job.started_at)
    for name, value in job.meta.items():
        yield "meta", one_line(f"{name} = {value!r}")


def _bar(progress: float) -> str:
    done = round(20 * min(1.0, max(0.0, progress)))
    return f"[{'#' * done}{'.' * (20 - done)}] {_percent(progress)}"


def _percent(progress: float) -> str:
    return f"{int(progress * 100 + 1e-6)}%"  # rounded down: 100% only when all is done


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def log_line(line: LogLine) -> str:
    """A line of a job's log, with its traceback indented."""
    text = "\n    ".join(map(one_line, line.full_text.splitlines()))
    return f"  {datetime.fromtimestamp(line.time):%H:%M:%S} {line.level:<7} {one_line(line.logger)}: {text}"


def show_progress(job: Job) -> None:
    """Print a job's progress on standard error, over the line before."""
    progress = "" if job.progress is None else f" {_bar(job.progress)}"
    text = f"{one_line(job.name)}: {job.status.value}{progress} {one_line(job.message or '')}"
    click.echo(f"\r\x1b[2K{text[: terminal_size()[0] - 1]}", nl=False, err=True)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print what the doctor has found, with advice."""
    width = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        click.echo(f"{styled(finding.level.ljust(7))}  {finding.check.ljust(width)}  {one_line(finding.found)}")
        if finding.advice:
            click.echo(f"{'':{11 + width}}{one_line(finding.advice)}")


# ---- the terminal, for "top" ----


Draw = Callable[[str, Sequence[Job]], None]


@contextmanager
def screen(terminal: bool) -> Iterator[Draw]:
    """A function that draws a frame: over the last one in a terminal, with rich if it is installed, else below it."""
    if not terminal:
        yield _print_frame
        return
    try:
        from rich.live import Live
    except ImportError:
        yield _redraw
        return
    with Live(screen=True, auto_refresh=False) as live:
        yield lambda headline, jobs: live.update(_rich_table(headline, jobs), refresh=True)


def _print_frame(headline: str, jobs: Sequence[Job]) -> None:
    click.echo("\n".join([headline, "", *table(jobs)]))


def _redraw(headline: str, jobs: Sequence[Job]) -> None:
    click.clear()
    _print_frame(headline, jobs)


def _rich_table(headline: str, jobs: Sequence[Job]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(headline), caption=Text("Ctrl-C ends"), box=None, expand=True, title_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, no_wrap=True, ratio=1 if heading == "MESSAGE" else None)
    now = time.time()
    for job in jobs:
        cells = [Text(cell) for cell in _row(job, now)]  # Text, so that nothing in it counts as markup
        cells[_STATUS] = Text.from_ansi(styled(cells[_STATUS].plain))
        table.add_row(*cells)
    return table
