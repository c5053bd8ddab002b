"""What a forked worker must let go of.

A fork copies the memory and the descriptors of its parent, but only one of its threads. What the others were in the
middle of stays as it was for ever, and a connection that both processes use mixes their bytes up.
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import os
import signal
import socket
import stat
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from flask import Flask

from flask_executor.helpers.fork_hooks import after_fork_in_child

L = TypeVar("L")

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: In a thread that forks a worker process: ``forking.worker`` is the line that the worker dies with; None afterwards.
forking = threading.local()

#: Signals that a worker leaves to its parent, which tells it when to end.
IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_origin: int | None = None  # in a worker process: the id of the process that has begun it all
_lines: weakref.WeakSet[Any] = weakref.WeakSet()
_processes: weakref.WeakSet[Any] = weakref.WeakSet()


def close_in_child(line: L) -> L:
    """Have ``line`` closed in every child that this process forks: its end tells the other end that we are gone."""
    _lines.add(line)
    return line


def forget_in_child(process: Any) -> None:
    """Have multiprocessing forget ``process`` in every child that this one forks: it would try to wait for it there."""
    _processes.add(process)


def _disown() -> None:
    for line in list(_lines):
        line.close()
    _lines.clear()
    children: set[Any] = getattr(multiprocessing.process, "_children", set())
    children.difference_update(_processes)
    life: socket.socket | None = getattr(forking, "worker", None)
    if life is not None:
        _begin_worker(life)


def _begin_worker(life: socket.socket) -> None:
    """In a forked worker, before all else: whatever it hangs in from now on, it ends with its parent."""
    global _inherited_stdin
    own_process_group()
    die_with_parent(life)
    if sys.stdin is not None:
        # multiprocessing closes it, which waits for ever for a thread that was reading it in the parent. It is kept:
        # to be thrown away is to be closed.
        _inherited_stdin = sys.stdin
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115


_inherited_stdin: object = None


after_fork_in_child(_disown)


def mark_as_worker(root_pid: int) -> None:
    """This is a worker process, of workers of this one perhaps."""
    global _origin
    _origin = root_pid


def is_worker() -> bool:
    """Whether this is a worker process, or was forked by one."""
    return _origin is not None


def root_pid() -> int:
    """The id of the process that has this worker process, directly or not; of this one if it is none."""
    return os.getpid() if _origin is None else _origin


def detach_from_parent() -> None:
    """In a forked worker: part with what belongs to the parent."""
    _signals()
    _half_imported_modules()
    _standard_streams()
    _connections()


def dispose_engines(app: Flask) -> None:
    """In a forked worker: have the engines of Flask-SQLAlchemy open connections of their own.

    Those they hold are the parent's, which goes on using them.
    """
    extension = app.extensions.get("sqlalchemy")
    if extension is not None:
        with app.app_context():
            for engine in extension.engines.values():
                engine.dispose(close=False)


def die_with_parent(life: socket.socket) -> None:
    """Have the system kill this process, and what it has started, when the other end of ``life`` is closed.

    A thread that waits for that would not get to run in a process that is inside a C call which holds the interpreter's
    lock. The signal that tells of a change is SIGKILL here, to the process group; nothing is ever sent on this line.
    See F_SETOWN and F_SETSIG in fcntl(2); Linux only.
    """
    if hasattr(fcntl, "F_SETSIG") and os.getpgid(0) == os.getpid():
        descriptor = life.fileno()
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)


def own_process_group() -> None:
    """Begin a process group, so that what a job starts can be ended with it and Ctrl-C is for the parent alone."""
    if hasattr(os, "setpgid"):
        with contextlib.suppress(PermissionError):  # a session leader is one already
            os.setpgid(0, 0)


def _signals() -> None:
    """The handlers are the server's, which must not hear of our signals (and asyncio's not through its descriptor)."""
    signal.set_wakeup_fd(-1)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) and signal.getsignal(number) is not signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)


def _half_imported_modules() -> None:
    """What another thread was importing would stay half a module here, and its lock locked."""
    from importlib import _bootstrap

    # There is a lock only for what is being imported. (To look at all modules would copy their memory.)
    locks: dict[str, object] = getattr(_bootstrap, "_module_locks", {})
    for name in list(locks):
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if getattr(spec, "_initializing", False):
            del sys.modules[name]
    locks.clear()


def _standard_streams() -> None:
    """Another thread may have held their locks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(OSError, ValueError):  # closed, or nowhere
            fresh = open(  # noqa: SIM115
                stream.fileno(), "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False
            )
            setattr(sys, name, fresh)
            setattr(sys, f"__{name}__", fresh)


def _connections() -> None:
    """Point connections and listening sockets at nothing.

    A client would wait for the end of a response for as long as this process holds the other end of its connection. The
    descriptors are not closed, or the next file would get their numbers and the sockets that still have them close it.
    Pairs of sockets without a name are left alone: they are not to the outside.
    """
    folder = Path("/proc/self/fd")
    if not folder.exists():
        folder = Path("/dev/fd")
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        for name in os.listdir(folder) if folder.exists() else ():  # noqa: PTH208
            descriptor = int(name)
            if descriptor > 2 and _is_connection(descriptor):
                os.dup2(nothing, descriptor, inheritable=False)
    finally:
        os.close(nothing)


def _is_connection(descriptor: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
    except OSError:  # that of the folder, closed meanwhile
        return False
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        if duplicate.type != socket.SOCK_STREAM:
            return False
        if duplicate.family in (socket.AF_INET, socket.AF_INET6):
            return True
        try:
            return bool(duplicate.getsockname() or duplicate.getpeername())
        except OSError:  # not connected
            return False


def exit_with_descendants() -> NoReturn:
    """The parent is gone: nobody waits for this process, nor for what its job has started."""
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
