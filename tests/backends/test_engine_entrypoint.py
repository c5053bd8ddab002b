"""How a worker of an engine finds the app of a job."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from flask import Flask

from flask_executor.backends.engine import entrypoint
from flask_executor.testing.contract.fixtures import run_in_threads

_FACTORY = """
import threading
from flask import Flask

made, second = [], threading.Event()

def create_app():
    assert second.wait(30)  # so that another thread wants the app while this one makes it
    made.append(Flask("shop"))
    return made[-1]
"""


def test_threads_that_want_an_app_at_once_get_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_shop.py").write_text(_FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(entrypoint, "_apps", {})
    import slow_shop  # type: ignore[import-not-found]

    arrived, apps = threading.Barrier(4, slow_shop.second.set), list[Flask]()

    def find() -> None:
        arrived.wait(30)
        apps.append(entrypoint._imported("slow_shop:create_app()"))

    run_in_threads(4, find)
    assert slow_shop.made == [apps[0]]
    assert all(app is apps[0] for app in apps)


def test_one_that_cannot_be_imported_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(entrypoint, "_apps", {})
    with pytest.raises(Exception, match="EXECUTOR_APP"):
        entrypoint._imported("late_shop:app")
    (tmp_path / "late_shop.py").write_text("from flask import Flask\napp = Flask('shop')\n")
    assert entrypoint._imported("late_shop:app").name == "shop"
