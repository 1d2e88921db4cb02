"""`make screenshots`: the pictures of the page in `docs/`, of real merges."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

from app.client import Client
from benchmarks.demo import LARGER, learn, service
from benchmarks.synthetic import Shape, build
from tests.browsers import FLAGS, installed

DOCS = Path(__file__).parents[1] / "docs"
MODELS = Shape(12, 768, 2048, 256, 16000)
SIZE = {"width": 1280, "height": 860}
RECIPE: dict[str, Any] = {**LARGER, "merge_method": "ties"}


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="weightsmith-screenshots-") as scratch:
        models, data = Path(scratch) / "models", Path(scratch) / "data"
        build(models / "llama", MODELS, 3)
        with service(data, models) as url, sync_playwright() as playwright, Client(url) as client:
            browser = playwright.chromium.launch(executable_path=installed(), args=list(FLAGS))
            page = browser.new_page(viewport=SIZE)
            _new_merge(page, url)
            for number in range(2):
                client.merges.submit({**RECIPE, "seed": number}, labels={"team": "docs"})
            job = client.merges.submit(RECIPE, labels={"team": "docs"}, priority=9)
            page.goto(f"{url}/jobs/{job.id}")
            client.merges.wait(job)
            expect(page.get_by_text("succeeded").first).to_be_visible()
            _keep(page, "job")
            models_of = {"base_model": "llama/base", "models": [f"llama/m{i}" for i in range(3)]}
            analysis = client.analyses.wait(client.analyses.submit(models_of))
            page.goto(f"{url}/compare/{analysis.id}")
            page.wait_for_load_state("networkidle")
            _keep(page, "compare")
            learn(url, models, Path(scratch) / "downloads")
            calibration = next(client.calibrations.list(page=1))
            page.goto(f"{url}/jobs/{calibration.id}")
            page.set_viewport_size({**SIZE, "height": 990})
            expect(page.get_by_role("img", name="task arithmetic").first).to_be_visible()
            _keep(page, "calibration")
            browser.close()
    return 0


def _new_merge(page: Page, url: str) -> None:
    page.goto(url)
    page.get_by_role("button", name="TIES").click()
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1000)
    _keep(page, "page")


def _keep(page: Page, name: str) -> None:
    page.screenshot(path=DOCS / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
