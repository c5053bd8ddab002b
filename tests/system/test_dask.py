"""What is Dask's own: clusters, workers that die, schedulers that forget."""

from __future__ import annotations

import asyncio
import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import tasks
from engine_workers import DaskScheduler, worker_command
from flask import Flask
from processes import freeze
from requirements import require
from tasks import add, append, compute_with_dask, fail_until, pid, submit_and_wait, wait_for

from flask_executor import ConfigError, EngineUnavailable, Executor, ExecutorError
from flask_executor.cli import commands
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until

require("distributed")


@pytest.fixture
def cluster(app: Flask, make_executor: MakeExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """An executor with a cluster of its own."""
    store = f"sqlite:///{tmp_path}/jobs.sqlite"
    monkeypatch.setenv("FLASK_EXECUTOR_TYPE", "dask")
    monkeypatch.setenv("FLASK_EXECUTOR_STORE", store)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(tasks.__file__).parent)]))
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    return make_executor(type="dask", url=None, store=store, max_workers=2)


@pytest.fixture
def executor(make_executor: MakeExecutor, app: Flask) -> Executor:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    return make_executor(type="dask")


@pytest.fixture
def scheduler() -> Iterator[DaskScheduler]:
    scheduler = DaskScheduler()
    scheduler.start()
    yield scheduler
    scheduler.kill()


@pytest.fixture
def config(scheduler: DaskScheduler, tmp_path: Path) -> dict[str, str]:
    return {"type": "dask", "url": scheduler.url, "store": f"sqlite:///{tmp_path}/jobs.sqlite"}


def connect(executor: Executor) -> None:
    """Have it connected before workers start, which keeps a small machine busy for longer than a submit may take."""
    assert wait_until(lambda: executor.health().accepting, 60)


class TestClusterOfItsOwn:
    def test_it_runs_jobs_and_leaves_nothing_behind(self, cluster: Executor) -> None:
        assert cluster.health().workers == 0, "nothing starts before the first job"
        assert cluster.submit(add, 1, 2).result(60) == 3
        assert cluster.workers == 2
        assert cluster.submit(pid).result(30) != os.getpid()
        futures = [cluster.submit(tasks.sleep, 0.2) for _ in range(3)]
        cluster.shutdown()
        assert [future.status for future in futures] == ["succeeded"] * 3, "they end before the cluster does"

    def test_jobs_start_jobs_on_the_same_cluster(self, cluster: Executor) -> None:
        assert cluster.submit(submit_and_wait).result(60) == 3
        assert cluster.workers == 2

    def test_what_is_submitted_while_it_starts_is_run_before_it_ends(self, cluster: Executor) -> None:
        with ThreadPoolExecutor(1) as pool:
            submitted = pool.submit(cluster.submit, add, 1, 2)
            assert wait_until(multiprocessing.active_children), "its first worker starts"
            cluster.shutdown()
            assert submitted.result(60).result(10) == 3

    def test_one_that_cannot_start_leaves_nothing_behind(self, cluster: Executor) -> None:
        import dask
        import psutil

        with dask.config.set({"distributed.worker.preload": ["nowhere_to_be_found"]}):
            with pytest.raises(EngineUnavailable, match="this machine"):
                cluster.submit(add, 1, 2)
            assert wait_until(lambda: not multiprocessing.active_children())
            listening = [line for line in psutil.Process().net_connections("tcp") if line.status == "LISTEN"]
            assert not listening, "its scheduler has ended"
        assert cluster.submit(add, 1, 2).result(60) == 3

    def test_a_child_of_a_fork_leaves_it_alone(self, tmp_path: Path) -> None:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(tasks.__file__).parent), *sys.path])}
        config = {"TYPE": "dask", "STORE": f"sqlite:///{tmp_path}/jobs.sqlite", "APP": "tasks:create_app()"}
        environ |= {f"FLASK_EXECUTOR_{key}": value for key, value in config.items()}
        quiet = ["-W", "ignore:This process:DeprecationWarning"]  # of forks with threads, as servers do them
        command = [sys.executable, *quiet, "-c", _PARENT_AND_CHILD]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.stdout == "child: 2, exit code 0\nparent: the same workers\n", done.stderr
        assert done.returncode == 0
        # A worker of Dask may say that its scheduler has gone in the middle of a heartbeat.
        assert "flask_executor" not in done.stderr

    def test_an_app_that_workers_cannot_import_leaves_nothing_behind(
        self, make_executor: MakeExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("FLASK_APP", raising=False)
        executor = make_executor(type="dask", url=None)
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"EXECUTOR_APP is None.*Dask's workers import it, and app 'shop'"):
                executor.submit_stored("key", add, 1)
            assert executor.health().workers == 0
        assert [thread.name for thread in threading.enumerate() if "dask" in thread.name] == []

    def test_an_app_in_the_main_module(self, tmp_path: Path) -> None:
        (tmp_path / "shop.py").write_text(_MAIN)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "shop.py"]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.stdout == "42 in the app shop\n", done.stderr

    def test_without_a_store_it_is_sqlite(self, make_executor: MakeExecutor, app: Flask) -> None:
        make_executor(type="dask", url=None).jobs.list()
        assert Path(app.instance_path, "executor.sqlite").exists()


_MAIN = """
from flask import Flask, current_app
from flask_executor import Executor

app = Flask(__name__)
app.config.update(EXECUTOR_TYPE="dask", EXECUTOR_MAX_WORKERS=1, SECRET_KEY="not a secret in a test")
executor = Executor(app)

@executor.job
def double(n):
    return f"{2 * n} in the app {current_app.name}"

if __name__ == "__main__":
    with app.app_context():
        print(double.submit(21).result(30))
    executor.shutdown()
"""
_PARENT_AND_CHILD = """
import os, sys
from multiprocessing import active_children
from tasks import add, create_app
app = create_app()
executor = app.extensions["executor"]
executor.submit(add, 1).result(60)
workers = [process.pid for process in active_children()]
child = os.fork()
if child == 0:
    print("child:", executor.submit(add, 2).result(30), end=", ", flush=True)
    executor.shutdown()
    sys.exit()
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print("exit code", code)
executor.submit(add, 3).result(60)
print("parent:", "the same workers" if [process.pid for process in active_children()] == workers else "others")
executor.shutdown()
"""


def test_a_scheduler_needs_a_store_that_all_share(make_executor: MakeExecutor) -> None:
    with pytest.raises(ConfigError, match=r"EXECUTOR_STORE is 'memory'; it must be 'redis://"):
        make_executor(type="dask", url="tcp://127.0.0.1:9", store="memory")


def test_dask_shows_the_names(executor: Executor, dask_workers: dict[str, Any], tmp_path: Path) -> None:
    import distributed

    future = executor.options(name="render").submit(wait_for, str(tmp_path / "go"))
    assert wait_until(future.running)
    with distributed.Client(dask_workers["url"], set_as_default=False) as client:
        keys = [key for keys in client.processing().values() for key in keys]
    assert f"render-{future.job_id}" in keys
    (tmp_path / "go").touch()
    assert future.result(10) is None


def test_a_job_may_use_dask(executor: Executor) -> None:
    assert executor.options(timeout=20).submit(compute_with_dask).result(30) == 3


def test_a_job_that_waits_for_its_retry_lets_others_run(executor: Executor, tmp_path: Path) -> None:
    futures = [executor.options(retries=1, backoff=60).submit(fail_until, str(tmp_path / str(n)), 2) for n in range(3)]
    assert wait_until(lambda: all(future.record().attempt == 2 for future in futures))
    assert executor.submit(add, 1).result(10) == 1
    for future in futures:
        assert future.stop()
        assert future.status == "cancelled"


def test_what_no_worker_can_run_fails(make_executor: MakeExecutor, app: Flask) -> None:
    app.name = "another"
    future = make_executor(type="dask").submit(add, 1)
    with pytest.raises(ExecutorError, match="it must be where the app 'another' is"):
        future.result(20)
    assert future.status == "failed"


def test_the_job_of_a_worker_that_was_killed_is_run_by_another(
    make_executor: MakeExecutor, app: Flask, config: dict[str, str], tmp_path: Path
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(**config)
    connect(executor)
    with worker_command(tmp_path, config):
        future = executor.submit(tasks.note_and_wait, str(tmp_path / "pids"), str(tmp_path / "go"))
        assert wait_until(lambda: future.running() and (tmp_path / "pids").exists(), 20)
        child, parent = map(int, (tmp_path / "pids").read_text().split())
        os.kill(parent, signal.SIGKILL)
        assert wait_until(lambda: len((tmp_path / "pids").read_text().split()) == 4, 20)
        assert wait_until(lambda: not Path(f"/proc/{child}").exists()), "its process has ended with it"
        (tmp_path / "go").touch()
        assert future.result(20) == "done"


@pytest.mark.storm
def test_a_scheduler_that_goes_and_comes_back(
    make_executor: MakeExecutor, app: Flask, scheduler: DaskScheduler, config: dict[str, str], tmp_path: Path
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(**config)
    futures = [executor.submit(append, str(tmp_path / "file"), text) for text in "ab"]
    scheduler.kill()  # which had no workers: it takes the jobs along
    begin = time.monotonic()
    with pytest.raises(EngineUnavailable, match="Dask's scheduler at tcp"):
        executor.submit(add, 1)
    assert time.monotonic() - begin < 10, "and not as long as Dask waits by itself"
    assert executor.health().accepting is False
    time.sleep(_LONG)  # until its client gives up
    scheduler.start()
    with worker_command(tmp_path, config):
        for future in futures:
            assert future.result(30) is None
        assert sorted((tmp_path / "file").read_text()) == ["a", "b"]
        assert wait_until(lambda: executor.health().accepting)
        assert executor.submit(add, 1).result(10) == 1


def test_what_was_not_accepted_is_not_run(
    make_executor: MakeExecutor, app: Flask, scheduler: DaskScheduler, config: dict[str, str]
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(**config)
    assert executor.health().accepting
    freeze(scheduler.pid)
    try:
        with pytest.raises(EngineUnavailable, match="no answer"):
            executor.submit(add, 1)
    finally:
        os.kill(scheduler.pid, signal.SIGCONT)
    executor.submit(add, 2)  # which comes after what was sent before
    assert executor._self.waiting == 1


@pytest.mark.storm
def test_nobody_hears_of_a_connection_that_nobody_waits_for(
    make_executor: MakeExecutor, scheduler: DaskScheduler, config: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    scheduler.kill()
    executor = make_executor(**config)
    for _ in range(2):
        assert executor.health().accepting is False
        assert wait_until(lambda: "a moment ago" not in _why_not(executor), 10)
    executor.shutdown()
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


def _why_not(executor: Executor) -> str:
    with pytest.raises(EngineUnavailable) as caught:
        executor.workers  # noqa: B018
    return str(caught.value)


def test_a_line_that_cannot_begin_is_begun_anew(
    executor: Executor, dask_workers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("asyncio.events.new_event_loop", _refuse)
        with pytest.raises(EngineUnavailable, match="Too many open files"):
            executor.submit(add, 1)
    assert executor.submit(add, 1).result(10) == 1


def _refuse() -> NoReturn:
    raise OSError(errno.EMFILE, "Too many open files")


def test_a_worker_that_has_ended_ignores_signals() -> None:
    from flask_executor.backends.dask.worker import Signals

    async def work() -> Signals:
        return Signals()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(work())
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_LONG = 5.0  # seconds after which a client gives up to connect again


def test_workers_outlive_their_scheduler_and_end_in_order(
    make_executor: MakeExecutor, app: Flask, scheduler: DaskScheduler, config: dict[str, str], tmp_path: Path
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(**config)
    connect(executor)
    with worker_command(tmp_path, config) as worker:
        future = executor.submit(wait_for, str(tmp_path / "go"))
        assert wait_until(future.running, 20)
        scheduler.kill()
        scheduler.start()
        assert wait_until(lambda: executor.health().workers, 20)
        assert executor.submit(add, 1).result(20) == 1
        assert future.running(), "the job goes on"
        (tmp_path / "go").touch()
        assert future.result(10) is None
        other = executor.submit(wait_for, str(tmp_path / "later"))
        assert wait_until(other.running, 20)
        worker.terminate()
        threading.Timer(0.5, (tmp_path / "later").touch).start()
        assert other.result(10) is None
        assert worker.wait(20) == 0


def test_only_workers_that_have_the_resource_run_the_jobs_of_a_queue(
    make_executor: MakeExecutor, app: Flask, config: dict[str, str], tmp_path: Path
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(**config, queue="gpu")
    connect(executor)
    with worker_command(tmp_path, config, 1):
        future = executor.submit(add, 1)
        assert not wait_until(future.done, 3)
        assert executor.workers == 0
        assert executor._self.waiting == 1
        with worker_command(tmp_path, {**config, "queue": "gpu"}, 1):
            assert future.result(20) == 1


def test_workers_of_dask_itself(
    make_executor: MakeExecutor, app: Flask, config: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASK_APP", "tasks:create_app()")
    for key, value in config.items():
        monkeypatch.setenv(f"FLASK_EXECUTOR_{key.upper()}", value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(tasks.__file__).parent), *sys.path]))
    executor = make_executor(**config)
    command = [sys.executable, "-m", "distributed.cli.dask_worker", config["url"], "--nthreads", "2", "--no-dashboard"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        try:
            futures = [executor.submit(wait_for, str(tmp_path / "go")) for _ in range(2)]
            assert wait_until(lambda: all(future.running() for future in futures), 30)
            (tmp_path / "go").touch()
            assert [future.result(10) for future in futures] == [None, None]
        finally:
            worker.terminate()


def test_a_child_of_a_fork_does_no_harm(executor: Executor) -> None:
    assert executor.submit(add, 1).result(10) == 1
    child = os.fork()
    if child == 0:
        code = 1
        try:
            gc.collect()
            code = 0 if executor.submit(add, 2).result(10) == 2 else 2
            executor.shutdown()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert executor.submit(add, 3).result(10) == 3


def test_the_command_says_what_it_cannot(make_executor: MakeExecutor, app: Flask) -> None:
    make_executor(type="dask", url="tcp://127.0.0.1:9", store="sqlite")
    result = app.test_cli_runner().invoke(commands.group, ["worker", "--burst"])
    assert (result.exit_code, "leave out --burst" in result.output) == (1, True)
