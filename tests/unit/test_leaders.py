"""Two executors of the same app in one process: one leads, the other sends it the messages of its services."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from lodgers import Counter

from conftest import MakeExecutor, run_in_threads, wait_until
from flask_executor import (
    Executor,
    ExecutorShutdown,
    JobStatus,
    JobStopped,
    JobTimeout,
    NotPicklable,
    QueueFull,
    WorkerLost,
)
from flask_executor.leaders import meeting_place

Pair = tuple[Executor, Any]


@pytest.fixture
def join(app: Flask, make_executor: MakeExecutor, tmp_path: Path) -> Callable[..., Pair]:
    """``join()``: an executor of one more app that is the same, and its service."""
    apps = [app]

    def join(*args: Any, **options: Any) -> Pair:
        apps.append(Flask("shop", instance_path=str(tmp_path / "instance")))
        executor = make_executor(apps[-1], stop_grace=1, start_method="fork")
        return executor, executor.service(Counter, *args, **options)

    return join


def test_one_leads_and_the_other_follows(join: Callable[..., Pair], tmp_path: Path) -> None:
    (_, first), (_, second) = join(str(tmp_path)), join(str(tmp_path))
    assert first.call("add", 1).result(10) == 2
    future = second.call("add", 1)
    assert (future.result(10), future.name, future.status) == (2, "Counter.add", JobStatus.SUCCEEDED)
    for number in range(200):
        second.send("note", number)
    assert second.call("seen").result(10) == list(range(200)), "in order, and before the call"
    second.broadcast("step", 10)
    assert second.call("add", 1).result(10) == 11
    assert second.call("pid").result(10) == first.call("pid").result(10)
    assert second.status() == first.status()
    assert len((tmp_path / "setup").read_text().split()) == 1
    with pytest.raises(ValueError, match="no paper"):
        second.call("fail", "no paper").result(10)
    with pytest.raises(ValueError, match="has no handler for 'ad'"):
        second.call("ad", 1)
    with pytest.raises(NotPicklable):
        second.call("add", lambda: None)
    with pytest.raises(RuntimeError, match=f"is looked after by process {os.getpid()}"):
        second.stop()


def test_large_messages_both_ways(join: Callable[..., Pair]) -> None:
    (_, first), (_, second) = join(), join()
    first.start()
    large = os.urandom(5_000_000)
    for _ in range(4):
        second.send("note", large)
    assert second.call("seen").result(30) == [large] * 4


def test_a_call_that_waits_is_cancelled(join: Callable[..., Pair], tmp_path: Path) -> None:
    (_, first), (_, second) = join(), join()
    path = tmp_path / "go on"
    running = first.call("wait for", str(path))
    assert wait_until(running.running)
    waiting = [second.call("note", number) for number in range(3)]
    assert [future.status for future in waiting] == ["queued"] * 3
    assert waiting[1].cancel()
    assert second.status().waiting == 3 or wait_until(lambda: second.status().waiting == 2)
    path.touch()
    assert second.call("seen").result(10) == [0, 2]
    assert waiting[1].cancelled()


def test_timeouts_and_stops_count_from_the_begin(join: Callable[..., Pair], tmp_path: Path) -> None:
    (_, first), (_, second) = join(), join()
    pid = first.call("pid").result(10)
    path = tmp_path / "go on"
    running = first.call("wait for", str(path))
    assert wait_until(running.running)
    waiting = second.call("sleep", 0, timeout=0.3)
    assert not wait_until(lambda: waiting.status != "queued", 0.5), "its time has not begun"
    path.touch()
    assert waiting.result(10) == "slept"
    with pytest.raises(JobTimeout):
        second.call("sleep", 20, timeout=0.1).result(10)
    looping = second.call("loop")
    assert wait_until(looping.running)
    assert looping.stop()
    with pytest.raises(JobStopped):
        looping.result(10)
    assert first.call("pid").result(10) == pid, "nobody had to be killed"
    blocking = second.call("block", 20)
    assert wait_until(blocking.running)
    blocking.stop(grace=0)
    with pytest.raises(JobStopped):
        blocking.result(10)
    assert blocking.status is JobStatus.KILLED


def test_the_worker_dies(join: Callable[..., Pair]) -> None:
    (_, first), (_, second) = join(), join()
    first.start()
    dying, behind = second.call("die"), second.call("add", 1)
    assert isinstance(dying.exception(10), WorkerLost)
    assert dying.status is JobStatus.LOST
    assert behind.result(10) == 2


def test_the_leader_ends_in_order(join: Callable[..., Pair], tmp_path: Path) -> None:
    (leader, first), (_, second) = join(str(tmp_path)), join(str(tmp_path))
    first.start()
    assert second.call("add", 1).result(10) == 2
    for number in range(50):
        second.send("die if", number + 100)
    accepted = second.call("add", 2)
    leader.shutdown()
    assert accepted.result(10) == 3
    assert second.call("add", 3).result(10) == 4, "it leads now"
    assert wait_until(lambda: len(list(tmp_path.glob("message *"))) == 50)
    assert len((tmp_path / "setup").read_text().split()) == 2
    with pytest.raises(ExecutorShutdown):
        first.call("add", 1)


def test_many_at_once(join: Callable[..., Pair]) -> None:
    pairs = [join(workers=2) for _ in range(3)]

    def ask() -> None:
        for number in range(30):
            for _, service in pairs:
                assert service.call("add", number).result(30) == number + 1

    run_in_threads(4, ask)


def test_too_many_messages_for_the_leader(join: Callable[..., Pair], tmp_path: Path) -> None:
    (_, first), (_, second) = join(max_pending=5), join(max_pending=5)
    path = tmp_path / "go on"
    running = first.call("wait for", str(path))
    assert wait_until(running.running)
    for number in range(5):
        second.send("note", number)
    assert wait_until(lambda: first.status().waiting == 5)
    with pytest.raises(QueueFull):
        second.call("add", 1).result(10)
    path.touch()
    assert wait_until(lambda: first.status().waiting == 0)
    assert second.call("seen").result(10) == [0, 1, 2, 3, 4]


def test_the_folder_is_for_this_user_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("t")))
    folder = meeting_place("shop")
    assert folder == meeting_place("shop") != meeting_place("another")
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="must be a folder that belongs to user"):
        meeting_place("shop")
    folder.rmdir()
    folder.symlink_to(folder.parent)
    with pytest.raises((PermissionError, FileExistsError)):
        meeting_place("shop")


def test_who_stays_away_from_the_services_is_told_how_they_are(join: Callable[..., Pair]) -> None:
    (_, first), (_, second) = join(), join()
    assert (second.status().pids, second.status().supervisor) == ((), None)
    pid = first.call("pid").result(10)
    assert second.status().pids == (pid,)
    assert not second._services()._seat.leading
