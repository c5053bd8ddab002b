from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import pytest
from flask import Flask, current_app, request
from tasks import add, fail

from flask_executor import Executor, Job, JobStatus, job_failed, job_finished, job_queued, job_started
from flask_executor.jobs.model import JobState, new_id
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, run_in_threads, wait_until


def test_every_step_is_legal_or_refused() -> None:
    job = JobState("render")
    with pytest.raises(RuntimeError, match="is queued and cannot become succeeded"):
        job.end(JobStatus.SUCCEEDED)
    job.start()
    with pytest.raises(RuntimeError, match="cannot become cancelled"):
        job.end(JobStatus.CANCELLED)
    job.end(JobStatus.FAILED, ValueError("no paper"))
    for status in JobStatus:
        with pytest.raises(RuntimeError, match="is failed and cannot become"):
            job.end(status)
    assert job.record().error == "ValueError: no paper"


def test_statuses_are_strings() -> None:
    assert JobStatus("failed") == "failed"
    assert f"{JobStatus.FAILED}" == "failed"
    assert JobStatus("lost") is JobStatus.LOST
    assert [status for status in JobStatus if status.ended] == [
        "succeeded",
        "failed",
        "stopped",
        "killed",
        "timed_out",
        "lost",
        "cancelled",
    ]


def test_an_error_that_cannot_be_printed() -> None:
    class TornError(Exception):
        def __str__(self) -> str:
            raise TypeError

    job = JobState("render")
    job.start()
    job.end(JobStatus.FAILED, TornError())
    assert "TornError" in (job.record().error or "")


def test_ids_are_unique_over_threads() -> None:
    made: list[str] = []
    run_in_threads(8, lambda: made.extend(new_id() for _ in range(2000)))
    assert len(set(made)) == 16_000
    assert {len(job_id) for job_id in made} == {24}


def test_the_record_of_a_job_is_frozen_and_complete(executor: Executor) -> None:
    before = time.time()
    future = executor.submit_stored("sum", add, 1)
    future.result()
    record = executor.jobs.get(future.job_id)
    assert record is not None
    assert (record.name, record.key, record.owner, record.status, record.error) == (
        "add",
        "sum",
        None,
        "succeeded",
        None,
    )
    assert record.started_at is not None
    assert record.ended_at is not None
    assert before <= record.queued_at <= record.started_at <= record.ended_at <= time.time()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.status = JobStatus.LOST  # type: ignore[misc]


def test_records_are_bounded_and_hold_no_results(make_executor: MakeExecutor) -> None:
    class Result:
        alive = 0

        def __init__(self) -> None:
            Result.alive += 1

        def __del__(self) -> None:
            Result.alive -= 1

    executor = make_executor(max_workers=1, store_max_records=5)
    for _ in range(8):
        executor.submit(Result)
    first = executor.submit_stored("old", int)
    for _ in range(4):
        executor.submit(int)
    drain(executor)
    assert len(executor.jobs.list()) == 5
    assert executor.jobs.find("old") == first.record()
    executor.submit(int)
    drain(executor)
    assert executor.jobs.find("old") is None
    assert wait_until(lambda: Result.alive == 0)


class Listener:
    """Notes every signal of one executor."""

    def __init__(self, executor: Executor) -> None:
        self.seen: list[tuple[str, Job, str, str]] = []
        self._receivers = [
            signal.connect_via(executor)(self._note(signal.name))
            for signal in (job_queued, job_started, job_finished, job_failed)
        ]

    def _note(self, name: str) -> Any:
        def receive(sender: Any, job: Job) -> None:
            self.seen.append((name, job, current_app.name, request.path))

        return receive

    def of(self, future: Any) -> list[tuple[str, str]]:
        return [(name, job.status) for name, job, _, _ in self.seen if job.id == future.job_id]


class TestSignals:
    def test_tell_the_life_of_a_job_inside_its_contexts(self, app: Flask, executor: Executor) -> None:
        listener = Listener(executor)
        with app.test_request_context("/here"):
            good, bad = executor.submit(add, 1), executor.submit(fail)
            drain(executor)
        assert listener.of(good) == [
            ("job-queued", "queued"),
            ("job-started", "running"),
            ("job-finished", "succeeded"),
        ]
        assert listener.of(bad) == [
            ("job-queued", "queued"),
            ("job-started", "running"),
            ("job-failed", "failed"),
            ("job-finished", "failed"),
        ]
        assert {(app_name, path) for _, _, app_name, path in listener.seen} == {("shop", "/here")}
        bad.exception()

    def test_of_a_cancelled_job(self, app: Flask, make_executor: MakeExecutor) -> None:
        executor = make_executor(max_workers=1)
        go = threading.Event()
        executor.submit(go.wait, 10)
        listener = Listener(executor)
        with app.test_request_context("/"):
            future = executor.submit(fail)
            future.cancel()
        assert listener.of(future) == [("job-queued", "queued"), ("job-finished", "cancelled")]
        go.set()

    def test_only_of_their_executor(self, app: Flask, executor: Executor, make_executor: MakeExecutor) -> None:
        listener = Listener(executor)
        with app.test_request_context("/"):
            make_executor(name="other").submit(add, 1).result()
        assert listener.seen == []

    def test_a_receiver_that_leaves_takes_nothing_along(self, executor: Executor) -> None:
        def leave(sender: Any, job: Job) -> None:
            raise SystemExit

        job_queued.connect(leave, executor)
        with pytest.raises(SystemExit):
            executor.submit_stored("k", add, 1)
        job_queued.disconnect(leave, executor)
        assert executor.futures.keys() == []
        assert executor.wait(10)
        assert executor.submit_stored("k", add, 2).result() == 2

    def test_are_sent_in_the_jobs_app(self, app: Flask, make_executor: MakeExecutor) -> None:
        executor = make_executor(max_workers=1)
        go = threading.Event()
        executor.submit(go.wait, 10)
        seen: list[str] = []

        def note(sender: Any, job: Job) -> None:
            seen.append(current_app.name)

        future = executor.submit(fail)
        job_finished.connect(note, executor)
        with Flask("other").app_context():
            future.cancel()
        assert seen == ["shop"]
        job_finished.disconnect(note, executor)
        go.set()

    def test_those_of_other_executors_cost_no_context(
        self, app: Flask, executor: Executor, make_executor: MakeExecutor
    ) -> None:
        listener = Listener(make_executor(name="other"))
        left: list[object] = []
        app.teardown_appcontext(left.append)
        executor.submit(add, 1).result()
        executor.wait(10)
        assert left == [None]
        assert listener.seen == []

    def test_a_receiver_that_fails_disturbs_nobody(self, executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
        def receive(sender: Any, job: Job) -> None:
            raise ValueError("receiver")

        for signal in (job_queued, job_started, job_finished):
            signal.connect(receive, executor)
        assert executor.submit(add, 1).result() == 1
        drain(executor)
        assert caplog.text.count("ValueError: receiver") == 3
