"""Runs the examples in README.md and docs/: every Python block is executed, invisible ones hold set-up and checks."""

from __future__ import annotations

import gc
import sys
import threading
import types
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser as MarkdownPythonParser
from sybil.parsers.rest import PythonCodeBlockParser

from flask_executor import Executor


class _Shop(types.ModuleType):
    """The module that a document's examples are in, as ``Flask(__name__)`` and pickle want to find it."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        super().__init__("shop")
        self.__file__ = __file__
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        try:
            return self._namespace[name]
        except KeyError:
            raise AttributeError(name) from None


def _set_up(namespace: dict[str, Any]) -> None:
    namespace["__name__"] = "shop"
    sys.modules["shop"] = _Shop(namespace)
    namespace["_threads_before"] = set(threading.enumerate())


def _tear_down(namespace: dict[str, Any]) -> None:
    del sys.modules["shop"]
    for value in list(namespace.values()):
        if type(value) is Executor:  # isinstance would ask the backend behind it
            value.shutdown()
    leaked = set(threading.enumerate()) - namespace["_threads_before"]
    for _ in range(2):  # an app and what is bound to it are cycles; the threads end when those are collected
        gc.collect()
    for thread in leaked:
        thread.join(timeout=10)
    leaked = {thread for thread in leaked if thread.is_alive()}
    assert not leaked, f"an example left threads behind: {leaked}"  # noqa: S101


_documents = Sybil(parsers=[PythonCodeBlockParser()], pattern="docs/*.rst", setup=_set_up, teardown=_tear_down)
_readme = Sybil(parsers=[MarkdownPythonParser()], filenames={"README.md"}, setup=_set_up, teardown=_tear_down)


pytest_collect_file = (_documents + _readme).pytest()
