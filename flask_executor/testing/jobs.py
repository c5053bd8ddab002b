"""Functions that the contract tests run as jobs, and their app; here so that workers can import them."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from flask import Flask, current_app, g, request, session
from werkzeug.routing import BaseConverter

from flask_executor.exceptions import JobExit
from flask_executor.executor.extension import Executor
from flask_executor.jobs.current import checkpoint, current_job, track

#: Import string of the app, for ``EXECUTOR_APP`` and ``flask --app``.
APP = f"{__name__}:create_app()"


def plain_app(instance_path: str | None = None) -> Flask:
    """The app of the contract tests, before it has an executor."""
    app = Flask("shop", instance_path=instance_path)
    app.secret_key = "not a secret in a test"
    return app


def create_app() -> Flask:
    """The app, for workers that import it. Those of an engine have its configuration in ``FLASK_EXECUTOR_...``."""
    app = plain_app()
    if app.config.from_prefixed_env() and "EXECUTOR_TYPE" in app.config:  # a worker of an engine
        Executor(app)
    return app


def add(a: int, b: int = 0) -> int:
    return a + b


def fail(message: str = "no paper") -> NoReturn:
    raise ValueError(message)


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def pid(_: object = None) -> int:
    return os.getpid()


def app_name(_: object = None) -> str:
    return current_app.name


def of_g(name: str) -> Any:
    return getattr(g, name)


def of_request(name: str) -> Any:
    return getattr(request, name)


def of_session(name: str) -> Any:
    return session[name]


def body() -> bytes:
    return request.get_data()


class Tenant(BaseConverter):
    """A converter that looks at the contexts, which Flask allows."""

    def to_python(self, value: str) -> str:
        return f"{value} of {session.get('user')}"


def form_and_file() -> tuple[str, str | None, bytes]:
    upload = request.files["upload"]
    return request.form["title"], upload.filename, upload.read()


async def add_async(a: int, b: int) -> int:
    return a + b


def wait_for(path: str) -> None:
    """Until the file is there, or the job is stopped."""
    while not Path(path).exists():
        current_job.sleep(0.005)


def report_and_wait(path: str) -> str:
    current_job.update(progress=0.25, message="a quarter", pages=3)
    current_job.update(progress=0.5, done={"pages"})
    wait_for(path)
    current_job.update(progress=1, message="all")
    return current_job.id


def about_itself() -> tuple[str, object, str, int, str | None, bool]:
    return (
        current_job.id,
        current_job.key,
        current_job.name,
        current_job.attempt,
        current_job.owner,
        current_job.stop_requested,
    )


def until_stopped(path: str) -> None:
    """Swallows what it can, cleans up, and never ends by itself."""
    try:
        Path(path + ".started").touch()
        while True:
            try:
                time.sleep(0.005)
                checkpoint()
            except Exception:
                continue
    finally:
        Path(path).write_text("cleaned up")


def tracked(items: list[int], seconds: float = 0.0) -> int:
    total = 0
    for item in track(items, message="adding"):
        total += item
        time.sleep(seconds)
    return total


def spin(path: str | None = None) -> NoReturn:
    """Runs Python code and never looks whether it should stop."""
    if path is not None:
        Path(path).touch()
    while True:
        pass


def swallow_everything(path: str) -> str:
    """Refuses to leave."""
    Path(f"{path}.started").touch()
    while not Path(path).exists():
        try:
            current_job.sleep(0.005)
        except BaseException:
            time.sleep(0.005)
    return "stayed"


def fail_until(path: str, attempts: int) -> int:
    """Fails in the first attempts; writes down all."""
    with Path(path).open("a") as file:
        file.write(f"{current_job.attempt}\n")
    if current_job.attempt < attempts:
        raise ConnectionError(f"attempt {current_job.attempt}")
    return current_job.attempt


def append(path: str, text: str) -> None:
    with Path(path).open("a") as file:
        file.write(text)


def log_something(count: int = 1) -> str:
    log = logging.getLogger("shop.render")
    for number in range(count):
        log.warning("page %d", number, extra={"page": number, "lock": threading.Lock()})
    try:
        raise ValueError("torn")
    except ValueError:
        log.exception("failed")
    return current_job.id


def receive(count: int) -> list[tuple[str, Any]]:
    """Receives ``count`` messages."""
    current_job.update(message="receiving")
    return [(message.type, message.body) for _ in range(count) if (message := current_job.receive())]


def receive_in_time(*timeouts: float) -> list[object]:
    """Waits for one message after the other, each for its timeout in seconds."""
    return [current_job.receive(timeout) for timeout in timeouts]


def leave() -> NoReturn:
    raise JobExit


#: An executor that a test binds to its app, as apps that are made by a factory do.
unbound = Executor()


@unbound.job
def doubled(number: int) -> int:
    return 2 * number
