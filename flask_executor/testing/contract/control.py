"""What every backend promises about progress, messages, stop, timeout, retry, priority and logs."""

from __future__ import annotations

import concurrent.futures
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flask_executor.exceptions import JobStopped, JobTimeout, NotPicklable, QueueFull
from flask_executor.executor.extension import Executor
from flask_executor.futures import FutureProxy
from flask_executor.jobs.model import Job
from flask_executor.signals import job_failed, job_finished, job_started
from flask_executor.testing import drain, jobs
from flask_executor.testing.contract.fixtures import (
    BackendFixtures,
    MakeExecutor,
    never_waits,
    run_in_threads,
    skip_if_nothing_waits,
    skip_without_force,
    wait_until,
)
from flask_executor.testing.jobs import (
    about_itself,
    add,
    append,
    fail,
    fail_until,
    log_something,
    sleep,
    tracked,
    until_stopped,
    wait_for,
)

Start = Callable[..., FutureProxy[Any]]


def workers_of(executor: Executor) -> int:
    """How many jobs run at a time."""
    count: int = executor.workers if executor.engine else executor.capacity
    return count


def one(executor: Executor, future: FutureProxy[Any]) -> Job:
    record = executor.jobs.get(future.job_id)
    assert record is not None
    return record


def check_records(records: list[Any], job_id: str) -> None:
    formats = logging.Formatter("%(job_id)s %(job_key)s %(message)s")
    assert [record.getMessage() for record in records] == ["page 0", "page 1", "failed"]
    assert {(record.job_id, record.job_key) for record in records} == {(job_id, "pages")}
    assert records[1].page == 1
    assert formats.format(records[0]) == f"{job_id} pages page 0"
    assert "ValueError: torn" in formats.format(records[2])
    assert all(record.process and record.threadName for record in records)


class ControlContract(BackendFixtures):
    """Progress, messages, stop, force, timeouts, retries, priorities, jobs for later, and the log of each job.

    The fixture ``executor_config`` says which backend is tested: a dict of what is in the configuration, without
    ``EXECUTOR_``.
    """

    @pytest.fixture
    def start(self, executor: Executor) -> Start:
        """Submits a job and returns its handle at once, also where ``submit`` runs it."""

        def start(fn: Callable[..., Any], *args: Any, **options: Any) -> FutureProxy[Any]:
            if not never_waits(executor):
                return executor.options(**options).submit(fn, *args)
            key = f"job {time.monotonic()}"
            threading.Thread(target=executor.options(key=key, **options).submit, args=(fn, *args)).start()
            assert wait_until(lambda: executor.futures.get(key) is not None)
            future = executor.futures.get(key)
            assert future is not None
            return future

        return start

    @pytest.fixture
    def path(self, tmp_path: Path) -> str:
        return str(tmp_path / "file")

    def test_what_a_job_reports_can_be_read_while_it_runs(self, executor: Executor, start: Start, path: str) -> None:
        future = start(jobs.report_and_wait, path)
        assert wait_until(lambda: future.progress == 0.5 and future.meta["pages"] == 3)
        assert future.meta["done"] == (repr({"pages"}) if executor.engine else {"pages"}), "a store keeps what JSON has"
        assert future.message == "a quarter"
        record = executor.jobs.get(future.job_id)
        assert record is not None
        assert (record.status, record.progress, record.message, record.attempt) == ("running", 0.5, "a quarter", 1)
        assert record.meta["pages"] == 3
        Path(path).touch()
        assert future.result(10) == future.job_id
        assert (future.progress, future.message) == (1.0, "all"), "the last report always arrives"

    def test_a_job_knows_itself(self, executor: Executor) -> None:
        future = executor.options(name="census", key=("a", 1), owner="ada").submit(about_itself)
        assert future.result() == (future.job_id, ("a", 1), "census", 1, "ada", False)

    def test_track(self, executor: Executor) -> None:
        future = executor.submit(tracked, list(range(10)))
        assert future.result() == 45
        drain(executor)
        assert (future.progress, future.message, dict(future.meta)) == (1.0, "adding", {"done": 10, "total": 10})

    class TestMessages:
        def test_they_arrive_in_order(self, start: Start) -> None:
            future = start(jobs.receive, 100)
            assert wait_until(lambda: future.message == "receiving")
            for number in range(100):
                assert future.send("page", number)
            assert future.result(20) == [("page", number) for number in range(100)]

        def test_a_job_that_has_not_started_gets_them_when_it_does(self, executor: Executor, path: str) -> None:
            skip_if_nothing_waits(executor)
            blockers = [executor.submit(wait_for, path) for _ in range(workers_of(executor))]
            assert wait_until(lambda: all(blocker.running() for blocker in blockers))
            first, second = (executor.submit(jobs.receive, 3) for _ in range(2))
            for number, future in enumerate((second, first)):
                assert future.send("a", number)
                assert future.send("b", {"page": number})
            assert (first.status, second.status) == ("queued", "queued")
            Path(path).touch()
            for number, future in enumerate((second, first)):
                assert future.send("c")
                assert future.result(20) == [("a", number), ("b", {"page": number}), ("c", None)]

        def test_a_message_that_is_sent_right_after_the_submission(self, executor: Executor) -> None:
            skip_if_nothing_waits(executor)
            for number in range(5):
                future = executor.submit(jobs.receive, 1)
                assert future.send("page", number)
                assert future.result(20) == [("page", number)]

        def test_several_threads_may_send_at_once(self, start: Start) -> None:
            future, senders = start(jobs.receive, 100), iter(range(4))

            def send() -> None:
                sender = next(senders)
                for number in range(25):
                    assert future.send(f"sender {sender}", number)

            run_in_threads(4, send)
            received = future.result(20)
            for sender in range(4):
                assert [body for type, body in received if type == f"sender {sender}"] == list(range(25))

        def test_a_job_that_has_ended_gets_none(self, executor: Executor) -> None:
            future = executor.submit(add, 1)
            assert future.result(10) == 1
            assert not future.send("page", 1)

        def test_a_body_that_cannot_be_pickled(self, executor: Executor, start: Start) -> None:
            future, body = start(jobs.receive, 1), threading.Lock()
            if not executor.remote:
                assert future.send("lock", body)
                [(_, received)] = future.result(10)
                assert received is body, "in the same process it need not be"
                return
            with pytest.raises(NotPicklable, match="The message for job receive"):
                future.send("lock", body)
            assert future.send("page", 1)
            assert future.result(10) == [("page", 1)], "the job does not notice"

        def test_no_message_in_time(self, executor: Executor) -> None:
            assert executor.submit(jobs.receive_in_time, 0, 0.05).result(10) == [None, None]

        def test_a_job_that_waits_for_one_can_be_stopped(self, start: Start) -> None:
            future = start(jobs.receive, 1)
            assert wait_until(lambda: future.message == "receiving")
            assert future.stop(grace=60)
            assert isinstance(future.exception(10), JobStopped)
            assert future.status == "stopped"

    class TestStop:
        def test_a_job_leaves_at_a_checkpoint_and_cleans_up(self, executor: Executor, start: Start, path: str) -> None:
            future = start(until_stopped, path)
            assert wait_until(Path(path + ".started").exists)
            assert future.stop()
            with pytest.raises(JobStopped, match="was stopped") as info:
                future.result(10)
            assert isinstance(info.value, concurrent.futures.CancelledError)
            assert future.status == "stopped"
            assert future.stop_requested
            assert not future.cancelled()
            assert Path(path).read_text() == "cleaned up"
            assert not future.stop(), "it has ended"
            assert executor.submit(add, 1).result(10) == 1

        def test_sleep_wakes_at_once(self, start: Start, path: str) -> None:
            future = start(jobs.wait_for, path)
            assert wait_until(future.running)
            begin = time.monotonic()
            future.stop()
            assert isinstance(future.exception(10), JobStopped)
            assert time.monotonic() - begin < 2

        def test_track_is_a_checkpoint(self, start: Start) -> None:
            future = start(tracked, list(range(100_000)), 0.001)
            assert wait_until(lambda: (future.progress or 0) > 0)
            future.stop()
            assert isinstance(future.exception(10), JobStopped)
            assert future.meta["done"] < 100_000

        def test_a_job_that_refuses_is_running_with_stop_requested(
            self, executor: Executor, start: Start, path: str
        ) -> None:
            future = start(jobs.swallow_everything, path)
            assert wait_until(Path(f"{path}.started").exists)
            future.stop(grace=60)
            assert wait_until(lambda: one(executor, future).stop_requested)
            assert one(executor, future).status == "running"
            Path(path).touch()
            assert future.result(10) == "stayed"
            assert future.status == "succeeded", "a status does not lie"

        def test_nobody_is_told_of_a_failure(
            self, executor: Executor, start: Start, path: str, caplog: pytest.LogCaptureFixture
        ) -> None:
            seen: list[str] = []

            def finished(_: Any, job: Any) -> None:
                seen.append(job.status)

            def failed(_: Any, job: Any) -> None:
                seen.append("failure")

            with job_finished.connected_to(finished, executor), job_failed.connected_to(failed, executor):
                future = start(until_stopped, path)
                assert wait_until(Path(path + ".started").exists)
                future.stop()
                drain(executor)
            del future
            assert seen == ([] if executor.engine else ["stopped"]), "an engine's workers tell it, where they are"
            assert caplog.text == ""

        def test_grace_must_be_seconds(self, executor: Executor) -> None:
            with pytest.raises(ValueError, match="grace is -1"):
                executor.submit(add, 1).stop(grace=-1)

    class TestForce:
        def test_a_job_that_never_looks_is_killed(
            self, executor: Executor, start: Start, path: str, tmp_path: Path
        ) -> None:
            skip_without_force(executor)
            if executor.capacity == 1:
                pytest.skip("with this backend a job has no neighbour")
            future, neighbour = start(jobs.spin, path), start(wait_for, str(tmp_path / "go"))
            assert wait_until(Path(path).exists)
            assert wait_until(neighbour.running)
            begin = time.monotonic()
            assert future.stop(grace=0.2)
            with pytest.raises(JobStopped, match="was killed"):
                future.result(10)
            assert time.monotonic() - begin < 2
            assert future.status == "killed"
            (tmp_path / "go").touch()
            assert neighbour.result(10) is None
            assert executor.submit(add, 1).result(10) == 1

        def test_a_job_that_is_stopped_as_it_begins_does_not_begin(self, executor: Executor, path: str) -> None:
            def stop(_: Any, job: Any) -> None:
                future = executor.futures.get(job.key)
                assert future is not None
                future.stop(grace=0)

            with job_started.connected_to(stop, executor):
                future = executor.submit_stored("report", jobs.spin, path)
                if executor.engine:  # there it is its worker that hears of it
                    assert wait_until(future.running)
                    future.stop(grace=0)
                assert isinstance(future.exception(10), JobStopped)
            assert future.status in ("stopped", "killed")

    class TestTimeout:
        def test_a_job_that_takes_too_long_leaves(self, executor: Executor, start: Start, path: str) -> None:
            future = start(until_stopped, path, timeout=0.2)
            error = future.exception(10)
            assert isinstance(error, JobTimeout)
            assert isinstance(error, TimeoutError)
            assert "timeout of 0.2 s" in str(error)
            assert future.status == "timed_out"
            record = executor.jobs.get(future.job_id)
            assert record is not None
            assert record.error is not None
            assert record.error.startswith("flask_executor.exceptions.JobTimeout")

        def test_one_that_never_looks_is_forced(self, make: MakeExecutor) -> None:
            executor = make(timeout=0.2, stop_grace=0.1)
            skip_without_force(executor)
            future = executor.submit(jobs.spin)
            assert isinstance(future.exception(10), JobTimeout)
            assert future.status == "timed_out"
            assert executor.submit(add, 1).result(10) == 1

        def test_config_sets_the_default_and_options_lift_it(self, make: MakeExecutor) -> None:
            executor = make(timeout=0.3)
            assert executor.options(timeout=math.inf).submit(sleep, 0.5).result(10) == 0.5

        def test_it_is_called_off_in_time(self, executor: Executor) -> None:
            futures = [executor.options(timeout=0.4).submit(add, n) for n in range(20)]
            assert [future.result() for future in futures] == list(range(20))
            time.sleep(0.5)
            assert {future.status for future in futures} == {"succeeded"}

    class TestRetry:
        def test_until_it_succeeds(self, executor: Executor, path: str) -> None:
            started: list[int] = []

            def note(_: Any, job: Any) -> None:
                started.append(job.attempt)

            with job_started.connected_to(note, executor):
                future = executor.options(retries=3, backoff=0.01).submit(fail_until, path, 3)
                assert future.result(10) == 3
                drain(executor)
            assert Path(path).read_text().split() == ["1", "2", "3"]
            assert started == ([] if executor.engine else [1, 2, 3])
            assert future.record().attempt == 3
            assert future.record().error is None

        def test_until_there_are_no_more(self, executor: Executor, path: str) -> None:
            future = executor.options(retries=2).submit(fail_until, path, 9)
            with pytest.raises(ConnectionError, match="attempt 3"):
                future.result(10)
            assert future.status == "failed"
            assert Path(path).read_text().split() == ["1", "2", "3"]

        def test_only_after_certain_errors(self, executor: Executor, path: str) -> None:
            for options in ({"retry_on": ValueError}, {"no_retry_on": (OSError,)}):
                future = executor.options(retries=2, **options).submit(fail_until, path, 9)
                with pytest.raises(ConnectionError, match="attempt 1"):
                    future.result(10)

        def test_what_waits_for_its_retry_is_queued_and_can_be_stopped(self, executor: Executor, path: str) -> None:
            skip_if_nothing_waits(executor)
            future = executor.options(retries=2, backoff=60).submit(fail_until, path, 9)
            assert wait_until(lambda: future.record().attempt == 2)
            assert future.status == "queued"
            assert future.record().error == "ConnectionError: attempt 1"
            assert future.stop()
            assert future.status == "cancelled"
            drain(executor)

        def test_shutdown_gives_up_retries(self, executor: Executor, path: str) -> None:
            skip_if_nothing_waits(executor)
            future = executor.options(retries=2, backoff=60).submit(fail_until, path, 9)
            assert wait_until(lambda: future.record().attempt == 2)
            executor.shutdown(wait=not executor.engine)
            if executor.engine:  # which does not need this process
                assert future.status == "queued"
                assert future.cancel()
                return
            with pytest.raises(ConnectionError, match="attempt 1"):
                future.result(5)
            assert future.status == "failed"

        def test_a_job_that_was_stopped_is_not_run_again(self, executor: Executor, start: Start, path: str) -> None:
            future = start(until_stopped, path, retries=5)
            assert wait_until(Path(path + ".started").exists)
            future.stop()
            assert isinstance(future.exception(10), JobStopped)
            assert future.record().attempt == 1

        def test_a_timeout_is_retried(self, executor: Executor) -> None:
            future = executor.options(retries=1, timeout=0.1).submit(tracked, [1] * 1000, 0.01)
            assert isinstance(future.exception(10), JobTimeout)
            assert (future.status, future.record().attempt) == ("timed_out", 2)

    def test_priority(self, make: MakeExecutor, tmp_path: Path) -> None:
        executor = make(max_workers=1)
        skip_if_nothing_waits(executor)
        order, go, end = tmp_path / "order", tmp_path / "go", tmp_path / "end"
        blockers = [executor.submit(wait_for, str(path)) for path in (go, *[end] * (workers_of(executor) - 1))]
        assert wait_until(lambda: all(blocker.running() for blocker in blockers))
        futures = [
            executor.options(priority=priority).submit(append, str(order), text)
            for priority, text in ((0, "c"), (0, "d"), (9, "a"), (-1, "e"), (1, "b"), (-1, "f"), (-9, "x"))
        ]
        assert futures.pop().cancel()
        go.touch()
        for future in futures:
            future.result(10)
        end.touch()
        assert order.read_text() == "abcdef"

    def test_a_full_queue_refuses(self, make: MakeExecutor, path: str) -> None:
        executor = make(max_workers=1, max_pending=2)
        skip_if_nothing_waits(executor)
        futures = [executor.submit(wait_for, path) for _ in range(workers_of(executor))]
        assert wait_until(lambda: all(future.running() for future in futures))
        futures += [executor.submit(wait_for, path) for _ in range(2)]
        with pytest.raises(QueueFull, match=r"EXECUTOR_MAX_PENDING allows \(2\)"):
            executor.submit(add, 1)
        futures.pop().cancel()
        if executor.engine:  # some take nothing off a queue: a worker has to
            Path(path).touch()
        # A job that has ended keeps its place until its callbacks have run, in whichever thread.
        assert wait_until(lambda: executor.health().waiting < 2 and len(executor.unfinished()) <= len(futures))
        drained = executor.submit(add, 1)
        Path(path).touch()
        assert drained.result(10) == 1
        for future in futures:
            future.result(10)

    def test_log_records_arrive_with_the_job_and_stay_with_it(
        self, executor: Executor, caplog: pytest.LogCaptureFixture
    ) -> None:
        future = executor.options(key="pages").submit(log_something, 2)
        job_id = future.result(10)
        drain(executor)
        records = [record for record in caplog.records if record.name == "shop.render"]
        if not executor.engine:  # whose workers have handlers of their own
            check_records(records, job_id)
        lines = executor.jobs.log(job_id)
        assert list(lines) == list(future.log())
        assert [(line.level, line.logger) for line in lines] == [("WARNING", "shop.render")] * 2 + [
            ("ERROR", "shop.render")
        ]
        assert lines[0].text == "page 0"
        assert lines[2].text == "failed"
        assert str(lines[2].trace).startswith("Traceback")

    def test_unknown_jobs_have_no_log(self, executor: Executor) -> None:
        assert list(executor.jobs.log("none")) == []

    def test_a_job_keeps_only_its_last_lines(self, executor: Executor) -> None:
        future = executor.submit(log_something, 600)
        future.result(10)
        lines = future.log()
        assert len(lines) == 500
        assert lines[-2].text == "page 599"

    def test_wrong_options_are_refused(self, executor: Executor) -> None:
        for options, says in (
            ({"timeout": 0}, "timeout is 0"),
            ({"timeout": -1.0}, "timeout is -1.0"),
            ({"retries": -1}, "retries is -1"),
            ({"retries": 1, "backoff": -2}, "backoff is -2"),
            ({"backoff": 2}, "backoff without retries"),
            ({"priority": 1.5}, "priority is 1.5"),
        ):
            with pytest.raises(ValueError, match=says):
                executor.options(**options)

    def test_leaving_without_being_asked_is_a_stop(self, executor: Executor) -> None:
        future = executor.submit(jobs.leave)
        with pytest.raises(JobStopped):
            future.result(10)
        assert future.status == "stopped"

    def test_a_failure_is_still_a_failure(self, executor: Executor) -> None:
        with pytest.raises(ValueError, match="no paper"):
            executor.options(timeout=5, priority=3).submit(fail).result(10)

    class TestLater:
        def test_a_job_that_has_its_time(self, executor: Executor) -> None:
            begin = time.time()
            future = executor.submit_later(1, add, 1, b=2)
            if not never_waits(executor):
                assert future.status == "queued"
            assert future.result(20) == 3
            started = future.record().started_at
            assert started is not None
            assert never_waits(executor) or started >= begin + 1

        def test_it_can_be_cancelled_meanwhile(self, executor: Executor, path: str) -> None:
            skip_if_nothing_waits(executor)
            future = executor.options(key="later").submit_later(60, append, path, "x")
            assert executor.futures.get("later") is not None
            assert future.cancel()
            assert future.status == "cancelled"

        def test_with_options(self, executor: Executor) -> None:
            assert executor.options(name="census").submit_later(0, about_itself).result(10)[2] == "census"

        def test_what_is_no_time_is_refused(self, executor: Executor) -> None:
            times: list[Any] = [-1, math.inf, math.nan, "soon"]
            for seconds in times:
                with pytest.raises(ValueError, match="seconds is"):
                    executor.submit_later(seconds, add, 1)
