"""Real pages in a real browser. Every test fails if the browser's console showed an error meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, ViewportSize, expect, sync_playwright

from tests.browsers import FLAGS, installed
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint
from tests.pages.stage import Stage, empty_stage
from tests.services import Service, running_service
from workers.jobs import JobStore
from workers.keys import KeyRing
from workers.settings import Settings

DESK: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 390, "height": 844}
SERIOUS = ("serious", "critical")
expect.set_options(timeout=30_000)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a browser has a target of its own; the rest is done by one process, with one service."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("pages"))
            if "browser" in item.fixturenames:  # type: ignore[attr-defined]
                item.add_marker(pytest.mark.pages)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with models `base`, `chat` and `code`."""
    root = tmp_path_factory.mktemp("pages")
    models = root / "models"
    for seed, name in enumerate(("base", "chat", "code")):
        write_checkpoint(models / name, mixed_tensors(seed), shards=2, config=CONFIG)
    with running_service(root / "data", models) as found:
        yield found


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A service without workers: tests say how its jobs go on."""
    root = tmp_path_factory.mktemp("stage")
    (root / "models").mkdir()
    with empty_stage(root / "data", root / "models") as found:
        yield found


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, KeyRing]]:
    """A service that asks for keys, and its keys."""
    root = tmp_path_factory.mktemp("guarded")
    (root / "models").mkdir()
    with running_service(root / "data", root / "models", WEIGHTSMITH_AUTH="keys") as service:
        store = JobStore(Settings(data=root / "data"))
        yield service, KeyRing(store)
        store.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Only as long as a module lasts: while Playwright is open, nothing else in this thread can run an event loop."""
    chromium = installed()
    assert chromium, "there is no Chromium here: python -m tests.browsers"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield found
        found.close()


Open = Callable[..., Page]
Theme = Literal["light", "dark"]


@pytest.fixture
def open_page(browser: Browser, service: Service) -> Iterator[Open]:
    """Opens a page of the service in a `theme`, light or dark. The console must stay free of errors but for those
    that match `expected`.
    """
    contexts: list[BrowserContext] = []
    errors: list[str] = []

    def heard(message: ConsoleMessage, expected: str) -> None:
        is_expected = expected and re.search(expected, message.text)
        if message.type in ("error", "warning") and not is_expected:
            errors.append(f"{message.type}: {message.text} ({message.location})")

    def open_(path: str = "/", *, theme: Theme = "light", expected: str = "", **options: Any) -> Page:
        context = browser.new_context(color_scheme=theme, viewport=DESK, accept_downloads=True, **options)
        contexts.append(context)
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.on("console", lambda message: heard(message, expected))
        page.on("pageerror", lambda error: errors.append(f"uncaught: {error}"))
        page.goto(path if ":" in path else service.url + path)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not errors, errors


def assert_fit_to_be_seen(page: Page) -> None:
    """In both themes and on a phone axe-core finds no serious fault, and the page is no wider than its window."""
    for theme, size in (("dark", DESK), ("light", PHONE), ("light", DESK)):
        page.emulate_media(color_scheme=theme)
        page.set_viewport_size(size)
        assert_accessible(page)


def assert_accessible(page: Page) -> None:
    """axe-core finds no serious fault, and the page is no wider than its window, as it is seen now."""
    found = [each for each in Axe().run(page).response["violations"] if each["impact"] in SERIOUS]
    assert not found, [(each["id"], each["help"], [node["html"] for node in each["nodes"]][:5]) for each in found]
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"the page is {wide} pixels wider than its window"
