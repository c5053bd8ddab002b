"""What is done in the child of a fork."""

from __future__ import annotations

import os
from collections.abc import Callable

_hooks: list[Callable[[], object]] = []
_pid = os.getpid()


def after_fork_in_child(hook: Callable[[], object]) -> None:
    """Have ``hook`` called in every child that this process forks, after those that were given before."""
    _hooks.append(hook)


def notice_fork() -> None:
    """Do now what was to be done at a fork that Python was not told of; uWSGI's, without ``py-call-osafterfork``."""
    if os.getpid() != _pid:
        _run()


def _run() -> None:
    global _pid
    _pid = os.getpid()
    for hook in _hooks:
        hook()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_run)
