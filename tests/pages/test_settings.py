"""Settings: keys and credentials are made, used and taken away; what a key may not do is not offered."""

from __future__ import annotations

import re
import time

import httpx2
from playwright.sync_api import Page, expect

from tests.pages.conftest import Open, assert_fit_to_be_seen
from tests.services import Service
from workers.keys import KeyRing, Scope


def signed_in(open_page: Open, service: Service, secret: str) -> Page:
    page = open_page(f"{service.url}/sign-in?next=/settings")
    page.get_by_label("API key").fill(secret)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Settings")).to_be_visible()
    return page


def status(service: Service, secret: str) -> int:
    with httpx2.Client(base_url=service.url, timeout=60, trust_env=False) as http:
        return http.get("/v1/quota", headers={"Authorization": f"Bearer {secret}"}).status_code


def test_it_is_fit_to_be_seen(open_page: Open, service: Service) -> None:
    service.http.post("/v1/api-keys", json={"name": "seen"})
    service.http.put("/v1/credentials/seen", json={"kind": "hub-token", "token": "hf_secret"})
    page = open_page("/settings")
    expect(page.get_by_text("listens on this machine alone")).to_be_visible()
    page.get_by_label("Kind").select_option("s3")
    page.get_by_role("button", name="Make a key").click()
    expect(page.locator("#new-key-secret code")).to_be_visible()
    assert_fit_to_be_seen(page)


def test_a_key_is_made_shown_once_used_and_revoked(open_page: Open, guarded: tuple[Service, KeyRing]) -> None:
    service, ring = guarded
    page = signed_in(open_page, service, ring.create("ann", [Scope.ADMIN])[1])
    page.get_by_label("Name").first.fill("laptop")
    page.get_by_label("Expires").select_option("30")
    page.get_by_label("Owner").fill("bob")
    page.get_by_label("download what was merged").uncheck()
    page.get_by_role("button", name="Make a key").click()
    secret = page.locator("#new-key-secret code").inner_text()
    row = page.get_by_role("row", name="laptop")
    expect(row).to_contain_text("bob")
    expect(row).to_contain_text("merges:read, merges:write")
    expect(row).to_contain_text("in 4 weeks")
    assert status(service, secret) == 200
    page.reload()
    assert secret not in page.content()

    page.once("dialog", lambda dialog: dialog.dismiss())
    row.get_by_role("button", name="Revoke laptop").click()
    assert status(service, secret) == 200
    page.once("dialog", lambda dialog: dialog.accept())
    row.get_by_role("button", name="Revoke laptop").click()
    expect(row).to_contain_text("revoked")
    expect(row.get_by_role("button")).to_have_count(0)
    assert status(service, secret) == 401


def test_what_a_key_may_not_do_is_not_offered(open_page: Open, guarded: tuple[Service, KeyRing]) -> None:
    service, ring = guarded
    ring.create("cleo", [Scope.MERGES_READ, Scope.MERGES_WRITE], name="stronger")
    page = signed_in(open_page, service, ring.create("cleo", [Scope.MERGES_READ])[1])
    expect(page.get_by_text("You are cleo.")).to_be_visible()
    assert page.get_by_role("checkbox").count() == 1
    for label in ("Owner", "Token"):
        expect(page.get_by_label(label, exact=True)).to_have_count(0)
    expect(page.get_by_role("button", name="Show the secret")).to_have_count(0)
    expect(page.get_by_role("row", name="stronger").get_by_role("button")).to_have_count(0)
    expect(page.locator("#keys")).not_to_contain_text("ann")


def test_a_key_that_ends_makes_none_that_outlives_it(open_page: Open, guarded: tuple[Service, KeyRing]) -> None:
    service, ring = guarded
    _, secret = ring.create("dan", [Scope.MERGES_READ], expires_at=time.time() + 20 * 86_400)
    page = signed_in(open_page, service, secret)
    offered = page.get_by_label("Expires").locator("option").all_inner_texts()
    assert offered == ["in a week", "when yours does"]
    for choice in offered:
        page.get_by_label("Expires").select_option(label=choice)
        page.get_by_label("Name").first.fill(choice)
        page.get_by_role("button", name="Make a key").click()
        expect(page.get_by_role("row", name=choice)).to_be_visible()


def test_credentials_come_in_and_never_out(open_page: Open, service: Service) -> None:
    page = open_page("/settings")
    page.get_by_label("Token", exact=True).fill("hf_verysecret")
    page.get_by_role("button", name="Keep it").click()
    row = page.locator("#credentials").get_by_role("row", name=re.compile("^hub "))
    expect(row).to_contain_text("Hub token")
    expect(page.get_by_label("Token", exact=True)).to_have_value("")

    page.get_by_label("Kind").select_option("s3")
    page.get_by_label("Name").last.fill("store")
    page.get_by_label("Access key id", exact=True).fill("AKIA")
    page.get_by_label("Secret access key").fill("s3verysecret")
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator("#credentials").get_by_role("row", name="store")).to_contain_text("S3 keys")
    page.reload()
    assert "verysecret" not in page.content() and "AKIA" not in page.content()
    assert service.get("/v1/credentials/store")["kind"] == "s3"

    for name in ("hub", "store"):
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name=f"Delete {name}").click()
        expect(page.get_by_role("button", name=f"Delete {name}")).to_have_count(0)
        assert service.http.get(f"/v1/credentials/{name}").status_code == 404


def test_what_is_refused_is_said(open_page: Open) -> None:
    page = open_page("/settings", expected="status of (400|422|403)")
    page.get_by_label("Kind").select_option("s3")
    page.get_by_label("Name").last.fill("store")
    page.get_by_label("Access key id", exact=True).fill("AKIA")
    page.get_by_label("Secret access key").fill("secret")
    page.get_by_label("Endpoint").fill("http://127.0.0.1:9")
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator("#notices .bad")).to_contain_text("endpoint")
    for box in page.get_by_role("checkbox").all():
        box.uncheck()
    page.get_by_role("button", name="Make a key").click()
    expect(page.locator("#notices")).to_contain_text("choose what it may do")


def test_quota_secret_and_service_are_told(open_page: Open, service: Service) -> None:
    page = open_page("/settings")
    secret = service.get("/v1/webhook-secret")["secret"]
    assert secret not in page.content()
    page.get_by_role("button", name="Show the secret").click()
    expect(page.locator("#webhook-secret code")).to_have_text(secret)
    about = service.get("/v1/system")
    told = page.get_by_role("region", name="This service")
    expect(told).to_contain_text(about["version"])
    expect(told).to_contain_text("4.3 GB")
    for words in ("Jobs at work", "Disk"):
        expect(page.get_by_role("row", name=words)).to_contain_text("any")
