"""Several web workers that have an engine run their jobs: each sees every job, and the jobs outlive them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import tasks
from engine_workers import ENGINES
from flask import Flask
from processes import family
from redis_server import RedisServer
from requirements import require
from web_servers import get, gunicorn

from flask_executor import UntrustedResult
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until

SERVED = """
import os
import tasks
from flask import request

app = tasks.create_app()
(executor,) = app.extensions["flask_executor_bindings"]


@app.get("/pid")
def pid():
    return {"pid": os.getpid()}


@app.get("/start/<key>")
def start(key):
    return {"id": executor.submit_once(key, tasks.report_and_wait, request.args["path"]).job_id}


@app.get("/once/<key>")
def once(key):
    return {"id": executor.submit_once(key, tasks.append, request.args["path"], "ran ").job_id, "pid": os.getpid()}


@app.get("/job/<key>")
def job(key):
    job = executor.jobs.find(key)
    return {"status": job.status, "progress": job.progress, "pid": os.getpid()}


@app.get("/result/<key>")
def result(key):
    return {"result": executor.futures.result(key, timeout=20)}


@app.get("/stop/<key>")
def stop(key):
    return {"stopped": executor.futures.stop(key), "pid": os.getpid()}


@app.get("/many/<prefix>")
def many(prefix):
    with open(request.args["path"], "a") as accepted:
        for number in range(100_000):
            executor.submit_stored(f"{prefix}-{number}", tasks.add, number)
            print(number, file=accepted, flush=True)
"""

WORKERS = 3

Ask = Callable[..., Any]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> dict[str, str]:
    """How an app has its jobs run by workers that are there."""
    return {"type": request.param, **request.getfixturevalue(ENGINES[request.param])}


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test's own."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@contextmanager
def web(folder: Path, engine: dict[str, str], *options: str) -> Iterator[tuple[int, int]]:
    """Web workers of the app, by the pid and the port of their server."""
    environ = {f"FLASK_EXECUTOR_{key.upper()}": value for key, value in engine.items()}
    environ["PYTHONPATH"] = os.pathsep.join([str(Path(tasks.__file__).parent), *sys.path])
    with gunicorn(folder, SERVED, "-w", str(WORKERS), *options, **environ) as (server, port):
        yield server.pid, port


def from_each(ask: Callable[[], Any]) -> dict[int, Any]:
    """What each of the web workers answers at last."""
    answers: dict[int, Any] = {}

    def all_have_answered() -> bool:
        with ThreadPoolExecutor(WORKERS) as pool:
            for answer in pool.map(lambda _: ask(), range(WORKERS)):
                answers[answer["pid"]] = answer
        return len(answers) >= WORKERS

    assert wait_until(all_have_answered, 30), answers
    return answers


@pytest.mark.parametrize(
    ("engine", "options"),
    [("rq", []), ("rq", ["--preload"]), ("celery", []), ("dask", [])],
    ids=["rq", "rq preload", "celery", "dask"],
    indirect=["engine"],
)
def test_each_web_worker_sees_and_stops_every_job(tmp_path: Path, engine: dict[str, str], options: list[str]) -> None:
    key, path = f"seen{tmp_path}".replace("/", "-"), tmp_path / "go-on"
    with web(tmp_path, engine, *options) as (_, port):
        get(port, f"/start/{key}?path={path}")
        job = f"/job/{key}"
        assert wait_until(lambda: get(port, job)["progress"] == 0.5, 30)
        seen = from_each(lambda: get(port, job))
        assert {(answer["status"], answer["progress"]) for answer in seen.values()} == {("running", 0.5)}
        assert get(port, f"/stop/{key}")["stopped"]
        assert wait_until(lambda: get(port, job)["status"] == "stopped", 30), get(port, job)
        assert {answer["status"] for answer in from_each(lambda: get(port, job)).values()} == {"stopped"}


def test_48_ask_at_once_and_it_runs_once_on_the_engine(tmp_path: Path, engine: dict[str, str]) -> None:
    key, path = f"once{tmp_path}".replace("/", "-"), tmp_path / "runs"
    with web(tmp_path, engine) as (_, port), ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(lambda _: get(port, f"/once/{key}?path={path}"), range(48)))
        assert len({answer["id"] for answer in answers}) == 1
        assert get(port, f"/result/{key}") == {"result": None}
        for number in range(4):  # what was queued before these has begun before they end
            get(port, f"/once/{key}{number}?path={tmp_path / 'later'}")
            get(port, f"/result/{key}{number}")
        assert path.read_text() == "ran "


@pytest.mark.parametrize("engine", ["rq"], indirect=True)
def test_jobs_outlive_the_web_server(tmp_path: Path, engine: dict[str, str]) -> None:
    key, path = f"outlive{tmp_path}".replace("/", "-"), tmp_path / "go-on"
    with web(tmp_path, engine) as (_, port):
        id = get(port, f"/start/{key}?path={path}")["id"]
        assert wait_until(lambda: get(port, f"/job/{key}")["status"] == "running", 30)
    (tmp_path / "log").unlink()  # of the server that has ended
    with web(tmp_path, engine) as (_, port):
        assert get(port, f"/job/{key}")["status"] == "running"
        path.touch()
        assert get(port, f"/result/{key}") == {"result": id}


@pytest.mark.parametrize("engine", ["rq"], indirect=True)
def test_a_web_worker_is_killed_while_it_submits(tmp_path: Path, engine: dict[str, str]) -> None:
    key, path = f"many{tmp_path}".replace("/", "-"), tmp_path / "accepted"
    with web(tmp_path, engine) as (server, port), ThreadPoolExecutor(1) as pool:
        cut_off = pool.submit(get, port, f"/many/{key}?path={path}")
        assert wait_until(lambda: path.exists() and path.read_text().count("\n") >= 20, 30)
        os.kill(next(pid for pid in family(server) if has_open(pid, path)), signal.SIGKILL)
        assert cut_off.exception(30) is not None
        for number in path.read_text().split():
            assert get(port, f"/result/{key}-{number}") == {"result": int(number)}


def has_open(pid: int, path: Path) -> bool:
    return any(file.resolve() == path for file in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.parametrize("engine", ["rq", "celery"], indirect=True)
def test_an_app_of_the_same_name_with_another_secret_key(
    engine: dict[str, str], make_executor: MakeExecutor, tmp_path: Path
) -> None:
    app = Flask("shop")
    app.secret_key = "of another deployment"
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(app, **engine)
    key, path = f"other{tmp_path}", tmp_path / "runs"
    for future in (
        executor.submit_stored(key, tasks.append, str(path), "ran"),
        executor.submit(tasks.append, str(path), "ran"),
    ):
        with pytest.raises(UntrustedResult, match="SECRET_KEY"):
            future.result(20)
    assert not path.exists()


@pytest.mark.parametrize("engine", ["rq", "celery"])
def test_a_worker_of_another_app_leaves_jobs_to_those_that_know_them(
    engine: str, redis_server: RedisServer, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    require(engine)
    app = Flask("office")
    app.secret_key = "not a secret in a test"
    future = make_executor(app, type=engine, url=redis_server.url).submit_stored("report", tasks.add, 1)
    log = tmp_path / "shop.log"
    with log.open("w") as file:
        of_the_shop = worker(redis_server, engine, "tasks:create_app()", file)
    try:
        assert wait_until(lambda: "as it is not for this worker" in log.read_text(), 30)
    finally:
        of_the_shop.terminate()
        of_the_shop.wait(30)
    assert "it must be where the app 'office' is" in log.read_text()
    of_the_office = worker(redis_server, engine, "tasks:create_office()")
    try:
        assert future.result(30) == 1
    finally:
        of_the_office.terminate()
        of_the_office.wait(30)


def worker(
    server: RedisServer, engine: str, app: str, log: IO[str] | int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "FLASK_EXECUTOR_TYPE": engine, "FLASK_EXECUTOR_URL": server.url}
    environ["PYTHONPATH"] = os.pathsep.join([str(Path(tasks.__file__).parent), *sys.path])
    command = [sys.executable, "-m", "flask", "--app", app, "executor", "worker"]
    return subprocess.Popen(command, env=environ, stdout=log, stderr=log)
