"""Jobs end before their process does, in order."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING

from flask_executor.exceptions import ExecutorShutdown

if TYPE_CHECKING:
    from flask_executor.executor.app_executor import AppExecutor


# In the order in which they had their first jobs: those of the first may still have some for the others.
_app_executors: weakref.WeakKeyDictionary[AppExecutor, None] = weakref.WeakKeyDictionary()
_registered = False
_finalized_pid = 0  # of the process of multiprocessing that has the finalizer: each job asks for it, and once is enough


def register_for_shutdown(app_executor: AppExecutor) -> None:
    """See to it that the jobs of ``app_executor`` end before the process does.

    :raises ExecutorShutdown: when it is ending already.
    """
    global _registered, _finalized_pid  # forked children inherit the registration, but not the finalizer
    if not _registered:
        # Before the standard library's pools refuse work, which jobs that still run may have for them; atexit would be
        # too late for that.
        try:
            threading._register_atexit(_leave)  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise ExecutorShutdown(f"the process is ending and starts no more jobs: {error}") from error
        _registered = True
    _app_executors.setdefault(app_executor)
    if multiprocessing.parent_process() is not None and _finalized_pid != os.getpid():
        # A process of multiprocessing waits for its children before all else, and our workers wait for us.
        Finalize(None, _leave, exitpriority=100)
        _finalized_pid = os.getpid()


def _leave() -> None:
    begin = time.monotonic()
    for app_executor in list(_app_executors):
        app_executor.terminate(begin + app_executor.config.shutdown_timeout)


def exit_on_sigterm() -> None:
    """Have SIGTERM end this process in order, as Ctrl-C does, where it would end it at once.

    Not where a server has signal handlers that Python does not know of, or takes it ill that somebody sets one.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if (
        is_main
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        and not {"uwsgi", "mod_wsgi"} & sys.modules.keys()
    ):
        signal.signal(signal.SIGTERM, functools.partial(_exit, os.getpid()))


def _exit(pid: int, *_: object) -> None:
    if os.getpid() != pid:  # a child ends as it would have without us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(0)
