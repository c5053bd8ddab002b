"""Messages to jobs: sleeps, attempts, and what is kept; the rest stands in ``ControlContract``."""

from __future__ import annotations

from typing import Any

import pytest
import tasks
from flask import Flask

from flask_executor import Executor, current_job
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until


@pytest.fixture(params=["thread", "process", "process spawn"])
def executor(app: Flask, make_executor: MakeExecutor, request: pytest.FixtureRequest) -> Executor:
    type, _, method = request.param.partition(" ")
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    return make_executor(type=type, max_workers=1, start_method=method or None)


def test_a_message_does_not_end_a_sleep(make_executor: MakeExecutor) -> None:
    def work() -> object:
        current_job.update(message="sleeping")
        current_job.sleep(0.3)
        return current_job.receive(0)

    future = make_executor().submit(work)
    assert wait_until(lambda: future.message == "sleeping")
    future.send("wake", "up")
    assert not wait_until(future.done, 0.1)
    message: Any = future.result(10)
    assert message.body == "up"


def test_retries_begin_without_the_messages_of_the_last_attempt(make_executor: MakeExecutor) -> None:
    def work() -> object:
        message = current_job.receive(5)
        if current_job.attempt == 1:
            raise ValueError
        return message.body if message else None

    future = make_executor().options(retries=1, backoff=0).submit(work)
    future.send("a", 1)
    assert wait_until(lambda: future.record().attempt == 2)
    future.send("a", 2)
    assert future.result(10) == 2


def test_messages_between_two_attempts(executor: Executor) -> None:
    future = executor.options(retries=1, backoff=0.5).submit(tasks.receive_at_last, 2)
    assert wait_until(lambda: future.record().attempt == 2, 20)
    future.send("a", 1)
    assert future.result(20) == ("a", 1)


@pytest.mark.parametrize("size", [10, 20_000])
def test_messages_that_a_job_has_got_are_not_kept(make_executor: MakeExecutor, size: int) -> None:
    executor = make_executor(type="process", max_workers=1, start_method="fork")
    future = executor.submit(tasks.echo_messages, 3000, " " * size)
    assert wait_until(lambda: future.message == "receiving", 20)
    for number in range(2999):
        future.send("page", number)
    (task,) = executor._dispatcher._tasks.values()
    assert len(task.call.undelivered or ()) < 100
    future.send("page", 2999)
    assert future.result(20) == [("page", number) for number in range(3000)]


@pytest.mark.parametrize(("before", "now"), [("thread", "process"), ("process", "thread")])
def test_a_message_waits_for_a_job_that_another_backend_runs(
    app: Flask, make_executor: MakeExecutor, before: str, now: str
) -> None:
    executor = make_executor(type=before, max_workers=1)
    future = executor.submit_later(0.2, tasks.receive_at_last, 1)
    assert future.send("a", 1)
    app.config["EXECUTOR_TYPE"] = now
    executor.init_app(app)
    assert future.result(20) == ("a", 1)
