"""Services of the tests, for worker processes to import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from flask import current_app

from flask_executor import Service, checkpoint, current_job, every, on


class Counter(Service):
    """Does what it is told, and remembers it."""

    def __init__(self, folder: str = "", step: int = 1) -> None:
        self.folder = Path(folder)
        self.step = step
        self.seen: list[Any] = []

    def setup(self) -> None:
        self.app_at_setup = current_app.name
        self._note("setup")

    def teardown(self) -> None:
        self._note("teardown")
        assert current_app.name == self.app_at_setup

    def _note(self, what: str, line: object = None) -> None:
        if self.folder.name:
            with (self.folder / what).open("a") as file:
                file.write(f"{line or os.getpid()}\n")

    @on("step")
    def set_step(self, step: int) -> None:
        self.step = step

    @on("add")
    def add(self, number: int) -> int:
        return number + self.step

    @on("note")
    def note(self, what: Any) -> None:
        self.seen.append(what)

    @on("seen")
    def get_seen(self, _: None) -> list[Any]:
        return self.seen

    @on("pid")
    def pid(self, _: None) -> int:
        return os.getpid()

    @on("app")
    def app(self, _: None) -> tuple[str, str]:
        return current_app.name, current_job.name

    @on("fail")
    def fail(self, message: str) -> None:
        raise ValueError(message)

    @on("die")
    def die(self, _: Any = None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @on("die if")
    def die_if(self, number: int) -> None:
        self._note(f"message {number}")
        if number == 13:
            self.die()

    @on("exit")
    def exit(self, _: Any = None) -> None:
        raise SystemExit(3)

    @on("fork")
    def fork(self, _: Any = None) -> None:
        os.fork()

    @on("slowly")
    def note_slowly(self, seconds: float) -> None:
        begin = time.monotonic()
        time.sleep(seconds)
        self.seen.append("slow")
        self._note("slow", f"{os.getpid()} {begin} {time.monotonic()}")

    @on("sleep")
    def sleep(self, seconds: float) -> str:
        current_job.sleep(seconds)
        return "slept"

    @on("block")
    def block(self, seconds: float) -> str:
        time.sleep(seconds)
        return "blocked"

    @on("loop")
    def loop(self, _: None) -> None:
        current_job.update(progress=0.5, message="looping")
        while True:
            checkpoint()
            time.sleep(0.001)

    @on("receive")
    def receive(self, _: None) -> list[tuple[str, Any]]:
        messages = [current_job.receive(), current_job.receive()]
        return [(message.type, message.body) for message in messages if message]

    @on("wait for")
    def wait_for(self, path: str) -> str:
        while not Path(path).exists():
            time.sleep(0.001)
        return path

    @on("async")
    async def asynchronous(self, number: int) -> int:
        return number + self.step

    @on("tell main")
    def tell_main(self, body: Any) -> None:
        self.main.send("told", body)

    @on("pass on")
    def pass_on(self, body: tuple[str, str, Any]) -> None:
        to, type, what = body
        self.send(to, type, what)


class Ticker(Counter):
    """Counts."""

    ticks = 0

    @every(0.02)
    def tick(self) -> None:
        self.ticks += 1
        if self.ticks == 3:
            raise ValueError("the third tick")

    @on("ticks")
    def get_ticks(self, _: None) -> int:
        return self.ticks


class Broken(Service):
    """Cannot start until there is a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def setup(self) -> None:
        if not Path(self.path).exists():
            raise LookupError("there is no model")

    @on("hello")
    def hello(self, name: str) -> str:
        return f"hello {name}"


class Late(Counter):
    """Cannot start so many times: raises, or dies without a word; so many workers at the same time."""

    def __init__(self, folder: str, failures: float, dies: bool = False, together: int = 1) -> None:
        super().__init__(folder)
        self.failures = failures
        self.dies = dies
        self.together = together

    def started(self) -> int:
        return len((self.folder / "setup").read_text().split())

    def setup(self) -> None:
        super().setup()
        while self.started() % self.together:
            time.sleep(0.001)
        if self.started() <= self.failures:
            if self.dies:
                self.die()
            raise LookupError("there is no model")


class Forker(Counter):
    """Forks wherever it can."""

    forks = 0

    def setup(self) -> None:
        self.fork()

    @every(0.02)
    def tick(self) -> None:
        if self.forks < 3:
            self.forks += 1
            self.fork()

    @on("forks")
    def get_forks(self, _: None) -> int:
        return self.forks


class Quitter(Ticker):
    """Ends itself, again and again."""

    @every(0.02)
    def quit(self) -> None:
        self.exit()
