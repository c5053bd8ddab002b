"""Jobs on threads of this process: the default.

The standard pool's threads, queue and shutdown are used as they are; only what goes into the queue is
ours. That spares a second future and a second wrapper for each job.
"""

from __future__ import annotations

import concurrent.futures
from concurrent.futures import thread as standard

from flask_executor.abc import Backend, BackendOptions, PreparedCall
from flask_executor.exceptions import ExecutorShutdown


class ThreadBackend(concurrent.futures.ThreadPoolExecutor, Backend):
    """A :class:`~concurrent.futures.ThreadPoolExecutor` that takes prepared calls."""

    chunks = True

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(max_workers=options.max_workers, thread_name_prefix="flask-executor")

    def enqueue(self, call: PreparedCall) -> None:
        with self._shutdown_lock, standard._global_shutdown_lock:
            if self._shutdown or standard._shutdown:
                raise ExecutorShutdown("cannot schedule new futures after shutdown")
            self._work_queue.put(call)  # type: ignore[arg-type]  # the workers only call run()
            if len(self._threads) < self._max_workers:  # or it would count idle threads for nothing
                self._adjust_thread_count()

    @property
    def workers(self) -> int:
        return sum(thread.is_alive() for thread in list(self._threads))

    @property
    def capacity(self) -> int:
        return self._max_workers
