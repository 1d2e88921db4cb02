"""One job: from its submission to its files, and all that may come between."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Error, Page, Route, expect

from tests.pages.conftest import Open, assert_accessible, assert_fit_to_be_seen
from tests.pages.stage import LINEAR, PROGRESS, Stage
from tests.services import Service, sha256_of
from workers.jobs import JobKind, JobState

LOST = "The service does not answer"


def badge(page: Page) -> Any:
    return page.locator("#badge")


def test_a_merge_from_the_first_second_to_its_files(service: Service, open_page: Open) -> None:
    job = service.post(LINEAR)
    page = open_page(f"/jobs/{job['id']}")
    expect(badge(page)).to_have_text("succeeded")
    expect(page.locator("#log")).to_contain_text("succeeded")
    expect(page).to_have_title(re.compile("^linear: chat, code"))
    with page.expect_download() as coming:
        page.get_by_role("link", name="model.safetensors").click()
    wanted = service.files(job)
    assert hashlib.sha256(coming.value.path().read_bytes()).hexdigest() == wanted["model.safetensors"]
    expect(page.get_by_title(wanted["model.safetensors"])).to_have_count(1)
    expect(page.get_by_role("link", name="Edit and run again")).to_have_attribute("href", f"/?from={job['id']}")
    expect(page.locator("#recipe")).to_contain_text("merge_method: linear")
    assert_fit_to_be_seen(page)


def test_the_commands_do_what_they_say(service: Service, open_page: Open, tmp_path: Path) -> None:
    job = service.ended(service.post(LINEAR))
    page = open_page(f"/jobs/{job['id']}")

    def run(command: str, *program: str, within: Path) -> None:
        within.mkdir()
        subprocess.run([*program, page.locator(command).inner_text()], cwd=within, check=True, capture_output=True)

    for number, (command, *program) in enumerate(
        [("#curl-download", "sh", "-c"), ("#python", sys.executable, "-c"), ("#again", "sh", "-c")]
    ):
        run(command, *program, within=tmp_path / str(number))
    assert sha256_of(tmp_path / "0" / "merged") == service.files(job) == sha256_of(tmp_path / "1" / "merged")
    again = service.ended(service.get("/v1/merges?limit=1")["data"][0])
    assert again["id"] != job["id"] and service.files(again) == service.files(job)
    model = f'from_pretrained("merges/{job["id"]}"'
    expect(page.locator("#from-pretrained")).to_contain_text(f'"{service.url}/hub"')
    expect(page.locator("#from-pretrained")).to_contain_text(model)

    page.get_by_role("button", name="Verify").click()
    expect(page).to_have_url(re.compile("/jobs/vrf_"))
    expect(page.get_by_role("heading", name="It is what its lock says.")).to_be_visible()


def test_what_happens_is_seen_as_it_happens(stage: Stage, open_page: Open) -> None:
    lease = stage.running()
    page = open_page(f"{stage.service.url}/jobs/{lease.job_id}")
    expect(badge(page)).to_have_text("running")
    stage.beat(lease, "measuring: norms")
    expect(page.get_by_role("progressbar")).to_have_attribute("value", "0.25")
    expect(page.locator("#phase")).to_have_text("measuring: norms")
    for id_, told in (
        ("share", "25 %"),
        ("left", "8 s"),
        ("rate", "1.2 MB/s"),
        ("tensors", "3 of 12"),
        ("read", "2.5 MB of 10.0 MB"),
        ("tensor", "model.layers.1.w"),
    ):
        expect(page.locator(f"#{id_}")).to_have_text(told)
    expect(page).to_have_title(re.compile("^25 % · linear"))
    assert_fit_to_be_seen(page)

    stage.beat(lease, "merging", PROGRESS | {"fraction": 0.5})
    expect(page.locator("#phase")).to_have_text("merging")
    expect(page.locator(".phases tbody tr")).to_have_count(2)
    expect(page.locator("#said")).to_have_text("merging")
    stage.log(lease, "half of it <b>is</b> done")
    expect(page.locator("#log")).to_contain_text("info: half of it <b>is</b> done")
    stage.succeed(lease)
    expect(badge(page)).to_have_text("succeeded")
    expect(page.locator("#said")).to_have_text("succeeded")
    expect(page.get_by_role("progressbar")).to_have_count(0)
    expect(page).to_have_title(re.compile("^linear"))


def test_the_map_shows_which_tensors_are_done(stage: Stage, open_page: Open) -> None:
    lease = stage.running()
    page = open_page(f"{stage.service.url}/jobs/{lease.job_id}")
    expect(page.get_by_role("heading", name="Tensors")).to_be_hidden()
    names = ["embed.weight"]
    names += [
        f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in ("attn", "experts.0", "experts.1")
    ]
    stage.store.keep_order(lease, names)
    stage.beat(lease, "merging", PROGRESS | {"tensors_finished": [[0, 3], [10, 13]], "tensor": names[4]})
    expect(page.locator("#map-count")).to_have_text("6 of 13 done")
    expect(page.locator("#map .module")).to_have_text(["attn", "experts.*", "outside the layers"])
    cells = page.locator("#map rect")
    assert cells.evaluate_all("cells => cells.map(cell => cell.getAttribute('class'))") == [
        *("done", "at-work", "", "done"),
        *("part", "", "", "done"),
        "done",
    ]
    expect(page.get_by_role("img", name="Tensors 6 of 13 done")).to_be_visible()
    assert_fit_to_be_seen(page)
    stage.beat(lease, "finishing", PROGRESS | {"tensors_finished": [[0, 13]]})
    expect(page.locator("#map-count")).to_have_text("13 of 13 done")
    stage.succeed(lease)
    expect(page.get_by_role("heading", name="Tensors")).to_be_hidden()


def test_a_map_of_very_many_tensors_is_one_strip(stage: Stage, open_page: Open) -> None:
    lease = stage.running()
    stage.store.keep_order(lease, [f"blocks.{place}.x" for place in range(30_000)])
    stage.beat(lease, "merging", PROGRESS | {"tensors_finished": [[0, 15_000]]})
    page = open_page(f"{stage.service.url}/jobs/{lease.job_id}")
    expect(page.locator("#map-count")).to_have_text("15000 of 30000 done")
    expect(page.locator("#map rect")).to_have_count(240)
    expect(page.locator("#map rect.done")).to_have_count(120)
    stage.succeed(lease)


def test_a_failure_says_what_where_and_what_to_do(stage: Stage, open_page: Open) -> None:
    lease = stage.running()
    page = open_page(f"{stage.service.url}/jobs/{lease.job_id}")
    places = [{"pointer": "/models/0", "detail": "has no weights"}, {"tensor": "a.b", "detail": "is NaN"}]
    stage.fail(lease, "invalid-recipe", "this cannot be read\nat all", errors=places)
    alert = page.get_by_role("alert")
    for told in ("this cannot be read", "/models/0: has no weights", "a.b: is NaN", "Retrying alone will not help"):
        expect(alert).to_contain_text(told)
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert_fit_to_be_seen(page)


def test_cancel_retry_and_delete(stage: Stage, open_page: Open) -> None:
    job_id = stage.queued()
    page = open_page(f"{stage.service.url}/jobs/{job_id}")
    page.get_by_role("button", name="Cancel").click()
    expect(badge(page)).to_have_text("canceled")
    page.get_by_role("button", name="Retry").click()
    expect(badge(page)).to_have_text("queued")
    lease = stage.store.claim(job_id, "test/1")
    assert lease is not None
    stage.beat(lease, "merging")
    expect(page.get_by_role("progressbar")).to_have_attribute("value", "0.25")
    page.get_by_role("button", name="Cancel").click()
    expect(badge(page)).to_have_text("canceling")
    assert stage.beat(lease, "merging") is JobState.CANCELING
    stage.store.confirm_cancel(lease)
    expect(badge(page)).to_have_text("canceled")

    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("button", name="Delete…").click()
    assert_accessible(page)
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page).to_have_url(f"{stage.service.url}/jobs")
    assert stage.store.get(job_id) is None


def test_nothing_is_asked_of_a_job_that_is_deleted(stage: Stage, open_page: Open) -> None:
    job_id = stage.queued()
    page = open_page(f"{stage.service.url}/jobs/{job_id}")
    page.get_by_role("button", name="Cancel").click()
    expect(badge(page)).to_have_text("canceled")
    held: list[Route] = []

    def late(route: Route) -> None:
        """The job is gone when its log is looked for."""
        answer = route.fetch()
        for request in held:
            with suppress(Error):  # nobody waits for it any more
                request.fulfill(status=404)
        route.fulfill(response=answer)

    page.route("**/logs", lambda route: held.append(route))
    page.route(re.compile(rf"/v1/merges/{job_id}$"), late)
    with page.expect_request("**/logs"):
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("button", name="Go on").click()
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page).to_have_url(f"{stage.service.url}/jobs")
    assert held


def test_a_lost_connection_is_told_and_found_again(stage: Stage, open_page: Open) -> None:
    lease = stage.running()
    page = open_page(f"{stage.service.url}/jobs/{lease.job_id}", expected="ERR_FAILED|503")
    expect(badge(page)).to_have_text("running")
    here = re.compile(rf"/{lease.job_id}")
    page.route(here, lambda route: route.abort())
    # The browser closes the stream of a tab that nobody sees, and opens it when somebody does.
    look_away(page, True)
    look_away(page, False)
    expect(page.get_by_text(LOST)).to_be_visible()
    stage.beat(lease, "merging")
    page.unroute(here)
    expect(page.get_by_text(LOST)).to_be_hidden()
    expect(page.locator("#phase")).to_have_text("merging")
    expect(page.locator("#log")).to_contain_text("merging")

    page.route("**/events*", lambda route: route.fulfill(status=503))
    look_away(page, True)
    look_away(page, False)
    expect(page.get_by_text(LOST)).to_be_visible()
    page.unroute("**/events*")
    stage.succeed(lease)
    expect(badge(page)).to_have_text("succeeded")
    expect(page.get_by_text(LOST)).to_be_hidden()


def look_away(page: Page, is_hidden: bool) -> None:
    page.evaluate(
        f"Object.defineProperty(document, 'hidden', {{configurable: true, get: () => {str(is_hidden).lower()}}});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )


def test_nobody_asks_while_nobody_looks(stage: Stage, open_page: Open) -> None:
    lease = stage.running()
    page = open_page(f"{stage.service.url}/jobs/{lease.job_id}")
    expect(page.locator("#log")).to_contain_text("running")
    look_away(page, True)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    stage.beat(lease, "merging")
    stage.log(lease, "unseen")
    page.wait_for_timeout(1500)
    assert not asked
    look_away(page, False)
    expect(page.locator("#phase")).to_have_text("merging")
    expect(page.locator("#log")).to_contain_text("unseen")
    stage.succeed(lease)


def test_the_log_follows_by_ranges_and_can_be_paused(stage: Stage, open_page: Open) -> None:
    lease = stage.running()
    for number in range(40):
        stage.log(lease, f"line {number} {'is long ' * 300}")
    page = open_page(f"{stage.service.url}/jobs/{lease.job_id}")
    log = page.locator("#log")
    expect(log).to_contain_text("line 39")
    assert "line 1 " not in log.inner_text(), "only the tail of a long log is read"
    ranges: list[str] = []
    page.on("request", lambda asked: "/logs" in asked.url and ranges.append(asked.headers.get("range", "")))
    stage.log(lease, "ünd then")
    expect(log).to_contain_text("ünd then")
    assert all(re.fullmatch(r"bytes=\d{5,}-", each) for each in ranges)
    bottom = "log => log.scrollHeight - log.scrollTop - log.clientHeight < 5"
    assert log.evaluate(bottom)
    page.get_by_role("button", name="Pause").click()
    ranges.clear()
    stage.log(lease, "while paused")
    stage.beat(lease, "merging")
    expect(page.locator("#phase")).to_have_text("merging")
    assert not ranges
    page.get_by_role("button", name="Go on").click()
    expect(log).to_contain_text("while paused")
    assert log.inner_text().count("ünd then") == 1
    log.evaluate("log => { log.scrollTop = 0 }")
    stage.log(lease, "the last line")
    expect(log).to_contain_text("the last line")
    assert log.evaluate("log => log.scrollTop") == 0, "who reads above is left there"
    stage.succeed(lease)


def test_every_kind_of_job_has_a_page(stage: Stage) -> None:
    for kind in JobKind:
        lease = stage.running({"models": ["a"]}, kind=kind)
        path = f"/jobs/{lease.job_id}"
        assert stage.service.http.get(path).status_code == 200
        stage.succeed(lease)
        shown = stage.service.http.get(path)
        assert shown.status_code == 200 and "succeeded" in shown.text


def test_a_job_that_is_not_ones_own_is_not_there(stage: Stage, open_page: Open) -> None:
    theirs = stage.queued(owner="somebody")
    for job_id in (theirs, "mrg_nothing", "nonsense"):
        assert stage.service.http.get(f"/jobs/{job_id}").status_code == 404
    page = open_page(f"{stage.service.url}/jobs/{theirs}", expected="404")
    expect(page.get_by_role("heading", name="There is no such job")).to_be_visible()
    assert_accessible(page)
