"""To verify over HTTP: one's own jobs and published folders, and nobody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from merge_core.artifact import LOCK_NAME
from tests.app.test_hub import finish
from tests.app.test_views import Shop, shop, world  # noqa: F401 — fixtures
from workers.jobs import JobKind
from workers.kinds import WORK
from workers.published import StoredFiles, published_by
from workers.queue import artifact_folder


def verified(shop: Shop, job: str, owner: str = "ann") -> Any:  # noqa: F811
    return shop.ask("POST", "/v1/verify?dry_run=true", owner, json={"job": job, "sample": 3})


def test_a_job_is_verified_by_its_owner_once_it_succeeded(shop: Shop) -> None:  # noqa: F811
    job = finish(shop.settings, shop.store)
    plan = verified(shop, job).json()["plan"]
    assert plan["tensors"] == 3 and plan["tensors_total"] == 21 and plan["bytes_written"] < 2**21

    others = verified(shop, job, "ben")
    assert others.status_code == 422 and others.json()["code"] == "model-not-found"
    assert others.json()["errors"][0]["pointer"] == "#/job"
    queued = shop.ask("POST", "/v1/merges", json={"merge_method": "passthrough", "models": [{"model": "m0"}]}).json()
    assert verified(shop, queued["id"]).json()["code"] == "invalid-recipe"


def test_a_job_s_files_are_read_wherever_they_are_stored(
    shop: Shop,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one that is short, or gone, in the store differs."""
    job, work = finish(shop.settings, shop.store), WORK[JobKind.VERIFICATION]()
    document, artifacts = work.document.from_data({"job": job}), shop.app.state.queue.artifacts
    published = published_by(shop.store, artifacts, "ann", document)
    assert isinstance(published, StoredFiles)
    monkeypatch.setattr(type(artifacts), "local", lambda *_: None)

    def outcome(out: str) -> tuple[str, set[str]]:
        how: dict[str, Any] = {
            "roots": shop.settings.roots,
            "partial": None,
            "memory": None,
            "threads": 1,
            "cache": None,
        }
        work.run(document, tmp_path / out, **how, device="cpu", report=print, stop=bool, published=published)  # type: ignore[call-arg]
        found = json.loads((tmp_path / out / "verification.json").read_text())
        return found["outcome"], {each["path"] for each in found["files"] if each["outcome"] != "agrees"}

    assert outcome("one") == ("agrees", set())
    folder = artifact_folder(shop.settings, job)
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    (folder / "config.json").unlink()
    assert outcome("two") == ("differs", {file.name, "config.json"})
    (folder / LOCK_NAME).write_text("{")
    answer = verified(shop, job)
    assert answer.status_code == 422 and answer.json()["code"] == "bad-checkpoint"


@pytest.mark.parametrize(
    ("document", "pointer"),
    [
        ({}, "#/model"),
        ({"model": "a", "job": "mrg_1"}, "#/job"),
        ({"model": "a+b"}, "#/model"),
        ({"model": "m0", "sampel": 3}, "#/sampel"),
        ({"model": "m0", "sample": 0}, "#/sample"),
        ({"model": "m0"}, "#/model"),
        ({"model": "nowhere"}, "#/model"),
    ],
)
def test_what_cannot_be_meant_is_refused(shop: Shop, document: Any, pointer: str) -> None:  # noqa: F811
    answer = shop.ask("POST", "/v1/verify", json=document)
    assert answer.status_code == 422 and answer.json()["errors"][0]["pointer"] == pointer
