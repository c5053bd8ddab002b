"""Write-behind: writes what the jobs of this process do to a shared store.

The writer thread does it, so that no job waits for a disk or a network.

**Who owns what.** All state is changed under ``_changed``, which is never held during a call of the store.

**Invariants.** A job is in ``_tracked`` from before it can start until its end is written. What is new about it is in
``_urgent`` or ``_batched``, or in ``_writing`` while a thread writes it; a write that fails puts it back. So nothing is
lost while the process lives.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from flask_executor.abc import Entry, JobStore, StopRequest, StoredMessage
from flask_executor.exceptions import StoreUnavailable
from flask_executor.helpers import describe_error
from flask_executor.helpers.log import logger
from flask_executor.jobs.current import RunningJob
from flask_executor.jobs.model import Job, JobState, JobStatus, LogLine
from flask_executor.stores.leases import HEARTBEAT_SECONDS, new_holder_id

_PROGRESS_WRITE_INTERVAL = 0.1  # seconds between two writes of progress, of all jobs together
_START_WRITE_DELAY = 0.01  # seconds for which the start of a job is not written: many jobs have ended by then
_END_WRITE_DELAY = 0.004  # seconds for which the end of a job is not written: jobs that end together share one write
_REQUEST_POLL_INTERVAL = 0.2  # seconds between two looks for requests to stop and messages
_STORE_RETRY_DELAY = 0.5  # seconds until a store that did not answer is tried again
_MAX_JOBS_PER_WRITE, _MAX_BYTES_PER_WRITE = 200, 32 << 20
_CLOSE_TIMEOUT = 5.0  # seconds that close() waits for the thread


class _Tracked:
    """A job of this process, and what of it is written."""

    __slots__ = ("ended", "is_held", "job", "last", "outcome", "running")

    def __init__(self, job: JobState, *, is_held: bool) -> None:
        self.job = job
        self.is_held = is_held  # written only while this process is the holder
        self.ended = False  # whether its outcome is known; the status may have changed a moment before
        self.outcome: bytes | None = None  # to be written with its end
        self.last: LogLine | None = None  # the line of its log that was written last
        self.running: RunningJob | None = None  # what has something new to report


class StoreWriter:
    """The writer thread, and what it has to write. It also renews the lease, and asks the store for requests.

    :param on_request: called in the writer thread with each stop request and message for a job of this process; must be
        quick.
    """

    def __init__(self, store: JobStore, on_request: Callable[[StopRequest | StoredMessage], None]) -> None:
        #: This process, as it is known in the store.
        self.holder = new_holder_id()
        self._store = store
        self._on_request = on_request
        self._changed = threading.Condition()  # reentrant: the garbage collector may run a finalizer in the middle
        self._tracked: dict[str, _Tracked] = {}
        self._urgent: dict[str, _Tracked] = {}
        self._batched: dict[str, _Tracked] = {}
        self._urgent_at = self._batch_at = 0.0  # when _urgent and _batched are due (all times monotonic)
        self._batch_written_at = 0.0  # when _batched was taken last
        self._leased_until = 0.0  # how long the lease of ensure_lease() lasts at least
        self._sleeps_until = 0.0  # when the thread wakes up by itself, if it sleeps
        self._poll_at = self._renew_at = 0.0  # when to ask for requests, and to renew the lease
        self._writing: dict[int, list[_Tracked]] = {}  # what is being written, by the ids of the threads that do
        self._outage: StoreUnavailable | None = None
        self._to_remove: set[str] = set()
        self._received: list[StoredMessage] = []  # handed on, and perhaps still in the store; the writer thread's
        self._closing = False
        self._disposed = False  # whether nobody will use the store any more
        self._cut_off = False  # whether the process ends, and unfinished jobs are lost
        self._thread: threading.Thread | None = None

    # ---- any thread ----

    def add(self, job: JobState, *, claimed: bool, is_held: bool = False) -> None:
        """Track a job until it has ended.

        :param claimed: If true, its record is in the store already.
        :param is_held: If true, an engine is to have the job, and perhaps has it already: write nothing of it once this
            process is not its holder any more.
        """
        tracked = _Tracked(job, is_held=is_held)
        with self._changed:
            if not self._tracked:
                self._poll_at = time.monotonic() + _REQUEST_POLL_INTERVAL
                self._wake_up(self._poll_at)
            self._tracked[job.id] = tracked
            if not claimed:
                self._put_batched(tracked)
            self._start()

    def ensure_lease(self) -> None:
        """Have a lease, for some seconds at least, for a job that is not tracked."""
        if time.monotonic() >= self._leased_until:
            held = self._store.renew(self.holder)
            self._leased_until = time.monotonic() + HEARTBEAT_SECONDS
            if not held:
                self._write_all_again()

    def tracks(self, id: str) -> bool:
        """Return whether the job with this id is tracked."""
        return id in self._tracked

    def changed(self, job: JobState) -> None:
        """The job has started, or waits for its next attempt."""
        tracked = self._tracked.get(job.id)
        if tracked is not None:
            with self._changed:
                self._put_batched(tracked)

    def report(self, running: RunningJob) -> None:
        """A job that runs in this process has something new to report; called again when that was read."""
        tracked = self._tracked.get(running.id)
        if tracked is not None:
            with self._changed:
                tracked.running = running
                self._put_batched(tracked)

    def ended(self, job: JobState, outcome: bytes | None) -> None:
        """The job has ended, with this outcome."""
        tracked = self._tracked.get(job.id)
        if tracked is not None:
            with self._changed:
                tracked.outcome, tracked.ended = outcome, True
                self._batched.pop(job.id, None)
                if not self._urgent:
                    self._urgent_at = time.monotonic() + _END_WRITE_DELAY
                    self._wake_up(self._urgent_at)
                self._urgent[job.id] = tracked

    def forget(self, id: str) -> None:
        """Write no more of this job: it was not accepted."""
        with self._changed:
            for jobs in (self._tracked, self._urgent, self._batched):
                jobs.pop(id, None)

    def release(self, id: str) -> list[LogLine]:
        """Write no more of this job, as another process is to have it; returns when no thread writes it.

        :return: the lines of its log that are not written.
        """
        with self._changed:
            tracked = self._tracked.get(id)
            self.forget(id)
            if tracked is None:
                return []
            self._wait_while_written(tracked)
            return tracked.job.log_after(tracked.last)

    def remove_when_possible(self, id: str) -> None:
        """Remove the record of a job that was not accepted: whether the store has one is not known."""
        with self._changed:
            self._to_remove.add(id)
            self._changed.notify_all()
            with suppress(RuntimeError):  # the process starts no more threads; the next job's will do this
                self._start()

    def flush(self, timeout: float | None) -> bool:
        """Write all that is new.

        :return: whether that was done within ``timeout`` seconds.
        """
        with self._changed:
            self._hasten()
            return self._changed.wait_for(lambda: not (self._urgent or self._batched or self._writing), timeout)

    def finish(self, id: str) -> None:
        """Write the end of a job in the calling thread, which has nothing else to do until the store has it."""
        with self._changed:
            tracked = self._tracked.get(id)
            if tracked is not None:
                self._wait_while_written(tracked)  # as the job stood before, which must not come after its end
            tracked = self._urgent.pop(id, None)
            if tracked is not None:
                self._writing[threading.get_ident()] = [tracked]
        if tracked is not None:
            try:
                self._write([tracked])
            except StoreUnavailable as error:  # the writer thread goes on with it
                self._put_back([tracked], error)
        with self._changed:
            if id in self._tracked:
                self._hasten()
                self._changed.wait_for(lambda: id not in self._tracked)

    def abandon_unfinished(self, timeout: float) -> None:
        """The process ends: write that its unfinished jobs are lost.

        :param timeout: most seconds that this may take.
        """
        with self._changed:
            self._urgent.update(self._tracked)
            self._closing = True
            self._cut_off = True
            left = bool(self._tracked)
        if not self.flush(timeout if left else 0.0) and left:
            logger.warning("The process ends, and the end of %d jobs could not be written.", len(self._tracked))

    def close(self, *, wait: bool) -> None:
        """End the thread when all jobs have ended and everything is written.

        :param wait: If true, wait for that, a few seconds at most.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_TIMEOUT)

    def dispose(self) -> None:
        """As :meth:`close`, and then close the store: the app is gone."""
        with self._changed:
            self._disposed = True
            self.close(wait=False)
            thread = self._thread
        if thread is None:
            self._store.close()

    # ---- under _changed ----

    def _wait_while_written(self, tracked: _Tracked) -> None:
        """Wait until no thread writes this job."""
        self._changed.wait_for(lambda: not any(tracked in taken for taken in self._writing.values()))

    def _hasten(self) -> None:
        """Make everything due now."""
        self._urgent.update(self._batched)
        self._batched.clear()
        self._urgent_at = 0.0
        self._changed.notify_all()

    def _put_batched(self, tracked: _Tracked) -> None:
        if tracked.job.id in self._urgent:
            return
        if not self._batched:
            earliest = self._batch_written_at + _PROGRESS_WRITE_INTERVAL
            self._batch_at = max(time.monotonic() + _START_WRITE_DELAY, earliest)
            self._wake_up(self._batch_at)
        self._batched[tracked.job.id] = tracked

    def _wake_up(self, due: float) -> None:
        """Wake the thread if it would sleep longer than until ``due``. Mostly it would not, and waking it costs."""
        if due < self._sleeps_until:
            self._changed.notify_all()

    def _start(self) -> None:
        self._closing = False
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="flask-executor-writer", daemon=True)
            thread.start()
            self._thread = thread

    def _next_timeout(self) -> float | None:
        """Seconds until the thread has something to do; None for nothing to do."""
        now = time.monotonic()
        if self._outage is not None:
            return max(0.0, self._poll_at - now)
        times = [self._batch_at] if self._batched else []
        times += [0.0] if self._to_remove else []
        times += [self._urgent_at] if self._urgent else []
        if self._tracked:
            times += [self._poll_at, self._renew_at]
        return max(0.0, min(times) - now) if times else None

    def _take(self) -> list[_Tracked]:
        """Take what is due, for the calling thread to write."""
        now = time.monotonic()
        if self._batched and now >= self._batch_at:
            self._urgent.update(self._batched)
            self._batched.clear()
            self._batch_written_at = now
        taken: list[_Tracked] = []
        size = 0
        for tracked in list(self._urgent.values()):
            size += len(tracked.outcome or b"")
            if taken and (len(taken) == _MAX_JOBS_PER_WRITE or size > _MAX_BYTES_PER_WRITE):
                break
            taken.append(tracked)
            del self._urgent[tracked.job.id]
        if taken:
            self._writing[threading.get_ident()] = taken
        return taken

    # ---- the writer thread ----

    def _run(self) -> None:
        while not self._is_over():
            with self._changed:
                taken = self._take()
            try:
                self._work(taken)
            except StoreUnavailable as error:
                self._put_back(taken, error)
            except Exception as error:  # a fault of the store's; what jobs do must be written all the same
                if self._outage is None:
                    logger.exception("Writing what jobs do has failed; trying again.")
                self._put_back(taken, StoreUnavailable("", describe_error(error)))
            del taken

    def _is_over(self) -> bool:
        """Wait until there is something to do; True at the end, when the lease is dropped.

        Until then ``_thread`` is this thread, and no other thread closes the store or starts another writer.
        """
        while self._wait():
            self._drop_lease()
            with self._changed:
                is_over, is_last = self._is_done(), self._disposed
                if is_over:
                    self._thread = None
                else:
                    self._renew_at = 0.0  # a job was added meanwhile, and the lease is gone
            if is_over:
                if is_last:
                    self._store.close()
                return True
        return False

    def _wait(self) -> bool:
        """Wait until there is something to do (False), or there never will be (True)."""
        with self._changed:
            while (timeout := self._next_timeout()) != 0.0:
                if self._is_done():
                    return True
                self._sleeps_until = math.inf if timeout is None else time.monotonic() + timeout
                self._changed.wait(timeout)
                self._sleeps_until = 0.0
            return False

    def _is_done(self) -> bool:
        return self._closing and not self._tracked and (self._outage is not None or not self._to_remove)

    def _work(self, taken: list[_Tracked]) -> None:
        """Do what is due."""
        now = time.monotonic()
        renews = now >= self._renew_at or self._outage is not None
        held = not renews or self._store.renew(self.holder)  # first: a job of a holder without a lease counts as lost
        self._write(taken)
        for id in list(self._to_remove):
            self._store.remove(id)
            self._to_remove.discard(id)
        if now >= self._poll_at:
            self._poll_at = now + _REQUEST_POLL_INTERVAL
            self._poll_requests()
        if renews:
            self._renew_at = now + HEARTBEAT_SECONDS
            self._end_outage()
            if not held:
                self._write_all_again()
            self._store.sweep()

    def _poll_requests(self) -> None:
        """Hand on the requests of other processes; messages for jobs that are not tracked yet stay in the store."""
        self._acknowledge()  # first, if that has failed: what is in the store after that was not handed on
        for request in self._store.take_requests(self.holder):
            if isinstance(request, StopRequest):
                self._on_request(request)
            elif self.tracks(request.id):
                self._received.append(request)
                self._on_request(request)
        if self._received:
            self._poll_at = 0.0  # there may be more
            self._acknowledge()

    def _acknowledge(self) -> None:
        """Remove the messages from the store that were handed on."""
        if self._received:
            self._store.acknowledge(self.holder, self._received)
            self._received = []

    def _write(self, taken: list[_Tracked]) -> None:
        pairs = [(tracked, self._entry(tracked)) for tracked in taken if self._is_settled(tracked)]
        for tracked, entry in pairs:
            if tracked.is_held:
                self._store.transfer(entry, self.holder, lost=True, new=False)
        self._write_all([entry for tracked, entry in pairs if not tracked.is_held])
        with self._changed:
            self._writing.pop(threading.get_ident(), None)
            for tracked, entry in pairs:
                tracked.last = entry.log[-1] if entry.log else tracked.last
                if entry.job.status.ended and entry.job.id not in self._urgent:
                    self._tracked.pop(entry.job.id, None)
            self._changed.notify_all()

    def _write_all(self, entries: list[Entry]) -> None:
        if entries:
            try:
                self._store.write(entries)
            except StoreUnavailable:
                raise
            except Exception:  # one of them has something that the store does not take
                for entry in entries:
                    self._write_alone(entry)

    def _write_alone(self, entry: Entry) -> None:
        try:
            self._store.write([entry])
        except StoreUnavailable:
            raise
        except Exception:
            logger.exception("What job %s (%s) reports cannot be written.", entry.job.name, entry.job.id)
            bare = replace(entry.job, message=None, meta={}, error=entry.job.error and ascii(entry.job.error))
            try:
                self._store.write([replace(entry, job=bare, log=())])
            except StoreUnavailable:
                raise
            except Exception:
                logger.exception("Nothing about job %s (%s) can be written.", entry.job.name, entry.job.id)

    def _is_settled(self, tracked: _Tracked) -> bool:
        """Return whether it may be written: the end of a job is written with its outcome, which comes just after."""
        return tracked.ended or self._cut_off or not tracked.job.status.ended

    def _entry(self, tracked: _Tracked) -> Entry:
        if tracked.running is not None:
            tracked.running.report_pending = False  # first: what is reported from here on calls report() again
        ended = tracked.ended
        job = tracked.job.record()
        if job.status.ended and not (ended or self._cut_off):  # just now, and its outcome is not known yet
            job = replace(job, status=JobStatus.RUNNING, ended_at=None)
        if self._cut_off and not job.status.ended:
            job = _cut_off(job)
        log = tracked.job.log_after(tracked.last)
        return Entry(job=job, holder=self.holder, outcome=tracked.outcome if job.status.ended else None, log=log)

    def _put_back(self, taken: list[_Tracked], error: StoreUnavailable) -> None:
        with self._changed:
            self._writing.pop(threading.get_ident(), None)
            for tracked in taken:
                if tracked.job.id in self._tracked:
                    self._urgent.setdefault(tracked.job.id, tracked)
            first, self._outage = self._outage is None, error
            self._poll_at = time.monotonic() + _STORE_RETRY_DELAY
            self._changed.notify_all()
        if first and error.where:
            logger.warning("%s. Jobs go on, and what they do is written when it is back.", error)

    def _end_outage(self) -> None:
        with self._changed:
            outage, self._outage = self._outage, None
        if outage is not None and outage.where:
            logger.warning("The job store %s is back.", outage.where)

    def _write_all_again(self) -> None:
        """The lease had run out: other processes may have marked the jobs as lost, or the store has forgotten them."""
        with self._changed:
            self._urgent.update(self._tracked)

    def _drop_lease(self) -> None:
        try:
            self._store.drop_lease(self.holder)
        except StoreUnavailable as error:  # the lease runs out by itself
            logger.info("%s", error)


def _cut_off(job: Job) -> Job:
    return replace(
        job,
        status=JobStatus.LOST,
        ended_at=time.time(),
        error="WorkerLost: the process ended before the job did",
    )
