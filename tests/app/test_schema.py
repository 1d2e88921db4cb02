"""The service against its own OpenAPI document: nothing brings it down, and no answer is one that it does not tell of.

`make fuzz` asks more of each operation.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.main import create_app
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import method_recipe
from workers.jobs import JobKind, JobState, JobStore
from workers.problems import problem_of
from workers.queue import artifact_folder
from workers.settings import Settings
from workers.tables import Job

EXAMPLES = int(os.environ.get("FUZZ", "0"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
DOCUMENTS: dict[JobKind, Any] = {
    JobKind.MERGE: method_recipe("linear"),
    JobKind.ALIGNMENT: {"models": ["m0", "m1"], "alignment": {"to": "first"}},
    JobKind.PATCH: {"operation": "extract", "base_model": "base", "clean": "m0", "corrupted": ["m1"], "layers": 1},
    JobKind.VERIFICATION: {"model": "made", "sample": 2},
    JobKind.VIEW: method_recipe("linear"),
    JobKind.SEARCH: method_recipe("linear")
    | {"search": {"method": "greedy_soup", "evaluator": {"command": {"name": "a"}}, "metrics": {"a": "maximize"}}},
    JobKind.ANALYSIS: {"base_model": "base", "models": ["m0", "m1"]},
    JobKind.CALIBRATION: {
        "merge_method": "atlas",
        "base_model": "base",
        "models": [{"model": "m0"}],
        "calibrate": {"method": "atlas", "data": [{"file": "data.txt"}]},
    },
}
ENDS = (JobState.QUEUED, JobState.RUNNING, JobState.CANCELING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED)


class World:
    """The service, and jobs in any state for it to be asked about."""

    def __init__(self, models: Path, folder: Path) -> None:
        self.settings = Settings(data=folder, model_roots=[models, folder], max_wait=0.02, max_stream=0.3)
        self.app: FastAPI = create_app(self.settings)
        self.store = JobStore(self.settings)
        self.made = merge(Recipe.from_data(DOCUMENTS[JobKind.MERGE]), folder / "made", roots=[models])

    def job(self, kind: JobKind, state: JobState) -> Job:
        job = self.store.add(DOCUMENTS[kind], {"tensors": 1}, ["careful"], kind=kind, labels={"a": "b"})
        if state is JobState.CANCELED:
            self.store.cancel(job.id)
        elif state is not JobState.QUEUED:
            lease = self.store.claim(job.id, "w/1")
            assert lease is not None
            self.store.heartbeat(lease, phase="merging", progress={"fraction": 0.5})
            self.store.tell(lease, "phase", {"phase": "merging"})
            if state is JobState.CANCELING:
                self.store.cancel(job.id)
            elif state is JobState.FAILED:
                self.store.fail(lease, problem_of("storage-failed", "no disk"))
            elif state is JobState.SUCCEEDED:
                artifact_folder(self.settings, job.id).symlink_to(self.made.folder)
                files = [{"path": each.path, "size": each.size, "sha256": each.sha256} for each in self.made.files]
                self.store.succeed(lease, files=files, warnings=[], progress={"fraction": 1.0})
        return job

    def aim(self, case: schemathesis.Case, draw: st.DataObject) -> None:
        """Let a request meet something: a job that is there, a file of it, a document that can be meant."""
        if "repo" in case.path_parameters and draw.draw(st.integers(0, 4), "a repo that is there"):
            case.path_parameters |= {"shelf": "merges", "repo": self.job(JobKind.MERGE, JobState.SUCCEEDED).id}
            if draw.draw(st.integers(0, 4), "a revision that is there"):
                case.path_parameters |= {"revision": "main"}
            if "path" in case.path_parameters and draw.draw(st.booleans(), "a file that is there"):
                case.path_parameters["path"] = draw.draw(st.sampled_from(self.made.files), "which").path
        kind = next((kind for kind in JobKind if f"/{kind.plural}" in case.path), None)
        if kind is None:
            return
        if "job_id" in case.path_parameters and draw.draw(st.integers(0, 4), "a job that is there"):
            case.path_parameters["job_id"] = self.job(kind, draw.draw(st.sampled_from(ENDS), "its state")).id
        if "path" in case.path_parameters and draw.draw(st.booleans(), "a file that is there"):
            case.path_parameters["path"] = draw.draw(st.sampled_from(self.made.files), "which").path
        if case.method == "POST" and case.path == f"/v1/{kind.plural}" and draw.draw(st.booleans(), "a good document"):
            case.body, case.media_type = DOCUMENTS[kind], "application/json"
        if case.path.endswith("/events") and draw.draw(st.booleans(), "a stream"):
            case.headers = {**(case.headers or {}), "Accept": "text/event-stream"}


def _examples(path: str) -> int:
    """How many requests to try: less of what other kinds of jobs have too."""
    has_them_too = any(f"/{kind.plural}" in path for kind in JobKind if kind is not JobKind.MERGE)
    return EXAMPLES or (2 if has_them_too else 5)


def test_no_request_is_an_internal_error(models: Path, tmp_path: Path) -> None:
    world = World(models, tmp_path / "data")
    schema = schemathesis.openapi.from_asgi("/openapi.json", world.app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 58
    with TestClient(world.app) as client:
        for operation in operations:
            phases = [Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate]

            @settings(
                max_examples=_examples(operation.path),
                deadline=None,
                derandomize=not EXAMPLES,
                database=None,
                phases=phases,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(), draw=st.data())
            def attempt(case: schemathesis.Case, draw: st.DataObject) -> None:
                world.aim(case, draw)
                case.call_and_validate(session=client, checks=CHECKS)

            attempt()
    world.store.close()


def test_every_answer_is_described(tmp_path: Path) -> None:
    """Every operation tells what it is and what it may answer; every problem has an example."""
    document = create_app(Settings(data=tmp_path)).openapi()
    names = set()
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            assert operation["description" if operation.get("description") else "summary"], (verb, path)
            names.add(operation["operationId"])
            for status, answer in operation["responses"].items():
                assert answer["description"] and status.isdecimal(), (verb, path, status)
                if int(status) >= 400:
                    content = answer["content"]["application/problem+json"]
                    assert all(each["value"]["status"] == int(status) for each in content["examples"].values())
    assert len(names) == sum(len(verbs) for verbs in document["paths"].values())


@pytest.mark.parametrize("kind", list(JobKind))
def test_the_examples_work(models: Path, tmp_path: Path, kind: JobKind) -> None:
    """What the document gives as an example of a body is understood; only its models are not there."""
    app = create_app(Settings(data=tmp_path, model_roots=[models]))
    body = app.openapi()["paths"][f"/v1/{kind.plural}"]["post"]["requestBody"]["content"]
    with TestClient(app) as client:
        for media_type, content in body.items():
            for example in content["examples"].values():
                value = example["value"]
                sent = {"json": value} if media_type == "application/json" else {"content": value}
                answer = client.post(f"/v1/{kind.plural}?dry_run=true", headers={"Content-Type": media_type}, **sent)
                assert answer.status_code == 422 and answer.json()["code"] == "model-not-found", answer.text
