"""What every shared store promises about who has a key and who has a job: claims, transfers, leases, requests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from flask_executor.abc import Entry, JobStore, StopRequest
from flask_executor.jobs.model import Job, JobState, JobStatus, LogLine
from flask_executor.stores.leases import new_holder_id
from flask_executor.testing.contract.fixtures import run_in_threads, wait_until
from flask_executor.testing.contract.shared_fixtures import (
    DEAD,
    ENGINE,
    HERE,
    MakeStore,
    SharedStoreFixtures,
    ShortenLeases,
    claimed,
    ended,
    lost,
    queued_in_engine,
    started,
)


class OwnershipTests(SharedStoreFixtures):
    """Keys, transfers, leases and requests to stop."""

    def test_one_of_many_gets_the_key(self, make_store: MakeStore) -> None:
        answers: list[Job | None] = []

        def ask() -> None:
            answers.append(make_store().claim(Entry(job=JobState("render", "report").record(), holder=HERE)))

        run_in_threads(16, ask)
        assert answers.count(None) == 1
        [winner] = {job.id for job in answers if job is not None}
        held = make_store().holding_key("report")
        assert held is not None
        assert held.id == winner

    def test_a_key_that_cannot_be_stored(self, store: JobStore) -> None:
        with pytest.raises(
            TypeError, match="cannot be stored: with a shared EXECUTOR_STORE a key is a string, a number"
        ):
            store.claim(Entry(job=replace(JobState("render").record(), key=frozenset({1})), holder=HERE))

    @pytest.mark.parametrize("status", [status for status in JobStatus if status.ended])
    def test_again(self, store: JobStore, status: JobStatus) -> None:
        if status == "cancelled":
            first = claimed(store, "report")
            first.end(status)
            store.write([Entry(job=first.record(), holder=HERE)])
        else:
            first = ended(store, "report", status=status)
        second = Entry(job=JobState("render", "report").record(), holder=HERE)
        there = store.claim(second)
        assert there is not None
        assert there.id == first.id
        there = store.claim(second, again=True)
        assert (there is None) == (status != "succeeded")
        held = store.holding_key("report")
        assert held is not None
        assert held.id == (first.id if there else second.job.id)
        assert store.keys() == ["report"]

    def test_a_claim_that_is_made_twice_as_its_answer_was_lost(self, store: JobStore) -> None:
        entry = Entry(job=JobState("render", "report").record(), holder=HERE)
        assert store.claim(entry) is None
        assert store.claim(entry) is None
        held = store.holding_key("report")
        assert held is not None
        assert held.id == entry.job.id

    def test_a_job_is_taken_over(self, store: JobStore) -> None:
        job = claimed(store, "report")
        before, other = job.record(), new_holder_id()
        job.start()
        taken = Entry(job=job.record(), holder=other)
        assert store.transfer(taken, "engine.0..rq") == before, "somebody else has it"
        assert store.transfer(taken, None) == before, "there is a record"
        assert store.get(job.id) == before
        assert store.transfer(taken, HERE) is None
        assert store.get(job.id) == job.record()
        assert store.transfer(replace(taken, holder=HERE), HERE) == job.record(), "it has it no more"
        held = store.holding_key("report")
        assert held is not None
        assert held.id == job.id
        store.ask_to_stop(StopRequest(id=job.id))
        assert list(store.take_requests(HERE)) == []
        assert [request.id for request in store.take_requests(other)] == [job.id]
        job.end(JobStatus.SUCCEEDED)
        store.write([Entry(job=job.record(), holder=other)])
        assert store.transfer(taken, other) == job.record(), "it has ended"
        assert list(store.list(status="running")) == []

    def test_a_job_that_is_taken_twice_as_the_answer_was_lost(self, store: JobStore) -> None:
        job, worker = queued_in_engine(store, "report"), new_holder_id()
        job.start()
        taken = Entry(job=job.record(), holder=worker)
        assert store.transfer(taken, ENGINE) is None
        job.progress = 0.5
        store.write([Entry(job=job.record(), holder=worker)])
        assert store.transfer(taken, ENGINE) is None
        assert store.get(job.id) == job.record(), "what was written since is newer"
        assert store.transfer(replace(taken, holder=new_holder_id()), ENGINE) == job.record(), "another one has it"
        cancelled = replace(job.record(), status=JobStatus.CANCELLED, ended_at=time.time())
        assert store.transfer(Entry(job=cancelled, holder=worker), ENGINE) == job.record(), (
            "it was not that which was done"
        )

    def test_a_job_that_is_cancelled_twice_as_the_answer_was_lost(self, store: JobStore) -> None:
        job = queued_in_engine(store, "report").record()
        first, second = (replace(job, status=JobStatus.CANCELLED, ended_at=job.queued_at + wait) for wait in (1, 2))
        assert store.transfer(Entry(job=first, holder=ENGINE), ENGINE) is None
        assert store.transfer(Entry(job=first, holder=ENGINE), ENGINE) is None
        assert store.transfer(Entry(job=second, holder=ENGINE), ENGINE) == first, "somebody else has cancelled it"
        assert store.transfer(Entry(job=job, holder=ENGINE), ENGINE) == first

    def test_what_a_job_ended_with_is_there_when_it_was_taken(self, store: JobStore) -> None:
        job = queued_in_engine(store)
        line = LogLine(time=1.0, level="INFO", logger="shop", text="no paper")
        job.start()
        job.end(JobStatus.FAILED, ValueError("no paper"))
        assert store.transfer(Entry(job=job.record(), holder=ENGINE, outcome=b"outcome", log=[line]), ENGINE) is None
        assert (store.get(job.id), store.outcome(job.id), list(store.log(job.id))) == (job.record(), b"outcome", [line])

    def test_one_of_many_takes_a_job_that_is_lost(self, make_store: MakeStore, shorten_leases: ShortenLeases) -> None:
        store = make_store()
        job = lost(store, shorten_leases, "report")
        entry = Entry(job=job.record(), holder=new_holder_id())
        there = store.transfer(entry, DEAD)
        assert there is not None
        assert there.status == "lost", "that has to be asked for"
        answers: list[Job | None] = []

        def take() -> None:
            entry = Entry(job=job.record(), holder=new_holder_id())
            answers.append(make_store().transfer(entry, ENGINE, lost=True))

        run_in_threads(16, take)
        assert answers.count(None) == 1
        held = store.holding_key("report")
        assert held is not None
        assert (held.id, held.status) == (job.id, "running")

    def test_a_job_that_is_lost_and_taken_twice_as_the_answer_was_lost(
        self, store: JobStore, shorten_leases: ShortenLeases
    ) -> None:
        job = lost(store, shorten_leases)
        entry = Entry(job=job.record(), holder=new_holder_id())
        assert store.transfer(entry, ENGINE, lost=True) is None
        assert store.transfer(entry, ENGINE, lost=True) is None
        assert store.transfer(replace(entry, holder=DEAD), ENGINE, lost=True) == job.record()

    def test_a_job_that_is_lost_and_was_started_anew_is_not_taken(
        self, store: JobStore, shorten_leases: ShortenLeases
    ) -> None:
        job, anew = lost(store, shorten_leases, "report"), JobState("render", "report")
        assert store.claim(Entry(job=anew.record(), holder=HERE), again=True) is None
        entry = Entry(job=job.record(), holder=new_holder_id())
        there = store.transfer(entry, ENGINE, lost=True)
        assert there is not None
        assert (there.id, there.status) == (job.id, "lost")
        held = store.holding_key("report")
        assert held is not None
        assert held.id == anew.id
        store.remove(anew.id)
        assert store.transfer(entry, ENGINE, lost=True) is None, "the key is free"

    def test_a_request_for_a_job_that_is_lost_goes_to_the_next(
        self, store: JobStore, shorten_leases: ShortenLeases
    ) -> None:
        job, worker = lost(store, shorten_leases, asked=True), new_holder_id()
        assert list(store.take_requests(DEAD)) == []
        assert store.transfer(Entry(job=job.record(), holder=worker), ENGINE, lost=True) is None
        assert list(store.take_requests(worker)) == [StopRequest(id=job.id)]

    def test_one_of_many_takes_a_job(self, make_store: MakeStore) -> None:
        job = claimed(make_store(), "report")
        answers: list[Job | None] = []

        def take() -> None:
            answers.append(make_store().transfer(Entry(job=job.record(), holder=new_holder_id()), HERE))

        run_in_threads(16, take)
        assert answers.count(None) == 1

    def test_what_is_taken_may_not_be_written_yet(self, store: JobStore) -> None:
        job = JobState("render", "report")
        queued = job.record()
        job.start()
        assert store.transfer(Entry(job=job.record(), holder=HERE), "engine.0..rq", new=False) is None
        assert store.get(job.id) is None, "only if it is there"
        assert store.transfer(Entry(job=job.record(), holder=HERE), "engine.0..rq") is None
        assert store.get(job.id) == job.record()
        assert store.transfer(Entry(job=queued, holder="engine.0..rq"), None) == job.record(), "too late"
        assert store.get(job.id) == job.record()
        held = store.holding_key("report")
        assert held is not None, "the key was free"
        assert held.id == job.id

    def test_release(self, store: JobStore) -> None:
        job = started(store, "report")
        assert not store.release("report", "another id")
        assert store.holding_key("report") is not None
        assert store.release("report", job.id)
        assert not store.release("report", job.id)
        job.progress = 0.5
        store.write([Entry(job=job.record(), holder=HERE)])
        assert store.holding_key("report") is None, "it does not take the key again"
        found = store.find("report")
        assert found is not None
        assert found.id == job.id

    def test_keys(self, store: JobStore) -> None:
        for key in ("a", ("flow", "x", 1), ("flow", "x", 2), ("flow", "xy", 1), "flow", ("flow", "*", 1)):
            assert store.claim(Entry(job=JobState("render", key).record(), holder=HERE)) is None
            time.sleep(0.002)
        assert list(store.keys())[:3] == ["a", ("flow", "x", 1), ("flow", "x", 2)]
        assert list(store.keys(("flow", "x"))) == [("flow", "x", 1), ("flow", "x", 2)]
        assert list(store.keys(("flow", "*"))) == [("flow", "*", 1)]
        assert len(store.keys(("flow",))) == 4

    def test_requests_are_given_once(self, store: JobStore) -> None:
        job, other = started(store), started(store)
        store.ask_to_stop(StopRequest(id=job.id, grace=1.5))
        store.ask_to_stop(StopRequest(id=other.id, only_queued=True))
        store.ask_to_stop(StopRequest(id="unknown"))
        assert list(store.take_requests(DEAD)) == []
        asked = set(store.take_requests(HERE))
        assert asked == {StopRequest(id=job.id, grace=1.5), StopRequest(id=other.id, only_queued=True)}
        assert list(store.take_requests(HERE)) == []

    def test_requests_follow_the_job(self, store: JobStore) -> None:
        """They are for whoever has the job when he looks: an engine never does, and hands jobs on."""
        job, worker = queued_in_engine(store, "report"), new_holder_id()
        store.ask_to_stop(StopRequest(id=job.id, grace=1.5))
        job.start()
        assert list(store.take_requests(worker)) == []
        assert store.transfer(Entry(job=job.record(), holder=worker), ENGINE) is None
        assert list(store.take_requests(worker)) == [StopRequest(id=job.id, grace=1.5)]
        store.ask_to_stop(StopRequest(id=job.id, grace=2.5))
        store.write([Entry(job=job.record(), holder=ENGINE)])
        other = new_holder_id()
        assert store.transfer(Entry(job=job.record(), holder=other), worker) == job.record(), "it has it no more"
        assert store.transfer(Entry(job=job.record(), holder=other), ENGINE) is None
        assert list(store.take_requests(worker)) == []
        assert list(store.take_requests(other)) == [StopRequest(id=job.id, grace=2.5)]
        assert list(store.take_requests(other)) == []

    def test_requests_for_a_job_that_has_ended(self, store: JobStore) -> None:
        job = started(store)
        store.ask_to_stop(StopRequest(id=job.id))
        job.end(JobStatus.SUCCEEDED)
        store.write([Entry(job=job.record(), holder=HERE)])
        store.ask_to_stop(StopRequest(id=job.id))
        assert list(store.take_requests(HERE)) == []

    @pytest.mark.parametrize("look", ["get", "find", "held", "list", "sweep"])
    def test_jobs_of_a_dead_process_are_lost(
        self, store: JobStore, look: str, shorten_leases: ShortenLeases, caplog: pytest.LogCaptureFixture
    ) -> None:
        shorten_leases(store, 0.2)
        job = JobState("render", "report")
        assert store.claim(Entry(job=job.record(), holder=DEAD)) is None
        job.start()
        store.write([Entry(job=job.record(), holder=DEAD)])
        record = store.get(job.id)
        assert record is not None
        assert record.status == "running", "the lease holds"
        assert store.renew(DEAD)
        time.sleep(0.3)
        looks: dict[str, Callable[[], object]] = {
            "get": lambda: store.get(job.id),
            "find": lambda: store.find("report"),
            "sweep": store.sweep,
        }
        looks |= {"held": lambda: store.holding_key("report"), "list": store.list}
        looks[look]()
        record = store.get(job.id)
        assert record is not None
        assert record.status == "lost"
        assert "is gone" in (record.error or "")
        [line] = caplog.records
        assert line.getMessage() == f"Job render ({job.id}) is lost. {record.error}"
        assert line.__dict__["job_key"] == "report"
        assert list(store.list(status="running")) == []
        assert not store.renew(DEAD), "the lease had run out"
        job.end(JobStatus.SUCCEEDED)
        store.write([Entry(job=job.record(), holder=DEAD)])
        record = store.get(job.id)
        assert record is not None
        assert record.status == "succeeded", "its own process knows better"

    def test_a_process_of_this_machine_is_found_dead_at_once(self, store: JobStore) -> None:
        reads, writes = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writes, new_holder_id().encode())
            os._exit(0)
        holder = os.read(reads, 1000).decode()
        os.close(reads)
        os.close(writes)
        job = JobState("render", "report")
        assert store.claim(Entry(job=job.record(), holder=holder)) is None
        assert wait_until(lambda: (store.holding_key("report") or job).status == "lost"), "a zombie is dead"
        os.waitpid(pid, 0)
        assert store.claim(Entry(job=JobState("render", "report").record(), holder=HERE), again=True) is None

    def test_a_claim_takes_the_key_of_a_lost_job_only_again(
        self, store: JobStore, shorten_leases: ShortenLeases
    ) -> None:
        shorten_leases(store, 0.1)
        assert store.claim(Entry(job=JobState("render", "report").record(), holder=DEAD)) is None
        time.sleep(0.2)
        entry = Entry(job=JobState("render", "report").record(), holder=HERE)
        there = store.claim(entry)
        assert there is not None
        assert there.status == "lost"
        assert store.claim(entry, again=True) is None
