"""Jobs can be watched and stopped with every backend of this package. A new one joins by a line in ``TYPES``."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from processes import without_linux
from tasks import add
from variants import TYPES

from flask_executor.testing.contract import ControlContract
from flask_executor.testing.contract.fixtures import MakeExecutor


class TestControl(ControlContract):
    @pytest.fixture
    def make_executor(self, make_executor: MakeExecutor) -> MakeExecutor:
        """That of ``conftest.py``, which has workers for engines."""
        return make_executor

    @pytest.fixture(params=TYPES)
    def executor_config(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        if "macOS" in request.param:
            without_linux(monkeypatch)
        return {"type": request.param, **TYPES[request.param]}


class TestForce:
    def test_a_thread_in_a_call_of_the_system_goes_on(self, make_executor: MakeExecutor) -> None:
        executor = make_executor(max_workers=1)
        begun = threading.Event()

        def work() -> None:
            begun.set()
            time.sleep(0.6)

        future = executor.submit(work)
        assert begun.wait(10)
        future.stop(grace=0)
        assert (future.status, future.stop_requested) == ("running", True)
        following = executor.submit(add, 1)
        assert future.exception(10) is not None
        assert future.status == "killed"
        assert following.result(10) == 1, "the exception does not strike the next job of the thread"
