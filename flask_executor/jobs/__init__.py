"""One job: its record and options, its call, its contexts, what it can do while it runs, and all of that as bytes."""

from flask_executor.jobs.current import RunningJob
from flask_executor.jobs.model import Job, JobMessage, JobStatus, LogLine

__all__ = ["Job", "JobMessage", "JobStatus", "LogLine", "RunningJob"]
