"""What ``compare_engines.py`` has workers run: the app, and the same function as a bare task."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask

from flask_executor import Executor


def nothing(number: int = 0) -> int:
    """A job that does nothing."""
    return number


def make_app() -> Flask:
    """The app, as workers import it: what it has to know is in the environment."""
    app = Flask("shop", instance_path=os.environ["BENCHMARK_FOLDER"])
    app.secret_key = "benchmark"
    app.config.from_prefixed_env()
    Executor(app)
    return app


def make_celery() -> Any:
    """A Celery with a bare task."""
    from celery import Celery

    broker = os.environ["BENCHMARK_BROKER"]
    made = Celery("bare", broker=broker, backend=broker, set_as_current=False)
    made.conf.update(task_default_queue="bare", broker_connection_retry_on_startup=True)
    made.task(nothing, name="nothing")
    return made


def __getattr__(name: str) -> Any:
    if name == "bare":  # for the command celery
        return make_celery()
    raise AttributeError(name)
