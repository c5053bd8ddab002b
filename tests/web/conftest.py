"""A browser, and servers for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # where it is not installed, other tests run all the same
    from browsers import Shop, Tabs
    from playwright.sync_api import Browser

pytest.register_assert_rewrite("browsers")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What is deselected anyway is not imported: the libraries it needs may not be there."""
    deselected = "not web" in config.option.markexpr and collection_path.name.startswith("test_browser_")
    return deselected or None


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from browsers import launched

    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def shop_of_module(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    from browsers import Shop

    shop = Shop(tmp_path_factory.mktemp("shop"))
    shop.start()
    yield shop
    shop.close()


@pytest.fixture
def shop(shop_of_module: Shop) -> Iterator[Shop]:
    """A server, with jobs of this test only."""
    yield shop_of_module
    shop_of_module.finish_jobs()


@pytest.fixture
def open_shop(tmp_path: Path) -> Iterator[Callable[..., Shop]]:
    """``open_shop(events_max=0)``: a server of its own for a test, with this configuration."""
    from browsers import Shop

    with ExitStack() as opened:

        def open_shop(**config: object) -> Shop:
            shop = Shop(tmp_path, **config)
            shop.start()
            opened.callback(shop.close)
            return shop

        yield open_shop


@pytest.fixture
def tabs(browser: Browser, open_shop: object) -> Iterator[Tabs]:
    """Pages in the browser, where nothing may go wrong. They are closed before the servers are."""
    from browsers import Tabs

    tabs = Tabs(browser)
    yield tabs
    tabs.close()
