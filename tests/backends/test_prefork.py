"""Several processes that do the same: who starts them, who ends them, and how."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from processes import family

from flask_executor.testing.contract.fixtures import wait_until

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

Start = Callable[..., "subprocess.Popen[bytes]"]

_BEGIN = """
import os, signal, sys, threading, time
from pathlib import Path
from flask_executor.backends.engine import prefork
from flask_executor.backends.engine.prefork import run_processes
folder = Path(sys.argv[1])
"""
_SLEEP = "lambda: (folder.joinpath(str(os.getpid())).touch(), time.sleep(120))"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Runs code in a process of its own; what it started is gone in the end."""
    running = []

    def run(code: str) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        running.append(subprocess.Popen([sys.executable, "-c", _BEGIN + code, str(tmp_path)], env=environ))
        return running[-1]

    yield run
    left = {int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()}
    for process in running:
        left |= family(process.pid) if process.poll() is None else set()
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in running:
        process.wait(10)


def begun(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()}


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


@needs_proc
def test_when_the_parent_is_killed_the_others_end(start: Start, tmp_path: Path) -> None:
    parent = start(f"run_processes(3, {_SLEEP})")
    assert wait_until(lambda: len(begun(tmp_path)) == 3, 30)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(map(is_there, begun(tmp_path))), 20)


@needs_proc
def test_one_that_was_started_again_ends_with_the_parent_too(start: Start, tmp_path: Path) -> None:
    parent = start(f"prefork._RESTART_DELAY = 0.01\nrun_processes(2, {_SLEEP})")
    assert wait_until(lambda: len(begun(tmp_path)) == 2, 30)
    os.kill(min(begun(tmp_path)), signal.SIGKILL)
    assert wait_until(lambda: len(begun(tmp_path)) == 3, 30)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(map(is_there, begun(tmp_path))), 20)


@needs_proc
def test_a_signal_between_the_first_forks_ends_all(start: Start, tmp_path: Path) -> None:
    parent = start(f"""
fork, pids = os.fork, []
def fork_and_be_told():
    pids.append(fork())
    if pids[-1] and len(pids) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return pids[-1]
os.fork = fork_and_be_told
run_processes(3, {_SLEEP})
folder.joinpath("ended").touch()
""")
    assert parent.wait(30) == 0
    assert (tmp_path / "ended").exists()
    assert wait_until(lambda: not any(map(is_there, begun(tmp_path))))


def test_one_that_is_forked_while_all_are_told_to_end_is_told_too(start: Start) -> None:
    parent = start("""
prefork._RESTART_DELAY, fork, pids = 0.01, os.fork, []
def fork_and_be_told():
    pids.append(fork())
    if pids[-1] and len(pids) == 3:  # another thread has got the signal, so that it was not held back
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
    return pids[-1]
os.fork = fork_and_be_told
run_processes(2, lambda: os._exit(1) if len(pids) == 1 else time.sleep(120))
""")
    assert parent.wait(30) == 0


def test_a_child_has_no_handlers_of_its_parent(start: Start, tmp_path: Path) -> None:
    parent = start("""
def work():
    (folder / f"handlers-{os.getpid()}").write_text(f"{signal.getsignal(signal.SIGTERM)!r}"
        f" {signal.pthread_sigmask(signal.SIG_BLOCK, ())}")
run_processes(2, work)
""")
    assert parent.wait(30) == 0
    said = [path.read_text() for path in tmp_path.glob("handlers-*")]
    assert len(said) == 2
    assert all("SIG_DFL" in text and text.endswith("set()") for text in said)


def test_a_process_that_somebody_else_has_waited_for_is_no_trouble(start: Start) -> None:
    parent = start("""
group = prefork._WorkerGroup(lambda: None)
group.start()
os.waitpid(group._workers[0].pid, 0)
group.terminate()
group.watch()
group.close()
""")
    assert parent.wait(30) == 0


def test_a_process_is_replaced_although_another_that_it_has_started_goes_on(start: Start, tmp_path: Path) -> None:
    parent = start("""
prefork._RESTART_DELAY = 0.01
def work():
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        return
    if os.fork():
        os._exit(1)
    folder.joinpath(str(os.getpid())).touch()
    time.sleep(120)
group = prefork._WorkerGroup(work)
group.start()
group.watch()
""")
    assert parent.wait(30) == 0
    assert wait_until(lambda: len(begun(tmp_path)) == 1)


def test_it_ends_in_order(start: Start, tmp_path: Path) -> None:
    parent = start("""
threading._register_atexit(lambda: (folder / f"left-{os.getpid()}").touch())
def work():
    threading.Thread(target=lambda: (time.sleep(0.3), (folder / f"thread-{os.getpid()}").touch())).start()
    sys.exit(0)
run_processes(2, work)
os._exit(0)
""")
    assert parent.wait(30) == 0
    assert len(list(tmp_path.glob("left-*"))) == 2
    assert len(list(tmp_path.glob("thread-*"))) == 2


def test_children_of_others_are_not_replaced(start: Start, tmp_path: Path) -> None:
    parent = start("""
import subprocess
subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"])
run_processes(2, lambda: ((folder / f"run-{os.getpid()}").touch(), time.sleep(3)))
""")
    assert parent.wait(30) == 0
    assert len(list(tmp_path.glob("run-*"))) == 2
