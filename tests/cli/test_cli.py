from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from flask import Flask
from requirements import require
from tasks import add, fail

from flask_executor import Executor, FutureProxy, current_job
from flask_executor.abc import Entry
from flask_executor.cli import commands, console
from flask_executor.jobs.model import JobState
from flask_executor.stores.leases import engine_holder
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until
from flask_executor.tracking.engine_handover import EngineHandover
from flask_executor.web.status import job_document

APP = """
import sys
from pathlib import Path
from flask import Flask
from flask_executor import Executor, current_job, track

app = Flask(__name__)
app.config.update(SECRET_KEY="not a secret in a test", EXECUTOR_STORE="sqlite")
app.config.from_prefixed_env()
executor = Executor(app)


def render(pages):
    app.logger.warning("rendering")
    for page in track(range(pages), message="page by page"):
        current_job.sleep(0.02)


def wait_for(path):
    while not Path(path).exists():
        current_job.sleep(0.02)


if __name__ == "__main__":
    executor.submit_stored("report", render, 100_000)
    executor.submit_stored(("report", 7), wait_for, "go")
    print("ready", flush=True)
    sys.stdin.read()
"""


class Shop:
    """An app in a file, a process that runs its jobs, and the commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {**os.environ, "COLUMNS": "200"}
        (folder / "shop.py").write_text(APP)

    def start(self, *args: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flask", "--app", "shop", "executor", *args]
        return subprocess.Popen(command, cwd=self.folder, env=self.environ, text=True, **options)

    def run(self, *args: str) -> tuple[int, str, str]:
        """The exit code, output and errors of a command, in this process."""
        names = runpy.run_path(str(self.folder / "shop.py"), run_name="shop")
        result = names["app"].test_cli_runner(env={"COLUMNS": "200"}).invoke(commands.group, args)
        names["executor"].shutdown()
        return result.exit_code, result.stdout, result.stderr

    def run_program(self, *args: str) -> tuple[int, str, str]:
        """As :meth:`run`, in a process of its own."""
        process = self.start(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def data(self, *args: str) -> Any:
        code, output, errors = self.run(*args, "--json")
        assert code == 0, errors
        return json.loads(output)

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[str]]:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([sys.executable, "shop.py"], cwd=self.folder, text=True, **pipes) as process:
            try:
                assert process.stdout.readline() == "ready\n"  # type: ignore[union-attr]
                yield process
            finally:
                process.kill()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.chdir(tmp_path)  # the instance folder is beside the app
    return Shop(tmp_path)


# ---- jobs of another process ----


def test_a_job_of_another_process_is_seen_stopped_and_waited_for(shop: Shop) -> None:
    with shop.serving():
        assert wait_until(lambda: shop.data("show", "report")["log"])
        assert wait_until(lambda: (shop.data("show", "report")["progress"] or 0) > 0.0001)
        code, output, _ = shop.run("show", "report")
        assert code == 0
        assert "status     running" in output
        assert "progress   [" in output
        assert "message    page by page" in output
        assert "WARNING shop: rendering" in output

        code, _, errors = shop.run("wait", "report", "--timeout", "0.1")
        assert (code, "is still running after 0.1 s" in errors) == (2, True)

        code, output, _ = shop.run("stop", "report")
        assert (code, "Job report (render, " in output, output.endswith("): stopped.\n")) == (0, True, True)
        assert shop.run("stop", "report")[1].endswith("has ended already: stopped.\n")
        assert shop.run("wait", "report")[0] == 1
        assert {job["key"]: job["status"] for job in shop.data("list")} == {
            "report": "stopped",
            "('report', 7)": "running",
        }


def test_waiting_until_a_job_of_another_process_has_succeeded(shop: Shop) -> None:
    with shop.serving():
        id = shop.data("show", "('report', 7)")["id"]
        waiting = shop.start("wait", id, "--json", stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        (shop.folder / "go").touch()
        output, _ = waiting.communicate(timeout=60)
        assert waiting.returncode == 0
        assert json.loads(output)["status"] == "succeeded"


def test_a_job_whose_process_was_killed_is_lost_also_for_those_who_wait(shop: Shop) -> None:
    with shop.serving() as server:
        waiting = shop.start("wait", "report", stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        server.kill()
        output, _ = waiting.communicate(timeout=60)
        assert waiting.returncode == 1
        assert ": lost. WorkerLost: process " in output
    assert shop.data("purge") == {"purged": 2}
    assert shop.data("list") == []


# ---- in a terminal ----


@contextmanager
def terminal() -> Iterator[tuple[int, int, Callable[[], str]]]:
    """Our end, the end for a program, and what reads all that the program has written by now."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    text = bytearray()

    def read() -> str:
        with suppress(OSError):  # nothing new
            text.extend(os.read(ours, 1 << 16))
        return text.decode(errors="replace")

    try:
        yield ours, theirs, read
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("rich", [True, False])
def test_top_in_a_terminal(shop: Shop, rich: bool) -> None:
    if rich:
        require("rich")
    else:
        (shop.folder / "rich.py").write_text("raise ImportError")
    shop.environ["TERM"] = "xterm"
    with shop.serving(), terminal() as (_, theirs, read):
        process = shop.start("top", "--interval", "0.2", stdin=theirs, stdout=theirs, stderr=theirs)
        assert wait_until(lambda: read().count("2 running") > 1 and "render" in read()), read()
        process.send_signal(signal.SIGINT)
        assert wait_until(lambda: read() and process.poll() is not None)
        assert process.returncode == 0
        assert "Traceback" not in read()
        assert "Aborted" not in read()


def test_progress_is_shown_to_those_who_wait_in_a_terminal(shop: Shop) -> None:
    with shop.serving(), terminal() as (_, theirs, read):
        process = shop.start("wait", "report", stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs)
        assert wait_until(lambda: "render: running [" in read()), read()
        shop.run("stop", "report")
        assert wait_until(lambda: read() and process.poll() is not None)
        assert process.returncode == 1


def test_colours_are_for_terminals(shop: Shop) -> None:
    with shop.serving(), terminal() as (_, theirs, read):
        assert "\x1b" not in shop.run("list")[1]
        shop.environ["COLUMNS"] = "80"
        with shop.start("list", stdin=theirs, stdout=theirs) as process:
            assert wait_until(lambda: read() and process.poll() is not None)
        assert "\x1b[" in read()


# ---- in this process ----

Run = Callable[..., Result]


@pytest.fixture
def run(app: Flask) -> Run:
    """``run("list", "--limit", 3)``: the commands, in an app as it is in another process."""

    def run(*args: object) -> Result:
        other = Flask("shop", instance_path=app.instance_path)
        other.config.update(app.config)
        for executor in app.extensions.get("flask_executor_bindings", {}):
            Executor(other, name=executor.name)
        return other.test_cli_runner().invoke(commands.group, [str(arg) for arg in args])

    return run


@pytest.fixture
def stored(make_executor: MakeExecutor, shared_store: str) -> Executor:
    return make_executor(store=shared_store, track="all", max_workers=2)


def data(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


COMMANDS = [["list"], ["show", "x"], ["stop", "x"], ["purge"], ["wait", "x"], ["top", "--once"]]


def test_the_commands_are_found_by_flask(shop: Shop) -> None:
    code, output, _ = shop.run_program("--help")
    assert code == 0
    assert all(command in output for command in [*(command[0] for command in COMMANDS), "doctor"])


@pytest.mark.parametrize("args", COMMANDS)
def test_in_memory_there_is_nothing_to_see(make_executor: MakeExecutor, run: Run, args: list[str]) -> None:
    make_executor(name="reports")
    result = run(*args)
    assert result.exit_code == 1
    assert "REPORTS_EXECUTOR_STORE is 'memory'" in result.output
    assert "Set REPORTS_EXECUTOR_STORE to 'sqlite'" in result.output


@pytest.mark.parametrize("args", COMMANDS)
def test_a_store_that_is_not_available_is_one_line(
    make_executor: MakeExecutor, run: Run, args: list[str], tmp_path: Path
) -> None:
    (tmp_path / "broken").write_bytes(b"no database " * 1000)
    make_executor(store=f"sqlite:///{tmp_path}/broken")
    result = run(*args)
    assert result.exit_code == 1
    assert result.output.startswith("Error: The job store")
    assert result.output.count("\n") == 1


def test_a_bad_config_is_one_line(shop: Shop) -> None:
    shop.environ["FLASK_EXECUTOR_STORE"] = "mongodb://x"
    code, _, errors = shop.run_program("list")
    assert code == 1
    assert errors.startswith("Error: EXECUTOR_STORE is 'mongodb://x'; it must be ")
    assert errors.count("\n") == 1


def test_a_missing_extra_is_one_line(shop: Shop) -> None:
    (shop.folder / "redis.py").write_text("raise ImportError")
    shop.environ["FLASK_EXECUTOR_STORE"] = "redis://localhost"
    code, _, errors = shop.run_program("list")
    assert (code, errors) == (1, "Error: redis is not installed: pip install flask-executor[redis]\n")


def test_which_executor(make_executor: MakeExecutor, run: Run) -> None:
    result = run("list")
    assert (result.exit_code, "The app 'shop' has no executor" in result.output) == (1, True)

    make_executor(store="sqlite", track="all").submit(add, 1).result()
    assert wait_until(lambda: len(data(run("list", "--json"))) == 1)  # written a moment later, as it has no key

    make_executor(name="reports", store="sqlite")
    result = run("list")
    assert result.exit_code == 1
    assert "Say which, before the command: --executor '', --executor reports." in result.output
    assert data(run("--executor", "reports", "list", "--json")) == []
    assert len(data(run("--executor", "", "list", "--json"))) == 1
    result = run("--executor", "mail", "list")
    assert (result.exit_code, "has no executor named 'mail'" in result.output) == (1, True)


def test_listing(stored: Executor, run: Run) -> None:
    stored.submit_stored("first", add, 1).result()
    failed = stored.options(owner="anna", name="mail", key=("mail", 7)).submit(fail, "no\x1b[31mpaper\nat all")
    failed.exception()
    assert wait_until(lambda: [job["status"] for job in data(run("list", "--json"))] == ["failed", "succeeded"])

    mail, first = data(run("list", "--json"))
    assert mail == {**job_document(failed.record(), with_error=True), "owner": "anna"}
    assert (mail["key"], mail["error"]) == ("('mail', 7)", "ValueError: no\x1b[31mpaper\nat all")
    assert (mail["ended"], mail["failed"], mail["retryable"]) == (True, True, True)
    for filters in (["--status", "failed"], ["--name", "mail"], ["--owner", "anna"], ["--limit", "1"]):
        assert data(run("list", "--json", *filters)) == [mail]
    assert data(run("list", "--json", "--owner", "anna", "--status", "succeeded")) == []
    assert run("list", "--status", "done").exit_code == 2

    lines = run("list").output.splitlines()
    assert [line.split()[0] for line in lines] == ["ID", mail["id"], first["id"]]
    assert "ValueError: no [31mpaper at all" in lines[1]  # nothing that the terminal would obey
    column = lines[0].index("STATUS")
    assert [line[column:].split()[0] for line in lines] == ["STATUS", "failed", "succeeded"]


def test_a_list_without_jobs_says_which_are_recorded(make_executor: MakeExecutor, run: Run) -> None:
    make_executor(store="sqlite")
    assert "recorded only if EXECUTOR_TRACK is 'all'" in run("list").output
    assert data(run("list", "--json")) == []


def test_showing(stored: Executor, run: Run) -> None:
    keys: list[Any] = ["report", 7, ("report", 7), "7 days", "=x"]
    jobs = {repr(key): stored.submit_stored(key, add, 1) for key in keys}
    for key in keys:
        jobs[repr(key)].result()
    assert wait_until(lambda: len(data(run("list", "--json", "--status", "succeeded"))) == len(keys))
    for key in keys:
        typed = key if isinstance(key, str) else repr(key)
        assert data(run("show", "--json", typed))["id"] == jobs[repr(key)].job_id
    assert data(run("show", "--json", "( 'report',7)"))["key"] == "('report', 7)"
    assert data(run("show", "--json", jobs["7"].job_id))["key"] == "7"
    assert "status     succeeded" in run("show", "report").output


def test_showing_by_the_beginning_of_an_id(stored: Executor, run: Run) -> None:
    jobs = [stored.submit_stored(f"report {number}", add, 1) for number in range(20)]
    for job in jobs:
        job.result()
    assert wait_until(lambda: len(data(run("list", "--json", "--status", "succeeded"))) == len(jobs))
    for job in jobs:
        assert data(run("show", "--json", job.job_id[:12]))["id"] == job.job_id
    assert "There is no job" in run("show", jobs[0].job_id[:3]).output
    stored.submit_stored("cafe", add, 1).result()
    assert wait_until(lambda: data(run("show", "--json", "cafe"))["key"] == "cafe")


def test_two_ids_begin_the_same(stored: Executor, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = iter(["0123" + "0" * 20, "0123" + "1" * 20])
    monkeypatch.setattr("flask_executor.jobs.model.new_id", lambda: next(ids))
    for key in ("a", "b"):
        stored.submit_stored(key, add, 1).result()
    result = run("show", "0123")
    assert result.exit_code == 1
    assert result.output == "Error: The ids of 2 jobs begin with '0123': give more of it.\n"
    assert data(run("show", "--json", "01230"))["key"] == "a"


@pytest.mark.parametrize("text", ["x", "[1]", "{}", "(", "1e999", "", "\udcff", "=", "('x', x)"])
def test_unknown_is_not_expired(stored: Executor, run: Run, text: str) -> None:
    for command in ("show", "stop", "wait"):
        result = run(command, text)
        assert result.exit_code == 1
        assert "There is no job with the id or key" in result.output


def test_expired_and_purged(stored: Executor, run: Run) -> None:
    job = stored.submit_stored(("report", 7), add, 1)
    job.result()
    assert wait_until(lambda: data(run("list", "--json", "--status", "succeeded")))
    assert data(run("purge", "--json", "--older-than", "60")) == {"purged": 0}
    assert run("purge").output == "1 record purged.\n"
    for text in (job.job_id, "('report', 7)"):
        result = run("show", text)
        assert result.exit_code == 1
        assert "its record has expired" in result.output
        assert "EXECUTOR_RESULT_TTL" in result.output


def test_a_job_that_does_not_stop(
    make_executor: MakeExecutor, run: Run, monkeypatch: pytest.MonkeyPatch, shared_store: str
) -> None:
    monkeypatch.setattr(commands, "_STOP_MARGIN", 0.2)
    monkeypatch.setattr(commands, "_MAX_GRACE_WAIT", 0.0)
    executor = make_executor(store=shared_store, max_workers=1)
    go_on = threading.Event()

    def report() -> None:
        while not go_on.wait(0.02):
            current_job.update(message="no checkpoint")

    executor.submit_stored("running", report)
    waiting = executor.submit_stored("waiting", add, 1)
    try:
        result = run("stop", "running", "--no-wait")
        assert (result.exit_code, "was asked to stop." in result.output) == (0, True)
        assert wait_until(lambda: data(run("show", "running", "--json"))["stop_requested"])
        assert "running (stopping)" in run("list").output
        assert "running (asked to stop)" in run("show", "running").output

        result = run("stop", "running", "--grace", "60")
        assert (result.exit_code, "is still running" in result.output) == (1, True)
        monkeypatch.setattr(commands, "_STOP_MARGIN", 20)
        result = run("stop", "waiting", "--json")
        assert json.loads(result.output)["status"] == "cancelled"
        assert waiting.cancelled()
        run("stop", "running", "--grace", "0")
        assert wait_until(lambda: data(run("show", "running", "--json"))["status"] == "killed")
    finally:
        go_on.set()


def test_a_job_in_the_queue_of_an_engine_is_cancelled(
    make_executor: MakeExecutor, run: Run, monkeypatch: pytest.MonkeyPatch, shared_store: str
) -> None:
    store = make_executor(store=shared_store)._app_executor()[1].tracker.store  # type: ignore[attr-defined]
    engine, find, job = engine_holder("rq"), commands._shared_tracker, JobState("render", "report")
    assert store.transfer(Entry(job=job.record(), holder=engine), None) is None

    def with_engine() -> Any:
        binding, tracker = find()
        tracker.handover = EngineHandover(tracker, engine)
        return binding, tracker

    monkeypatch.setattr(commands, "_shared_tracker", with_engine)
    result = run("stop", "report", "--json")
    assert (result.exit_code, json.loads(result.output)["status"]) == (0, "cancelled")


def test_waiting_for_one_whose_record_leaves(make_executor: MakeExecutor, run: Run) -> None:
    executor = make_executor(store="sqlite", result_ttl=0.05)
    go_on = threading.Event()
    executor.submit_stored("brief", go_on.wait)
    timer = threading.Timer(0.5, go_on.set)
    timer.start()
    result = run("wait", "brief")
    assert result.exit_code == 0 or "its record has expired" in result.output
    timer.join()


def test_top_once(stored: Executor, run: Run) -> None:
    go_on = threading.Event()
    running = [stored.submit(go_on.wait) for _ in range(2)]
    queued = [stored.submit_stored(number, add, 1) for number in range(3)]
    try:
        assert wait_until(lambda: data(run("top", "--once", "--json"))["running"] == 2)
        frame = data(run("top", "--once", "--json", "--limit", "4"))
        assert frame["time"] >= frame["jobs"][0]["queued_at"]
        assert frame["queued"] == 3
        assert {job["id"] for job in frame["jobs"][:2]} == {job.job_id for job in running}
        assert [job["key"] for job in frame["jobs"][2:]] == ["0", "1"]
        output = run("top", "--once").output
        assert "2 running, 3 queued" in output.splitlines()[0]
    finally:
        go_on.set()
    jobs: list[FutureProxy[Any]] = [*running, *queued]
    for job in jobs:
        job.result(10)


def test_frames_of_top_are_lines_of_json(shop: Shop) -> None:
    with shop.serving():
        process = shop.start("top", "--json", "--interval", "0.1", stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        frames = [json.loads(process.stdout.readline()) for _ in range(3)]  # type: ignore[union-attr]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert [len(frame["jobs"]) for frame in frames] == [2, 2, 2]


@pytest.mark.parametrize(("progress", "text"), [(0.0, "0%"), (0.29, "29%"), (0.999, "99%"), (1.0, "100%")])
def test_percent(progress: float, text: str) -> None:
    assert console._percent(progress) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0.0s"), (0.26, "0.3s"), (59.9, "59s"), (185, "3m05s"), (7800, "2h10m"), (3600 * 99, "4d03h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert console._seconds(seconds) == text
