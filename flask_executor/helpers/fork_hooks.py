"""What is done at a fork: before it, in the parent after it, and in the child."""

from __future__ import annotations

import os
from collections.abc import Callable

_hooks: list[Callable[[], object]] = []
_pid = os.getpid()


def after_fork_in_child(hook: Callable[[], object]) -> None:
    """Have ``hook`` called in every child that this process forks, after those that were given before."""
    _hooks.append(hook)


def around_fork(before: Callable[[], object], after_in_parent: Callable[[], object]) -> None:
    """Have ``before`` called before this process forks, and ``after_in_parent`` here after that."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=after_in_parent)


def run_missed_hooks() -> None:
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
