"""``current_job``, ``track`` and ``checkpoint``, inside and outside of jobs."""

from __future__ import annotations

import contextvars
import inspect
import threading
import time
from typing import Any

import pytest

from flask_executor import Executor, JobExit, JobStopped, checkpoint, current_job, track
from flask_executor.jobs.current import RunningJob, running_job
from flask_executor.jobs.model import JobState, JobStatus
from flask_executor.testing.contract.fixtures import MakeExecutor


def test_outside_of_a_job() -> None:
    with pytest.raises(RuntimeError, match="only there inside a job"):
        current_job.update(progress=0.5)
    with pytest.raises(RuntimeError, match=r"track\(\) and checkpoint\(\)"):
        _ = current_job.id
    assert running_job() is None
    checkpoint()
    assert list(track(range(3), message="counting")) == [0, 1, 2]
    assert inspect.ismodule(current_job) is False, "whoever looks at all names of a module is not harmed"


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan"), 50])
def test_progress_is_a_share(executor: Executor, progress: float) -> None:
    with pytest.raises(ValueError, match="must be a number from 0 to 1: done / total"):
        executor.submit(lambda: current_job.update(progress=progress)).result(10)


def test_what_is_left_out_of_an_update_stays(executor: Executor) -> None:
    def job() -> None:
        current_job.update(0.5, "half", pages=1)
        current_job.update(lines=2)
        current_job.update(message="more")

    future = executor.submit(job)
    future.result(10)
    assert (future.progress, future.message, future.meta) == (0.5, "more", {"pages": 1, "lines": 2})


def test_a_record_does_not_change(executor: Executor) -> None:
    future = executor.submit(lambda: current_job.update(pages=1))
    future.result(10)
    record = future.record()
    with pytest.raises(TypeError):
        record.meta["pages"] = 2  # type: ignore[index]


def test_track_without_a_length(executor: Executor) -> None:
    future = executor.submit(lambda: sum(track(number for number in range(5))))
    assert future.result(10) == 10
    assert (future.progress, future.meta) == (None, {"done": 5, "total": None})
    future = executor.submit(lambda: sum(track((number for number in range(5)), total=10)))
    future.result(10)
    assert future.progress == 0.5


def test_it_is_that_of_the_innermost_job(make_executor: MakeExecutor) -> None:
    executor = make_executor(max_workers=2)

    def outer() -> tuple[str, str, str]:
        inner = executor.submit(lambda: current_job.id)
        return current_job.id, inner.result(10), inner.job_id

    own, inner, inner_id = executor.submit(outer).result(10)
    assert inner == inner_id != own


def test_a_thread_that_a_job_starts_can_speak_for_it(executor: Executor) -> None:
    def job() -> None:
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(lambda: current_job.update(0.75),))
        thread.start()
        thread.join()

    future = executor.submit(job)
    future.result(10)
    assert future.progress == 0.75


def test_every_call_of_a_chunk_is_in_the_job(executor: Executor) -> None:
    ids = list(executor.map(lambda _: current_job.id, range(6), chunksize=3))
    assert len(set(ids)) == 2


class TestInterrupt:
    """The exception that forces a job out of its thread strikes there, once, and nowhere else."""

    def test_it_strikes_the_job(self) -> None:
        running = RunningJob(JobState("spin"))
        threading.Timer(0.05, running.interrupt).start()

        def spin() -> None:
            while True:
                pass

        with pytest.raises(JobExit):
            contextvars.copy_context().run(running.call, spin)
        assert running.interrupted
        assert not running.interrupt(), "once"

    def test_it_never_strikes_what_comes_after(self) -> None:
        struck = 0
        for round_number in range(2000):
            running = RunningJob(JobState("short"))
            go = threading.Event()

            def strike(running: RunningJob = running, go: threading.Event = go) -> None:
                go.wait()
                running.interrupt()

            thread = threading.Thread(target=strike)
            thread.start()
            go.set()
            try:
                contextvars.copy_context().run(running.call, sum, range(round_number % 50))
            except JobExit:
                running.uninterruptible()
                struck += 1
            # From here on an exception would end the test.
            thread.join()
            sum(range(100))
        assert struck < 2000

    def test_jobs_of_one_thread(self, make_executor: MakeExecutor) -> None:
        executor = make_executor(max_workers=1)

        def job(seconds: float) -> float:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass
            return seconds

        futures: list[Any] = [executor.submit(job, 0.0005) for _ in range(600)]
        stopped = futures[::2]
        for future in stopped:
            future.stop(grace=0)
        for future in futures:
            error = None if future.cancelled() else future.exception(10)
            assert error is None or (isinstance(error, JobStopped) and future in stopped)
            # Stopped: it began just then, and left by itself before it was interrupted.
            over = (JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.STOPPED, JobStatus.KILLED)
            assert future.status in over
        assert executor.submit(job, 0).result(10) == 0


def test_being_woken_is_not_being_asked_to_leave() -> None:
    """What wakes an attempt may come late, when the next one runs already."""
    running = RunningJob(JobState("waits"))
    running.wake()
    running.sleep(0)
    assert not running.stop_requested
    running.request_stop(JobStatus.TIMED_OUT)
    with pytest.raises(JobExit):
        running.sleep(60)
