"""What every store promises. A new one joins by a line in ``STORES``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conftest import run_in_threads
from flask_executor.abc import JobStore
from flask_executor.jobs import Job, JobStatus, LiveJob
from flask_executor.stores.memory import MemoryStore

STORES: dict[str, Callable[[], JobStore]] = {"memory": lambda: MemoryStore(max_records=10)}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> JobStore:
    return STORES[request.param]()


def started(store: JobStore, name: str = "render", key: str | None = None, owner: str | None = None) -> LiveJob:
    job = LiveJob(name, key, owner)
    store.add(job)
    job.start()
    store.update(job)
    return job


def ended(store: JobStore, name: str = "render", key: str | None = None) -> LiveJob:
    job = started(store, name, key)
    job.end(JobStatus.SUCCEEDED)
    store.update(job)
    return job


def test_what_was_written_is_read(store: JobStore) -> None:
    job = LiveJob("render", "report", "ada")
    store.add(job)
    assert store.get(job.id) == store.find("report") == job.record()
    job.start()
    store.update(job)
    assert store.get(job.id) == job.record()
    job.end(JobStatus.FAILED, ValueError("no paper"))
    store.update(job)
    record = store.get(job.id)
    assert record == job.record()
    assert record is not None
    assert record.error == "ValueError: no paper"


def test_records_are_frozen_moments(store: JobStore) -> None:
    job = LiveJob("render")
    store.add(job)
    before = store.get(job.id)
    job.start()
    store.update(job)
    assert isinstance(before, Job)
    assert before.status == "queued"


def test_unknown_ones(store: JobStore) -> None:
    assert store.get("unknown") is None
    assert store.find("unknown") is None
    store.remove("unknown")
    assert list(store.list()) == []


def test_remove(store: JobStore) -> None:
    job = ended(store, key="report")
    store.remove(job.id)
    assert store.get(job.id) is None
    assert store.find("report") is None


def test_the_youngest_under_a_key(store: JobStore) -> None:
    first, second = ended(store, key="report"), started(store, key="report")
    assert store.find("report") == second.record()
    store.remove(first.id)
    assert store.find("report") == second.record()


def test_list(store: JobStore) -> None:
    jobs = [ended(store, "a"), started(store, "b", owner="ada"), ended(store, "a")]
    assert [job.id for job in store.list()] == [job.id for job in reversed(jobs)]
    assert [job.id for job in store.list(name="a", limit=1)] == [jobs[2].id]
    assert [job.id for job in store.list(owner="ada", status="running")] == [jobs[1].id]
    assert list(store.list(limit=0)) == []
    with pytest.raises(ValueError, match="limit is -1; it must be 0 or more"):
        store.list(limit=-1)
    with pytest.raises(ValueError, match="asleep"):
        store.list(status="asleep")


def test_ended_ones_are_bounded_and_open_ones_stay(store: JobStore) -> None:
    running = [started(store, key=f"r{number}") for number in range(20)]
    finished = [ended(store, key=f"e{number}") for number in range(25)]
    assert len(store.list()) == 30
    assert all(store.find(f"r{number}") for number in range(20))
    assert [bool(store.get(job.id)) for job in finished] == [False] * 15 + [True] * 10
    assert store.find("e0") is None
    for job in running:
        job.end(JobStatus.SUCCEEDED)
        store.update(job)
    assert len(store.list()) == 10


def test_many_threads(store: JobStore) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for number in range(200):
                ended(store, key=str(number))
                store.list(limit=5)
                store.find(str(number))
        except BaseException as error:
            errors.append(error)

    run_in_threads(6, work)
    assert errors == []
    assert len(store.list()) == 10


def test_reachable(store: JobStore) -> None:
    assert store.reachable()
    store.after_fork()
    assert store.reachable()
