"""Long-lived worker processes that answer messages."""

from __future__ import annotations

import gc
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from service_examples import Broken, Counter, Forker, Late, Quitter, Ticker

from flask_executor import (
    Executor,
    ExecutorShutdown,
    JobStatus,
    JobStopped,
    JobTimeout,
    NotPicklable,
    QueueFull,
    Service,
    WorkerLost,
    every,
    on,
)
from flask_executor.services.batches import MessageBatcher, QueuedMessage
from flask_executor.services.worker import begun_and_ended, mark_of
from flask_executor.testing.contract.fixtures import MakeExecutor, run_in_threads, wait_until


@pytest.fixture(params=["fork", "spawn"])
def executor(app: Flask, make_executor: MakeExecutor, request: pytest.FixtureRequest) -> Executor:
    app.config["EXECUTOR_APP"] = "tasks:create_app()"
    return make_executor(start_method=request.param, stop_grace=0.2)


@pytest.fixture
def forked(make_executor: MakeExecutor) -> Executor:
    return make_executor(start_method="fork", stop_grace=0.2)


def make(executor: Executor, *args: Any, **options: Any) -> Any:
    return executor.service(Counter, *args, per="process", **options)


# ---- calls ----


def test_calls_sends_and_broadcasts(executor: Executor) -> None:
    counter = make(executor)
    future = counter.call("add", 1)
    assert future.result(20) == 2
    assert (future.status, future.name) == (JobStatus.SUCCEEDED, "Counter.add")
    for number in range(100):
        counter.send("note", number)
    assert counter.call("seen").result(20) == list(range(100)), "in order, and before the call"
    counter.broadcast("step", 10)
    assert counter.call("add", 1).result(20) == 11
    assert counter.call("app").result(20) == ("shop", "Counter.app")
    assert counter.call("async", 1).result(20) == 11


def test_a_handler_that_raises_fails_its_call_only(forked: Executor, caplog: pytest.LogCaptureFixture) -> None:
    counter = make(forked)
    pid = counter.call("pid").result(10)
    with pytest.raises(ValueError, match="no paper"):
        counter.call("fail", "no paper").result(10)
    counter.send("fail", "no ink")
    counter.broadcast("fail", "no light")
    assert counter.call("pid").result(10) == pid
    assert wait_until(lambda: "no ink" in caplog.text and "no light" in caplog.text)
    assert "Service 'Counter': a message failed." in caplog.text


def test_unknown_handlers(forked: Executor) -> None:
    counter = make(forked)
    for send in (counter.call, counter.send, counter.broadcast):
        with pytest.raises(ValueError, match=r"'Counter' has no handler for 'ad'; with @on.* it has 'add', 'app'"):
            send("ad", 1)


def test_timeouts_that_cannot_be_used(forked: Executor) -> None:
    counter = make(forked)
    for timeout in (0, -1, math.nan):
        with pytest.raises(ValueError, match="it must be a number of seconds greater than 0, or None"):
            counter.call("add", 1, timeout=timeout)


def test_what_cannot_be_sent(forked: Executor) -> None:
    counter = make(forked)
    for send in (counter.call, counter.send, counter.broadcast):
        with pytest.raises(NotPicklable):
            send("note", lambda: None)
    assert counter.call("add", 1).result(10) == 2


def test_all_workers_share_the_calls(forked: Executor, tmp_path: Path) -> None:
    counter = make(forked, workers=2)
    path = tmp_path / "go on"
    first = counter.call("wait for", str(path))
    pids = {counter.call("pid").result(10) for _ in range(20)}
    assert len(pids) == 1, "the other one has work"
    path.touch()
    assert first.result(10) == str(path)
    blocked = [counter.call("block", 0.05) for _ in range(4)]
    assert [future.result(10) for future in blocked] == ["blocked"] * 4
    counter.broadcast("step", 5)
    assert {counter.call("add", 1).result(10) for _ in range(50)} == {6}


def test_large_messages(executor: Executor) -> None:
    counter = make(executor)
    counter.call("pid").result(20)  # a worker that starts later gets no broadcast
    large = os.urandom(3_000_000)
    counter.send("note", large)
    counter.broadcast("note", large)
    counter.send("note", "small")
    seen = counter.call("seen").result(20)
    assert sorted(map(len, seen)) == [5, 3_000_000, 3_000_000]
    assert seen.count(large) == 2


def test_a_call_that_takes_too_long(forked: Executor) -> None:
    counter = make(forked)
    pid = counter.call("pid").result(10)
    with pytest.raises(JobTimeout):
        counter.call("sleep", 10, timeout=0.1).result(10)
    assert counter.call("pid").result(10) == pid, "it has left by itself"
    with pytest.raises(JobTimeout):
        counter.call("block", 10, timeout=0.1).result(10)
    assert counter.call("pid").result(10) != pid, "it had to be killed"
    assert counter.status().failures == 0, "as was wanted"


def test_a_call_is_stopped_and_reports(forked: Executor) -> None:
    counter = make(forked)
    future = counter.call("loop")
    assert wait_until(lambda: future.message == "looping")
    assert (future.progress, future.status) == (0.5, JobStatus.RUNNING)
    waiting = counter.call("add", 1)
    assert waiting.cancel()
    assert future.stop()
    with pytest.raises(JobStopped):
        future.result(10)


def test_calls_from_many_threads(forked: Executor, app: Flask) -> None:
    counter = make(forked, workers=2)

    def ask() -> None:
        for number in range(50):
            assert counter.call("add", number).result(20) == number + 1
            counter.send("note", number)

    run_in_threads(8, ask)
    assert wait_until(lambda: counter.status().waiting == 0)


def test_await(forked: Executor, app: Flask) -> None:
    counter = make(forked)

    @app.get("/")
    async def view() -> str:
        return str(await counter.call("add", 2))

    assert app.test_client().get("/").text == "3"


# ---- crashes ----


def test_a_worker_that_dies(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    counter = make(executor)
    pid = counter.call("pid").result(20)
    dying, behind = counter.call("die"), counter.call("add", 1)
    error = dying.exception(20)
    assert isinstance(error, WorkerLost)
    assert (error.pid, error.signal, dying.status) == (pid, "SIGKILL", JobStatus.LOST)
    assert behind.result(20) == 2, "it waits for the next worker"
    assert counter.call("pid").result(20) != pid
    status = counter.status()
    assert status.failures == 1
    assert "was killed by SIGKILL" in (status.last_error or "")
    assert "Another worker is started in 0.1 s." in caplog.text


def test_kill_9_from_outside_while_it_is_idle(forked: Executor) -> None:
    counter = make(forked)
    pid = counter.call("pid").result(10)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: counter.status().pids not in ((), (pid,)))
    assert counter.call("pid").result(10) != pid


def test_a_poison_message_is_dropped_and_the_others_are_not(
    forked: Executor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counter = make(forked, str(tmp_path))
    for number in range(30):
        counter.send("die if", number)
    assert wait_until(lambda: counter.status().waiting == 0, 30)
    handled = {number: len((tmp_path / f"message {number}").read_text().split()) for number in range(30)}
    assert handled == {**dict.fromkeys(range(30), 1), 13: 3}, "each once, and the poison three times"
    assert "a message 'die if' of " in caplog.text
    assert len((tmp_path / "setup").read_text().split()) == 4


def test_setup_that_fails(forked: Executor, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model"
    broken = forked.service(Broken, str(path), per="process")
    future = broken.call("hello", "you")
    with pytest.raises(LookupError, match="there is no model"):
        future.result(20)
    assert broken.status().last_error == "LookupError: there is no model"
    assert caplog.text.count("Service 'Broken': LookupError: there is no model Another worker") >= 3
    path.touch()
    assert broken.call("hello", "you").result(20) == "hello you"


def test_the_supervisor_waits_longer_each_time(forked: Executor, tmp_path: Path) -> None:
    broken = forked.service(Broken, str(tmp_path / "never"), per="process")
    broken.start()
    assert wait_until(lambda: broken.status().failures == 4)
    begin = time.monotonic()
    assert wait_until(lambda: broken.status().failures == 5)
    assert time.monotonic() - begin > 0.5


# ---- life ----


def test_teardown(executor: Executor, tmp_path: Path) -> None:
    counter = make(executor, str(tmp_path), workers=2)
    counter.send("note", 1)
    assert wait_until(lambda: counter.status().ready == 2, 20)
    counter.stop()
    for what in ("setup", "teardown"):
        assert len(set((tmp_path / what).read_text().split())) == 2
    assert counter.status().pids == ()
    assert counter.call("add", 1).result(20) == 2, "it starts again"


def test_stop_handles_first_what_was_accepted(forked: Executor, tmp_path: Path) -> None:
    counter = make(forked, str(tmp_path))
    for number in range(12):
        counter.send("die if", number)
    future = counter.call("add", 1)
    counter.stop()
    assert future.result(0) == 2
    assert len(list(tmp_path.glob("message *"))) == 12


def test_stop_by_force(forked: Executor) -> None:
    counter = make(forked)
    future = counter.call("block", 60)
    assert wait_until(lambda: future.running())
    counter.stop(timeout=0.1)
    assert isinstance(future.exception(10), WorkerLost)


def test_it_is_used_while_it_is_stopped(forked: Executor) -> None:
    counter = make(forked)
    ended = threading.Event()

    def stop() -> None:
        while not ended.is_set():
            counter.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        futures = []
        for number in range(300):
            futures.append(counter.call("add", number))
            counter.send("note", number)
        assert [future.result(20) for future in futures] == list(range(1, 301))
    finally:
        ended.set()
        thread.join()


def test_after_shutdown(forked: Executor) -> None:
    counter = make(forked)
    counter.call("add", 1).result(10)
    forked.shutdown()
    for send in (counter.call, counter.send):
        with pytest.raises(ExecutorShutdown):
            send("note", 1)


def test_idle_services_use_no_time(forked: Executor) -> None:
    counter = make(forked)
    pid = counter.call("pid").result(10)

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before, here = ticks(), time.process_time()
    time.sleep(0.5)  # there is nothing to wait for: that nothing happens is what is measured
    assert ticks() - before <= 1
    assert time.process_time() - here < 0.05


def test_every(forked: Executor, caplog: pytest.LogCaptureFixture) -> None:
    ticker = forked.service(Ticker, per="process")
    assert wait_until(lambda: ticker.call("ticks").result(10) > 6), "also after it has failed, and between messages"
    assert wait_until(lambda: "ValueError: the third tick" in caplog.text)
    assert "Service 'Ticker': tick failed." in caplog.text


@pytest.mark.parametrize("seconds", [30 * 86400, math.inf])
def test_every_once_in_a_long_time(forked: Executor, seconds: float) -> None:
    class Sleeper(Counter):
        @every(seconds)
        def tick(self) -> None:
            self.die()

    sleeper = forked.service(Sleeper, per="process")
    pid = sleeper.call("pid").result(10)
    time.sleep(0.05)  # until it waits, which nothing tells
    assert sleeper.call("pid").result(10) == pid
    assert sleeper.status().failures == 0


def test_what_fails_whenever_there_is_no_message_has_a_rest(forked: Executor, caplog: pytest.LogCaptureFixture) -> None:
    class Consumer(Counter):
        @every(0)
        def consume(self) -> None:
            raise ConnectionError("there is no broker")

    consumer = forked.service(Consumer, per="process")
    consumer.start()
    begin = time.monotonic()
    assert wait_until(lambda: caplog.text.count("consume failed") >= 2)
    assert time.monotonic() - begin > 0.9
    assert consumer.call("add", 1).result(0.9) == 2, "messages do not wait for it"


def test_they_start_at_the_first_request(forked: Executor, app: Flask, tmp_path: Path) -> None:
    make(forked, str(tmp_path))
    assert not (tmp_path / "setup").exists()
    app.test_client().get("/")
    assert wait_until((tmp_path / "setup").exists)


# ---- messages from services ----


def test_messages_to_the_app(executor: Executor, app: Flask) -> None:
    counter = make(executor)
    told: list[Any] = []

    @executor.on(counter, "told")
    def hear(body: Any) -> None:
        from flask import current_app

        told.append((body, current_app.name))

    for number in range(100):
        counter.send("tell main", number)
    assert wait_until(lambda: len(told) == 100, 20)
    assert told == [(number, "shop") for number in range(100)]
    with pytest.raises(ValueError, match="there is a handler for 'told' of service 'Counter' already"):
        executor.on(Counter, "told")(print)


def test_messages_to_other_services(forked: Executor, caplog: pytest.LogCaptureFixture) -> None:
    first, second = make(forked, name="first"), make(forked, name="second")
    first.send("pass on", ("second", "note", "hello"))
    assert wait_until(lambda: second.call("seen").result(10) == ["hello"])
    for message in (("nobody", "note", 1), ("second", "nothing", 1)):
        first.send("pass on", message)
    first.send("tell main", 1)
    assert wait_until(lambda: "to the app, which has no @executor.on('first', 'told')" in caplog.text)
    assert "sent a message to 'nobody', which is lost" in caplog.text
    assert wait_until(lambda: "service 'second' has no handler for 'nothing'" in caplog.text)


def test_a_slow_handler_of_the_app_does_not_hold_up_services(forked: Executor) -> None:
    first, second = make(forked, name="first"), make(forked, name="second")
    go_on = threading.Event()

    @forked.on("first", "told")
    def hear(_: Any) -> None:
        go_on.wait(20)

    try:
        first.call("tell main").result(10)
        first.call("pass on", ("second", "note", "hello")).result(10)
        assert wait_until(lambda: second.call("seen").result(10) == ["hello"])
    finally:
        go_on.set()


def test_more_messages_than_the_app_handles(
    forked: Executor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flask_executor.services.inbox._MAX_QUEUED", 10)
    counter = make(forked)
    go_on = threading.Event()
    told: list[int] = []

    @forked.on("Counter", "told")
    def hear(number: int) -> None:
        go_on.wait(20)
        told.append(number)

    for number in range(30):
        counter.call("tell main", number).result(10)
    go_on.set()
    assert wait_until(lambda: told == list(range(10)))
    counter.call("tell main", 30).result(10)
    assert wait_until(lambda: told[-1] == 30)
    assert caplog.text.count("Service 'Counter' sends messages faster than they are handled: 10 wait") == 1
    assert "20 messages of services were dropped" in caplog.text


def test_what_services_send_each_other_arrives_at_the_end(forked: Executor) -> None:
    last, first = make(forked, name="last"), make(forked, name="first")
    told: list[Any] = []
    forked.on("last", "told")(told.append)
    for service in (last, first):
        service.call("pid").result(10)
    first.send("slowly", 0.1)
    for number in range(50):
        first.send("pass on", ("last", "tell main", number))
    forked.shutdown()
    assert told == list(range(50))


def test_one_that_hangs_does_not_keep_others_from_their_teardown(forked: Executor, tmp_path: Path) -> None:
    hanging, other, behind = (make(forked, str(tmp_path / name), name=name) for name in ("hanging", "other", "behind"))
    for name, service in (("hanging", hanging), ("other", other), ("behind", behind)):
        (tmp_path / name).mkdir()
        service.call("pid").result(10)
    hanging.send("pass on", ("behind", "note", 1))
    assert wait_until(lambda: behind.call("seen").result(10) == [1])
    hanging.send("block", 60)
    assert wait_until(lambda: hanging.status().busy)
    hanging._services().terminate(time.monotonic() + 0.5)
    torn_down = {path.parent.name for path in tmp_path.glob("*/teardown")}
    assert torn_down == {"other", "behind"}


def test_a_handler_of_the_app_that_fails(forked: Executor, caplog: pytest.LogCaptureFixture) -> None:
    counter = make(forked)
    told: list[Any] = []

    @forked.on("Counter", "told")
    def hear(body: Any) -> None:
        told.append(body)
        raise ValueError("not so loud")

    counter.send("tell main", 1)
    counter.send("tell main", 2)
    assert wait_until(lambda: told == [1, 2])
    assert wait_until(lambda: caplog.text.count("ValueError: not so loud") == 2)


# ---- bounds ----


def test_the_queue_is_bounded(forked: Executor, tmp_path: Path) -> None:
    counter = make(forked, max_pending=10)
    path = tmp_path / "go on"
    waiting = counter.call("wait for", str(path))
    assert wait_until(waiting.running)
    for number in range(10):
        counter.send("note", number)
    with pytest.raises(QueueFull, match="max_pending of service 'Counter'"):
        counter.send("note", 10)
    assert counter.status().waiting == 10
    with pytest.raises(QueueFull):
        counter.call("add", 1)
    path.touch()
    assert wait_until(lambda: counter.status().waiting == 0)
    assert counter.call("seen").result(10) == list(range(10))


def test_calls_do_not_count_as_jobs_that_wait(make_executor: MakeExecutor, tmp_path: Path) -> None:
    executor = make_executor(max_workers=1, max_pending=1)
    counter = make(executor)
    path = tmp_path / "go on"
    calls = [counter.call("wait for", str(path)) for _ in range(5)]
    assert executor.submit(pow, 2, 3).result(10) == 8
    path.touch()
    assert [call.result(10) for call in calls] == [str(path)] * 5


# ---- mistakes ----


def test_a_factory_that_is_called_again(forked: Executor) -> None:
    told = []

    def create(number: int) -> Any:
        counter = make(forked)

        @forked.on(counter, "told")
        def hear(body: Any) -> None:
            told.append((number, body))

        return counter

    create(1)
    create(2).send("tell main", "news")
    assert wait_until(lambda: told == [(2, "news")], 20)


def test_arguments_that_cannot_be_sent(make_executor: MakeExecutor) -> None:
    executor = make_executor(start_method="spawn", type="process")
    with pytest.raises(NotPicklable, match="Service 'Counter' with its arguments cannot be sent to a worker process"):
        make(executor, threading.Lock()).start()


def test_what_is_no_service(forked: Executor) -> None:
    with pytest.raises(TypeError, match=r"must be a subclass of flask_executor\.Service"):
        forked.service(int)  # type: ignore[arg-type]
    make(forked)
    with pytest.raises(ValueError, match="there is another service 'Counter' already"):
        make(forked, workers=2)
    for options, message in (
        ({"per": "pod"}, "it must be 'app' or 'process'"),
        ({"workers": 0}, "workers is 0; it must be 1 or more"),
        ({"max_pending": 0}, "max_pending is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            forked.service(Counter, name="other", **options)


def test_two_handlers_for_one_type() -> None:
    with pytest.raises(TypeError, match="has two handlers for 'a': one and two"):

        class Twice(Service):
            @on("a")
            def one(self, body: object) -> None: ...

            @on("a")
            def two(self, body: object) -> None: ...

    for seconds in (-1, math.nan):
        with pytest.raises(ValueError, match="the seconds between two calls must be 0 or more"):
            every(seconds)


def test_decorators_without_parentheses() -> None:
    with pytest.raises(TypeError, match="@on needs the type of the messages"):
        on(len)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="@every needs the seconds between two calls"):
        every(len)  # type: ignore[arg-type]


def test_a_service_that_inherits() -> None:
    assert Ticker.handlers["add"] == "add"
    assert Ticker.schedule == {"tick": 0.02}
    assert Counter.schedule == {}


def test_a_service_that_inherits_from_several() -> None:
    class Greets:  # no service by itself
        @on("hello")
        def hello(self, name: str) -> str:
            return f"hello {name}"

    class Calls(Service):
        @on("call")
        def call(self, name: str) -> str:
            return f"{name}!"

        @on("add")
        def loudly(self, number: int) -> str:
            return f"{number}!"

    class All(Greets, Ticker, Calls):
        pass

    assert (All.handlers["hello"], All.handlers["call"], All.handlers["add"]) == ("hello", "call", "add")
    assert All.schedule == {"tick": 0.02}


def test_it_is_shown(forked: Executor) -> None:
    counter = make(forked)
    pid = counter.call("pid").result(10)
    status = counter.status()
    assert (status.name, status.pids, status.workers, status.ready) == ("Counter", (pid,), 1, 1)
    assert (status.busy, status.waiting, status.failures, status.supervisor) == (0, 0, 0, os.getpid())


def test_an_app_that_is_thrown_away_takes_them_along(tmp_path: Path) -> None:
    def use() -> int:
        app = Flask("shop")
        return int(make(Executor(app), str(tmp_path)).call("pid").result(10))

    pid = use()
    assert wait_until(lambda: gc.collect() >= 0 and not Path(f"/proc/{pid}").exists())


# ---- workers that cannot start ----


def supervisor_of(service: Any) -> Any:
    return service._services().pool(service.name)._backend._supervisor


@pytest.mark.parametrize("dies", [False, True])
def test_messages_wait_until_a_worker_can_start(forked: Executor, tmp_path: Path, dies: bool) -> None:
    late = forked.service(Late, str(tmp_path), 4, dies, per="process")
    for number in range(20):
        late.send("note", number)
    error = late.call("seen").exception(20)
    assert isinstance(error, WorkerLost if dies else LookupError), "somebody waits for it"
    assert late.status().waiting == 20
    assert wait_until(lambda: late.status().ready == 1)
    assert late.call("seen").result(10) == list(range(20))


def test_workers_that_fail_together_count_once(
    forked: Executor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late = forked.service(Late, str(tmp_path), 6, False, 3, per="process", workers=3)  # six fail, three at a time
    late.send("note", 1)
    assert late.call("add", 1).result(10) == 2, "six workers, two rounds"
    assert late.status().failures == 6

    def pauses() -> list[str]:
        return re.findall(r"Another worker is started in (\S+) s\.", caplog.text)

    assert wait_until(lambda: len(pauses()) == 6)
    assert (pauses()[0], max(pauses())) == ("0.1", "0.2"), "two pauses, of which the others are told what is left"
    assert sum(pause <= "0.1" for pause in pauses()) >= 3


def test_workers_that_die_together_count_once(forked: Executor) -> None:
    counter = make(forked, workers=3)
    counter.start()
    assert wait_until(lambda: counter.status().ready == 3)
    for pid in counter.status().pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: counter.status().failures == 3)
    assert supervisor_of(counter)._crashes == 1


def test_the_pause_has_a_limit(forked: Executor) -> None:
    counter = make(forked)
    pid = counter.call("pid").result(10)
    supervisor_of(counter)._crashes = 5000
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: "A worker process died" in (counter.status().last_error or ""))
    assert 25 < supervisor_of(counter)._restart_at - time.monotonic() <= 30


def test_what_waits_in_a_pause_uses_no_time_and_does_not_hold_up_the_end(forked: Executor) -> None:
    counter = make(forked)
    pid = counter.call("pid").result(10)
    supervisor_of(counter)._crashes = 8
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: counter.status().failures == 1)
    counter.send("note", 1)
    waiting = counter.call("seen")
    begin = time.process_time()
    time.sleep(0.3)  # there is nothing to wait for: that nothing happens is what is measured
    assert time.process_time() - begin < 0.05
    counter.stop()
    assert waiting.result(0) == [1]


@pytest.mark.parametrize("failed_before", [False, True])
def test_the_end_when_no_worker_can_start(
    forked: Executor, tmp_path: Path, caplog: pytest.LogCaptureFixture, failed_before: bool
) -> None:
    late = forked.service(Late, str(tmp_path), float("inf"), per="process")
    late.send("note", 1)
    if failed_before:
        assert wait_until(lambda: late.status().failures == 4)
    waiting = late.call("seen")
    late.stop()
    assert isinstance(waiting.exception(0), LookupError)
    assert "1 messages for service 'Late' are lost, as it was stopped." in caplog.text


def test_a_worker_that_is_forked_while_a_thread_reads_the_standard_input(
    forked: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        thread = threading.Thread(target=stdin.readline)
        thread.start()
        time.sleep(0.05)  # until it is in the system call, which nothing tells
        try:
            assert make(forked).call("add", 1).result(10) == 2
        finally:
            os.write(writing, b"\n")  # its end is open in the worker too
            thread.join()
            os.close(writing)


def test_dead_workers_leave_no_descriptors(forked: Executor) -> None:
    counter = make(forked)

    def descriptors_after(crashes: int) -> int:
        for _ in range(crashes):
            supervisor_of(counter)._crashes = 0
            assert counter.call("die").exception(10)
        counter.call("pid").result(10)
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.disable()
    try:
        assert descriptors_after(4) <= descriptors_after(1)
    finally:
        gc.enable()


# ---- what handlers do ----


def test_handlers_that_exit(forked: Executor, caplog: pytest.LogCaptureFixture) -> None:
    counter = make(forked)
    pid = counter.call("pid").result(10)
    blocked = counter.call("block", 0.1)
    for number in range(10):
        counter.send("note", number)
        counter.send("exit")
    counter.broadcast("exit")
    assert counter.call("seen").result(10) == list(range(10))
    assert blocked.result(0) == "blocked"
    assert counter.call("pid").result(10) == pid
    assert wait_until(lambda: caplog.text.count("SystemExit: 3") == 11)


def test_a_method_of_the_schedule_that_exits(forked: Executor, caplog: pytest.LogCaptureFixture) -> None:
    quitter = forked.service(Quitter, per="process")
    assert wait_until(lambda: quitter.call("ticks").result(10) > 5)
    assert wait_until(lambda: "Service 'Quitter': quit failed." in caplog.text)
    assert quitter.status().failures == 0


def test_what_a_service_forks_is_no_second_worker(forked: Executor) -> None:
    forker = forked.service(Forker, per="process")
    assert wait_until(lambda: forker.call("forks").result(10) == 3)
    forker.broadcast("fork")
    forker.send("fork")
    for number in range(20):
        forker.send("note", number)
    assert forker.call("seen").result(10) == list(range(20))
    assert len({forker.call("pid").result(10) for _ in range(50)}) == 1
    pid = forker.status().pids[0]

    def states() -> list[str]:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] for child in children]

    assert wait_until(lambda: states() == ["Z"] * 6), "they have ended, and nobody has waited for them"


# ---- batches ----


def test_a_broadcast_overtakes_the_messages_of_a_batch(forked: Executor) -> None:
    counter = make(forked)
    counter.call("pid").result(10)
    for _ in range(50):
        counter.send("slowly", 0.01)
    last = counter.call("seen")
    assert wait_until(last.running, 0.2) or counter.status().busy
    counter.broadcast("note", "broadcast")
    assert last.result(10).index("broadcast") < 25


def test_the_schedule_is_kept_in_a_batch(forked: Executor) -> None:
    ticker = forked.service(Ticker, per="process")
    ticks = ticker.call("ticks").result(10)
    for _ in range(50):
        ticker.send("slowly", 0.01)
    assert ticker.call("ticks").result(10) - ticks > 10


def test_stop_handles_what_stands_behind_a_crash(forked: Executor, tmp_path: Path) -> None:
    counter = make(forked, str(tmp_path))
    for number in range(40):
        counter.send("die if", number)
    counter.stop()
    handled = {number: len((tmp_path / f"message {number}").read_text().split()) for number in range(40)}
    assert handled == {**dict.fromkeys(range(40), 1), 13: 3}


def test_slow_messages_are_shared(forked: Executor, tmp_path: Path) -> None:
    counter = make(forked, str(tmp_path), workers=2)
    counter.start()
    assert wait_until(lambda: counter.status().ready == 2)
    for _ in range(30):
        counter.send("slowly", 0.05)
    assert wait_until(lambda: counter.status().waiting == 0)
    done = tmp_path / "slow"
    assert wait_until(lambda: len(done.read_text().splitlines()) == 30)
    pids, begins, ends = zip(*(line.split() for line in done.read_text().splitlines()), strict=True)
    assert len(set(pids)) == 2
    assert min(map(pids.count, pids)) >= 6, "the one who is free takes what waits"
    busy = sum(map(float, ends)) - sum(map(float, begins))
    assert busy > max(map(float, ends)) - min(map(float, begins)), "both at the same time"


class BatchWorker:
    """A batcher whose batches are handled by the test."""

    def __init__(self, max_batches: int = 1) -> None:
        self.sent: list[tuple[Future[int], int, list[bytes]]] = []
        self.batcher = MessageBatcher("Counter", self.submit, lambda: 0, max_batches, in_order=False)

    def put(self, data: bytes, on_handled: Callable[[int], object] | None = None) -> None:
        self.batcher.put(QueuedMessage(data, "note", on_handled))

    def submit(self, handle: Callable[..., int], broadcasts: int, batch: int, messages: list[bytes], _: float) -> Any:
        future: Future[int] = Future()
        self.sent.append((future, batch, messages))
        return future

    def next(self) -> list[bytes]:
        return self.sent[0][2]

    def die(self, begun: int, ended: int) -> None:
        future, batch, _ = self.sent.pop(0)
        error = WorkerLost("It died.")
        error.mark = mark_of(batch, begun, ended)
        future.set_exception(error)

    def handle(self, messages: int) -> None:
        self.sent.pop(0)[0].set_result(messages)


def test_the_mark_of_a_message() -> None:
    for begun, ended in ((0, 0), (1, 0), (1, 1), (2, 1), (2, 2)):
        assert begun_and_ended(mark_of(7, begun, ended), 7) == (begun, ended)
        assert begun_and_ended(mark_of(7, begun, ended), 8) == (0, 0)


def test_messages_with_the_same_content_are_not_the_same() -> None:
    worker = BatchWorker(max_batches=3)
    for _ in range(3):
        worker.put(b"same")
    for _ in range(3):
        worker.die(1, 0)
    for _ in range(3):
        worker.die(1, 0)
    assert len(worker.batcher) == 3, "two workers have died of each"
    worker.die(1, 0)
    assert len(worker.batcher) == 2


def test_a_message_that_was_handled_to_its_end_is_not_sent_again() -> None:
    worker = BatchWorker()
    for message in (b"0", b"1", b"2", b"3"):
        worker.put(message)
    worker.die(1, 1)
    assert worker.next() == [b"1", b"2", b"3"]
    worker.die(2, 1)
    assert worker.next() == [b"2", b"3"], "it was in the middle of the second"
    worker.die(2, 2)
    assert not worker.sent
    assert len(worker.batcher) == 0


def test_those_who_wait_for_messages_are_told_of_each_once() -> None:
    worker = BatchWorker()
    told: list[int] = []
    for message in (b"0", b"1", b"2", b"3", b"4"):
        worker.put(message, told.append)
    worker.handle(1)
    worker.die(2, 1)
    assert told == [1, 1]
    for _ in range(2):
        worker.die(1, 0)
    assert told == [1, 1, 1], "one that is dropped"
    worker.handle(2)
    assert told == [1, 1, 1, 2]


def test_batches_are_as_long_as_a_worker_has_time_for() -> None:
    worker = BatchWorker()
    for number in range(100):
        worker.put(b"%d" % number)
    worker.handle(1)
    assert worker.next() == [b"%d" % number for number in range(1, 9)]
    worker.handle(2)
    assert worker.next() == [b"3", b"4"]
    worker.handle(2)
    assert len(worker.next()) == 4
    assert len(worker.batcher) == 95
    worker.batcher.flush()
    assert [len(messages) for _, _, messages in worker.sent] == [4, 91]
