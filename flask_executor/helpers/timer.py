"""Calls at a later time: one thread for all of a process, there only while something is to come."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable

from flask_executor.helpers.fork_hooks import after_fork_in_child
from flask_executor.helpers.log import logger


class TimerHandle:
    """One call to come; :meth:`cancel` calls it off."""

    __slots__ = ("_timer", "fn")

    def __init__(self, timer: Timer, fn: Callable[[], object]) -> None:
        self._timer = timer
        self.fn: Callable[[], object] | None = fn

    def cancel(self) -> None:
        """Call it off. It may be in the middle of being called."""
        self._timer.cancel(self)


class Timer:
    """Calls functions in its thread, each not before its time.

    The functions must be quick, as those to come wait. One that raises is logged.
    """

    # Invariants: everything below is changed under _changed. _live counts the entries of the heap that were not
    # called off; the thread ends when there is none, and the next appointment starts another.

    def __init__(self) -> None:
        self._changed = threading.Condition()  # a finalizer may come here in the middle
        self._heap: list[tuple[float, int, TimerHandle]] = []
        self._numbers = itertools.count()
        self._live = 0
        self._thread: threading.Thread | None = None

    def call_later(self, seconds: float, fn: Callable[[], object]) -> TimerHandle:
        """Call ``fn`` in so many seconds."""
        appointment = TimerHandle(self, fn)
        due = time.monotonic() + max(0.0, seconds)
        with self._changed:
            heapq.heappush(self._heap, (due, next(self._numbers), appointment))
            self._live += 1
            if self._thread is None:
                self._start()
            elif self._heap[0][2] is appointment:
                self._changed.notify()
        return appointment

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="flask-executor-timer", daemon=True)
        # Python 3.12 refuses when the interpreter ends; whoever ends it does not count on later calls.
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def cancel(self, appointment: TimerHandle) -> None:
        """Call an appointment off."""
        with self._changed:
            if appointment.fn is None:
                return
            appointment.fn = None
            self._live -= 1
            if not self._live:
                self._heap.clear()
                self._changed.notify()
            elif len(self._heap) > 64 and self._live < len(self._heap) // 2:
                self._heap = [entry for entry in self._heap if entry[2].fn is not None]
                heapq.heapify(self._heap)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._heap:
                    self._thread = None
                    return
                due, _, appointment = self._heap[0]
                wait = due - time.monotonic()
                if wait > 0 and appointment.fn is not None:
                    self._changed.wait(min(wait, threading.TIMEOUT_MAX))
                    continue
                heapq.heappop(self._heap)
                fn, appointment.fn = appointment.fn, None
                if fn is None:
                    continue
                self._live -= 1
            try:
                fn()
            except BaseException:  # also SystemExit: it is not meant for this thread
                logger.exception("An appointment of the timer failed.")
            del fn, appointment  # they refer to jobs, and the next wait may be long


#: The timer of this process.
timer = Timer()

# The thread is not in the child, and the appointments are the parent's.
after_fork_in_child(timer.__init__)  # type: ignore[misc]
