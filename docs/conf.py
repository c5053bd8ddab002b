"""Sphinx: ``sphinx-build -W -b html docs docs/_build/html``."""

from __future__ import annotations

import flask_executor

project = "Flask-Executor"
copyright = "the Flask-Executor authors"
version = release = flask_executor.__version__

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # ParamSpecs make them unreadable; editors show them
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"Flask-Executor {release}"
html_show_copyright = False
html_copy_source = False
