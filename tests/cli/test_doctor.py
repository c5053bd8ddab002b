from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from redis_server import redis_client
from requirements import require
from tasks import length, sleep

from flask_executor import Executor
from flask_executor.cli import commands, doctor
from flask_executor.cli.doctor import Finding, Server, read_server
from flask_executor.executor.config import Config
from flask_executor.testing.contract.fixtures import MakeExecutor

CONFIG = Config.read({})
REPORTS = Config.read({"REPORTS_EXECUTOR_STORE": "sqlite"}, "reports")
GOOD_KEY = "0123456789abcdef0123456789abcdef"


def levels(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.check) for finding in findings]


def only(findings: Iterable[Finding], check: str) -> Finding:
    found = [finding for finding in findings if finding.check == check]
    assert len(found) == 1, found
    return found[0]


Examine = Callable[[], list[Finding]]


@pytest.fixture
def examine(app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """What is found for the app's one executor, in a folder without any server's files."""
    monkeypatch.chdir(tmp_path)
    for name in ("WEB_CONCURRENCY", "GUNICORN_CMD_ARGS", "FLASK_APP"):
        monkeypatch.delenv(name, raising=False)

    def examine() -> list[Finding]:
        ((executor, binding),) = app.extensions["flask_executor_bindings"].items()
        return doctor.examine(app, executor, binding)

    return examine


# ---- the store ----


def test_an_app_without_trouble(app: Flask, make_executor: MakeExecutor, examine: Examine) -> None:
    app.secret_key = GOOD_KEY
    make_executor(store="sqlite", max_pending=100)
    findings = examine()
    assert {finding.level for finding in findings} == {"ok"}, findings
    assert [finding.check for finding in findings] == ["type", "store", "store file", "records", "SECRET_KEY"]
    assert " ms to read, " in only(findings, "store").found


def test_records_in_memory(make_executor: MakeExecutor, examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    make_executor()
    assert only(examine(), "store").level == "note"
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    finding = only(examine(), "store")
    assert finding.level == "problem"
    assert "workers = 4" in finding.found
    assert "EXECUTOR_STORE to 'sqlite'" in finding.advice


def test_a_store_that_does_not_answer(make_executor: MakeExecutor, examine: Examine, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"no database " * 1000)
    make_executor(store=f"sqlite:///{tmp_path}/broken")
    finding = only(examine(), "store")
    assert finding.level == "problem"
    assert "is not available" in finding.found


def test_a_slow_store(make_executor: MakeExecutor, examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SLOW_ACCESS", 0.0)
    make_executor(store="sqlite")
    assert only(examine(), "store").level == "warning"


def test_looking_leaves_nothing_in_the_store(app: Flask, make_executor: MakeExecutor, examine: Examine) -> None:
    import sqlite3
    from contextlib import closing

    make_executor(store="sqlite")
    examine()
    with closing(sqlite3.connect(Path(app.instance_path) / "executor.sqlite")) as connection:
        assert connection.execute("SELECT count(*) FROM holders").fetchone() == (0,)


@pytest.mark.parametrize(("mode", "level"), [(0o600, "ok"), (0o640, "warning"), (0o660, "problem"), (0o602, "problem")])
def test_who_can_read_and_write_the_file(tmp_path: Path, mode: int, level: str) -> None:
    path = tmp_path / "jobs.sqlite"
    path.touch()
    path.chmod(mode)
    finding = only(doctor.check_file(CONFIG, path), "store file")
    assert finding.level == level
    assert level == "ok" or finding.advice == f"chmod 600 {path}"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "jobs.sqlite"
    path.touch(0o600)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50 * 2**20))
    finding = only(doctor.check_file(REPORTS, path), "disk space")
    assert (finding.level, finding.found[:7]) == ("problem", "50 MiB ")
    assert "REPORTS_EXECUTOR_STORE" in finding.advice


MOUNTS = r"""
/dev/vda / ext4 rw 0 0
nas:/home /mnt/nas nfs4 rw 0 0
/dev/vdb /mnt/nas/local xfs rw 0 0
//nas/share /mnt/with\040space cifs rw 0 0
me@host: /home/me/far fuse.sshfs rw 0 0
share /mnt/share 9p rw 0 0
short
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/shop/jobs.sqlite", None),
        ("/mnt/nas/shop/jobs.sqlite", "nfs4"),
        ("/mnt/nas/local/jobs.sqlite", None),
        ("/mnt/with space/jobs.sqlite", "cifs"),
        ("/home/me/far/jobs.sqlite", "fuse.sshfs"),
        ("/mnt/share/jobs.sqlite", "9p"),
        ("/mnt/shared/jobs.sqlite", None),
    ],
)
def test_network_file_systems(path: str, kind: str | None) -> None:
    findings = list(doctor.check_file_system(CONFIG, Path(path), MOUNTS))
    assert levels(findings) == ([("problem", "file system")] if kind else [])
    assert not kind or f"({kind})" in findings[0].found


def test_what_redis_does_when_memory_runs_out(app: Flask, make_executor: MakeExecutor, redis_url: str) -> None:
    require("redis")
    make_executor(store=redis_url)
    ((executor, binding),) = app.extensions["flask_executor_bindings"].items()

    def examine() -> list[tuple[str, str]]:
        return [pair for pair in levels(doctor.examine(app, executor, binding)) if pair[1] in ("store", "redis")]

    with redis_client(redis_url) as client:
        before = {name: client.config_get(name)[name] for name in ("maxmemory", "maxmemory-policy", "appendonly")}
        try:
            client.config_set("maxmemory", "1gb")
            client.config_set("appendonly", "yes")
            client.config_set("maxmemory-policy", "noeviction")
            assert examine() == [("ok", "store")]
            client.config_set("maxmemory-policy", "volatile-lru")
            assert examine() == [("ok", "store"), ("warning", "redis")]
            client.config_set("maxmemory-policy", "allkeys-lru")
            assert examine() == [("ok", "store"), ("problem", "redis")]
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("appendonly", "no")
            client.config_set("save", "")
            assert examine() == [("ok", "store"), ("note", "redis")]
        finally:
            for name, value in before.items():
                client.config_set(name, value)


def test_a_redis_that_does_not_tell() -> None:
    class Hosted:
        def config_get(self, pattern: str) -> Any:
            raise ConnectionError("unknown command 'CONFIG'")

    (finding,) = doctor.check_redis(Hosted())
    assert finding.level == "note"
    assert "unknown command" in finding.found


@pytest.mark.parametrize(("ended", "level"), [(0, "ok"), (8_999, "ok"), (9_000, "warning"), (10_000, "warning")])
def test_many_records(ended: int, level: str) -> None:
    assert only(doctor.check_records(CONFIG, ended), "records").level == level


@pytest.mark.parametrize(
    ("key", "sqlite", "redis"),
    [
        (None, "warning", "problem"),
        ("", "warning", "problem"),
        ("dev", "warning", "warning"),
        (b"secret", "warning", "warning"),
        ("0123456789", "warning", "warning"),
        (GOOD_KEY, "ok", "ok"),
        (GOOD_KEY.encode(), "ok", "ok"),
    ],
)
def test_secret_keys(key: Any, sqlite: str, redis: str) -> None:
    for store, level in (("sqlite", sqlite), ("redis://localhost", redis)):
        config = Config.read({"EXECUTOR_STORE": store})
        finding = only(doctor.check_secret_key(config, key), "SECRET_KEY")
        assert finding.level == level
        assert not key or str(key) not in finding.found + finding.advice


# ---- what runs jobs ----


def test_type_immediate(make_executor: MakeExecutor, examine: Examine) -> None:
    make_executor(type="immediate")
    assert only(examine(), "type").level == "warning"
    assert ("note", "queue") not in levels(examine())


@pytest.mark.parametrize(
    ("method", "threads", "python", "level"),
    [
        ("fork", [], (3, 11), "ok"),
        ("fork", [], (3, 12), "note"),
        ("fork", ["telemetry"], (3, 11), "warning"),
        ("fork", ["telemetry", "mail"], (3, 13), "warning"),
        ("spawn", ["telemetry"], (3, 13), "ok"),
    ],
)
def test_start_methods(method: str, threads: list[str], python: tuple[int, int], level: str) -> None:
    finding = only(doctor.check_start_method(REPORTS, method, threads, python), "start method")
    assert finding.level == level
    assert level != "warning" or all(name in finding.found for name in threads)
    assert level != "warning" or "REPORTS_EXECUTOR_START_METHOD" in finding.advice


def test_the_app_of_worker_processes(
    app: Flask, make_executor: MakeExecutor, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_executor(type="process", start_method="spawn")
    finding = only(examine(), "app")
    assert finding.level == "problem"
    assert "EXECUTOR_APP" in finding.advice

    monkeypatch.setenv("FLASK_APP", "shop:create_app()")
    assert "'shop:create_app()'" in only(examine(), "app").found

    app.config["EXECUTOR_APP"] = "shop.factory:create_app()"
    for executor in app.extensions["flask_executor_bindings"]:
        executor.init_app(app)
    assert "'shop.factory:create_app()'" in only(examine(), "app").found


def a_job() -> None: ...


def test_jobs_that_worker_processes_cannot_import(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Executor()

    def local() -> None: ...

    module = ModuleType("shop_of_doctor")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules[__name__], "a_job", executor.job(a_job))
    decorated = sys.modules[__name__].a_job
    vars(module).update(same=decorated, urgent=decorated.options(priority=1), others=Executor().job(local))
    assert list(doctor.check_jobs(executor)) == []

    vars(module).update(a=executor.job(local), b=executor.job(lambda: None))
    (finding,) = doctor.check_jobs(executor)
    assert finding.level == "problem"
    assert "<locals>.local" in finding.found
    assert "<locals>.<lambda>" in finding.found
    assert "a_job" not in finding.found

    monkeypatch.delattr(module, "a")
    monkeypatch.delattr(module, "b")
    vars(module)["hidden"] = executor.job(length)  # tasks.length is the function itself
    (finding,) = doctor.check_jobs(executor)
    assert "tasks.length" in finding.found


def test_an_engine_with_workers(make_executor: MakeExecutor, examine: Examine) -> None:
    require("rq")
    make_executor(type="rq")
    assert (only(examine(), "workers").level, only(examine(), "workers").found[:14]) == ("ok", "2 workers look")


def test_an_engine_without_workers(make_executor: MakeExecutor, examine: Examine, redis_url: str) -> None:
    require("rq")
    make_executor(type="rq", url=redis_url, queue="nobody-looks-there")
    finding = only(examine(), "workers")
    assert finding.level == "warning"
    assert "'nobody-looks-there'" in finding.found
    assert "flask executor worker" in finding.advice


def test_an_engine_that_does_not_answer(make_executor: MakeExecutor, examine: Examine) -> None:
    require("rq")
    make_executor(type="rq", url="redis://127.0.0.1:1/0")
    finding = only(examine(), "workers")
    assert (finding.level, "EXECUTOR_URL" in finding.advice) == ("problem", True)


def test_a_cluster_of_each_process(app: Flask, make_executor: MakeExecutor, examine: Examine) -> None:
    require("distributed")
    app.secret_key = None
    make_executor(type="dask", url=None)
    assert only(examine(), "workers").level == "ok"
    finding = only(examine(), "SECRET_KEY")
    assert (finding.level, "submit() refuses" in finding.found) == ("problem", True)


# ---- the server ----


def test_debug_mode(app: Flask, make_executor: MakeExecutor, examine: Examine) -> None:
    make_executor()
    assert "reloader" not in [finding.check for finding in examine()]
    app.debug = True
    assert only(examine(), "reloader").level == "note"


def test_jobs_that_were_submitted_at_import(make_executor: MakeExecutor, examine: Examine) -> None:
    executor = make_executor()
    job = executor.submit(sleep, 0.3)
    finding = only(examine(), "import")
    assert finding.level == "warning"
    assert "(sleep)" in finding.found
    job.result()


@pytest.mark.parametrize(
    ("environ", "files", "expected"),
    [
        ({}, {}, {"name": "", "several": "", "preload": "", "graceful_timeout": 30.0, "threadless": False}),
        ({"WEB_CONCURRENCY": "1"}, {}, {"name": "", "several": ""}),
        (
            {"WEB_CONCURRENCY": "3"},
            {},
            {"name": "", "several": "the environment (WEB_CONCURRENCY) says workers = 3"},
        ),
        (
            {"GUNICORN_CMD_ARGS": "--bind 0.0.0.0:80 -w 4 --preload --graceful-timeout 60"},
            {},
            {
                "name": "gunicorn",
                "several": "GUNICORN_CMD_ARGS says workers = 4",
                "preload": "preload_app in GUNICORN_CMD_ARGS",
                "graceful_timeout": 60.0,
                "graceful_by": "GUNICORN_CMD_ARGS",
            },
        ),
        ({"GUNICORN_CMD_ARGS": "--workers=2"}, {}, {"several": "GUNICORN_CMD_ARGS says workers = 2"}),
        ({"GUNICORN_CMD_ARGS": "-w1", "WEB_CONCURRENCY": "3"}, {}, {"name": "gunicorn", "several": ""}),
        ({"GUNICORN_CMD_ARGS": "-w 'x"}, {}, {"name": "gunicorn", "several": ""}),
        ({"GUNICORN_CMD_ARGS": "--workers"}, {}, {"name": "gunicorn", "several": ""}),
        (
            {},
            {"gunicorn.conf.py": "import os\nos.abort()\nworkers = os.cpu_count() * 2 + 1\npreload_app: bool = True"},
            {
                "name": "gunicorn",
                "several": "gunicorn.conf.py says workers = os.cpu_count() * 2 + 1",
                "preload": "preload_app in gunicorn.conf.py",
                "graceful_by": "the default",
            },
        ),
        (
            {"GUNICORN_CMD_ARGS": "-c deploy.py"},
            {"deploy.py": "graceful_timeout = 90\nworkers = 1\npreload_app = False"},
            {"several": "", "preload": "", "graceful_timeout": 90.0, "graceful_by": "deploy.py"},
        ),
        ({}, {"gunicorn.conf.py": "workers = = 4"}, {"name": "gunicorn", "several": ""}),
        ({}, {"gunicorn.conf.py": "graceful_timeout = MINUTE"}, {"graceful_timeout": 30.0}),
        (
            {},
            {"uwsgi.ini": "[uwsgi]\nprocesses = 4\nprocesses = 8\nchdir = %d"},
            {"name": "uwsgi", "several": "uwsgi.ini says processes = 8", "threadless": True},
        ),
        ({}, {"uwsgi.ini": "[uwsgi]\nenable-threads\nworkers = 1"}, {"several": "", "threadless": False}),
        ({}, {"uwsgi.ini": "[uwsgi]\nenable-threads = false"}, {"threadless": True}),
        ({}, {"uwsgi.ini": "[uwsgi]\nthreads = 4"}, {"threadless": False}),
        ({}, {"uwsgi.ini": "what\n["}, {"name": "uwsgi", "several": "", "threadless": False}),
    ],
)
def test_what_tells_of_the_server(
    environ: dict[str, str], files: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    server = asdict(read_server(environ, tmp_path))
    assert {name: server[name] for name in expected} == expected


def test_what_servers_do_to_jobs() -> None:
    assert levels(doctor.check_server(CONFIG, Server())) == []
    assert levels(doctor.check_server(CONFIG, Server(name="uwsgi", threadless=True))) == [("problem", "uwsgi")]

    findings = list(doctor.check_server(CONFIG, Server(name="gunicorn", preload="preload_app in gunicorn.conf.py")))
    assert levels(findings) == [("note", "preload"), ("warning", "shutdown")]
    assert "graceful_timeout is 30 s (the default)" in findings[1].found
    assert "35 s (EXECUTOR_SHUTDOWN_TIMEOUT 30 + EXECUTOR_STOP_GRACE 5)" in findings[1].found
    assert "graceful_timeout to 40" in findings[1].advice

    enough = Server(name="gunicorn", graceful_timeout=35.0, graceful_by="gunicorn.conf.py")
    assert levels(doctor.check_server(CONFIG, enough)) == [("ok", "shutdown")]


# ---- the command ----


def test_the_command(app: Flask, make_executor: MakeExecutor, examine: Examine, tmp_path: Path) -> None:
    make_executor(name="reports")
    result = app.test_cli_runner().invoke(commands.group, ["doctor"])
    assert result.exit_code == 0
    assert "note     store  REPORTS_EXECUTOR_STORE is 'memory'" in result.output

    (tmp_path / "gunicorn.conf.py").write_text("workers = 4")
    result = app.test_cli_runner().invoke(commands.group, ["doctor"])
    assert result.exit_code == 1
    assert "problem  store     REPORTS_EXECUTOR_STORE is 'memory'" in result.output
    result = app.test_cli_runner().invoke(commands.group, ["doctor", "--json"])
    assert result.exit_code == 1
    assert [finding["level"] for finding in json.loads(result.output) if finding["check"] == "store"] == ["problem"]


def test_a_real_app_with_threads_and_forked_workers(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        """
import threading
from flask import Flask
from flask_executor import Executor

executor = Executor()
threading.Thread(target=threading.Event().wait, name="telemetry", daemon=True).start()

@executor.job
def render(): ...

@executor.job
def mail(): ...

send = mail
mail = None

def create_app():
    app = Flask(__name__)
    app.config.update(EXECUTOR_TYPE="process", EXECUTOR_START_METHOD="fork", EXECUTOR_STORE="sqlite")
    executor.init_app(app)
    return app
"""
    )
    command = [sys.executable, "-m", "flask", "--app", "shop", "executor", "doctor", "--json"]
    process = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=30)
    assert process.returncode == 1, process.stderr
    found = {finding["check"]: finding for finding in json.loads(process.stdout)}
    assert found["start method"]["level"] == "warning"
    assert "telemetry" in found["start method"]["found"]
    assert found["SECRET_KEY"]["level"] == "warning"
    assert (found["jobs"]["level"], "shop.mail" in found["jobs"]["found"]) == ("problem", True)
    assert "shop.render" not in found["jobs"]["found"]
