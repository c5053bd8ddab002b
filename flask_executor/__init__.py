"""Background jobs for Flask that start as one line."""

from flask_executor.exceptions import (
    AppNotFound,
    ConfigError,
    EngineUnavailable,
    ExecutorError,
    ExecutorShutdown,
    JobExit,
    JobStopped,
    JobTimeout,
    KeyExists,
    MissingExtra,
    NotPicklable,
    QueueFull,
    RemoteTraceback,
    ResultExpired,
    ResultTooLarge,
    StoreUnavailable,
    Unsupported,
    UntrustedResult,
    WorkerLost,
)
from flask_executor.executor.extension import Executor
from flask_executor.executor.flow import Flow
from flask_executor.executor.submitters import ExecutorJob
from flask_executor.futures import FutureCollection, FutureProxy
from flask_executor.jobs.current import checkpoint, current_job, track
from flask_executor.jobs.model import Job, JobStatus, LogLine
from flask_executor.services.definition import Service, every, on
from flask_executor.signals import job_failed, job_finished, job_queued, job_started

__all__ = [
    "AppNotFound",
    "ConfigError",
    "EngineUnavailable",
    "Executor",
    "ExecutorError",
    "ExecutorJob",
    "ExecutorShutdown",
    "Flow",
    "FutureCollection",
    "FutureProxy",
    "Job",
    "JobExit",
    "JobStatus",
    "JobStopped",
    "JobTimeout",
    "KeyExists",
    "LogLine",
    "MissingExtra",
    "NotPicklable",
    "QueueFull",
    "RemoteTraceback",
    "ResultExpired",
    "ResultTooLarge",
    "Service",
    "StoreUnavailable",
    "Unsupported",
    "UntrustedResult",
    "WorkerLost",
    "checkpoint",
    "current_job",
    "every",
    "job_failed",
    "job_finished",
    "job_queued",
    "job_started",
    "on",
    "track",
]

__version__ = "2.0.0.dev1"
