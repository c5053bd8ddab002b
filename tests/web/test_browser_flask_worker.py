"""The page of a worker of Flask-Worker, as people have it in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import flask_worker_app
import pytest
from browsers import Tabs, assert_accessible, expect_status, part
from flask_worker_app import Office
from playwright.sync_api import Page, expect
from variants import store_url

from flask_executor.testing.contract.fixtures import wait_until

pytestmark = pytest.mark.web


@pytest.fixture(params=["rq", pytest.param("executor", marks=pytest.mark.storm)])
def office(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Office]:
    redis_url = store_url("redis", request) if request.param == "rq" else None
    with flask_worker_app.opened(tmp_path, redis_url) as office:
        yield office


@pytest.fixture
def tabs(office: Office, tabs: Tabs) -> Tabs:
    return tabs  # closed before the server is


def watch(page: Page) -> list[str]:
    """What a page asks for, from now on."""
    asked = list[str]()
    page.on("request", lambda request: asked.append(request.url))
    return asked


@pytest.mark.parametrize("template", ["", "own.html"])
def test_browser_sees_the_page_become_the_finished_one(tabs: Tabs, office: Office, template: str) -> None:
    office.get(f"/hire/Ada?template={template}")
    page = tabs.open("about:blank")
    asked = watch(page)
    page.goto(f"{office.url}/work/Ada?page=2#part7")
    if not template:
        expect_status(page, "Running")
        assert_accessible(page)
    assert wait_until(lambda: office.printed("Ada started"), timeout=30)
    expect(part(page, "status")).to_have_count(1)
    assert part(page, "status").is_visible() is not bool(template)
    office.finish("Ada")
    expect(page.get_by_role("heading", name="The work is done")).to_be_visible()
    assert page.url == f"{office.url}/work/Ada?page=2"
    assert asked
    assert all(url.startswith(office.url) for url in asked), asked


def test_browser_goes_on_to_the_callback(tabs: Tabs, office: Office) -> None:
    office.get("/hire/Ada")
    page = tabs.open(f"{office.url}/work/Ada?callback=/work/Ada?done")
    office.finish("Ada")
    expect(page.get_by_role("heading", name="The work is done")).to_be_visible()
    assert page.url == f"{office.url}/work/Ada?done"


@pytest.mark.parametrize("template", ["", pytest.param("own.html", marks=pytest.mark.storm)])
def test_browser_sees_that_a_job_has_failed(tabs: Tabs, office: Office, template: str) -> None:
    office.get(f"/hire/Ada?method=fail&template={template}")
    page = tabs.open(f"{office.url}/work/Ada")
    expect_status(page, "Failed")
    expect(page.get_by_text("Something went wrong.")).to_be_visible()
    office.get("/hire/Ada")
    office.finish("Ada")
    if template:
        page.reload()
    else:
        assert_accessible(page)
        page.get_by_role("link", name="Try again").click()
    expect(page.get_by_role("heading", name="The work is done")).to_be_visible()


def test_browser_of_somebody_who_is_late(tabs: Tabs, office: Office) -> None:
    """The worker was reset, as in Flask-Worker's second example, before this page has asked again."""
    office.get("/hire/Ada")
    page = tabs.open(f"{office.url}/work/Ada")
    expect_status(page, "Running")
    office.get("/dismiss/Ada")
    office.finish("Ada")
    expect(page.get_by_role("heading", name="The work is done")).to_be_visible()
