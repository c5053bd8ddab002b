"""Holders: ids of the processes that have jobs, by which processes of the same machine can tell whether they are alive.

A holder is written as ``machine.pid.start.random``. *machine* is a digest of what process ids are unique in: the
machine, its boot, and the container. *start* tells a process from an earlier one with the same id.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import uuid
from pathlib import Path

from flask_executor.jobs.model import new_id

#: A lease lasts LEASE_SECONDS; its holder renews it every HEARTBEAT_SECONDS.
LEASE_SECONDS, HEARTBEAT_SECONDS = 12.0, 4.0
_ENGINE = "engine"


def new_holder_id() -> str:
    """An id for this process, different from earlier ones."""
    pid = os.getpid()
    return f"{_machine()}.{pid}.{_own_start(pid)}.{new_id()[:8]}"


def engine_holder(name: str) -> str:
    """The id of an engine, which has the jobs in its queue and is never dead."""
    return f"{_ENGINE}.0..{name}"


def is_alive(holder: str) -> bool | None:
    """Whether the process of a holder is alive; None if this process cannot tell, and the lease has to."""
    machine, pid, start, _ = holder.split(".")
    if machine == _ENGINE:
        return True
    if machine != _machine():
        return None
    if int(pid) == os.getpid():
        return start == _own_start(int(pid))
    if os.name == "nt":  # where os.kill(pid, 0) sends Ctrl-C
        return None
    if not _exists(int(pid)):
        return False
    now = _start_of(int(pid))
    return None if now is None or not start else now == start


def pid_of(holder: str) -> int:
    """The process id of a holder, on its own machine."""
    return int(holder.split(".")[1])


@functools.cache
def _machine() -> str:
    parts = [platform.node(), str(uuid.getnode())]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(str(Path(path).readlink()) if "ns" in path else Path(path).read_text())
        except OSError:  # not Linux: the name has to be enough
            continue
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@functools.lru_cache(maxsize=1)
def _own_start(pid: int) -> str:
    return _start_of(pid) or ""


def _start_of(pid: int) -> str | None:
    """When a process was started, in clock ticks since the boot; None if the system does not show it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]  # a zombie has ended, but its parent has not waited for it
