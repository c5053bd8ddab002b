"""How a worker process gets its app: it inherits it, or imports it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flask import Flask
from flask.cli import NoAppException, ScriptInfo

from flask_executor.exceptions import ConfigError


def find_import_string(app: Flask) -> str | None:
    """The import string with which another process gets ``app``, as ``"shop:app"``; None if there is none.

    An app that is a global of a module is found there; for one that a factory makes ``FLASK_APP`` may have it.
    """
    for module in (app.import_name, *list(sys.modules)):
        names = getattr(sys.modules.get(module), "__dict__", {})
        for name, value in list(names.items()):
            if value is app:
                return f"{module}:{name}"
    return os.environ.get("FLASK_APP")


def import_string_of(app: Flask | None, app_import: str | None, config_key: str, who: str) -> str:
    """The import string with which workers get the app.

    :param app_import: what the app's config says.
    :param config_key: what the app's config calls this setting.
    :param who: the workers, for the message of the error.
    :raises ConfigError: when there is none.
    """
    found = app_import or (None if app is None else find_import_string(app))
    if found is None:
        name = "" if app is None else f" {app.name!r}"
        allowed = (
            f"the import string of the app or its factory ('shop:create_app()'): {who} import it, and app{name} is"
        )
        raise ConfigError(config_key, None, f"{allowed} not in a module")
    return found


def import_app(import_string: str, config_key: str) -> Flask:
    """The app that ``import_string`` leads to, in the way of ``flask --app``.

    :param import_string: ``"shop"``, ``"shop:app"``, ``"shop:create_app('production')"`` or a path to a file.
    :param config_key: what the app's config calls this setting.
    :raises ConfigError: when there is none.
    """
    try:
        app = ScriptInfo(app_import_path=import_string, set_debug_flag=False).load_app()
    except NoAppException as error:
        wanted = f"the import string of the app or its factory, as for 'flask --app' ({error.format_message()})"
        raise ConfigError(config_key, import_string, wanted) from error
    name_as_in_parent(app)
    return app


def name_as_in_parent(app: Flask) -> None:
    """Give the app of a main module the name that it has in the process which was started with that module.

    Here multiprocessing calls the module ``__mp_main__``, and while it runs there is another ``__main__``. The logger
    and the records of jobs are named after the app.
    """
    if app.import_name == "__mp_main__":
        app.import_name = "__main__"
        file = getattr(sys.modules["__mp_main__"], "__file__", None)
        app.__dict__["name"] = "__main__" if file is None else Path(file).stem
        app.__dict__.pop("logger", None)
