"""Requests that wait: server-sent events and long polls.

Each keeps a thread of the server while it waits, so a process has a bounded number of slots for them. A request that
finds no free slot is answered at once, and the client asks again.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from flask_executor.exceptions import StoreUnavailable
from flask_executor.web.status import document_version

#: Reads a status document; None when the record has expired.
Read = Callable[[], Mapping[str, Any] | None]

STREAM_SECONDS = 60.0  # a stream ends after so long, and the client opens the next one
_KEEP_ALIVE_INTERVAL = 15.0  # seconds without news after which a comment is sent: it finds out that a client has left
_MIN_POLL_INTERVAL, _MAX_POLL_INTERVAL = 0.05, 0.25  # seconds between two reads of a document
_DEFAULT_SLOTS = 8  # if the number of the server's threads is not known


class WaitSlots:
    """How many requests of this process may wait at a time.

    :param limit: the number of slots; None for a quarter of the server's threads, or 8 if their number is not known.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._acquired = 0

    def acquire(self, *, multithreaded: bool) -> WaitSlot | None:
        """A slot, to be released later; None if none is free.

        :param multithreaded: If true, the server handles other requests of this process at the same time. If it does
            not, no request may wait, because it would keep all others waiting.
        """
        if not multithreaded:
            return None
        limit = max(1, guess_server_threads() // 4) if self._limit is None else self._limit
        with self._lock:
            if self._acquired >= limit:
                return None
            self._acquired += 1
        return WaitSlot(self._release)

    def _release(self) -> None:
        with self._lock:
            self._acquired -= 1


class WaitSlot:
    """An acquired slot. :meth:`release` may be called several times, and from any thread."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._pending = [release]

    def release(self) -> None:
        """Let another request have the slot."""
        try:
            release = self._pending.pop()  # atomic: the stream and the server may both call this
        except IndexError:
            return
        release()

    __del__ = release  # a server that discards an answer does not close it


def guess_server_threads() -> int:
    """How many threads the server has in the pool that the current thread belongs to.

    Servers do not tell, but they number their threads: ``waitress-3``, ``ThreadPoolExecutor-0_3``. A pool that starts
    threads on demand has at least as many as there were requests at a time. A thread that belongs to no pool was
    started for this request, as Flask's development server does.
    """
    pool = _pool_name(threading.current_thread())
    if pool is None:
        return 4 * _DEFAULT_SLOTS
    return sum(_pool_name(thread) == pool for thread in threading.enumerate())


def _pool_name(thread: threading.Thread) -> str | None:
    """The part of a thread's name that all threads of its pool share; None for a thread that belongs to no pool."""
    found = re.fullmatch(r"(?!Thread-)(.+[-_])\d+", thread.name)
    return found and found[1]


def wait_for_change(read: Read, known: str | None, seconds: float) -> Mapping[str, Any] | None:
    """Wait until a document has another version than the client knows, or its job has ended.

    :param known: the version that the client knows; None for the present one.
    :param seconds: how long to wait at most.
    :return: the document then.
    """
    deadline = time.monotonic() + seconds
    interval = _MIN_POLL_INTERVAL
    document = read()
    while document is not None and not document["ended"]:
        version = document_version(document)
        known = version if known is None else known
        left = deadline - time.monotonic()
        if version != known or left <= 0:
            break
        time.sleep(min(interval, left))
        interval = min(2 * interval, _MAX_POLL_INTERVAL)
        document = read()
    return document


def events(read: Read, last_id: str | None) -> Iterator[str]:
    """The status of a job as `server-sent events <https://html.spec.whatwg.org/multipage/server-sent-events.html>`_.

    Each event has the whole document, so a client that misses some loses nothing. The stream ends when the job has
    ended, or after :data:`STREAM_SECONDS`.

    :param last_id: the id of the last event that the client has seen: it gets no event before there is another version.
    """
    yield "retry: 2000\n\n"
    with suppress(StoreUnavailable):  # the client reconnects, and then gets the 503
        yield from _new_versions(read, last_id)


def _new_versions(read: Read, known: str | None) -> Iterator[str]:
    deadline = time.monotonic() + STREAM_SECONDS
    silent_since = time.monotonic()
    interval = _MIN_POLL_INTERVAL
    while (document := read()) is not None:
        version = document_version(document)
        if version != known:
            known, silent_since, interval = version, time.monotonic(), _MIN_POLL_INTERVAL
            yield f"id: {version}\nevent: status\ndata: {json.dumps(document)}\n\n"
        if document["ended"] or time.monotonic() > deadline:
            return
        if time.monotonic() - silent_since > _KEEP_ALIVE_INTERVAL:
            silent_since = time.monotonic()
            yield ": still there\n\n"
        time.sleep(interval)
        interval = min(2 * interval, _MAX_POLL_INTERVAL)
    yield "event: gone\ndata: {}\n\n"
