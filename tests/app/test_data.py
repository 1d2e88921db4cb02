"""Files of data that are sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from workers.settings import Settings


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(data=tmp_path, evaluator_data_bytes=3_000_000))) as client:
        yield client


def test_a_file_is_sent_told_of_listed_and_removed(client: TestClient, tmp_path: Path) -> None:
    content = b'{"text": "a"}\n' * 200_000
    sent = client.put("/v1/data/train.jsonl", content=content)
    assert sent.status_code == 200
    told = sent.json()
    assert (told["name"], told["size"]) == ("train.jsonl", len(content))
    assert told["sha256"] == hashlib.sha256(content).hexdigest()
    assert client.get("/v1/data/train.jsonl").json() == told
    client.put("/v1/data/a.txt", content=b"")
    page = client.get("/v1/data", params={"limit": 1}).json()
    assert [each["name"] for each in page["data"]] == ["a.txt"] and page["has_more"]
    following = client.get("/v1/data", params={"after": page["next"]}).json()
    assert following == {"data": [told], "has_more": False, "next": None}
    assert client.get("/v1/quota").json()["used"]["disk_bytes"] == len(content)
    assert client.delete("/v1/data/train.jsonl").status_code == 204
    assert client.get("/v1/data/train.jsonl").json()["code"] == "not-found"
    assert client.delete("/v1/data/train.jsonl").status_code == 404
    assert [path.name for path in (tmp_path / "uploads").rglob("*") if path.is_file()] == ["a.txt"]


def test_what_is_too_large_or_badly_named_leaves_nothing(client: TestClient, tmp_path: Path) -> None:
    refused = client.put("/v1/data/large.txt", content=b"x" * 3_000_001)
    assert refused.status_code == 413 and "3,000,000" in refused.json()["detail"]
    for name in (".hidden", "a%2Fb", "ü", "x" * 101, "a b"):
        assert client.put(f"/v1/data/{name}", content=b"x").status_code in (404, 422), name
    coded = client.put("/v1/data/a.txt", content=b"x", headers={"Content-Encoding": "gzip"})
    assert coded.status_code == 415
    assert not [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]
