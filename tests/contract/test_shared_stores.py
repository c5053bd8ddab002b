"""Every store of this package that processes share does what such stores promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from flask_executor.testing.contract import SharedStoreContract


class TestSharedStores(SharedStoreContract):
    @pytest.fixture
    def store_url(self, shared_store: str, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/jobs.sqlite" if shared_store == "sqlite" else shared_store
