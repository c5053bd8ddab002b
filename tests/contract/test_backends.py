"""Every backend of this package does what backends promise. A new one joins by a line in ``TYPES``."""

from __future__ import annotations

from typing import Any

import pytest
from processes import without_linux
from variants import TYPES

from flask_executor.testing.contract import BackendContract
from flask_executor.testing.contract.fixtures import MakeExecutor

ALL = {**TYPES, "immediate with pickle": {"type": "immediate", "immediate_pickle": True}}


class TestBackends(BackendContract):
    @pytest.fixture
    def make_executor(self, make_executor: MakeExecutor) -> MakeExecutor:
        """That of ``conftest.py``, which has workers for engines."""
        return make_executor

    @pytest.fixture(params=ALL)
    def executor_config(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        if "macOS" in request.param:
            without_linux(monkeypatch)
        return {"type": request.param, **ALL[request.param]}
