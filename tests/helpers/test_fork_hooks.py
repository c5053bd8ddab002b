"""Forking a process that has an executor, as pre-forking servers do."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable

import pytest
from tasks import add, pid

from flask_executor import Executor, WorkerLost
from flask_executor.jobs.model import new_id
from flask_executor.testing.contract.fixtures import MakeExecutor, wait_until

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def in_child(check: Callable[[], None]) -> None:
    """Run ``check`` in a forked child, and pass on whether it failed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "the check failed in the child; its traceback is above"
            return
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def test_each_process_has_a_pool_of_its_own(executor: Executor) -> None:
    assert executor.submit(pid).result() == os.getpid()
    parent = os.getpid()

    def check() -> None:
        assert executor.health().workers == 0
        assert executor.submit(pid).result(timeout=5) == os.getpid() != parent
        assert list(executor.map(add, range(8))) == list(range(8))

    in_child(check)
    in_child(lambda: in_child(check))
    assert executor.submit(pid).result() == parent


def test_jobs_of_the_parent_end_as_lost_in_the_child_and_go_on_in_the_parent(make_executor: MakeExecutor) -> None:
    executor = make_executor(max_workers=1)
    go = threading.Event()
    finished = executor.submit_stored("finished", add, 1)
    finished.result()
    running, queued = executor.submit_stored("running", go.wait, 10), executor.submit_stored("queued", add, 2)
    called: list[int] = []
    queued.add_done_callback(lambda _: called.append(os.getpid()))
    assert wait_until(running.running)

    def check() -> None:
        for future in (running, queued):
            with pytest.raises(WorkerLost, match="submitted before this process was forked"):
                future.result(timeout=5)
            assert future.status == "lost"
            assert executor.jobs.get(future.job_id).status == "lost"  # type: ignore[union-attr]
        assert executor.futures.result("finished") == 1
        assert called == []
        assert executor.wait(5)
        assert executor.submit(add, 3).result(timeout=5) == 3

    in_child(check)
    go.set()
    assert queued.result() == 2
    assert running.result()
    assert wait_until(lambda: called == [os.getpid()])


def test_with_every_lock_held(executor: Executor) -> None:
    """A thread of the parent holds each lock at the moment of the fork; the child must not wait for it."""
    _, binding = executor._app_executor()
    go = threading.Event()
    future = executor.submit_stored("k", go.wait, 10)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with binding._lock, binding.in_flight._changed, binding.tracker.futures._lock, future._condition:
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)

    def check() -> None:
        assert executor.submit_stored("new", add, 1).result(timeout=5) == 1
        assert executor.futures.done("k")
        executor.futures.pop("k")
        executor.shutdown()

    try:
        in_child(check)
    finally:
        release.set()
        holder.join()
        go.set()


def test_while_other_threads_submit(executor: Executor) -> None:
    stop = threading.Event()

    def submit() -> None:
        while not stop.is_set():
            executor.submit(add, 1).result()

    def check() -> None:
        assert executor.submit(add, 1).result(timeout=5) == 1

    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            in_child(check)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_after_a_shutdown_it_stays_shut_down(executor: Executor) -> None:
    executor.shutdown()

    def check() -> None:
        with pytest.raises(RuntimeError, match="shut down"):
            executor.submit(add, 1)

    in_child(check)


def test_ids_differ() -> None:
    new_id()
    reading, writing = os.pipe()

    def check() -> None:
        os.write(writing, new_id().encode())

    in_child(check)
    in_child(check)
    ids = os.read(reading, 48).decode()
    os.close(reading)
    os.close(writing)
    assert len({ids[:24], ids[24:], new_id()}) == 3


def test_a_fork_that_python_is_not_told_of(executor: Executor) -> None:
    """As uWSGI forks: no hook is called, and what is found at the first use has to do."""
    before = executor.submit(add, 1, 2).job_id
    libc = ctypes.PyDLL(None)  # keeps the lock of the interpreter, as the child has no other thread to take it
    child = libc.fork()
    if not child:
        try:
            after = executor.submit(add, 1, 2)
            os._exit(0 if after.result(10) == 3 and after.job_id != before else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert executor.submit(add, 1, 2).result(10) == 3
