"""The calls that an executor has still to see to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from flask_executor.futures import FutureProxy
from flask_executor.helpers.timer import TimerHandle, timer
from flask_executor.jobs.call import Call


class InFlight:
    """The calls that are not settled yet, by their futures, in the order of submission.

    Every future of a binding is in here from before it is queued until its callbacks have run. Single
    operations on the dict are atomic; the lock is for the bound and for those who wait.
    """

    def __init__(self) -> None:
        self._calls: dict[FutureProxy[Any], Call] = {}
        self._uncounted: set[FutureProxy[Any]] = set()
        self._held: set[FutureProxy[Any]] = set()  # those of _calls that nobody waits for
        self._changed = threading.Condition(threading.Lock())
        self._watchers = 0

    def add(self, call: Call, limit: int | None, *, uncounted: bool = False) -> bool:
        """Take in a call; False, and it is not taken in, when there are ``limit`` already.

        :param apart: whether it does not count.
        """
        if uncounted:
            self._uncounted.add(call.future)
        if limit is None:
            self._calls[call.future] = call
            return True
        with self._changed:
            if len(self._calls) - len(self._uncounted) >= limit:
                return False
            self._calls[call.future] = call
            return True

    def get(self, future: Future[Any]) -> Call | None:
        """The call of this future, None when it is settled."""
        return self._calls.get(future)  # type: ignore[call-overload, no-any-return]

    def hold(self, future: FutureProxy[Any]) -> None:
        """It is not known whether this call will start: :meth:`wait` does not wait for it."""
        if future in self._calls:
            self._held.add(future)
            self._tell()

    def release(self, future: FutureProxy[Any]) -> None:
        """It will start."""
        self._held.discard(future)

    def discard(self, future: Future[Any]) -> None:
        """The future is settled."""
        self._held.discard(future)  # first: wait() may count in between
        self._calls.pop(future, None)  # type: ignore[call-overload]
        self._uncounted.discard(future)
        self._tell()

    def _tell(self) -> None:
        if self._watchers:
            with self._changed:
                self._changed.notify_all()

    def wait(self, timeout: float | None) -> bool:
        """Wait until there is none left but those on hold, at most ``timeout`` seconds; whether that is so."""
        with self._changed:
            self._watchers += 1
            try:
                return self._changed.wait_for(lambda: len(self._calls) <= len(self._held), timeout)
            finally:
                self._watchers -= 1

    def all(self) -> Sequence[FutureProxy[Any]]:
        """Those unfinished now, oldest first."""
        return list(self._calls)


class DeferredCall:
    """A call that was accepted, and waits for somebody to say whether it is to start.

    Nobody but whoever is to say so keeps it: when it is thrown away unsaid, it is dropped.

    :param call: the call.
    :param start: starts it. Never raises.
    :param drop: takes it back. Never raises.
    :param later: calls what it is given where that holds up nobody.
    """

    def __init__(
        self,
        call: Call,
        start: Callable[[Call], object],
        drop: Callable[[Call], object],
        later: Callable[[Callable[[], object]], object],
    ) -> None:
        self.future = call.future
        self._call: Call | None = call
        self._start = start
        self._drop = drop
        self._later = later

    @property
    def waits(self) -> bool:
        """Whether nobody has said yet."""
        return self._call is not None

    def start(self) -> None:
        """Have it run, unless it was cancelled."""
        call = self.forget()
        if call is not None:
            self._start(call)

    def drop(self) -> None:
        """Have it not run, ever."""
        call = self.forget()
        if call is not None:
            self._drop(call)

    def forget(self) -> Call | None:
        """Have nothing more to do with it. It is returned to the first who asks."""
        call, self._call = self._call, None
        return call

    def __del__(self) -> None:
        call = self.forget()
        if call is not None:  # this may be in the middle of anything, so with any lock held
            timer.call_later(0.0, partial(self._later, partial(self._drop, call)))


class ScheduledCalls:
    """The calls that wait for their time, or their next attempt. Whoever takes one out is the one to go on with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Any, tuple[TimerHandle, BaseException]] = {}

    def add(self, call: Call, error: BaseException, delay: float, go_on: Callable[[], object]) -> None:
        """Call ``go_on`` in ``delay`` seconds, unless the call was taken out by then."""

        def due() -> None:
            if self.discard(call):
                go_on()

        with self._lock:
            self._waiting[call] = (timer.call_later(delay, due), error)

    def discard(self, call: Call) -> bool:
        """Take a call out; False when it was not here."""
        with self._lock:
            appointment, _ = self._waiting.pop(call, (None, None))
        if appointment is None:
            return False
        appointment.cancel()
        return True

    def clear(self) -> list[tuple[Call, BaseException]]:
        """Take all out; they come with the errors to settle them with."""
        return [(call, error) for call, (_, error) in list(self._waiting.items()) if self.discard(call)]
