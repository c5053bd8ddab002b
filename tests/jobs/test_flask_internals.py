"""Each private name of Flask that this package sets: a release of Flask that changes one fails here."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, flash, g, request, session
from flask.ctx import AppContext
from flask.globals import _cv_app

from flask_executor.jobs.flask_internals import FLASHES, MERGED, REQUEST, SESSION, RequestContext, cv_request


@pytest.fixture
def pushed(app: Flask) -> Any:
    """A request context as Flask itself has pushed it, with something in each part."""
    with app.test_request_context("/?page=1"):
        g.user, session["cart"] = "ada", 3
        flash("saved")
        yield cv_request.get()


def test_the_context_variables(pushed: Any, app: Flask) -> None:
    assert type(_cv_app.get()) is AppContext
    assert type(pushed) is RequestContext
    assert _cv_app.get().app is app
    assert pushed.app is app
    assert (cv_request is _cv_app) == MERGED


def test_the_parts_of_a_request_context(pushed: Any) -> None:
    assert getattr(pushed, REQUEST) is request._get_current_object()  # type: ignore[attr-defined]
    assert getattr(pushed, SESSION) is session._get_current_object()  # type: ignore[attr-defined]
    assert {REQUEST, SESSION, "_after_request_functions"} <= vars(pushed).keys()
    assert hasattr(pushed, FLASHES)


def test_g_is_where_it_is_set(pushed: Any) -> None:
    assert _cv_app.get().g.user == "ada"
    assert vars(_cv_app.get())["g"] is _cv_app.get().g


def test_the_count_of_pushes(pushed: Any) -> None:
    context: Any = _cv_app.get()
    if MERGED:
        assert context._push_count == 1
        assert context._cv_token is not None
    else:
        assert len(context._cv_tokens) == 1
        assert len(pushed._cv_tokens) == 1
        with context:
            assert len(context._cv_tokens) == 2


def test_the_session_is_stored_under_the_name_that_is_set(pushed: Any) -> None:
    other = type(getattr(pushed, SESSION))({"cart": 5})
    setattr(pushed, SESSION, other)
    assert session["cart"] == 5
