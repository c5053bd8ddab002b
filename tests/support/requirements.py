"""What a test needs beside Python: where it is missing, the test is skipped."""

from __future__ import annotations

import importlib.util
import os
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skip a test that needs what is not there; in continuous integration it fails."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what, allow_module_level=True)


def require(module: str) -> None:
    """As :func:`missing`, if this module is."""
    if importlib.util.find_spec(module) is None:
        missing(f"{module} is not installed: pip install {module.replace('_', '-')}")
