"""Functions that tests run as jobs; at the top of a module, so that worker processes can import them."""

from __future__ import annotations

import os
import threading
import time
from typing import Any, NoReturn

from flask import current_app, g, request, session


def add(a: int, b: int = 0) -> int:
    return a + b


def fail(message: str = "no paper") -> NoReturn:
    raise ValueError(message)


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def pid(_: object = None) -> int:
    return os.getpid()


def app_name(_: object = None) -> str:
    return current_app.name


def of_g(name: str) -> Any:
    return getattr(g, name)


def of_request(name: str) -> Any:
    return getattr(request, name)


def of_session(name: str) -> Any:
    return session[name]


def body() -> bytes:
    return request.get_data()


def form_and_file() -> tuple[str, str | None, bytes]:
    upload = request.files["upload"]
    return request.form["title"], upload.filename, upload.read()


class TwoArgumentsError(Exception):
    """Pickles, but cannot be rebuilt: its __init__ takes more than what it passes on."""

    def __init__(self, page: int, reason: str) -> None:
        super().__init__(f"page {page}: {reason}")


def fail_with_two_arguments() -> NoReturn:
    raise TwoArgumentsError(4, "torn")


class Torn:
    """Pickles, but raises when it is rebuilt in another process than the one it was made in."""

    def __reduce__(self) -> Any:
        return _rebuild, (os.getpid(),)


def _rebuild(made_in: int) -> None:
    if made_in != os.getpid():
        raise ValueError("torn")


def torn_result() -> Torn:
    return Torn()


async def add_async(a: int, b: int) -> int:
    return a + b


def unpicklable_result() -> Any:
    return threading.Lock()
