"""Leader election: one set of workers for all processes of an app on a machine.

A lock on a file decides which process leads: the system gives it to one process, and takes it back when that process
ends, in whatever way. Then the next one gets it. The others are connected to the leader by a socket.

.. code-block:: text

    leader                                            follower (any number)
   ┌──────────────────────────────────────┐          ┌─────────────────────────────────────────────────┐
   │ LeaderServer: does what is requested │ <─────── │ LeaderClient: calls and messages of this process│
   │ with the service pools of this       │ ───────> │                                                 │
   │ process, and replies                 │  socket  │ LeaderElection: tries to lead when that closes  │
   └──────────────────────────────────────┘          └─────────────────────────────────────────────────┘

Lock and socket are in a folder that only this user can enter. What is said over the socket, and what becomes of
requests when the leader ends, stands in :mod:`flask_executor.services.protocol`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import selectors
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask_executor.abc import ServiceStatus
from flask_executor.backends.process.after_fork import close_in_child, is_worker
from flask_executor.backends.process.channel import FrameStream
from flask_executor.helpers.log import logger
from flask_executor.helpers.serial_thread import set_thread_callbacks
from flask_executor.services.follower import LeaderClient
from flask_executor.services.leader import LeaderServer
from flask_executor.services.protocol import FrameSender, Reply, Request

if TYPE_CHECKING:
    from flask_executor.services.registry import ServiceRegistry

try:
    import fcntl
except ImportError:  # Windows, where there are no worker processes either
    fcntl = None  # type: ignore[assignment]

_RETRY_DELAYS = 0.02, 0.5  # seconds until the next attempt to lead or to reach the leader: after the first, and at most
_WORKER_CANDIDACY_DELAY = 2.0  # seconds without a leader until a worker process, which may be ended at any time, leads
_JOIN_TIMEOUT = 5.0  # seconds to wait for the thread to end
_MAX_TEMP_PATH = 40  # characters of the folder for temporary files: the path of a socket may have some 100


def runtime_dir(*identity: object, parent: Path | None = None) -> Path:
    """The folder for the lock and the socket of processes with the same identity; made if there is none.

    :param parent: the folder that it is in; None for the system's folder for temporary files.
    :raises PermissionError: when it is another user's, or open to others.
    """
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    if parent is None:
        temporary = tempfile.gettempdir()
        parent = Path(temporary if len(temporary) <= _MAX_TEMP_PATH else "/tmp")  # noqa: S108
    base = parent / f"flask-executor-{user}"
    folder = base / hashlib.sha256(repr(identity).encode()).hexdigest()[:24]
    for each in (base, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        found = each.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
            raise PermissionError(f"{each} must be a folder that belongs to user {user}, with mode 0700: remove it")
    return folder


class LeaderElection:
    """Makes this process the leader, or connects it to the leader.

    :param folder: gives the folder with lock and socket, see :func:`runtime_dir`.
    :param registry: gives the services of this process, should it lead; None when the app is gone.
    """

    # _lock guards what is open and whether this process leads. `leading` is set last: until then everything goes
    # through the client, which keeps its order.

    def __init__(self, folder: Callable[[], Path], registry: Callable[[], ServiceRegistry | None]) -> None:
        self._folder = folder
        self._registry = registry
        self._lock = threading.RLock()
        self._lock_file: Any = None
        self._server: LeaderServer | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._candidate_from = 0.0  # when this process may lead (monotonic)
        self.client = LeaderClient()
        self.leading = False

    def join(self) -> bool:
        """Lead, if no process does, or else follow; whether this process leads."""
        if self.leading:
            return True
        with self._lock:
            if not self.leading and not self._closed.is_set() and self._thread is None:
                self._delay_candidacy()
                if self._try_to_lead():
                    self.leading = True
                else:
                    thread = threading.Thread(target=self._follow, name="flask-executor-follower", daemon=True)
                    thread.start()
                    self._thread = thread
            return self.leading

    def _delay_candidacy(self) -> None:
        if is_worker():
            self._candidate_from = time.monotonic() + _WORKER_CANDIDACY_DELAY

    def _try_to_lead(self) -> bool:
        """Get the lock and open the socket; False when another process has the lock.

        :raises OSError: when that cannot be done.
        """
        with self._lock:
            if self._closed.is_set() or time.monotonic() < self._candidate_from or not self._get_lock():
                return False
            listener = close_in_child(socket.socket(socket.AF_UNIX))
            try:
                path = self._folder() / "socket"
                path.unlink(missing_ok=True)
                listener.bind(str(path))
                listener.listen(128)
                self._server = LeaderServer(listener, self._registry, self._touch_files)
            except BaseException:
                listener.close()
                self._drop_lock()
                raise
            return True

    def _get_lock(self) -> bool:
        path = self._folder() / "lock"
        if self._lock_file is None:
            # A lock of this kind belongs to the open file, also if there are two in one process; a child would have it
            # too, if it did not close it.
            self._lock_file = close_in_child(path.open("ab"))
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not self._is_current(path):
            self._drop_lock()
            return False
        return True

    def _is_current(self, path: Path) -> bool:
        """Return whether the lock is on this file, and not on one that was deleted."""
        return path.exists() and os.fstat(self._lock_file.fileno()).st_ino == path.stat().st_ino

    def _drop_lock(self) -> None:
        self._lock_file.close()
        self._lock_file = None

    def _touch_files(self) -> None:
        """Keep programs that delete stale temporary files from deleting those of a leader."""
        with contextlib.suppress(OSError):
            os.utime(self._lock_file.fileno())
            os.utime(self._folder() / "socket")

    def _follow(self) -> None:
        """In a thread: connect the client to the leader; lead when there is none."""
        set_thread_callbacks(self.client.callbacks)
        delay, longest = _RETRY_DELAYS
        while not self._closed.is_set():
            try:
                if self._take_over():
                    return
                if self._connect():
                    self._delay_candidacy()
                    delay = _RETRY_DELAYS[0]
                    continue
            except Exception:
                logger.exception("The process that leads cannot be reached.")
            self._closed.wait(delay)
            delay = min(2 * delay, longest)

    def _take_over(self) -> bool:
        """Lead, if no process does, and do what waits."""
        if not self._try_to_lead():
            return False
        registry = self._registry()
        if registry is None:
            return True
        try:
            registry.start_shared()
            self.client.lead(registry)
        except BaseException:
            self._resign()
            raise
        self.leading = True
        return True

    def _resign(self) -> None:
        with self._lock:
            server, self._server = self._server, None
            if server is not None:
                with contextlib.suppress(OSError):
                    folder = self._folder()
                    if self._is_current(folder / "lock"):  # or the files are another leader's
                        (folder / "socket").unlink(missing_ok=True)
                server.close()
            if self._lock_file is not None:
                self._drop_lock()

    def _connect(self) -> bool:
        """Serve the client until the leader is gone; False when there is none."""
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(str(self._folder() / "socket"))
        except OSError:  # it is about to listen, or has just ended
            end.close()
            return False
        self.client.serve(FrameStream(close_in_child(end)))
        return True

    def ask_status(self, service: str, timeout: float) -> ServiceStatus | None:
        """Return what the leader says of a service; None without a leader, or an answer within ``timeout`` seconds."""
        with socket.socket(socket.AF_UNIX) as end, selectors.DefaultSelector() as selector:
            selector.register(end, selectors.EVENT_READ)
            try:
                end.settimeout(max(0.01, timeout))
                end.connect(str(self._folder() / "socket"))
                stream = FrameStream(end)
                FrameSender(stream, lambda: None).request(Request("status", service), 1)
                while selector.select(timeout):
                    for kind, _, body in stream.receive():
                        if kind == Reply.RESULT:
                            status: ServiceStatus = pickle.loads(body)
                            return status
                        if kind != Reply.WELCOME:  # it is shutting down
                            return None
            except (OSError, EOFError):
                pass
        return None

    def close(self) -> None:
        """Let another process lead. The workers have ended before."""
        if os.getpid() != self._pid:
            return
        self._closed.set()
        self.client.end()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_TIMEOUT)
        self._resign()
        self.client.close()
