"""Compare models: from the form to drawings, pictures and numbers."""

from __future__ import annotations

import json

import pytest
import torch
from playwright.sync_api import Page, expect

from tests.conftest import CONFIG, mixed_tensors, write_checkpoint
from tests.pages.conftest import Open, assert_accessible, assert_fit_to_be_seen
from tests.pages.stage import Stage
from tests.services import Service
from workers.jobs import JobKind

TITLES = (
    "Distance from the base",
    "Cosine between task vectors",
    "Sign conflicts of pairs",
    "Magnitudes and thresholds",
    "Kept against asked",
    "Singular values of δ",
)


@pytest.fixture(scope="module")
def compared(service: Service) -> str:
    """The page of a finished analysis of `chat` and `code`."""
    document = {"base_model": "base", "models": ["chat", "code"], "top": 4}
    job = service.ended(service.http.post("/v1/analyses", json=document).json())
    assert job["status"] == "succeeded", job["error"]
    return f"/compare/{job['id']}"


def drawing(page: Page, title: str) -> str:
    """What a drawing says it is."""
    return page.get_by_role("region", name=f"Drawing: {title}").get_by_role("img").get_attribute("aria-label") or ""


def test_two_models_are_compared(open_page: Open) -> None:
    """From the form, by the keyboard, to the drawings."""
    page = open_page("/compare")
    page.get_by_label("Base model").fill("base")
    page.get_by_label("Model 1").fill("chat")
    page.get_by_label("Model 2").fill("code")
    page.get_by_label("Density").fill("0.3")
    page.get_by_label("Density").press("Enter")
    page.wait_for_url("**/compare/anl_*")
    expect(page.get_by_role("heading", name="chat, code")).to_be_visible()
    expect(page.get_by_role("heading", name="At a glance")).to_be_visible(timeout=60_000)
    for title in TITLES:
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    assert "density 0.3" in page.get_by_role("main").inner_text()
    page.goto(page.url.rpartition("/")[0])
    expect(page.get_by_role("link", name="chat, code").first).to_be_visible()


def test_what_is_wrong_is_said_at_its_field(open_page: Open) -> None:
    page = open_page("/compare", expected="422")
    page.get_by_label("Base model").fill("base")
    page.get_by_label("Model 1").fill("chat")
    page.get_by_role("button", name="Add a model").click()
    page.get_by_label("Model 3").fill("nowhere")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("alert")).to_contain_text("nowhere")
    expect(page.get_by_label("Model 3")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Model 3")).to_be_focused()
    page.get_by_label("Model 3").fill("code")
    page.get_by_label("Density").fill("7")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_label("Density")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Model 3")).not_to_have_attribute("aria-invalid", "true")


@pytest.mark.parametrize("path", ["/compare", ""])
def test_it_can_be_seen_by_everybody(open_page: Open, compared: str, path: str) -> None:
    page = open_page(path or compared)
    expect(page.get_by_role("main")).to_be_visible()
    for summary in page.locator("summary").all():
        summary.click()
    assert_fit_to_be_seen(page)


def test_what_is_drawn_can_be_chosen_without_losing_the_place(open_page: Open, compared: str) -> None:
    page = open_page(compared)
    assert "distance from the base of chat" in drawing(page, TITLES[0])
    page.get_by_label("Of", exact=True).select_option("code")
    expect(page.get_by_role("img", name="distance from the base of code")).to_be_visible()
    show = page.get_by_label("Show")
    show.focus()
    show.select_option("Cosine between two")
    expect(page.get_by_role("img", name="cosine between two of code and chat")).to_be_visible()
    expect(page.get_by_label("Show")).to_be_focused()
    tensor = "model.layers.2.mlp.down_proj.weight"
    page.get_by_label("Tensor").select_option(tensor)
    expect(page.get_by_role("img", name=tensor)).to_be_visible()
    assert "cosine between two" in drawing(page, "Cosine between two")


def test_the_numbers_are_there_to_be_read(open_page: Open, service: Service, compared: str) -> None:
    """The tables have what the report has."""
    report = service.get(f"/v1/analyses/{compared.rpartition('/')[2]}/files/analysis.json")
    page = open_page(compared)
    card = page.get_by_role("region", name="Cosine between task vectors", exact=True)
    card.get_by_text("The numbers").click()
    row = card.get_by_role("row", name="chat", exact=False).nth(1)
    expect(row.get_by_role("cell").nth(1)).to_have_text(f"{report['whole']['cosine'][0][1]:.3g}")
    glance = page.get_by_role("region", name="Each model at a glance").get_by_role("row").nth(1)
    expect(glance.get_by_role("cell").first).to_have_text(f"{report['whole']['models'][0]['relative']:.3g}")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_drawings_and_numbers_are_downloaded(open_page: Open, compared: str, theme: str) -> None:
    """A picture is what is seen, in the theme's colours."""
    page = open_page(compared, theme=theme)
    with page.expect_download() as found:
        page.get_by_role("button", name="PNG of: Magnitudes").click()
    picture = found.value.path().read_bytes()
    assert found.value.suggested_filename.endswith(".png") and picture.startswith(b"\x89PNG")
    drawn = page.get_by_role("region", name="Drawing: Magnitudes").locator("svg")
    assert int.from_bytes(picture[16:20]) == 2 * int(drawn.get_attribute("width") or 0)
    ground = page.evaluate(
        """async (bytes) => {
            const image = await createImageBitmap(new Blob([new Uint8Array(bytes)]));
            const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
            context.drawImage(image, 0, 0);
            return [...context.getImageData(0, 0, 1, 1).data];
        }""",
        list(picture),
    )
    assert (ground[0] > 128) is (theme == "light")
    with page.expect_download() as found:
        page.get_by_role("link", name="JSON").click()
    assert json.loads(found.value.path().read_text())["models"] == ["chat", "code"]


def test_a_running_one_is_watched(open_page: Open, stage: Stage) -> None:
    """What its worker says is seen as it is said, and the page reloads when it ends."""
    document = {"base_model": "base", "models": ["chat"]}
    lease = stage.running(document, kind=JobKind.ANALYSIS)
    page = open_page(f"{stage.service.url}/compare/{lease.job_id}")
    stage.beat(lease, "measuring")
    expect(page.get_by_text("3 of 12 tensors")).to_be_visible()
    expect(page.get_by_text("measuring")).to_be_visible()
    expect(page.get_by_role("progressbar")).to_have_js_property("value", 0.25)
    assert_accessible(page)
    stage.fail(lease, "non-finite", "w holds NaN")
    expect(page.get_by_text("w holds NaN")).to_be_visible()


def test_a_waiting_one_is_canceled(open_page: Open, stage: Stage) -> None:
    job = stage.queued({"base_model": "base", "models": ["chat"]}, kind=JobKind.ANALYSIS)
    page = open_page(f"{stage.service.url}/compare/{job}")
    expect(page.get_by_text("waiting for a worker")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("It was canceled.")).to_be_visible()


def test_a_report_that_is_gone_is_told(open_page: Open, stage: Stage) -> None:
    lease = stage.running({"base_model": "base", "models": ["chat"]}, kind=JobKind.ANALYSIS)
    stage.succeed(lease)
    page = open_page(f"{stage.service.url}/compare/{lease.job_id}")
    expect(page.get_by_text("The report is gone")).to_be_visible()


def test_one_model_and_a_wrong_base(open_page: Open, service: Service) -> None:
    generator = torch.Generator().manual_seed(99)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in mixed_tensors(0).items()
    }
    write_checkpoint(service.models / "other", tensors, config=CONFIG)
    document = {"base_model": "base", "models": ["other"], "top": 0}
    job = service.ended(service.http.post("/v1/analyses", json=document).json())
    page = open_page(f"/compare/{job['id']}")
    expect(page.get_by_text("Look at the base")).to_be_visible()
    expect(page.get_by_text("hardly tuned from this base")).to_be_visible()
    expect(page.get_by_role("heading", name="Sign conflicts of pairs")).to_have_count(0)
    expect(page.get_by_role("heading", name="Singular values of δ")).to_have_count(0)


def test_a_job_s_page_leads_there(open_page: Open, compared: str) -> None:
    page = open_page(compared.replace("compare", "jobs"))
    page.get_by_role("link", name="See what was found").click()
    expect(page.get_by_role("heading", name="At a glance")).to_be_visible()


def test_what_is_no_analysis_is_not_found(service: Service) -> None:
    assert service.http.get("/compare/anl_nothing").status_code == 404
    assert service.http.get("/compare/mrg_nothing").status_code == 404
