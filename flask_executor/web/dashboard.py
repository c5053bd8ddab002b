"""The figures that the dashboard shows above its list of jobs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flask_executor.abc import Health, JobRecords, WorkerState
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.web.status import elapsed_seconds, job_document

_SAMPLE_SIZE = 1000  # newest jobs, of which those that have ended are counted
_CHART_SIZE = 60  # jobs in the chart


def dashboard_data(records: JobRecords, health: Health, workers: Sequence[WorkerState]) -> dict[str, Any]:
    """Counts, durations and workers.

    Queued and running jobs are all counted; of those that have ended, the ones among the newest 1,000.

    :param health: the health of this process.
    :param workers: the workers of this process.
    """
    sample = records.list(limit=_SAMPLE_SIZE)
    counts = Counter(job.status for job in sample if job.status.ended)
    for status in JobStatus.QUEUED, JobStatus.RUNNING:
        counts[status] = len(records.list(status=status))
    ended = [job for job in sample if job.status.ended and job.started_at is not None]
    ended.sort(key=lambda job: job.ended_at or 0.0)
    return {
        "counts": {status.value: counts[status] for status in JobStatus},
        "failed": sum(counts[status] for status in JobStatus if status.failed),
        "sampled": len(sample),
        "functions": _by_function(ended),
        "recent": [_chart_entry(job) for job in ended[-_CHART_SIZE:]],
        "health": asdict(health),
        "workers": [_worker(worker) for worker in workers if worker.service is None],
    }


def _by_function(ended: Sequence[Job]) -> list[dict[str, Any]]:
    """Success and durations of each function; the one that ran most often first."""
    by_name: dict[str, list[Job]] = {}
    for job in ended:
        by_name.setdefault(job.name, []).append(job)
    rows = []
    for name, jobs in by_name.items():
        succeeded = sum(job.status is JobStatus.SUCCEEDED for job in jobs)
        seconds = sorted(elapsed_seconds(job) or 0.0 for job in jobs)
        rows.append(
            {
                "name": name,
                "count": len(jobs),
                "succeeded": succeeded,
                "failed": len(jobs) - succeeded,
                "median": _quantile(seconds, 0.5),
                "p95": _quantile(seconds, 0.95),
            }
        )
    return sorted(rows, key=lambda row: row["count"], reverse=True)


def _quantile(ascending: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed."""
    return round(ascending[max(0, -int(-share * len(ascending) // 1) - 1)], 3)


def _chart_entry(job: Job) -> dict[str, Any]:
    document = job_document(job)
    seconds = round(elapsed_seconds(job) or 0.0, 3)
    return {**{name: document[name] for name in ("id", "name", "status", "failed", "ended_at")}, "seconds": seconds}


def _worker(worker: WorkerState) -> Mapping[str, Any]:
    return {
        "pid": worker.pid,
        "kind": "process" if worker.pid != os.getpid() else "threads",
        "busy": worker.busy,
        "memory": _resident_bytes(worker.pid),
        "job": worker.job,
    }


def _resident_bytes(pid: int) -> int | None:
    """Resident memory of a process in bytes; None if the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
