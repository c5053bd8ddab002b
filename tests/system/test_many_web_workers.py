"""Several web workers, one store: every one of them sees every job."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from requirements import missing
from variants import store_url
from web_servers import get, gunicorn, serving

from flask_executor.testing.contract.fixtures import wait_until

# The first two routes are those of Flask-Executor's own documentation, as they are.
APP = """
import itertools, os, time
from flask import Flask, abort, jsonify, request
from flask_executor import Executor, current_job, track

app = Flask(__name__)
app.config["EXECUTOR_MAX_WORKERS"] = 3
app.config["EXECUTOR_TYPE"] = os.environ.get("TYPE", "thread")
app.config["EXECUTOR_STORE"] = os.environ["STORE"]
app.config["SECRET_KEY"] = "the same in all processes"
executor = Executor(app)

if os.environ.get("AT_IMPORT"):
    executor.options(again=True).submit_once("import", pow, 2, 3).result()


@app.route('/start-task')
def start_task():
    executor.submit_stored('calc_power', pow, 323, 1235)
    return jsonify({'result':'success'})

@app.route('/get-result')
def get_result():
    if not executor.futures.done('calc_power'):
        future_status = executor.futures._state('calc_power')
        return jsonify({'status': future_status})
    future = executor.futures.pop('calc_power')
    return jsonify({'status': 'done', 'result': str(future.result())})


def work(path, count):
    for n in track(range(count), message="working"):
        current_job.sleep(0.05)
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")
    return count


def wait_for(path):
    current_job.update(progress=0.5, message="waiting")
    while not os.path.exists(path):
        current_job.sleep(0.02)
    return path


@app.get("/until/<key>")
def until(key):
    return {"id": executor.submit_once(key, wait_for, request.args["path"]).job_id}


def listen(count):
    current_job.update(progress=0.5)
    return [current_job.receive(timeout=20).body for _ in range(count)]


@app.get("/listen/<key>")
def start_to_listen(key):
    executor.submit_once(key, listen, int(request.args["count"]))
    return {"served": os.getpid()}


numbers = itertools.count()

@app.get("/tell/<key>")
def tell(key):
    time.sleep(0.01)  # for the next request to go to another web worker
    return {"served": os.getpid(), "sent": executor.futures.get(key).send("number", [os.getpid(), next(numbers)])}


@app.get("/once/<key>")
def once(key):
    future = executor.submit_once(key, work, request.args["path"], int(request.args["count"]))
    return {"id": future.job_id, "served": os.getpid()}


@app.get("/job/<key>")
def job(key):
    job = executor.jobs.find(key)
    if job is None:
        abort(410 if executor.jobs.expired(key=key) else 404)
    return {
        "served": os.getpid(), "status": job.status, "progress": job.progress, "message": job.message,
        "error": job.error, "id": job.id, "keys": executor.futures.keys(),
    }


@app.get("/result/<key>")
def result(key):
    future = executor.futures.get(key)
    return {"served": os.getpid(), "result": future.result(timeout=20), "handle": type(future).__name__}


@app.get("/stop/<key>")
def stop(key):
    return {"stopped": executor.futures.stop(key)}


@app.get("/again/<key>")
def again(key):
    future = executor.options(again=True).submit_once(key, work, request.args["path"], 1)
    return {"id": future.job_id}
"""


@pytest.fixture(params=["sqlite-thread", "redis-process"])
def deployment(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A store and a backend, where all four pairs would show no more."""
    store, _, backend = str(request.param).partition("-")
    return store_url(store, request), backend


@contextmanager
def web(folder: Path, store: str, *options: str, **environ: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with gunicorn(folder, APP, *options, STORE=store, **environ) as started:
        yield started
    assert "Traceback" not in (folder / "log").read_text(), (folder / "log").read_text()


def from_all(port: int, path: str, count: int = 4) -> dict[int, Any]:
    """The answers of so many different web workers."""
    answers: dict[int, Any] = {}

    def ask(_: int) -> None:
        answer = get(port, path)
        answers[answer["served"]] = answer

    with ThreadPoolExecutor(8) as clients:
        assert wait_until(lambda: list(clients.map(ask, range(8))) and len(answers) >= count, 20), answers
    return answers


@pytest.mark.parametrize("options", [[], ["--preload"]], ids=["plain", "preload"])
def test_the_documented_polling_routes(tmp_path: Path, deployment: tuple[str, str], options: list[str]) -> None:
    store, backend = deployment
    environ = {"AT_IMPORT": "1"} if options else {}
    with web(tmp_path, store, "-w", "4", *options, TYPE=backend, **environ) as (_, port):
        for _ in range(3):
            assert get(port, "/start-task") == {"result": "success"}
            polls: list[Any] = []

            def is_done(polls: list[Any] = polls) -> bool:
                polls.append(get(port, "/get-result"))
                return bool(polls[-1]["status"] == "done")

            assert wait_until(is_done, 20), polls
            # It may have ended since the route has asked for done().
            assert {poll["status"] for poll in polls[:-1]} <= {"PENDING", "RUNNING", "FINISHED"}
            assert polls[-1] == {"status": "done", "result": str(pow(323, 1235))}
        if options:
            assert get(port, "/result/import")["result"] == 8


def test_every_web_worker_sees_a_job_that_one_runs(tmp_path: Path, deployment: tuple[str, str]) -> None:
    store, backend = deployment
    with web(tmp_path, store, "-w", "4", TYPE=backend) as (_, port):
        started = get(port, f"/until/report?path={tmp_path}/enough")
        assert wait_until(lambda: get(port, "/job/report")["progress"])
        for job in from_all(port, "/job/report").values():
            assert (job["status"], job["progress"], job["message"]) == ("running", 0.5, "waiting")
            assert (job["id"], job["keys"]) == (started["id"], ["report"])
        (tmp_path / "enough").touch()
        results = from_all(port, "/result/report")
        assert {job["result"] for job in results.values()} == {f"{tmp_path}/enough"}
        assert Counter(job["handle"] for job in results.values()) == {"StoredFuture": 3, "FutureProxy": 1}
        assert {job["status"] for job in from_all(port, "/job/report").values()} == {"succeeded"}


def test_48_ask_at_once_and_it_runs_once(tmp_path: Path, shared_store: str) -> None:
    with web(tmp_path, shared_store, "-w", "4", "--threads", "8") as (_, port):
        for key in ("a", "b", "c"):
            with ThreadPoolExecutor(48) as clients:
                path = f"/once/{key}?path={tmp_path}/{key}&count=1"
                ids = {answer["id"] for answer in clients.map(lambda _: get(port, path), range(48))}  # noqa: B023
            assert len(ids) == 1
            assert get(port, f"/result/{key}")["result"] == 1
            assert len((tmp_path / key).read_text().split()) == 1


def test_stop_from_any_web_worker(tmp_path: Path, deployment: tuple[str, str]) -> None:
    store, backend = deployment
    with web(tmp_path, store, "-w", "4", TYPE=backend) as (_, port):
        for key in "abcd":
            stop_while_it_runs(port, key, tmp_path)
    assert not (tmp_path / "ran").exists()


def stop_while_it_runs(port: int, key: str, folder: Path) -> None:
    get(port, f"/once/{key}?path={folder}/ran&count=400")
    assert wait_until(lambda: get(port, f"/job/{key}")["progress"])
    begin = time.monotonic()
    assert get(port, f"/stop/{key}") == {"stopped": True}
    assert wait_until(lambda: get(port, f"/job/{key}")["status"] == "stopped", 5)
    assert time.monotonic() - begin < 2, "0.5 s for the request to arrive, and this machine may be busy"


def test_messages_from_every_web_worker(tmp_path: Path, deployment: tuple[str, str]) -> None:
    store, backend = deployment
    with web(tmp_path, store, "-w", "3", TYPE=backend) as (_, port):
        holder = get(port, "/listen/talk?count=120")["served"]
        assert wait_until(lambda: get(port, "/job/talk")["progress"])
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda _: get(port, "/tell/talk"), range(120)))
        assert all(answer["sent"] for answer in answers)
        senders = Counter(answer["served"] for answer in answers)
        assert set(senders) - {holder}, "other web workers have sent some"
        got = get(port, "/result/talk")["result"]
        for sender, count in senders.items():
            assert [number for served, number in got if served == sender] == list(range(count)), "in its order"
        assert wait_until(lambda: not get(port, "/tell/talk")["sent"]), "it has ended"


def test_a_web_worker_is_killed_in_mid_job(tmp_path: Path, deployment: tuple[str, str]) -> None:
    store, backend = deployment
    with web(tmp_path, store, "-w", "3", TYPE=backend) as (_, port):
        served = get(port, f"/once/report?path={tmp_path}/ran&count=400")["served"]
        assert wait_until(lambda: get(port, "/job/report")["progress"])
        os.kill(served, signal.SIGKILL)
        begin = time.monotonic()
        assert wait_until(lambda: get_or_none(port, "/job/report").get("status") == "lost", 15)
        assert time.monotonic() - begin < 15
        assert f"process {served}, which had the job, is gone" in get(port, "/job/report")["error"]
        again = get(port, f"/again/report?path={tmp_path}/ran")
        assert wait_until(lambda: get(port, "/job/report")["status"] == "succeeded")
        assert get(port, "/job/report")["id"] == again["id"]


def get_or_none(port: int, path: str) -> Any:
    """The answer; nothing from a web worker that dies meanwhile."""
    try:
        return get(port, path)
    except OSError:
        return {}


def test_a_server_that_is_told_to_stop_writes_down_the_end_of_its_jobs(
    tmp_path: Path, deployment: tuple[str, str]
) -> None:
    store, backend = deployment
    with web(tmp_path, store, "-w", "2", TYPE=backend) as (server, port):
        get(port, f"/once/report?path={tmp_path}/ran&count=10")
        assert wait_until(lambda: get(port, "/job/report")["progress"])  # Python 3.12 starts no worker at the end
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    (tmp_path / "log").rename(tmp_path / "first log")
    with web(tmp_path, store, "-w", "2", TYPE=backend) as (_, port):
        assert get(port, "/job/report")["status"] == "succeeded"
        assert get(port, "/result/report") | {"served": 0} == {"served": 0, "result": 10, "handle": "StoredFuture"}


def test_what_is_cut_off_is_lost(tmp_path: Path, shared_store: str) -> None:
    with web(tmp_path, shared_store, "-w", "1", "--graceful-timeout", "1") as (server, port):
        get(port, f"/once/report?path={tmp_path}/ran&count=4000")
        assert wait_until(lambda: get(port, "/job/report")["progress"])
        server.send_signal(signal.SIGTERM)  # gunicorn kills the worker after a second
        server.wait(30)
    (tmp_path / "log").rename(tmp_path / "first log")
    with web(tmp_path, shared_store, "-w", "1") as (_, port):
        assert get(port, "/job/report")["status"] == "lost"


def test_memory_under_several_web_workers_warns_once(tmp_path: Path) -> None:
    with web(tmp_path, "memory", "-w", "2") as (_, port):
        for n in range(10):
            get(port, f"/once/{n}?path={tmp_path}/ran&count=1")
    log = (tmp_path / "log").read_text()
    assert 1 <= log.count("Set EXECUTOR_STORE to 'sqlite'") <= 2, "once per process"


def test_waitress(tmp_path: Path, shared_store: str) -> None:
    command, mark = ["waitress", "--listen", "127.0.0.1:0", "served:app"], "Serving on http://127.0.0.1:"
    with serving(tmp_path, APP, command, mark, STORE=shared_store) as (_, port):
        get(port, f"/once/report?path={tmp_path}/ran&count=2")
        assert get(port, "/result/report")["result"] == 2
        assert get(port, "/job/report")["status"] == "succeeded"


@pytest.mark.parametrize("lazy", [False, True], ids=["fork", "lazy"])
def test_uwsgi(tmp_path: Path, shared_store: str, lazy: bool) -> None:
    if importlib.util.find_spec("pyuwsgi") is None:
        missing("uWSGI is not installed: pip install pyuwsgi")
    code = "import pyuwsgi, sys; pyuwsgi.run(sys.argv[1:])"
    (tmp_path / "run_uwsgi.py").write_text(code)
    command = ["run_uwsgi", "--http-socket", "127.0.0.1:0", "--master", "--processes", "3", "--enable-threads"]
    command += ["--die-on-term", "--module", "served:app", *(["--lazy-apps"] if lazy else [])]
    # Otherwise uWSGI forks without telling Python, while threads of the app may be in the middle of something.
    environ = {"STORE": shared_store, "PYTHONPATH": str(tmp_path), "AT_IMPORT": "1" if lazy else ""}
    with serving(tmp_path, APP, command, "bound to TCP address 127.0.0.1:", **environ) as (_, port):
        get(port, f"/once/report?path={tmp_path}/ran&count=40")
        seen = from_all(port, "/job/report", 3)
        assert len({job["id"] for job in seen.values()}) == 1
        assert {job["result"] for job in from_all(port, "/result/report", 3).values()} == {40}
