"""What is particular to worker processes."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError

import pytest
from tasks import TwoArgumentsError, add, fail_with_two_arguments, sleep, torn_result, unpicklable_result

from conftest import MakeExecutor, wait_until
from flask_executor import Executor, NotPicklable, RemoteTraceback
from flask_executor.testing import drain


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
    with pytest.raises(NotPicklable, match="The result of job unpicklable_result cannot be sent"):
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
