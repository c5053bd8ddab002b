"""The tests that every backend and every store passes, for those who write one. They need pytest.

A subclass of one of these classes has their tests, and a fixture that says what is tested:

.. code-block:: python

    import pytest
    from flask_executor.testing.contract import BackendContract, ControlContract

    class RayFixtures:
        @pytest.fixture
        def executor_config(self):
            return {"type": "ray"}

    class TestBackend(RayFixtures, BackendContract):
        pass

    class TestControl(RayFixtures, ControlContract):
        pass
"""

from __future__ import annotations

from flask_executor.exceptions import MissingExtra

try:
    import pytest
except ImportError as error:
    raise MissingExtra("pytest", "testing") from error

# Before they are imported: only then does a test that fails show what it has compared.
_MODULES = "backends control fixtures shared_fixtures shared_messages shared_ownership shared_records stores"
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _MODULES.split()))

from flask_executor.testing.contract.backends import BackendContract  # noqa: E402
from flask_executor.testing.contract.control import ControlContract  # noqa: E402
from flask_executor.testing.contract.shared import SharedStoreContract  # noqa: E402
from flask_executor.testing.contract.stores import StoreContract  # noqa: E402

__all__ = ["BackendContract", "ControlContract", "SharedStoreContract", "StoreContract"]
