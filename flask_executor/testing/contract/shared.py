"""What every store promises that several processes share, as its port says."""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from flask_executor.abc import MOST_MESSAGES, Entry, JobStore, StopRequest, StoredMessage, StoreOptions
from flask_executor.exceptions import QueueFull
from flask_executor.executor.factory import store_class_of
from flask_executor.jobs.model import LOG_LINES, Job, JobState, JobStatus, LogLine
from flask_executor.stores.leases import engine_holder, new_holder_id
from flask_executor.testing.contract.fixtures import run_in_threads, wait_until

MakeStore = Callable[..., JobStore]
ShortenLeases = Callable[[JobStore, float], None]


HERE = new_holder_id()


ENGINE = engine_holder("rq")
DEAD = "elsewhere.1.2.abc"  # another machine, and no lease


def claimed(store: JobStore, key: str | None = None, name: str = "render", owner: str | None = None) -> JobState:
    job = JobState(name, key, owner)
    entry = Entry(job=job.record(), holder=HERE)
    if key is None:
        store.write([entry])
    else:
        assert store.claim(entry) is None
    return job


def started(store: JobStore, key: str | None = None, name: str = "render", owner: str | None = None) -> JobState:
    job = claimed(store, key, name, owner)
    job.start()
    store.write([Entry(job=job.record(), holder=HERE)])
    return job


def ended(
    store: JobStore, key: str | None = None, name: str = "render", status: JobStatus = JobStatus.SUCCEEDED
) -> JobState:
    job = started(store, key, name)
    job.end(status, ValueError("no paper") if status == "failed" else None)
    store.write([Entry(job=job.record(), holder=HERE, outcome=b"outcome")])
    return job


def messages_for(store: JobStore, holder: str = HERE) -> list[StoredMessage]:
    """Some of those that wait."""
    return [request for request in store.take_requests(holder) if isinstance(request, StoredMessage)]


def receive(store: JobStore, holder: str = HERE) -> dict[str, list[bytes]]:
    """All that wait, by the ids of their jobs; they leave the store."""
    found: dict[str, list[bytes]] = {}
    while messages := messages_for(store, holder):
        for message in messages:
            found.setdefault(message.id, []).append(message.data)
        store.acknowledge(holder, messages)
    return found


def queued_in_engine(store: JobStore, key: str | None = None) -> JobState:
    job = JobState("render", key)
    store.transfer(Entry(job=job.record(), holder=ENGINE), None)
    return job


def lost(store: JobStore, shorten_leases: ShortenLeases, key: str | None = None, *, asked: bool = False) -> JobState:
    """A job whose worker has died, as its process knew it; it may have been asked to stop before."""
    shorten_leases(store, 0.05)
    job = queued_in_engine(store, key)
    job.start()
    assert store.transfer(Entry(job=job.record(), holder=DEAD), ENGINE) is None
    if asked:
        store.ask_to_stop(StopRequest(id=job.id))
    assert wait_until(lambda: (store.get(job.id) or job).status == "lost")
    return job


class SharedStoreContract:
    """What :class:`~flask_executor.abc.JobStore` promises: claims, leases, requests, watches, forks and expiry.

    The fixture ``store_url`` says which store: what ``EXECUTOR_STORE`` would be, of a store with nothing in it.
    """

    @pytest.fixture
    def store_url(self) -> str:
        """What ``EXECUTOR_STORE`` would be. To be overridden."""
        raise NotImplementedError(f"{type(self).__qualname__} has to override the fixture store_url")

    @pytest.fixture
    def make_store(self, store_url: str) -> Iterator[MakeStore]:
        """Stores in the same place, closed after the test. The url tells the class, as it does in a configuration."""
        made: list[JobStore] = []

        def make(space: str = "shop", result_ttl: float = 3600, max_records: int = 10) -> JobStore:
            options = StoreOptions(url=store_url, space=space, result_ttl=result_ttl, max_records=max_records)
            made.append(store_class_of(store_url)(options))
            return made[-1]

        yield make
        for store in made:
            store.close()

    @pytest.fixture
    def shorten_leases(self, monkeypatch: pytest.MonkeyPatch) -> ShortenLeases:
        """Has leases last for so many seconds: sets ``LEASE_SECONDS`` at its source, and where the store imports it.

        To be overridden for a store that has the length of its leases from somewhere else.
        """

        def shorten(store: JobStore, seconds: float) -> None:
            modules = {base.__module__ for base in type(store).__mro__} | {"flask_executor.stores.leases"}
            for name in modules:
                if hasattr(sys.modules[name], "LEASE_SECONDS"):
                    monkeypatch.setattr(f"{name}.LEASE_SECONDS", seconds)

        return shorten

    @pytest.fixture
    def store(self, make_store: MakeStore) -> JobStore:
        return make_store()

    def test_what_was_written_is_read(self, store: JobStore) -> None:
        job = claimed(store, "report", owner="ada")
        assert store.get(job.id) == store.find("report") == store.holding_key("report") == job.record()
        job.start()
        job.progress, job.message, job.meta = 0.25, "half a \udcff surrogate", {"pages": 4, "odd": {1}}
        store.write([Entry(job=job.record(), holder=HERE)])
        record = store.get(job.id)
        assert record is not None
        assert record.meta == {"pages": 4, "odd": "{1}"}, "what JSON does not have is shown"
        assert (record.status, record.progress, record.started_at) == (JobStatus.RUNNING, 0.25, job.started_at)
        job.message, job.meta = "fine", None
        job.end(JobStatus.FAILED, ValueError("no paper"))
        store.write([Entry(job=job.record(), holder=HERE, outcome=b"outcome")])
        assert store.get(job.id) == job.record()
        assert store.outcome(job.id) == b"outcome"

    def test_meta_that_contains_itself(self, store: JobStore) -> None:
        job = claimed(store)
        meta: dict[str, object] = {}
        meta["self"] = meta
        job.meta = meta
        store.write([Entry(job=job.record(), holder=HERE)])
        record = store.get(job.id)
        assert record is not None
        assert set(record.meta) == {"self"}

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

    def test_remove_is_as_if_it_had_never_been(self, store: JobStore) -> None:
        job = ended(store, "report")
        store.remove(job.id)
        store.remove("unknown")
        assert (store.get(job.id), store.find("report"), store.holding_key("report"), store.outcome(job.id)) == (
            None,
        ) * 4
        assert list(store.keys()) == []
        assert list(store.list()) == []
        assert not store.expired(job.id)

    def test_list_filters_and_limits(self, store: JobStore) -> None:
        jobs = [ended(store, name="a"), started(store, name="b", owner="ada"), ended(store, name="a")]
        assert [job.id for job in store.list()] == [job.id for job in reversed(jobs)]
        assert [job.id for job in store.list(name="a", limit=1)] == [jobs[2].id]
        assert [job.id for job in store.list(owner="ada", status="running")] == [jobs[1].id]
        assert list(store.list(limit=0)) == []
        assert list(store.list(status="queued")) == []

    def test_spaces_do_not_see_each_other(self, make_store: MakeStore) -> None:
        shop, bank = make_store("shop"), make_store("bank")
        job, other = started(shop, "report"), started(bank, "report")
        for store, own, foreign in ((shop, job, other), (bank, other, job)):
            assert [record.id for record in store.list()] == [own.id]
            assert store.get(foreign.id) is None
            assert list(store.keys()) == ["report"]
            held = store.holding_key("report")
            assert held is not None
            assert held.id == own.id

    def test_logs_are_appended_and_bounded(self, store: JobStore) -> None:
        job = started(store)
        other = started(store)
        lines = [
            LogLine(time=float(n), level="INFO", logger="shop", text=f"line {n}\n", trace="no paper" if n % 2 else None)
            for n in range(LOG_LINES + 20)
        ]
        for begin in range(0, len(lines), 100):
            store.write([Entry(job=job.record(), holder=HERE, log=lines[begin : begin + 100])])
            store.write([Entry(job=other.record(), holder=HERE, log=lines[begin : begin + 1])])
        assert list(store.log(job.id)) == lines[-LOG_LINES:]
        assert len(store.log(other.id)) == 6

    def test_records_leave_and_are_remembered(self, make_store: MakeStore) -> None:
        store = make_store(result_ttl=0.2)
        running, job = started(store, "running"), ended(store, "report")
        assert not store.expired(job.id)
        assert not store.expired(key="report")
        assert wait_until(lambda: store.get(job.id) is None, 5)
        assert (store.find("report"), store.holding_key("report"), store.outcome(job.id)) == (None,) * 3
        for _ in range(2):
            assert store.expired(job.id)
            assert store.expired(key="report")
            assert list(store.keys()) == ["running"]
            assert [record.id for record in store.list()] == [running.id]
            store.sweep()
        assert store.claim(Entry(job=JobState("render", "report").record(), holder=HERE)) is None, "the key is free"
        assert not store.expired(key="report")

    def test_purge(self, store: JobStore) -> None:
        running, old = started(store, "running"), ended(store, "old")
        time.sleep(0.01)
        then = time.time()
        young = ended(store, "young")
        assert store.purge(then) == 1
        assert store.get(old.id) is None
        assert store.expired(old.id)
        assert [record.id for record in store.list()] == [young.id, running.id]
        assert store.purge(time.time() + 1) == 1
        assert list(store.keys()) == ["running"]

    def test_ended_ones_are_bounded_and_open_ones_stay(self, store: JobStore) -> None:
        running = [started(store, f"r{number}") for number in range(20)]
        finished = [ended(store, f"e{number}") for number in range(25)]
        store.sweep()
        assert [bool(store.get(job.id)) for job in finished] == [False] * 15 + [True] * 10
        assert all(store.holding_key(f"r{number}") for number in range(20))
        assert len(store.list()) == 30
        assert store.holding_key("e0") is None
        assert store.expired(running[0].id) is False
        assert store.expired(finished[0].id)

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

    def test_a_holder_writes_again_what_the_store_has_forgotten(self, store: JobStore) -> None:
        job = started(store, "report")
        store.remove(job.id)
        store.write([Entry(job=job.record(), holder=HERE)])
        held = store.holding_key("report")
        assert held == job.record()

    def test_watch(self, make_store: MakeStore) -> None:
        store, other = make_store(), make_store()
        job = started(store)
        watch = other.watch()
        try:
            watch.begin({job.id})
            begin = time.monotonic()
            watch.wait(0.1)
            assert time.monotonic() - begin > 0.09, "nothing has changed"
            for _ in range(5):
                watch.begin({job.id})
                timer = threading.Timer(0.1, lambda: store.write([Entry(job=job.record(), holder=HERE)]))
                timer.start()
                begin = time.monotonic()
                watch.wait(10)
                assert time.monotonic() - begin < 5
                timer.join()
            watch.begin({job.id})
            store.write([Entry(job=job.record(), holder=HERE)])
            watch.wait(10)
            timer = threading.Timer(0.1, watch.wake)
            timer.start()
            watch.wait(10)
            timer.join()
        finally:
            watch.close()

    def test_many_threads(self, make_store: MakeStore) -> None:
        store = make_store(max_records=1000)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                for number in range(40):
                    job = ended(store)
                    assert store.get(job.id) == job.record()
                    store.list(limit=5)
                    store.find(str(number))
            except BaseException as error:
                errors.append(error)

        run_in_threads(6, work)
        assert errors == []
        assert len(store.list()) == 240

    def test_check_and_after_fork(self, store: JobStore) -> None:
        job = started(store, "report")
        store.check()
        pid = os.fork()
        if not pid:
            store.after_fork()
            found = store.holding_key("report")
            store.write([Entry(job=replace(job.record(), message="from the child"), holder=HERE)])
            os._exit(0 if found is not None and found.id == job.id else 1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        record = store.get(job.id)
        assert record is not None
        assert record.message == "from the child"
        store.close()
        store.check()

    def test_fork_while_others_write(self, store: JobStore) -> None:
        """In the child nothing is locked for ever by what a thread of the parent was in the middle of."""
        stopped = threading.Event()

        def write() -> None:
            while not stopped.is_set():
                started(store)

        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads:
            thread.start()
        codes = []
        for _ in range(20):
            pid = os.fork()
            if not pid:
                try:
                    faulthandler.dump_traceback_later(10, exit=True)
                    begin = time.monotonic()
                    store.after_fork()
                    found = store.get(started(store, f"key {os.getpid()}").id)
                    os._exit(0 if found is not None and time.monotonic() - begin < 2 else 1)
                finally:
                    os._exit(2)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        stopped.set()
        for thread in threads:
            thread.join()
        assert codes == [0] * 20
        assert len(store.keys()) == 20

    # ---- messages ----

    def test_messages_come_in_order_and_until_they_were_received(self, make_store: MakeStore) -> None:
        store, other = make_store(), make_store()
        job, neighbour = started(store), started(store)
        sent = [b"%d\x00\xff" % number for number in range(250)]
        for number, data in enumerate(sent):
            assert other.send(job.id, data)
            if number < 3:
                assert other.send(neighbour.id, data)
        store.ask_to_stop(StopRequest(id=job.id))
        assert messages_for(store, new_holder_id()) == [], "they are another's"
        first = messages_for(store)
        assert {message.id for message in first} == {job.id, neighbour.id}
        again = messages_for(store)
        assert again == first
        store.acknowledge(HERE, first)
        store.acknowledge(HERE, first)
        mine = [message.data for message in first if message.id == job.id]
        assert mine + receive(store)[job.id] == sent
        assert list(store.take_requests(HERE)) == []
        assert other.send(neighbour.id, b"later")
        assert receive(store) == {neighbour.id: [b"later"]}

    def test_500_messages_from_4_processes(self, make_store: MakeStore) -> None:
        store = make_store()
        job = started(store)
        children = []
        for sender in range(4):
            pid = os.fork()
            if not pid:
                try:
                    store.after_fork()
                    for number in range(125):
                        assert store.send(job.id, b"%d %d" % (sender, number))
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(pid)
        found: list[tuple[bytes, ...]] = []

        def have_all() -> bool:
            found.extend(tuple(data.split()) for data in receive(store).get(job.id, ()))
            return len(found) >= 500

        assert wait_until(have_all, 30)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
        assert receive(store) == {}
        for sender in range(4):
            name = str(sender).encode()
            assert [int(number) for who, number in found if who == name] == list(range(125))

    def test_messages_to_a_queued_job_of_an_engine_wait_for_whoever_takes_it(self, store: JobStore) -> None:
        job, other, worker = queued_in_engine(store, "report"), queued_in_engine(store), new_holder_id()
        for number in range(150):
            assert store.send(job.id, b"%d" % number)
        assert store.send(other.id, b"other")
        assert messages_for(store, worker) == []
        job.start()
        assert store.transfer(Entry(job=job.record(), holder=worker), ENGINE) is None
        assert receive(store, ENGINE) == {other.id: [b"other"]}, "and none of the job that was taken"
        assert receive(store, worker) == {job.id: [b"%d" % number for number in range(150)]}
        assert store.send(job.id, b"150")
        assert receive(store, worker) == {job.id: [b"150"]}

    def test_messages_to_a_job_whose_worker_has_died_go_to_the_next(
        self, store: JobStore, shorten_leases: ShortenLeases
    ) -> None:
        shorten_leases(store, 0.1)
        job, worker = queued_in_engine(store, "report"), new_holder_id()
        job.start()
        assert store.transfer(Entry(job=job.record(), holder=DEAD), ENGINE) is None
        assert store.renew(DEAD) is False
        assert store.send(job.id, b"a")
        assert wait_until(lambda: (store.get(job.id) or job).status == "lost")
        assert messages_for(store, DEAD) == [], "it has ended"
        assert not store.send(job.id, b"b")
        store.write([Entry(job=job.record(), holder=worker)])
        assert receive(store, worker) == {job.id: [b"a"]}
        assert store.send(job.id, b"c")
        assert receive(store, worker) == {job.id: [b"c"]}

    @pytest.mark.parametrize("status", [status for status in JobStatus if status.ended])
    def test_messages_to_a_job_that_has_ended(self, store: JobStore, status: JobStatus) -> None:
        job = claimed(store, "report")
        if status != "cancelled":
            job.start()
        assert store.send(job.id, b"before")
        job.end(status)
        store.write([Entry(job=job.record(), holder=HERE)])
        assert not store.send(job.id, b"after")
        assert messages_for(store) == [], "nobody can have them any more"
        assert not store.send("unknown", b"")

    def test_a_bound_on_messages(self, store: JobStore) -> None:
        job, other = started(store), started(store)
        for number in range(MOST_MESSAGES):
            assert store.send(job.id, b"%d" % number)
        with pytest.raises(QueueFull, match=f"1000 messages wait for job {job.id}, as many as are kept") as caught:
            store.send(job.id, b"one more")
        assert (caught.value.limit, str(pickle.loads(pickle.dumps(caught.value)))) == (1000, str(caught.value))
        assert store.send(other.id, b"there is room for others")
        found = receive(store)
        assert found == {job.id: [b"%d" % number for number in range(1000)], other.id: [b"there is room for others"]}
        assert store.send(job.id, b"one more")

    def test_messages_of_another_app(self, make_store: MakeStore) -> None:
        shop, bank = make_store("shop"), make_store("bank")
        job = started(shop)
        assert not bank.send(job.id, b"from a stranger")
        assert receive(shop) == {}
