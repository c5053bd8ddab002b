"""The demo runs with each type, by a variable of the environment: waiting, progress, stop, steps, dashboard."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from requirements import require

from flask_executor.testing.contract.fixtures import wait_until

DEMO = Path(__file__).parents[2] / "examples" / "demo"
NEEDS = {"thread": [], "process": [], "rq": ["rq"], "celery": ["celery"], "dask": ["distributed"]}


class Demo:
    """The demo as a program, seen by a client that keeps its cookies."""

    def __init__(self, kind: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environ = {**os.environ, "EXECUTOR_TYPE": kind, "PORT": str(port), "TMPDIR": str(folder)}
        if kind == "dask":
            environ["EXECUTOR_STORE"] = f"sqlite:///{folder / 'jobs.sqlite'}"
        environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen([sys.executable, str(DEMO)], env=environ, stdout=log, stderr=log)
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())

    def ask(self, path: str, method: str = "GET", accept: str = "application/json") -> tuple[int, Any]:
        headers = {"Accept": accept, "Origin": self.url}
        request = urllib.request.Request(self.url + path, method=method, headers=headers)
        try:
            with self._opener.open(request, timeout=30) as response:
                status, body = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read().decode()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body

    def is_open(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self.ask("/")[0] == 200
        except OSError:
            return False

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


STORMS = ("process", "celery", "dask")


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.storm if kind in STORMS else ()) for kind in NEEDS])
def demo(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Demo]:
    for package in NEEDS[request.param]:
        require(package)
    demo = Demo(request.param, tmp_path)
    try:
        assert wait_until(demo.is_open, 60), "the demo does not open"
        yield demo
    finally:
        demo.close()


def wait_for_page(demo: Demo, path: str) -> tuple[str, list[Any]]:
    """The page at its end, and what was said meanwhile."""
    said: list[Any] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status, body = demo.ask(path)
        if status == 200:
            return body, said
        assert status == 202, (status, body)
        said.append(body)
        time.sleep(0.1)
    raise AssertionError(f"{path} is not there in time: {said[-1:]}")


def test_the_demo(demo: Demo) -> None:
    report, said = wait_for_page(demo, "/reports/may")
    assert "Sales in May" in report
    progress = [document["progress"] for document in said if document["progress"] is not None]
    assert len(set(progress)) > 3, "it is seen to go on"
    assert progress == sorted(progress)

    order, _ = wait_for_page(demo, "/orders/7")
    assert "7" in order

    assert demo.ask("/stock")[0] == 202
    listed = demo.ask("/jobs/?name=Stocktaking")[1]["jobs"]
    assert wait_until(lambda: demo.ask(listed[0]["links"]["self"])[1]["status"] == "running", 20)
    assert demo.ask(listed[0]["links"]["self"], "DELETE")[0] == 202
    assert wait_until(lambda: demo.ask(listed[0]["links"]["self"])[1]["status"] == "stopped", 20)

    status, page = demo.ask("/jobs/", accept="text/html")
    assert status == 200
    assert "executor-dashboard" in page
    assert demo.ask("/jobs/health")[0] == 200


@pytest.mark.parametrize("demo", ["rq", pytest.param("celery", marks=pytest.mark.storm)], indirect=True)
def test_the_demo_ends_while_a_job_runs_that_takes_a_minute(demo: Demo) -> None:
    demo.ask("/stock")
    listed = demo.ask("/jobs/?name=Stocktaking")[1]["jobs"]
    assert wait_until(lambda: demo.ask(listed[0]["links"]["self"])[1]["status"] == "running", 20)
    begin = time.monotonic()
    demo.close()
    assert time.monotonic() - begin < 40, "it did not wait for the job"
