"""Hooks that run at a fork: before it, after it in the parent, and in the child."""

from __future__ import annotations

import os
from collections.abc import Callable

_hooks: list[Callable[[], object]] = []
_pid = os.getpid()


def after_fork_in_child(hook: Callable[[], object]) -> None:
    """Call ``hook`` in each child that this process forks, after those that were registered before."""
    _hooks.append(hook)


def around_fork(before: Callable[[], object], after_in_parent: Callable[[], object]) -> None:
    """Call ``before`` before this process forks, and ``after_in_parent`` in this process afterwards."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=after_in_parent)


def run_missed_hooks() -> None:
    """Run the hooks of a fork that Python did not notice: uWSGI's, without ``py-call-osafterfork``."""
    if os.getpid() != _pid:
        _run()


def _run() -> None:
    global _pid
    _pid = os.getpid()
    for hook in _hooks:
        hook()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_run)
