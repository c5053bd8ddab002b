"""What is RQ's own: its workers in both kinds, its commands, what dies and comes back."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tasks
from flask import Flask
from processes import children
from redis_server import RedisServer
from requirements import require
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from flask_executor import (
    EngineUnavailable,
    Executor,
    JobStopped,
    NotPicklable,
    StoreUnavailable,
    UntrustedResult,
    WorkerLost,
)
from flask_executor.abc import PreparedCall
from flask_executor.exceptions import ConfigError
from flask_executor.executor.producer import call_signer
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until
from flask_executor.tracking.signing import PayloadKind

require("rq")

import rq  # noqa: E402  # it may not be there
from rq.command import send_stop_job_command  # noqa: E402
from rq.serializers import JSONSerializer  # noqa: E402

from flask_executor.backends.rq import RQBackend, on_failure, run  # noqa: E402

PLAIN = ["worker", "--serializer", "rq.serializers.JSONSerializer"]

RunWorker = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test's own, which can be stopped."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def run_worker(redis_server: RedisServer, tmp_path: Path) -> Iterator[RunWorker]:
    """Starts a worker: ours, or with a command of RQ's. What it writes is in the file ``log``."""
    running = []

    def run(*command: str, store: str = "memory", app: str = "tasks:create_app()") -> subprocess.Popen[bytes]:
        if not command:
            command = (sys.executable, "-m", "flask", "--app", "tasks:create_app()", "executor", "worker")
        environ = {**os.environ, "FLASK_EXECUTOR_TYPE": "rq", "FLASK_EXECUTOR_URL": redis_server.url}
        environ["FLASK_EXECUTOR_STORE"] = store
        environ["FLASK_APP"] = app
        environ["PYTHONPATH"] = os.pathsep.join([str(Path(tasks.__file__).parent), *sys.path])
        with (tmp_path / "log").open("ab") as log:
            running.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))
        return running[-1]

    yield run
    for worker in running:
        worker.terminate()
        worker.wait(30)


@pytest.fixture
def executor(redis_server: RedisServer, make_executor: MakeExecutor, app: Flask) -> Executor:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    return make_executor(type="rq", url=redis_server.url)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "file")


def rq_program() -> str:
    return shutil.which("rq") or str(Path(sys.executable).with_name("rq"))


def fetch(executor: Executor, id: str) -> rq.job.Job:
    return rq.job.Job.fetch(id, executor._queues[1].connection, JSONSerializer)


def test_plain_workers_of_rq(executor: Executor, redis_server: RedisServer, run_worker: RunWorker, path: str) -> None:
    program = rq_program()
    run_worker(program, *PLAIN, "--url", redis_server.url, "--with-scheduler", "default-high", "default")
    assert executor.submit(tasks.add, 1, b=2).result(30) == 3
    with pytest.raises(ValueError, match="torn"):
        executor.submit(tasks.fail, message="torn").result(30)
    refuses = executor.submit(tasks.spin, path)
    assert wait_until(Path(path).exists, 30)
    refuses.stop(grace=0.1)
    assert isinstance(refuses.exception(20), JobStopped)
    assert refuses.status == "killed"
    assert executor.options(retries=1).submit(tasks.fail_until, path + "2", 2).result(30) == 2


def test_rq_shows_jobs_by_name_and_can_stop_them(executor: Executor, run_worker: RunWorker, path: str) -> None:
    run_worker()
    future = executor.options(name="monthly report").submit(tasks.wait_for, path)
    connection = executor._queues[1].connection
    assert wait_until(future.running, 30)
    assert fetch(executor, future.job_id).description == "monthly report"
    send_stop_job_command(connection, future.job_id)
    assert isinstance(future.exception(20), JobStopped)
    assert future.status == "stopped"


def test_a_job_that_takes_its_process_along(executor: Executor, run_worker: RunWorker) -> None:
    run_worker()
    for how in ("kill", "segfault"):
        with pytest.raises(WorkerLost):
            executor.submit(tasks.die, how).result(30)
    assert executor.submit(tasks.add, 1).result(20) == 1


def test_a_worker_is_killed(executor: Executor, run_worker: RunWorker, path: str) -> None:
    worker = run_worker()
    future = executor.submit(tasks.wait_for, path)
    assert wait_until(future.running, 30)
    inner = children(worker.pid)
    assert inner
    worker.kill()
    worker.wait()
    with pytest.raises(WorkerLost):
        future.result(20)
    assert future.status == "lost"
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inner)), "no process is left behind"
    waiting = executor.submit(tasks.add, 1)
    run_worker()
    assert waiting.result(30) == 1


def test_a_worker_that_is_told_to_end_lets_its_job_end(executor: Executor, run_worker: RunWorker, path: str) -> None:
    worker = run_worker()
    future = executor.submit(tasks.wait_for, path)
    assert wait_until(future.running, 30)
    worker.terminate()
    time.sleep(0.5)
    assert worker.poll() is None
    Path(path).touch()
    assert future.result(10) is None
    assert worker.wait(20) == 0


def test_one_of_several_processes_is_killed_and_another_takes_its_place(
    executor: Executor, run_worker: RunWorker
) -> None:
    command = [sys.executable, "-m", "flask", "--app", "tasks:create_app()", "executor", "worker", "--processes", "2"]
    parent = run_worker(*command)
    assert wait_until(lambda: executor.workers == 2, 30)
    before = children(parent.pid)
    os.kill(min(before), signal.SIGKILL)
    assert wait_until(lambda: len(children(parent.pid) - before) == 1)
    assert [future.result(30) for future in [executor.submit(tasks.add, n) for n in range(6)]] == list(range(6))


def test_another_process_of_the_app_finds_the_job(executor: Executor, run_worker: RunWorker, app: Flask) -> None:
    future = executor.submit_stored("report", tasks.add, 1, 2)
    assert future.status == "queued"
    again = Flask("shop", instance_path=app.instance_path)  # the web app was restarted
    again.secret_key = app.secret_key
    again.config.update({key: value for key, value in app.config.items() if key.startswith("EXECUTOR")})
    restarted = Executor(again)
    run_worker()
    assert restarted.futures.result("report", timeout=30) == 3
    restarted.shutdown()


def test_a_process_that_dies_before_the_engine_has_its_job(
    executor: Executor, run_worker: RunWorker, app: Flask
) -> None:
    executor.submit_stored("first", tasks.add, 1)  # all that is made once is there

    def die() -> None:
        RQBackend.enqueue = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        executor.submit_stored("report", tasks.add, 1)

    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = executor.futures.get("report")
    assert left is not None
    assert left.status == "lost"
    run_worker()
    assert executor.options(again=True).submit_once("report", tasks.add, 2).result(30) == 2
    assert executor.futures.result("first", timeout=30) == 1


def test_a_worker_that_is_quicker_than_who_sends(
    executor: Executor, run_worker: RunWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_worker()
    assert executor.submit(tasks.add, 1).result(30) == 1
    enqueue = RQBackend.enqueue

    def enqueue_and_dream(self: RQBackend, call: PreparedCall) -> None:
        enqueue(self, call)
        assert wait_until(lambda: "report" in [job.key for job in executor.jobs.list(status="succeeded")], 20)

    monkeypatch.setattr(RQBackend, "enqueue", enqueue_and_dream)
    future = executor.submit_stored("report", tasks.add, 2)
    assert future.status == "succeeded", "nothing is written over it"
    assert future.result(10) == 2


def test_a_commit_while_the_engine_is_away(
    redis_server: RedisServer, run_worker: RunWorker, make_executor: MakeExecutor, app: Flask, tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path}/jobs.sqlite"
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(type="rq", url=redis_server.url, store=store)
    with Session(create_engine("sqlite://")) as session:
        futures = [executor.submit_after_commit(session, tasks.add, number) for number in range(3)]
        futures.append(executor.options(key="report").submit_after_commit(session, tasks.add, 3))
        dropped = executor.submit_after_commit(session, tasks.add, 4)
        redis_server.stop()
        session.commit()
    assert {future.status for future in futures} == {"queued"}
    assert dropped.cancel()
    redis_server.start()
    run_worker(store=store)
    assert [future.result(30) for future in futures] == [0, 1, 2, 3]
    assert dropped.cancelled()


def test_a_commit_while_the_store_is_away(
    redis_server: RedisServer, run_worker: RunWorker, make_executor: MakeExecutor, app: Flask, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    store = RedisServer(tmp_path / "store")
    store.start()
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(type="rq", url=redis_server.url, store=store.url)
    with Session(create_engine("sqlite://")) as session:
        futures = [executor.submit_after_commit(session, tasks.add, number) for number in range(3)]
        store.stop()
        session.commit()
    store.start()
    assert wait_until(lambda: executor.health().store_reachable, 10)
    run_worker(store=store.url)
    assert [future.result(30) for future in futures] == [0, 1, 2]
    executor.shutdown()
    store.stop()


def test_shutdown_drops_what_waits_for_the_engine(
    redis_server: RedisServer, make_executor: MakeExecutor, tmp_path: Path, app: Flask
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(type="rq", url=redis_server.url, store=f"sqlite:///{tmp_path}/jobs.sqlite")
    with Session(create_engine("sqlite://")) as session:
        future = executor.options(key="report").submit_after_commit(session, tasks.add, 1)
        redis_server.stop()
        session.commit()
    executor.shutdown()
    assert future.cancelled()
    assert "report" not in executor.futures


def test_shutdown_says_what_it_waits_for(
    executor: Executor, app: Flask, run_worker: RunWorker, caplog: pytest.LogCaptureFixture
) -> None:
    executor.shutdown()
    assert not caplog.records, "there is nothing to wait for"
    executor.init_app(app)
    future = executor.submit_stored("report", tasks.add, 1)
    waits = threading.Thread(target=executor.shutdown)
    waits.start()
    assert wait_until(lambda: "No worker looks at the queue; start one with 'flask executor worker'" in caplog.text)
    run_worker()
    waits.join(30)
    assert not waits.is_alive()
    assert future.result(0) == 1


def test_a_rollback_while_redis_is_away(executor: Executor, redis_server: RedisServer) -> None:
    with Session(create_engine("sqlite://")) as session:
        future = executor.options(key="report").submit_after_commit(session, tasks.add, 1)
        redis_server.stop()
        session.rollback()
    redis_server.start()
    assert wait_until(lambda: executor.health().store_reachable, 10)
    assert wait_until(lambda: "report" not in executor.futures, 10)
    assert future.cancelled()


def test_shutdown_while_redis_is_away(executor: Executor, redis_server: RedisServer) -> None:
    with Session(create_engine("sqlite://")) as session:
        committed = executor.options(key="report").submit_after_commit(session, tasks.add, 1)
        redis_server.stop()
        session.commit()
        waits = executor.submit_after_commit
        with pytest.raises(StoreUnavailable):
            waits(session, tasks.add, 1)
    executor.shutdown()
    redis_server.start()
    assert wait_until(lambda: executor.health().store_reachable, 10)
    assert wait_until(committed.cancelled, 10)
    assert wait_until(lambda: "report" not in executor.futures, 10)


def test_a_commit_does_not_wait_for_the_engine_again_and_again(
    redis_server: RedisServer, make_executor: MakeExecutor, tmp_path: Path, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(type="rq", url=redis_server.url, store=f"sqlite:///{tmp_path}/jobs.sqlite")
    asked: list[str] = []

    def enqueue(self: RQBackend, call: PreparedCall) -> None:
        asked.append(threading.current_thread().name)
        raise EngineUnavailable("Redis", redis_server.url, "EXECUTOR_URL", "no answer")

    with Session(create_engine("sqlite://")) as session:
        futures = [executor.submit_after_commit(session, tasks.add, number) for number in range(10)]
        with monkeypatch.context() as patch:
            patch.setattr(RQBackend, "enqueue", enqueue)
            patch.setattr("flask_executor.executor.producer._ENGINE_RETRY_DELAY", 60)
            session.commit()
            assert asked == ["MainThread"]
            producer = executor._app_executor()[1].producer
            assert producer is not None
            producer._away = 0.0
            assert wait_until(lambda: len(asked) > 1)
            assert set(asked[1:]) == {"flask-executor-background"}
    producer._away = 0.0
    assert wait_until(lambda: executor._queues[1].count == 10, 10)
    assert {future.status for future in futures} == {"queued"}


def test_a_job_that_cannot_be_kept_leaves_its_key(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    executor.submit(tasks.add, 1)
    with Session(create_engine("sqlite://")) as session:
        with monkeypatch.context() as patch:
            patch.setattr("flask_executor.tracking.writer.StoreWriter.add", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                executor.options(key="report").submit_after_commit(session, tasks.add, 1)
        assert "report" not in executor.futures
        assert executor.options(key="report").submit_after_commit(session, tasks.add, 1).status == "queued"


def test_redis_goes_and_comes_back(
    executor: Executor, redis_server: RedisServer, run_worker: RunWorker, tmp_path: Path
) -> None:
    accepted = [executor.submit_stored(n, tasks.add, n) for n in range(20)]
    redis_server.stop()
    begin = time.monotonic()
    with pytest.raises(EngineUnavailable, match="EXECUTOR_URL"):
        executor.submit(tasks.add, 1)
    with pytest.raises(StoreUnavailable):
        executor.submit_stored("report", tasks.add, 1)
    assert time.monotonic() - begin < 10
    assert not executor.health().accepting
    redis_server.start()
    assert wait_until(lambda: executor.health().store_reachable)
    run_worker()
    assert [future.result(30) for future in accepted] == list(range(20))
    assert executor.submit(tasks.add, 2).result(20) == 2


def test_redis_goes_and_comes_back_while_a_job_runs(
    executor: Executor, redis_server: RedisServer, run_worker: RunWorker, path: str
) -> None:
    run_worker()
    future = executor.submit_stored("report", tasks.wait_for, path)
    assert wait_until(future.running, 30)
    redis_server.stop()
    Path(path).touch()
    time.sleep(1)
    redis_server.start()
    assert future.result(30) is None
    run_worker()  # RQ's own worker may have given up meanwhile
    assert executor.submit(tasks.add, 2).result(30) == 2


def test_names_that_jobs_have_in_redis() -> None:
    assert rq.utils.import_attribute("flask_executor.backends.rq.run") is run
    assert rq.utils.import_attribute("flask_executor.backends.rq.on_failure") is on_failure
    assert rq.utils.import_attribute("flask_executor.backends.rq.given_up") is on_failure, "of jobs queued before 2.0"


def test_what_was_not_signed_is_not_run(executor: Executor, run_worker: RunWorker, app: Flask, path: str) -> None:
    app.secret_key = "another one"  # as a web app has that was set up wrongly
    future = executor.submit_stored("report", tasks.append, path, "x")
    app.secret_key = "not a secret in a test"
    run_worker()
    with pytest.raises(UntrustedResult, match="SECRET_KEY"):
        future.result(30)
    assert future.status == "failed"
    assert not Path(path).exists()


def test_a_worker_of_another_version_says_so(executor: Executor, run_worker: RunWorker, app: Flask) -> None:
    future = executor.submit_stored("report", tasks.add, 1)
    queue = executor._queues[1]
    job = fetch(executor, future.job_id)
    destination, id, _ = job.args
    job.delete()
    other = call_signer(app).sign(id, PayloadKind.CALL, b"FE99" + b"...")
    queue.enqueue_call(job.func_name, (destination, id, base64.b64encode(other).decode()), job_id=id)
    run_worker()
    with pytest.raises(NotPicklable, match="another version"):
        future.result(30)


def test_a_message_makes_no_worker_import_anything(
    executor: Executor, redis_server: RedisServer, run_worker: RunWorker, path: str
) -> None:
    queue, command = executor._queues[1], f"subprocess:getoutput('touch {path}')"
    for arguments in ([command, "nope", ""], "id", ""), ([command, ""], "id", ""), (["nope", command], "id", ""):
        queue.enqueue_call("flask_executor.backends.rq.run", arguments)
    run_worker()
    run_worker(rq_program(), *PLAIN, "--url", redis_server.url, "default")
    assert [executor.submit(tasks.add, n).result(30) for n in range(9)] == list(range(9))
    assert not Path(path).exists()


@pytest.mark.parametrize(
    ("serializer", "why"),
    [(None, "DeserializationError"), (JSONSerializer, "was not submitted by flask_executor")],
    ids=["pickle", "json"],
)
def test_what_others_have_enqueued_is_not_run(
    executor: Executor, run_worker: RunWorker, path: str, tmp_path: Path, serializer: Any, why: str
) -> None:
    queue = rq.Queue("default", connection=executor._queues[1].connection, serializer=serializer)
    callback = rq.Callback("antigravity.geohash")  # a module that nothing else imports
    command = f"touch {path}"
    theirs = queue.enqueue("os.system", command, on_success=callback, on_failure=callback, failure_ttl=60)
    run_worker()
    assert executor.submit(tasks.add, 1).result(30) == 1
    assert wait_until(theirs.get_status, 10)
    assert theirs.get_status() == "failed"
    result = theirs.latest_result()
    assert result is not None
    said = f"{result.exc_string}"
    assert why in said
    assert "antigravity" not in (tmp_path / "log").read_text() + said
    assert not Path(path).exists()


def test_redis_has_nothing_that_would_be_unpickled(executor: Executor) -> None:
    future = executor.submit(tasks.add, 1)
    function, _, arguments, _ = json.loads(fetch(executor, future.job_id).data)
    assert function == "flask_executor.backends.rq.run"
    assert arguments[1] == future.job_id


def test_a_job_that_is_refused_is_not_delivered_again(
    executor: Executor, run_worker: RunWorker, app: Flask, tmp_path: Path
) -> None:
    app.secret_key = "another one"
    future = executor.submit_stored("report", tasks.add, 1)
    app.secret_key = "not a secret in a test"
    run_worker()
    with pytest.raises(UntrustedResult):
        future.result(30)
    assert wait_until(lambda: fetch(executor, future.job_id).get_status() == "failed", 10)
    assert (tmp_path / "log").read_text().count("exception raised while executing") == 1


def test_a_plain_worker_dies_before_it_has_begun(
    redis_server: RedisServer, make_executor: MakeExecutor, run_worker: RunWorker, tmp_path: Path, app: Flask
) -> None:
    (tmp_path / "dying.py").write_text(f"""
import os, signal, tasks
from pathlib import Path
def create_app():
    first = Path({str(tmp_path / "first")!r})
    if not first.exists():
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return tasks.create_app()
""")
    executor = make_executor(type="rq", url=redis_server.url)
    plain = [rq_program(), *PLAIN, "--path", str(tmp_path), "--url", redis_server.url, "default"]
    run_worker(*plain, app="dying:create_app()")
    assert executor.submit(tasks.add, 1).result(40) == 1
    assert (tmp_path / "first").exists()


def test_jobs_of_rq_that_nobody_could_begin_with(executor: Executor, run_worker: RunWorker) -> None:
    future = executor.submit_stored("report", tasks.add, 1)
    job = fetch(executor, future.job_id)
    queue = executor._queues[1]
    queue.remove(job)
    job.retries_left = 0
    job.set_status(rq.job.JobStatus.STARTED)
    job.save()
    queue.connection.zadd(queue.started_job_registry.key, {f"{job.id}:gone": time.time() - 60})
    run_worker()  # tidies up first
    with pytest.raises(WorkerLost, match="no worker of RQ could begin with it"):
        future.result(30)
    assert future.status == "failed"
    assert executor.options(again=True).submit_once("report", tasks.add, 2).result(30) == 2


def test_abandoned_jobs_are_delivered_again(executor: Executor, run_worker: RunWorker) -> None:
    future = executor.submit(tasks.add, 1)
    job = fetch(executor, future.job_id)
    queue = executor._queues[1]
    queue.remove(job)
    job.set_status(rq.job.JobStatus.STARTED)
    queue.connection.zadd(queue.started_job_registry.key, {f"{job.id}:gone": time.time() - 60})
    run_worker()
    assert future.result(30) == 1


def test_a_lost_job_does_not_run_again(executor: Executor, run_worker: RunWorker, path: str) -> None:
    worker = run_worker()
    future = executor.submit_stored("report", tasks.wait_for, path)
    assert wait_until(future.running, 30)
    worker.kill()
    worker.wait()
    with pytest.raises(WorkerLost):
        future.result(20)
    queue = executor._queues[1]
    for entry in queue.connection.zrange(queue.started_job_registry.key, 0, -1):
        queue.connection.zadd(queue.started_job_registry.key, {entry: time.time() - 60})
    run_worker()
    assert wait_until(lambda: fetch(executor, future.job_id).get_status() == "failed", 30)
    assert future.status == "lost"


@pytest.mark.storm
def test_several_processes_end_in_order(executor: Executor, run_worker: RunWorker, path: str) -> None:
    command = [sys.executable, "-m", "flask", "--app", "tasks:create_app()", "executor", "worker", "--processes", "2"]
    parent = run_worker(*command)
    futures = [executor.submit_stored(n, tasks.wait_for, path) for n in range(2)]
    assert wait_until(lambda: all(future.running() for future in futures), 30)
    parent.terminate()
    time.sleep(3)  # RQ takes a second one for another only if a second has passed since it saw the first
    parent.terminate()
    assert wait_until(lambda: all(future.done() for future in futures), 40)
    assert {str(future.status) for future in futures} == {"stopped"}
    assert parent.wait(20) == 0


def test_processes_end_with_their_parent(executor: Executor, run_worker: RunWorker) -> None:
    command = [sys.executable, "-m", "flask", "--app", "tasks:create_app()", "executor", "worker", "--processes", "2"]
    parent = run_worker(*command)
    assert wait_until(lambda: executor.workers == 2, 30)
    workers = children(parent.pid)
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 20)


def test_without_a_secret_key_nothing_is_sent(make_executor: MakeExecutor, redis_server: RedisServer) -> None:
    app = Flask("open")
    executor = make_executor(app, type="rq", url=redis_server.url)
    with pytest.raises(ConfigError, match="SECRET_KEY"):
        executor.submit(tasks.add, 1)


def test_a_worker_without_a_secret_key_takes_no_jobs(executor: Executor, run_worker: RunWorker, tmp_path: Path) -> None:
    future = executor.submit_stored("report", tasks.add, 1)
    flask = [sys.executable, "-m", "flask", "--app", "tasks:create_app_without_a_key()", "executor", "worker"]
    assert run_worker(*flask).wait(30) == 1
    said = (tmp_path / "log").read_text()
    assert "SECRET_KEY is None; it must be set" in said
    assert "Traceback" not in said
    run_worker()
    assert future.result(30) == 1


def test_what_cannot_travel_is_refused(executor: Executor) -> None:
    with pytest.raises(TypeError, match="Argument 1 of job print"):
        executor.submit(print, threading.Lock())
    assert executor.waiting == 0


@pytest.mark.storm
def test_many_handles_cost_little(executor: Executor, run_worker: RunWorker) -> None:
    futures = [executor.submit(tasks.add, n) for n in range(500)]
    done: list[int] = []
    for future in futures:
        future.add_done_callback(lambda settled: done.append(settled.result()))
    run_worker()
    run_worker()
    assert wait_until(lambda: len(done) == 500, 60)
    assert sorted(done) == list(range(500))


def test_a_worker_without_a_redis_says_so(run_worker: RunWorker, redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.stop()
    assert run_worker().wait(30) == 1
    said = (tmp_path / "log").read_text()
    assert "(EXECUTOR_URL) cannot be reached" in said
    assert "Traceback" not in said
