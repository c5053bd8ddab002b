"""What a follower may send, and what it takes back."""

from __future__ import annotations

from flask_executor.jobs.call import PlainCall
from flask_executor.services.follower import LeaderClient
from flask_executor.services.protocol import Operation, Request
from flask_executor.services.send_window import PendingCall, SendWindow


def message(number: int, operation: Operation = "send") -> Request:
    return Request(operation, "Counter", str(number))


def send_all(window: SendWindow, first: int = 1) -> list[str]:
    """Send what may be sent, each message with its number as its end; the types of the messages."""
    sent: list[str] = []
    while window.is_ready:
        item = window.pop()
        if isinstance(item, Request):
            window.sent(first + len(sent), first + len(sent), item)
        sent.append(item.type if isinstance(item, Request) else "call")
    return sent


def test_messages_wait_for_credits() -> None:
    window = SendWindow(2)
    for number in range(4):
        window.put(message(number))
    assert send_all(window) == ["0", "1"]
    window.grant(1)
    assert send_all(window) == ["2"]
    window.grant(2)
    assert send_all(window) == ["3"]
    assert not window.is_ready


def test_calls_and_broadcasts_need_no_credit_but_overtake_nothing() -> None:
    window = SendWindow(1)
    for item in (message(0), message(1, "broadcast"), PendingCall(PlainCall(len, (), {})), message(2)):
        window.put(item)
    assert send_all(window) == ["0", "1", "call"]
    window.grant(1)
    assert send_all(window) == [], "the broadcast has taken one as well"
    window.put(PendingCall(PlainCall(len, (), {})))
    window.grant(1)
    assert send_all(window) == ["2", "call"]


def test_what_was_not_accepted_is_taken_back_with_a_full_window() -> None:
    window = SendWindow(4)
    for number in range(6):
        window.put(message(number))
    assert send_all(window) == ["0", "1", "2", "3"]
    window.grant(1)
    assert send_all(window, 5) == ["4"]
    back = window.take_back(lambda number, end: number > 3)
    assert [number for number, _ in back] == [4, 5]
    window.put_back([item for _, item in back])
    assert send_all(window) == ["3", "4", "5"]
    assert window.take_back(lambda number, end: False) == []


def test_credits_that_a_leader_grants_after_its_goaway_are_not_too_many() -> None:
    window = SendWindow(2)
    for number in range(2):
        window.put(message(number))
    assert send_all(window) == ["0", "1"]
    assert [number for number, _ in window.take_back(lambda number, end: number > 1)] == [2]
    window.grant(1)
    for number in range(3):
        window.put(message(number))
    assert send_all(window) == ["0", "1"]


def test_a_call_that_is_cancelled_while_its_process_gives_it_up() -> None:
    client = LeaderClient()

    class CancelledMeanwhile(PlainCall):
        def begin(self) -> bool:
            assert client.withdraw(self)
            assert self.future.cancel()
            return super().begin()

    call = CancelledMeanwhile(len, ("Counter", "note", b""), {})
    client.open_window("Counter", 1)
    client.enqueue(call)
    client.close()
    assert call.future.cancelled()
