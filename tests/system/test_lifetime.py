"""How processes end that have jobs: nothing hangs, nothing is left behind, and what is cut off is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tasks
from processes import running_in

from flask_executor.testing.contract.fixtures import wait_until

SUPPORT = str(Path(tasks.__file__).parent)
SCRIPT = """
import logging, os, signal, sys, time
from pathlib import Path

sys.path.insert(0, {tests!r})
import tasks
from flask import Flask
from flask_executor import Executor

logging.basicConfig(level=logging.INFO)
here = Path({here!r})
app = Flask("shop")
app.config.update({config!r})
executor = Executor(app)


def wait_for_a_signal():
    while True:  # in short steps: Python does not notice one that comes in the instant before it begins to sleep
        time.sleep(0.05)


def main():
    executor.submit(tasks.add, 1).result(20)
{body}


if __name__ == "__main__" or not {guard!r}:
    main()
"""


class Script:
    """A program that has an executor."""

    def __init__(self, here: Path, body: str, *, guard: bool = True, **config: object) -> None:
        self.here = here
        lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
        values = {f"EXECUTOR_{key.upper()}": value for key, value in config.items()}
        path = here / "script.py"
        path.write_text(
            SCRIPT.format(
                tests=str(Path(tasks.__file__).parent), here=str(here), config=values, body=lines, guard=guard
            )
        )
        self.log = here / "log"
        with self.log.open("w") as log:
            environ = {**os.environ, "PROGRAM_OF": str(here)}
            self.process = subprocess.Popen(
                [sys.executable, path], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environ
            )

    def wait(self, timeout: float = 60) -> tuple[int, str, float]:
        """Its exit code, what it has written, and how many seconds it took to end."""
        begin = time.monotonic()
        code = self.process.wait(timeout)
        return code, self.log.read_text(), time.monotonic() - begin

    def wait_for(self, name: str) -> None:
        """Wait until it has made a file."""
        assert wait_until((self.here / name).exists, 60), self.log.read_text()


@pytest.fixture
def no_processes_left(tmp_path: Path) -> Iterator[None]:
    yield
    wait_until(lambda: not running_in(tmp_path))
    left = running_in(tmp_path)
    for process in left.values():
        process.kill()
    assert not left, f"left behind: {left}"


@pytest.mark.usefixtures("no_processes_left")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_their_parent_when_it_is_killed(tmp_path: Path, method: str) -> None:
    script = Script(
        tmp_path,
        """
executor.submit(tasks.spin, str(here / "spins"))
executor.submit(tasks.start_a_program, str(here / "program"))
executor.submit(tasks.add, 1).result(20)                    # and one is idle
(here / "ready").touch()
wait_for_a_signal()
""",
        type="process",
        max_workers=3,
        start_method=method,
        app="tasks:create_app()",
    )
    for name in ("ready", "spins", "program"):
        script.wait_for(name)
    script.process.kill()
    script.process.wait()


@pytest.mark.usefixtures("no_processes_left")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do that")
def test_a_worker_in_a_call_that_holds_the_interpreter_ends_too(tmp_path: Path) -> None:
    script = Script(
        tmp_path,
        'executor.submit(tasks.hold_the_interpreter, str(here / "holds"))\nwait_for_a_signal()',
        type="process",
    )
    script.wait_for("holds")
    time.sleep(0.2)  # until it is inside
    script.process.kill()
    script.process.wait()


@pytest.mark.usefixtures("no_processes_left")
def test_standard_output_may_be_closed(tmp_path: Path) -> None:
    _, log, _ = Script(
        tmp_path,
        """
executor.shutdown()
executor.init_app(app)
sys.stdout.close()
assert executor.submit(tasks.add, 2).result(20) == 2
(here / "done").touch()
""",
        type="process",
    ).wait()
    assert (tmp_path / "done").exists(), log


@pytest.mark.usefixtures("no_processes_left")
@pytest.mark.parametrize("type", ["thread", "process"])
def test_a_first_job_when_the_process_is_ending_is_refused(tmp_path: Path, type: str) -> None:
    _, log, _ = Script(
        tmp_path,
        """
import threading
other = Flask("other")
other.config.update(app.config)
late = Executor(other)

def submit():
    threading.main_thread().join()
    for _ in range(2):
        try:
            late.submit(tasks.add, 1).result(5)
        except Exception as error:
            print(type(error).__name__, error)

threading.Thread(target=submit).start()
""",
        type=type,
    ).wait()
    assert "Traceback" not in log, log


@pytest.mark.usefixtures("no_processes_left")
@pytest.mark.parametrize("type", ["thread", "process"])
def test_jobs_may_end_before_the_process_does(tmp_path: Path, type: str) -> None:
    code, log, _ = Script(
        tmp_path,
        """
for n in range(4):
    executor.submit(tasks.sleep, 0.3)
executor.submit(tasks.append, str(here / "written"), "done")
""",
        type=type,
        max_workers=1,
    ).wait()
    assert code == 0, log
    assert (tmp_path / "written").read_text() == "done"
    assert "The process ends; 5 jobs (sleep, sleep, sleep, sleep, append) may go on for 30 s." in log


@pytest.mark.usefixtures("no_processes_left")
@pytest.mark.parametrize("type", ["thread", "process"])
def test_those_that_take_too_long_are_asked_to_stop(tmp_path: Path, type: str) -> None:
    code, log, took = Script(
        tmp_path,
        """
executor.submit(tasks.until_stopped, str(here / "stops"))
while not (here / "stops.started").exists():
    time.sleep(0.01)
""",
        type=type,
        shutdown_timeout=0.2,
    ).wait()
    assert code == 0, log
    assert (tmp_path / "stops").read_text() == "cleaned up"
    assert "1 job (until_stopped) did not end within EXECUTOR_SHUTDOWN_TIMEOUT (0.2 s): stopping." in log
    assert "cut off" not in log
    assert took < 25, "and not as long as a job may go on without that setting"


@pytest.mark.usefixtures("no_processes_left")
@pytest.mark.parametrize("type", ["thread", "process"])
def test_those_that_never_stop_do_not_keep_the_process(tmp_path: Path, type: str) -> None:
    code, log, took = Script(
        tmp_path,
        """
executor.submit(tasks.sleep, 60)
executor.options(name="waits").submit(tasks.sleep, 60)
time.sleep(0.2)
""",
        type=type,
        max_workers=1,
        shutdown_timeout=0.2,
        stop_grace=0.2,
    ).wait()
    assert code == 0, log
    assert took < 25, "and not as long as the jobs take"
    assert "2 jobs (sleep, waits) did not end within EXECUTOR_SHUTDOWN_TIMEOUT (0.2 s): stopping." in log
    assert ("1 job (sleep) did not stop: cut off." in log) == (type == "thread")


@pytest.mark.usefixtures("no_processes_left")
def test_a_handler_for_sigterm_that_exits_lets_jobs_end(tmp_path: Path) -> None:
    script = Script(
        tmp_path,
        """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
executor.submit(tasks.sleep, 0.5)
executor.submit(tasks.append, str(here / "written"), "done")
(here / "ready").touch()
wait_for_a_signal()
""",
        type="process",
        max_workers=1,
    )
    script.wait_for("ready")
    # As a service manager does: to all its processes.
    for member in running_in(tmp_path):
        os.kill(member, signal.SIGTERM)
    code, log, _ = script.wait()
    assert code == 0, log
    assert (tmp_path / "written").read_text() == "done"


@pytest.mark.usefixtures("no_processes_left")
def test_a_job_may_have_an_executor_of_its_own(tmp_path: Path) -> None:
    code, log, _ = Script(
        tmp_path,
        """
assert executor.submit(tasks.submit_from_worker, str(here / "inner")).result(20) == 3
""",
        type="process",
        max_workers=1,
    ).wait()
    assert code == 0, log
    assert (tmp_path / "inner").read_text() == "done"


@pytest.mark.usefixtures("no_processes_left")
def test_spawn_without_a_guard_says_what_to_do(tmp_path: Path) -> None:
    code, log, _ = Script(tmp_path, "pass", guard=False, type="process", start_method="spawn", max_workers=1).wait()
    assert code == 1
    assert "__main__" in log
    assert "WorkerLost: A worker process died before it was ready" in log


def test_sigterm_with_services_and_without(tmp_path: Path) -> None:
    """Services have it end the process in order, but not a child that the app has forked, nor against its own will."""
    body = """
from flask_executor import Service
class Nothing(Service): pass
if here.name == "handler":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
executor.service(Nothing).start()
child = os.fork()
if not child:
    (here / "forked").touch()
    wait_for_a_signal()
while not (here / "forked").exists():
    time.sleep(0.01)
os.kill(child, signal.SIGTERM)
(here / "child").write_text(str(os.waitpid(child, 0)[1]))
(here / "ready").touch()
wait_for_a_signal()
"""
    for name, code in (("default", 0), ("handler", 7)):
        here = tmp_path / name
        here.mkdir()
        script = Script(here, body)
        script.wait_for("ready")
        script.process.terminate()
        assert script.wait()[0] == code
        assert name == "handler" or int((here / "child").read_text()) == signal.SIGTERM
