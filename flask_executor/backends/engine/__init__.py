"""What workers of RQ, Celery and Dask call to run a job, and how several worker processes are started."""

from flask_executor.backends.engine.entrypoint import run

__all__ = ["run"]
