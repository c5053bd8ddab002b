from __future__ import annotations

import threading

import pytest
from flask import Flask, g
from tasks import add, fail, unpicklable_result

from flask_executor import Executor, NotPicklable
from flask_executor.testing.contract.fixtures import MakeExecutor


@pytest.fixture
def executor(make_executor: MakeExecutor) -> Executor:
    return make_executor(type="immediate")


@pytest.fixture
def pickling(make_executor: MakeExecutor) -> Executor:
    return make_executor(name="pickling", type="immediate", immediate_pickle="yes")


def test_a_job_has_ended_when_submit_returns(executor: Executor) -> None:
    threads: list[threading.Thread] = []
    future = executor.submit(lambda: threads.append(threading.current_thread()))
    assert future.done()
    assert threads == [threading.current_thread()]
    failed = executor.submit(fail)
    assert failed.status == "failed"
    assert isinstance(failed.exception(), ValueError)


def test_the_contexts_are_copies_all_the_same(app: Flask, executor: Executor) -> None:
    def change() -> None:
        g.value = 2

    with app.app_context():
        g.value = 1
        executor.submit(change).result()
        assert g.value == 1


def test_a_job_that_submits_jobs(executor: Executor) -> None:
    assert executor.submit(lambda: executor.submit(add, 1).result() + 1).result() == 2


def test_an_interrupt_is_for_the_thread_that_submits(executor: Executor) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.submit(interrupt)
    assert executor.jobs.list()[0].status == "failed"
    assert executor.wait(1)


def test_no_bound_where_nothing_waits(make_executor: MakeExecutor) -> None:
    executor = make_executor(type="immediate", max_pending=1)

    def nest(depth: int) -> int:
        return executor.submit(nest, depth - 1).result() + 1 if depth else 0

    assert executor.submit(nest, 5).result() == 5


def test_without_pickling_everything_goes(executor: Executor) -> None:
    assert executor.submit(lambda lock: lock, threading.Lock()).result() is not None


class TestPickling:
    def test_what_a_worker_process_takes(self, pickling: Executor) -> None:
        values = [1]
        assert pickling.submit(add, 1, b=2).result() == 3
        assert pickling.submit(lambda_free, values).result() == [1]
        assert pickling.submit(lambda_free, values).result() is not values

    def test_a_function_that_cannot_be_imported(self, pickling: Executor) -> None:
        with pytest.raises(NotPicklable, match=r"The function of job <lambda> cannot be sent .*top of a module"):
            pickling.submit(lambda: None)
        assert pickling.jobs.list() == []

    def test_an_argument(self, pickling: Executor) -> None:
        with pytest.raises(NotPicklable, match="Argument 2 of job lambda_free"):
            pickling.submit(lambda_free, 1, threading.Lock())  # type: ignore[call-arg]
        with pytest.raises(NotPicklable, match="Argument 'value' of job lambda_free") as raised:
            pickling.submit(lambda_free, value=threading.Lock())
        assert isinstance(raised.value, TypeError)

    def test_a_result(self, pickling: Executor) -> None:
        error = pickling.submit(unpicklable_result).exception()
        assert isinstance(error, NotPicklable)
        assert "The result of a job cannot be sent" in str(error)


def lambda_free(value: object) -> object:
    return value
