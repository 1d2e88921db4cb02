"""Calibrations over real HTTP: a worker learns coefficients of a tiny Llama, is killed, goes on; the result merges."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.services import Service, eventually, running_service
from tests.workers.test_calibrating import document, write_models

pytestmark = [pytest.mark.xdist_group("service"), pytest.mark.slow]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    models = write_models(tmp_path_factory.mktemp("models"))
    settings = {"WEIGHTSMITH_THREADS": "1", "WEIGHTSMITH_LEASE_SECONDS": "3"}
    with running_service(tmp_path_factory.mktemp("service") / "data", models, **settings) as found:
        yield found


def submit(service: Service, written: Any) -> dict[str, Any]:
    answer = service.http.post("/v1/calibrations", json=written)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def test_what_a_worker_learns_merges(service: Service, tmp_path: Path) -> None:
    check = [{"file": "rows-0.jsonl", "samples": 2}]
    asked = document("expert_merging", accumulate=2, epochs=4, check=check, compare=[0.3], merge=True)
    planned = service.http.post("/v1/calibrations?dry_run=true", json=asked | {"dtype": "float32"}).json()
    assert planned["plan"]["calibration"] == "expert_merging" and planned["plan"]["memory_of_activations"] > 0
    job = submit(service, asked | {"dtype": "float32"})
    ended = service.ended(job)
    assert ended["status"] == "succeeded", ended["error"]
    assert ended["id"].startswith("cal_") and ended["progress"]["fraction"] == 1
    folder = service.download(job, tmp_path / "found")
    report = json.loads((folder / "calibration.json").read_text())
    assert [curve["name"] for curve in report["curves"]] == ["training", "check"]
    recipe = yaml.safe_load((folder / "recipe.yml").read_text())
    assert [m["statistics"] for m in recipe["models"]] == [
        {"coefficients": f"calibrated/coefficients-{i}.safetensors"} for i in (0, 1)
    ]
    # The files where the recipe says, and it merges to the same bytes.
    place = service.models / "calibrated"
    place.mkdir()
    for file in folder.glob("coefficients-*"):
        shutil.copy(file, place)
    merged = service.ended(service.post(recipe))
    assert merged["status"] == "succeeded", merged["error"]
    again = load_file(service.download(merged, tmp_path / "merged") / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(again[name], tensor), name
    manifest = service.get(f"/v1/calibrations/{job['id']}/manifest")
    assert "calibration.json" in {each["name"] for each in manifest["subject"]}


def test_what_a_worker_measures_merges(service: Service, tmp_path: Path) -> None:
    """Gram matrices for RegMean, and a q for DAREx-q, which is a number in the recipe and no file."""
    data = [{"model": f"lm-{i}", "file": f"rows-{i}.jsonl"} for i in (0, 1)]
    asked = {"merge_method": "regmean", "models": [{"model": "lm-0"}, {"model": "lm-1"}], "dtype": "float32"}
    grams = {"method": "regmean", "data": data, "context": 8, "merge": True, "place": "measured/grams"}
    job = submit(service, asked | {"calibrate": grams})
    ended = service.ended(job)
    assert ended["status"] == "succeeded", ended["error"]
    assert service.http.get(f"/jobs/{job['id']}/calibrated").status_code == 200
    folder = service.download(job, tmp_path / "found")
    assert {each.name for each in folder.iterdir()} >= {"gram-0.safetensors", "gram-1.safetensors", "calibration.json"}
    place = service.models / "measured" / "grams"
    place.mkdir(parents=True)
    for file in folder.glob("gram-*"):
        shutil.copy(file, place)
    merged = service.ended(service.post(yaml.safe_load((folder / "recipe.yml").read_text())))
    assert merged["status"] == "succeeded", merged["error"]
    again = load_file(service.download(merged, tmp_path / "merged") / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(again[name], tensor), name

    dropped = {"merge_method": "darex", "base_model": "lm", "models": [{"model": "lm-1"}]}
    searched = {"method": "darex", "data": data[1:], "samples": 1, "context": 8, "most": 0.2}
    job = submit(service, dropped | {"parameters": {"drop_rate": 0.9}, "calibrate": searched})
    ended = service.ended(job)
    assert ended["status"] == "succeeded", ended["error"]
    assert "Loss by q: lm-1 from" in service.http.get(f"/jobs/{job['id']}/calibrated").text
    found = yaml.safe_load((service.download(job, tmp_path / "q") / "recipe.yml").read_text())
    assert 0.1 <= found["models"][0]["parameters"]["q"] <= 0.2

    wrong = asked | {"merge_method": "fisher", "calibrate": {"method": "fisher", "data": data, "labels": "expected"}}
    refused = service.http.post("/v1/calibrations", json=wrong)
    assert refused.status_code == 422 and refused.json()["errors"][0]["pointer"] == "#/calibrate/labels"


def test_a_killed_worker_goes_on_and_a_cancel_ends_it(service: Service) -> None:
    job = submit(service, document("atlas", epochs=2000))
    eventually(lambda: (service.job(job)["progress"] or {}).get("steps_done", 0) > 20)
    phases = {event["phase"] for event in [service.job(job)]}
    assert phases == {"training"}
    artifacts = service.data / "artifacts"
    eventually(lambda: any("training.safetensors" in names for *_, names in os.walk(artifacts)))
    service.kill_worker()
    eventually(lambda: service.job(job)["attempt"] == 2 and service.job(job)["phase"] == "training")
    assert service.http.post(f"/v1/calibrations/{job['id']}/cancel").status_code in (200, 202)
    assert service.ended(job)["status"] == "canceled"
    eventually(lambda: job["id"] not in " ".join(service.artifacts()))


def test_what_cannot_be_is_refused_or_fails_with_words(service: Service) -> None:
    refused = service.http.post("/v1/calibrations", json=document("atlas", data=[{"file": "nowhere.jsonl"}]))
    assert refused.status_code == 422 and refused.json()["errors"][0]["pointer"] == "#/calibrate/data/0/file"
    merge = service.http.post("/v1/merges", json=document("atlas"))
    assert merge.status_code == 422 and "job of its own kind" in merge.text
    assert service.http.put("/v1/data/empty.jsonl", content=b"\n").is_success
    ended = service.ended(submit(service, document("atlas", data=[{"file": "data:empty.jsonl"}])))
    assert ended["status"] == "failed" and ended["error"]["code"] == "calibration-failed"
    assert "empty.jsonl has no samples" in ended["error"]["detail"]
