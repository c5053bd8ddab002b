"""What an executor promises about records and keys, whatever store it has."""

from __future__ import annotations

import datetime
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, g

from flask_executor.exceptions import JobStopped, KeyExists, QueueFull, WorkerLost
from flask_executor.executor.extension import Executor
from flask_executor.futures import FutureProxy
from flask_executor.jobs.current import checkpoint, current_job
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.testing import drain
from flask_executor.testing.contract.fixtures import ExecutorFixtures, MakeExecutor, run_in_threads, wait_until
from flask_executor.testing.jobs import add, fail
from flask_executor.web.status import job_document

MakeStored = Callable[..., Executor]


class StoreContract(ExecutorFixtures):
    """Records, keys, flows and expiry, as an executor has them with this store. It need not be one that is shared.

    The fixture ``store_url`` says which: the value of ``EXECUTOR_STORE``, of a store with nothing in it.
    """

    @pytest.fixture
    def store_url(self) -> str:
        """The value of ``EXECUTOR_STORE``. To be overridden."""
        raise NotImplementedError(f"{type(self).__qualname__} has to override the fixture store_url")

    @pytest.fixture
    def make_stored(self, store_url: str, make_executor: MakeExecutor) -> MakeStored:
        def make(**config: Any) -> Executor:
            return make_executor(store=store_url, track="all", **{"max_workers": 4, **config})

        return make

    @pytest.fixture
    def executor(self, make_stored: MakeStored) -> Executor:
        return make_stored()

    @pytest.fixture
    def gate(self) -> Iterator[threading.Event]:
        gate = threading.Event()
        yield gate
        gate.set()

    def test_a_record_follows_its_job(self, executor: Executor, gate: threading.Event) -> None:
        future = executor.options(name="render", owner="ada").submit_stored("report", gate.wait, 10)
        assert wait_until(lambda: future.status == "running")
        job = executor.jobs.find("report")
        assert isinstance(job, Job)
        assert (job.id, job.name, job.key, job.owner) == (future.job_id, "render", "report", "ada")
        gate.set()
        assert future.result(10) is True
        assert job.status == "running", "a record is a moment"
        after = executor.jobs.get(job.id)
        assert after is not None
        assert after.status == "succeeded"
        assert after.ended_at is not None

    def test_unknown_ones(self, executor: Executor) -> None:
        assert executor.jobs.get("unknown") is None
        assert executor.jobs.find("unknown") is None
        assert not executor.jobs.expired("unknown")
        assert not executor.jobs.expired(key="unknown")
        assert list(executor.jobs.list()) == []
        assert list(executor.jobs.log("unknown")) == []
        assert executor.futures.done("unknown") is None
        assert executor.futures.pop("unknown") is None

    @pytest.mark.parametrize(
        "key", ["report", "=odd", "", 7, 7.5, True, b"bytes", ("user", 7, ("a", None)), "ключ*?[1]"]
    )
    def test_keys_of_all_kinds(self, executor: Executor, key: Any) -> None:
        future = executor.submit_stored(key, add, 1, 2)
        assert future.result(10) == 3
        assert executor.futures.keys() == [key]
        assert key in executor.futures
        assert executor.futures.result(key) == 3
        job = executor.jobs.find(key)
        assert job is not None
        assert job.key == key
        assert executor.futures.pop(key) is future
        assert executor.futures.keys() == []

    def test_equal_looking_keys_are_different(self, executor: Executor) -> None:
        for key in ("1", 1, ("1",), b"1"):
            executor.submit_stored(key, add, 1, 2)
        drain(executor)
        assert executor.futures.keys() == ["1", 1, ("1",), b"1"]

    def test_the_key_is_taken_until_popped(self, executor: Executor) -> None:
        first = executor.submit_stored("report", add, 1, 2)
        drain(executor)
        with pytest.raises(KeyExists, match="future_key 'report' already exists"):
            executor.submit_stored("report", fail, "must not run")
        assert executor.submit_once("report", fail, "must not run") is first
        assert executor.futures.pop("report") is first
        second = executor.submit_stored("report", add, 3, 4)
        assert second.result(10) == 7
        found = executor.jobs.find("report")
        assert found is not None
        assert found.id == second.job_id, "the youngest"
        assert executor.jobs.get(first.job_id) is not None, "the record stays"

    def test_again_replaces_what_has_failed_only(self, executor: Executor) -> None:
        again = executor.options(again=True)
        first = executor.submit_once("report", fail, "no paper")
        assert isinstance(first.exception(10), ValueError)
        assert executor.submit_once("report", add, 1, 2) is first
        second = again.submit_once("report", add, 1, 2)
        assert second.result(10) == 3
        assert again.submit_once("report", fail, "must not run") is second
        assert executor.futures.get("report") is second

    def test_again_after_a_stop(self, executor: Executor) -> None:
        def wait() -> None:
            current_job.sleep(10)

        first = executor.submit_once("report", wait)
        assert wait_until(lambda: first.status == "running")
        assert executor.options(again=True).submit_once("report", wait) is first, "it still runs"
        executor.futures.stop("report")
        assert isinstance(first.exception(10), JobStopped)
        assert executor.options(again=True).submit_once("report", add, 1, 2).result(10) == 3

    def test_once_from_many_threads(self, executor: Executor, app: Flask) -> None:
        runs: list[int] = []
        ids: list[str] = []

        def run() -> None:
            runs.append(1)

        def ask() -> None:
            with app.app_context():
                ids.append(executor.submit_once("report", run).job_id)

        run_in_threads(24, ask)
        drain(executor)
        assert runs == [1]
        assert len(set(ids)) == 1
        assert executor.futures.pop("report") is not None
        executor.submit_once("report", run).result(10)
        assert runs == [1, 1]

    def test_what_is_refused_leaves_nothing(self, make_stored: MakeStored, gate: threading.Event) -> None:
        executor = make_stored(max_workers=1, max_pending=1)
        executor.submit(gate.wait, 10)
        executor.submit_stored("second", gate.wait, 10)
        with pytest.raises(QueueFull):
            executor.submit(add, 1, 2)
        for submit in (executor.submit_stored, executor.submit_once):
            with pytest.raises(QueueFull):
                submit("third", add, 1, 2)
        assert executor.futures.keys() == ["second"]
        assert executor.jobs.find("third") is None
        assert len(executor.jobs.list()) == 2
        gate.set()
        drain(executor)
        assert executor.submit_stored("third", add, 1, 2).result(10) == 3

    def test_list(self, executor: Executor) -> None:
        futures: list[FutureProxy[Any]] = [
            executor.options(name="a").submit(add, 1, 2),
            executor.options(name="b", owner="ada").submit_stored("k", add, 1, 2),
            executor.options(name="a").submit(fail, "no paper"),
        ]
        drain(executor)
        ids = [future.job_id for future in futures]
        assert [job.id for job in executor.jobs.list()] == ids[::-1]
        assert [job.id for job in executor.jobs.list(name="a", limit=1)] == ids[2:]
        assert [job.id for job in executor.jobs.list(owner="ada", status="succeeded")] == ids[1:2]
        assert [job.id for job in executor.jobs.list(status=JobStatus.FAILED)] == ids[2:]
        assert list(executor.jobs.list(limit=0)) == []
        with pytest.raises(ValueError, match="limit is -1; it must be 0 or more"):
            executor.jobs.list(limit=-1)
        with pytest.raises(ValueError, match="'asleep' is not a valid JobStatus"):
            executor.jobs.list(status="asleep")

    def test_progress_log_and_meta(self, executor: Executor, gate: threading.Event, app: Flask) -> None:
        def work() -> None:
            current_job.update(0.5, "half", pages=4, odd={1})
            app.logger.warning("something")
            gate.wait(10)
            checkpoint()

        future = executor.submit_stored("report", work)
        assert wait_until(lambda: executor.futures.progress("report") == 0.5)
        assert executor.futures.message("report") == "half"
        assert executor.futures.meta("report")["pages"] == 4
        assert [line.text for line in executor.jobs.log(future.job_id)] == ["something"]

    def test_a_value_of_meta_that_cannot_be_shown_costs_that_value_alone(
        self, executor: Executor, gate: threading.Event
    ) -> None:
        class Silent:
            def __repr__(self) -> str:
                raise ValueError("no words")

        class Odd(dict[str, Any]):
            def items(self) -> Any:
                raise LookupError("nothing to see")

        loop: list[Any] = []
        loop.append(loop)
        day = datetime.date(2026, 11, 30)
        odd = {
            "dates": {day: 1},
            "days": day,
            "tuples": {(1, 2): 3},
            "bytes": {b"x": b"y"},
            "statuses": {JobStatus.FAILED: JobStatus.LOST},
            "nobody": Silent(),
            "nested": [{day: [Silent()]}],
            "items": Odd(a=1),
            "loop": loop,
            "infinite": math.inf,
            "digits": 10**5000,
            "surrogate": "\udc80",
        }

        def work() -> None:
            current_job.update(0.5, "half", pages=4, **odd)
            gate.wait(10)

        future = executor.submit_stored("report", work)
        assert wait_until(lambda: executor.futures.progress("report") == 0.5)
        assert executor.jobs.find("report") is not None
        assert [job.id for job in executor.jobs.list()] == [future.job_id]
        gate.set()
        drain(executor)
        for job in (executor.jobs.get(future.job_id), executor.jobs.list()[0]):
            assert job is not None
            assert job.status == "succeeded"
            assert job.meta["pages"] == 4
            assert set(job.meta) == {"pages", *odd}
            assert json.loads(json.dumps(job_document(job)))["meta"]["pages"] == 4
            assert job_document(job)["meta"]["days"] == repr(day)

    def test_records_expire_and_are_remembered(self, make_stored: MakeStored, gate: threading.Event) -> None:
        executor = make_stored(result_ttl=0.3)
        running = executor.submit_stored("running", gate.wait, 10)
        future = executor.submit_stored("report", add, 1, 2)
        assert future.result(10) == 3
        assert executor.jobs.get(future.job_id) is not None
        assert wait_until(lambda: executor.jobs.get(future.job_id) is None)
        assert wait_until(lambda: executor.jobs.find("report") is None)
        assert executor.jobs.expired(future.job_id)
        assert executor.jobs.expired(key="report")
        assert executor.jobs.list(status="succeeded") == []
        assert executor.jobs.get(running.job_id) is not None
        assert not executor.jobs.expired(running.job_id)
        assert not executor.jobs.expired(key="running")

    def test_flow(self, executor: Executor, app: Flask) -> None:
        calls: list[str] = []

        def load(name: str) -> str:
            calls.append(name)
            g.loaded = name
            return name.upper()

        def torn() -> None:
            calls.append("torn")
            raise ValueError("no paper")

        with app.app_context():
            flow = executor.flow("order 1")
            assert [flow.step(load, "a"), flow.step(load, "b")] == ["A", "B"]
            assert g.loaded == "b", "steps run in the contexts of their caller"
            with pytest.raises(ValueError, match="no paper"):
                flow.step(torn)
            with pytest.raises(RuntimeError, match="current_job is only there inside a job"):
                _ = current_job.id
        assert calls == ["a", "b", "torn"]
        with app.app_context():
            flow = executor.flow("order 1")
            assert [flow.step(load, "a"), flow.step(load, "b")] == ["A", "B"]
            with pytest.raises(ValueError, match="no paper"):
                flow.step(torn)
            assert calls == ["a", "b", "torn", "torn"], "what has failed is tried again"
            other = executor.flow("order 2")
            assert other.step(load, "c") == "C"
            assert executor.futures.keys() == [], "steps are no stored jobs of the user's"
            flow.reset()
            assert [flow.step(load, "d"), executor.flow("order 2").step(load, "c")] == ["D", "C"]
        assert calls == ["a", "b", "torn", "torn", "c", "d"]

    def test_two_requests_at_the_same_step(self, executor: Executor, app: Flask, gate: threading.Event) -> None:
        calls: list[int] = []

        def slow() -> int:
            calls.append(1)
            gate.wait(10)
            return 7

        results: list[int] = []
        timer = threading.Timer(0.1, gate.set)
        timer.start()
        run_in_threads(4, lambda: results.append(executor.flow("order").step(slow)))
        timer.join()
        assert results == [7] * 4
        assert calls == [1]

    def test_lost_after_a_fork_or_not(self, executor: Executor) -> None:
        """In the child only the store knows what becomes of the parent's jobs."""
        assert executor.submit_stored("report", time.sleep, 0.2).status in ("queued", "running")
        pid = os.fork()
        if not pid:
            try:
                ended = executor.futures.exception("report", timeout=10)
                os._exit(0 if executor.health().store_reachable and isinstance(ended, (type(None), WorkerLost)) else 1)
            finally:
                os._exit(2)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        drain(executor)

    def test_after_shutdown_records_can_still_be_read(self, executor: Executor) -> None:
        future = executor.submit_stored("report", add, 1, 2)
        executor.shutdown()
        assert executor.futures.result("report") == 3
        assert executor.jobs.get(future.job_id) is not None
        assert executor.health().store_reachable
