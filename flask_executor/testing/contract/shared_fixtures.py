"""What the tests of shared stores have in common: stores, and jobs in them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from flask_executor.abc import Entry, JobStore, StopRequest, StoredMessage, StoreOptions
from flask_executor.executor.factory import store_class_of
from flask_executor.jobs.model import JobState, JobStatus
from flask_executor.stores.leases import engine_holder, new_holder_id
from flask_executor.testing.contract.fixtures import wait_until

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


class SharedStoreFixtures:
    """Stores in one place, and how long their leases last."""

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
        """A function that sets the length of leases, in seconds.

        It sets ``LEASE_SECONDS`` at its source, and where the store imports it.

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
