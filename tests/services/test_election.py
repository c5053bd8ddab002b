"""Two executors of the same app in one process: one leads, the other sends it the messages of its services."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from processes import freeze
from service_examples import Counter

from flask_executor import (
    Executor,
    ExecutorShutdown,
    JobStatus,
    JobStopped,
    JobTimeout,
    NotPicklable,
    QueueFull,
    WorkerLost,
    current_job,
)
from flask_executor.services.election import runtime_dir
from flask_executor.testing.contract.fixtures import MakeExecutor, run_in_threads, wait_until

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


def busy_until(service: Any, path: Path) -> None:
    """Have its worker wait for this file, and wait until it does."""
    running = service.call("wait for", str(path))
    assert wait_until(running.running)


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


def test_a_follower_stops_a_service_behind_what_it_has_sent(join: Callable[..., Pair], tmp_path: Path) -> None:
    (_, first), (_, second) = join(str(tmp_path)), join(str(tmp_path))
    first.start()
    second.start()
    path = tmp_path / "go on"
    busy_until(first, path)
    second.send("note", 1)
    seen = second.call("seen")
    stopping = threading.Thread(target=second.stop)
    stopping.start()
    time.sleep(0.2)
    assert stopping.is_alive(), "it waits for what was accepted"
    path.touch()
    stopping.join(20)
    assert not stopping.is_alive()
    assert seen.result(1) == [1]
    assert (first.status().pids, second.status().pids) == ((), ())
    second.stop()  # which is done
    assert second.call("seen").result(20) == [], "it is started again when it is used again"
    second.stop(timeout=1)
    assert first.status().pids == ()


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
    busy_until(first, path)
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
    busy_until(first, path)
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
    time.sleep(0.2)  # it has really begun, or it would just leave
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
    busy_until(first, path)
    for number in range(5):
        second.send("note", number)
    assert wait_until(lambda: first.status().waiting == 5)
    with pytest.raises(QueueFull):
        second.call("add", 1).result(10)
    path.touch()
    assert wait_until(lambda: first.status().waiting == 0)
    assert second.call("seen").result(10) == [0, 1, 2, 3, 4]


def test_the_folder_is_for_this_user_alone(tmp_path: Path) -> None:
    folder = runtime_dir("shop", parent=tmp_path)
    assert folder == runtime_dir("shop", parent=tmp_path) != runtime_dir("another", parent=tmp_path)
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="must be a folder that belongs to user"):
        runtime_dir("shop", parent=tmp_path)
    folder.rmdir()
    folder.symlink_to(folder.parent)
    with pytest.raises((PermissionError, FileExistsError)):
        runtime_dir("shop", parent=tmp_path)


def test_who_stays_away_from_the_services_is_told_how_they_are(join: Callable[..., Pair]) -> None:
    (_, first), (_, second) = join(), join()
    assert (second.status().pids, second.status().supervisor) == ((), None)
    pid = first.call("pid").result(10)
    assert second.status().pids == (pid,)
    assert not second._services()._election.leading


# ---- what a reviewer has found ----


def test_the_leader_ends_without_waiting_and_lives_on(join: Callable[..., Pair]) -> None:
    (leader, first), (_, second) = join(), join()
    first.start()
    assert second.call("add", 1).result(10) == 2
    leader.shutdown(wait=False)
    assert second.call("add", 2).result(10) == 3


def test_a_follower_that_shuts_down_waits_for_its_answers(join: Callable[..., Pair], tmp_path: Path) -> None:
    (_, first), (follower, second) = join(), join()
    first.start()
    path = tmp_path / "go on"
    running, waiting = second.call("wait for", str(path)), second.call("add", 1)
    for number in range(20):
        second.send("note", number)
    assert wait_until(running.running)
    thread = threading.Thread(target=follower.shutdown)
    thread.start()
    path.touch()
    thread.join(20)
    assert (running.result(0), waiting.result(0)) == (str(path), 2)
    assert first.call("seen").result(10) == list(range(20))
    with pytest.raises(ExecutorShutdown):
        second.call("add", 1)


def test_a_leader_that_reads_slowly_gets_everything(join: Callable[..., Pair]) -> None:
    (_, first), (_, second) = join(), join()
    first.start()
    large = "x" * 300_000
    for number in range(100):
        second.send("note", (number, large))
    assert [number for number, _ in second.call("seen").result(20)] == list(range(100))


def test_more_messages_than_the_leader_takes(join: Callable[..., Pair], tmp_path: Path) -> None:
    (_, first), (_, second) = join(max_pending=10), join(max_pending=10)
    path = tmp_path / "go on"
    busy_until(first, path)
    for number in range(100):
        second.send("note", number)
    path.touch()

    def all_seen() -> bool:
        with contextlib.suppress(QueueFull):
            return sorted(first.call("seen").result(10)) == list(range(100))
        return False

    assert wait_until(all_seen, 20), "nothing that was accepted is lost"


def test_order_when_the_leader_takes_no_more(join: Callable[..., Pair], tmp_path: Path) -> None:
    (_, first), (_, second) = join(max_pending=10), join(max_pending=10)
    path = tmp_path / "go on"
    busy_until(first, path)
    for number in range(300):
        second.send("note", number)
    begin = time.process_time()
    time.sleep(0.3)  # the leader is asked again and again
    assert time.process_time() - begin < 0.1, "but not with all of them"
    path.touch()
    seen: list[int] = []

    def all_seen() -> bool:
        with contextlib.suppress(QueueFull):
            seen[:] = first.call("seen").result(10)
        return len(seen) == 300

    assert wait_until(all_seen, 20)
    assert seen == list(range(300))


def test_one_service_that_takes_no_more_does_not_hold_up_another(join: Callable[..., Pair], tmp_path: Path) -> None:
    pairs = [join(max_pending=5), join(max_pending=5)]
    (_, first), (_, second) = pairs
    other_first, other_second = (executor.service(Counter, name="other") for executor, _ in pairs)
    path = tmp_path / "go on"
    busy_until(first, path)
    other_first.start()
    for number in range(100):
        second.send("note", number)
    for number in range(100):
        assert other_second.call("add", number).result(10) == number + 1
    path.touch()


@contextlib.contextmanager
def led_by_a_child(service: Any) -> Iterator[Any]:
    """The process that leads, for as long as it takes."""
    ready, never = multiprocessing.Pipe()

    def lead() -> None:
        ready.close()
        service.call("pid").result(10)
        never.send("it leads")
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=lead)
    process.start()
    try:
        assert ready.poll(20)
        service.call("pid").result(10)
        yield process
    finally:
        process.kill()
        process.join()
        ready.close()
        never.close()


def test_what_was_not_sent_yet_waits_for_the_next_leader(join: Callable[..., Pair]) -> None:
    _, service = join()
    with led_by_a_child(service) as process:
        freeze(process.pid)
        for number in range(30):
            service.send("note", (number, "x" * 100_000))
    seen = [number for number, _ in service.call("seen").result(20)]
    assert len(seen) > 20, "some were in the hands of the system"
    assert seen == list(range(30))[-len(seen) :]


def test_no_call_is_handled_twice_when_the_leader_is_killed(join: Callable[..., Pair], tmp_path: Path) -> None:
    _, service = join(str(tmp_path))
    with led_by_a_child(service):
        futures = {number: service.call("die if", number) for number in range(100, 600)}
        futures[150].result(10)
    for number, future in futures.items():
        lost = isinstance(future.exception(20), WorkerLost)
        path = tmp_path / f"message {number}"
        times = len(path.read_text().split()) if path.exists() else 0
        assert times <= 1 if lost else times == 1


def test_what_a_call_reports_and_is_told(join: Callable[..., Pair], tmp_path: Path) -> None:
    (leader, first), (_, second) = join(), join()
    assert second.call("app").result(10) == first.call("app").result(10) == ("shop", "Counter.app")
    looping = second.call("loop")
    assert wait_until(lambda: looping.message == "looping")
    assert looping.progress == 0.5
    looping.stop()
    path = tmp_path / "go on"
    busy_until(first, path)
    waiting = [second.call("receive") for _ in range(2)]
    for number, future in enumerate(waiting):
        assert future.send("number", number)
    path.touch()
    assert wait_until(waiting[0].running)
    waiting[0].send("number", 10)
    assert waiting[0].result(10) == [("number", 0), ("number", 10)]
    leader.shutdown(wait=False)
    waiting[1].send("number", 11)
    assert waiting[1].result(10) == [("number", 1), ("number", 11)]


def test_who_leads_since_is_not_kept_alive(join: Callable[..., Pair], app: Flask) -> None:
    leader, first = join()
    first.start()

    def follow() -> int:
        app = Flask("shop", instance_path=app_of(leader).instance_path)
        app.config.update(EXECUTOR_START_METHOD="fork")
        service = Executor(app).service(Counter)
        service.call("pid").result(10)
        leader.shutdown()
        return int(service.call("pid").result(10))

    pid = follow()
    assert wait_until(lambda: gc.collect() >= 0 and not Path(f"/proc/{pid}").exists())


def app_of(executor: Executor) -> Flask:
    app = executor.app
    assert app is not None
    return app


def test_a_follower_that_ends_has_given_all_away(join: Callable[..., Pair], tmp_path: Path) -> None:
    (_, first), (follower, second) = join(max_pending=10), join(max_pending=10)
    path = tmp_path / "go on"
    busy_until(first, path)
    for number in range(100):
        second.send("note", number)
    threading.Timer(0.3, path.touch).start()
    follower.shutdown()
    assert wait_until(lambda: first.status().waiting == 0)
    assert sorted(first.call("seen").result(10)) == list(range(100))


def test_order_when_another_one_leads(join: Callable[..., Pair], tmp_path: Path) -> None:
    (leader, first), (_, second) = join(str(tmp_path)), join(str(tmp_path))
    first.start()
    assert second.call("add", 1).result(10) == 2
    thread = threading.Thread(target=leader.shutdown)
    sent = 0
    thread.start()
    while sent < 5000 or (thread.is_alive() and sent < 50_000):
        second.send("note", sent)
        sent += 1
    thread.join()
    seen = second.call("seen").result(20)
    assert all(before < after for before, after in itertools.pairwise(seen)), "those that the second worker got"
    assert seen[-1] == sent - 1


def test_two_that_follow_in_one_process_and_one_of_them_goes(join: Callable[..., Pair]) -> None:
    (leader, first), (second_executor, second), (third_executor, third) = join(), join(), join()
    for service in (first, second, third):
        service.call("pid").result(10)
    leader.shutdown()
    pid = second.call("pid").result(10)
    assert third.call("pid").result(10) == pid
    follower, its_service = (
        (third_executor, third) if second._services()._election.leading else (second_executor, second)
    )
    other = second if its_service is third else third
    follower.shutdown()
    _, fourth = join()
    assert fourth.call("pid").result(10) == other.call("pid").result(10), "the lock is still held"


def test_somebody_tidies_up(join: Callable[..., Pair]) -> None:
    (leader, first), (_, second) = join(), join()
    first.start()
    second.call("pid").result(10)
    shutil.rmtree(second._services()._election._folder())
    assert second.call("add", 1).result(10) == 2, "who is connected is not concerned"
    leader.shutdown()
    assert second.call("add", 2).result(10) == 3


def test_a_place_that_is_not_safe(
    join: Callable[..., Pair],
    app: Flask,
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*what: object) -> Path:
        raise PermissionError("it belongs to somebody else")

    monkeypatch.setattr("flask_executor.services.registry.runtime_dir", refuse)
    service = make_executor().service(Counter)
    assert app.test_client().get("/").status_code == 404, "the request is not to blame"
    assert "The services cannot be started." in caplog.text
    with pytest.raises(PermissionError, match="it belongs to somebody else"):
        service.call("add", 1)


def test_a_leader_that_hangs_is_waited_for_once(join: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_executor.services.registry._STATUS_TIMEOUT", 0.5)
    executor, service = join()
    for name in ("second", "third", "fourth"):
        executor.service(Counter, name=name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(service._services()._get_election()._folder() / "socket"))
        listener.listen()
        begin = time.monotonic()
        assert [status.pids for status in executor.health().services] == [()] * 4
        assert time.monotonic() - begin < 1


def test_looking_starts_nothing(join: Callable[..., Pair]) -> None:
    (_, first), (_, second) = join(), join()
    first.start()
    second.call("pid").result(10)
    first.stop()
    for service in (first, second):
        assert service.status().pids == ()
        service.stop()
        assert service.status().pids == ()
    assert second.call("add", 1).result(10) == 2


def test_messages_to_the_app_are_handled_before_the_end(join: Callable[..., Pair]) -> None:
    executor, service = join()
    told: list[int] = []

    @executor.on("Counter", "told")
    def hear(number: int) -> None:
        told.append(number)

    for number in range(50):
        service.send("tell main", number)
    executor.shutdown()
    assert told == list(range(50))


def test_jobs_that_go_on_at_the_end_use_services(join: Callable[..., Pair]) -> None:
    executor, service = join()
    began = threading.Event()

    def work() -> int:
        began.set()
        current_job.sleep(0.2)
        return int(service.call("add", 1).result(10))

    future = executor.submit(work)
    assert began.wait(10)
    executor.shutdown()
    assert future.result(0) == 2


def test_init_app_after_a_shutdown(join: Callable[..., Pair]) -> None:
    executor, service = join()
    assert service.call("add", 1).result(10) == 2
    executor.shutdown()
    app = executor.app
    assert app is not None
    executor.init_app(app)
    assert service.call("add", 1).result(10) == 2


# ---- calls that wait for another worker ----


@pytest.mark.parametrize("by_force", [False, True])
def test_a_call_whose_worker_died_before_it_began_is_stopped(join: Callable[..., Pair], by_force: bool) -> None:
    (_, first), (_, second) = join(), join()
    pid = first.call("pid").result(10)
    assert second.call("pid").result(10) == pid
    freeze(pid)
    future = second.call("add", 1)
    assert wait_until(future.running), "it was given to the worker, which has not read it"
    supervisor = first._services().pool("Counter")._backend._supervisor
    supervisor._crashes = 9  # the next worker comes in half a minute
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: first.status().failures == 1)
    assert future.stop(grace=0 if by_force else 10)
    with pytest.raises(JobStopped):
        future.result(5)


def test_a_call_is_stopped_while_its_service_stops(join: Callable[..., Pair]) -> None:
    (_, first), (_, second) = join(), join()
    first.start()
    future = second.call("sleep", 20)
    assert wait_until(future.running)
    thread = threading.Thread(target=first.stop)
    thread.start()
    assert wait_until(lambda: not first._services().started())
    assert future.stop(grace=10)
    with pytest.raises(JobStopped):
        future.result(10)
    thread.join(10)
    assert first.status().pids == (), "it was not started again for that"


# ---- who leads, and whom ----


def test_a_worker_process_does_not_lead_if_another_one_can(
    join: Callable[..., Pair], app: Flask, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    leader, first = join()
    first.call("pid").result(10)
    app_with_jobs = Flask("shop", instance_path=app_of(leader).instance_path)
    with_jobs = make_executor(app_with_jobs, type="process", max_workers=1, start_method="fork")
    second = with_jobs.service(Counter)

    def job() -> int:
        return int(second.call("pid").result(10))

    module = sys.modules[__name__]
    vars(module)["_job_with_a_service"] = job
    job.__qualname__ = "_job_with_a_service"
    assert with_jobs.submit(job).result(10) == first.call("pid").result(10)
    second.start()
    leader.shutdown()
    pid = second.call("pid").result(10)
    assert second.status().supervisor == os.getpid()
    assert with_jobs.submit(job).result(10) == pid


def test_a_worker_process_leads_if_there_is_none_else(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor(type="process", max_workers=1, start_method="fork")
    service = executor.service(Counter)
    vars(sys.modules[__name__])["_job_with_a_service"] = job = lambda: service.call("add", 1).result(10)
    job.__qualname__ = "_job_with_a_service"
    assert executor.submit(job).result(20) == 2


def test_tests_and_other_deployments_are_apart(app: Flask, make_executor: MakeExecutor) -> None:
    executor = make_executor()

    def identity() -> tuple[object, ...]:
        return executor._app_executor()[1].identity

    first = identity()
    app.testing = True
    second = identity()
    app.secret_key = "another"
    third = identity()
    assert len({first, second, third}) == 3


def test_who_ends_leaves_the_socket_of_another_leader(join: Callable[..., Pair]) -> None:
    (leader, first), (_, second) = join(), join()
    first.start()
    place = first._services()._election._folder()
    shutil.rmtree(place)
    second.start()
    second.call("pid").result(10)
    leader.shutdown()
    (_, third) = join()
    assert third.call("pid").result(10) == second.call("pid").result(10)
