"""The jobs of all processes of an app, through a store that they share.

.. code-block:: text

  the process that has a job                       store              another process
 ┌───────────────────────────────────────────┐   ┌───────┐   ┌─────────────────────────────────────────────┐
 │ submit: claim() ──────────────────────────┼──>│ keys  │<──┼─ futures.get(key): holding_key()            │
 │ worker: changed, report, ended            │   │       │   │    ──> StoredFuture: get(), outcome()       │
 │   └──> StoreWriter: write(), renew() ─────┼──>│ jobs  │<──┼─ jobs.get(), find(), list()                 │
 │        take_requests() <──────────────────┼───│       │<──┼─ stop(), cancel(), send(): ask_to_stop(),   │
 │   ├──> stop requests (thread): stop()     │   │       │   │    send()                                   │
 │   └──> messages (thread): send()          │   │       │───┼> CompletionWatcher (thread): watch(),       │
 └───────────────────────────────────────────┘   └───────┘   │    settles handles that are waited for      │
                                                             │    └──> callbacks (thread): the user's code │
                                                             └─────────────────────────────────────────────┘

**Who owns what.** The process that has a job, its holder, writes the record. Any process may make two changes: it marks
the job as ``lost`` when the holder is dead, and removes the record when it has expired. A key passes from job to job in
the store only, by compare-and-set. A handle is settled once: from memory in the holder, from the store in other
processes. A message belongs to the store until the holder has delivered it. How a job passes between processes and an
engine is in :mod:`flask_executor.tracking.engine_handover`.

**Invariants.** A job does not start before its key is claimed. Its end is written together with its outcome: a process
that reads that the job has ended finds the outcome. No job waits for the store: the claim does, before the job starts,
and the writer thread writes the rest as soon as it can. Nothing is unpickled that is not signed with one of the app's
keys, unless only this user can write to the store.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
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
from flask_executor.helpers import describe_error, signing_keys, weak_callback
from flask_executor.helpers.log import logger
from flask_executor.helpers.serial_thread import SerialThread
from flask_executor.jobs.call import JobChannel
from flask_executor.jobs.current import RunningJob
from flask_executor.jobs.model import Job, JobMessage, JobState, JobStatus, LogLine
from flask_executor.jobs.packing import pack_error, pickle_or_explain, unpack_error, unpack_result
from flask_executor.stores.codec import encode_key
from flask_executor.tracking.local import JobTracker, TrackingOptions, has_failed, is_pinned
from flask_executor.tracking.merged_records import MergedRecords
from flask_executor.tracking.signing import (
    MESSAGE,
    OUTCOME,
    PayloadKind,
    PayloadSigner,
    pack_message,
    unpack_message,
)
from flask_executor.tracking.stored_future import StoredFuture, error_of
from flask_executor.tracking.stored_futures import StoredFutureCollection
from flask_executor.tracking.watcher import CompletionWatcher
from flask_executor.tracking.writer import StoreWriter

if TYPE_CHECKING:
    from flask import Flask

    from flask_executor.jobs.call import Call

_FLUSH_TIMEOUT = 5.0  # seconds to wait until the writer has written what it has


class SharedJobTracker(JobTracker):
    """Handles and records of the jobs of all processes of an app.

    It answers from memory about the jobs of this process, and from the store about others.
    """

    shared = True

    def __init__(self, options: TrackingOptions, store: JobStore, app: weakref.ref[Flask], channel: JobChannel) -> None:
        super().__init__(options)
        self.store = store
        self._app = app
        self._channel = weakref.ref(channel)
        self._closed = False
        # By id, for as long as something refers to them. Also those of jobs that have ended, whose results may not be
        # written yet; the index of the calls in flight has not.
        self._handles: weakref.WeakValueDictionary[str, FutureProxy[Any]] = weakref.WeakValueDictionary()
        self._signers: dict[str, PayloadSigner] = {}  # by what they sign
        self._parts: list[Any] = []
        self._make_threads()
        self.records = MergedRecords(self._memory, store, self._is_written)
        length, most = options.futures_max_length, options.max_records
        self.futures: StoredFutureCollection = StoredFutureCollection(length, most, store, self.handle)
        weakref.finalize(self, _dispose, self._parts)

    def _make_threads(self) -> None:
        """Make what starts a thread when it first has something to do."""
        self._watcher = CompletionWatcher(self.store)
        self.writer = StoreWriter(self.store, weak_callback(self.on_request))
        self._make_serial_threads()

    def _make_serial_threads(self) -> None:
        """A thread for each kind of work that may take long, so that none holds up another: the user's callbacks (also
        those of a job that a request cancels), unpickling messages, asking an engine or a store again.
        """
        self._callbacks = SerialThread("flask-executor-handles")
        self._stop_requests = SerialThread("flask-executor-stop-requests")
        self._messages = SerialThread("flask-executor-messages")
        self._background = SerialThread("flask-executor-background")
        threads = (self._callbacks, self._stop_requests, self._messages, self._background)
        self._parts[:] = [self._watcher, *threads, self.writer]

    def reconfigure(self, options: TrackingOptions) -> None:
        if options.store != self._options.store:
            logger.warning("%s has changed, which has no effect: a store stays.", options.config_key("EXECUTOR_STORE"))
        super().reconfigure(options)
        if self._closed:  # it is used again after a shutdown
            self._closed = False
            self._make_serial_threads()

    @property
    def holder(self) -> str:
        """This process, as it is known in the store."""
        return self.writer.holder

    # ---- jobs of this process ----

    def claim(self, call: Call) -> FutureProxy[Any] | None:
        self._signer()  # raises now what would keep the result from being stored
        job = call.job
        held = FutureCollection.get(self.futures, job.key)
        if held is not None and getattr(held, "key", None) != job.key:  # added by hand
            return held
        encode_key(job.key)  # raises now for a key that cannot be stored
        self._handles[job.id] = call.future  # first: a process that finds the record may ask for the job to be stopped
        try:
            existing = self._claim_in_store(call)
            if existing is None:
                if not _is_sent(call):
                    self.writer.add(job, claimed=True)
                self.futures.hold(job.key, call.future, pinned=is_pinned(call.options))
        except BaseException:  # perhaps the store has taken it all the same, and its answer was lost
            self.writer.remove_when_possible(job.id)
            raise
        return existing

    def _claim_in_store(self, call: Call) -> FutureProxy[Any] | None:
        again = call.options.again
        entry = Entry(job=call.job.record(), holder=self.holder)
        existing = self.store.claim(entry, again=again)
        if existing is not None and again and has_failed(self._handles.get(existing.id)):
            self.writer.flush(_FLUSH_TIMEOUT)  # it has failed in this process, and the store does not know it yet
            existing = self.store.claim(entry, again=again)
        return None if existing is None else self.handle(existing)

    def add(self, call: Call) -> None:
        is_unwritten = call.job.key is None and self._options.track == "all"
        if self.handover is not None and _is_sent(call):  # its worker writes the record
            if is_unwritten:  # but the job is to be found by its id before
                self.handover.announce(call.job)
            return
        super().add(call)
        if is_unwritten:
            self._signer()
            self._handles[call.job.id] = call.future
            self.writer.add(call.job, claimed=False)

    def remove(self, future: FutureProxy[Any]) -> None:
        self.writer.forget(future.job_id)
        self._memory.remove(future.job_id)
        if future.key is not None:
            FutureCollection.pop(self.futures, future.key)
        if self.is_recorded(future.key):
            try:
                self.store.remove(future.job_id)
            except StoreUnavailable as error:
                logger.warning("Job %s was not accepted, and its record stays for a while: %s", future.job_id, error)
                self.writer.remove_when_possible(future.job_id)

    def track_acquired(self, call: Call) -> None:
        """Track a job that an engine has delivered to this process, which is its holder from now on."""
        job = call.job
        self._handles[job.id] = call.future
        self._memory.add(job)
        self.writer.add(job, claimed=True)
        if job.status.ended:  # it was cancelled during the transfer in the store
            self.writer.ended(job, None)

    def stop_tracking(self, id: str) -> list[LogLine]:
        """Write no more of a job that an engine is to have.

        :return: the lines of its log that are not written yet.
        """
        self._handles.pop(id, None)
        return self.writer.release(id)

    def forget(self, id: str) -> None:
        """Remove a job from memory: the store has it all, and a worker of an engine may live for months."""
        self._memory.remove(id)

    def is_recorded(self, key: Hashable | None) -> bool:
        """Return whether the store gets a record of a job with this key."""
        return key is not None or self._options.track == "all"

    def _is_written(self, job: Job) -> bool:
        """Return whether the store knows, or knew, all there is to know about a job of this process."""
        return self.is_recorded(job.key) and job.status.ended and not self.writer.tracks(job.id)

    def changed(self, job: JobState) -> None:
        self.writer.changed(job)

    def reporter(self, job: JobState) -> Callable[[RunningJob], None] | None:
        return self.writer.report if self.writer.tracks(job.id) else None

    def pack_result(self, job: JobState, result: Any, packed: bytes | None) -> bytes | None:
        if not self.writer.tracks(job.id):
            return None
        if packed is None:
            packed = b"".join(pickle_or_explain(result, f"The result of job {job.name}", "be kept in the store"))
        limit = self._options.result_max_bytes
        if len(packed) > limit:
            raise ResultTooLarge(job.name, len(packed), limit, self._options.config_key("EXECUTOR_RESULT_MAX_BYTES"))
        return self._signer().sign(job.id, PayloadKind.RESULT, packed)

    def ended(self, job: JobState, error: BaseException | None, outcome: bytes | None) -> None:
        self._memory.end(job)
        if self.handover is not None:
            self.handover.ended(job.id)
        if self.writer.tracks(job.id):
            try:
                if error is not None:
                    outcome = self.pack_error(job.id, error)
            finally:
                self.writer.ended(job, outcome)

    def pack_error(self, id: str, error: BaseException) -> bytes:
        """The error of a job as the store is to keep it."""
        packed, limit = pack_error(error), self._options.result_max_bytes
        if len(packed) > limit:
            key = self._options.config_key("EXECUTOR_RESULT_MAX_BYTES")
            what = f"a job's error has {len(packed)} bytes and {key} allows {limit}; it was: {describe_error(error)}"
            packed = pack_error(NotPicklable(what))
        return self._signer().sign(id, PayloadKind.ERROR, packed)

    def on_request(self, request: StopRequest | StoredMessage) -> None:
        """Another process has asked for a job of this one to be stopped, or has sent it a message. Called by the writer
        thread, and returns at once.
        """
        if isinstance(request, StopRequest):
            self._stop_requests.run(lambda: self._on_stop_request(request))
            return
        future = self._handles.get(request.id)
        if future is not None:
            self._messages.run(lambda: self._on_message(request, future))

    def _on_stop_request(self, request: StopRequest) -> None:
        future = self._handles.get(request.id)
        is_met = future is not None and (future.cancel() if request.only_queued else future.stop(request.grace))
        if not is_met and self.handover is not None:
            self.handover.forward_stop(request)

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
        """The channel to which the handles of jobs of other processes report."""
        channel = self._channel()
        if channel is None:
            raise RuntimeError("the app of this job is gone")
        return channel

    def handle(self, job: Job, *, is_written: bool = True) -> FutureProxy[Any]:
        """The handle of a job.

        :param is_written: If true, the store has this record of it.
        """
        return self._handles.get(job.id) or StoredFuture(job, self, is_written=is_written)

    def open(self, job: Job) -> tuple[Any, BaseException | None]:
        """The result of a job that has ended, or what it has raised."""
        signed = self.store.outcome(job.id)
        if signed is None:
            return None, error_of(job)
        try:
            kind, payload = self._verifying_signer(OUTCOME, job.id).unsign(job.id, signed)
            if kind is PayloadKind.RESULT:
                return unpack_result(payload, job.name), None
            return None, unpack_error(payload)
        except (ConfigError, NotPicklable, UntrustedResult) as error:
            return None, error

    def send(self, job: Job, message: JobMessage) -> bool:
        """Send a message to a job by way of the store; False when it has ended."""
        if self.handover is not None and job.status is JobStatus.QUEUED:
            self.handover.ensure_record(job)
        return self.store.send(job.id, pack_message(job, message, self._signer(MESSAGE)))

    def cancel_queued(self, job: Job) -> bool:
        """Cancel a job that waits in the queue of an engine; False when a worker has it, or no engine has it."""
        return self.handover is not None and self.handover.cancel_queued(job)

    def watch(self, future: StoredFuture[Any]) -> None:
        """Have the watcher's thread settle a handle when its job has ended."""
        self._watcher.add(future)

    def unwatch(self, future: StoredFuture[Any]) -> None:
        """Nothing waits for this handle any more."""
        self._watcher.discard(future)

    def run_callbacks(self, fn: Callable[[], object]) -> None:
        """Run code of the user's in the thread for it."""
        self._callbacks.run(fn)

    def in_background(self, fn: Callable[[], object]) -> None:
        self._background.run(fn)

    def _verifying_signer(self, what: str, id: str) -> PayloadSigner:
        """Return what checks that the bytes in the store are this app's.

        :raises UntrustedResult: if nothing tells that: there is no key, and others can write to the store.
        """
        signer = self._signer(what)
        if not (signer.signs or self.store.is_private):
            raise UntrustedResult(
                f"Others can write to {self.store.where}, and without a SECRET_KEY nothing tells that the {what} of "
                f"job {id} is not theirs. Set one."
            )
        return signer

    def _signer(self, what: str = OUTCOME) -> PayloadSigner:
        """Return what signs and checks results, or messages.

        :raises ConfigError: for a store that others can write to, in an app without a secret key.
        """
        signer = self._signers.get(what)
        if signer is None:
            keys = signing_keys(self._app())
            if not keys and not self.store.is_private:
                raise ConfigError(
                    "SECRET_KEY",
                    None,
                    f"set, and the same in all processes: others can write to {self.store.where}, and what is "
                    "unpickled from there has to be signed",
                )
            signer = self._signers[what] = PayloadSigner(keys, what)
        return signer

    # ---- life ----

    def flush(self, timeout: float | None) -> bool:
        return self.writer.flush(timeout)

    def check(self) -> None:
        self.store.check()

    def after_fork(self) -> None:
        # The child starts without jobs of its own, and finds the parent's through the store.
        self.store.after_fork()
        self._memory.clear()
        self._handles = weakref.WeakValueDictionary()
        if self.handover is not None:
            self.handover.after_fork()
        self._watcher.after_fork()
        self._make_threads()
        self.futures.after_fork()
        self.futures.clear()

    def abandoned(self, job: JobState) -> None:
        pass  # the parent writes what becomes of it

    def abandon_unfinished(self, timeout: float) -> None:
        self.writer.abandon_unfinished(timeout)

    def close(self, *, wait: bool) -> None:
        self._closed = True
        self.writer.close(wait=wait)
        self._watcher.close(wait=wait)
        for thread in (self._stop_requests, self._messages, self._background, self._callbacks):
            thread.close(wait=wait)


def _is_sent(call: Call) -> bool:
    """Return whether the call goes to an engine, and does not run in this process."""
    return isinstance(call.future, StoredFuture)


def _dispose(parts: Sequence[Any]) -> None:
    """The app is gone."""
    *others, writer = parts
    for part in others:
        part.close(wait=False)
    writer.dispose()
