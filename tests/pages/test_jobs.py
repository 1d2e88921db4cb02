"""Jobs: the list of all kinds, and how it stays as they are."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from app.pages.words import job_name
from app.words import shown_seconds
from tests.pages.conftest import Open, assert_fit_to_be_seen
from tests.pages.stage import LINEAR, PROGRESS, Stage
from workers.jobs import JobKind


def row(page: Page, job_id: str) -> Any:
    return page.locator(f"#{job_id}")


def test_without_jobs_it_leads_to_where_one_is_made(stage: Stage, open_page: Open) -> None:
    stage.clear()
    page = open_page(f"{stage.service.url}/jobs")
    expect(page.get_by_role("link", name="Make the first merge")).to_be_visible()
    assert_fit_to_be_seen(page)


def test_all_kinds_are_listed_newest_first_and_told_in_every_look(stage: Stage, open_page: Open) -> None:
    first = stage.queued(labels={"team": "vision"})
    second = stage.queued({"operation": "extract", "model": "blur"}, kind=JobKind.PATCH)
    failed = stage.running()
    stage.fail(failed, "insufficient-storage", "the disk is full")
    running = stage.running()
    stage.beat(running, "merging")

    page = open_page(f"{stage.service.url}/jobs")

    assert page.locator("#jobs tbody tr").evaluate_all("rows => rows.slice(0, 4).map(row => row.id)") == [
        *(running.job_id, failed.job_id, second, first)
    ]
    expect(row(page, running.job_id).get_by_role("progressbar")).to_have_attribute("value", "0.25")
    expect(row(page, failed.job_id)).to_contain_text("Not enough free disk space")
    expect(row(page, second)).to_contain_text("extract: blur")
    expect(row(page, first)).to_contain_text("just now")
    assert_fit_to_be_seen(page)


def test_filters_and_pages(stage: Stage, open_page: Open) -> None:
    made = [stage.queued(labels={"many": "pages"}) for _ in range(27)]
    other = stage.queued({"models": ["a", "b"]}, kind=JobKind.ALIGNMENT, labels={"many": "pages"})
    page = open_page(f"{stage.service.url}/jobs")
    row(page, other).get_by_role("link", name="many:pages").click()
    page.get_by_label("Kind").select_option("merge")
    expect(page).to_have_url(re.compile("kind=merge&status=&label=many%3Apages"))
    expect(page.locator("#jobs tbody tr")).to_have_count(25)
    page.get_by_role("link", name="Older").click()
    expect(page.locator("#jobs tbody tr")).to_have_count(2)
    expect(row(page, made[0])).to_be_visible()
    page.get_by_role("link", name="Newest").click()
    expect(row(page, made[-1])).to_be_visible()
    page.get_by_label("Label").fill("nonsense")
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_text("A label is written name:value")).to_be_visible()
    page.get_by_label("Label").fill("no:such")
    page.get_by_role("button", name="Filter").click()
    page.get_by_role("link", name="Show all jobs").click()
    expect(row(page, other)).to_be_visible()


def test_the_list_stays_as_the_jobs_are_and_says_when_it_cannot(stage: Stage, open_page: Open) -> None:
    lease = stage.running()
    page = open_page("about:blank", expected="ERR_FAILED")
    page.clock.install()
    page.goto(f"{stage.service.url}/jobs")
    stage.beat(lease, "merging", PROGRESS | {"fraction": 0.5})
    page.clock.run_for(2000)
    expect(row(page, lease.job_id).get_by_role("progressbar")).to_have_attribute("value", "0.5")

    page.route("**/jobs", lambda route: route.abort())
    page.clock.run_for(2000)
    expect(page.get_by_text("The service does not answer")).to_be_visible()
    stage.succeed(lease)
    page.unroute("**/jobs")
    page.clock.run_for(4000)
    expect(row(page, lease.job_id)).to_contain_text("succeeded")
    expect(page.get_by_text("The service does not answer")).to_be_hidden()


def test_nobody_asks_while_nobody_looks_or_nothing_is_active(stage: Stage, open_page: Open) -> None:
    stage.queued()
    page = open_page("about:blank")
    page.clock.install()
    page.goto(f"{stage.service.url}/jobs")
    expect(page.locator("#jobs[data-active]")).to_have_count(1)
    with page.expect_response("**/jobs"):  # something is active
        page.clock.run_for(5000)
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {get: () => true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.wait_for_timeout(500)  # for what was asked just before
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    assert not asked

    page.goto(f"{stage.service.url}/jobs?status=succeeded", wait_until="networkidle")
    asked.clear()
    page.clock.run_for(60_000)
    assert not asked, "what has ended changes no more"


@pytest.mark.parametrize(
    ("kind", "document", "name"),
    [
        (JobKind.MERGE, LINEAR, "linear: chat, code"),
        (JobKind.MERGE, LINEAR | {"base_model": "org/base"}, "linear: chat, code on base"),
        (
            JobKind.MERGE,
            {"merge_method": "ties", "models": [{"model": f"m/{i}"} for i in range(5)]},
            "ties: 0, 1, 2 and 2 more",
        ),
        (
            JobKind.MERGE,
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a+x/lora", "layer_range": [0, 2]}]}]},
            "passthrough: a+lora",
        ),
        (
            JobKind.MERGE,
            [{"name": "one", **LINEAR}, {"merge_method": "slerp", "models": [{"model": "one"}]}],
            "slerp: one",
        ),
        (JobKind.ALIGNMENT, {"models": ["a", "b"], "alignment": {"to": "first"}}, "alignment: a, b"),
        (JobKind.PATCH, {"operation": "apply", "model": "m", "patches": [{"patch": "blur"}]}, "apply: m, blur"),
        (JobKind.VERIFICATION, {"job": "mrg_1"}, "verify: mrg_1"),
        (JobKind.VIEW, {}, "view"),
    ],
)
def test_a_job_is_called_by_what_it_makes_of_what(kind: JobKind, document: Any, name: str) -> None:
    assert job_name(kind, document) == name


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(None, "–"), (0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (7500, "2 h 05 min"), (180_000, "2 d 2 h")],
)
def test_durations_read_well(seconds: float | None, told: str) -> None:
    assert shown_seconds(seconds) == told
