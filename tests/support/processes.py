"""Processes and threads of a test: which are left, one that stands still, and a platform that is not Linux."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading

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
