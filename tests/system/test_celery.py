"""What is Celery's own: its commands, its settings, and workers that die. The rest is in the contract."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tasks
from flask import Flask
from processes import children, family
from redis_server import RedisServer
from requirements import require
from tasks import add, append, fail_until

from flask_executor import ConfigError, EngineUnavailable, Executor, JobStopped, StoreUnavailable, WorkerLost
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until

require("celery")

SHOP = """
import os
from celery import Celery, Task
from flask import Flask
from flask_executor import Executor

def celery_init_app(app):
    class FlaskTask(Task):
        def __call__(self, *args, **kwargs):
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app

flask_app = Flask("shop")
flask_app.secret_key = "not a secret in a test"
flask_app.config["CELERY"] = {"broker_url": os.environ["BROKER"], "task_ignore_result": True, "task_time_limit": 2}
flask_app.config["EXECUTOR_TYPE"] = "celery"
celery_app = celery_init_app(flask_app)
executor = Executor(flask_app)
"""


class Workers:
    """A broker and workers of Celery, started as in production."""

    def __init__(self, folder: Path) -> None:
        self.broker = RedisServer(folder)
        self.broker.start()
        self.log = folder / "log"
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "BROKER": self.broker.url}
        environ |= {"FLASK_EXECUTOR_TYPE": "celery", "FLASK_EXECUTOR_URL": self.broker.url}
        environ["PYTHONPATH"] = os.pathsep.join([str(Path(tasks.__file__).parent), *sys.path])
        with self.log.open("a") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=self.folder, env=environ, stdout=log, stderr=log
            )
        self.started.append(worker)
        return worker

    def ours(self, *options: str) -> subprocess.Popen[bytes]:
        return self.start("flask", "--app", "tasks:create_app()", "executor", "worker", *options)

    def theirs(self, *options: str) -> subprocess.Popen[bytes]:
        (self.folder / "shop_of_celery.py").write_text(SHOP)
        return self.start("celery", "-A", "shop_of_celery", "worker", "--loglevel", "INFO", *options)

    def stop(self) -> None:
        for worker in self.started:
            worker.terminate()
        for worker in self.started:
            worker.wait(30)
        self.broker.stop()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    folder = tmp_path / "broker"
    folder.mkdir()
    workers = Workers(folder)
    yield workers
    workers.stop()


@pytest.fixture
def executor(make_executor: MakeExecutor, workers: Workers, app: Flask) -> Executor:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    return make_executor(type="celery", url=workers.broker.url)


def running(pids: Iterable[int]) -> list[int]:
    def is_running(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    return [pid for pid in pids if is_running(pid)]


@pytest.fixture
def begun(executor: Executor, tmp_path: Path) -> Callable[[], Any]:
    """Starts a job that goes on until there is a file ``go``."""

    def begin() -> Any:
        future = executor.submit(tasks.report_and_wait, str(tmp_path / "go"))
        assert wait_until(lambda: future.progress == 0.5)
        return future

    return begin


class TestTheAppsOwnCelery:
    @pytest.fixture
    def executor(self, make_executor: MakeExecutor, workers: Workers, app: Flask) -> Executor:
        from celery import Celery

        app.extensions["celery"] = Celery("shop", broker=workers.broker.url, set_as_current=False)
        return make_executor(type="celery")

    def test_a_plain_worker_runs_jobs_under_their_names(self, workers: Workers, executor: Executor) -> None:
        workers.theirs("-c", "1")
        future = executor.options(name="census").submit(add, 1, 2)
        assert future.result(20) == 3
        assert wait_until(lambda: f"Task census[{future.job_id}] succeeded" in workers.log.read_text())
        assert wait_until(lambda: executor.health().workers == 1)

    def test_retries_are_celerys(self, workers: Workers, executor: Executor, tmp_path: Path) -> None:
        workers.theirs("-c", "1")
        future = executor.options(retries=2, backoff=0.5).submit(fail_until, str(tmp_path / "attempts"), 3)
        assert future.result(20) == 3
        says = f"Task fail_until[{future.job_id}] retry: Retry in"
        assert wait_until(lambda: workers.log.read_text().count(says) == 2)

    def test_limits_for_tasks_are_not_for_jobs(self, workers: Workers, executor: Executor) -> None:
        workers.theirs("-c", "1")
        assert executor.submit(tasks.sleep, 3).result(20) == 3

    def test_the_store_is_where_its_broker_is(self, workers: Workers, executor: Executor) -> None:
        tracker: Any = executor._app_executor()[1].tracker
        assert tracker.store.where == workers.broker.url


def test_without_a_broker(app: Flask) -> None:
    app.config["EXECUTOR_TYPE"] = "celery"
    with pytest.raises(ConfigError, match="EXECUTOR_URL"):
        Executor(app)


def test_a_broker_that_is_no_store(app: Flask) -> None:
    app.config.update(EXECUTOR_TYPE="celery", EXECUTOR_URL="amqp://localhost")
    with pytest.raises(ConfigError, match="EXECUTOR_STORE is 'memory'; it must be 'redis://"):
        Executor(app)


def test_jobs_wait_for_workers(workers: Workers, executor: Executor) -> None:
    futures = [executor.submit(add, number) for number in range(3)]
    assert executor._self.waiting == 3
    assert executor.health().workers == 0
    worker = workers.ours("--burst")
    assert worker.wait(30) == 0
    assert [future.result(0) for future in futures] == [0, 1, 2]


class TestDeath:
    def test_of_the_process_that_celery_runs_a_job_in(
        self, workers: Workers, executor: Executor, begun: Callable[[], Any], tmp_path: Path
    ) -> None:
        worker = workers.ours()
        future = begun()
        child = min(children(worker.pid))
        with_it = family(child)
        os.kill(child, signal.SIGKILL)
        assert wait_until(lambda: not running([child, *with_it]))
        (tmp_path / "go").touch()  # it is sent again
        assert wait_until(lambda: (job := executor.jobs.get(future.job_id)) and job.status == "succeeded", 20)

    def test_of_the_worker(
        self, workers: Workers, executor: Executor, begun: Callable[[], Any], tmp_path: Path
    ) -> None:
        worker = workers.ours()
        future = begun()
        with_it = family(worker.pid)
        worker.kill()
        assert wait_until(lambda: not running(with_it))
        assert isinstance(future.exception(20), WorkerLost)
        workers.ours()
        assert executor.submit(add, 1).result(20) == 1

    def test_of_a_job(self, workers: Workers, executor: Executor) -> None:
        workers.ours()
        future = executor.submit(tasks.die, "segfault")
        assert isinstance(future.exception(20), WorkerLost)
        assert executor.submit(add, 1).result(20) == 1

    def test_a_worker_that_is_to_end_lets_its_job_end(
        self, workers: Workers, executor: Executor, begun: Callable[[], Any], tmp_path: Path
    ) -> None:
        worker = workers.ours()
        future = begun()
        waits = executor.submit(add, 1)
        with_it = family(worker.pid)
        worker.terminate()
        assert wait_until(lambda: "Warm shutdown" in workers.log.read_text())
        assert future.running()
        (tmp_path / "go").touch()
        assert future.result(10) == future.job_id
        assert worker.wait(20) == 0
        assert wait_until(lambda: not running(with_it))
        assert waits.status == "queued"
        workers.ours()
        assert waits.result(20) == 1


def test_a_job_that_spins_is_killed(workers: Workers, executor: Executor, tmp_path: Path) -> None:
    workers.ours()
    future = executor.submit(tasks.spin, str(tmp_path / "started"))
    assert wait_until((tmp_path / "started").exists, 20)
    future.stop(grace=0.2)
    assert isinstance(future.exception(10), JobStopped)
    assert future.status == "killed"


def test_what_is_cancelled_does_not_run(workers: Workers, executor: Executor, tmp_path: Path) -> None:
    future = executor.submit(append, str(tmp_path / "file"), "x")
    assert future.cancel()
    workers.ours("--burst").wait(30)
    assert not (tmp_path / "file").exists()


def test_a_message_makes_no_worker_import_anything(workers: Workers, executor: Executor, tmp_path: Path) -> None:
    command = f"subprocess:getoutput('touch {tmp_path / 'pwned'}')"
    celery_app = executor._self._celery
    for arguments in ([command, "nope", ""], "id", ""), ([command, ""], "id", ""), (["nope", command], "id", ""):
        celery_app.send_task("flask_executor.run", arguments, queue="default")
    workers.ours("--processes", "4")  # each holds one that it leaves to other workers
    assert executor.submit(add, 1).result(30) == 1
    assert not (tmp_path / "pwned").exists()


def test_a_broker_that_is_gone_and_comes_back(workers: Workers, executor: Executor) -> None:
    workers.ours()
    assert executor.submit(add, 1).result(20) == 1
    workers.broker.stop()
    with pytest.raises(EngineUnavailable, match="EXECUTOR_URL"):
        executor._self.waiting  # noqa: B018
    workers.broker.start()
    assert wait_until(lambda: executor.health().store_reachable, 20)
    future = executor.submit(add, 2)
    assert future.result(30) == 2


def test_a_broker_that_does_not_answer(
    workers: Workers, make_executor: MakeExecutor, app: Flask, tmp_path: Path
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(type="celery", url=workers.broker.url, store="sqlite")
    future = executor.submit(add, 1)
    assert future.status == "queued"
    workers.broker.stop()
    with pytest.raises(EngineUnavailable):
        executor.submit_stored("key", add, 1)
    assert executor.futures.get("key") is None
    workers.broker.start()
    assert executor.submit_stored("key", add, 1).cancel()


def test_a_retry_that_cannot_be_sent_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from celery.exceptions import Reject

    from flask_executor.backends import celery

    def cannot_send(**_: Any) -> None:
        raise Reject(OSError("gone"), requeue=False)

    monkeypatch.setattr(celery, "run_sent", lambda *_: 1.0)
    monkeypatch.setattr(celery.run._get_current_object(), "retry", cannot_send)
    with pytest.raises(Reject) as info:
        celery.run.run(("shop", ""), "id", "")
    assert info.value.requeue


def test_nothing_is_left_after_shutdown(workers: Workers, make_executor: MakeExecutor, app: Flask) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(type="celery", url=workers.broker.url, store="sqlite")
    before = sockets()
    threads = [threading.Thread(target=executor.submit, args=(add, 1)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert executor._self.waiting == 4
    assert executor.health().workers == 0
    assert sockets() > before
    executor.shutdown(cancel_futures=True)
    assert sockets() == before


def sockets() -> int:
    return sum(link.is_socket() for link in Path("/proc/self/fd").iterdir())


def test_a_job_comes_again_when_its_worker_had_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | None] = [StoreUnavailable("redis://away", "no answer"), None]

    def run_sent(*_: object) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    from flask_executor.backends.celery import run

    monkeypatch.setattr("flask_executor.backends.celery.run_sent", run_sent)
    assert run.apply(args=(("shop", "executor"), "id", "")).state == "SUCCESS"
    assert not answers
