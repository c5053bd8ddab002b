"""What every shared store promises about messages to jobs."""

from __future__ import annotations

import os
import pickle

import pytest

from flask_executor.abc import MOST_MESSAGES, Entry, JobStore, StopRequest
from flask_executor.exceptions import QueueFull
from flask_executor.jobs.model import JobStatus
from flask_executor.stores.leases import new_holder_id
from flask_executor.testing.contract.fixtures import wait_until
from flask_executor.testing.contract.shared_fixtures import (
    DEAD,
    ENGINE,
    HERE,
    MakeStore,
    SharedStoreFixtures,
    ShortenLeases,
    claimed,
    messages_for,
    queued_in_engine,
    receive,
    started,
)


class MessageTests(SharedStoreFixtures):
    """Messages that wait for a job."""

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
