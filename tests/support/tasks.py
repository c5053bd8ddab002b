"""Functions that tests run as jobs; at the top of a module, so that worker processes can import them."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from flask import Flask, current_app, g, request

from flask_executor import Executor, current_job
from flask_executor.testing.jobs import (
    about_itself,
    add,
    add_async,
    app_name,
    append,
    body,
    create_app,
    doubled,
    fail,
    fail_until,
    form_and_file,
    leave,
    log_something,
    of_g,
    of_request,
    of_session,
    pid,
    report_and_wait,
    sleep,
    spin,
    swallow_everything,
    tracked,
    unbound,
    until_stopped,
    wait_for,
)

#: What the contract tests have as well.
__all__ = [
    "about_itself",
    "add",
    "add_async",
    "app_name",
    "append",
    "body",
    "create_app",
    "doubled",
    "fail",
    "fail_until",
    "form_and_file",
    "leave",
    "log_something",
    "of_g",
    "of_request",
    "of_session",
    "pid",
    "report_and_wait",
    "sleep",
    "spin",
    "swallow_everything",
    "tracked",
    "unbound",
    "until_stopped",
    "wait_for",
]


def create_office() -> Flask:
    app = Flask("office")
    app.secret_key = "not a secret in a test"
    app.config.from_prefixed_env()
    Executor(app)
    return app


def create_app_without_a_key() -> Flask:
    app = create_app()
    app.secret_key = None
    return app


class TwoArgumentsError(Exception):
    """Pickles, but cannot be rebuilt: its __init__ takes more than what it passes on."""

    def __init__(self, page: int, reason: str) -> None:
        super().__init__(f"page {page}: {reason}")


def fail_with_two_arguments() -> NoReturn:
    raise TwoArgumentsError(4, "torn")


class Torn:
    """Pickles, but raises when it is rebuilt in another process than the one it was made in."""

    def __reduce__(self) -> Any:
        return _rebuild, (os.getpid(),)


def _rebuild(made_in: int) -> None:
    if made_in != os.getpid():
        raise ValueError("torn")


def torn_result() -> Torn:
    return Torn()


def unpicklable_result() -> Any:
    return threading.Lock()


def buyers(database: str) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return [buyer for (buyer,) in connection.execute("SELECT buyer FROM orders")]


# ---- jobs that can be watched and stopped ----


def die(how: str) -> None:
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "segfault":
        ctypes.string_at(0)
    raise ValueError(how)


def start_a_program(path: str) -> NoReturn:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(path).write_text(str(process.pid))
    time.sleep(60)
    raise AssertionError("too late")


def report_often(times: int, report: bool) -> float:
    begin = time.perf_counter()
    for number in range(times):
        sum(range(100))
        if report:
            current_job.update(progress=number / times, message="more", number=number)
    return time.perf_counter() - begin


def length(data: bytes) -> int:
    return len(data)


def many(length: int) -> bytes:
    return b"x" * length


def touch_everything() -> list[str]:
    """What the errors say when something is touched that did not come along."""
    said = []
    touches: list[Callable[[], Any]] = [
        lambda: g.connection,
        lambda: request.lock,  # type: ignore[attr-defined]
        lambda: request.environ["werkzeug.socket"],
    ]
    for touch in touches:
        try:
            touch()
        except (AttributeError, KeyError) as error:
            said.append(str(error))
    return said


def names_on_g() -> list[str]:
    return sorted(g)


def count_on_g(_: object) -> str:
    g.number += 1
    return f"{request.path} {g.number}"


def loaded_value() -> Any:
    return globals()["loaded"]


def fail_unless_ready() -> None:
    if not Path(os.environ["TASKS_READY"]).exists():
        raise ValueError("not ready")


def import_and_log(module: str, logger: str) -> Any:
    import builtins
    import importlib

    builtins.slow_gate.set()  # type: ignore[attr-defined]
    logging.getLogger(logger).warning("importing")
    return importlib.import_module(module).value


def handler_of(number: int) -> str:
    handler = signal.getsignal(number)
    return getattr(handler, "name", repr(handler))


#: An app that stands in a module.
app = Flask("the app of tasks")


def submit_from_worker(path: str) -> int:
    executor = current_app.extensions["executor"]
    result: int = executor.submit(add, 1, 2).result(20)
    executor.submit(sleep, 0.3)
    executor.submit(append, path, "done")
    return result


# ---- jobs that try to do harm ----


class Rude:
    """Ends whoever rebuilds it in another process than the one it was made in."""

    def __reduce__(self) -> Any:
        return _leave_elsewhere, (os.getpid(),)


def _leave_elsewhere(made_in: int) -> None:
    if made_in != os.getpid():
        raise SystemExit("rude")


class Shy:
    """Cannot be pickled, nor shown."""

    def __reduce__(self) -> Any:
        raise TypeError("shy")

    def __repr__(self) -> str:
        raise ValueError("shy")


def rude_result() -> Rude:
    return Rude()


def log_what_cannot_be_rebuilt() -> str:
    logging.getLogger("shop.harm").warning("torn", extra={"torn": Torn()})
    logging.getLogger("shop.harm").warning("shy", extra={"shy": Shy()})
    return "logged"


def report_what_cannot_be_shown() -> None:
    current_job.update(progress=0.5, shy=Shy())
    current_job.sleep(0.1)


def fork_and(what: str) -> str:
    child = os.fork()
    if child == 0:
        logging.getLogger("shop.harm").warning("from the child")
        current_job.update(progress=0.9)
        if what == "exit":
            sys.exit(0)
        if what == "raise":
            raise ValueError("in the child")
        return "child"
    os.waitpid(child, 0)
    return "parent"


def children_that_log(count: int) -> int:
    import multiprocessing

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=log_much) for _ in range(count)]
    for child in children:
        child.start()
    log_much()
    for child in children:
        child.join()
    return sum(child.exitcode or 0 for child in children)


def log_much() -> None:
    for _ in range(20):
        logging.getLogger("shop.harm").warning("x" * 60_000)


def terminate_a_child() -> int | None:
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    child.terminate()
    child.join(10)
    return child.exitcode


def hold_the_interpreter(path: str) -> None:
    """In C, and with the lock of the interpreter."""
    import re

    Path(path).write_text(str(os.getpid()))
    re.match(r"(a+)+$", "a" * 40 + "b")


def extend_and_fail(items: list[int]) -> list[int]:
    if current_job.attempt == 1:
        raise ConnectionError
    return items


def pooled_connections() -> int:
    count: int = current_app.extensions["sqlalchemy"].engine.pool.checkedin()
    return count


def insert_thing(name: str) -> int:
    from sqlalchemy import text

    session = current_app.extensions["sqlalchemy"].session
    session.execute(text("insert into things values (:name)"), {"name": name})
    session.commit()
    count: int = session.execute(text("select count(*) from things")).scalar()
    return count


def work_until(path: str) -> str:
    """Report half of it, and go on when there is such a file."""
    current_job.update(progress=0.5, message="waiting")
    while not os.path.exists(path):  # noqa: PTH110  # as short as can be
        current_job.sleep(0.01)
    return path


def log_lines(count: int) -> None:
    for number in range(count):
        current_app.logger.warning("line %s", number)


def whatever() -> set[str]:
    """What JSON does not have."""
    return {"a", "b"}


def body_of_request() -> str:
    return request.get_data(as_text=True)


def given(**arguments: Any) -> dict[str, Any]:
    return arguments


def log_exceptions() -> None:
    """In all the ways in which apps do it; the exceptions have the password in them."""
    log = logging.getLogger("shop")
    try:
        raise ValueError("the password is hunter2")
    except ValueError:
        log.exception("")
        log.error(traceback.format_exc())
        log.error("failed: %s", traceback.format_exc())
    log.error("plain", exc_info=ValueError("hunter2"))
    log.error("stack", stack_info=True)
    try:
        raise KeyError("page") from ValueError("hunter2")
    except KeyError:
        log.exception("chained")
        log.error("by hand: %s", traceback.format_exc())


def echo_messages(count: int, _: str = "") -> list[tuple[str, Any]]:
    """Get so many messages."""
    current_job.update(message="receiving")
    found: list[tuple[str, Any]] = []
    while len(found) < count:
        message = current_job.receive(timeout=30)
        assert message is not None
        found.append((message.type, message.body))
    return found


def receive_at_last(attempts: int) -> Any:
    """Fail until the last attempt, which gets a message."""
    if current_job.attempt < attempts:
        raise ValueError("not yet")
    message = current_job.receive(timeout=5)
    return message and (message.type, message.body)


def submit_and_wait() -> int:
    executor = current_app.extensions["executor"]
    result: int = executor.submit(add, 1, 2).result(30)
    return result


def compute_with_dask() -> int:
    import dask

    result: int = dask.delayed(add)(1, 2).compute()
    return result


def note_and_wait(path: str, go: str) -> str:
    """Write down this process and its parent."""
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()} {os.getppid()}\n")
    wait_for(go)
    return "done"
