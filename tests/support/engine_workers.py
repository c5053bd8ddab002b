"""Workers of RQ, Celery and Dask for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flask import Flask
from redis_server import RedisServer

from flask_executor import Executor
from flask_executor.testing.contract.fixtures import wait_until

#: The fixtures that have the workers of an engine.
ENGINES = {engine: f"{engine}_workers" for engine in ("rq", "celery", "dask")}


def wait_for_workers(config: dict[str, Any], count: int) -> None:
    """Wait until an engine has so many workers."""
    app = Flask("shop")
    app.secret_key = "not a secret in a test"
    app.config.update({f"EXECUTOR_{key.upper()}": value for key, value in config.items()})
    executor = Executor(app)
    try:
        assert wait_until(lambda: executor.health().workers == count, 60), executor.health()
    finally:
        executor.shutdown()


@contextmanager
def redis_and_workers(engine: str, folder: Path) -> Iterator[dict[str, Any]]:
    server = RedisServer(folder)
    server.start()
    try:
        config = {"type": engine, "url": server.url}
        with worker_command(folder, config):
            wait_for_workers(config, 2)
            yield {"url": server.url}
    finally:
        server.stop()


class DaskScheduler:
    """A real scheduler of Dask, on a port of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    def start(self) -> None:
        command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--no-dashboard"]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environ["DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION"] = "1.0"  # or workers get jobs before they are free
        command += ["--port", str(self.port)]
        self._process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert wait_until(self._answers, 30), "Dask's scheduler does not answer"

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with socket.socket() as line:
            return line.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def worker_command(folder: Path, config: dict[str, str], processes: int = 2) -> Iterator[subprocess.Popen[bytes]]:
    """``flask executor worker`` of the app of ``tasks.py``, with this in its configuration."""
    environ = {**os.environ, **{f"FLASK_EXECUTOR_{key.upper()}": value for key, value in config.items()}}
    environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-m", "flask", "--app", "tasks:create_app()", "executor", "worker"]
    with (folder / "log").open("a") as log:
        worker = subprocess.Popen([*command, "--processes", str(processes)], env=environ, stdout=log, stderr=log)
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait(60)
