"""A thread that runs functions one after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from flask_executor.helpers.log import logger


class SerialThread:
    """Runs functions in the order in which they were given, in a thread that starts with the first one.

    :param name: the name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a finalizer may call in the middle of a method
        self._thread: threading.Thread | None = None
        self._closed = False
        self._pending = 0

    def run(self, fn: Callable[[], object]) -> None:
        """Call ``fn`` in the thread; after :meth:`close`, call it here and now. An exception is logged."""
        with self._lock:
            if not self._closed and (self._thread is not None or self._start()):
                self._pending += 1
                self._queue.put(fn)
                return
        _call(fn)

    def _start(self) -> bool:
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # from Python 3.12, when the interpreter ends
            return False
        self._thread = thread
        return True

    def __len__(self) -> int:
        """Number of functions that have not returned."""
        return self._pending

    def flush(self, timeout: float | None = None) -> None:
        """Wait until it has run what it was given until now; at once if this is called by what it runs.

        :param timeout: most seconds to wait; None for as long as it takes.
        """
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            done = threading.Event()
            self.run(done.set)
            done.wait(timeout)

    def close(self, *, wait: bool) -> None:
        """End the thread after the functions that it was given until now.

        :param wait: if true, wait for that, unless this is called in the thread itself.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        thread = self._thread
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()

    def _work(self) -> None:
        while (fn := self._queue.get()) is not None:
            _call(fn)
            del fn
            with self._lock:
                self._pending -= 1


_of_thread = threading.local()


def set_thread_callbacks(callbacks: SerialThread) -> None:
    """Let ``callbacks`` run user code for the calling thread, which must not be held up."""
    _of_thread.callbacks = callbacks


def get_thread_callbacks() -> SerialThread | None:
    """What runs user code for the calling thread; None if that may run it itself."""
    callbacks: SerialThread | None = getattr(_of_thread, "callbacks", None)
    return callbacks


def _call(fn: Callable[[], object]) -> None:
    try:
        fn()
    except BaseException:  # also SystemExit: it is not meant for this thread
        logger.exception("%r failed.", fn)
