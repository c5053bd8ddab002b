"""The page that waits, the job's own page and bars in pages of the app, as people have them in a browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest
from browsers import HOSTILE, LOOKS, Puppet, Shop, Tabs, assert_accessible, assert_harmless, expect_status, part
from playwright.sync_api import Locator, Page, expect

from flask_executor.testing.contract.fixtures import wait_until

pytestmark = pytest.mark.web

OpenShop = Callable[..., Shop]


def expect_report(page: Page) -> None:
    expect(page.get_by_role("heading", name="the report")).to_be_visible()


def stop_button(page: Page) -> Locator:
    return page.get_by_role("button", name="Stop")


def retry_button(page: Page) -> Locator:
    return page.get_by_role("button", name="Try again")


def assert_moves_and_turns(page: Page, puppet: Puppet) -> None:
    bar = page.get_by_role("progressbar")
    expect_status(page, "Running")
    expect(bar).not_to_have_attribute("value", re.compile(""))
    expect(part(page, "elapsed")).to_have_text("1 second so far")
    for progress, message in ((0.25, "page 1 of 4"), (0.75, "page 3 of 4")):
        puppet.update(progress=progress, message=message)
        expect(part(page, "message")).to_have_text(message)
        expect(bar).to_have_js_property("value", progress)
        expect(part(page, "percent")).to_have_text(f"{progress:.0%}".replace("%", "\N{NO-BREAK SPACE}%"))
    expect(page).to_have_title(re.compile("75.% · .*puppet"))
    expect(part(page, "remaining")).to_contain_text("left")
    assert puppet.views == 0
    puppet.finish()
    expect_report(page)
    page.wait_for_load_state("networkidle")
    assert (puppet.views, puppet.runs) == (1, 1)


@pytest.mark.parametrize("kind", ["stream", "polling"])
def test_a_page_moves_and_becomes_the_real_one(tabs: Tabs, open_shop: OpenShop, kind: str) -> None:
    shop = open_shop(events_max=0 if kind == "polling" else 4)
    puppet = shop.puppet()
    page = tabs.open("about:blank")
    types = set[str]()
    page.on("response", lambda response: types.add(response.headers.get("content-type", "").split(";")[0]))
    page.goto(f"{puppet.url}?month=may#part7")
    assert_moves_and_turns(page, puppet)
    assert page.url == f"{puppet.url}?month=may#part7"
    assert ("text/event-stream" in types) == (kind == "stream")
    assert ("application/vnd.flask-executor.job+json" in types) == (kind == "polling")


def test_it_stays_where_it_was_scrolled_to(tabs: Tabs, shop: Shop) -> None:
    puppet = shop.puppet()
    page = tabs.open(puppet.url, viewport={"width": 360, "height": 150})
    page.evaluate("scrollTo(0, 60)")
    puppet.finish()
    expect_report(page)
    assert wait_until(lambda: page.evaluate("scrollY") == 60)


def test_failed_and_tried_again(tabs: Tabs, shop: Shop) -> None:
    puppet = shop.puppet()
    page = tabs.open(puppet.url)
    puppet.fail("the password is hunter2")
    expect_status(page, "Failed")
    expect(part(page, "error")).to_have_text("Something went wrong.")
    expect(page).to_have_title(re.compile("^Failed"))
    expect(stop_button(page)).to_be_hidden()
    tabs.excuse("the server responded with a status of 500")
    page.reload()
    expect(part(page, "error")).to_have_text("Something went wrong.")
    assert "hunter2" not in page.content()
    puppet.forget_orders()
    retry_button(page).click()
    expect_status(page, "Running")
    assert wait_until(lambda: puppet.runs == 2)
    puppet.finish()
    expect_report(page)
    assert (puppet.views, puppet.runs) == (1, 2)


def test_errors_are_shown_where_they_may_be(tabs: Tabs, open_shop: OpenShop) -> None:
    puppet = open_shop(expose_errors=True).puppet()
    page = tabs.open(puppet.url)
    puppet.fail("no paper")
    expect(part(page, "error")).to_have_text("ValueError: no paper")


def test_stopped_and_started_again(tabs: Tabs, shop: Shop) -> None:
    puppet = shop.puppet()
    page = tabs.open(puppet.url)
    expect_status(page, "Running")
    stop_button(page).click()
    expect_status(page, "Stopped")
    expect(part(page, "failure")).to_be_hidden()
    retry_button(page).click()
    expect_status(page, "Running")
    puppet.finish()
    expect_report(page)
    assert puppet.runs == 2


def test_the_server_is_killed_and_comes_back(tabs: Tabs, open_shop: OpenShop) -> None:
    shop = open_shop()
    puppet = shop.puppet()
    page = tabs.open(puppet.url)
    expect_status(page, "Running")
    tabs.excuse("net::ERR_")
    shop.kill()
    expect(part(page, "note")).to_have_text("Connection lost, trying again…")
    shop.start()
    expect(part(page, "note")).to_have_text("Connected again.")
    expect_status(page, "Interrupted")
    expect(part(page, "error")).to_have_text("The process that ran it went away.")
    retry_button(page).click()
    expect_status(page, "Running")
    puppet.finish()
    expect_report(page)
    assert (puppet.views, puppet.runs) == (1, 2)


def test_many_pages_share_one_job(tabs: Tabs, shop: Shop) -> None:
    puppet = shop.puppet()
    mine = [tabs.open(puppet.url)]
    for _ in range(2):
        mine.append(mine[0].context.new_page())
        mine[-1].goto(puppet.url)
    pages = [*mine, tabs.open(puppet.url)]
    puppet.update(progress=0.5)
    for page in pages:
        expect(page.get_by_role("progressbar")).to_have_js_property("value", 0.5)
    puppet.finish()
    for page in pages:
        page.bring_to_front()
        expect_report(page)
    assert (puppet.views, puppet.runs) == (4, 1)


def test_without_javascript(tabs: Tabs, shop: Shop) -> None:
    puppet = shop.puppet()
    page = tabs.open(puppet.url, java_script_enabled=False)
    puppet.update(progress=0.5, message="half of it")
    expect(part(page, "message")).to_have_text("half of it")
    stop_button(page).click()
    tabs.excuse("the server responded with a status of 409")
    expect_status(page, "Stopped")
    puppet.forget_orders()
    retry_button(page).click()
    expect_status(page, "Running")
    puppet.finish()
    expect_report(page)
    assert (puppet.views, puppet.runs, page.url) == (1, 2, puppet.url)


def test_whatever_a_job_says_is_text(tabs: Tabs, open_shop: OpenShop) -> None:
    shop = open_shop(expose_errors=True)
    puppet = shop.puppet()
    page = tabs.open(f"{shop.url}/login")
    page.goto(f"{puppet.url}?{urlencode(dict.fromkeys(('name', 'key', 'owner'), HOSTILE))}")
    puppet.update(progress=0.5, message=HOSTILE, **{HOSTILE: HOSTILE})
    expect(part(page, "message")).to_have_text(HOSTILE)
    assert_harmless(page)
    puppet.fail(HOSTILE)
    expect(part(page, "error")).to_have_text(f"ValueError: {HOSTILE}")
    assert_harmless(page)
    tabs.excuse("the server responded with a status of 500")
    page.reload()
    expect(part(page, "error")).to_have_text(f"ValueError: {HOSTILE}")
    assert_harmless(page)
    page.goto(f"{shop.url}/jobs/{job_ids(page, shop)[0]}")
    expect(part(page, "error")).to_have_text(f"ValueError: {HOSTILE}")
    assert_harmless(page)


def job_ids(page: Page, shop: Shop) -> list[str]:
    """The youngest first."""
    found = page.request.get(f"{shop.url}/jobs/", headers={"Accept": "application/json"})
    return [job["id"] for job in found.json()["jobs"]]


def test_bars_in_a_page_of_the_app(tabs: Tabs, shop: Shop) -> None:
    first, second = shop.puppet(), shop.puppet()
    page = tabs.open("about:blank")
    page.add_init_script("""window.heard = [];
        for (const type of ["executor:update", "executor:end"])
            document.addEventListener(type, ({ detail }) => heard.push([type, detail.status]));""")
    page.goto(f"{shop.url}/bars?slug={first.slug}&slug={second.slug}")
    bars = page.get_by_role("progressbar")
    for number, puppet, progress in ((0, first, 0.25), (1, second, 0.5), (0, first, 0.75)):
        puppet.update(progress=progress, message=f"at {progress}")
        expect(bars.nth(number)).to_have_js_property("value", progress)
        expect(part(page, "message").nth(number)).to_have_text(f"at {progress}")
    first.finish()
    expect_status(page.locator(".executor-job").nth(0), "Done")
    assert page.evaluate("heard.at(-1)") == ["executor:end", "succeeded"]
    second.fail("no paper")
    expect_status(page.locator(".executor-job").nth(1), "Failed")
    assert page.evaluate("heard.at(-1)") == ["executor:end", "failed"]
    assert ["executor:update", "running"] in page.evaluate("heard")
    assert_accessible(page)


def test_a_form_leads_to_the_page_of_the_job(tabs: Tabs, shop: Shop) -> None:
    puppet = shop.puppet()
    page = tabs.open(f"{shop.url}/order/{puppet.slug}")
    page.get_by_role("button", name="Order").click()
    expect(page).to_have_url(re.compile(r"/jobs/\w+$"))
    expect_status(page, "Running")
    page.reload()
    puppet.finish()
    expect_status(page, "Done")
    assert (puppet.views, puppet.runs) == (0, 1)
    page.get_by_role("link", name="Show the result").click()
    expect(page.get_by_text('"the report"')).to_be_visible()


def start_over_http(page: Page, shop: Shop, puppet: Puppet) -> str:
    """The url of the job's page."""
    started = page.request.post(f"{shop.url}/jobs/run/puppet", data={"slug": puppet.slug})
    assert started.status == 202
    return f"{shop.url}{started.headers['location']}"


@pytest.mark.parametrize("java_script_enabled", [True, False])
def test_retry_leads_to_the_page_of_the_new_job(tabs: Tabs, shop: Shop, java_script_enabled: bool) -> None:
    puppet = shop.puppet()
    page = tabs.open(f"{shop.url}/login", java_script_enabled=java_script_enabled)
    url = start_over_http(page, shop, puppet)
    page.goto(url)
    puppet.fail("no paper")
    expect_status(page, "Failed")
    puppet.forget_orders()
    retry_button(page).click()
    expect_status(page, "Running")
    expect(page).not_to_have_url(url)
    puppet.finish()
    expect_status(page, "Done")
    assert puppet.runs == 2


def assert_focus_is_seen(page: Page, on: Locator) -> None:
    expect(on).to_be_focused()
    style = on.evaluate("element => [element.matches(':focus-visible'), getComputedStyle(element).outlineStyle]")
    assert style == [True, "solid"]


def test_with_the_keyboard_only(tabs: Tabs, shop: Shop) -> None:
    puppet = shop.puppet()
    page = tabs.open(puppet.url)
    expect_status(page, "Running")
    page.keyboard.press("Tab")
    assert_focus_is_seen(page, stop_button(page))
    puppet.update(progress=0.5, message="half of it")
    expect(part(page, "message")).to_have_text("half of it")
    assert_focus_is_seen(page, stop_button(page))
    page.keyboard.press("Enter")
    expect_status(page, "Stopped")
    assert_focus_is_seen(page, retry_button(page))
    page.keyboard.press("Enter")
    puppet.finish()
    expect_report(page)
    assert puppet.runs == 2


@pytest.mark.parametrize(("reduced_motion", "moves"), [("reduce", False), ("no-preference", True)])
def test_motion(tabs: Tabs, shop: Shop, reduced_motion: str, moves: bool) -> None:
    page = tabs.open(shop.puppet().url, reduced_motion=reduced_motion)
    expect_status(page, "Running")
    expect(page.get_by_role("progressbar")).not_to_have_attribute("value", re.compile(""))
    animations = page.evaluate("document.getAnimations().filter(({ playState }) => playState === 'running').length")
    assert bool(animations) == moves


@pytest.mark.parametrize("look", LOOKS)
def test_everybody_can_use_the_pages(tabs: Tabs, shop: Shop, look: dict[str, Any]) -> None:
    puppet = shop.puppet()
    page = tabs.open(puppet.url, **look)
    expect_status(page, "Running")
    assert_accessible(page)
    puppet.update(progress=0.5, message="halfway through a long report on " + "everything" * 20)
    expect(part(page, "message")).to_contain_text("halfway")
    assert_accessible(page)
    puppet.fail("no paper")
    expect_status(page, "Failed")
    assert_accessible(page)
    other = shop.puppet()
    page.goto(start_over_http(page, shop, other))
    expect_status(page, "Running")
    assert_accessible(page)
    other.finish()
    expect_status(page, "Done")
    assert_accessible(page)
