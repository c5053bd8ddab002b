"""What a forked worker process has to undo, and what ends it with its parent.

A fork copies the memory and the descriptors of the parent, but only one of its threads. What the other threads were
doing is never finished in the child: locks stay locked, modules half imported. And if both processes use a connection,
their bytes get mixed up.

The thread that forks runs all of this in the child, before there is a second thread.
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

#: While a thread forks a worker process, ``forking.worker`` is the worker's end of the socket ``life``; else None.
forking = threading.local()

#: Signals that a worker ignores, as its parent tells it when to end.
IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_root_pid: int | None = None  # in a worker process: the pid of the process whose worker it is, directly or not
_close_in_child: weakref.WeakSet[Any] = weakref.WeakSet()
_processes: weakref.WeakSet[Any] = weakref.WeakSet()


def close_in_child(end: L) -> L:
    """Close this end of a socket in each child that this process forks.

    A copy in a child would keep it open when this process ends, and the other end would not learn of that.

    :return: the same end.
    """
    _close_in_child.add(end)
    return end


def forget_in_child(process: Any) -> None:
    """Let multiprocessing forget a child of this process in each other child, which would try to wait for it."""
    _processes.add(process)


def _in_child() -> None:
    """Run in each child that this process forks, worker or not."""
    for end in list(_close_in_child):
        end.close()
    _close_in_child.clear()
    children: set[Any] = getattr(multiprocessing.process, "_children", set())
    children.difference_update(_processes)
    life: socket.socket | None = getattr(forking, "worker", None)
    if life is not None:
        _begin_worker(life)


def _begin_worker(life: socket.socket) -> None:
    """In a forked worker, before all else: from here on it ends with its parent, whatever it hangs in."""
    global _inherited_stdin
    own_process_group()
    die_with_parent(life)
    if sys.stdin is not None:
        # multiprocessing would close it, and wait for ever for a thread that was reading it in the parent. It is kept,
        # as it would be closed as well when it is collected.
        _inherited_stdin = sys.stdin
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115


_inherited_stdin: object = None


after_fork_in_child(_in_child)


def mark_as_worker(root_pid: int) -> None:
    """Mark this process as a worker.

    :param root_pid: the parent's :func:`root_pid`.
    """
    global _root_pid
    _root_pid = root_pid


def is_worker() -> bool:
    """If true, this is a worker process, or was forked by one."""
    return _root_pid is not None


def root_pid() -> int:
    """The pid of the process whose worker this process is, directly or not; its own pid if it is no worker."""
    return os.getpid() if _root_pid is None else _root_pid


def detach_from_parent() -> None:
    """In a forked worker: give up what belongs to the parent."""
    _reset_signals()
    _drop_half_imported_modules()
    _reopen_standard_streams()
    _detach_connections()


def dispose_engines(app: Flask) -> None:
    """In a forked worker: let the engines of Flask-SQLAlchemy open connections of their own.

    The parent goes on using those that they hold.
    """
    extension = app.extensions.get("sqlalchemy")
    if extension is not None:
        with app.app_context():
            for engine in extension.engines.values():
                engine.dispose(close=False)


def die_with_parent(life: socket.socket) -> None:
    """Let the system kill this process, and what it has started, when the parent's end of ``life`` is closed.

    A thread that waits for that would not run while C code holds the interpreter's lock. So the signal that tells of a
    change on this socket, on which nothing is ever sent, is set to SIGKILL, and its receiver to the process group. See
    F_SETOWN and F_SETSIG in fcntl(2); Linux only.
    """
    if hasattr(fcntl, "F_SETSIG") and os.getpgid(0) == os.getpid():
        descriptor = life.fileno()
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)


def own_process_group() -> None:
    """Begin a process group: what a job starts can be killed with the worker, and Ctrl-C reaches only the parent."""
    if hasattr(os, "setpgid"):
        with contextlib.suppress(PermissionError):  # a session leader leads one already
            os.setpgid(0, 0)


def _reset_signals() -> None:
    """The handlers are the web server's; it must not learn of this process' signals, nor asyncio by its descriptor."""
    signal.set_wakeup_fd(-1)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) and signal.getsignal(number) is not signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)


def _drop_half_imported_modules() -> None:
    """A module that another thread was importing would stay incomplete in this process, and its lock locked."""
    from importlib import _bootstrap

    # Only modules that are being imported have a lock. To look at all modules would copy their memory.
    locks: dict[str, object] = getattr(_bootstrap, "_module_locks", {})
    for name in list(locks):
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if getattr(spec, "_initializing", False):
            del sys.modules[name]
    locks.clear()


def _reopen_standard_streams() -> None:
    """Another thread may have held the locks of these."""
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


def _detach_connections() -> None:
    """Replace connections and listening sockets by ``os.devnull``.

    A client would wait for the end of a response as long as this process had the connection open. The descriptors are
    not closed, or the next file would get their numbers, and socket objects that still have these would close it.
    Unnamed socket pairs stay: they do not lead to the outside.
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
    except OSError:  # the folder's own descriptor, closed meanwhile
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
    """End this process and what its job has started, at once: the parent is gone."""
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
