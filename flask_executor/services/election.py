"""One set of workers for all processes of an app on a machine.

One process leads: it has the workers of the services. The others are connected to it by a socket, and send it their
messages. A lock on a file decides which one leads: the system gives it to one process, and takes it back when that
process ends, whatever way. Then the next one gets it.

.. code-block:: text

    leader                                            follower (any number)
   ┌──────────────────────────────────────┐          ┌───────────────────────────────────────────┐
   │ Desk: does errands, with the crews   │ <─────── │ Relay: calls and messages of this process │
   │ of this process, and replies         │ ───────> │                                           │
   │                                      │  socket  │ Seat: tries to lead when that is closed   │
   └──────────────────────────────────────┘          └───────────────────────────────────────────┘

Lock and socket are in a folder that only this user can enter. What a worker has got when the leader dies is lost:
calls fail with :exc:`~flask_executor.WorkerLost`, as nobody knows whether they have begun. Other calls, and messages
that were not sent yet, wait for the next leader, and so does what a leader that ends in order gives back.
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
from typing import Any

from flask_executor.abc import ServiceStatus
from flask_executor.backends.process.after_fork import close_in_child, is_worker
from flask_executor.backends.process.channel import FrameStream
from flask_executor.helpers.log import logger
from flask_executor.helpers.serial_thread import set_thread_callbacks
from flask_executor.services.follower import Relay
from flask_executor.services.leader import Desk
from flask_executor.services.protocol import Errand, Leader, RelayFrame

try:
    import fcntl
except ImportError:  # Windows, where there are no worker processes either
    fcntl = None  # type: ignore[assignment]

_PAUSES = 0.02, 0.5  # seconds before one tries again to lead or to reach the leader: the first time, and at most
_RELUCTANCE = 2.0  # seconds without a leader after which a worker process leads, which may be ended at any time
PATIENCE = 5.0  # seconds to wait for the leader's word
_LONGEST = 40  # characters of the folder for temporary files: the path of a socket may have some 100


def meeting_place(*what: object) -> Path:
    """The folder where the processes meet that have all this in common; made if there is none.

    :raises PermissionError: when it is somebody else's, or open to others.
    """
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    temporary = tempfile.gettempdir()
    parent = Path(temporary if len(temporary) <= _LONGEST else "/tmp") / f"flask-executor-{user}"  # noqa: S108
    folder = parent / hashlib.sha256(repr(what).encode()).hexdigest()[:24]
    for each in (parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        found = each.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
            raise PermissionError(f"{each} must be a folder that belongs to user {user}, with mode 0700: remove it")
    return folder


class Seat:
    """This process, among those that meet at a place: the leader, or connected to it.

    :param place: gives the folder, see :func:`meeting_place`.
    :param leader: gives the services of this process, should it lead; None when the app is gone.
    """

    # _lock guards what is open and whether this process leads. `leading` is set last: until then everything goes
    # through the relay, which keeps its order.

    def __init__(self, place: Callable[[], Path], leader: Callable[[], Leader | None]) -> None:
        self._place = place
        self._leader = leader
        self._lock = threading.RLock()
        self._file: Any = None
        self._desk: Desk | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._lead_from = 0.0  # when this process may lead (monotonic)
        self.relay = Relay()
        self.leading = False

    def take(self) -> bool:
        """Lead, if nobody does, or else follow; whether this process leads."""
        if self.leading:
            return True
        with self._lock:
            if not self.leading and not self._closed.is_set() and self._thread is None:
                self._hesitate()
                if self._try_to_lead():
                    self.leading = True
                else:
                    thread = threading.Thread(target=self._follow, name="flask-executor-follower", daemon=True)
                    thread.start()
                    self._thread = thread
            return self.leading

    def _hesitate(self) -> None:
        if is_worker():
            self._lead_from = time.monotonic() + _RELUCTANCE

    def _try_to_lead(self) -> bool:
        """Get the lock and open the desk; False when another process has it.

        :raises OSError: when that cannot be done.
        """
        with self._lock:
            if self._closed.is_set() or time.monotonic() < self._lead_from or not self._get_lock():
                return False
            listener = close_in_child(socket.socket(socket.AF_UNIX))
            try:
                path = self._place() / "socket"
                path.unlink(missing_ok=True)
                listener.bind(str(path))
                listener.listen(128)
                self._desk = Desk(listener, self._leader, self._keep)
            except BaseException:
                listener.close()
                self._drop_lock()
                raise
            return True

    def _get_lock(self) -> bool:
        path = self._place() / "lock"
        if self._file is None:
            # A lock of this kind belongs to the open file, also if there are two in one process; a child would have it
            # too, if it did not close it.
            self._file = close_in_child(path.open("ab"))
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not self._is_here(path):  # somebody has tidied up
            self._drop_lock()
            return False
        return True

    def _is_here(self, path: Path) -> bool:
        """Whether this is the file that this process has the lock of."""
        return path.exists() and os.fstat(self._file.fileno()).st_ino == path.stat().st_ino

    def _drop_lock(self) -> None:
        self._file.close()
        self._file = None

    def _keep(self) -> None:
        """See to it that nobody takes the files of a leader for forgotten, and tidies up."""
        with contextlib.suppress(OSError):
            os.utime(self._file.fileno())
            os.utime(self._place() / "socket")

    def _follow(self) -> None:
        """In a thread: serve the relay to the leader; lead when there is none."""
        set_thread_callbacks(self.relay.callbacks)
        pause, longest = _PAUSES
        while not self._closed.is_set():
            try:
                if self._promoted():
                    return
                if self._meet():
                    self._hesitate()
                    pause = _PAUSES[0]
                    continue
            except Exception:
                logger.exception("The process that leads cannot be reached.")
            self._closed.wait(pause)
            pause = min(2 * pause, longest)

    def _promoted(self) -> bool:
        """Lead, if nobody does, and go on with what waits."""
        if not self._try_to_lead():
            return False
        leader = self._leader()
        if leader is None:
            return True
        try:
            leader.lead()
            self.relay.lead(leader)
        except BaseException:
            self._give_way()
            raise
        self.leading = True
        return True

    def _give_way(self) -> None:
        with self._lock:
            desk, self._desk = self._desk, None
            if desk is not None:
                with contextlib.suppress(OSError):
                    place = self._place()
                    if self._is_here(place / "lock"):  # or the files are another leader's
                        (place / "socket").unlink(missing_ok=True)
                desk.close()
            if self._file is not None:
                self._drop_lock()

    def _meet(self) -> bool:
        """Talk to the leader until it is gone; False when there is none."""
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(str(self._place() / "socket"))
        except OSError:  # it is about to listen, or has just ended
            end.close()
            return False
        self.relay.serve(FrameStream(close_in_child(end)))
        return True

    def ask(self, service: str, patience: float = PATIENCE) -> ServiceStatus | None:
        """What the leader says of a service; None when there is none, or it does not answer in so many seconds."""
        with socket.socket(socket.AF_UNIX) as end, selectors.DefaultSelector() as selector:
            selector.register(end, selectors.EVENT_READ)
            try:
                end.settimeout(max(0.01, patience))
                end.connect(str(self._place() / "socket"))
                wire = FrameStream(end)
                wire.send_message(Errand("status", service))
                while selector.select(patience):
                    for kind, _, body in wire.receive():
                        if kind == RelayFrame.RESULT:
                            status: ServiceStatus = pickle.loads(body)
                            return status
                        if kind != RelayFrame.BEGUN:  # it is ending
                            return None
            except (OSError, EOFError):
                pass
        return None

    def close(self) -> None:
        """Let another process lead. The workers have ended before."""
        if os.getpid() != self._pid:
            return
        self._closed.set()
        self.relay.end()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(PATIENCE)
        self._give_way()
        self.relay.close()
