"""Several processes that do the same, and are started again when they die."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from flask_executor.logs import logger

_PAUSE = 1.0  # seconds after which one that died is started again


def run_processes(count: int, work: Callable[[], object]) -> None:
    """Run so many processes that do ``work`` until they return, or are told to by SIGTERM or Ctrl-C.

    One alone is this process itself.
    """
    if count == 1:
        work()
        return
    pids = {_fork(work) for _ in range(count)}
    ending = False

    def end(number: int, _: Any) -> None:
        nonlocal ending
        ending = True
        for pid in pids:
            os.kill(pid, signal.SIGTERM)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while pids:
            pid, status = os.wait()
            pids.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not ending:
                logger.error("Worker process %d ended with exit code %d. Another one is started.", pid, code)
                time.sleep(_PAUSE)
                if not ending:
                    pids.add(_fork(work))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fork(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C is the parent's
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
