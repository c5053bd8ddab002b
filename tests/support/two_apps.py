"""Two apps with one store stand for two processes."""

from __future__ import annotations

from typing import Any

from flask import Flask

from flask_executor import (
    Executor,
)
from flask_executor.tracking.stored_future import StoredFuture


def another_app(app: Flask, secret: str | None = "not a secret in a test") -> Flask:
    other = Flask(app.import_name, instance_path=app.instance_path)
    other.config.update({key: value for key, value in app.config.items() if key.startswith("EXECUTOR_")})
    other.secret_key = secret
    return other


def stored(executor: Executor, key: Any) -> StoredFuture[Any]:
    future = executor.futures.get(key)
    assert isinstance(future, StoredFuture)
    return future
