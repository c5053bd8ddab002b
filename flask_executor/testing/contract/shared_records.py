"""What every shared store promises about records: reading, listing, logs, expiry, watches and forks."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from flask_executor.abc import Entry, JobStore
from flask_executor.jobs.model import LOG_LINES, JobState, JobStatus, LogLine
from flask_executor.testing.contract.fixtures import run_in_threads, wait_until
from flask_executor.testing.contract.shared_fixtures import (
    HERE,
    MakeStore,
    SharedStoreFixtures,
    claimed,
    ended,
    started,
)


class RecordTests(SharedStoreFixtures):
    """Reading and writing records, logs, expiry, watches and forks."""

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

    def test_what_is_written_at_once_is_listed_youngest_first(self, make_store: MakeStore) -> None:
        store = make_store(max_records=100)
        jobs = [JobState("render", owner="ada") for _ in range(30)]
        for number, job in enumerate(jobs):
            job.queued_at += number / 1000
        store.write([Entry(job=job.record(), holder=HERE) for job in jobs])
        youngest = [job.id for job in jobs[::-1]]
        assert [job.id for job in store.list()] == youngest
        assert [job.id for job in store.list(owner="ada", limit=3)] == youngest[:3]

    def test_a_close_cuts_nobody_off(self, store: JobStore) -> None:
        """A process closes its store while its other threads are in the middle of a look or a wait."""
        job = ended(store)
        looking, closed = threading.Event(), threading.Event()
        errors: list[BaseException] = []

        def until_closed(look: Callable[[], object]) -> None:
            try:
                while not closed.is_set():
                    look()
                    looking.set()
                look()
            except BaseException as error:
                errors.append(error)

        def watch_until_closed() -> None:
            watch = store.watch()
            try:
                watch.begin({job.id})
                until_closed(lambda: watch.wait(0.01))
            except BaseException as error:
                errors.append(error)
            finally:
                watch.close()

        threads = [threading.Thread(target=until_closed, args=[lambda: store.get(job.id)]) for _ in range(3)]
        threads += [threading.Thread(target=watch_until_closed) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert looking.wait(10)
        for _ in range(20):
            store.close()
        closed.set()
        for thread in threads:
            thread.join()
        assert errors == []

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
