"""How a job passes between the process that sends it, an engine, and the worker of that engine that runs it.

The holder in the record says who has a job. The holder changes by compare-and-set only: of all processes that call
:meth:`store.transfer(entry, former) <flask_executor.abc.JobStore.transfer>` one succeeds, and only while ``former`` has
the job. The message in the engine's queue decides nothing, as an engine may deliver it twice, or late.

.. code-block:: text

  who has it     moved by                                  compare-and-set         a crash just before it leaves
 ──────────────┬────────────────────────────────────────┬────────────────────────┬─────────────────────────────────────
  nobody: no   │ the worker: acquire()                  │ none -> worker         │ the message; the engine delivers it
  record       │ any process: cancel_queued(), refuse() │ none -> engine, ended  │ again
 ──────────────┼────────────────────────────────────────┼────────────────────────┼─────────────────────────────────────
  the sender   │ the sender, when the engine has the    │ sender -> engine       │ a lost record; if the engine has
               │ message: transferring()                │                        │ the message, its worker takes the
               │ a worker that is faster: acquire()     │ sender -> worker       │ job over from the dead sender
               │ the sender: cancel_queued()            │ sender -> engine, ended│
 ──────────────┼────────────────────────────────────────┼────────────────────────┼─────────────────────────────────────
  the engine   │ the worker: acquire()                  │ engine -> worker       │ the message; the engine delivers it
               │ any process: cancel_queued(), refuse() │ engine -> engine, ended│ again
 ──────────────┼────────────────────────────────────────┼────────────────────────┼─────────────────────────────────────
  the worker   │ the worker, for the next attempt:      │ worker -> engine       │ a lost record; the engine delivers
               │ return_to_engine()                     │                        │ the message again, and the next
               │ another worker: acquire()              │ lost -> other worker   │ worker takes the job over

  The worker's own end of the job is no transfer: its StoreWriter writes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from flask_executor.abc import Entry, StopRequest
from flask_executor.exceptions import StoreUnavailable
from flask_executor.helpers import describe_error, weak_callback
from flask_executor.helpers.log import logger
from flask_executor.helpers.timer import timer
from flask_executor.jobs.model import Job, JobState, JobStatus
from flask_executor.stores.leases import HEARTBEAT_SECONDS, LEASE_SECONDS, is_alive

if TYPE_CHECKING:
    from flask_executor.jobs.call import Call
    from flask_executor.tracking.shared import SharedJobTracker

_STORE_RETRY_DELAY = 0.5  # seconds until a store that did not answer is asked again
_LEASE_POLL_INTERVAL = 0.5  # seconds between two looks whether the lease of another machine's process has run out
_SENDER_POLL_INTERVAL = 0.02  # seconds between two looks whether a sender has handed its job over


class EngineHandover:
    """This process's part in a handover: as sender, as worker, or on behalf of another process's job.

    Any thread may call it.

    :param tracker: tracks the jobs of this process.
    :param engine: the engine, as a holder.
    """

    # Single operations on the sets are atomic; _acquiring makes one of "look and add".

    def __init__(self, tracker: SharedJobTracker, engine: str) -> None:
        self.engine = engine
        #: Takes a job that was cancelled off the engine's queue; the producer sets it.
        self.remove_queued: Callable[[Job], object] = _keep_queued
        self._tracker = tracker
        self._store = tracker.store
        self.after_fork()

    def after_fork(self) -> None:
        """In the child of a fork: the jobs are the parent's."""
        self._held: set[str] = set()  # ids of jobs that wait in this process before they are sent
        self._acquired: set[str] = set()  # ids of jobs that the engine has delivered to this process, and that run here
        self._acquiring = threading.Lock()

    # ---- the sender ----

    def announce(self, job: JobState) -> None:
        """Write the record of a job that is about to be sent, so that other processes can find it by its id."""
        self._tracker.writer.ensure_lease()
        self._store.transfer(Entry(job=job.record(), holder=self._tracker.holder), None)

    def hold_locally(self, job: JobState) -> None:
        """Have a job wait in this process, until it is sent; it is lost if the process ends before."""
        self._store.write([Entry(job=job.record(), holder=self._tracker.holder)])
        self._held.add(job.id)
        self._tracker.writer.add(job, claimed=True, is_held=True)

    def is_held(self, id: str) -> bool:
        """Return whether a job waits in this process, and was not cancelled."""
        return id in self._held

    @contextmanager
    def transferring(self, job: JobState) -> Iterator[None]:
        """Within this context the caller gives the message to the engine; then the engine becomes the holder.

        Until the engine has the message this process stays the holder, so that the job is lost if the process dies.
        A worker may be faster, and then has the job already.
        """
        was_held = job.id in self._held
        if was_held:
            self._tracker.writer.release(job.id)  # first: what it is about to write would come after the worker's
        try:
            yield
        except BaseException:
            if job.id in self._held:  # it was not cancelled meanwhile
                self._tracker.writer.add(job, claimed=True, is_held=True)
            raise
        if was_held or self._tracker.is_recorded(job.key):
            self._hand_over(job.record())

    def _hand_over(self, job: Job) -> None:
        entry = Entry(job=job, holder=self.engine)
        try:
            found = self._store.transfer(entry, self._tracker.holder, new=False)
            if found is not None and found.status is JobStatus.LOST and found.started_at is None:
                # The store was away for longer than our lease, and others took this process for dead.
                found = self._store.transfer(entry, self._tracker.holder, lost=True, new=False)
        except StoreUnavailable as error:
            logger.info("Job %s (%s) is in the queue, and its record still here: %s", job.name, job.id, error)
            timer.call_later(_STORE_RETRY_DELAY, partial(weak_callback(self._hand_over_later), job))
            return
        self._held.discard(job.id)
        if found is not None and found.status is JobStatus.CANCELLED:  # meanwhile
            self.remove_queued(found)

    def _hand_over_later(self, job: Job) -> None:
        self._tracker.in_background(lambda: self._hand_over(job))

    # ---- the worker ----

    def acquire(self, call: Call, sender: str) -> bool:
        """Become the holder of a job that the engine has delivered, and track it.

        An engine may deliver a job to another worker when one has died, and twice to the same one.

        :param sender: the holder that has sent it.
        :return: False when the job was cancelled, has ended, or runs already.
        :raises StoreUnavailable: if the store does not answer; this process may be the holder all the same.
        """
        id = call.job.id
        with self._acquiring:
            if id in self._acquired or self._tracker.writer.tracks(id):  # the store would give it to us once more
                return False
            self._acquired.add(id)
        acquired = False
        try:
            acquired = self._acquire(call, sender)
        finally:
            if not acquired:
                self._acquired.discard(id)
        return acquired

    def _acquire(self, call: Call, sender: str) -> bool:
        job = call.job
        if self._store.expired(job.id):  # it has ended or was cancelled, so long ago that the record has left
            return False
        if call.retried:  # then the record knows which attempt this is
            known = self._store.get(job.id)
            if known is not None:
                job.attempt, job.error = known.attempt, known.error
        entry = Entry(job=job.record(), holder=self._tracker.holder)
        # Engine, sender, engine: if the sender hands over between the first two attempts, the third one succeeds.
        acquired = any(self._store.transfer(entry, former) is None for former in (self.engine, sender, self.engine))
        if acquired or self._take_over_from_dead(entry):
            self._tracker.track_acquired(call)
            return True
        return False

    def _take_over_from_dead(self, entry: Entry) -> bool:
        """Take a job over from a worker that is dead.

        That a process of another machine is dead shows when its lease runs out: this waits for that.
        """
        deadline = time.monotonic() + LEASE_SECONDS + HEARTBEAT_SECONDS
        while True:
            self._store.get(entry.job.id)  # which marks the job as lost, if it is
            found = self._store.transfer(entry, self._tracker.holder, lost=True)
            if found is None or found.status.ended:
                return found is None
            holder = self._store.holder(entry.job.id)
            if holder is None or is_alive(holder) is not None or time.monotonic() > deadline:
                return False
            time.sleep(_LEASE_POLL_INTERVAL)

    def is_acquired(self, id: str) -> bool:
        """Return whether this process runs a job that the engine has delivered to it."""
        return id in self._acquired

    def ended(self, id: str) -> None:
        """The job has ended in this process, if it was here."""
        self._acquired.discard(id)

    def finish(self, job: JobState) -> None:
        """Wait until the store has the end of a job that has ended here."""
        self._tracker.writer.finish(job.id)
        self._tracker.forget(job.id)

    def return_to_engine(self, job: JobState) -> None:
        """Make the engine the holder again, for the next attempt; waits until the store has that."""
        log = self._tracker.stop_tracking(job.id)
        while True:
            try:
                entry = Entry(job=job.record(), holder=self.engine, log=log)
                # lost=True: others may have taken this process for dead.
                self._store.transfer(entry, self._tracker.holder, lost=True)
                for request in self._store.take_requests(self._tracker.holder):  # that came for it until now
                    if isinstance(request, StopRequest):  # messages follow the job
                        self._tracker.on_request(request)
                break
            except StoreUnavailable as error:
                logger.warning("Job %s is to be tried again, and has to wait: %s", job.id, error)
                time.sleep(_STORE_RETRY_DELAY)
        self._acquired.discard(job.id)
        self._tracker.forget(job.id)

    # ---- any process, about a job that waits in the engine's queue ----

    def ensure_record(self, job: Job) -> None:
        """Write the record of a job that was sent, if nobody has: a message needs it."""
        self._store.transfer(Entry(job=job, holder=self.engine), None)

    def cancel_queued(self, job: Job) -> bool:
        """Cancel a job that no worker has acquired; False when one has, or it has ended."""
        if job.status is not JobStatus.QUEUED:
            return False
        cancelled = Entry(job=replace(job, status=JobStatus.CANCELLED, ended_at=time.time()), holder=self.engine)
        if self._store.transfer(cancelled, self.engine) is not None:
            writer = self._tracker.writer
            runs_here = job.id in self._acquired or (writer.tracks(job.id) and job.id not in self._held)
            if runs_here or self._store.transfer(cancelled, self._tracker.holder) is not None:
                return False
            self._held.discard(job.id)
            writer.forget(job.id)
        self.remove_queued(cancelled.job)
        return True

    def forward_stop(self, request: StopRequest) -> None:
        """A request to stop came here for a job that this process does not have any more."""
        job = self._store.get(request.id)
        if job is not None and not job.status.ended and not self.cancel_queued(job) and not request.only_queued:
            self._store.ask_to_stop(request)  # a worker has acquired it meanwhile

    def refuse(self, id: str, error: Exception, name: str = "unknown") -> None:
        """Mark a queued job as failed: no worker can run it.

        :param name: the job's name, for a job that has no record yet.
        """
        deadline = time.monotonic() + LEASE_SECONDS
        while True:
            job = self._store.get(id) or JobState(name, None, None, id=id).record()
            if job.status is not JobStatus.QUEUED:
                return
            failed = replace(job, status=JobStatus.FAILED, error=describe_error(error), ended_at=time.time())
            entry = Entry(job=failed, holder=self.engine, outcome=self._tracker.pack_error(id, error))
            if self._store.transfer(entry, self.engine) is None or time.monotonic() > deadline:
                return
            time.sleep(_SENDER_POLL_INTERVAL)  # the sender is about to hand it over


def _keep_queued(job: Job) -> None:
    """Without a producer: the worker that gets the message drops it."""
