"""Backends and stores of other packages, found by the entry points of packages that are installed in a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from tasks import add

from flask_executor import ConfigError, Executor
from flask_executor.backends.thread import ThreadBackend
from flask_executor.helpers import entry_points
from flask_executor.testing.contract.fixtures import MakeExecutor

Install = Callable[..., None]

MODULE = """
from flask_executor.backends.thread import ThreadBackend
from flask_executor.stores.sqlite import SQLiteStore
from flask_executor.abc import StoreOptions
from dataclasses import replace


class LoudBackend(ThreadBackend):
    pass


class FileStore(SQLiteStore):
    def __init__(self, options):
        path = options.url.partition("://")[2]
        if not path:
            raise ValueError("no path")
        super().__init__(replace(options, url=f"sqlite:///{path}"))


def not_a_class():
    pass
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package ``shop-plugins``, with these lines as entry points."""
    folder = tmp_path / "site-packages"
    monkeypatch.delitem(sys.modules, "shop_plugins", raising=False)

    def install(*, backends: str = "", stores: str = "") -> None:
        information = folder / "shop_plugins-1.0.dist-info"
        information.mkdir(parents=True)
        (folder / "shop_plugins.py").write_text(MODULE)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: shop-plugins\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(str(folder))
        groups = [("flask_executor.backends", backends), ("flask_executor.stores", stores)]
        (information / "entry_points.txt").write_text("\n".join(f"[{name}]\n{lines}" for name, lines in groups))

    return install


def refused(make_executor: MakeExecutor, app: Flask, **config: Any) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        make_executor(app, **config)
    return raised.value


def test_a_backend(install: Install, make_executor: MakeExecutor) -> None:
    install(backends="loud = shop_plugins:LoudBackend")
    executor = make_executor(type=" loud ", max_workers=1)
    assert type(executor._self).__name__ == "LoudBackend"
    assert executor.submit(add, 1, 2).result(10) == 3


def test_a_store(install: Install, app: Flask, make_executor: MakeExecutor, tmp_path: Path) -> None:
    install(stores="file = shop_plugins:FileStore")
    executor = make_executor(store=f"file://{tmp_path}/jobs.sqlite")
    executor.submit_stored("sum", add, 1, 2)
    executor.wait(10)
    assert (tmp_path / "jobs.sqlite").exists()
    other = Flask("shop")
    other.secret_key = app.secret_key
    elsewhere = make_executor(other, store=f"file://{tmp_path}/jobs.sqlite", name="")
    with other.app_context():
        assert elsewhere.futures.result("sum", 10) == 3


def test_the_names_of_this_package_win(install: Install, make_executor: MakeExecutor) -> None:
    install(backends="thread = shop_plugins:LoudBackend", stores="sqlite = shop_plugins:not_a_class")
    executor = make_executor(type="thread", store="sqlite")
    assert type(executor._self) is ThreadBackend
    assert executor.submit_stored("sum", add, 1, 2).result(10) == 3


def test_nothing_is_looked_up_for_what_is_built_in(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(entry_points, "entry_points", lambda **group: asked.append(group))
    app.config.update(EXECUTOR_TYPE="process", EXECUTOR_STORE="sqlite:///jobs.sqlite")
    Executor(app)
    app.config["REPORTS_EXECUTOR_TYPE"] = "flask_executor.backends.thread:ThreadBackend"
    Executor(app, name="reports")
    assert asked == []


def test_what_no_package_has(make_executor: MakeExecutor, app: Flask) -> None:
    for value in ("lout", "", None, 3, "no name at all"):
        assert refused(make_executor, app, type=value).value == value


def test_what_is_not_installed(install: Install, app: Flask, make_executor: MakeExecutor) -> None:
    install(backends="loud = shop_plugins:LoudBackend", stores="file = shop_plugins:FileStore")
    error = refused(make_executor, app, type="lout")
    assert (error.key, error.value) == ("EXECUTOR_TYPE", "lout")
    assert "'thread', 'process', 'immediate'" in str(error)
    assert "'loud', or 'package.module:Class'" in str(error)
    error = refused(make_executor, app, name="reports", store="mysql://ada:secret@host/jobs")
    assert error.key == "REPORTS_EXECUTOR_STORE"
    assert "'sqlite:///path', 'redis://host:6379/0' or 'file://'" in str(error)
    assert "secret" not in str(error)
    error = refused(make_executor, app, type="thread", store="file")
    assert "'file://'" in error.allowed


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("shop_plugin:LoudBackend", "importable: .* raises ModuleNotFoundError: No module named 'shop_plugin'"),
        ("shop_plugins:Missing", "importable: .* raises AttributeError: .*Missing"),
        ("shop_plugins:not_a_class", "a subclass of {base}, and .* is none"),
        ("shop_plugins:StoreOptions", "a subclass of {base}, and .* is none"),
    ],
)
@pytest.mark.parametrize("key", ["EXECUTOR_TYPE", "EXECUTOR_STORE"])
def test_what_cannot_be_used(
    install: Install, app: Flask, make_executor: MakeExecutor, key: str, value: str, why: str
) -> None:
    if key == "EXECUTOR_TYPE":
        install(backends=f"broken = {value}\nloud = shop_plugins:LoudBackend")
        error, base, others = refused(make_executor, app, type="broken"), "Backend", "'broken', 'loud'"
        assert error.value == "broken"
    else:
        install(stores=f"broken = {value}")
        error, base, others = refused(make_executor, app, store="broken://u:secret@host"), "JobStore", "'broken'"
        assert error.value == "broken://***@host"
    assert error.key == key
    assert f"the entry point broken = {value} of shop-plugins" in error.allowed
    assert error.allowed.endswith(f" of installed packages: {others})")
    assert pytest.raises(ConfigError, match=why.format(base=f"flask_executor.abc.{base}")).matches(error)


def test_a_url_that_the_store_refuses(install: Install, app: Flask, make_executor: MakeExecutor) -> None:
    install(stores="file = shop_plugins:FileStore")
    assert "a url that can be used" in str(refused(make_executor, app, store="file://"))


def test_one_that_is_gone_since() -> None:
    with pytest.raises(ConfigError, match=r"installed \(flask_executor.backends of installed packages: none\)"):
        entry_points.load_class(entry_points.BACKENDS, "gone", ThreadBackend, "EXECUTOR_TYPE", "gone")
