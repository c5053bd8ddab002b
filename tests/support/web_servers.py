"""Real servers and clients for tests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flask_executor.testing.contract.fixtures import wait_until


def get(port: int, path: str, method: str = "GET", **headers: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        body = response.read()
        assert response.status < 300, (response.status, body)
        return json.loads(body) if response.headers["Content-Type"] == "application/json" else body
    finally:
        connection.close()


@contextmanager
def serving(
    folder: Path, code: str, command: list[str], mark: str, **environ: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server of the app that ``code`` makes, and its port, which it logs behind ``mark``."""
    (folder / "served.py").write_text(code)
    log = folder / "log"
    with log.open("ab") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", **environ},
            start_new_session=True,
        )
    try:

        def port() -> int | None:
            for line in log.read_text().splitlines():
                if mark in line:
                    return int(line.split(mark)[1].split()[0].rstrip("/"))
            return None

        assert wait_until(port, timeout=30), log.read_text()
        yield server, port() or 0
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        try:
            # gunicorn waits 30 s for a worker that it told to end before that had got its signal handlers.
            server.wait(45)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            pytest.fail(f"the server did not end: {log.read_text()}")


@contextmanager
def gunicorn(folder: Path, code: str, *options: str, **environ: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """gunicorn with the app that ``code`` makes, and its port."""
    command = ["gunicorn", "--bind", "127.0.0.1:0", *options, "served:app"]
    with serving(folder, code, command, "Listening at: http://127.0.0.1:", **environ) as started:
        yield started
