"""Several worker processes that run the same function, and are replaced when they die.

.. code-block:: text

    run_processes()                        worker process (forked)
      start() ────────────────────────────> _child_main() ─> work()
      watch(): waits for sentinels   <───── dies, or work() returns
        died: start another after a delay
      SIGTERM, Ctrl-C: terminate all ─────> SIGTERM: work() ends in its own way
      dies: the lifeline is closed ───────> SIGTERM from the thread that reads the lifeline
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from flask_executor.helpers.log import logger

_RESTART_DELAY = 1.0  # seconds between the death of a worker process and the start of the next one
_LONGEST_WAIT = 0.5  # seconds until the worker processes are checked although no sentinel has become readable
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_processes(count: int, work: Callable[[], object]) -> None:
    """Run ``work`` in forked processes until it has returned in all of them; SIGTERM and Ctrl-C terminate them.

    A process that dies is replaced. When the calling process dies, the others get SIGTERM.

    :param count: how many processes. With 1, ``work`` runs in the calling process.
    """
    if count == 1:
        work()
        return
    group = _WorkerGroup(work)
    handlers = {number: signal.signal(number, group.terminate) for number in _END_SIGNALS}
    try:
        for _ in range(count):
            group.start()
        group.watch()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        group.close()


class _WorkerGroup:
    """The worker processes, as seen by the process that starts them."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._workers: list[BaseProcess] = []
        self._ending = False
        # Only this process keeps the second end, and never writes to it: the first one becomes readable at its death.
        # (multiprocessing's own sentinel of the parent is also held open by the siblings that were forked later.)
        self._parent_death, self._lifeline = os.pipe()

    def start(self) -> None:
        """Start a worker process, unless the group is ending."""
        if self._ending:
            return
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)  # the child would run the parent's handlers
        try:
            worker = multiprocessing.get_context("fork").Process(
                target=self._child_main, args=(mask,), name="flask-executor-prefork"
            )
            worker.start()
            self._workers.append(worker)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # The signal may have come while the worker was not in the list yet.
        if self._ending:
            worker.terminate()  # type: ignore[unreachable]

    def watch(self) -> None:
        """Wait until all worker processes have ended, and replace those that die."""
        while self._workers:
            # The limit is for what wakes up no wait: a signal in the instant before it begins, and the death of a
            # worker that has started a process which still holds the sentinel open.
            readable = connection.wait([worker.sentinel for worker in self._workers], _LONGEST_WAIT)
            for worker in tuple(self._workers):
                if worker.sentinel in readable or worker.exitcode is not None:
                    worker.join()  # the sentinel is readable an instant before the exit code is
                    self._workers.remove(worker)
                    self._replace_if_dead(worker)

    def _replace_if_dead(self, worker: BaseProcess) -> None:
        if worker.exitcode != 0 and not self._ending:
            logger.error(
                "Worker process %d ended with exit code %s. Another one is started.", worker.pid, worker.exitcode
            )
            time.sleep(_RESTART_DELAY)
            self.start()

    def terminate(self, *_: Any) -> None:
        """Send SIGTERM to all worker processes, and start no more. This is the handler of signals."""
        self._ending = True
        for worker in tuple(self._workers):
            worker.terminate()

    def close(self) -> None:
        os.close(self._parent_death)
        os.close(self._lifeline)

    def _child_main(self, mask: set[int | signal.Signals]) -> None:
        os.setpgid(0, 0)  # a terminal sends Ctrl-C to the parent only
        os.close(self._lifeline)
        for number in _END_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=self._terminate_with_parent, name="flask-executor-parent", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._work()

    def _terminate_with_parent(self) -> None:
        os.read(self._parent_death, 1)
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, signal.SIGTERM)  # a signal to the process may not wake up the main thread
