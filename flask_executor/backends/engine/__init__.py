"""What the workers of RQ, Celery and Dask call, and how several workers are started at once."""

from flask_executor.backends.engine.entrypoint import run

__all__ = ["run"]
