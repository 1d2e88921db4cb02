"""The list of the models in the service's folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import local_models
from app.main import create_app
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint
from workers.settings import Settings


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """Two folders of models, and all that might be taken for one."""
    first, second, outside = (tmp_path / name for name in ("first", "second", "outside"))
    config = CONFIG | {"architectures": ["TinyForCausalLM"], "torch_dtype": "bfloat16"}
    write_checkpoint(first / "base", mixed_tensors(0), shards=2, config=config)
    write_checkpoint(first / "org" / "chat", mixed_tensors(1))
    write_checkpoint(second / "base", mixed_tensors(2), config=CONFIG)
    write_checkpoint(second / "other", mixed_tensors(2), config={"text_config": {"model_type": "inner"}})
    write_checkpoint(outside / "secret", mixed_tensors(3), config=CONFIG)
    for name in (".hidden", "a@b", "a+b", "line\nbreak"):
        write_checkpoint(first / name, mixed_tensors(3), config=CONFIG)
    (first / "lone.safetensors").write_bytes((first / "org" / "chat" / "model.safetensors").read_bytes())
    (first / "link").symlink_to(outside / "secret")
    (first / "leak").mkdir()
    (first / "leak" / "model.safetensors").symlink_to(outside / "secret" / "model.safetensors")
    (first / "loop").symlink_to(first)
    (first / "pickled").mkdir()
    (first / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    os.mkfifo(first / "pipe.safetensors")
    adapter = second / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"12345")
    return [first, second]


@pytest.fixture
def client(roots: list[Path], tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(data=tmp_path / "data", model_roots=roots))) as client:
        yield client


def listed(client: TestClient, **query: Any) -> dict[str, dict[str, Any]]:
    answer = client.get("/v1/models", params=query)
    assert answer.status_code == 200, answer.text
    return {each["name"]: each for each in answer.json()["data"]}


def test_what_recipes_may_name_is_listed_and_nothing_else(client: TestClient) -> None:
    found = listed(client)
    assert {name: each["kind"] for name, each in found.items()} == {
        "adapter": "adapter",
        "base": "model",
        "lone.safetensors": "file",
        "org/chat": "model",
        "other": "model",
    }
    for name, each in found.items():
        if each["kind"] != "adapter":
            recipe = {"merge_method": "passthrough", "models": [{"model": name}]}
            assert client.post("/v1/recipes:validate", json=recipe).status_code == 200, name


def test_size_and_architecture_are_told_without_a_weight(client: TestClient, roots: list[Path]) -> None:
    found = listed(client)
    weights = sum(path.stat().st_size for path in (roots[0] / "base").glob("*.safetensors"))
    assert found["base"] == {
        **{"name": "base", "kind": "model", "bytes": weights, "architecture": "TinyForCausalLM"},
        **{"dtype": "bfloat16", "layers": 3, "hidden_size": 24, "vocabulary": 96},
    }
    assert found["other"]["architecture"] == "inner"
    assert found["org/chat"]["architecture"] is None and found["org/chat"]["bytes"] > 0


def test_a_config_may_say_anything(client: TestClient, roots: list[Path]) -> None:
    odd = {"architectures": [3, None], "num_hidden_layers": True, "hidden_size": 10**30, "dtype": {}, "vocab_size": "x"}
    (roots[0] / "base" / "config.json").write_text(json.dumps(odd))
    (roots[1] / "other" / "config.json").write_text("[not a config")
    about = listed(client)["base"]
    assert listed(client)["other"]["architecture"] is None
    assert {about[key] for key in ("architecture", "layers", "hidden_size", "dtype", "vocabulary")} == {None}


def test_pages_follow_one_another(client: TestClient) -> None:
    names, after = [], ""
    while True:
        page = client.get("/v1/models", params={"limit": 2, "after": after}).json()
        names += [each["name"] for each in page["data"]]
        if not page["has_more"]:
            break
        after = page["next"]
    assert names == list(listed(client)) == sorted(names)


def test_there_is_an_end_to_looking(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_models, "MAX_ENTRIES", 5)
    page = client.get("/v1/models").json()
    assert page["incomplete"] and len(page["data"]) <= 5
    monkeypatch.setattr(local_models, "MAX_ENTRIES", 10_000)
    assert not client.get("/v1/models").json()["incomplete"]


def test_a_service_without_models_has_an_empty_list(tmp_path: Path) -> None:
    with TestClient(create_app(Settings(data=tmp_path / "data", model_roots=[tmp_path / "nowhere"]))) as client:
        assert client.get("/v1/models").json() == {"data": [], "has_more": False, "next": None, "incomplete": False}
