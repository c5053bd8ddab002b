"""Jobs that start when a session of SQLAlchemy has committed, with real databases."""

from __future__ import annotations

import builtins
import gc
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, g
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from tasks import add, append, buyers, of_g

from flask_executor import (
    Executor,
    ExecutorShutdown,
    FutureProxy,
    KeyExists,
    MissingExtra,
    NotPicklable,
    QueueFull,
    job_finished,
    job_queued,
)
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until

Started = list[str]


def open_engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}")

    # As SQLAlchemy's documentation says: or the driver begins transactions too late for savepoints.
    @event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (buyer VARCHAR)"))
    return engine


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "shop.sqlite"


@pytest.fixture
def engine(database: Path) -> Iterator[Engine]:
    engine = open_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@pytest.fixture
def executor(make_executor: MakeExecutor) -> Executor:
    return make_executor(type="immediate")


@pytest.fixture
def started() -> Started:
    return []


def buy(session: Any, buyer: str) -> None:
    session.execute(text("INSERT INTO orders VALUES (:buyer)"), {"buyer": buyer})


TYPES: list[dict[str, Any]] = [
    {"type": "thread"},
    {"type": "process", "start_method": "fork"},
    {"type": "process", "start_method": "spawn"},
    {"type": "immediate"},
]


@pytest.mark.parametrize("config", TYPES, ids=lambda config: " ".join(config.values()))
def test_the_job_finds_what_was_committed(
    app: Flask, make_executor: MakeExecutor, config: dict[str, Any], session: Session, database: Path
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(**config)
    buy(session, "ada")
    future = executor.submit_after_commit(session, buyers, str(database))
    assert future.status == "queued"
    assert executor.jobs.get(future.job_id) == future.record()
    session.commit()
    assert future.result(20) == ["ada"]


@pytest.mark.parametrize("config", TYPES, ids=lambda config: " ".join(config.values()))
def test_contexts_are_those_of_the_call(
    app: Flask, make_executor: MakeExecutor, config: dict[str, Any], session: Session
) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(**config)
    with app.app_context():
        g.user = "ada"
        future = executor.submit_after_commit(session, of_g, "user")
        g.user = "bob"
    session.commit()
    assert future.result(20) == "ada"


def rolled_back(session: Session) -> None:
    session.rollback()


def closed(session: Session) -> None:
    session.close()


def begun_and_rolled_back(session: Session) -> None:
    buy(session, "ada")
    session.rollback()


def not_committed_for_an_error(session: Session) -> None:
    def fail(connection: object) -> None:
        raise OSError("no space left")

    assert session.bind is not None
    event.listen(session.bind, "commit", fail)
    buy(session, "ada")
    with pytest.raises(OSError, match="no space"):
        session.commit()
    event.remove(session.bind, "commit", fail)
    session.rollback()


@pytest.mark.parametrize("end", [rolled_back, closed, begun_and_rolled_back, not_committed_for_an_error])
def test_what_is_not_committed_starts_nothing(
    executor: Executor, session: Session, started: Started, end: Callable[[Session], None]
) -> None:
    future = executor.submit_after_commit(session, started.append, "receipt")
    assert executor.unfinished() == [future]
    end(session)
    assert future.cancelled()
    assert future.status == "cancelled"
    assert executor.unfinished() == []
    buy(session, "ada")
    session.commit()
    assert started == []


def test_several_start_in_order(make_executor: MakeExecutor, session: Session, started: Started) -> None:
    executor = make_executor(max_workers=1)
    for number in range(20):
        executor.submit_after_commit(session, started.append, str(number))
    assert started == []
    session.commit()
    drain(executor)
    assert started == [str(number) for number in range(20)]
    session.commit()
    drain(executor)
    assert len(started) == 20


def test_savepoints(executor: Executor, session: Session, started: Started) -> None:
    executor.submit_after_commit(session, started.append, "first")
    with session.begin_nested():
        executor.submit_after_commit(session, started.append, "released")
        with session.begin_nested() as inner:
            rolled_back = executor.submit_after_commit(session, started.append, "rolled back")
            inner.rollback()
        executor.submit_after_commit(session, started.append, "released too")
    outer = session.begin_nested()
    with session.begin_nested():
        lost = executor.submit_after_commit(session, started.append, "released in one that is rolled back")
    assert not lost.done()
    outer.rollback()
    executor.submit_after_commit(session, started.append, "last")
    assert rolled_back.cancelled()
    assert lost.cancelled()
    assert started == []
    session.commit()
    assert started == ["first", "released", "released too", "last"]


def test_a_commit_releases_savepoints_that_are_open(executor: Executor, session: Session, started: Started) -> None:
    session.begin_nested()
    session.begin_nested()
    executor.submit_after_commit(session, started.append, "receipt")
    session.commit()
    assert started == ["receipt"]


def test_with_begin(executor: Executor, engine: Engine, started: Started) -> None:
    with Session(engine) as session, session.begin():
        executor.submit_after_commit(session, started.append, "receipt")
        buy(session, "ada")
        assert started == []
    assert started == ["receipt"]


def test_an_error_in_with_begin(executor: Executor, engine: Engine, started: Started) -> None:
    def shop() -> None:
        with Session(engine) as session, session.begin():
            executor.submit_after_commit(session, started.append, "receipt")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        shop()
    assert started == []


def test_without_autobegin(executor: Executor, engine: Engine, started: Started) -> None:
    with Session(engine, autobegin=False) as session:
        with pytest.raises(RuntimeError, match=r"call session\.begin\(\)"):
            executor.submit_after_commit(session, started.append, "receipt")
        with session.begin():
            executor.submit_after_commit(session, started.append, "receipt")
    assert started == ["receipt"]
    assert [job.name for job in executor.jobs.list()] == ["list.append"]


def test_a_job_may_use_the_session_that_starts_it(executor: Executor, session: Session, database: Path) -> None:
    """Type immediate, and a session that the job shares: SQL in the middle of commit(), and jobs that wait for that."""

    def second() -> None:
        buy(session, "second")
        session.commit()

    def first() -> None:
        buy(session, "first")
        futures.append(executor.submit_after_commit(session, second))
        futures.append(executor.submit_after_commit(session, buyers, str(database)))
        session.commit()

    buy(session, "ada")
    futures: list[FutureProxy[Any]] = [executor.submit_after_commit(session, first)]
    futures.append(executor.submit_after_commit(session, add, 1, 2))
    session.commit()
    assert [future.exception() for future in futures] == [None] * 4
    assert futures[1].result() == 3
    assert futures[3].result() == ["ada", "first", "second"]


def test_each_session_has_its_own(executor: Executor, engine: Engine, session: Session, started: Started) -> None:
    executor.submit_after_commit(session, started.append, "one")
    with Session(engine, info=session.info) as other:
        executor.submit_after_commit(other, started.append, "other")
        other.commit()
        assert started == ["other"]
    session.commit()
    assert started == ["other", "one"]


def test_scoped_sessions(executor: Executor, engine: Engine, started: Started) -> None:
    session = scoped_session(sessionmaker(engine))
    executor.submit_after_commit(session, started.append, "one")
    session.commit()
    executor.submit_after_commit(session, started.append, "two")
    session.remove()
    session.commit()
    executor.submit_after_commit(session, started.append, "three")

    def in_another_thread() -> None:
        executor.submit_after_commit(session, started.append, "other")
        session.commit()
        session.remove()

    thread = threading.Thread(target=in_another_thread)
    thread.start()
    thread.join()
    assert started == ["one", "other"]
    session.commit()
    assert started == ["one", "other", "three"]
    session.remove()


@pytest.mark.parametrize("type", ["thread", "immediate"])
def test_flask_sqlalchemy(app: Flask, make_executor: MakeExecutor, database: Path, type: str) -> None:
    executor = make_executor(type=type)
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{database}"
    db = SQLAlchemy(app)

    class Order(db.Model):  # type: ignore[name-defined, misc]
        id = db.Column(db.Integer, primary_key=True)
        buyer = db.Column(db.String)

    receipts = []

    @executor.job
    def send_receipt(id: int) -> None:
        receipts.append(db.session.get(Order, id).buyer)  # type: ignore[union-attr]
        db.session.commit()

    @app.post("/orders/<buyer>")
    def order(buyer: str) -> str:
        order = Order(buyer=buyer)
        db.session.add(order)
        db.session.flush()
        futures.append(send_receipt.submit_after_commit(db.session, order.id))
        if buyer == "mallory":
            raise PermissionError
        if buyer != "eve":
            db.session.commit()
        return buyer

    futures: list[Any] = []
    with app.app_context():
        db.create_all()
    client = app.test_client()
    for buyer in ("ada", "mallory", "eve", "bob"):
        client.post(f"/orders/{buyer}")
    drain(executor)
    assert [future.status for future in futures] == ["succeeded", "cancelled", "cancelled", "succeeded"]
    assert sorted(receipts) == ["ada", "bob"]
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()


def test_options_and_keys(executor: Executor, session: Session) -> None:
    def start() -> Any:
        return executor.options(key="receipt", name="mail").submit_after_commit(session, add, 1)

    future = start()
    assert (future.key, future.name) == ("receipt", "mail")
    with pytest.raises(KeyExists):
        start()
    session.rollback()
    assert "receipt" not in executor.futures
    again = start()
    session.commit()
    assert executor.futures.result("receipt") == again.result() == 1


def test_a_shared_store(make_executor: MakeExecutor, session: Session, any_store: str) -> None:
    executor = make_executor(store=any_store, track="all")
    dropped = [executor.options(key=key).submit_after_commit(session, add, 1) for key in ("receipt", None)]
    assert executor.jobs.find("receipt") == dropped[0].record()
    session.rollback()
    assert "receipt" not in executor.futures
    futures = [executor.options(key=key).submit_after_commit(session, add, 2) for key in ("receipt", None)]
    session.commit()
    assert [future.result(10) for future in futures] == [2, 2]
    drain(executor)
    assert {job.id for job in executor.jobs.list(status="cancelled")} == {future.job_id for future in dropped}
    assert {job.id for job in executor.jobs.list(status="succeeded")} == {future.job_id for future in futures}


def test_what_is_refused_is_refused_before_the_commit(make_executor: MakeExecutor, session: Session) -> None:
    executor = make_executor(max_workers=1, max_pending=1)
    futures = [executor.submit_after_commit(session, add, 1) for _ in range(2)]
    with pytest.raises(QueueFull):
        executor.submit_after_commit(session, add, 1)
    with pytest.raises(QueueFull):
        executor.submit(add, 1)
    session.commit()
    assert [future.result(10) for future in futures] == [1, 1]
    drain(executor)
    executor.submit(add, 1).result(10)
    with pytest.raises(TypeError, match="a job needs a function"):
        executor.submit_after_commit(session, 7)  # type: ignore[arg-type]
    executor.shutdown()
    with pytest.raises(ExecutorShutdown):
        executor.submit_after_commit(session, add, 1)


@pytest.mark.parametrize(
    "config", [{"type": "process", "start_method": "fork"}, {"type": "immediate", "immediate_pickle": True}]
)
def test_arguments_are_packed_before_the_commit(
    make_executor: MakeExecutor, session: Session, config: dict[str, Any]
) -> None:
    executor = make_executor(**config)
    with pytest.raises(NotPicklable, match="Argument 1"):
        executor.submit_after_commit(session, callable, lambda: None)
    assert executor.unfinished() == []
    items = [1]
    future = executor.options(retries=1).submit_after_commit(session, len, items)
    items.append(2)
    session.commit()
    assert future.result(20) == 1


@pytest.mark.parametrize("session", [None, "a session", Session, object()])
def test_what_is_no_session(executor: Executor, session: Any) -> None:
    with pytest.raises(TypeError, match="takes a session of SQLAlchemy"):
        executor.submit_after_commit(session, add, 1)
    assert executor.unfinished() == []


def test_without_sqlalchemy(executor: Executor, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sqlalchemy"):
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r"pip install flask-executor\[sqlalchemy\]"):
        executor.submit_after_commit(session, add, 1)


def test_a_handle_can_be_cancelled_and_stopped_before(executor: Executor, session: Session, started: Started) -> None:
    assert executor.submit_after_commit(session, started.append, "one").cancel()
    assert executor.submit_after_commit(session, started.append, "two").stop()
    future = executor.submit_after_commit(session, started.append, "three")
    session.commit()
    assert started == ["three"]
    assert future.done()


def test_nobody_waits_for_it(make_executor: MakeExecutor, session: Session, tmp_path: Path) -> None:
    executor = make_executor(max_workers=2)
    future = executor.submit_after_commit(session, append, str(tmp_path / "log"), "receipt")
    executor.submit(add, 1)
    assert executor.wait(10)
    assert executor.health().waiting == 1
    session.commit()
    drain(executor)
    assert future.done()


def test_shutdown_drops_it(
    executor: Executor, session: Session, started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    future = executor.submit_after_commit(session, started.append, "receipt")
    executor.shutdown()
    assert future.cancelled()
    assert "does not wait for a commit any more" in caplog.text
    session.commit()
    assert started == []


def test_what_goes_wrong_at_the_start_is_logged(
    make_executor: MakeExecutor, session: Session, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    executor = make_executor()
    future = executor.options(key="receipt").submit_after_commit(session, add, 1)
    executor._self.shutdown()
    buy(session, "ada")
    session.commit()
    assert future.cancelled()
    assert "receipt" not in executor.futures
    [entry] = [entry for entry in caplog.records if entry.levelno == logging.ERROR]
    assert entry.getMessage() == f"Job add ({future.job_id}) was to start after a commit, and cannot."
    assert buyers(str(database)) == ["ada"]


def test_signals_and_callbacks(executor: Executor, session: Session) -> None:
    heard = []

    def hear(sender: object, job: Any) -> None:
        heard.append(job.status)

    with job_queued.connected_to(hear), job_finished.connected_to(hear):
        future = executor.submit_after_commit(session, add, 1)
        future.add_done_callback(lambda future: heard.append(future.result()))
        assert heard == ["queued"]
        session.commit()
    assert heard == ["queued", "succeeded", 1]


def test_a_session_that_is_thrown_away(executor: Executor, engine: Engine, started: Started) -> None:
    session = Session(engine)
    buy(session, "ada")
    future = executor.options(key="receipt").submit_after_commit(session, started.append, "receipt")
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None
    assert wait_until(lambda: future.cancelled() and "receipt" not in executor.futures)
    assert started == []


def test_a_session_keeps_two_listeners_however_many_jobs(executor: Executor, session: Session) -> None:
    for number in range(5):
        executor.submit_after_commit(session, add, number)
        session.commit()
    assert len(list(session.dispatch.after_commit)) == 1
    assert len(list(session.dispatch.after_transaction_end)) == 1
    assert executor.submit_after_commit(session, add, 1).record().status == "queued"


def test_rq(app: Flask, make_executor: MakeExecutor, session: Session) -> None:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    executor = make_executor(type="rq")
    executor.submit_after_commit(session, add, 1)
    dropped = executor.options(key="receipt").submit_after_commit(session, add, 1)
    assert executor.wait(10)
    session.rollback()
    assert dropped.cancelled()
    future = executor.options(key="receipt").submit_after_commit(session, add, 1, 2)
    assert future.status == "queued"
    session.commit()
    assert future.result(30) == 3
    late = executor.submit_after_commit(session, add, 1)
    executor._self.shutdown()
    session.commit()
    assert late.cancelled()


def test_rq_and_a_process_that_dies_before_it_commits(
    app: Flask, make_executor: MakeExecutor, session: Session, rq_workers: dict[str, Any]
) -> None:
    executor = make_executor(type="rq")

    def die() -> None:
        executor.options(key="bill", name="dies").submit_after_commit(session, add, 1)
        executor.options(name="dies").submit_after_commit(session, add, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join()
    assert wait_until(lambda: {job.status for job in executor.jobs.list(name="dies")} == {"lost"}, 20)
    assert executor.options(again=True).submit_once("bill", add, 2).result(20) == 2
