"""What a worker of an engine makes of a job that the engine gives it, where engines give things twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from tasks import add

from flask_executor.abc import Entry, StopRequest
from flask_executor.backends.engine import entrypoint
from flask_executor.exceptions import EngineUnavailable, ExecutorShutdown, StoreUnavailable
from flask_executor.executor.consumer import Consumer
from flask_executor.futures import FutureProxy
from flask_executor.jobs.call import Call, CallState
from flask_executor.jobs.model import Job, JobState, JobStatus
from flask_executor.stores.leases import engine_holder, new_holder_id
from flask_executor.testing.contract.fixtures import MakeExecutor, run_in_threads, wait_until
from flask_executor.tracking.engine_handover import EngineHandover
from flask_executor.tracking.shared import SharedJobTracker
from flask_executor.tracking.stored_future import StoredFuture

ENGINE = engine_holder("rq")


class Worker:
    """A process that gets jobs from an engine, without the engine."""

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.tracker: SharedJobTracker = binding.tracker
        self.handover = self.tracker.handover = EngineHandover(self.tracker, ENGINE)
        self.ids: list[str] = []

    def queued(self, key: str | None = "report") -> JobState:
        job = JobState("render", key)
        self.ids.append(job.id)
        assert self.tracker.store.transfer(Entry(job=job.record(), holder=ENGINE), None) is None
        return job

    def call(self, queued: JobState) -> Call:
        """One delivery of it."""
        job = JobState("render", queued.key, id=queued.id)
        future: FutureProxy[Any] = FutureProxy(job, self.binding.channel)
        context: Any = None
        return Call(future, job, add, (1,), {}, context, self.binding.channel)

    def adopt(self, queued: JobState, sender: str = ENGINE) -> bool:
        """Whether it gets the job, having been given it once more."""
        return self.handover.acquire(self.call(queued), sender)


@pytest.fixture
def worker(shared_store: str, make_executor: MakeExecutor) -> Iterator[Worker]:
    executor = make_executor(store=shared_store)
    worker = Worker(executor._app_executor()[1])
    yield worker
    for id in worker.ids:
        worker.tracker.writer.forget(id)
    worker.tracker.handover = None


def test_a_job_that_comes_twice_is_run_once(worker: Worker) -> None:
    job = worker.queued()
    answers: list[bool] = []
    run_in_threads(8, lambda: answers.append(worker.adopt(job)))
    assert sorted(answers) == [False] * 7 + [True]
    assert worker.handover.is_acquired(job.id)


def test_a_job_that_comes_again_when_it_has_ended_is_not_run_again(worker: Worker) -> None:
    job = worker.queued()
    call = worker.call(job)
    assert worker.handover.acquire(call, ENGINE)
    call.job.start()
    call.job.end(JobStatus.SUCCEEDED)
    worker.tracker.ended(call.job, None, None)
    assert not worker.adopt(job), "nor before its end is written"
    worker.handover.finish(call.job)
    assert not worker.adopt(job)


def test_a_job_that_could_not_be_had_may_come_again(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = worker.queued()

    def fail(*_: object, **__: object) -> None:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(worker.tracker.store, "transfer", fail)
        with pytest.raises(OSError):  # noqa: PT011  # whatever it is
            worker.adopt(job)
    assert not worker.handover.is_acquired(job.id)
    assert worker.adopt(job)


def test_a_stop_while_a_worker_gives_the_job_back(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = worker.queued()
    call = worker.call(job)
    assert worker.handover.acquire(call, ENGINE)
    record = worker.tracker.store.get(job.id)
    assert record is not None
    handle: StoredFuture[Any] = StoredFuture(record, worker.tracker)
    ask = worker.tracker.store.ask_to_stop

    def give_back_and_ask(request: StopRequest) -> None:
        worker.handover.return_to_engine(call.job)
        ask(request)

    monkeypatch.setattr(worker.tracker.store, "ask_to_stop", give_back_and_ask)
    assert handle.stop()
    assert handle.cancelled()


def test_a_job_that_is_lost_and_comes_again_is_run_by_one(worker: Worker) -> None:
    job, store = worker.queued(), worker.tracker.store
    dead = "elsewhere.1.2.abc"
    job.start()
    assert store.transfer(Entry(job=job.record(), holder=dead), ENGINE) is None
    store.drop_lease(dead)
    take, other = store.transfer, new_holder_id()

    def take_after_another(entry: Entry, former: str | None, *, lost: bool = False, new: bool = True) -> Job | None:
        if lost:
            assert take(replace(entry, holder=other), former, lost=True) is None
        return take(entry, former, lost=lost)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "transfer", take_after_another)
        assert not worker.adopt(job)
    assert not worker.handover.is_acquired(job.id)


def test_a_job_that_is_lost_and_was_started_anew_is_not_run(worker: Worker) -> None:
    job, store = worker.queued(), worker.tracker.store
    assert store.transfer(Entry(job=job.record(), holder="elsewhere.1.2.abc"), ENGINE) is None
    found = store.get(job.id)
    assert found is not None
    assert found.status == "lost"
    anew = JobState("render", "report")
    assert store.claim(Entry(job=anew.record(), holder=ENGINE), again=True) is None
    assert not worker.adopt(job)
    held = store.holding_key("report")
    assert held is not None
    assert held.id == anew.id


def test_what_its_sender_still_has_is_taken_from_him(worker: Worker) -> None:
    sender = new_holder_id()
    job = JobState("render", "report")
    worker.ids.append(job.id)
    store = worker.tracker.store
    assert store.claim(Entry(job=job.record(), holder=sender)) is None
    assert not worker.adopt(job, "somebody.1.2.else")
    assert worker.adopt(job, sender)
    assert store.transfer(Entry(job=job.record(), holder=ENGINE), sender, lost=True, new=False) is not None, "too late"
    assert worker.handover.is_acquired(job.id)


def test_a_process_on_another_machine_is_dead_when_its_lease_ends(worker: Worker) -> None:
    job, store = worker.queued(), worker.tracker.store
    elsewhere = "elsewhere.1.2.abc"
    store.renew(elsewhere)
    job.start()
    assert store.transfer(Entry(job=job.record(), holder=elsewhere), ENGINE) is None
    assert store.holder(job.id) == elsewhere
    answers: list[bool] = []
    asks = threading.Thread(target=lambda: answers.append(worker.adopt(job)))
    asks.start()
    asks.join(1)
    assert not answers, "it waits"
    store.drop_lease(elsewhere)
    asks.join(20)
    assert answers == [True]


def test_a_process_on_this_machine_is_alive_or_not(worker: Worker) -> None:
    job, store = worker.queued(), worker.tracker.store
    job.start()
    assert store.transfer(Entry(job=job.record(), holder=new_holder_id()), ENGINE) is None
    assert not worker.adopt(job)


def test_an_answer_that_was_lost(worker: Worker, make_executor: MakeExecutor) -> None:
    """The store has taken down that the job is this process's, which does not know it."""
    job, store = worker.queued(), worker.tracker.store
    consumer = Consumer(worker.binding, worker.tracker, worker.handover)
    call = worker.call(job)
    take, asked = store.transfer, list[str]()

    def take_and_say_nothing(entry: Entry, former: str | None, **how: bool) -> Job | None:
        answer = take(entry, former, **how)
        asked.append(entry.job.id)
        if len(asked) == 1:
            raise StoreUnavailable(store.where, "the line is cut")
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "transfer", take_and_say_nothing)
        assert consumer._acquire(call, ENGINE)
    assert len(asked) == 2
    assert worker.binding.in_flight.get(call.future) is call
    consumer.close(wait=True)
    with pytest.raises(ExecutorShutdown):
        consumer._acquire(call, ENGINE)
    worker.binding.in_flight.discard(call.future)


# ---- between its sender and the engine ----


def kept(worker: Worker, key: str | None = "report") -> JobState:
    """A job that waits in this process for the engine."""
    job = JobState("render", key)
    worker.ids.append(job.id)
    worker.handover.hold_locally(job)
    return job


def fail_to_send(worker: Worker, job: JobState, do: Callable[[], object] = lambda: None) -> None:
    def enqueue() -> None:
        with worker.handover.transferring(job):
            do()
            raise EngineUnavailable("Redis", "redis://away", "EXECUTOR_URL", "no answer")

    with pytest.raises(EngineUnavailable):
        enqueue()


def status_of(worker: Worker, job: JobState) -> str | None:
    found = worker.tracker.store.get(job.id)
    return None if found is None else found.status


def test_a_job_is_refused_whose_sender_is_slow(worker: Worker) -> None:
    store, sender = worker.tracker.store, new_holder_id()
    job = JobState("render", "report")
    worker.ids.append(job.id)
    assert store.claim(Entry(job=job.record(), holder=sender)) is None
    refuses = threading.Thread(target=worker.handover.refuse, args=(job.id, ValueError("torn")))
    refuses.start()
    refuses.join(0.2)
    assert store.transfer(Entry(job=job.record(), holder=ENGINE), sender, new=False) is None
    refuses.join(20)
    assert status_of(worker, job) == "failed"


def test_what_a_worker_has_got_all_the_same_is_not_overwritten(worker: Worker) -> None:
    job, store = kept(worker), worker.tracker.store
    elsewhere = new_holder_id()
    fail_to_send(worker, job)
    job.start()
    job.end(JobStatus.SUCCEEDED)
    done = job.record()
    running = replace(done, status=JobStatus.RUNNING, ended_at=None)
    assert store.transfer(Entry(job=running, holder=elsewhere), worker.tracker.holder) is None
    store.write([Entry(job=done, holder=elsewhere)])
    queued = JobState("render", "report", id=job.id)
    worker.tracker.writer.add(queued, claimed=False, is_held=True)
    worker.tracker.abandon_unfinished(5)
    assert status_of(worker, job) == "succeeded"


def test_what_waits_for_the_engine_is_lost_with_its_process(worker: Worker) -> None:
    job = kept(worker)
    fail_to_send(worker, job)
    worker.tracker.abandon_unfinished(5)
    assert status_of(worker, job) == "lost"


def test_a_job_that_is_cancelled_while_it_is_sent_stays_cancelled(worker: Worker) -> None:
    job = kept(worker)
    fail_to_send(worker, job, lambda: worker.tracker.cancel_queued(job.record()))
    assert not worker.tracker.writer.tracks(job.id)
    assert not worker.handover.is_held(job.id)
    assert status_of(worker, job) == "cancelled"


def test_a_hand_over_is_tried_again(worker: Worker) -> None:
    job, store = kept(worker), worker.tracker.store
    take = store.transfer
    failed = threading.Event()

    def fail_once(*entry: Any, **how: Any) -> Job | None:
        if not failed.is_set():
            failed.set()
            raise StoreUnavailable(store.where, "the line is cut")
        return take(*entry, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "transfer", fail_once)
        with worker.handover.transferring(job):
            pass
        assert failed.is_set()
        assert wait_until(lambda: store.holder(job.id) == ENGINE)
    assert wait_until(lambda: not worker.handover.is_held(job.id)), "which this process knows in a moment"


def test_a_job_that_was_not_handed_over_yet_can_be_cancelled(worker: Worker) -> None:
    job = JobState("render", "report")
    worker.ids.append(job.id)
    assert worker.tracker.store.claim(Entry(job=job.record(), holder=worker.tracker.holder)) is None
    assert worker.tracker.cancel_queued(job.record())
    assert status_of(worker, job) == "cancelled"


def test_a_job_that_is_about_to_run_here_is_not_cancelled_behind_its_back(worker: Worker) -> None:
    job = worker.queued()
    assert worker.adopt(job)
    assert not worker.tracker.cancel_queued(job.record())
    assert status_of(worker, job) == "queued"


def test_a_job_that_had_begun_does_not_become_the_engines_again(worker: Worker) -> None:
    job, store = kept(worker), worker.tracker.store
    with worker.handover.transferring(job):
        running = replace(job.record(), status=JobStatus.RUNNING, started_at=job.queued_at)
        assert store.transfer(Entry(job=running, holder="elsewhere.1.2.abc"), worker.tracker.holder) is None
        assert status_of(worker, job) == "lost"
    assert status_of(worker, job) == "lost"


def test_what_was_cancelled_long_ago_does_not_run(worker: Worker) -> None:
    job = worker.queued()
    assert worker.tracker.cancel_queued(job.record())
    worker.tracker.store.purge(time.time() + 1)
    assert worker.tracker.store.get(job.id) is None
    assert not worker.adopt(job)


def test_a_job_that_is_stopped_while_the_store_is_asked(worker: Worker) -> None:
    job, store = worker.queued(), worker.tracker.store
    call = worker.call(job)
    take = store.transfer

    def stop_and_take(*entry: Any, **how: Any) -> Job | None:
        call.future.cancel()
        return take(*entry, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "transfer", stop_and_take)
        worker.binding.in_flight.add(call, None)
        assert worker.handover.acquire(call, ENGINE)
    worker.handover.finish(call.job)
    assert status_of(worker, job) == "cancelled"


def test_a_process_that_is_told_to_end_begins_with_no_more_jobs(worker: Worker) -> None:
    job = worker.queued()
    consumer = Consumer(worker.binding, worker.tracker, worker.handover)
    entrypoint.shutting_down.set()
    try:
        with pytest.raises(ExecutorShutdown):
            consumer._acquire(worker.call(job), ENGINE)
    finally:
        entrypoint.shutting_down.clear()
    assert worker.adopt(job)


def test_a_hand_over_while_a_worker_takes_the_job(worker: Worker) -> None:
    store, sender = worker.tracker.store, new_holder_id()
    job = JobState("render", "report")
    worker.ids.append(job.id)
    assert store.claim(Entry(job=job.record(), holder=sender)) is None
    take = store.transfer

    def take_and_hand_over(entry: Entry, former: str | None, **how: Any) -> Job | None:
        answer = take(entry, former, **how)
        take(Entry(job=job.record(), holder=ENGINE), sender, new=False)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "transfer", take_and_hand_over)
        assert worker.adopt(job)


def test_a_call_that_has_to_wait_for_the_store_is_not_settled(worker: Worker) -> None:
    store, consumer = worker.tracker.store, Consumer(worker.binding, worker.tracker, worker.handover)
    call = worker.call(worker.queued())
    transfer, asked = store.transfer, []

    def fail_once(*entry: Any, **how: Any) -> Job | None:
        asked.append(call.state)
        if len(asked) == 1:
            raise StoreUnavailable(store.where, "it is away")
        return transfer(*entry, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "transfer", fail_once)
        assert consumer._acquire(call, ENGINE)
    assert set(asked) == {CallState.ACCEPTED}
    worker.binding.in_flight.discard(call.future)
    assert call.state is CallState.SETTLED
