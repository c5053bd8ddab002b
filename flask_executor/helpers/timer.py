"""Calls at a later time, all in one thread, which runs only while there are calls to come."""

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
    """One call to come."""

    __slots__ = ("_timer", "fn")

    def __init__(self, timer: Timer, fn: Callable[[], object]) -> None:
        self._timer = timer
        self.fn: Callable[[], object] | None = fn

    def cancel(self) -> None:
        """Do not make the call, unless it has begun already."""
        self._timer.cancel(self)


class Timer:
    """Calls functions in its thread, each not before its time.

    The functions must be quick, as the next ones wait for them. An exception is logged.
    """

    # Invariants: everything below is changed under _changed. _live counts the entries of the heap that were not
    # cancelled; the thread ends when there are none, and the next call_later() starts another.

    def __init__(self) -> None:
        self._changed = threading.Condition()  # reentrant: a finalizer may call in the middle of a method
        self._heap: list[tuple[float, int, TimerHandle]] = []
        self._numbers = itertools.count()
        self._live = 0
        self._thread: threading.Thread | None = None

    def call_later(self, seconds: float, fn: Callable[[], object]) -> TimerHandle:
        """Call ``fn`` in ``seconds``, in the timer's thread."""
        handle = TimerHandle(self, fn)
        due = time.monotonic() + max(0.0, seconds)
        with self._changed:
            heapq.heappush(self._heap, (due, next(self._numbers), handle))
            self._live += 1
            if self._thread is None:
                self._start()
            elif self._heap[0][2] is handle:
                self._changed.notify()
        return handle

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="flask-executor-timer", daemon=True)
        # From Python 3.12 no thread can be started when the interpreter ends; the calls are not made then.
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def cancel(self, handle: TimerHandle) -> None:
        """Do not make a call, unless it has begun already."""
        with self._changed:
            if handle.fn is None:
                return
            handle.fn = None
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
                due, _, handle = self._heap[0]
                wait = due - time.monotonic()
                if wait > 0 and handle.fn is not None:
                    self._changed.wait(min(wait, threading.TIMEOUT_MAX))
                    continue
                heapq.heappop(self._heap)
                fn, handle.fn = handle.fn, None
                if fn is None:
                    continue
                self._live -= 1
            try:
                fn()
            except BaseException:  # also SystemExit: it is not meant for this thread
                logger.exception("A call of the timer failed.")
            del fn, handle  # they refer to jobs, which the next wait must not keep alive


#: The timer of this process.
timer = Timer()

# A child has no such thread, and the calls are the parent's.
after_fork_in_child(timer.__init__)  # type: ignore[misc]
