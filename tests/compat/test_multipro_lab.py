"""Programs that were written for multipro_lab, with other import lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import running_in

from flask_executor.compat.multipro_lab import Main, MessageRouter, TaskQueue, Timer
from flask_executor.testing.contract.fixtures import wait_until

# What its examples do: a handler of each worker is registered in __init__, some take the body by another name.
IMPORTS = """
import multiprocessing, os, signal, sys, threading, time
from pathlib import Path
from flask_executor.compat.multipro_lab import Main
from flask_executor.compat.multipro_lab import Worker
from flask_executor.compat.multipro_lab import Timer

here = Path(__file__).parent

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())        # in one piece
"""

MESSAGES = """
class Quiet(Worker):

    def __init__(self, *args, **kwargs):
        super(Quiet, self).__init__(*args, **kwargs)
        self.msg_receiver.register_handler(message_type="print", message_handler=self._print)
        self.msg_receiver.register_handler(message_type="fail", message_handler=self._fail)
        self.msg_receiver.register_handler(message_type="hang", message_handler=self._hang)
        self.msg_receiver.register_handler(message_type="leave", message_handler=sys.exit)

    def worker_action(self):
        say(self.name, "acts", os.getpid())

    def _print(self, msg_body=None):
        say(self.name, "got", msg_body, os.getpid())
        self.msg_router.send_message(
            receiving_object_name="main", message_type="print", message_body=self.name + " thanks for " + msg_body
        )

    def _fail(self, message_body=None):
        raise ValueError(message_body)

    def _hang(self, *, message_body):
        say("hangs")
        time.sleep(100)

    def _exit(self, msg_data):
        say(self.name, "exits")
        super()._exit(msg_data)


class Busy(Quiet):

    def __init__(self, *args, **kwargs):
        super(Busy, self).__init__(*args, **kwargs)
        self.main_loop_sleep_time = 0.05
        self.timer = Timer(interval=0.2)
        self.count = 0

    def worker_action(self):
        if self.timer.check_timer():
            self.count += 1
            self.msg_router.send_message(
                receiving_object_name="quiet", message_type="print", message_body="tick %d" % self.count
            )


class UserMain(Main):

    def __init__(self, *args, **kwargs):
        self.timer = Timer(interval=0.2)
        super(UserMain, self).__init__(*args, **kwargs)
        self.msg_receiver.register_handler(message_type="print", message_handler=self._print)
        self.msg_receiver.register_handler(message_type="stop", message_handler=lambda message_body: self.exit())

    def main_action(self):
        if self.timer.check_timer():
            self.send("busy", "print", "news")
        for path in here.glob("to *"):          # "to quiet fail text": what the test wants to be sent
            path.unlink()
            _, name, type, body = path.name.split()
            self.send(name, type, body)

    def send(self, name, type, body):
        self.msg_router.send_message(receiving_object_name=name, message_type=type, message_body=body)

    def _print(self, message_body=None):
        say("main got", message_body)
"""

MAIN = """
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    main = UserMain()
    main.main_loop_sleep_time = 0.05
    main.exit_timeout = {exit_timeout}
    main.register_worker(worker=Quiet(name="quiet", block=True))
    main.register_worker(worker=Busy(name="busy"))
    main.send("quiet", "print", "an early one")
    {run}
    say("end of the script")
"""

TASKS = """
class UserWorker(Worker):

    def __init__(self, *args, **kwargs):
        super(UserWorker, self).__init__(*args, **kwargs)
        self.main_loop_sleep_time = 0.1

    def worker_action(self):
        task = self.msg_router.task_queue.get_task()
        if task is None:
            return None
        say(self.name, os.getpid(), "begins", task[0])
        self.do_task(*task)
        say(self.name, "result", task[0] * task[1])
        return True

    def do_task(self, a, b):
        while b == 0 and not (here / "go on").exists():
            time.sleep(0.005)
        if b == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        if b == -2:
            raise ValueError("no paper")
        if b == -3:
            self._exit_flag = True


class Sender(Worker):

    def worker_action(self):
        for path in here.glob("task *"):        # "task 6 7": what the test wants to be done
            path.unlink()
            _, a, b = path.name.split()
            self.msg_router.task_queue.send_task([int(a), int(b)])


class UserMain(Main):

    def __init__(self, *args, **kwargs):
        super(UserMain, self).__init__(*args, **kwargs)
        for number in range(20):
            self.msg_router.task_queue.send_task([number, 1])

    def main_action(self):
        pass


if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    main = UserMain(task_queue=True)
    main.main_loop_sleep_time = 0.1
    for name in ("Worker_01", "Worker_02", "Worker_03"):
        main.register_worker(worker=UserWorker(name=name, block={block}))
    main.register_worker(worker=Sender(name="sender"))
    main.run()
    say("end of the script")
"""


_programs: list[Program] = []


class Program:
    """A script that runs, and what it has printed."""

    def __init__(self, here: Path, body: str, **values: object) -> None:
        self.here = here
        path = here / "program.py"
        path.write_text(IMPORTS + body.format(**values))
        self._log = here / "log"
        _programs.append(self)
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, path], stdout=log, stderr=log, env={**os.environ, "PROGRAM_OF": str(here)}
            )

    def lines(self) -> list[str]:
        return self._log.read_text().split("\n")[:-1]

    def says(self, text: str) -> bool:
        """Whether it prints that, in time."""
        return wait_until(lambda: text in self._log.read_text(), 60)

    def pid(self, name: str) -> int:
        """The id of the process of a worker that has said it last."""
        return [int(line.split()[-1]) for line in self.lines() if line.startswith(f"{name} ") and line[-1].isdigit()][
            -1
        ]

    def ask(self, what: str) -> None:
        (self.here / what).touch()

    def ends(self, code: int = 0) -> bool:
        """Whether it ends with this code, and says so."""
        return self.process.wait(60) == code


def used_time(here: Path) -> float:
    """How many seconds of processor time the processes of the program in this folder have used."""
    return sum(sum(process.cpu_times()[:2]) for process in running_in(here).values())


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    left = running_in(tmp_path)
    gone = wait_until(lambda: not running_in(tmp_path))
    for pid in running_in(tmp_path):
        os.kill(pid, signal.SIGKILL)
    while _programs:
        _programs.pop().process.wait()
    assert gone, f"left behind: {left}\n{(tmp_path / 'log').read_text()}"


def messages(here: Path, *, method: str = "fork", exit_timeout: float = 10, run: str = "main.run()") -> Program:
    main = MAIN.format(method=method, exit_timeout=exit_timeout, run=run)
    return Program(here, (MESSAGES + main).replace("{", "{{").replace("}", "}}"))


def tasks(here: Path, *, method: str = "fork", block: bool = False) -> Program:
    return Program(here, TASKS, method=method, block=block)


# ---- main and workers that send messages to each other ----


@pytest.mark.parametrize(
    ("method", "number"),
    [("fork", signal.SIGINT), ("fork", signal.SIGTERM), ("forkserver", signal.SIGINT), ("spawn", signal.SIGTERM)],
)
def test_messages(tmp_path: Path, method: str, number: signal.Signals) -> None:
    program = messages(tmp_path, method=method)
    assert program.says("main got quiet thanks for an early one")
    assert program.says("main got quiet thanks for tick 2"), "from worker to worker"
    assert program.says("main got busy thanks for news"), "from main to a worker that has a loop"
    assert len({program.process.pid, program.pid("quiet"), program.pid("busy")}) == 3
    lines = [line for line in program.lines() if line.startswith("quiet ")]
    assert lines[0].startswith("quiet acts"), "once at the beginning"
    assert lines[2].startswith("quiet acts"), "and after each message"
    program.process.send_signal(number)
    assert program.ends()
    assert {"quiet exits", "busy exits"} <= set(program.lines())
    assert program.lines()[-1] == "end of the script"


def test_ctrl_c_reaches_all_processes(tmp_path: Path) -> None:
    program = messages(tmp_path)
    assert program.says("main got quiet thanks for tick 1")
    assert program.says("main got busy thanks for news")
    for pid in running_in(tmp_path):
        os.kill(pid, signal.SIGINT)
    assert program.ends()
    assert {"quiet exits", "busy exits"} <= set(program.lines())


def test_main_exits(tmp_path: Path) -> None:
    program = messages(tmp_path)
    assert program.says("main got quiet thanks for tick 1")
    program.ask("to main stop now")
    assert program.ends()
    assert {"quiet exits", "busy exits"} <= set(program.lines())


IN_A_THREAD = "thread = threading.Thread(target=main.run); thread.start()"


def test_main_exits_from_another_thread(tmp_path: Path) -> None:
    wait = "\n    ".join(["while not (here / 'go on').exists():", "    time.sleep(0.005)", "main.exit()"])
    program = messages(tmp_path, run=f"{IN_A_THREAD}\n    {wait}")
    assert program.says("main got busy thanks for news")
    program.ask("go on")
    assert program.ends()
    assert {"quiet exits", "busy exits"} <= set(program.lines())


STARTED = "while not (here / 'started').exists():\n        time.sleep(0.005)"


@pytest.mark.parametrize("when", ["at once", "when they have started"])
def test_a_main_thread_that_ends_does_not_end_the_workers(tmp_path: Path, when: str) -> None:
    if when == "at once" and (3, 12) <= sys.version_info < (3, 12, 3):
        pytest.skip("these versions of Python start nothing when the main thread has ended")
    program = messages(tmp_path, run=IN_A_THREAD if when == "at once" else f"{IN_A_THREAD}\n    {STARTED}")
    if when != "at once":
        assert program.says("main got quiet thanks for tick 1")
        program.ask("started")
    assert program.says("end of the script")
    assert program.says("main got quiet thanks for tick 4")
    program.process.terminate()
    assert program.ends()
    assert {"quiet exits", "busy exits"} <= set(program.lines())


def test_a_worker_that_does_not_leave_is_forced_to(tmp_path: Path) -> None:
    program = messages(tmp_path, exit_timeout=0.3)
    assert program.says("main got quiet thanks for tick 1")
    program.ask("to busy hang now")
    assert program.says("hangs")
    program.process.send_signal(signal.SIGINT)
    assert program.ends()
    assert "quiet exits" in program.lines()
    assert "busy exits" not in program.lines()
    assert program.lines()[-1] == "end of the script"


def test_a_worker_that_is_killed_is_started_again(tmp_path: Path) -> None:
    program = messages(tmp_path)
    assert program.says("main got quiet thanks for tick 1")
    before = program.pid("quiet")
    os.kill(before, signal.SIGKILL)
    assert wait_until(lambda: program.pid("quiet") != before, 20)
    count = sum("main got quiet" in line for line in program.lines())
    assert wait_until(lambda: sum("main got quiet" in line for line in program.lines()) > count, 20)
    assert program.says("was killed by SIGKILL")
    program.process.terminate()
    assert program.ends()


def test_workers_end_when_main_is_killed(tmp_path: Path) -> None:
    program = messages(tmp_path)
    assert program.says("main got quiet thanks for tick 1")
    program.process.kill()
    assert program.ends(-signal.SIGKILL)


def test_handlers_that_raise(tmp_path: Path) -> None:
    program = messages(tmp_path)
    assert program.says("main got quiet thanks for tick 1")
    pid = program.pid("quiet")
    program.ask("to quiet fail paper")
    assert program.says("ValueError: paper")
    program.ask("to quiet unknown paper")
    assert program.says("no handler is registered for 'unknown'")
    program.ask("to main mystery paper")
    assert program.says("no handler is registered for 'mystery'")
    program.ask("to quiet print again")
    assert program.says("main got quiet thanks for again")
    assert program.pid("quiet") == pid
    program.process.terminate()
    assert program.ends()


def test_a_worker_that_leaves_is_not_started_again(tmp_path: Path) -> None:
    program = messages(tmp_path)
    assert program.says("main got quiet thanks for tick 1")
    pid = program.pid("quiet")
    program.ask("to quiet leave now")
    assert wait_until(lambda: pid not in running_in(tmp_path))
    program.ask("to quiet print again")
    news = program.lines().count("main got busy thanks for news")
    assert wait_until(lambda: program.lines().count("main got busy thanks for news") > news + 2)
    assert program.pid("quiet") == pid, "messages to it are dropped"
    program.process.terminate()
    assert program.ends()


def test_an_error_in_main_action_ends_all(tmp_path: Path) -> None:
    program = messages(tmp_path)
    assert program.says("main got quiet thanks for tick 1")
    program.ask("to nobody print x")
    assert program.ends(1)
    assert program.says("KeyError: 'nobody'")
    assert {"quiet exits", "busy exits"} <= set(program.lines())


FLOOD = """
class Flooding(Worker):

    def worker_action(self):
        for number in range(2000):
            self.msg_router.send_message(receiving_object_name="main", message_type="count", message_body=number)


class UserMain(Main):
    exit_timeout = 1
    count = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.msg_receiver.register_handler(message_type="count", message_handler=self.add)

    def main_action(self):
        say("main acts")

    def add(self, message_body=None):
        self.count += 1
        time.sleep(0.001)
        if self.count == 1000:
            say("has handled 1000")


main = UserMain()
main.register_worker(worker=Flooding(name="flooding"))
main.run()
"""


def test_more_messages_than_main_can_handle(tmp_path: Path) -> None:
    program = Program(tmp_path, FLOOD)
    assert program.says("has handled 1000")
    before = program.lines().count("main acts")
    assert wait_until(lambda: program.lines().count("main acts") > before + 1, 20)
    program.process.terminate()
    assert program.ends()


def test_main_handles_what_waits_when_it_exits(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
class UserMain(Main):

    def main_action(self):
        for number in range(3):
            self.msg_router.send_message(receiving_object_name="main", message_type="print", message_body=number)
        self.exit()


main = UserMain()
main.msg_receiver.register_handler(message_type="print", message_handler=say)
main.run()
say("end of the script")
""",
    )
    assert program.ends()
    assert program.lines() == ["0", "1", "2", "end of the script"]


def test_a_worker_that_has_very_many_messages_to_handle(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
from flask_executor import Executor

Executor.service.__kwdefaults__["max_pending"] = 100  # instead of 100,000, which take a busy machine minutes


class Slow(Worker):
    count = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.msg_receiver.register_handler(message_type="count", message_handler=self.add)

    def add(self, message_body=None):
        while not (here / "go on").exists():
            time.sleep(0.005)
        self.count += 1
        if message_body == "last":
            say("handled", self.count)


main = Main()
main.register_worker(worker=Slow(name="slow", block=True))
thread = threading.Thread(target=main.run)
thread.start()
for body in [None] * 1000 + ["last"]:
    main.msg_router.send_message(receiving_object_name="slow", message_type="count", message_body=body)
(here / "go on").touch()
""",
    )
    assert program.says("handled 1001")
    program.process.terminate()
    assert program.ends()


def test_idle_processes_use_no_time(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        MESSAGES.replace("{", "{{").replace("}", "}}")
        + """
main = UserMain()
main.main_loop_sleep_time = None
main.timer = Timer(interval=3600)        # it sends nothing to "busy", which is not here
for name in ("a", "b"):
    main.register_worker(worker=Quiet(name=name, block=True))
main.send("a", "print", "hello")
main.send("b", "print", "hello")
main.run()
""",
    )
    assert program.says("main got a thanks for hello")
    assert program.says("main got b thanks for hello")
    assert wait_until(lambda: len(running_in(tmp_path)) == 3)
    before = used_time(tmp_path)
    time.sleep(1)  # there is nothing to wait for: that nothing happens is what is measured
    assert used_time(tmp_path) - before <= 0.02
    program.process.terminate()
    assert program.ends()


# ---- main and workers that take tasks from a queue ----


@pytest.mark.parametrize(("method", "block"), [("fork", False), ("fork", True), ("forkserver", True), ("spawn", False)])
def test_tasks(tmp_path: Path, method: str, block: bool) -> None:
    program = tasks(tmp_path, method=method, block=block)
    assert wait_until(lambda: len(results(program)) == 20, 20)
    assert sorted(results(program)) == list(range(20))
    for number in range(3):
        program.ask(f"task {number} 0")  # each keeps a worker
    assert wait_until(lambda: len({*busy(program)}) == 3, 20), program.lines()
    program.ask("task 6 7")
    program.ask("go on")
    assert program.says("result 42")
    program.process.terminate()
    assert program.ends()
    assert len(results(program)) == 24


def results(program: Program) -> list[int]:
    return [int(line.split()[-1]) for line in program.lines() if " result " in line]


def busy(program: Program) -> list[str]:
    """The workers that have begun a task and not ended it."""
    names = ["Worker_01", "Worker_02", "Worker_03"]
    last = {name: [line for line in program.lines() if line.startswith(name)][-1:] for name in names}
    return [name for name, lines in last.items() if lines and " begins " in lines[0]]


def test_the_task_of_a_worker_that_is_killed_is_done_again(tmp_path: Path) -> None:
    program = tasks(tmp_path)
    assert wait_until(lambda: len(results(program)) == 20, 20)
    program.ask("task 5 0")
    assert wait_until(lambda: busy(program))
    [line] = [line for line in program.lines() if line.endswith(" begins 5")][1:]
    os.kill(int(line.split()[1]), signal.SIGKILL)
    assert wait_until(lambda: sum(line.endswith(" begins 5") for line in program.lines()) == 3, 20)
    program.ask("go on")
    assert wait_until(lambda: len(results(program)) == 21, 20)
    program.process.terminate()
    assert program.ends()


def test_a_task_that_kills_workers_is_dropped(tmp_path: Path) -> None:
    program = tasks(tmp_path)
    program.ask("task 100 -1")
    assert program.says("is dropped, as 3 worker processes have died of it")
    program.ask("task 6 7")
    assert program.says("result 42")
    assert sum(line.endswith(" begins 100") for line in program.lines()) == 3
    assert sorted(results(program)) == [*range(20), 42]
    program.process.terminate()
    assert program.ends()


def test_a_task_that_raises(tmp_path: Path) -> None:
    program = tasks(tmp_path, block=True)
    for number in range(4):
        program.ask(f"task {number} -2")
    assert wait_until(lambda: program.lines().count("ValueError: no paper") == 4, 20)
    program.ask("task 6 7")
    assert program.says("result 42")
    program.process.terminate()
    assert program.ends()


def test_workers_that_leave_do_their_last_task(tmp_path: Path) -> None:
    program = tasks(tmp_path)
    assert wait_until(lambda: len(results(program)) == 20, 20)
    assert wait_until(lambda: len(running_in(tmp_path)) == 5), "main, the sender and three workers"
    program.ask("task 1 -3")
    assert wait_until(lambda: len(running_in(tmp_path)) == 4)
    program.ask("task 2 -3")
    assert wait_until(lambda: len(running_in(tmp_path)) == 3)
    for number in range(5):
        program.ask(f"task {number} 5")
    assert wait_until(lambda: len(results(program)) == 27, 20)
    assert sorted(results(program)) == sorted([*range(20), -3, -6, 0, 5, 10, 15, 20])
    program.process.terminate()
    assert program.ends()


def test_a_worker_that_does_not_take_each_task_at_once(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
class Slow(Worker):
    turns = 0

    def worker_action(self):
        self.turns += 1
        if self.turns % 3 == 0:
            task = self.msg_router.task_queue.get_task()
            if task is not None:
                say("result", task)


main = Main(task_queue=True)
main.register_worker(worker=Slow())
main.register_worker(worker=Slow())                     # without names, as they may be
for number in range(10):
    main.msg_router.task_queue.send_task(number)
main.run()
""",
    )
    assert wait_until(lambda: sorted(results_of(program)) == list(range(10)), 20)
    program.process.terminate()
    assert program.ends()


def results_of(program: Program) -> list[int]:
    return [int(line.split()[-1]) for line in program.lines() if line.startswith("result")]


# ---- by themselves ----


def test_timer() -> None:
    timer = Timer(interval=0.05)
    assert not timer.check_timer()
    begin = time.monotonic()
    assert wait_until(timer.check_timer)
    assert time.monotonic() - begin > 0.04
    assert not timer.check_timer()


def test_what_cannot_be_sent() -> None:
    router, tasks = MessageRouter(), TaskQueue()
    with pytest.raises(KeyError, match="nobody"):
        router.send_message(receiving_object_name="nobody", message_type="print")
    with pytest.raises((TypeError, AttributeError)):
        tasks.send_task(lambda: None)
    tasks.send_task([1, 2])
    assert [tasks.get_task(), tasks.get_task()] == [[1, 2], None]


def test_signals_before_and_after_a_run_in_a_thread() -> None:
    caught = list[int]()
    before = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background are started without
    try:
        main = Main()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGTERM]
        acted = threading.Event()
        main.main_action = acted.set  # type: ignore[method-assign]
        thread = threading.Thread(target=main.run)
        thread.start()
        assert acted.wait(10)
        signal.raise_signal(signal.SIGTERM)
        thread.join()
        assert caught == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert caught == [signal.SIGTERM] * 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_signals_are_released() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    main = Main()
    main.exit()
    main.run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
