"""How a webhook is asked for, and what is shown of its messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from tests.conftest import method_recipe
from workers.settings import Settings

URL = "https://hook.example/private-path"


@pytest.fixture
def client(models: Path, tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(data=tmp_path / "data", model_roots=[models], webhook_allow=["hooks.intranet"])
    with TestClient(create_app(settings)) as client:
        yield client


def test_a_webhook_is_asked_for_in_headers_and_its_messages_are_shown(client: TestClient) -> None:
    headers = {"Webhook-Url": URL, "Webhook-Events": "succeeded, canceled"}
    job = client.post("/v1/merges", json=method_recipe("linear"), headers=headers).json()
    assert client.get(f"{job['urls']['self']}/deliveries").json() == {"data": []}

    client.post(job["urls"]["cancel"])

    (delivery,) = client.get(f"{job['urls']['self']}/deliveries").json()["data"]
    assert delivery["event"] == "merge.canceled" and delivery["status"] == "pending" and delivery["attempts"] == 0
    assert delivery["next_attempt_at"] and delivery["delivered_at"] is None and delivery["last_error"] is None
    patches = f"/v1/patches/{job['id']}/deliveries"
    assert client.get(patches).status_code == client.get("/v1/merges/mrg_none/deliveries").status_code == 404


def test_without_a_webhook_nothing_is_told(client: TestClient) -> None:
    job = client.post("/v1/merges", json=method_recipe("linear")).json()
    client.post(job["urls"]["cancel"])
    assert client.get(f"{job['urls']['self']}/deliveries").json() == {"data": []}


@pytest.mark.parametrize(
    ("headers", "header", "why"),
    [
        ({"Webhook-Url": "http://hook.example/"}, "webhook-url", "only https"),
        ({"Webhook-Url": "https://127.0.0.1/"}, "webhook-url", "no public address"),
        ({"Webhook-Url": "https://169.254.169.254/latest"}, "webhook-url", "no public address"),
        ({"Webhook-Url": "https://[::ffff:10.0.0.1]/"}, "webhook-url", "no public address"),
        ({"Webhook-Url": "https://hook.example:6379/"}, "webhook-url", "ports"),
        ({"Webhook-Url": "file:///etc/passwd"}, "webhook-url", "only https"),
        ({"Webhook-Url": "https://u:p@hook.example/"}, "webhook-url", "password"),
        ({"Webhook-Url": ""}, "webhook-url", "only https"),
        ({"Webhook-Url": "https://hook.example/" + "x" * 3000}, "webhook-url", "at most 2000"),
        ({"Webhook-Url": URL, "Webhook-Events": "finished"}, "webhook-events", "there is no event 'finished'"),
        ({"Webhook-Events": "failed"}, "webhook-events", "no Webhook-Url"),
    ],
)
def test_a_webhook_that_is_not_called_is_refused_in_words(
    client: TestClient, headers: dict[str, str], header: str, why: str
) -> None:
    answer = client.post("/v1/merges", json=method_recipe("linear"), headers=headers)
    assert answer.status_code == 422 and answer.json()["code"] == "invalid-request", answer.text
    assert answer.json()["errors"][0]["pointer"] == f"#/header/{header}" and why in answer.json()["detail"]
    assert client.get("/v1/merges").json()["data"] == []


def test_an_administrator_may_allow_a_host(client: TestClient) -> None:
    headers = {"Webhook-Url": "http://hooks.intranet:8080/"}
    assert client.post("/v1/merges", json=method_recipe("linear"), headers=headers).status_code == 202


def test_the_secret_is_shown_and_stays(client: TestClient) -> None:
    secret = client.get("/v1/webhook-secret").json()["secret"]
    assert secret.startswith("whsec_") and client.get("/v1/webhook-secret").json()["secret"] == secret
