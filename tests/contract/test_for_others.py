"""The contract suite as other packages run it: from outside, for a backend and a store that they have installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = '''
import threading
from concurrent.futures import Future
from dataclasses import replace

from flask_executor.abc import Backend
from flask_executor.exceptions import ExecutorShutdown
from flask_executor.stores.sqlite import SQLiteStore


class EagerBackend(Backend):
    """Has a thread for each job."""

    capacity = None

    def __init__(self, options):
        self._threads = []
        self._shutdown = False

    def enqueue(self, call):
        if self._shutdown:
            raise ExecutorShutdown("no more jobs")
        self._start(call.run)

    def submit(self, fn, /, *args, **kwargs):
        future = Future()

        def run():
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._start(run)
        return future

    def _start(self, fn):
        self._threads.append(threading.Thread(target=fn))
        self._threads[-1].start()

    def shutdown(self, wait=True, *, cancel_futures=False):
        self._shutdown = True
        for thread in self._threads if wait else ():
            thread.join()

    @property
    def workers(self):
        return sum(thread.is_alive() for thread in self._threads)


class BareBackend(EagerBackend):
    """Forgets the contexts."""

    def enqueue(self, call):
        def run():
            if call.begin():
                try:
                    call.succeed(call.fn(*call.args, **call.kwargs))
                except Exception as error:
                    call.fail(error)

        self._start(run)


class FileStore(SQLiteStore):
    def __init__(self, options):
        super().__init__(replace(options, url=f"sqlite:///{options.url.partition('://')[2]}"))


class GenerousStore(FileStore):
    """Gives a key to everybody."""

    def claim(self, entry, *, again=False):
        self.write([entry])
'''

# Collecting a future whose error nobody has seen logs a traceback. If that happens while pytest parses the source of a
# test that fails, Python 3.11.7 and older raise a SystemError (https://github.com/python/cpython/issues/106905).
TESTS = """
import gc

import pytest
from flask_executor.testing.contract import BackendContract, ControlContract, SharedStoreContract, StoreContract

gc.disable()


class BackendFixtures:
    @pytest.fixture
    def executor_config(self):
        return {{"type": "{backend}"}}


class TestBackend(BackendFixtures, BackendContract):
    pass


class TestControl(BackendFixtures, ControlContract):
    def test_priority(self):
        pytest.skip("no job waits for another one")


class StoreFixtures:
    @pytest.fixture
    def store_url(self, tmp_path):
        return f"{store}://{{tmp_path}}/jobs.sqlite"


class TestStore(StoreFixtures, StoreContract):
    pass


class TestSharedStore(StoreFixtures, SharedStoreContract):
    pass
"""

ENTRY_POINTS = """
[flask_executor.backends]
eager = shop_plugins:EagerBackend
bare = shop_plugins:BareBackend
[flask_executor.stores]
file = shop_plugins:FileStore
generous = shop_plugins:GenerousStore
"""


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """A folder in which the package is installed."""
    information = tmp_path / "site-packages" / "shop_plugins-1.0.dist-info"
    information.mkdir(parents=True)
    (information.parent / "shop_plugins.py").write_text(PACKAGE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: shop-plugins\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    return information.parent


def run(site_packages: Path, *tests: str, backend: str, store: str) -> tuple[dict[str, set[str]], str]:
    """Run some tests of the contract in a pytest of their own: the names of those that passed, and so on."""
    (site_packages.parent / "test_shop.py").write_text(TESTS.format(backend=backend, store=store))
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-W", "error", "--import-mode", "importlib"]
    command += ["-p", "no:cacheprovider", "-k", " or ".join(tests), "test_shop.py"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site_packages), *sys.path])}
    done = subprocess.run(
        command, cwd=site_packages.parent, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=90
    )
    output = done.stdout.decode() + done.stderr.decode()
    ends: dict[str, set[str]] = {}
    for end, name in re.findall(r"^(PASSED|FAILED|ERROR) test_shop\.py::([\w:]+)", output, re.MULTILINE):
        ends.setdefault(end, set()).add(name)
    return ends, output


def test_a_package_that_keeps_the_contract(site_packages: Path) -> None:
    quick = ["test_contexts", "test_sleep_wakes_at_once", "test_equal_looking_keys", "test_one_of_many_gets_the_key"]
    quick += ["test_a_claim_takes_the_key_of_a_lost_job", "test_priority", "test_it_can_be_cancelled_meanwhile"]
    ends, output = run(site_packages, *quick, backend="eager", store="file")
    assert ends == {
        "PASSED": {
            "TestBackend::test_contexts",
            "TestControl::TestStop::test_sleep_wakes_at_once",
            "TestStore::test_equal_looking_keys_are_different",
            "TestSharedStore::test_one_of_many_gets_the_key",
            "TestSharedStore::test_a_claim_takes_the_key_of_a_lost_job_only_again",
        }
    }, output
    assert "no job waits for another one" in output, "a test that is overridden"
    assert "with this backend jobs never wait" in output


def test_one_that_breaks_it(site_packages: Path) -> None:
    quick = ["test_results_and_errors", "test_contexts", "test_the_key_is_taken_until_popped"]
    quick += ["test_one_of_many_gets_the_key", "test_spaces_do_not_see_each_other"]
    ends, output = run(site_packages, *quick, backend="bare", store="generous")
    assert ends == {
        "PASSED": {"TestBackend::test_results_and_errors", "TestSharedStore::test_spaces_do_not_see_each_other"},
        "FAILED": {
            "TestBackend::test_contexts",
            "TestStore::test_the_key_is_taken_until_popped",
            "TestSharedStore::test_one_of_many_gets_the_key",
        },
    }, output
    assert "where 16 = " in output, "what was compared is shown"


def test_only_the_contract_needs_pytest() -> None:
    code = """
import sys
sys.modules["pytest"] = None
from flask_executor.testing import drain, jobs
try:
    import flask_executor.testing.contract
except ImportError as error:
    print(type(error).__name__, error)
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, check=True, text=True
    ).stdout
    assert output == "MissingExtra pytest is not installed: pip install flask-executor[testing]\n"
