"""Slots for requests that wait, and what the streams send."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flask_executor.web import events as stream_events
from flask_executor.web.events import WaitSlots, events, guess_server_threads, wait_for_change


def document(**changes: Any) -> dict[str, Any]:
    return {"id": "1", "status": "running", "ended": False, "progress": None, "elapsed": 1.0, **changes}


def test_slots_are_bounded_and_released_once() -> None:
    slots = WaitSlots(2)
    first, second = slots.acquire(multithreaded=True), slots.acquire(multithreaded=True)
    assert first is not None
    assert second is not None
    assert slots.acquire(multithreaded=True) is None
    for _ in range(3):
        first.release()
    third = slots.acquire(multithreaded=True)
    assert third is not None
    assert slots.acquire(multithreaded=True) is None


def test_a_slot_that_is_dropped_is_released() -> None:
    slots = WaitSlots(1)
    slot = slots.acquire(multithreaded=True)
    assert slot is not None
    del slot
    gc.collect()
    assert slots.acquire(multithreaded=True) is not None


def test_a_server_with_one_thread_has_no_slots() -> None:
    assert WaitSlots(None).acquire(multithreaded=False) is None
    assert WaitSlots(1).acquire(multithreaded=False) is None
    assert WaitSlots(0).acquire(multithreaded=True) is None


def test_a_quarter_of_the_threads_of_the_server() -> None:
    ready = threading.Barrier(16)
    with ThreadPoolExecutor(16) as server:
        counts = set(server.map(lambda _: (ready.wait(10), guess_server_threads())[1], range(16)))
    assert counts == {16}


@pytest.mark.parametrize(("name", "count"), [("waitress-0", 1), ("Thread-5 (process_request_thread)", 32), ("x", 32)])
def test_threads_of_other_servers(name: str, count: int) -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(guess_server_threads()), name=name)
    thread.start()
    thread.join()
    assert found == [count]


def test_waiting_ends_with_the_first_news() -> None:
    reads = iter([document(), document(elapsed=2.0), document(elapsed=3.0, progress=0.5)])
    held = wait_for_change(lambda: next(reads), None, 10)
    assert held is not None
    assert held["progress"] == 0.5, "time that passes is no news"


def test_waiting_ends_in_time_and_when_the_job_is_gone() -> None:
    assert wait_for_change(document, None, 0.1) == document()
    assert wait_for_change(lambda: None, None, 10) is None
    assert wait_for_change(lambda: document(ended=True), None, 10) == document(ended=True)


def test_a_stream_ends_and_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_events, "STREAM_SECONDS", 0.2)
    monkeypatch.setattr(stream_events, "_KEEP_ALIVE_INTERVAL", 0.05)
    sent = list(events(document, None))
    assert sent[0] == "retry: 2000\n\n"
    assert sent[1].startswith("id: ")
    assert set(sent[2:]) == {": still there\n\n"}
    id = sent[1].splitlines()[0].removeprefix("id: ")
    assert not any(part.startswith("id: ") for part in events(document, id))


def test_a_stream_tells_that_the_job_is_gone() -> None:
    def reads() -> Iterator[dict[str, Any] | None]:
        yield document()
        yield None

    read = reads()
    assert list(events(lambda: next(read), None))[-1] == "event: gone\ndata: {}\n\n"
