"""Jobs on worker processes, by the standard pool.

.. code-block:: text

    submit ── pickled call + snapshot of the contexts ──> standard pool ──> worker: run_shipped()
    future <─ settle_shipped() <── Outcome, or the pool's own error ──────────┘

Every call brings the contexts it was submitted in as values; what a worker inherited when it was forked is never
used, except for the app itself.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from concurrent.futures.process import BrokenProcessPool

from flask_executor.abc import Backend, BackendOptions, PreparedCall
from flask_executor.exceptions import ExecutorShutdown, WorkerLost
from flask_executor.jobs import JobStatus
from flask_executor.runner import Outcome, run_shipped, settle_shipped, ship


class ProcessBackend(concurrent.futures.ProcessPoolExecutor, Backend):
    """A :class:`~concurrent.futures.ProcessPoolExecutor` that takes prepared calls."""

    remote = True

    def __init__(self, options: BackendOptions) -> None:
        # Workers find the app by inheriting it, so they are forked wherever that is possible.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        super().__init__(max_workers=options.max_workers, mp_context=multiprocessing.get_context(method))
        self._capacity: int = self._max_workers  # type: ignore[attr-defined]

    def enqueue(self, call: PreparedCall) -> None:
        shipped = ship(call)
        try:
            inner = self.submit(run_shipped, shipped)
        except BrokenProcessPool as error:
            raise WorkerLost("A worker process died and took the pool with it; restart the server.") from error
        except RuntimeError as error:
            raise ExecutorShutdown(str(error)) from error

        claim = inner.set_running_or_notify_cancel

        def begin() -> bool:
            if not call.begin():
                inner.cancel()
            return claim()

        # The pool asks the inner future whether to go on when a worker is about to get the call.
        inner.set_running_or_notify_cancel = begin  # type: ignore[method-assign]
        if inner.running():  # it has asked already
            call.begin()
        inner.add_done_callback(lambda done: _settle(call, done))

    @property
    def workers(self) -> int:
        processes = self._processes or {}
        return sum(process.is_alive() for process in list(processes.values()))

    @property
    def capacity(self) -> int:
        return self._capacity


def _settle(call: PreparedCall, inner: concurrent.futures.Future[Outcome]) -> None:
    if inner.cancelled():
        if not call.future.cancel():
            call.fail(WorkerLost(f"The pool gave up {call.job.name} while it was running."), JobStatus.LOST)
        return
    if not (call.future.running() or call.begin()):
        return  # cancelled
    error = inner.exception()
    if error is None:
        settle_shipped(call, inner.result())
    elif isinstance(error, BrokenProcessPool):
        lost = WorkerLost(f"A worker process died while {call.job.name} was waiting or running: {error}")
        lost.__cause__ = error
        call.fail(lost, JobStatus.LOST)
    else:
        call.fail(error)
