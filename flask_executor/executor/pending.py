"""The calls of an executor that are not settled: in flight, deferred until a commit, scheduled for later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from flask_executor.futures import FutureProxy
from flask_executor.helpers.timer import TimerHandle, timer
from flask_executor.jobs.call import Call, CallState


class InFlight:
    """The calls that are not settled yet, by their futures, in the order of submission.

    Every call of an app's executor is in here from before it is queued until its callbacks have run. Single operations
    on the dicts are atomic; the lock is for the bound, and for threads that wait.
    """

    def __init__(self) -> None:
        self._calls: dict[FutureProxy[Any], Call] = {}
        self._by_id: dict[str, FutureProxy[Any]] = {}  # an engine may deliver a job twice: the first one stays
        self._uncounted: set[FutureProxy[Any]] = set()  # those that do not count against the bound
        self._deferred: set[FutureProxy[Any]] = set()  # those that wait() does not wait for
        self._changed = threading.Condition(threading.Lock())
        self._watchers = 0

    def add(self, call: Call, limit: int | None, *, uncounted: bool = False) -> bool:
        """Add a call.

        :param limit: most calls in flight; None for no bound.
        :param uncounted: If true, the call does not count against the bound.
        :return: False when ``limit`` calls are in flight; the call was not added.
        """
        if uncounted:
            self._uncounted.add(call.future)
        if limit is None:
            self._calls[call.future] = call
        else:
            with self._changed:
                if len(self._calls) - len(self._uncounted) >= limit:
                    return False
                self._calls[call.future] = call
        self._by_id.setdefault(call.job.id, call.future)
        return True

    def get(self, future: Future[Any]) -> Call | None:
        """The call of this future; None when it is settled."""
        return self._calls.get(future)  # type: ignore[call-overload, no-any-return]

    def by_id(self, id: str) -> FutureProxy[Any] | None:
        """The handle of the job with this id; None when it is settled."""
        return self._by_id.get(id)

    def defer(self, future: FutureProxy[Any]) -> None:
        """The call may never start: :meth:`wait` does not wait for it until :meth:`release`."""
        if future in self._calls:
            self._deferred.add(future)
            self._notify()

    def release(self, future: FutureProxy[Any]) -> None:
        """The deferred call is going to start."""
        self._deferred.discard(future)

    def discard(self, future: Any) -> None:
        """The future is settled, and its callbacks have run."""
        call = self.remove(future)
        if call is not None:
            call.enter(CallState.SETTLED)

    def remove(self, future: Any) -> Call | None:
        """Take out a call that is not settled; None when it was not here."""
        self._deferred.discard(future)  # first: wait() may count in between
        call = self._calls.pop(future, None)
        if call is not None and self._by_id.get(call.job.id) is future:
            del self._by_id[call.job.id]
        self._uncounted.discard(future)
        self._notify()
        return call

    def _notify(self) -> None:
        if self._watchers:
            with self._changed:
                self._changed.notify_all()

    def wait(self, timeout: float | None) -> bool:
        """Wait until only deferred calls are left.

        :param timeout: most seconds to wait; None for as long as it takes.
        :return: whether only deferred calls are left.
        """
        with self._changed:
            self._watchers += 1
            try:
                return self._changed.wait_for(lambda: len(self._calls) <= len(self._deferred), timeout)
            finally:
                self._watchers -= 1

    def futures(self) -> Sequence[FutureProxy[Any]]:
        """The handles of the calls in flight, oldest first."""
        return list(self._calls)


class DeferredCall:
    """An accepted call that waits for :meth:`start` or :meth:`drop`: for a commit or a rollback.

    Only the transaction refers to it: when it is thrown away undecided, the call is dropped.

    :param call: the call.
    :param start: starts it. Never raises.
    :param drop: cancels it. Never raises.
    :param in_background: runs a function in another thread.
    """

    def __init__(
        self,
        call: Call,
        start: Callable[[Call], object],
        drop: Callable[[Call], object],
        in_background: Callable[[Callable[[], object]], object],
    ) -> None:
        call.enter(CallState.DEFERRED)
        self.future = call.future
        self._call: Call | None = call
        self._start = start
        self._drop = drop
        self._in_background = in_background

    @property
    def undecided(self) -> bool:
        """If true, neither :meth:`start` nor :meth:`drop` was called yet."""
        return self._call is not None

    def start(self) -> None:
        """Start the call, unless it was cancelled."""
        call = self.forget()
        if call is not None:
            self._start(call)

    def drop(self) -> None:
        """Cancel the call."""
        call = self.forget()
        if call is not None:
            self._drop(call)

    def forget(self) -> Call | None:
        """Let go of the call; the first caller gets it."""
        call, self._call = self._call, None
        return call

    def __del__(self) -> None:
        call = self.forget()
        if call is not None:  # the garbage collector may run this in any thread, with any lock held
            timer.call_later(0.0, partial(self._in_background, partial(self._drop, call)))


class ScheduledCalls:
    """The calls that wait for their time or for their next attempt. The thread that takes a call out continues it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: dict[Call, tuple[TimerHandle, BaseException]] = {}

    def add(self, call: Call, error: BaseException, delay: float, go_on: Callable[[], object]) -> None:
        """Call ``go_on`` in ``delay`` seconds, in the timer's thread, unless the call was taken out by then.

        :param error: what to settle the call with if its time never comes.
        """

        def due() -> None:
            if self.discard(call):
                go_on()

        call.enter(CallState.SCHEDULED)
        with self._lock:
            self._handles[call] = (timer.call_later(delay, due), error)

    def discard(self, call: Call) -> bool:
        """Take a call out; False when it was not here."""
        with self._lock:
            handle, _ = self._handles.pop(call, (None, None))
        if handle is None:
            return False
        handle.cancel()
        return True

    def clear(self) -> list[tuple[Call, BaseException]]:
        """Take all calls out; each comes with the error to settle it with."""
        return [(call, error) for call, (_, error) in list(self._handles.items()) if self.discard(call)]
