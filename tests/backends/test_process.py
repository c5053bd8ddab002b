"""What is particular to worker processes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import CancelledError, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tasks
from flask import Flask, current_app, g, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text
from tasks import (
    TwoArgumentsError,
    add,
    app_name,
    append,
    count_on_g,
    die,
    fail_unless_ready,
    fail_with_two_arguments,
    handler_of,
    import_and_log,
    insert_thing,
    length,
    loaded_value,
    log_something,
    many,
    names_on_g,
    pid,
    pooled_connections,
    report_often,
    sleep,
    spin,
    start_a_program,
    torn_result,
    touch_everything,
    unpicklable_result,
    wait_for,
)

from flask_executor import ConfigError, Executor, FutureProxy, JobStopped, NotPicklable, RemoteTraceback, WorkerLost
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until


@pytest.fixture
def executor(make_executor: MakeExecutor) -> Executor:
    return make_executor(type="process", max_workers=1)


def test_the_traceback_of_the_worker_is_the_cause(executor: Executor) -> None:
    error = executor.submit(int, "x").exception()
    assert isinstance(error, ValueError)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "invalid literal" in str(error.__cause__)


def test_an_error_that_cannot_be_rebuilt_ends_only_its_job(executor: Executor) -> None:
    error = executor.submit(fail_with_two_arguments).exception()
    assert isinstance(error, NotPicklable)
    assert f"{TwoArgumentsError.__name__}: page 4: torn" in str(error)
    assert "fail_with_two_arguments" in str(error.__cause__)
    assert executor.submit(add, 1).result() == 1


def test_results_that_cannot_travel_end_only_their_job(executor: Executor) -> None:
    with pytest.raises(
        NotPicklable, match="The result of job unpicklable_result cannot be sent back from its worker process"
    ):
        executor.submit(unpicklable_result).result()
    with pytest.raises(NotPicklable, match="cannot be rebuilt here: ValueError: torn"):
        executor.submit(torn_result).result(timeout=10)
    assert executor.submit(add, 1).result() == 1


def test_a_function_that_cannot_be_imported_is_refused_at_submit(executor: Executor) -> None:
    with pytest.raises(NotPicklable, match="top of a module"):
        executor.submit_stored("k", lambda: None)
    assert executor.futures.keys() == []
    assert executor.jobs.list() == []


def test_cancel_a_queued_job(executor: Executor) -> None:
    futures = [executor.submit(sleep, 0.1) for _ in range(4)]
    assert futures[-1].cancel()
    with pytest.raises(CancelledError):
        futures[-1].result()
    assert [future.result() for future in futures[:-1]] == [0.1] * 3
    assert futures[-1].status == "cancelled"


def test_shutdown_with_cancelled_futures_settles_all(executor: Executor) -> None:
    futures = [executor.submit(sleep, 0.2) for _ in range(8)]
    assert wait_until(futures[0].running)
    begin = time.monotonic()
    executor.shutdown(cancel_futures=True)
    drain(executor, 10)
    assert time.monotonic() - begin < 5
    assert futures[0].result() == 0.2
    assert futures[-1].status == "cancelled"
    assert all(future.status in ("succeeded", "cancelled") for future in futures)


# ---- workers that die ----


@pytest.fixture
def two(make_executor: MakeExecutor) -> Executor:
    return make_executor(type="process", max_workers=2)


@pytest.mark.parametrize(
    ("how", "signal_name", "exit_code"), [("kill", "SIGKILL", -9), ("exit", None, 3), ("segfault", "SIGSEGV", -11)]
)
def test_a_worker_that_dies_fails_only_the_job_it_ran(
    two: Executor, tmp_path: Path, how: str, signal_name: str | None, exit_code: int
) -> None:
    go = tmp_path / "go"
    neighbour: FutureProxy[Any] = two.submit(wait_for, str(go))
    assert wait_until(neighbour.running)
    victim = two.submit(die, how)
    queued: list[FutureProxy[Any]] = [two.submit(add, n) for n in range(20)]
    error = victim.exception(10)
    assert isinstance(error, WorkerLost)
    assert (error.signal, error.exit_code) == (signal_name, exit_code)
    assert error.pid is not None
    assert f"Worker process {error.pid}" in str(error)
    assert (signal_name or "exit code 3") in str(error)
    assert victim.status == "lost"
    assert [future.result(10) for future in queued] == list(range(20))
    go.touch()
    assert neighbour.result(10) is None
    assert {future.status for future in (neighbour, *queued)} == {"succeeded"}


def test_calls_handed_out_ahead_go_to_another_worker(executor: Executor) -> None:
    for _ in range(20):
        futures: list[Any] = [executor.submit(die, "kill"), *(executor.submit(add, n) for n in range(5))]
        assert isinstance(futures[0].exception(10), WorkerLost)
        assert [future.result(10) for future in futures[1:]] == list(range(5))


def test_an_idle_worker_that_dies_is_nobodys_loss(executor: Executor) -> None:
    for _ in range(20):
        worker = executor.submit(pid).result(10)
        os.kill(worker, signal.SIGKILL)
        error = executor.submit(add, 1).exception(10)
        # The system may have given the call to the worker in the instant of its death.
        assert error is None or (isinstance(error, WorkerLost) and error.pid == worker)


def test_nothing_waits_behind_a_long_job_while_another_worker_is_idle(two: Executor, tmp_path: Path) -> None:
    go = str(tmp_path / "go")
    long = two.submit(wait_for, go)
    short = [two.submit(add, n) for n in range(10)]
    assert [future.result(10) for future in short] == list(range(10))
    assert long.running()
    Path(go).touch()
    long.result(10)


def test_a_call_that_was_handed_out_ahead_can_be_cancelled(executor: Executor, tmp_path: Path) -> None:
    go, order = tmp_path / "go", tmp_path / "order"
    blocker = executor.submit(wait_for, str(go))
    assert wait_until(blocker.running)
    futures = [executor.submit(append, str(order), str(n)) for n in range(8)]
    assert all(future.cancel() for future in futures[::2])
    go.touch()
    for future in futures[1::2]:
        future.result(10)
    assert order.read_text() == "1357"
    assert blocker.result(10) is None


def test_killing_a_job_takes_what_it_started_along(executor: Executor, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    future = executor.submit(start_a_program, str(path))
    assert wait_until(lambda: path.exists() and path.read_text())
    program = int(path.read_text())
    future.stop(grace=0)
    assert isinstance(future.exception(10), JobStopped)
    assert wait_until(lambda: not alive(program))


def test_a_worker_that_is_killed_takes_what_its_job_started_along(executor: Executor, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    future = executor.submit(start_a_program, str(path))
    assert wait_until(lambda: path.exists() and path.read_text())
    os.kill(next(iter(executor._self._processes)), signal.SIGKILL)
    assert isinstance(future.exception(10), WorkerLost)
    assert wait_until(lambda: not alive(int(path.read_text())))


def test_a_killed_job_is_gone_in_time_and_its_neighbour_is_not(two: Executor, tmp_path: Path) -> None:
    neighbour = two.submit(wait_for, str(tmp_path / "go"))
    times = []
    for time_around in range(5):
        path = tmp_path / f"spins{time_around}"
        victim = two.submit(spin, str(path))
        assert wait_until(path.exists)
        begin = time.monotonic()
        victim.stop(grace=0.1)
        victim.exception(10)
        times.append(time.monotonic() - begin)
    assert min(times) >= 0.1
    assert sorted(times)[2] < 0.4, "the grace and 0.3 s; the median, as the machine may be busy"
    (tmp_path / "go").touch()
    assert neighbour.result(10) is None


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- starting workers ----


def test_max_tasks_per_child(make_executor: MakeExecutor) -> None:
    executor = make_executor(type="process", max_workers=1, max_tasks_per_child=3)
    pids = list(executor.map(pid, range(10)))
    assert [pids.count(each) for each in dict.fromkeys(pids)] == [3, 3, 3, 1]


def test_initializers_run_once_in_each_worker(make_executor: MakeExecutor, tmp_path: Path) -> None:
    executor = make_executor(type="process", max_workers=1)

    @executor.worker_init
    def load() -> None:
        tasks.loaded = f"{current_app.name} {os.getpid()}"  # type: ignore[attr-defined]
        append(str(tmp_path / "loads"), "x")

    try:
        worker = executor.submit(pid).result(10)
        assert [executor.submit(loaded_value).result(10) for _ in range(3)] == [f"shop {worker}"] * 3
        assert (tmp_path / "loads").read_text() == "x"
        assert not hasattr(tasks, "loaded")
    finally:
        tasks.__dict__.pop("loaded", None)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_initializer_that_fails_fails_jobs_and_not_the_pool(
    app: Flask, make_executor: MakeExecutor, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(type="process", max_workers=1, start_method=method)
    monkeypatch.setenv("TASKS_READY", str(tmp_path / "ready"))
    executor.worker_init(fail_unless_ready)
    error = executor.submit(add, 1).exception(20)
    assert isinstance(error, ValueError)
    assert "not ready" in str(error)
    assert "fail_unless_ready" in str(error.__cause__)
    (tmp_path / "ready").touch()
    assert executor.submit(add, 1).result(20) == 1


def test_an_initializer_that_kills_its_worker_does_not_start_workers_for_ever(make_executor: MakeExecutor) -> None:
    executor = make_executor(type="process", max_workers=2)
    executor.worker_init(partial(die, "exit"))
    errors = [executor.submit(add, n).exception(20) for n in range(3)]
    assert all(isinstance(error, WorkerLost) for error in errors)
    assert "before it was ready" in str(errors[0])


def test_a_worker_that_imports_needs_to_know_the_app(make_executor: MakeExecutor) -> None:
    executor = make_executor(type="process", start_method="spawn")
    with pytest.raises(
        ConfigError, match=r"EXECUTOR_APP is None.*'spawn' import it, and app 'shop' is not in a module"
    ):
        executor.submit(add, 1)
    assert executor.jobs.list() == []


def test_an_app_that_stands_in_a_module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.app, "config", tasks.app.config.copy())
    monkeypatch.setattr(tasks.app, "extensions", {})
    tasks.app.config.update(EXECUTOR_TYPE="process", EXECUTOR_START_METHOD="spawn", EXECUTOR_MAX_WORKERS=1)
    with Executor(tasks.app) as executor:
        assert executor.submit(app_name).result(20) == "the app of tasks"


def test_an_app_that_cannot_be_imported_fails_the_job(app: Flask, make_executor: MakeExecutor) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_nothing()"
    executor = make_executor(type="process", start_method="spawn", max_workers=1)
    error = executor.submit(add, 1).exception(20)
    assert isinstance(error, ConfigError)
    assert "EXECUTOR_APP is 'tasks:create_nothing()'" in str(error)


def test_locks_that_threads_hold_while_a_worker_is_forked(
    make_executor: MakeExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_module.py").write_text("import threading, builtins\nbuiltins.slow_gate.wait(20)\nvalue = 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    gate = threading.Event()
    monkeypatch.setattr("builtins.slow_gate", gate, raising=False)
    importer = threading.Thread(target=lambda: __import__("slow_module"))
    importer.start()
    assert wait_until(lambda: "slow_module" in sys.modules)
    handler = logging.StreamHandler()
    logging.getLogger("shop.locked").addHandler(handler)
    try:
        with handler.lock:  # type: ignore[union-attr]
            executor = make_executor(type="process", max_workers=1)
            future = executor.submit(import_and_log, "slow_module", "shop.locked")
            gate_in_worker = executor.submit(add, 1)
            assert gate_in_worker.exception(20) is None
            assert future.result(20) == 42
    finally:
        gate.set()
        importer.join()
        sys.modules.pop("slow_module", None)
        logging.getLogger("shop.locked").removeHandler(handler)


def test_a_client_does_not_wait_for_the_workers_copy_of_its_connection(executor: Executor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        executor.submit(pid).result(10)
        accepted.close()
        client.settimeout(5)
        assert client.recv(1) == b"", "the end of the connection"


def test_a_worker_does_not_see_the_handlers_of_the_server(executor: Executor) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert executor.submit(handler_of, signal.SIGUSR1).result(10) == "SIG_DFL"
    finally:
        signal.signal(signal.SIGUSR1, before)


# ---- what travels ----


def test_what_cannot_travel_is_left_out_by_name(app: Flask, executor: Executor) -> None:
    with app.test_request_context("/", environ_overrides={"werkzeug.socket": object()}):
        g.connection, g.user = threading.Lock(), "ada"
        request.lock = threading.Lock()  # type: ignore[attr-defined]
        said = executor.submit(touch_everything).result(10)
        assert executor.submit(names_on_g).result(10) == ["user"]
    assert len(said) == 3
    assert "'connection' did not come along from g" in said[0]
    assert "cannot pickle '_thread.lock' object" in said[0]
    assert "'lock' did not come along from the request" in said[1]
    assert "'werkzeug.socket' is not in the environ" in said[2]


def test_a_call_of_map_in_chunks_has_contexts_of_its_own(app: Flask, executor: Executor) -> None:
    with app.test_request_context("/here"):
        g.number = 1
        assert list(executor.map(count_on_g, range(6), chunksize=3)) == ["/here 2"] * 6


@pytest.mark.parametrize("size", [1, 16_000, 17_000, 300_000, 5_000_000])
def test_large_arguments_and_results(two: Executor, size: int) -> None:
    futures = [two.submit(length, b"x" * size) for _ in range(8)]
    assert [future.result(20) for future in futures] == [size] * 8
    assert [len(data) for data in two.map(many, [size] * 4)] == [size] * 4


def test_a_function_that_is_not_there_in_the_worker(executor: Executor) -> None:
    executor.submit(add, 1).result(10)
    tasks.late = late  # type: ignore[attr-defined]
    late.__module__, late.__qualname__ = "tasks", "late"
    try:
        error = executor.submit(late).exception(10)
    finally:
        del tasks.late  # type: ignore[attr-defined]
    assert isinstance(error, NotPicklable)
    assert "must be importable there, and have been there when the worker was started" in str(error)


def late() -> None: ...


def test_many_reports(executor: Executor) -> None:
    for report in (False, True):  # the benchmarks say how much it is: less than 2 times
        future = executor.submit(report_often, 20_000, report)
        assert future.result(20) < 10
    assert future.meta == {"number": 19_999}


def test_a_worker_that_ends_lets_the_handlers_of_its_parent_alone(executor: Executor, tmp_path: Path) -> None:
    class Flushed(logging.Handler):
        def flush(self) -> None:
            append(str(tmp_path / "flushed"), str(os.getpid()))

    handler = Flushed()  # logging.shutdown() flushes all that there are
    worker = executor.submit(pid).result(10)
    executor.shutdown()
    handler.flush()
    assert (tmp_path / "flushed").read_text().split() == [str(os.getpid())] != [str(worker)]


def test_a_chatty_job_is_not_held_up(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    blocked, go = threading.Event(), threading.Event()

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            blocked.set()
            go.wait(60)

    handler = Slow()
    logging.getLogger("shop.render").addHandler(handler)
    try:
        assert executor.submit(log_something, 20_000).result(60)
        assert blocked.is_set()
        assert executor.submit(add, 1).result(10) == 1
    finally:
        go.set()
        logging.getLogger("shop.render").removeHandler(handler)
        drain(executor)


def test_a_callback_may_wait_for_another_job(executor: Executor) -> None:
    results: list[int] = []

    def follow(_: Any) -> None:
        other = executor.submit(add, 2)
        other.add_done_callback(lambda future: results.append(future.result()))
        results.append(other.result(10))

    executor.submit(add, 1).add_done_callback(follow)
    drain(executor)
    assert results == [2, 2]


def test_idle_workers_use_no_processor(two: Executor) -> None:
    assert list(two.map(add, range(50))) == list(range(50))
    threads = [thread.native_id for thread in threading.enumerate() if thread.name == "flask-executor-supervisor"]
    idle = [Path(f"/proc/self/task/{thread}/stat") for thread in threads]
    idle += [Path(f"/proc/{process}/stat") for process in two._self._processes]
    assert len(idle) == 3
    before = [ticks(stat) for stat in idle]
    time.sleep(0.5)
    assert sum(ticks(stat) for stat in idle) - sum(before) <= 1  # of 10 ms


def ticks(stat: Path) -> int:
    fields = stat.read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_the_pool_is_one_of_the_standard_library_by_type(two: Executor) -> None:
    assert isinstance(two, ProcessPoolExecutor)
    assert two._max_workers == 2
    future = two._self.submit(add, 1)
    assert future.result(10) == 1
    assert len(two._processes) == two.health().workers >= 1


def test_engines_of_flask_sqlalchemy_are_not_shared(app: Flask, make_executor: MakeExecutor, tmp_path: Path) -> None:
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'shop.db'}"
    database = SQLAlchemy(app)
    with app.app_context():
        database.session.execute(text("create table things (name text)"))
        database.session.commit()
        assert database.engine.pool.checkedin() == 1  # type: ignore[attr-defined]
        executor = make_executor(type="process", max_workers=1)
        assert executor.submit(pooled_connections).result(10) == 0, "its own are not opened yet"
        assert executor.submit(insert_thing, "chair").result(10) == 1
        assert database.session.execute(text("select name from things")).scalar() == "chair"
        database.session.remove()
        database.engine.dispose()
