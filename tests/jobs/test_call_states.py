"""The states of a call, as real backends take it through them."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest

from flask_executor import FutureProxy, current_job
from flask_executor.jobs.call import _TRANSITIONS, Call, CallState
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[CallState]]:
    """The states that each call entered, by the id of its job."""
    seen: dict[str, list[CallState]] = {}
    enter = Call.enter

    def note(call: Call, state: CallState) -> bool:
        entered = enter(call, state)
        if entered:
            seen.setdefault(call.job.id, []).append(state)
        return entered

    monkeypatch.setattr(Call, "enter", note)
    return seen


def settled(states: dict[str, list[CallState]], future: FutureProxy[Any]) -> list[CallState]:
    assert wait_until(lambda: states.get(future.job_id, [None])[-1] is CallState.SETTLED), states
    return states[future.job_id]


def fail_once() -> int:
    if current_job.attempt == 1:
        raise ConnectionError("once")
    return current_job.attempt


ONCE = [CallState.QUEUED, CallState.RUNNING, CallState.SETTLED]


@pytest.mark.parametrize("type", ["thread", "process", "immediate"])
def test_a_job(make_executor: MakeExecutor, states: dict[str, list[CallState]], type: str) -> None:
    future = make_executor(type=type, max_workers=1).submit(int, "3")
    assert future.result(20) == 3
    assert settled(states, future) == ONCE


@pytest.mark.parametrize("type", ["thread", "process"])
def test_a_retry(make_executor: MakeExecutor, states: dict[str, list[CallState]], type: str) -> None:
    future = make_executor(type=type, max_workers=1).options(retries=1, backoff=0).submit(fail_once)
    assert future.result(20) == 2
    found = settled(states, future)
    assert found == [CallState.QUEUED, CallState.RUNNING, CallState.SCHEDULED, *ONCE]


def test_one_that_waits_for_its_time(make_executor: MakeExecutor, states: dict[str, list[CallState]]) -> None:
    future = make_executor(max_workers=1).submit_later(0.01, int, "3")
    assert future.result(20) == 3
    assert settled(states, future) == [CallState.SCHEDULED, *ONCE]


def test_one_that_is_cancelled_while_it_waits(make_executor: MakeExecutor, states: dict[str, list[CallState]]) -> None:
    executor, go_on = make_executor(max_workers=1), threading.Event()
    first, second, later = executor.submit(go_on.wait), executor.submit(int), executor.submit_later(60, int)
    assert second.cancel()
    assert later.cancel()
    go_on.set()
    first.result(20)
    assert settled(states, second) == [CallState.QUEUED, CallState.SETTLED]
    assert settled(states, later) == [CallState.SCHEDULED, CallState.SETTLED]


def test_settled_is_final_and_other_steps_are_in_the_table(make_executor: MakeExecutor) -> None:
    executor = make_executor()
    _, app_executor = executor._app_executor()
    for state, following in itertools.product(CallState, CallState):
        future: Any = FutureProxy.__new__(FutureProxy)
        job: Any = type("Job", (), {"id": "x"})
        call = Call(future, job, int, (), {}, None, app_executor.channel)  # type: ignore[arg-type]
        call.state = state
        if state is CallState.SETTLED:
            assert not call.enter(following)
            assert call.state is CallState.SETTLED
        elif following is CallState.SETTLED or following in _TRANSITIONS[state]:
            assert call.enter(following)
            assert call.state is following
        else:
            with pytest.raises(RuntimeError, match=f"is {state.name} and cannot become {following.name}"):
                call.enter(following)


def test_a_call_that_is_settled_just_when_it_moves_on() -> None:
    seen = itertools.chain([CallState.QUEUED], itertools.repeat(CallState.SETTLED))

    class SettledMeanwhile(Call):
        __slots__ = ()
        state: Any = property(lambda self: next(seen), lambda self, state: None)

    assert SettledMeanwhile.__new__(SettledMeanwhile).enter(CallState.RUNNING)
