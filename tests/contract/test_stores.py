"""An executor does what it promises about records and keys with every store of this package."""

from __future__ import annotations

import pytest

from flask_executor.testing.contract import StoreContract


class TestStores(StoreContract):
    @pytest.fixture
    def store_url(self, any_store: str) -> str:
        return any_store
