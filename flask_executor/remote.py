"""What workers of other systems run."""

from __future__ import annotations

import functools
from collections.abc import Callable

from flask import Flask

from flask_executor.apps import import_app
from flask_executor.exceptions import ConfigError

#: What runs the calls in a process that is a worker of one app; see :meth:`flask_executor.abc.Backend.work`.
serving: Callable[[str, bytes], None] | None = None


def run(app_import: str, executor_name: str, id: str, data: bytes) -> None:
    """Run a call that an app has sent, in the app that it names.

    :param executor_name: of the executor in that app.
    :param id: of the job.
    :param data: the call, packed and signed.
    :raises ConfigError: when there is no such app or executor here.
    """
    if serving is not None:
        serving(id, data)
        return
    app = _app(app_import)
    executor = app.extensions.get(f"{executor_name}executor")
    if executor is None:
        raise ConfigError("EXECUTOR_APP", app_import, f"an app that has an executor named {executor_name!r}")
    with app.app_context():
        binding = executor._binding()[1]
    binding.run_sent(id, data)


@functools.cache
def _app(app_import: str) -> Flask:
    return import_app(app_import, "EXECUTOR_APP")
