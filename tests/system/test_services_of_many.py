"""Services of an app with several web workers: one set of workers, whichever process of the app looks after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import family
from web_servers import get, gunicorn, serving

from flask_executor.testing.contract.fixtures import wait_until

APP = """
import os, time
from flask import Flask, jsonify, request
from flask_executor import Executor, JobTimeout, Service, WorkerLost, every, on

app = Flask(__name__, instance_path=os.environ["INSTANCE"])
app.config["EXECUTOR_STOP_GRACE"] = 0.5
app.config["SECRET_KEY"] = "the same in all processes"
executor = Executor(app)


class Keeper(Service):
    def setup(self):
        self.kept = []
        self.note("setup")

    def teardown(self):
        self.note("teardown")

    def note(self, what):
        with open(what, "a") as file:
            file.write(f"{os.getpid()}\\n")

    @on("keep")
    def keep(self, what):
        self.kept.append(what)

    @on("kept")
    def get_kept(self, _):
        return sorted(self.kept), os.getpid()

    @on("fail")
    def fail(self, _):
        raise LookupError("nothing is kept here")

    @on("block")
    def block(self, seconds):
        time.sleep(seconds)


keeper = executor.service(Keeper, per=os.environ.get("PER", "app"))


@app.get("/")
def index():
    return jsonify(pid=os.getpid())


@app.get("/keep/<int:number>")
def keep(number):
    keeper.send("keep", number)
    return jsonify(pid=os.getpid())


@app.get("/kept")
def kept():
    try:
        kept, pid = keeper.call("kept").result(20)
    except WorkerLost as error:
        return jsonify(lost=str(error))
    return jsonify(kept=kept, service=pid, pid=os.getpid(), supervisor=keeper.status().supervisor)


@app.get("/fail")
def fail():
    return jsonify(error=repr(keeper.call("fail").exception(20)), pid=os.getpid())


@app.get("/block")
def block():
    future = keeper.call("block", 30, timeout=0.2)
    return jsonify(error=type(future.exception(20)).__name__, status=future.status, pid=os.getpid())
"""


def lines(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def until_all_have(port: int, path: str, workers: int) -> list[dict[str, Any]]:
    """Answers of so many web workers, one of each at least."""
    answers: list[dict[str, Any]] = []

    def ask() -> bool:
        with ThreadPoolExecutor(8) as clients:
            answers.extend(clients.map(lambda _: get(port, path), range(8)))
        return len({answer.get("pid") for answer in answers} - {None}) >= workers

    assert wait_until(ask, 30), answers
    return answers


@pytest.mark.parametrize(
    "options",
    [(), ("--preload",), pytest.param(("-k", "gthread", "--threads", "4"), marks=pytest.mark.storm)],
    ids=str,
)
def test_one_set_of_workers(tmp_path: Path, options: tuple[str, ...]) -> None:
    with gunicorn(tmp_path, APP, "-w", "3", *options, INSTANCE=str(tmp_path)) as (server, port):
        answers = until_all_have(port, "/kept", 3)
        assert len({answer["service"] for answer in answers}) == 1
        assert len({answer["supervisor"] for answer in answers}) == 1
        for number in range(30):
            get(port, f"/keep/{number}")
        assert wait_until(lambda: get(port, "/kept")["kept"] == list(range(30)))
        for answer in until_all_have(port, "/fail", 3):
            assert answer["error"] == "LookupError('nothing is kept here')"
        members = family(server.pid)
    assert len(lines(tmp_path / "setup")) == 1
    assert lines(tmp_path / "teardown") == lines(tmp_path / "setup"), "it has ended in order"
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in members))


def test_the_command_line_sees_them(tmp_path: Path) -> None:
    def services(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flask", "--app", "served", "executor", "services", *options]
        environ = {**os.environ, "INSTANCE": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)

    with gunicorn(tmp_path, APP, "-w", "2", INSTANCE=str(tmp_path)) as (_, port):
        assert services().returncode == 1, "no request has come yet, and a look starts nothing"
        answer = get(port, "/kept")
        found = services("--json")
        assert found.returncode == 0, found.stderr
        (service,) = json.loads(found.stdout)
        assert (service["name"], service["pids"], service["ready"]) == ("Keeper", [answer["service"]], 1)
        assert service["supervisor"] == answer["supervisor"]
        lines = services().stdout.splitlines()
        assert [line.split()[:3] for line in lines] == [["SERVICE", "READY", "BUSY"], ["Keeper", "1/1", "0"]]
    assert services().returncode == 1


def test_one_set_in_each_process(tmp_path: Path) -> None:
    with gunicorn(tmp_path, APP, "-w", "2", INSTANCE=str(tmp_path), PER="process") as (_, port):
        answers = until_all_have(port, "/kept", 2)
        assert len({answer["service"] for answer in answers}) == 2
    assert sorted(lines(tmp_path / "teardown")) == sorted(lines(tmp_path / "setup"))


def test_the_leader_is_killed(tmp_path: Path) -> None:
    with gunicorn(tmp_path, APP, "-w", "3", INSTANCE=str(tmp_path)) as (_, port):
        first = until_all_have(port, "/kept", 3)[0]
        os.kill(first["supervisor"], signal.SIGKILL)
        assert wait_until(lambda: not Path(f"/proc/{first['service']}").exists()), "nothing is left of its workers"

        def another() -> bool:
            answer = get(port, "/kept")
            return "lost" not in answer and answer["supervisor"] != first["supervisor"]

        assert wait_until(another, 20)
        answers = [answer for answer in until_all_have(port, "/kept", 3) if "lost" not in answer]
        assert len({answer["service"] for answer in answers}) == 1


def test_the_worker_is_killed(tmp_path: Path) -> None:
    with gunicorn(tmp_path, APP, "-w", "3", INSTANCE=str(tmp_path)) as (_, port):
        first = until_all_have(port, "/kept", 3)[0]
        os.kill(first["service"], signal.SIGKILL)
        assert wait_until(lambda: get(port, "/kept").get("service") not in (None, first["service"]), 20)
        assert get(port, "/kept")["supervisor"] == first["supervisor"]


def test_a_call_of_another_process_that_takes_too_long(tmp_path: Path) -> None:
    with gunicorn(tmp_path, APP, "-w", "2", INSTANCE=str(tmp_path)) as (_, port):
        before = until_all_have(port, "/kept", 2)[0]
        for answer in until_all_have(port, "/block", 2):
            assert (answer["error"], answer["status"]) == ("JobTimeout", "timed_out")
        assert get(port, "/kept")["service"] != before["service"], "it had to be killed"


def test_web_workers_are_replaced(tmp_path: Path) -> None:
    """Each web worker ends in order after a few requests, the one that leads as well."""
    options = ("-w", "2", "--max-requests", "10")
    with gunicorn(tmp_path, APP, *options, INSTANCE=str(tmp_path)) as (_, port):
        services = [get(port, "/kept") for _ in range(60)]
        assert [answer for answer in services if "lost" in answer] == []
        assert len({answer["supervisor"] for answer in services}) > 1
    assert sorted(lines(tmp_path / "teardown")) == sorted(lines(tmp_path / "setup"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_they_end_in_order_with_a_plain_server(tmp_path: Path, number: signal.Signals) -> None:
    command = ["flask", "--app", "served", "run", "--port", "0"]
    with serving(tmp_path, APP, command, "Running on http://127.0.0.1:", INSTANCE=str(tmp_path)) as (server, port):
        get(port, "/kept")
        server.send_signal(number)
        assert server.wait(20) in (0, 1)
    assert lines(tmp_path / "teardown") == lines(tmp_path / "setup")


def test_they_start_once_under_the_reloader(tmp_path: Path) -> None:
    command = ["flask", "--app", "served", "run", "--debug", "--port", "0"]
    with serving(tmp_path, APP, command, "Running on http://127.0.0.1:", INSTANCE=str(tmp_path)) as (server, port):
        first = get(port, "/kept")
        assert len(lines(tmp_path / "setup")) == 1
        (tmp_path / "served.py").write_text(APP + "\n\n")

        def again() -> bool:
            try:
                answer = get(port, "/kept")
            except (OSError, AssertionError):  # it is ending, and accepts no calls, or has ended
                return False
            return bool(answer["pid"] != first["pid"])

        assert wait_until(again, 30)
        assert len(lines(tmp_path / "setup")) == 2
        members = family(server.pid)
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in members))
