"""Several processes that do the same, and are started again when they die."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flask_executor.helpers.log import logger

_PAUSE = 1.0  # seconds after which one that died is started again
_LOOK = 0.1  # seconds between two looks whether one has ended
_ENDING = (signal.SIGTERM, signal.SIGINT)


def run_processes(count: int, work: Callable[[], object]) -> None:
    """Run so many processes that do ``work`` until they return, or are told to by SIGTERM or Ctrl-C.

    They are told to also when this process is gone. One alone is this process itself.
    """
    if count == 1:
        work()
        return
    troop = _WorkerGroup(work)
    before = {number: signal.signal(number, troop.end) for number in _ENDING}
    try:
        for _ in range(count):
            troop.start()
        troop.watch()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        troop.close()


class _WorkerGroup:
    """The processes, as the one knows them that has started them."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._pids: set[int] = set()
        self._ending = False
        # Nobody writes into it: it ends when the last one does that could, which is this process alone.
        self._alive, self._lifeline = os.pipe()

    def start(self) -> None:
        """Start one more, if they are not to end."""
        if self._ending:
            return
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # or the child would answer as the parent
        try:
            pid = os.fork()
            if not pid:
                self._live(mask)
            self._pids.add(pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if self._ending:  # another thread may have got the signal, just before there was anybody to tell
            _tell(pid)

    def watch(self) -> None:
        """Wait until all have ended, and replace those that die."""
        while self._pids:
            # Not one long wait: Python does not notice a signal that comes in the instant before that begins.
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                time.sleep(_LOOK)
            if pid not in self._pids:  # nobody, or somebody else's
                continue
            self._pids.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not self._ending:
                logger.error("Worker process %d ended with exit code %d. Another one is started.", pid, code)
                time.sleep(_PAUSE)
                self.start()

    def end(self, *_: Any) -> None:
        """Tell all to end: what a signal does."""
        self._ending = True
        for pid in tuple(self._pids):
            _tell(pid)

    def close(self) -> None:
        os.close(self._alive)
        os.close(self._lifeline)

    def _live(self, mask: set[int | signal.Signals]) -> None:
        """What a child does; it does not return."""
        code = 1
        try:
            os.setpgid(0, 0)  # Ctrl-C is the parent's
            os.close(self._lifeline)
            for number in _ENDING:
                signal.signal(number, signal.SIG_DFL)
            threading.Thread(target=self._end_with_parent, name="flask-executor-parent", daemon=True).start()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            code = _code_of(self._work)
            # As the interpreter does, and multiprocessing in its children: jobs that still run are stopped in order.
            threading._shutdown()  # type: ignore[attr-defined]
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _end_with_parent(self) -> None:
        os.read(self._alive, 1)
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, signal.SIGTERM)  # to the one that may be waiting, which it wakes up


def _tell(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGTERM)


def _code_of(work: Callable[[], object]) -> int:
    """The exit code of a process that has done this."""
    try:
        work()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
