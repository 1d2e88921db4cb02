"""The page of a search: trials as they come, the best so far, the front of several metrics, the recipe found."""

from __future__ import annotations

import time

from playwright.sync_api import expect

from tests.pages.conftest import Open, assert_fit_to_be_seen
from tests.pages.stage import PROGRESS, Stage
from workers.jobs import JobKind, Lease
from workers.tables import LOCAL_OWNER, Trial

SEARCH = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "chat"}, {"model": "<b>code</b>"}],
    "search": {
        "method": "random",
        "trials": 6,
        "space": {"density": {"low": 0, "high": 1}},
        "evaluator": {"http": {"url": "https://evaluate.example.org"}},
        "metrics": {"accuracy": "maximize", "toxicity": "minimize"},
    },
}
RECIPE = "merge_method: ties\nparameters: {density: 0.3}\n"


def tried(stage: Stage, lease: Lease, number: int, state: str, detail: str | None = None, **metrics: float) -> None:
    """A trial as a worker writes it down."""
    outcome = None if state == "open" else {"state": state, "metrics": metrics, "steps": {}, "detail": detail}
    with stage.store.session() as session:
        row = Trial(job_id=lease.job_id, number=number, owner=LOCAL_OWNER, digest=f"{lease.job_id}{number}")
        row.state, row.tried, row.outcome, row.seconds = state, {"density": number / 10}, outcome, 1.5
        row.created_at = time.time()
        session.add(row)


def told(stage: Stage, lease: Lease, done: int) -> None:
    stage.beat(lease, "searching", PROGRESS | {"trials_done": done, "trials_total": 6, "tensors_total": 0})


def test_trials_are_seen_as_they_come(stage: Stage, open_page: Open) -> None:
    lease = stage.running(SEARCH, kind=JobKind.SEARCH)
    page = open_page(f"{stage.service.url}/jobs/{lease.job_id}")
    expect(page.get_by_text("Trials are shown here as they come.")).to_be_visible()
    tried(stage, lease, 0, "done", accuracy=0.5, toxicity=0.2)
    tried(stage, lease, 1, "done", accuracy=0.4, toxicity=0.3)
    told(stage, lease, 2)
    best = page.get_by_role("region", name="The best so far")
    expect(best).to_contain_text("trial 0")
    expect(page.locator("#tried")).to_have_text("2 of 6")
    expect(page.locator("#tensors")).to_be_hidden()

    tried(stage, lease, 2, "done", accuracy=0.8, toxicity=0.6)
    tried(stage, lease, 3, "refused", "the weights <i>sum</i> to zero")
    tried(stage, lease, 4, "open")
    told(stage, lease, 4)
    expect(best).to_contain_text("trial 2")
    rows = page.get_by_role("region", name="Trials", exact=True).get_by_role("row")
    expect(rows).to_have_count(6)
    assert [row.split()[0] for row in rows.all_inner_texts()[1:]] == ["2", "0", "1", "3", "4"], "the best first"
    expect(rows.nth(1)).to_contain_text("best")
    expect(rows.nth(2)).to_contain_text("front")
    expect(rows.nth(4)).to_contain_text("the weights <i>sum</i> to zero")
    expect(page.get_by_role("img", name="The best accuracy so far, over 3 trials: from 0.5 to 0.8")).to_be_visible()
    expect(
        page.get_by_role("img", name="accuracy against toxicity of 3 trials, 2 of which no other beats")
    ).to_be_visible()
    assert_fit_to_be_seen(page)
    stage.fail(lease, "evaluation-failed", "it answered nothing")
    expect(page.get_by_role("alert")).to_contain_text("it answered nothing")
    expect(rows).to_have_count(6)


def test_the_recipe_that_was_found_is_merged_with(stage: Stage, open_page: Open) -> None:
    soup = {"merge_method": "linear", "models": [{"model": "chat"}, {"model": "<b>code</b>"}]}
    search = {"method": "greedy_soup", "evaluator": {"perplexity": {"file": "x.txt"}}}
    lease = stage.running(soup | {"search": search}, kind=JobKind.SEARCH)
    tried(stage, lease, 0, "done", perplexity=90_000.0)
    tried(stage, lease, 1, "done", perplexity=9.0)
    with stage.store.session() as session:
        row = session.get(Trial, (lease.job_id, 1))
        assert row is not None
        row.tried = {"models": [0, 1]}
    folder = stage.service.data / "artifacts" / lease.job_id
    folder.mkdir(parents=True)
    (folder / "recipe.yml").write_text(RECIPE)
    file = {"path": "recipe.yml", "size": len(RECIPE), "sha256": "0" * 64}
    stage.store.succeed(lease, files=[file], warnings=[], progress=PROGRESS | {"fraction": 1.0})
    page = open_page(f"{stage.service.url}/jobs/{lease.job_id}", expected="422")
    expect(page.get_by_role("region", name="The best")).to_contain_text("chat + <b>code</b>")
    expect(page.locator("#found-recipe")).to_have_text(RECIPE)
    page.get_by_role("link", name="Merge with it").click()
    expect(page.get_by_role("textbox", name="Recipe")).to_have_value(RECIPE)


def test_trials_are_ones_own(stage: Stage) -> None:
    theirs = stage.queued(SEARCH, kind=JobKind.SEARCH, owner="somebody")
    assert stage.service.http.get(f"/jobs/{theirs}/trials").status_code == 404
