"""Methods: all of them, with all that `/v1/methods` tells; searched with and without JavaScript."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import expect

from app.pages.catalogue import NEEDS
from tests.pages.conftest import Open, assert_fit_to_be_seen
from tests.services import Service


def test_it_is_fit_to_be_seen(open_page: Open) -> None:
    page = open_page("/methods#ties-mergekit")
    expect(page.locator("#ties-mergekit")).to_be_in_viewport()
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert_fit_to_be_seen(page)


def test_every_method_is_told_whole(open_page: Open, service: Service) -> None:
    page = open_page("/methods")
    cards = page.locator(".method")
    methods = service.get("/v1/methods")["data"]
    assert cards.count() == len(methods)
    texts = cards.evaluate_all("cards => cards.map(card => [card.id, card.textContent])")
    for method, (anchor, text) in zip(methods, texts, strict=True):
        assert anchor == f"{method['name']}-{method['semantics']}"
        words = " ".join(text.split())
        for told in (method["title"], method["summary"], method["equation"], *method["parameters"]["properties"]):
            assert " ".join(told.split()) in words, (anchor, told)
        for about in method["parameters"]["properties"].values():
            assert about["description"] in words, anchor
    assert not any(">>>" in text for _, text in texts)
    papers = page.locator(".method dd a").evaluate_all("links => links.map(link => link.href)")
    assert papers == [method["paper"] for method in methods]


def test_every_method_has_an_equation(service: Service) -> None:
    for method in service.get("/v1/methods")["data"]:
        assert "=" in method["equation"] and ">>>" not in method["equation"], method["name"]


def test_ranges_and_usual_values_are_words(open_page: Open) -> None:
    page = open_page("/methods")
    card = page.locator("#ties-paper")
    expect(card).to_contain_text("number from 0 to 1; usually 0.2")
    expect(card).to_contain_text("one of mean, sum, max; usually mean")
    expect(page.locator("#darex-mergekit")).to_contain_text("number above 0 or analytic, for each model; needed")
    expect(page.locator("#pcb-mergekit")).to_contain_text("number from 0 below 0.5; none unless given")


@pytest.mark.parametrize("has_script", [True, False])
def test_methods_are_found(open_page: Open, has_script: bool) -> None:
    page = open_page("/methods", java_script_enabled=has_script)
    shown = page.locator(".method:visible")
    everything = shown.count()
    page.get_by_label("Search").fill("slerp")
    if not has_script:
        page.get_by_role("button", name="Search").click()
    expect(page.get_by_role("status").first).to_have_text(re.compile(rf"\d of {everything} methods"))
    found = shown.evaluate_all("cards => cards.map(card => card.id)") if has_script else _ids(page)
    assert {"slerp-mergekit", "nuslerp-mergekit"} <= set(found) and "ties-mergekit" not in found
    page.get_by_label("Needs").select_option("no-base")
    if not has_script:
        page.get_by_role("button", name="Search").click()
    expect(page.locator("#slerp-mergekit")).to_be_hidden()
    expect(page.locator("#nuslerp-mergekit")).to_be_visible()
    page.reload()
    expect(page.locator("#slerp-mergekit")).to_be_hidden()
    expect(page.get_by_label("Search")).to_have_value("slerp")


def _ids(page: Any) -> list[str]:
    return [str(each.get_attribute("id")) for each in page.locator(".method:visible").all()]


def test_each_need_is_somebody_s(service: Service) -> None:
    pages = {needs: service.http.get("/methods", params={"needs": needs}).text for needs in NEEDS}
    counts = {needs: int(re.findall(r"(\d+) of \d+ methods", text)[0]) for needs, text in pages.items()}
    everything = len(service.get("/v1/methods")["data"])
    assert all(0 < count < everything for count in counts.values())
    assert counts["base"] + counts["no-base"] == counts["one"] + counts["many"] == everything


def test_a_method_is_used(open_page: Open) -> None:
    page = open_page("/methods", expected="status of 422")
    page.get_by_role("link", name="Use ties, as the paper has it").click()
    expect(page.get_by_label("Method")).to_have_value("ties")
    expect(page.get_by_label("Meaning")).to_have_value("paper")
