"""Real servers, real clients."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, g, request, session
from processes import family
from web_servers import get, gunicorn
from werkzeug.serving import make_server

from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until

APP = """
import os, time
from flask import Flask, g, request
from flask_executor import Executor

app = Flask(__name__)
app.config["EXECUTOR_MAX_WORKERS"] = 3
app.config["EXECUTOR_TYPE"] = os.environ["TYPE"]
app.config["EXECUTOR_START_METHOD"] = "fork"
executor = Executor(app)
here = os.getpid()
executor.submit(os.getpid).result()          # a pool with its threads and processes, before any fork


def job(number):
    g.number += number
    return os.getpid(), request.args["n"], g.number


@app.get("/")
def view():
    g.number = int(request.args["n"])
    return {"imported": here, "served": os.getpid(), "jobs": list(executor.map(job, range(3)))}


def write(path):
    time.sleep(0.3)
    with open(path, "w") as file:
        file.write("done")


@app.post("/")
def start():
    executor.submit(write, request.args["path"])
    return "started"
"""


def test_300_concurrent_requests_and_map_with_8_threads_never_mix(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor(max_workers=8)

    def look(item: int) -> list[Any]:
        before = [request.args["n"], g.n, session["n"], request.n, request.headers["X-N"]]  # type: ignore[attr-defined]
        g.n = session["n"] = request.n = item  # type: ignore[attr-defined]
        return before

    @app.get("/")
    def view() -> list[Any]:
        g.n = session["n"] = request.n = request.args["n"]  # type: ignore[attr-defined]
        seen = list(executor.map(look, range(5))) + list(executor.map(look, range(6), chunksize=3))
        return [*seen, [g.n, session["n"], request.n]]  # type: ignore[attr-defined]

    server = make_server("127.0.0.1", 0, app, threaded=True)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        with ThreadPoolExecutor(60) as clients:
            numbers = [str(number) for number in range(300)]
            answers = list(clients.map(lambda n: get(server.port, f"/?n={n}", **{"X-N": n}), numbers))
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
    for number, seen in zip(numbers, answers, strict=True):
        assert seen == [[number] * 5] * 11 + [[number] * 3]


@pytest.mark.parametrize("backend", ["thread", "process"])
@pytest.mark.parametrize("options", [[], ["--preload"]], ids=["plain", "preload"])
def test_gunicorn_with_several_workers(tmp_path: Path, options: list[str], backend: str) -> None:
    with gunicorn(tmp_path, APP, "-w", "3", "--threads", "2", *options, TYPE=backend) as (server, port):
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda n: get(port, f"/?n={n}"), range(60)))
        least = 6 if backend == "process" else 3  # those that serve, and those that work for them
        assert wait_until(lambda: len(family(server.pid)) >= least)
        descendants = family(server.pid)
    for number, answer in enumerate(answers):
        served = answer["served"]
        assert [job[1:] for job in answer["jobs"]] == [[str(number), number + item] for item in range(3)]
        assert {job[0] == served for job in answer["jobs"]} == {backend == "thread"}
        assert (answer["imported"] != served) == bool(options)
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in descendants))
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_a_server_that_is_told_to_stop_lets_its_jobs_end(tmp_path: Path, backend: str) -> None:
    target = tmp_path / "written"
    with gunicorn(tmp_path, APP, "-w", "1", "--threads", "2", TYPE=backend) as (server, port):
        get(port, f"/?path={target}", "POST")
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    assert target.read_text() == "done"


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_a_web_worker_that_is_recycled_lets_its_jobs_end(tmp_path: Path, backend: str) -> None:
    targets = [tmp_path / f"written{number}" for number in range(6)]
    with gunicorn(tmp_path, APP, "-w", "2", "--max-requests", "1", TYPE=backend) as (_, port):
        for target in targets:
            get(port, f"/?path={target}", "POST")
        assert wait_until(lambda: all(target.exists() and target.read_text() for target in targets), 20)
