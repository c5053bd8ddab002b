"""When a job is run again."""

from __future__ import annotations

from typing import Any

import pytest

from flask_executor.executor.pending import ScheduledCalls
from flask_executor.jobs.retry import Retry
from flask_executor.testing.contract.fixtures import MakeExecutor


def test_the_wait_doubles_and_a_part_of_it_is_random() -> None:
    retry = Retry(retries=4, backoff=1.0)
    error = ValueError()
    assert [retry.delay(attempt, error, chance=1) for attempt in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert [retry.delay(attempt, error, chance=0) for attempt in (1, 2, 3, 4)] == [0.5, 1, 2, 4]
    assert retry.delay(5, error) is None
    delays = {retry.delay(3, error) for _ in range(50)}
    assert len(delays) > 1
    assert all(delay is not None and 2 <= delay <= 4 for delay in delays)


def test_it_has_a_bound_however_many_attempts_there_are() -> None:
    assert Retry(retries=10_000, backoff=1.0, max_backoff=60).delay(9_999, ValueError(), chance=1) == 60


def test_without_backoff_it_is_at_once() -> None:
    assert Retry(retries=1).delay(1, ValueError()) == 0


def test_which_errors() -> None:
    retry = Retry(retries=1, retry_on=(OSError,), no_retry_on=(FileNotFoundError,))
    assert retry.delay(1, PermissionError()) is not None
    assert retry.delay(1, FileNotFoundError()) is None
    assert retry.delay(1, ValueError()) is None
    assert Retry(retries=1).delay(1, SystemExit()) is None, "it is not an error"


@pytest.mark.parametrize(
    "wrong", [{"retries": -1}, {"retries": 1, "backoff": -1.0}, {"retries": 1, "max_backoff": float("nan")}]
)
def test_wrong_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Retry(**wrong)  # type: ignore[arg-type]


def test_a_shutdown_as_an_attempt_fails_gives_up_the_next_one(
    make_executor: MakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make_executor()
    add = ScheduledCalls.add

    def shut_down_and_add(*args: Any) -> None:
        executor.shutdown(wait=False)
        add(*args)

    monkeypatch.setattr(ScheduledCalls, "add", shut_down_and_add)
    future = executor.options(retries=1, backoff=60).submit(int, "nine")
    with pytest.raises(ValueError, match="nine"):
        future.result(10)
    assert future.status == "failed"
