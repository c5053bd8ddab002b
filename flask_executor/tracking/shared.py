"""What all processes of an app know of its jobs, through a store that they share.

.. code-block:: text

  the process that has a job                       store              another process
 ┌───────────────────────────────────────────┐   ┌───────┐   ┌─────────────────────────────────────────────┐
 │ submit: claim() ──────────────────────────┼──>│ keys  │<──┼─ futures.get(key): held() ──> StoredFuture, │
 │ worker: changed, report, ended            │   │       │   │    which reads record and outcome when asked│
 │   └──> Recorder (thread): write(), renew()┼──>│ jobs  │<──┼─ jobs.get(), find(), list()                 │
 │        take_requests() <──────────────────┼───│       │<──┼─ stop(), cancel(), send(): ask_to_stop(),   │
 │   ├──> requests (thread): stops the job   │   │       │   │    send()                                   │
 │   └──> mail (thread): gives it messages   │   │       │───┼> Follower (thread): watch(), settles        │
 └───────────────────────────────────────────┘   └───────┘   │    handles that somebody waits for          │
                                                             │    └──> callbacks (thread): the user's code │
                                                             └─────────────────────────────────────────────┘

**Who owns what.** A record is written by the process that has the job, but for two changes that any process may make:
``lost``, when that process is dead, and leaving, when its time has come. A key changes hands in the store only, in one
step. A handle is settled once, from memory where the job runs, from the store elsewhere. A message belongs to the store
until the process that has the job has handed it on.

**Invariants.** A job does not start before its key is claimed. Its end is written together with what came of it, so
who sees the one finds the other. No job waits for the store: only the claim does, before it, and its process writes the
rest as soon as it can, for as long as it lives. Nothing is unpickled that is not signed with a key of ours, or lies
where only we can write.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flask_executor.abc import Entry, JobStore, StopRequest, StoredMessage
from flask_executor.exceptions import (
    ConfigError,
    ExecutorError,
    NotPicklable,
    ResultTooLarge,
    StoreUnavailable,
    UntrustedResult,
)
from flask_executor.futures import FutureCollection, FutureProxy
from flask_executor.helpers import describe_error, weak_callback
from flask_executor.helpers.log import logger
from flask_executor.helpers.serial_thread import SerialThread
from flask_executor.helpers.timer import timer
from flask_executor.jobs.call import JobChannel
from flask_executor.jobs.current import RunningJob
from flask_executor.jobs.model import Job, JobMessage, JobState, JobStatus
from flask_executor.jobs.packing import pack_error, pickle_or_explain, unpack_error, unpack_result
from flask_executor.stores.codec import encode_key
from flask_executor.stores.leases import HEARTBEAT_SECONDS, LEASE_SECONDS, is_alive
from flask_executor.tracking.local import JobTracker, TrackingOptions, has_failed, is_pinned
from flask_executor.tracking.merged_records import MergedRecords
from flask_executor.tracking.signing import (
    MESSAGE,
    OUTCOME,
    PayloadKind,
    PayloadSigner,
    pack_message,
    secret_keys,
    unpack_message,
)
from flask_executor.tracking.stored_future import StoredFuture, error_of
from flask_executor.tracking.stored_futures import StoredFutureCollection
from flask_executor.tracking.watcher import CompletionWatcher, Followed
from flask_executor.tracking.writer import StoreWriter

if TYPE_CHECKING:
    from flask import Flask

    from flask_executor.jobs.call import Call

_PATIENCE = 5.0  # seconds to wait until something is written
_AGAIN = 0.5  # seconds until a store that was not available is tried again
_MOMENT = 0.02  # seconds between two looks


class SharedJobTracker(JobTracker):
    """Handles and records of the jobs of all processes of an app.

    This process answers from memory about the jobs that it has itself, and from the store about others.
    """

    shared = True

    def __init__(self, options: TrackingOptions, store: JobStore, app: weakref.ref[Flask], channel: JobChannel) -> None:
        super().__init__(options)
        self.store = store
        self.engine: str | None = None  # who has the jobs of this process, if not the process
        self.discard: Callable[[Job], None] = _nothing  # takes what was cancelled off the queue of the engine
        self._app = app
        self._channel = weakref.ref(channel)
        self._closed = False
        self._handles: weakref.WeakValueDictionary[str, FutureProxy[Any]] = weakref.WeakValueDictionary()
        self._sealers: dict[str, PayloadSigner] = {}  # by what they seal
        self._held: set[str] = set()  # ids of jobs that wait here for the engine to get them
        self._acquired: set[str] = set()  # ids of jobs of this process that an engine has sent
        self._adopting = threading.Lock()
        self._parts: list[Any] = []
        self._start_threads()
        self.records = MergedRecords(self._memory, store, self._is_written)
        length, most = options.futures_max_length, options.max_records
        self.futures: StoredFutureCollection = StoredFutureCollection(length, most, store, self.handle)
        weakref.finalize(self, _dispose, self._parts)

    def _start_threads(self) -> None:
        """What has threads."""
        self._follower = CompletionWatcher(self.store)
        self._recorder = StoreWriter(self.store, weak_callback(self._on_request))
        self._make_serial_threads()

    def _make_serial_threads(self) -> None:
        """Callbacks may take long, also those of a job that is cancelled; so may what is unpickled, and an engine or a
        store that is asked again.
        """
        self._callbacks = SerialThread("flask-executor-shared")
        self._requests = SerialThread("flask-executor-requests")
        self._mail = SerialThread("flask-executor-mail")
        self._late = SerialThread("flask-executor-late")
        threads = (self._callbacks, self._requests, self._mail, self._late)
        self._parts[:] = [self._follower, *threads, self._recorder]

    def reconfigure(self, options: TrackingOptions) -> None:
        if options.store != self._options.store:
            logger.warning("%s has changed, which has no effect: a store stays.", options.config_key("EXECUTOR_STORE"))
        super().reconfigure(options)
        if self._closed:  # and there are to be jobs again
            self._closed = False
            self._make_serial_threads()

    @property
    def holder(self) -> str:
        """This process, as it is known in the store."""
        return self._recorder.holder

    # ---- jobs of this process ----

    def take(self, call: Call) -> FutureProxy[Any] | None:
        self._signer()  # or the result could not be kept
        job = call.job
        here = FutureCollection.get(self.futures, job.key)
        if here is not None and getattr(here, "key", None) != job.key:  # added by hand
            return here
        encode_key(job.key)  # or it could not be stored
        self._handles[job.id] = call.future  # first: who finds the record may ask for it to be stopped
        try:
            there = self._claim(call)
            if there is None:
                if not _is_sent(call):
                    self._recorder.add(job, claimed=True)
                self.futures.hold(job.key, call.future, pinned=is_pinned(call.options))
        except BaseException:  # perhaps the store has taken it all the same, and its answer was lost
            self._recorder.remove_when_possible(job.id)
            raise
        return there

    def _claim(self, call: Call) -> FutureProxy[Any] | None:
        again = call.options.again
        entry = Entry(job=call.job.record(), holder=self.holder)
        there = self.store.claim(entry, again=again)
        if there is not None and again and has_failed(self._handles.get(there.id)):
            self._recorder.flush(_PATIENCE)  # one of ours has failed just now, and the store does not know it yet
            there = self.store.claim(entry, again=again)
        return None if there is None else self.handle(there)

    def add(self, call: Call) -> None:
        if _is_sent(call):  # its worker writes it, if nobody has to find it before
            if call.job.key is None and self._options.track == "all":
                self._recorder.ensure_lease()
                self.store.transfer(Entry(job=call.job.record(), holder=self.holder), None)
            return
        super().add(call)
        if self._options.track == "all" and call.job.key is None:
            self._signer()
            self._handles[call.job.id] = call.future
            self._recorder.add(call.job, claimed=False)

    def remove(self, future: FutureProxy[Any]) -> None:
        self._recorder.forget(future.job_id)
        self._memory.remove(future.job_id)
        if future.key is not None:
            FutureCollection.pop(self.futures, future.key)
        if future.key is not None or self._options.track == "all":
            try:
                self.store.remove(future.job_id)
            except StoreUnavailable as error:
                logger.warning("Job %s was not accepted, and its record stays for a while: %s", future.job_id, error)
                self._recorder.remove_when_possible(future.job_id)

    def acquire(self, call: Call, sender: str) -> bool:
        """Have a job that an engine has given to this process; False when it was cancelled, or it is being run.

        An engine may give a job to somebody else when a worker has died, and twice to the same one.

        :param sender: who had it before the engine.
        """
        id = call.job.id
        with self._adopting:
            if id in self._acquired or self._recorder.tracks(id):  # the store would give it to us once more
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
        if self.store.expired(job.id):  # it had ended, or was cancelled, and nobody knows any more
            return False
        if call.retried:  # then the record knows which attempt this is
            known = self.store.get(job.id)
            if known is not None:
                job.attempt, job.error = known.attempt, known.error
        entry = Entry(job=job.record(), holder=self.holder)
        # The engine twice: its sender may hand it over between the first two.
        acquired = any(self.store.transfer(entry, former) is None for former in (self.engine, sender, self.engine))
        if acquired or self._take_over_from_dead(entry):
            self._handles[job.id] = call.future
            self._memory.add(job)
            self._recorder.add(job, claimed=True)
            if job.status.ended:  # it was stopped while the store was asked
                self._recorder.ended(job, None)
            return True
        return False

    def _take_over_from_dead(self, entry: Entry) -> bool:
        """Take over a job whose process is dead; whether it is, on another machine, is known when its lease ends."""
        deadline = time.monotonic() + LEASE_SECONDS + HEARTBEAT_SECONDS
        while True:
            self.store.get(entry.job.id)  # which finds out whether it is lost
            there = self.store.transfer(entry, self.holder, lost=True)
            if there is None or there.status.ended:
                return there is None
            holder = self.store.holder(entry.job.id)
            if holder is None or is_alive(holder) is not None or time.monotonic() > deadline:
                return False
            time.sleep(_AGAIN)

    def finish(self, job: JobState) -> None:
        """Wait until the store knows what came of a job that has ended."""
        self._recorder.finish(job.id)
        self._memory.remove(job.id)  # a worker lives long, and the store has it all

    def is_acquired(self, id: str) -> bool:
        """Whether this process has a job from an engine."""
        return id in self._acquired

    def return_to_engine(self, job: JobState) -> None:
        """Have a job belong to the engine again, which waits until the store has that."""
        self._handles.pop(job.id, None)
        log = self._recorder.release(job.id)
        while True:
            try:
                entry = Entry(job=job.record(), holder=self.engine or "", log=log)
                self.store.transfer(entry, self.holder, lost=True)  # or somebody has it who took us for dead
                for request in self.store.take_requests(self.holder):  # that came for it until now
                    if isinstance(request, StopRequest):  # messages follow the job
                        self._on_request(request)
                break
            except StoreUnavailable as error:
                logger.warning("Job %s is to be tried again, and has to wait: %s", job.id, error)
                time.sleep(_AGAIN)
        self._acquired.discard(job.id)
        self._memory.remove(job.id)

    def hold_locally(self, job: JobState) -> None:
        """A job is to wait in this process before the engine gets it; it is lost if the process ends meanwhile."""
        self.store.write([Entry(job=job.record(), holder=self.holder)])
        self._held.add(job.id)
        self._recorder.add(job, claimed=True, kept=True)

    def is_held(self, id: str) -> bool:
        """Whether a job waits in this process, and was not cancelled."""
        return id in self._held

    @contextmanager
    def transferring(self, job: JobState) -> Iterator[None]:
        """While the engine gets a job. Until it has it the job is ours, as nobody would have it if we died.

        A worker may be quicker than what is done after that, and takes the job over from us.
        """
        is_held = job.id in self._held
        if is_held:
            self._recorder.release(job.id)  # first: what it is about to write would come after the worker's
        try:
            yield
        except BaseException:
            if job.id in self._held:  # it was not cancelled meanwhile
                self._recorder.add(job, claimed=True, kept=True)
            raise
        if is_held or job.key is not None or self._options.track == "all":
            self._hand_over(job.record())

    def _hand_over(self, job: Job) -> None:
        entry = Entry(job=job, holder=self.engine or "")
        try:
            there = self.store.transfer(entry, self.holder, new=False)
            if there is not None and there.status is JobStatus.LOST and there.started_at is None:
                # The store was not there for a while, but we were.
                there = self.store.transfer(entry, self.holder, lost=True, new=False)
        except StoreUnavailable as error:
            logger.info("Job %s (%s) is in the queue, and its record still here: %s", job.name, job.id, error)
            timer.call_later(_AGAIN, partial(weak_callback(self._hand_over_later), job))
            return
        self._held.discard(job.id)
        if there is not None and there.status is JobStatus.CANCELLED:  # meanwhile
            self.discard(there)

    def _hand_over_later(self, job: Job) -> None:
        self.in_background(lambda: self._hand_over(job))

    def refuse(self, id: str, error: Exception, name: str = "unknown") -> None:
        """A job that waits in the queue of an engine cannot be run.

        :param name: what it is called, for one that has no record yet.
        """
        deadline = time.monotonic() + LEASE_SECONDS
        while True:
            job = self.store.get(id) or JobState(name, None, None, id=id).record()
            if job.status is not JobStatus.QUEUED or self.engine is None:
                return
            failed = replace(job, status=JobStatus.FAILED, error=describe_error(error), ended_at=time.time())
            outcome = self._signer().seal(id, PayloadKind.ERROR, self._packed_error(error))
            there = self.store.transfer(Entry(job=failed, holder=self.engine, outcome=outcome), self.engine)
            if there is None or time.monotonic() > deadline:
                return
            time.sleep(_MOMENT)  # its sender is about to hand it over

    def cancel_queued(self, job: Job) -> bool:
        if self.engine is None or job.status is not JobStatus.QUEUED:
            return False
        cancelled = Entry(job=replace(job, status=JobStatus.CANCELLED, ended_at=time.time()), holder=self.engine)
        if self.store.transfer(cancelled, self.engine) is not None:
            runs_here = job.id in self._acquired or (self._recorder.tracks(job.id) and job.id not in self._held)
            if runs_here or self.store.transfer(cancelled, self.holder) is not None:
                return False
            self._held.discard(job.id)
            self._recorder.forget(job.id)
        self.discard(cancelled.job)
        return True

    def _is_written(self, job: Job) -> bool:
        """Whether the store knows, or knew, all there is to know about a job of this process."""
        is_recorded = job.key is not None or self._options.track == "all"
        return is_recorded and job.status.ended and not self._recorder.tracks(job.id)

    def changed(self, job: JobState) -> None:
        self._recorder.changed(job)

    def reporter(self, job: JobState) -> Callable[[RunningJob], None] | None:
        return self._recorder.report if self._recorder.tracks(job.id) else None

    def pack_result(self, job: JobState, result: Any, packed: bytes | None) -> bytes | None:
        if not self._recorder.tracks(job.id):
            return None
        if packed is None:
            packed = b"".join(pickle_or_explain(result, f"The result of job {job.name}", "be kept in the store"))
        limit = self._options.result_max_bytes
        if len(packed) > limit:
            raise ResultTooLarge(job.name, len(packed), limit, self._options.config_key("EXECUTOR_RESULT_MAX_BYTES"))
        return self._signer().seal(job.id, PayloadKind.RESULT, packed)

    def ended(self, job: JobState, error: BaseException | None, outcome: bytes | None) -> None:
        self._memory.end(job)
        self._acquired.discard(job.id)
        if self._recorder.tracks(job.id):
            try:
                if error is not None:
                    outcome = self._signer().seal(job.id, PayloadKind.ERROR, self._packed_error(error))
            finally:
                self._recorder.ended(job, outcome)

    def _packed_error(self, error: BaseException) -> bytes:
        packed = pack_error(error)
        limit = self._options.result_max_bytes
        if len(packed) <= limit:
            return packed
        key = self._options.config_key("EXECUTOR_RESULT_MAX_BYTES")
        what = f"a job's error has {len(packed)} bytes and {key} allows {limit}; it was: {describe_error(error)}"
        return pack_error(NotPicklable(what))

    def _on_request(self, request: StopRequest | StoredMessage) -> None:
        """Another process wants one of our jobs to be stopped, or to have a message."""
        if isinstance(request, StopRequest):
            self._requests.run(lambda: self._meet(request))
            return
        future = self._handles.get(request.id)
        if future is not None:
            self._mail.run(lambda: self._on_message(request, future))

    def _meet(self, request: StopRequest) -> None:
        future = self._handles.get(request.id)
        if future is not None and (future.cancel() if request.only_queued else future.stop(request.grace)):
            return
        job = None if self.engine is None else self.store.get(request.id)
        if job is not None and not job.status.ended and not self.cancel_queued(job) and not request.only_queued:
            self.store.ask_to_stop(request)  # the engine has it again, or has given it to somebody else

    def _on_message(self, stored: StoredMessage, future: FutureProxy[Any]) -> None:
        try:
            message = unpack_message(stored.id, stored.data, self._verifying_signer(MESSAGE, stored.id))
            future.send(message.type, message.body)
        except ExecutorError as error:
            extra = {"job_id": future.job_id, "job_key": future.key}
            logger.error("A message for job %s (%s) is dropped: %s", future.name, future.job_id, error, extra=extra)

    # ---- jobs of other processes ----

    @property
    def channel(self) -> JobChannel:
        """What handles report to."""
        channel = self._channel()
        if channel is None:
            raise RuntimeError("the app of this job is gone")
        return channel

    def handle(self, job: Job, *, is_written: bool = True) -> FutureProxy[Any]:
        """The handle of a job.

        :param is_written: whether the store has this record of it.
        """
        return self._handles.get(job.id) or StoredFuture(job, self, is_written=is_written)

    def open(self, job: Job) -> tuple[Any, BaseException | None]:
        """The result of a job that has ended, or what it has raised."""
        sealed = self.store.outcome(job.id)
        if sealed is None:
            return None, error_of(job)
        try:
            kind, payload = self._verifying_signer(OUTCOME, job.id).open(job.id, sealed)
            if kind is PayloadKind.RESULT:
                return unpack_result(payload, job.name), None
            return None, unpack_error(payload)
        except (ConfigError, NotPicklable, UntrustedResult) as error:
            return None, error

    def send(self, job: Job, message: JobMessage) -> bool:
        """Send a message to a job by way of the store; False when it has ended."""
        if self.engine is not None and job.status is JobStatus.QUEUED:  # perhaps nobody has written it yet
            self.store.transfer(Entry(job=job, holder=self.engine), None)
        return self.store.send(job.id, pack_message(job, message, self._signer(MESSAGE)))

    def follow(self, future: Followed) -> None:
        """Have a handle settled when its job has ended."""
        self._follower.add(future)

    def unfollow(self, future: Followed) -> None:
        """Nobody waits for this handle any more."""
        self._follower.discard(future)

    def aside(self, fn: Callable[[], object]) -> None:
        """Run code of the user's where it holds up nobody."""
        self._callbacks.run(fn)

    def in_background(self, fn: Callable[[], object]) -> None:
        self._late.run(fn)

    def _verifying_signer(self, what: str, id: str) -> PayloadSigner:
        """What checks that it is ours what the store has of a job.

        :raises UntrustedResult: when that cannot be told.
        """
        sealer = self._signer(what)
        if not (sealer.signs or self.store.is_private):
            raise UntrustedResult(
                f"Others can write to {self.store.where}, and without a SECRET_KEY nothing tells that the {what} of "
                f"job {id} is not theirs. Set one."
            )
        return sealer

    def _signer(self, what: str = OUTCOME) -> PayloadSigner:
        """What signs and checks results, or messages.

        :raises ConfigError: for a store that others can write to, in an app without a secret key.
        """
        sealer = self._sealers.get(what)
        if sealer is None:
            keys = secret_keys(self._app())
            if not keys and not self.store.is_private:
                raise ConfigError(
                    "SECRET_KEY",
                    None,
                    f"set, and the same in all processes: others can write to {self.store.where}, and what is "
                    "unpickled from there has to be signed",
                )
            sealer = self._sealers[what] = PayloadSigner(keys, what)
        return sealer

    # ---- life ----

    def flush(self, timeout: float | None) -> bool:
        return self._recorder.flush(timeout)

    def check(self) -> None:
        self.store.check()

    def after_fork(self) -> None:
        # What is of this process starts anew; the handles of the parent's jobs are found through the store from now on.
        self.store.after_fork()
        self._memory.clear()
        self._handles = weakref.WeakValueDictionary()
        self._held, self._acquired, self._adopting = set(), set(), threading.Lock()
        self._follower.after_fork()
        self._start_threads()
        self.futures.after_fork()
        self.futures.clear()

    def abandoned(self, job: JobState) -> None:
        pass  # the store knows what becomes of it

    def give_up(self, timeout: float) -> None:
        self._recorder.give_up(timeout)

    def close(self, *, wait: bool) -> None:
        self._closed = True
        self._recorder.close(wait=wait)
        self._follower.close(wait=wait)
        for thread in (self._requests, self._mail, self._late, self._callbacks):
            thread.close(wait=wait)


def _is_sent(call: Call) -> bool:
    """Whether an engine is to have the job, and not this process."""
    return isinstance(call.future, StoredFuture)


def _nothing(job: Job) -> None:
    """There is no engine."""


def _dispose(parts: Sequence[Any]) -> None:
    """The app is gone."""
    *others, recorder = parts
    for part in others:
        part.close(wait=False)
    recorder.dispose()
