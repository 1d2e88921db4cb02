"""What all pages have: the frame, the themes, the vendored files, signing in and out, and what browsers are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import expect

from app.sessions import COOKIE
from tests import vendored
from tests.pages.conftest import Open, assert_fit_to_be_seen
from tests.services import Service
from workers.keys import KeyRing, Scope


@pytest.mark.parametrize("package", vendored.listed())
def test_vendored_files_are_what_the_registry_gave(package: str) -> None:
    assert vendored.found(package) == vendored.listed()[package]["files"]


def test_nothing_else_is_vendored() -> None:
    there = {path.name for path in vendored.VENDOR.iterdir()}
    assert there == {*vendored.listed(), vendored.LIST.name}


def test_signing_in_is_fit_to_be_seen(open_page: Open) -> None:
    page = open_page("/sign-in")
    expect(page.get_by_role("main")).to_be_visible()
    assert_fit_to_be_seen(page)


def test_the_api_can_be_read_and_tried(open_page: Open) -> None:
    page = open_page("/docs")
    expect(page.get_by_role("link", name="/v1/merges", exact=True).first).to_be_visible()


def test_the_theme_can_be_chosen_and_is_kept(open_page: Open) -> None:
    page = open_page("/methods", theme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    button = page.get_by_role("button", name="Theme")
    button.click()
    assert page.evaluate(ground) == light
    button.click()
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark


def test_the_keyboard_skips_to_the_content(open_page: Open) -> None:
    page = open_page("/methods")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()


def test_what_a_page_needs_is_kept_for_ever_and_comes_from_here(service: Service) -> None:
    page = service.http.get("/methods")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "http" not in page.text.partition("<main")[0].replace("http-equiv", "")
    style = page.text.partition('rel="stylesheet" href="')[2].partition('"')[0]
    assert "immutable" in service.http.get(style).headers["cache-control"]


def test_what_is_no_page_cannot_run_as_one(service: Service) -> None:
    answer = service.http.get("/v1/methods")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


Guarded = tuple[Service, KeyRing]


def secret_of(ring: KeyRing) -> str:
    return ring.create("ann", [Scope.MERGES_READ, Scope.MERGES_WRITE])[1]


def test_signing_in_and_out(open_page: Open, guarded: Guarded) -> None:
    service, ring = guarded
    secret = secret_of(ring)
    page = open_page(f"{service.url}/?a=b")
    expect(page).to_have_url(f"{service.url}/sign-in?next=/%3Fa%3Db")
    page.get_by_label("API key").fill(secret)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    assert page.evaluate("fetch('/v1/quota').then(answer => answer.status)") == 200
    assert secret not in str(page.context.cookies()) and not page.evaluate("document.cookie")
    page.goto(f"{service.url}/methods")
    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_url(f"{service.url}/sign-in")


@contextmanager
def signed_in(url: str, secret: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=60, trust_env=False) as http:
        answer = http.post("/sign-in", data={"key": secret, "next": "/methods"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/methods")
        yield http


def test_a_session_ends_with_its_key(guarded: Guarded) -> None:
    service, ring = guarded
    key, secret = ring.create("bob", [Scope.MERGES_READ])
    with signed_in(service.url, secret) as http:
        assert http.get("/v1/quota").status_code == 200
        ring.revoke(key.id)
        assert http.get("/v1/quota").status_code == 401


def test_other_sites_cannot_use_a_session(guarded: Guarded) -> None:
    service, ring = guarded
    secret = secret_of(ring)
    with signed_in(service.url, secret) as http:
        asked: dict[str, Any] = {"json": {"merge_method": "linear"}, "headers": {"Origin": "https://evil.example"}}
        assert http.post("/v1/merges", **asked).status_code == 403
        assert http.post("/sign-out", headers=asked["headers"]).status_code == 403


@pytest.mark.parametrize("cookie", ["", "x", "gAAAAA", "é".encode().decode("latin-1")])
def test_a_cookie_that_nobody_gave_is_no_key(guarded: Guarded, cookie: str) -> None:
    headers = {"Cookie": f"{COOKIE}={cookie}".encode("latin-1")}
    assert guarded[0].http.get("/v1/quota", headers=headers).status_code == 401


def test_a_bad_key_is_told_and_nobody_is_sent_elsewhere(guarded: Guarded) -> None:
    service, ring = guarded
    secret = secret_of(ring)
    refused = service.http.post("/sign-in", data={"key": "wsk_nonsense", "next": "/methods"})
    assert refused.status_code == 401 and "not good" in refused.text and COOKIE not in refused.cookies
    for elsewhere in ("https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)"):
        answer = service.http.post("/sign-in", data={"key": secret, "next": elsewhere})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert httpx2.URL(answer.headers["location"]).is_relative_url
    service.http.cookies.clear()


def test_every_file_is_packed(tmp_path: Path) -> None:
    """What the package data say takes every template and file, vendored modules too."""
    import tomllib

    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["app"]
    packed = {path for pattern in patterns for path in (root / "app").glob(f"{pattern}/*") if path.is_file()}
    there = {
        path for name in ("templates", "static") for path in (root / "app/pages" / name).rglob("*") if path.is_file()
    }
    assert there == packed
