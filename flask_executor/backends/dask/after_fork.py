"""In a forked child: detach from the Dask clients and clusters of the parent."""

from __future__ import annotations

import concurrent.futures
import multiprocessing.process
import weakref
from typing import TYPE_CHECKING, Any

import distributed
from distributed.core import Status

from flask_executor.helpers.fork_hooks import after_fork_in_child

if TYPE_CHECKING:
    from flask_executor.backends.dask.connection import SchedulerConnection

_connections: weakref.WeakSet[SchedulerConnection] = weakref.WeakSet()


def forget_in_child(connection: SchedulerConnection) -> None:
    """Have each forked child treat this connection's client and cluster as closed.

    Otherwise the child would close them in the parent's name when they are collected, and when it exits.
    """
    _connections.add(connection)


def _detach() -> None:
    for connection in list(_connections):
        if connection.client is not None:
            connection.client.status = "closed"
        if connection.cluster is not None:
            connection.cluster.status = Status.closed
    _connections.clear()
    _disown_cluster_processes()
    # The executor's thread was not forked, and the executor does not know: its futures would never complete.
    distributed.utils._offload_executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="Dask-Offload")


def _disown_cluster_processes() -> None:
    """Cancel Dask's exit hooks, which would terminate the workers of the parent's cluster and remove their folders."""
    children: set[Any] = getattr(multiprocessing.process, "_children", set())
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        alive = finalizer.peek()
        if alive is not None and alive[1].__module__.startswith("distributed."):
            children.difference_update(arg for arg in alive[2] if isinstance(arg, multiprocessing.process.BaseProcess))
            finalizer.detach()


after_fork_in_child(_detach)
