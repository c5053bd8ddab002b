"""In the child of a fork: what it must not do with the Dask of its parent."""

from __future__ import annotations

import concurrent.futures
import multiprocessing.process
import weakref
from typing import Any, Protocol

import distributed
from distributed.core import Status

from flask_executor.helpers.fork_hooks import after_fork_in_child


class HasDask(Protocol):
    """Whoever has a client, perhaps with a cluster; each may be None."""

    client: distributed.Client | None
    cluster: distributed.LocalCluster | None


_those: weakref.WeakSet[Any] = weakref.WeakSet()


def forget_in_child(this: HasDask) -> None:
    """Have every child that this process forks leave alone what this has, when it is collected and at the end."""
    _those.add(this)


def _detach() -> None:
    for this in list(_those):
        if this.client is not None:
            this.client.status = "closed"
        if this.cluster is not None:
            this.cluster.status = Status.closed
    _those.clear()
    _disown()
    # Its thread is not here, and it does not know: whatever is given to it would be waited for in vain.
    distributed.utils._offload_executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="Dask-Offload")


def _disown() -> None:
    """At its end a process would terminate the workers of a cluster, and remove their folders."""
    children: set[Any] = getattr(multiprocessing.process, "_children", set())
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        alive = finalizer.peek()
        if alive is not None and alive[1].__module__.startswith("distributed."):
            children.difference_update(arg for arg in alive[2] if isinstance(arg, multiprocessing.process.BaseProcess))
            finalizer.detach()


after_fork_in_child(_detach)
