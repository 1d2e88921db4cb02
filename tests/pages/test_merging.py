"""New merge: the form and the text are one recipe, which is planned at once and run when it is asked for."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from playwright.sync_api import Page, Route, expect

from app.pages.rendering import STATIC_URL
from tests.pages.conftest import Open, assert_accessible, assert_fit_to_be_seen
from tests.services import Service

TIES = """\
# Chat first.
merge_method: ties
base_model: base
models:
  - model: chat  # the polite one
    parameters: {weight: 0.50, density: [0, 0.5, 1]}
  - model: code
    parameters:
      weight:
        - {filter: mlp, value: 0.25}
        - value: 0.75
dtype: float32
"""
CARD = f"""\
---
base_model: base
---
# A merge

It was made with this:

```yaml
{TIES.replace("dtype: float32", "dtype: float32" + chr(10) + "embed_slerp: true")}
```
"""


def begun(open_page: Open, path: str = "/") -> Page:
    """The page. Chromium's console tells of every 4xx; what is half written comes to one whenever somebody stops."""
    page = open_page(path, expected="status of 422")
    expect(page.locator("#merging")).to_have_attribute("data-ready", "")
    return page


def write(page: Page, text: str) -> None:
    page.locator("#recipe").fill(text)


def text_of(page: Page) -> str:
    return page.locator("#recipe").input_value()


def verdict(page: Page, words: str | re.Pattern[str]) -> None:
    expect(page.locator("#verdict")).to_have_text(words)


def test_it_is_fit_to_be_seen(open_page: Open) -> None:
    page = begun(open_page)
    page.get_by_role("button", name="TIES").click()
    verdict(page, "This recipe can run.")
    assert_fit_to_be_seen(page)


def planned(service: Service, text: str) -> httpx2.Response:
    return service.http.post("/v1/recipes:validate", content=text, headers={"Content-Type": "application/yaml"})


def merges(service: Service) -> list[str]:
    return [each["id"] for each in service.get("/v1/merges")["data"]]


def test_every_example_can_run(open_page: Open, service: Service) -> None:
    page = begun(open_page)
    buttons = page.locator(".examples button")
    assert buttons.count() >= 6
    for i in range(buttons.count()):
        buttons.nth(i).click()
        answer = planned(service, text_of(page))
        assert answer.is_success, answer.text


def test_what_the_form_says_becomes_the_recipe_and_a_job(open_page: Open, service: Service) -> None:
    page = begun(open_page)
    page.get_by_label("Method").select_option("task_arithmetic")
    page.get_by_role("button", name="Remove chat").click()
    page.get_by_label("Base model").fill("chat")
    page.get_by_label("weight").first.fill("0.25")
    page.get_by_label("lambda").fill("1.5")
    page.get_by_label("Number format").select_option("float32")
    verdict(page, "This recipe can run.")
    asked = yaml.safe_load(text_of(page))
    assert asked["models"][0] == {"model": "code", "parameters": {"weight": 0.25}}
    assert (asked["parameters"]["lambda"], asked["dtype"]) == (1.5, "float32")

    page.get_by_text("Labels, priority, deadline").click()
    page.get_by_label("Labels").fill("team:vision\nrun:7")
    page.get_by_label("Priority").fill("5")
    page.get_by_label("Deadline").fill("2")
    page.route("**/jobs/*", lambda route: route.fulfill(body="the job's page", content_type="text/plain"))
    page.get_by_role("button", name="Merge", exact=True).click()
    page.wait_for_url("**/jobs/*")
    job = service.get(f"/v1/merges/{page.url.rpartition('/')[2]}")
    assert job["recipe"] == asked and job["labels"] == {"team": "vision", "run": "7"} and job["priority"] == 5
    assert job["deadline_at"] is not None
    assert service.ended({"urls": job["urls"]})["status"] == "succeeded"


def test_options_that_cannot_be_are_told_before_anything_is_sent(open_page: Open, service: Service) -> None:
    page = begun(open_page)
    before = merges(service)
    write(page, TIES)
    verdict(page, "This recipe can run.")
    page.get_by_text("Labels, priority, deadline").click()
    page.get_by_label("Priority").fill("1000")
    page.get_by_text("Labels, priority, deadline").click()
    page.get_by_role("button", name="Merge", exact=True).click()
    expect(page.get_by_label("Priority")).to_be_focused()
    page.get_by_label("Priority").fill("")
    page.get_by_label("Labels").fill("no label")
    page.get_by_role("button", name="Merge", exact=True).click()
    expect(page.locator("#notices .bad")).to_contain_text("label")
    assert merges(service) == before


def test_a_dry_run_makes_nothing(open_page: Open, service: Service) -> None:
    page = begun(open_page)
    before = merges(service)
    write(page, TIES)
    page.get_by_role("button", name="Dry run").click()
    expect(page.get_by_text("Nothing was made")).to_be_visible()
    write(page, TIES.replace("ties", "teis"))
    page.get_by_role("button", name="Dry run").click()
    expect(page.locator("#problems")).to_contain_text("did you mean ties?")
    assert merges(service) == before


def test_what_the_text_says_is_in_the_form(open_page: Open) -> None:
    page = begun(open_page)
    write(page, TIES)
    expect(page.get_by_label("Method")).to_have_value("ties")
    expect(page.get_by_label("Model 1", exact=True)).to_have_value("chat")
    expect(page.get_by_label("weight").first).to_have_value("0.50")
    expect(page.get_by_label("density").first).to_have_value("[0, 0.5, 1]")
    expect(page.locator(".given code")).to_have_text("mlp: 0.25; else: 0.75")
    expect(page.get_by_label("Number format")).to_have_value("float32")
    write(page, TIES.replace("code", "coder").replace("float32", "float16"))
    expect(page.get_by_label("Model 2", exact=True)).to_have_value("coder")
    expect(page.get_by_label("Number format")).to_have_value("float16")


def test_the_form_leaves_alone_what_it_does_not_change(open_page: Open) -> None:
    page = begun(open_page)
    write(page, TIES)
    page.get_by_label("Base model").fill("other")
    assert text_of(page) == TIES.replace("base_model: base", "base_model: other")
    page.get_by_label("density").first.fill("[0, 1]")
    assert "density: [0, 1]" in text_of(page) and "# the polite one" in text_of(page)
    page.get_by_role("button", name="Move code up").click()
    expect(page.get_by_label("Model 1", exact=True)).to_be_focused()
    changed = yaml.safe_load(text_of(page))
    assert [each["model"] for each in changed["models"]] == ["code", "chat"]
    assert changed["models"][0]["parameters"]["weight"] == [{"filter": "mlp", "value": 0.25}, {"value": 0.75}]
    assert "# Chat first." in text_of(page) and "# the polite one" in text_of(page)
    page.get_by_role("button", name="Remove chat").click()
    assert [each["model"] for each in yaml.safe_load(text_of(page))["models"]] == ["code"]


def test_another_method_lays_parameters_aside_and_brings_them_back(open_page: Open) -> None:
    page = begun(open_page)
    write(page, TIES)
    method = page.get_by_label("Method")
    expect(method).to_have_value("ties")
    method.select_option("linear")
    models = yaml.safe_load(text_of(page))["models"]
    assert models[0]["parameters"] == {"weight": 0.5} and "weight" in models[1]["parameters"]
    verdict(page, "This recipe can run.")
    method.select_option("ties")
    assert yaml.safe_load(text_of(page)) == yaml.safe_load(TIES)
    page.get_by_label("Meaning").select_option("paper")
    paper = yaml.safe_load(text_of(page))
    assert paper["semantics"] == "paper" and "parameters" not in paper["models"][0]
    verdict(page, "This recipe can run.")


WRONG = [
    (TIES.replace("dtype", "dtyp"), "dtyp", "dtyp"),
    (TIES.replace("density", "densty"), "models/0/parameters/densty", "densty"),
    (TIES.replace("model: code", "model: coed"), "models/1/model", "model"),
    (TIES.replace("base_model: base\n", "base_model: base\n  x: y\n"), "line 4", "x: y"),
    (
        f"name: first\n{TIES}---\n{TIES.replace('model: code', 'model: first').replace('ties', 'teis')}",
        "1/",
        "merge_method",
    ),
]
"""Recipes, where in them something is wrong, and what is underlined there."""


def test_what_is_wrong_is_underlined(open_page: Open) -> None:
    page = begun(open_page)
    area = page.locator("#recipe")
    for wrong, pointer, underlined in WRONG:
        write(page, wrong)
        page.locator("#problems a", has_text=pointer).first.click()
        assert underlined in page.locator(".mirror mark").all_text_contents()
        assert page.locator(".mirror").text_content() == wrong
        verdict(page, re.compile("problem"))
        expect(area).to_have_attribute("aria-invalid", "true")
        expect(area).to_be_focused()
        assert page.evaluate("getSelection().toString()") == underlined
    assert_accessible(page)


def test_what_is_wrong_is_told_at_its_field_until_it_is_mended(open_page: Open) -> None:
    page = begun(open_page)
    write(page, TIES.replace("model: code", "model: coed"))
    field = page.get_by_label("Model 2", exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".problem", has_text="model folders")).to_be_visible()
    field.fill("code")
    verdict(page, "This recipe can run.")
    expect(field).not_to_have_attribute("aria-invalid", "true")
    expect(page.locator(".mirror mark")).to_have_count(0)


def paste(page: Page, text: str) -> None:
    page.evaluate(
        """text => {
            const clipboardData = new DataTransfer();
            clipboardData.setData("text/plain", text);
            const options = { clipboardData, bubbles: true, cancelable: true };
            document.getElementById("recipe").dispatchEvent(new ClipboardEvent("paste", options));
        }""",
        text,
    )


def drop(page: Page, text: str) -> None:
    page.evaluate(
        """text => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([text], "README.md"));
            const options = { dataTransfer, bubbles: true, cancelable: true };
            document.getElementById("recipe").dispatchEvent(new DragEvent("drop", options));
        }""",
        text,
    )


def test_a_recipe_comes_out_of_a_model_card(open_page: Open, tmp_path: Path) -> None:
    page = begun(open_page)
    (tmp_path / "README.md").write_text(CARD)
    ways: list[Callable[[], None]] = [
        lambda: paste(page, CARD),
        lambda: drop(page, CARD),
        lambda: page.locator("#file").set_input_files(tmp_path / "README.md"),
    ]
    for bring in ways:
        write(page, "")
        verdict(page, re.compile("Nothing yet"))
        bring()
        verdict(page, "This recipe can run.")
        assert yaml.safe_load(text_of(page)) == yaml.safe_load(TIES)
        expect(page.locator("#notices .warn").last).to_contain_text("embed_slerp")


def test_a_recipe_is_pasted_as_it_is_and_what_was_there_can_be_had_back(open_page: Open) -> None:
    page = begun(open_page)
    paste(page, TIES)
    verdict(page, "This recipe can run.")
    assert text_of(page) == TIES
    page.get_by_role("button", name="SLERP").click()
    assert "slerp" in text_of(page)
    page.get_by_role("button", name="Bring mine back").click()
    assert text_of(page) == TIES
    drop(page, "# A card\n\n```\nwithout any recipe\n```\n")
    expect(page.locator("#notices .bad")).to_be_visible()
    assert text_of(page) == TIES


def test_a_draft_is_kept(open_page: Open) -> None:
    page = begun(open_page)
    write(page, TIES)
    verdict(page, "This recipe can run.")
    page.reload()
    verdict(page, "This recipe can run.")
    assert text_of(page) == TIES
    write(page, "")
    verdict(page, re.compile("Nothing yet"))
    page.reload()
    expect(page.locator("#merging")).to_have_attribute("data-ready", "")
    assert text_of(page) == ""


def test_a_late_answer_to_an_old_question_counts_for_nothing(open_page: Open) -> None:
    page = begun(open_page)
    held: list[Route] = []

    def hold_first(route: Route) -> None:
        held.append(route) if not held else route.continue_()

    page.route("**/v1/recipes:validate", hold_first)
    with page.expect_request("**/v1/recipes:validate"):
        write(page, TIES.replace("dtype", "dtyp"))
    with page.expect_request("**/v1/recipes:validate") as second:
        write(page, TIES)
    assert second.value.post_data == TIES
    verdict(page, "This recipe can run.")
    held[0].fulfill(status=500, json={"code": "internal-error", "detail": "late"})
    page.wait_for_timeout(200)
    verdict(page, "This recipe can run.")


def test_typing_asks_once(open_page: Open) -> None:
    page = begun(open_page)
    asked: list[str | None] = []
    page.on("request", lambda request: asked.append(request.post_data) if "recipes:" in request.url else None)
    # As fast as nobody types: by keys, a busy machine makes a pause now and then that is long enough for an answer.
    page.locator("#recipe").evaluate(
        """(area, text) => {
            for (const each of text) {
                area.value += each;
                area.dispatchEvent(new InputEvent("input", { bubbles: true }));
            }
        }""",
        "merge_method: linear",
    )
    verdict(page, re.compile("problem"))
    assert asked == ["merge_method: linear"]


def test_a_method_can_be_brought_along(open_page: Open) -> None:
    page = begun(open_page, "/?method=ties&semantics=paper")
    verdict(page, "This recipe can run.")
    asked = yaml.safe_load(text_of(page))
    assert (asked["merge_method"], asked["semantics"]) == ("ties", "paper")
    assert page.url.endswith("/")


@pytest.mark.slow
def test_every_method_can_be_begun_with(open_page: Open, service: Service) -> None:
    """From nothing, the form makes what only lacks what nobody can guess: files of numbers, and models."""
    page = begun(open_page)
    names = [each["name"] for each in service.get("/v1/methods")["data"]]
    for name in dict.fromkeys(names):
        write(page, "")
        expect(page.get_by_label("Method")).to_have_value("")
        page.get_by_label("Method").select_option(name)
        answer = planned(service, text_of(page))
        if not answer.is_success:
            assert re.search("statistics|covariance|importance|coefficients|activations", answer.text), (
                name,
                answer.text,
            )


def test_a_job_s_recipe_can_be_had_again(open_page: Open, service: Service) -> None:
    job = service.post(yaml.safe_load(TIES))
    page = begun(open_page, f"/?from={job['id']}")
    verdict(page, "This recipe can run.")
    assert yaml.safe_load(text_of(page)) == job["recipe"]


def test_where_there_are_no_models_it_says_how_to_get_some(open_page: Open) -> None:
    page = open_page("/methods")
    empty = {"data": [], "has_more": False, "next": None, "incomplete": False}
    page.route("**/v1/models*", lambda route: route.fulfill(json=empty))
    page.goto(page.url.replace("/methods", "/"))
    expect(page.get_by_text("There are no models here yet")).to_be_visible()
    assert_accessible(page)
    page.unroute("**/v1/models*")
    page.get_by_role("button", name="Look again").click()
    expect(page.get_by_role("button", name="TIES")).to_be_visible()


TEXTS = {
    "usual": TIES,
    "flow": '{"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}',
    "flush": "merge_method: linear\nmodels:\n- model: a\n  # of b\n- model: b\n  parameters:\n    weight: 0.5 # half\n",
    "wide": "merge_method: linear\nmodels:\n    - model: a\n      parameters:\n          weight: 1\nparameters:\n",
    "quoted": "\"merge_method\": 'linear'\nmodels: [{model: 'no'}, {model: \"b: c\"}]\n\n\n# the end\n",
    "folded": "merge_method: linear\nmodels:\n  - model: a\nchat_template: |\n  {{ a }}\n  {{ b }}\nname: >-\n  a\n",
    "stages": f"{TIES}name: first\n---\nmerge_method: linear\nmodels:\n  - model: first\n  - model: b\n",
    "windows": "merge_method: linear\r\nmodels:\r\n  - model: a\r\n",
}
CHANGES: list[tuple[list[Any], str]] = [
    (["base_model"], "no"),
    (["base_model"], "org/name@main"),
    (["base_model"], "a: b # c"),
    (["models", 0, "model"], "12"),
    (["models", 0, "parameters", "weight"], "1e-7"),
    (["models", 0, "parameters", "weight"], "[0, 0.50, 1]"),
    (["models", 0, "parameters", "density"], ".5"),
    (["parameters", "lambda"], "2"),
    (["parameters", "normalize"], "false"),
    (["tokenizer", "source"], "union"),
    (["seed"], "7"),
]


def test_a_change_changes_one_thing(open_page: Open) -> None:
    """Whatever way a recipe is written: read again by what the service reads with, it says the new thing there, and
    all else as before; taken back, all is as it was.
    """
    page = open_page("/methods")
    changed = page.evaluate(
        """async ([url, texts, changes]) => {
            const { Recipe, valueOf } = await import(url);
            return texts.map((text) => changes.map(([path, written]) => {
                const recipe = new Recipe(text);
                const after = recipe.with(recipe.output, path, valueOf(written));
                return [after, new Recipe(after).with(recipe.output, path, undefined)];
            }));
        }""",
        [f"{STATIC_URL}/recipe.js", list(TEXTS.values()), CHANGES],
    )
    for (title, text), of_text in zip(TEXTS.items(), changed, strict=True):
        for (path, written), (after, back) in zip(CHANGES, of_text, strict=True):
            case = (title, path, written, after)
            expected, found = list(yaml.safe_load_all(text)), list(yaml.safe_load_all(after))
            holder = expected[-1]
            for part, following in itertools.pairwise(path):
                if isinstance(holder, dict) and holder.get(part) is None:
                    holder[part] = [] if isinstance(following, int) else {}
                holder = holder[part]
            holder[path[-1]] = _as_typed(written)
            assert found == expected, case
            del holder[path[-1]]
            assert _without_empty(list(yaml.safe_load_all(back))) == _without_empty(expected), case
            comments = re.findall("#.*", text)
            assert all(comment.strip() in after for comment in comments), case


def _as_typed(written: str) -> Any:
    try:
        return json.loads(written if not written.startswith(".") else f"0{written}")
    except ValueError:
        return written


def _without_empty(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_empty(value) for key, value in data.items() if value not in ({}, None)}
    return [_without_empty(each) for each in data] if isinstance(data, list) else data
