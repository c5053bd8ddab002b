"""The Flask extension: what submits, its configuration, one executor in one app, stopping, shutdown, engines."""

from flask_executor.executor.extension import Executor
from flask_executor.executor.submitters import ExecutorJob, ExecutorWithOptions
from flask_executor.futures import propagate_exceptions_callback

__all__ = ["Executor", "ExecutorJob", "ExecutorWithOptions", "propagate_exceptions_callback"]
