"""Processes and threads of a test: which are left, one that stands still, and a platform that is not Linux."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import psutil
import pytest


def left_behind() -> list[str]:
    gc.collect()  # an app that a test made is a cycle; its threads end with it
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    threads = [name for name in threads if not name.startswith("Dask-Offload")]  # one that Dask keeps for the process
    return threads + [process.name for process in multiprocessing.active_children()]


def without_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what only Linux has: packets between processes, and descriptors of processes."""
    monkeypatch.setattr("flask_executor.backends.process.worker_process.packet_pair", lambda: None)
    monkeypatch.delattr("os.pidfd_open", raising=False)


def freeze(pid: int) -> None:
    """Stop a child process, as Ctrl-Z does, and wait until it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def family(pid: int) -> set[int]:
    """All processes that descend from one; empty if it has ended."""
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def children(pid: int) -> set[int]:
    """The processes that one has started itself."""
    return {child.pid for child in psutil.Process(pid).children()}


def running_in(folder: Path) -> dict[int, psutil.Process]:
    """All processes that were started with ``PROGRAM_OF=folder`` in their environment, and those that they started."""
    mark = str(folder)
    found = psutil.process_iter(["environ", "status"])
    return {
        process.pid: process
        for process in found
        if process.info["status"] != psutil.STATUS_ZOMBIE and (process.info["environ"] or {}).get("PROGRAM_OF") == mark
    }
