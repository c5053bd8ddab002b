"""Writes down, in a shared store, what the jobs of this process do.

One thread, so that no job waits for a disk or a network. **Who owns what:** everything below is changed under
``_changed``, which is never held while the store is asked. **Invariants:** a job is in ``_tracked`` from before it can
start until its end is written. What is new about it is in ``_urgent`` or ``_batched``, or in the hands of
the thread, which puts it back when it cannot be written. So nothing is lost while the process lives.
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

_INTERVAL = 0.1  # seconds between two writes of a job's progress
_BRIEF = 0.01  # seconds for which the start of a job is not written: many have ended by then
_TOGETHER = 0.004  # seconds for which the end of a job is not written: others may end, and one write does for all
_LOOK = 0.2  # seconds between two looks for requests to stop, and messages
_AGAIN = 0.5  # seconds until a store that was not available is tried again
_MOMENT = 0.002  # seconds between two looks whether a write has ended
_MOST, _MOST_BYTES = 200, 32 << 20  # jobs and bytes that are written in one go


class _Tracked:
    """A job, and what of it is written."""

    __slots__ = ("ended", "is_held", "job", "last", "outcome", "running")

    def __init__(self, job: JobState, *, is_held: bool) -> None:
        self.job = job
        self.is_held = is_held  # written only if it is still this process's
        self.ended = False  # whether it is known what came of it; its status may have changed a moment before
        self.outcome: bytes | None = None  # to be written
        self.last: LogLine | None = None  # written last
        self.running: RunningJob | None = None  # has something to report


class StoreWriter:
    """The thread and what it has to do.

    :param requested: called, in the thread, with what others want of jobs of this process; must be quick.
    """

    def __init__(self, store: JobStore, requested: Callable[[StopRequest | StoredMessage], None]) -> None:
        #: This process, as it is known in the store.
        self.holder = new_holder_id()
        self._store = store
        self._requested = requested
        self._changed = threading.Condition()  # a finalizer may come here in the middle
        self._tracked: dict[str, _Tracked] = {}
        self._urgent: dict[str, _Tracked] = {}
        self._batched: dict[str, _Tracked] = {}
        self._urgent_at = self._batch_at = 0.0  # when _now and _later are due (all times monotonic)
        self._written = 0.0  # when it was written last
        self._leased = 0.0  # until when there is a lease for others
        self._sleeps_until = 0.0  # when the thread wakes up by itself, if it sleeps
        self._poll_at = self._renew_at = 0.0  # when to look for requests, and to renew the lease
        self._writing: set[int] = set()  # the threads that do
        self._outage: StoreUnavailable | None = None
        self._to_remove: set[str] = set()
        self._received: list[StoredMessage] = []  # handed on, and perhaps still in the store; the thread's
        self._closing = False
        self._disposed = False  # whether nobody will use the store any more
        self._cut_off = False  # whether what has not ended never will
        self._thread: threading.Thread | None = None

    # ---- any thread ----

    def add(self, job: JobState, *, claimed: bool, kept: bool = False) -> None:
        """Track a job until it has ended.

        :param claimed: whether its record is in the store already.
        :param kept: whether an engine is to have it, and perhaps has it already.
        """
        tracked = _Tracked(job, is_held=kept)
        with self._changed:
            if not self._tracked:
                self._poll_at = time.monotonic() + _LOOK
                self._wake_up(self._poll_at)
            self._tracked[job.id] = tracked
            if not claimed:
                self._put_batched(tracked)
            self._start()

    def ensure_lease(self) -> None:
        """Have a lease for something that is not tracked, for some seconds at least."""
        if time.monotonic() >= self._leased:
            held = self._store.renew(self.holder)
            self._leased = time.monotonic() + HEARTBEAT_SECONDS
            self._look_after(held=held)

    def tracks(self, id: str) -> bool:
        """Whether the job with this id is tracked."""
        return id in self._tracked

    def changed(self, job: JobState) -> None:
        """The job has started, or waits for its next attempt."""
        tracked = self._tracked.get(job.id)
        if tracked is not None:
            with self._changed:
                self._put_batched(tracked)

    def report(self, running: RunningJob) -> None:
        """A job that runs here has something new to report; called again when that was read."""
        tracked = self._tracked.get(running.id)
        if tracked is not None:
            with self._changed:
                tracked.running = running
                self._put_batched(tracked)

    def ended(self, job: JobState, outcome: bytes | None) -> None:
        """The job has ended, and this came of it."""
        tracked = self._tracked.get(job.id)
        if tracked is not None:
            with self._changed:
                tracked.outcome, tracked.ended = outcome, True
                self._batched.pop(job.id, None)
                if not self._urgent:
                    self._urgent_at = time.monotonic() + _TOGETHER
                    self._wake_up(self._urgent_at)
                self._urgent[job.id] = tracked

    def forget(self, id: str) -> None:
        """The job was not accepted: do not write any more of it."""
        with self._changed:
            for where in (self._tracked, self._urgent, self._batched):
                where.pop(id, None)

    def release(self, id: str) -> list[LogLine]:
        """Somebody else has the job from now on: write no more of it; the lines of its log that are not written."""
        with self._changed:
            while self._writing:  # perhaps this one
                self._changed.wait(_MOMENT)
            tracked = self._tracked.get(id)
            self.forget(id)
            return [] if tracked is None else tracked.job.log_after(tracked.last)

    def remove_when_possible(self, id: str) -> None:
        """It is not known whether the store has taken this job, which was not accepted: have it removed."""
        with self._changed:
            self._to_remove.add(id)
            self._changed.notify_all()
            with suppress(RuntimeError):  # no more threads; whoever starts it for the next job does this too
                self._start()

    def flush(self, timeout: float | None) -> bool:
        """Have all written that is new; whether that was done within so many seconds."""
        with self._changed:
            self._urgent.update(self._batched)
            self._batched.clear()
            self._urgent_at = 0.0
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not (self._urgent or self._batched or self._writing), timeout)

    def finish(self, id: str) -> None:
        """Have the end of a job written, by the thread that calls this, which cannot go on before."""
        with self._changed:
            while self._writing:  # perhaps how the job stood before, which must not come after its end
                self._changed.wait(_MOMENT)
            tracked = self._urgent.pop(id, None)
            if tracked is not None:
                self._writing.add(threading.get_ident())
        if tracked is not None:
            try:
                self._write([tracked])
            except StoreUnavailable as error:  # the other thread goes on with it
                self._put_back([tracked], error)
        while self.tracks(id):
            self.flush(None)
            time.sleep(_MOMENT)

    def give_up(self, timeout: float) -> None:
        """The process ends: what has not ended by now is lost; have that written, if it takes no longer than this."""
        with self._changed:
            self._urgent.update(self._tracked)
            self._closing = True
            self._cut_off = True
            left = bool(self._tracked)
        if not self.flush(timeout if left else 0.0) and left:
            logger.warning("The process ends, and the end of %d jobs could not be written.", len(self._tracked))

    def close(self, *, wait: bool) -> None:
        """End the thread when all jobs have ended and everything is written.

        :param wait: whether to wait for that, a few seconds at most.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join(5.0)

    def dispose(self) -> None:
        """As :meth:`close`, and close the store after that; the app is gone."""
        with self._changed:
            self._disposed = True
            self.close(wait=False)
            thread = self._thread
        if thread is None:
            self._store.close()

    # ---- under _changed ----

    def _put_batched(self, tracked: _Tracked) -> None:
        if tracked.job.id in self._urgent:
            return
        if not self._batched:
            self._batch_at = max(time.monotonic() + _BRIEF, self._written + _INTERVAL)
            self._wake_up(self._batch_at)
        self._batched[tracked.job.id] = tracked

    def _wake_up(self, due: float) -> None:
        """Something is to be done then. Often the thread is up by then anyway, and to wake it for each job costs."""
        if due < self._sleeps_until:
            self._changed.notify_all()

    def _start(self) -> None:
        self._closing = False
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="flask-executor-recorder", daemon=True)
            thread.start()
            self._thread = thread

    def _patience(self) -> float | None:
        """Seconds until there is something to do; None for nothing."""
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
        """What is to be written, and is in the hands of the thread from now on."""
        now = time.monotonic()
        if self._batched and now >= self._batch_at:
            self._urgent.update(self._batched)
            self._batched.clear()
            self._written = now
        taken: list[_Tracked] = []
        size = 0
        for tracked in list(self._urgent.values()):
            size += len(tracked.outcome or b"")
            if taken and (len(taken) == _MOST or size > _MOST_BYTES):
                break
            taken.append(tracked)
            del self._urgent[tracked.job.id]
        if taken:
            self._writing.add(threading.get_ident())
        return taken

    # ---- the thread ----

    def _run(self) -> None:
        while not self._is_over():
            with self._changed:
                taken = self._take()
            try:
                self._work(taken)
            except StoreUnavailable as error:
                self._put_back(taken, error)
            except Exception as error:  # nothing that is known; what jobs do must be written all the same
                if self._outage is None:
                    logger.exception("The recorder of jobs failed, and tries again.")
                self._put_back(taken, StoreUnavailable("", describe_error(error)))
            del taken

    def _is_over(self) -> bool:
        """Wait until there is something to do; True at the end, when the lease is given back.

        Until then this is the thread of the recorder: nobody else may close the store, or start another.
        """
        while self._wait():
            self._leave()
            with self._changed:
                is_over, is_last = self._has_all(), self._disposed
                if is_over:
                    self._thread = None
                else:
                    self._renew_at = 0.0  # something has come meanwhile, and our lease is gone
            if is_over:
                if is_last:
                    self._store.close()
                return True
        return False

    def _wait(self) -> bool:
        """Wait until there is something to do, or nothing will be any more; whether it is the second."""
        with self._changed:
            while (patience := self._patience()) != 0.0:
                if self._has_all():
                    return True
                self._sleeps_until = math.inf if patience is None else time.monotonic() + patience
                self._changed.wait(patience)
                self._sleeps_until = 0.0
            return False

    def _has_all(self) -> bool:
        return self._closing and not self._tracked and (self._outage is not None or not self._to_remove)

    def _work(self, taken: list[_Tracked]) -> None:
        """Do what is due."""
        now = time.monotonic()
        beats = now >= self._renew_at or self._outage is not None
        held = not beats or self._store.renew(self.holder)  # first: a job of a holder without a lease counts as lost
        self._write(taken)
        for id in list(self._to_remove):
            self._store.remove(id)
            self._to_remove.discard(id)
        if now >= self._poll_at:
            self._poll_at = now + _LOOK
            self._look_for_requests()
        if beats:
            self._renew_at = now + HEARTBEAT_SECONDS
            self._is_well(held=held)
            self._store.sweep()

    def _look_for_requests(self) -> None:
        """Hand on what others want; messages of jobs that are not tracked yet stay where they are."""
        self._confirm()  # first, if that has failed: what is in the store then was not handed on
        for request in self._store.take_requests(self.holder):
            if isinstance(request, StopRequest):
                self._requested(request)
            elif self.tracks(request.id):
                self._received.append(request)
                self._requested(request)
        if self._received:
            self._poll_at = 0.0  # there may be more
            self._confirm()

    def _confirm(self) -> None:
        """Have messages leave the store that were handed on."""
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
            self._writing.discard(threading.get_ident())
            for tracked, entry in pairs:
                tracked.last = entry.log[-1] if entry.log else tracked.last
                if entry.job.status.ended and entry.job.id not in self._urgent:
                    self._tracked.pop(entry.job.id, None)
            if not self._urgent and not self._batched:
                self._changed.notify_all()

    def _write_all(self, entries: list[Entry]) -> None:
        if entries:
            try:
                self._store.write(entries)
            except StoreUnavailable:
                raise
            except Exception:  # something in one of them that the store does not take
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
        """Whether it may be written: the end of a job not before it is known what came of it, which is in a moment."""
        return tracked.ended or self._cut_off or not tracked.job.status.ended

    def _entry(self, tracked: _Tracked) -> Entry:
        if tracked.running is not None:
            tracked.running.report_pending = False  # first: what comes from here on is told again
        ended = tracked.ended
        job = tracked.job.record()
        if job.status.ended and not (ended or self._cut_off):  # just now
            job = replace(job, status=JobStatus.RUNNING, ended_at=None)
        if self._cut_off and not job.status.ended:
            job = _cut_off(job)
        log = tracked.job.log_after(tracked.last)
        return Entry(job=job, holder=self.holder, outcome=tracked.outcome if job.status.ended else None, log=log)

    def _put_back(self, taken: list[_Tracked], error: StoreUnavailable) -> None:
        with self._changed:
            self._writing.discard(threading.get_ident())
            for tracked in taken:
                if tracked.job.id in self._tracked:
                    self._urgent.setdefault(tracked.job.id, tracked)
            first, self._outage = self._outage is None, error
            self._poll_at = time.monotonic() + _AGAIN
        if first and error.where:
            logger.warning("%s. Jobs go on, and what they do is written when it is back.", error)

    def _is_well(self, *, held: bool) -> None:
        with self._changed:
            was, self._outage = self._outage, None
        self._look_after(held=held)
        if was is not None and was.where:
            logger.warning("The job store %s is back.", was.where)

    def _look_after(self, *, held: bool) -> None:
        if not held:  # others may have written that our jobs are lost; or the store has forgotten them
            with self._changed:
                self._urgent.update(self._tracked)

    def _leave(self) -> None:
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
