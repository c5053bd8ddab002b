"""Help for tests of apps that use an executor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask_executor.executor.extension import Executor


def drain(executor: Executor, timeout: float = 30) -> None:
    """Wait until nothing is left to do: every job has ended, those that jobs started too, and all callbacks have run.

    .. code-block:: python

        def test_report(client):
            client.post("/reports")
            drain(executor)
            assert client.get("/reports/latest").status_code == 200

    :param timeout: most seconds to wait.
    :raises TimeoutError: when jobs are left by then; it names them.
    """
    if not executor.wait(timeout):
        left = ", ".join(f"{job.name} ({job.status})" for job in (future.record() for future in executor.unfinished()))
        raise TimeoutError(f"after {timeout} s there are still jobs to do: {left}")
