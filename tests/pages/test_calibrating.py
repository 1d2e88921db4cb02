"""The page of a calibration: its steps, then losses, coefficients, and the recipe that names what was found."""

from __future__ import annotations

import json

from playwright.sync_api import expect

from tests.pages.conftest import Open, assert_fit_to_be_seen
from tests.pages.stage import PROGRESS, Stage
from workers.jobs import JobKind

DOCUMENT = {
    "merge_method": "expert_merging",
    "base_model": "base",
    "models": [{"model": "chat"}, {"model": "<b>code</b>"}],
    "calibrate": {"method": "expert_merging", "data": [{"file": "chat.jsonl"}]},
}
POINTS = [{"step": step, "loss": 3 - step / 20} for step in range(40)]
HELD_OUT = [{"step": step, "loss": 3.1 - step / 20, "labels": 2.6 - step / 50} for step in range(0, 41, 4)]
REPORT = {
    "method": "expert_merging",
    "data": [{"model": "chat", "file": "chat.jsonl", "samples": 20}],
    "steps": 40,
    "best_step": None,
    "curves": [{"name": "training", "points": POINTS}, {"name": "check", "points": HELD_OUT}],
    "lines": [{"name": "task arithmetic at 0.3", "loss": 2.0, "labels": 2.25}],
    "tensors": [{"tensor": f"model.layers.{i}.w", "coefficients": [[i / 8], [0.5]]} for i in range(8)],
}


def test_what_is_learned_is_drawn(stage: Stage, open_page: Open) -> None:
    lease = stage.running(DOCUMENT, kind=JobKind.CALIBRATION)
    page = open_page(f"{stage.service.url}/jobs/{lease.job_id}")
    stage.beat(lease, "training", PROGRESS | {"steps_done": 8, "steps_total": 40, "tensors_total": 0})
    expect(page.locator("#steps")).to_have_text("8 of 40")
    expect(page.locator("#read")).to_be_hidden()
    folder = stage.service.data / "artifacts" / lease.job_id
    folder.mkdir(parents=True)
    made = {"calibration.json": json.dumps(REPORT), "recipe.yml": "merge_method: expert_merging\n"}
    for name, text in made.items():
        (folder / name).write_text(text)
    files = [{"path": name, "size": len(text), "sha256": "0" * 64} for name, text in made.items()]
    stage.store.succeed(lease, files=files, warnings=[], progress=PROGRESS | {"fraction": 1.0})
    rows = page.get_by_role("region", name="On data that are held out").get_by_role("row")
    expect(rows.nth(1)).to_contain_text("learned, after step 40")
    expect(rows.nth(1).get_by_role("cell").first).to_have_text("1.8")
    expect(rows.nth(2)).to_contain_text("task arithmetic at 0.3")
    expect(page.get_by_role("img", name="held out from 2.6 to 1.8, task arithmetic at 0.3 2.25")).to_be_visible()
    expect(page.get_by_role("img", name="Heat map: coefficients of <b>code</b>")).to_be_visible()
    expect(page.locator("#found-recipe")).to_have_text(made["recipe.yml"])
    assert_fit_to_be_seen(page)
