"""Jobs that do harm, on purpose or not, harm nobody but themselves."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tasks
from processes import freeze
from tasks import add, spin, wait_for

from flask_executor import Executor, FutureProxy, JobStopped, JobTimeout, NotPicklable, WorkerLost
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until


@pytest.fixture
def executor(make_executor: MakeExecutor) -> Iterator[Executor]:
    executor = make_executor(type="process", max_workers=1)
    yield executor
    assert executor.submit(add, 1, 1).result(10) == 2, "the pool is as good as new"


def test_log_records_that_cannot_be_rebuilt(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    assert executor.submit(tasks.log_what_cannot_be_rebuilt).result(10) == "logged"
    drain(executor)
    assert "arrives without its fields: ValueError: torn" in caplog.text
    assert [record.getMessage() for record in caplog.records if record.name == "shop.harm"] == ["torn", "shy"]
    assert caplog.records[-1].shy == "<Shy>"  # type: ignore[attr-defined]


def test_a_factory_for_log_records_that_expects_a_name(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()

    def factory(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(name, *args, **kwargs)
        record.top = name.split(".")[0]
        return record

    logging.setLogRecordFactory(factory)
    try:
        executor.submit(tasks.log_something).result(10)
        drain(executor)
    finally:
        logging.setLogRecordFactory(before)
    assert {record.top for record in caplog.records} == {"shop"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", ["exit", "raise", "return"])
def test_a_job_that_forks(executor: Executor, what: str, caplog: pytest.LogCaptureFixture) -> None:
    futures: list[FutureProxy[Any]] = [executor.submit(tasks.fork_and, what)]
    futures += [executor.submit(add, n) for n in range(5)]
    assert [future.result(10) for future in futures] == ["parent", 0, 1, 2, 3, 4]
    assert futures[0].progress is None
    assert caplog.text == ""


def test_children_of_jobs_that_log(executor: Executor) -> None:
    assert executor.submit(tasks.children_that_log, 3).result(20) == 0
    drain(executor)


def test_children_of_jobs_can_be_terminated(executor: Executor) -> None:
    assert executor.submit(tasks.terminate_a_child).result(20) == -signal.SIGTERM


def test_a_result_that_ends_whoever_rebuilds_it(executor: Executor) -> None:
    future = executor.submit(tasks.rude_result)
    with pytest.raises(NotPicklable, match="cannot be rebuilt here: SystemExit: rude"):
        future.result(10)
    assert future.status == "failed"


def test_a_report_that_cannot_be_shown(executor: Executor) -> None:
    future = executor.submit(tasks.report_what_cannot_be_shown)
    future.result(10)
    assert (future.progress, future.meta) == (0.5, {"shy": "<Shy>"})
    stopped: FutureProxy[Any] = executor.submit(tasks.tracked, [1] * 10_000, 0.01)
    assert wait_until(stopped.running)
    stopped.stop(grace=20)
    assert isinstance(stopped.exception(10), JobStopped), "the worker still hears"


def ended_with(future: FutureProxy[Any], expected: type[Exception], worker: int) -> str:
    """The status. The system may have given the call to the worker in the instant of its death."""
    error = future.exception(10)
    assert isinstance(error, expected) or (isinstance(error, WorkerLost) and error.pid == worker)
    return future.status


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.storm)])
def test_results_are_never_those_of_another_job(make_executor: MakeExecutor, rounds: int) -> None:
    """Calls are taken back in the middle of others that are taken by the worker; the storm makes that happen often."""
    executor = make_executor(type="process", max_workers=2)
    ended = threading.Event()

    def storm() -> None:
        while not ended.is_set():
            for future in executor.unfinished()[-6::2]:
                future.cancel()

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        for _ in range(rounds):
            futures = [executor.options(priority=n % 3).submit(add, n) for n in range(500)]
            for number, future in enumerate(futures):
                assert wait_until(future.done)
                assert future.cancelled() or future.result() == number
    finally:
        ended.set()
        thread.join()


def test_the_second_call_is_taken_while_the_first_is_taken_back(make_executor: MakeExecutor) -> None:
    executor = make_executor(type="process", max_workers=1)
    pid = executor.submit(tasks.pid).result(10)
    assert wait_until(lambda: not executor.unfinished())
    freeze(pid)
    futures = [executor.submit(add, number) for number in range(2)]
    dispatcher = executor._self._dispatcher
    (worker,) = dispatcher._workers
    with dispatcher._lock:
        first, second = worker.tasks
        assert worker.calls.recall() == {first.number, second.number}
        worker.calls.send(second.number, 1, second.parts)
        # As if the worker had taken the second in the middle: a race that is seldom.
        worker.calls.recall = lambda: {first.number}
        dispatcher._recall(worker)
        del worker.calls.recall
    os.kill(pid, signal.SIGCONT)
    assert {future.result(10) for future in futures} == {0, 1}


class TestStoppedWorkers:
    """Workers that the system has stopped: they read nothing, and do not know it."""

    @pytest.fixture
    def worker(self, executor: Executor) -> Iterator[int]:
        worker = executor.submit(tasks.pid).result(10)
        freeze(worker)
        yield worker
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)

    def test_submitting_and_stopping_never_blocks(self, executor: Executor, worker: int) -> None:
        def storm() -> None:
            for size in (10, 20_000, 300_000) * 100:
                executor.submit(tasks.length, b"x" * size).stop(grace=0)

        thread = threading.Thread(target=storm, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()

    def test_a_stop_is_not_forgotten_when_the_job_goes_to_another_worker(self, executor: Executor, worker: int) -> None:
        future = executor.submit(add, 1)
        assert wait_until(future.running)
        assert future.stop(grace=60)
        os.kill(worker, signal.SIGKILL)
        assert ended_with(future, JobStopped, worker) in ("stopped", "lost")

    def test_a_timeout_is_a_timeout(self, executor: Executor, worker: int) -> None:
        future = executor.options(timeout=0.05).submit(add, 1)
        time.sleep(0.1)
        os.kill(worker, signal.SIGKILL)
        assert ended_with(future, JobTimeout, worker) in ("timed_out", "lost")

    def test_shutdown_cancels_what_is_queued_and_not_what_is_running(self, executor: Executor, worker: int) -> None:
        running, queued = executor.submit(add, 1), executor.submit(add, 2)
        assert running.running()
        executor.shutdown(wait=False, cancel_futures=True)
        assert queued.cancelled()
        assert running.running()
        os.kill(worker, signal.SIGCONT)
        assert running.result(10) == 1
        assert executor.app is not None
        executor.init_app(executor.app)


def test_a_timeout_that_is_over_at_once_never_looks_like_a_cancellation(make_executor: MakeExecutor) -> None:
    executor = make_executor(type="process", max_workers=2, stop_grace=0)
    futures = [executor.options(timeout=1e-6, retries=n % 2).submit(spin) for n in range(60)]
    for future in futures:
        error = future.exception(20)
        assert isinstance(error, JobTimeout), error
        assert future.status == "timed_out"


def test_arguments_are_those_of_the_submission_in_every_attempt(executor: Executor) -> None:
    items = [1]
    future = executor.options(retries=1, backoff=0.2).submit(tasks.extend_and_fail, items)
    items.append(2)
    assert future.result(10) == [1]


@pytest.mark.parametrize("rounds", [30, pytest.param(150, marks=pytest.mark.storm)])
@pytest.mark.parametrize("backend", ["thread", "process"])
def test_a_stop_is_never_lost_in_a_retry(make_executor: MakeExecutor, backend: str, rounds: int) -> None:
    executor = make_executor(type=backend, max_workers=2)
    for round_number in range(rounds):
        future = executor.options(retries=10**9).submit(tasks.fail)
        if round_number % 2:
            time.sleep(0.0005 * (round_number % 7))
        assert future.stop(grace=60) or future.done()
        assert wait_until(future.done, 10), future.record()
        assert future.status in ("cancelled", "failed", "stopped")


def test_a_worker_whose_words_make_no_sense_is_replaced(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    future = executor.submit(write_to_the_stream)
    assert isinstance(future.exception(10), WorkerLost)
    assert "cannot be understood, and is killed" in caplog.text


def write_to_the_stream() -> None:
    """Finds the line to the parent, and writes nonsense."""
    import gc
    import time

    from flask_executor.backends.process.reporter import Reporter

    (reporter,) = [each for each in gc.get_objects() if isinstance(each, Reporter)]
    reporter._stream.socket.sendall(b"\xff" * 64)
    time.sleep(20)


@pytest.mark.skipif(sys.platform != "linux", reason="counts its sockets in /proc")
def test_a_worker_that_cannot_be_started_leaves_no_sockets(executor: Executor) -> None:
    before, *after = executor.submit(count_sockets_of_failed_starts).result(10)
    assert after == [before] * 13


def count_sockets_of_failed_starts() -> list[int]:
    """The open sockets of this process, first and after each start of a worker with too few descriptors."""
    import multiprocessing
    import os
    import resource

    from flask_executor.backends.process.worker_main import WorkerSettings
    from flask_executor.backends.process.worker_process import WorkerProcess

    def count_sockets() -> int:
        open_files = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
        return sum(os.path.islink(file) and os.readlink(file).startswith("socket:") for file in open_files)  # noqa: PTH114, PTH115

    settings = WorkerSettings(app=None, app_import="", app_config_key="", initializers=(), log_levels={})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(1)
    os.close(lowest)
    counts, errors = [count_sockets()], []
    for spare in range(13):  # one less than it takes: 9 for the sockets, and 4 of multiprocessing's
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
        try:
            WorkerProcess(multiprocessing.get_context("fork"), settings)
        except OSError as error:
            errors.append(error)  # its traceback keeps from the garbage collector what was made
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        counts.append(count_sockets())
    assert len(errors) == 13
    return counts


for _job in (write_to_the_stream, count_sockets_of_failed_starts):
    _job.__module__ = "tasks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    for job in (write_to_the_stream, count_sockets_of_failed_starts):
        monkeypatch.setattr(tasks, job.__name__, job, raising=False)


def test_what_finalizers_do_in_the_middle(make_executor: MakeExecutor) -> None:
    """Handles that are dropped log, and apps that are dropped shut down, in whatever thread collects the garbage."""
    import gc

    executor = make_executor(type="process", max_workers=2)
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        futures: list[Callable[[], object]] = [executor.submit(tasks.fail).done for _ in range(100)]
        del futures
        assert list(executor.map(add, range(50))) == list(range(50))
        drain(executor)
    finally:
        gc.set_threshold(*before)


def test_a_neighbour_of_a_killed_large_call_is_unharmed(make_executor: MakeExecutor, tmp_path: Path) -> None:
    executor = make_executor(type="process", max_workers=2)
    neighbour = executor.submit(wait_for, str(tmp_path / "go"))
    for _ in range(20):
        executor.submit(tasks.length, b"x" * 500_000).stop(grace=0)
    (tmp_path / "go").touch()
    assert neighbour.result(10) is None
    assert executor.submit(tasks.length, b"x" * 500_000).result(10) == 500_000


def test_a_worker_that_hangs_while_it_starts(
    make_executor: MakeExecutor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = tmp_path / "first"

    def hang_once() -> None:  # in the first worker, as if it had been forked with a lock held
        with contextlib.suppress(FileExistsError):
            first.touch(exist_ok=False)
            threading.Event().wait()

    monkeypatch.setattr("flask_executor.backends.process.worker_main.detach_from_parent", hang_once)
    monkeypatch.setattr("flask_executor.backends.process.dispatcher._START_TIMEOUT", 0.2)
    executor = make_executor(type="process", max_workers=1, start_method="fork")
    assert executor.submit(add, 1, 1).result(20) == 2
    assert "it hung while it was starting" in caplog.text
