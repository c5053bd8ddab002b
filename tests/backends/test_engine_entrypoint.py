"""How a worker of an engine finds the app of a job."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest
from flask import Flask

from flask_executor import ConfigError, UntrustedResult
from flask_executor.backends.engine import entrypoint
from flask_executor.executor.engine_message import EngineMessage, unpack_engine_message
from flask_executor.executor.producer import call_signer
from flask_executor.jobs.model import JobOptions
from flask_executor.testing.contract.fixtures import MakeExecutor, run_in_threads
from flask_executor.tracking.signing import PayloadKind

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
    monkeypatch.setattr(entrypoint, "_imports", {})
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
    monkeypatch.setattr(entrypoint, "_imports", {})
    with pytest.raises(ConfigError, match="FLASK_APP is 'late_shop:app'"):
        entrypoint._imported("late_shop:app")
    (tmp_path / "late_shop.py").write_text("from flask import Flask\napp = Flask('shop')\n")
    assert entrypoint._imported("late_shop:app").name == "shop"


@pytest.mark.parametrize("flask_app", [None, "pwned:app"])
def test_nothing_in_a_message_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_executor: MakeExecutor, app: Flask, flask_app: str | None
) -> None:
    """What stands in a queue cannot make a worker import what it was not started with."""
    make_executor(store="sqlite")
    (tmp_path / "pwned.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entrypoint, "worker_app", app)
    if flask_app is not None:
        monkeypatch.setenv("FLASK_APP", flask_app)  # a worker that has its app does not look for another
    for destination in (("pwned", ""), ("pwned:app", "executor"), ("shop", "pwned:app"), ("nope", "")):
        with pytest.raises(ConfigError, match="a worker runs only jobs of the app that it was started with"):
            entrypoint.run(destination, "1" * 24, b"garbage")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (["subprocess:getoutput('id > pwned')", "nope", ""], "id", ""),  # as messages were once
        (["shop", "", ""], "id", ""),
        (["shop"], "id", ""),
        ("shop", "id", ""),
        (["shop", 1], "id", ""),
        (["shop", ""], 1, ""),
        (["shop", ""], "id", None),
        (["shop", ""], "id", "not base 64!"),
        (None, None, None),
    ],
    ids=repr,
)
def test_what_is_no_message_is_refused(arguments: tuple[object, object, object]) -> None:
    with pytest.raises(UntrustedResult, match="not written by this version"):
        entrypoint.decode(*arguments)


def test_the_name_of_an_app_decides_nothing(app: Flask) -> None:
    """A call that was signed for another executor with the same key is not run, though its message says otherwise."""
    app.secret_key = "one for all apps of the house"
    signer = call_signer(app)
    call = signer.sign("1" * 24, PayloadKind.CALL, pack_header(("office", ""), "1" * 24))
    with pytest.raises(UntrustedResult, match="signed for the executor '' of the app 'office'"):
        unpack_engine_message("1" * 24, call, ("shop", ""), signer)
    assert unpack_engine_message("1" * 24, call, ("office", ""), signer).destination == ("office", "")
    with pytest.raises(UntrustedResult, match="not signed"):
        unpack_engine_message("2" * 24, call, ("office", ""), signer)


def pack_header(destination: entrypoint.Destination, id: str) -> bytes:
    return b"FE03" + pickle.dumps(EngineMessage(id, destination, "", 0.0, JobOptions(), b""))
