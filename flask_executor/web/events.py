"""Waiting in the middle of a request: event streams, and answers that are held back until there is news.

Either keeps a thread of the server while it lasts, so a process has a bounded number of places for them. Who gets
none is answered at once, and asks again.
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

#: Reads a status document; None when the job is gone.
Read = Callable[[], Mapping[str, Any] | None]

LIFE = 60.0  # seconds after which a stream ends, and the client asks again
_KEEP_ALIVE = 15.0  # seconds without news after which a comment is sent: else a client that has left is not noticed
_SHORTEST, _LONGEST = 0.05, 0.25  # seconds between two looks at a job
_PLACES = 8  # where it cannot be told how many threads the server has


class WaitSlots:
    """The places of a process for requests that wait.

    :param limit: how many; None for a quarter of the server's threads, or 8 where their number cannot be told.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._taken = 0

    def take(self, *, multithreaded: bool) -> WaitSlot | None:
        """A place, to be given back; None when there is none.

        :param multithreaded: whether the server handles several requests of this process at the same time. Where it
            does not, a request that waits would be the only one.
        """
        if not multithreaded:
            return None
        limit = max(1, guess_server_threads() // 4) if self._limit is None else self._limit
        with self._lock:
            if self._taken >= limit:
                return None
            self._taken += 1
        return WaitSlot(self._give_back)

    def _give_back(self) -> None:
        with self._lock:
            self._taken -= 1


class WaitSlot:
    """A place that was taken. :meth:`give_back` may be called any number of times, from any thread."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._mine = [give_back]

    def give_back(self) -> None:
        """Others can have it."""
        try:
            give_back = self._mine.pop()  # atomic: the stream and the server may both come here
        except IndexError:
            return
        give_back()

    __del__ = give_back  # an answer that was thrown away is never closed


def guess_server_threads() -> int:
    """How many threads the server has in the pool of this one.

    Servers say nowhere how many there are, but number them: ``waitress-3``, ``ThreadPoolExecutor-0_3``. A pool that
    starts its threads when they are needed has at least as many as requests came at a time. A thread of no pool was
    made for this request, as in Flask's development server.
    """
    pool = _pool(threading.current_thread())
    if pool is None:
        return 4 * _PLACES
    return sum(_pool(thread) == pool for thread in threading.enumerate())


def _pool(thread: threading.Thread) -> str | None:
    """What the names of the threads of a pool have in common; None for a thread of no pool."""
    found = re.fullmatch(r"(?!Thread-)(.+[-_])\d+", thread.name)
    return found and found[1]


def hold(read: Read, seen: str | None, seconds: float) -> Mapping[str, Any] | None:
    """Wait until a document has another version than ``seen``, or has ended.

    :param seen: None for the one that it has now.
    :param seconds: most time to wait.
    :return: the document then.
    """
    deadline = time.monotonic() + seconds
    pause = _SHORTEST
    document = read()
    while document is not None and not document["ended"]:
        now = document_version(document)
        seen = now if seen is None else seen
        left = deadline - time.monotonic()
        if now != seen or left <= 0:
            break
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST)
        document = read()
    return document


def events(read: Read, last_id: str | None) -> Iterator[str]:
    """The status of a job as server-sent events, until it has ended, or :data:`LIFE` is over.

    Each has the whole document, so that nothing is lost by those that were missed. After the `HTML standard
    <https://html.spec.whatwg.org/multipage/server-sent-events.html>`_.

    :param last_id: that of the last event which the client has seen: nothing is sent before there is news.
    """
    yield "retry: 2000\n\n"
    with suppress(StoreUnavailable):  # the client asks again, and is told
        yield from _news(read, last_id)


def _news(read: Read, seen: str | None) -> Iterator[str]:
    deadline = time.monotonic() + LIFE
    silent_since = time.monotonic()
    pause = _SHORTEST
    while (document := read()) is not None:
        now = document_version(document)
        if now != seen:
            seen, silent_since, pause = now, time.monotonic(), _SHORTEST
            yield f"id: {now}\nevent: status\ndata: {json.dumps(document)}\n\n"
        if document["ended"] or time.monotonic() > deadline:
            return
        if time.monotonic() - silent_since > _KEEP_ALIVE:
            silent_since = time.monotonic()
            yield ": still there\n\n"
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
    yield "event: gone\ndata: {}\n\n"
