"""What all tests share: apps and executors that are cleaned up, and a watch for what is left behind."""

from __future__ import annotations

import gc
import itertools
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_workers import ENGINES, DaskScheduler, redis_and_workers, wait_for_workers, worker_command
from flask import Flask
from processes import left_behind
from redis_server import RedisServer
from requirements import require
from two_apps import another_app
from variants import SHARED_STORES, store_url

from flask_executor import Executor
from flask_executor.testing.contract.fixtures import MakeExecutor, shut_down, wait_until


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have tests that share what is slow to start run in one process of pytest-xdist, so that it starts once."""
    for item in items:
        if group := shared_part(item):
            item.add_marker(pytest.mark.xdist_group(group))


def shared_part(item: pytest.Item) -> str | None:
    """The engine whose workers a test uses, or the browser."""
    parameters = set(re.split(r"\W+", item.callspec.id)) if hasattr(item, "callspec") else set()
    fixtures = getattr(item, "fixturenames", ())
    for engine, workers in ENGINES.items():
        if workers in fixtures or engine in parameters:
            return engine
    return "browser" if "browser" in fixtures else None


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist sends the report
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Escape lone surrogates in what a test has logged: pytest-xdist cannot send them."""
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]


def pytest_collection_finish() -> None:
    """Spare :func:`no_leaks` from looking through what was imported, after each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Have programs that tests start hear of Ctrl-C, which a run in the background ignores and passes on."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_tests_until_freeze = itertools.cycle(range(20))


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves threads or processes behind."""
    if next(_tests_until_freeze) == 0:  # what was imported since, and caches: collecting takes a third of the time
        gc.collect()
        gc.freeze()
    yield
    assert wait_until(lambda: not left_behind()), f"left behind: {left_behind()}"


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


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.stop()


@pytest.fixture(params=SHARED_STORES)
def shared_store(request: pytest.FixtureRequest) -> str:
    """``EXECUTOR_STORE`` of a store that processes share, with nothing in it."""
    return store_url(request.param, request)


@pytest.fixture(params=["memory", *SHARED_STORES])
def any_store(request: pytest.FixtureRequest) -> str:
    """``EXECUTOR_STORE`` of each store, with nothing in it."""
    return store_url(request.param, request)


@pytest.fixture
def here(shared_store: str, make_executor: MakeExecutor) -> Executor:
    """An executor with a shared store."""
    return make_executor(store=shared_store, max_workers=4)


@pytest.fixture
def there(here: Executor, app: Flask, make_executor: MakeExecutor) -> Executor:
    """Another process's executor with the store of ``here``; in truth, another app's in this process."""
    other = another_app(app)
    there = make_executor(other)
    there.keep = other  # type: ignore[attr-defined]  # an executor does not keep its app alive
    return there


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a job waits for; set at the end of the test."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the SQLite store of the app is."""
    return tmp_path / "instance" / "executor.sqlite"


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
