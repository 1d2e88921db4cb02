"""POST → worker process → files, over real HTTP; real models, real kills, both brokers."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from standardwebhooks import Webhook
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from merge_core.alignment.permutations import Permutations
from merge_core.analysis.document import AnalysisDocument, analyse
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import method_recipe, write_checkpoint, write_numbers
from tests.receivers import receiving
from tests.services import (
    Fault,
    Postgres,
    Service,
    eventually,
    free_port,
    is_alive,
    running_redis,
    running_s3,
    running_service,
    sha256_of,
    takes_less_than,
)

pytestmark = pytest.mark.xdist_group("service")
BROKERS = ("filesystem", pytest.param("redis", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and three random fine-tunes, in two shards each, and larger models that take seconds to merge."""
    transformers_logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("llamas")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=3, tie_word_embeddings=False, **shape)).to(
        torch.bfloat16
    )
    base.save_pretrained(folder / "base", max_shard_size="30KB")
    for i in range(3):
        tuned = LlamaForCausalLM(base.config).to(torch.bfloat16)
        tuned.load_state_dict(
            {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in base.state_dict().items()}
        )
        tuned.save_pretrained(folder / f"m{i}", max_shard_size="30KB")
    assert len(list((folder / "m0").glob("*.safetensors"))) == 2
    (folder / "old").symlink_to(folder / "m0")
    write_numbers(folder, base.state_dict())
    return folder


SLOWLY = {"WEIGHTSMITH_KERNELS": "plain"}
"""So that there is time to interrupt a merge; what it gives is compared with what the compiled kernels give."""
SOON_MISSED = {"WEIGHTSMITH_LEASE_SECONDS": "2", "WEIGHTSMITH_MAX_ATTEMPTS": "50"}
"""Who is silent for a moment has lost its job, which on a busy machine may be more often than the tests want."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that take seconds to merge by plain kernels: 24 million parameters in twelve tensors."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"model.layers.{i}.w": torch.randn(2000, 1000, generator=generator).bfloat16() for i in range(12)}
        write_checkpoint(folder / name, tensors, shards=2)
    return folder


@pytest.fixture(scope="module", params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that selects a broker."""
    if request.param == "filesystem":
        yield {}
    else:
        with running_redis(tmp_path_factory.mktemp("redis")) as url:
            yield {"REDIS_URL": url}


@pytest.fixture(scope="module")
def service(llamas: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service") / "data"
    with running_service(folder, llamas, WEIGHTSMITH_WEBHOOK_ALLOW="127.0.0.1") as service:
        yield service


def test_a_merge_is_verified_and_a_view_of_its_recipe_has_its_bytes(service: Service) -> None:
    recipe = method_recipe("ties-model", outputs={"max_shard_size": "40KB"})
    job = service.ended(service.post(recipe))
    weights = {path: sha256 for path, sha256 in service.files(job).items() if "safetensors" in path}

    verified = service.ended(service.http.post("/v1/verify", json={"job": job["id"], "all": True}).json())
    assert verified["status"] == "succeeded" and verified["warnings"] == []
    report = service.get(verified["urls"]["report"])["verification"]
    assert report["outcome"] == "agrees" and len(report["tensors"]) == job["plan"]["tensors"]

    view = service.ended(service.http.post("/v1/views", json=recipe).json())
    assert view["status"] == "succeeded", view["error"]
    read = {path: service.http.get(f"/hub/views/{view['id']}/resolve/main/{path}").content for path in weights}
    assert {path: hashlib.sha256(data).hexdigest() for path, data in read.items()} == weights


def test_an_analysis_is_the_library_s(service: Service, llamas: Path, tmp_path: Path) -> None:
    document = {"base_model": "base", "models": ["m0", "m1"], "density": 0.3}
    job = service.ended(service.http.post("/v1/analyses", json=document).json())
    assert job["status"] == "succeeded", job["error"]
    assert job["progress"]["tensors_done"] == job["plan"]["tensors"]

    artifact = analyse(AnalysisDocument.from_data(document), tmp_path / "out", roots=[llamas])
    assert service.files(job)["analysis.json"] == {file.path: file.sha256 for file in artifact.files}["analysis.json"]


OF_EACH_KIND = (
    *("linear", "slerp", "passthrough", "ties", "ties-model", "ties-paper", "dare_ties", "dare_linear-paper", "della"),
    *("breadcrumbs", "model_stock", "nuslerp", "sce", "pcb", "widen", "iso_c", "arcee_fusion", "half_reset"),
)
"""That every method's bytes are the library's is a law of `test_merge.py`; here is what a service adds."""


@pytest.mark.parametrize("title", OF_EACH_KIND)
def test_a_merged_llama_loads_with_every_key(service: Service, llamas: Path, tmp_path: Path, title: str) -> None:
    job = service.ended(service.post(method_recipe(title, outputs={"max_shard_size": "40KB"})))
    assert job["status"] == "succeeded", job["error"]
    folder = service.download(job, tmp_path / "merged")

    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)

    assert not any(loading.values()), loading
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert len(list(folder.glob("*.safetensors"))) > 1
    local = merge(Recipe.from_data(job["recipe"]), tmp_path / "local", roots=[llamas])
    assert {file.path: file.sha256 for file in local.files} == service.files(job), (
        "the service gives what the library gives"
    )


def test_an_alignment_and_an_aligned_merge(service: Service, llamas: Path, tmp_path: Path) -> None:
    """What is derived for a real Llama is found by a worker, and a merge finds the same on its way."""
    document = {"models": ["base", "m0"], "alignment": {"to": "first"}}
    job = service.ended(service.http.post("/v1/alignments", json=document).json())
    assert job["status"] == "succeeded", job["error"]
    files = service.files(job)
    assert files.keys() == {"alignment.safetensors", "alignment.yml", "report.json", "alignment.lock.json"}
    recipe = method_recipe("linear", alignment={"to": "first"}, models=[{"model": "base"}, {"model": "m0"}])
    merged = service.ended(service.post(recipe))
    assert merged["status"] == "succeeded", merged["error"]
    ours, theirs = (service.download(each, tmp_path / each["id"]) / "alignment.safetensors" for each in (job, merged))
    found, again = Permutations.open(ours), Permutations.open(theirs)
    assert sum(found.moved("m0").values()) == 0, "fine-tunes of one base stand in its order"
    assert found.spec == again.spec and len(found.spec.permutations) > 6


def test_small_jobs_share_a_child(service: Service) -> None:
    def children() -> set[int]:
        workers = {process.pid: process for process in service.worker_processes()}
        return {pid for pid, process in workers.items() if process.ppid() in workers}

    service.ended(service.post(method_recipe("linear")))
    before = children()
    for _ in range(3):
        assert service.ended(service.post(method_recipe("linear")))["status"] == "succeeded"
    assert before and children() == before


def test_a_webhook_hears_of_the_job_and_the_log_of_no_secret(service: Service) -> None:
    secret = service.get("/v1/webhook-secret")["secret"]
    with receiving() as receiver:
        url = f"http://127.0.0.1:{receiver.port}/hooks/private-path"
        headers = {"Webhook-Url": url, "Proxy-Authorization": "Bearer private-key", "Cookie": "private-cookie"}
        answer = service.http.post("/v1/merges?token=private-query", json=method_recipe("linear"), headers=headers)
        assert answer.status_code == 202, answer.text
        job = service.ended(answer.json())
        eventually(lambda: len(receiver.requests) == 2)
        told = [Webhook(secret).verify(body, headers) for _, headers, body in receiver.requests]
        deliveries = f"{job['urls']['self']}/deliveries"
        eventually(lambda: all(each["status"] == "delivered" for each in service.get(deliveries)["data"]))
    assert sorted(each["type"] for each in told) == ["merge.started", "merge.succeeded"]
    assert {each["data"]["id"] for each in told} == {job["id"]}
    log = service.log.read_text()
    assert "private" not in log and secret not in log and job["id"] in log


def test_progress_is_on_the_row(large: Path, tmp_path: Path) -> None:
    with running_service(tmp_path / "data", large, **SLOWLY) as service:
        job = service.post(method_recipe("dare_ties-paper"))
        running = eventually(lambda: (found := service.job(job))["progress"].get("bytes_read", 0) > 0 and found)
        assert running["status"] == "running" and running["phase"] and running["progress"]["bytes_read_total"] > 0
        assert running["started_at"] >= running["created_at"]
        ended = service.ended(job)
        assert ended["progress"]["tensors_done"] == 12 and ended["progress"]["fraction"] == 1.0


def test_a_failed_job_says_why_and_leaves_nothing(service: Service) -> None:
    write_checkpoint(service.models / "nan", {"good": torch.ones(5), "bad": torch.tensor([1.0, float("nan")])})
    before = service.artifacts()
    recipe = {"merge_method": "linear", "models": [{"model": "nan"}], "parameters": {"weight": 1}}
    job = service.ended(service.post(recipe))
    assert job["status"] == "failed" and job["error"]["code"] == "non-finite"
    assert "bad of nan holds NaN or infinity at element 1" in job["error"]["detail"]
    assert job["error"]["errors"][0]["tensor"] == "bad"
    assert service.artifacts() == before


@pytest.mark.faults
def test_cancel_takes_less_than_two_seconds_at_any_moment(large: Path, tmp_path: Path, broker: dict[str, str]) -> None:
    with running_service(tmp_path / "data", large, **SLOWLY, **broker) as service:

        def seconds_to_cancel(wait: float) -> float:
            job = service.post(method_recipe("dare_ties-paper"))
            eventually(lambda: service.job(job)["status"] == "running")
            time.sleep(wait)
            started = time.monotonic()
            assert service.http.post(job["urls"]["cancel"]).status_code in (200, 202)
            assert service.ended(job)["status"] == "canceled"
            took = time.monotonic() - started
            eventually(lambda: service.artifacts() == [])
            return took

        for wait in (0.0, 0.7, 2.0, 3.0):
            takes_less_than(2.0, lambda wait=wait: seconds_to_cancel(wait))


def _whole(large: Path, tmp_path: Path, recipe: dict[str, Any]) -> dict[str, str]:
    artifact = merge(Recipe.from_data(recipe), tmp_path / "whole", roots=[large])
    return {file.path: file.sha256 for file in artifact.files}


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_9_of_the_worker_at_random_points(large: Path, tmp_path: Path, broker: dict[str, str], seed: int) -> None:
    """The supervisor starts another worker, and the job goes on to the same bytes; nobody submits it again."""
    moments = random.Random(seed)
    recipe = method_recipe("ties-paper", outputs={"max_shard_size": "10MB"})
    with running_service(tmp_path / "data", large, **SLOWLY, **broker, WEIGHTSMITH_MAX_ATTEMPTS="50") as service:
        job = service.post(recipe)
        for kills in range(3):
            eventually(
                lambda kills=kills: service.job(job)["attempt"] > kills or service.job(job)["status"] == "succeeded"
            )
            time.sleep(moments.uniform(0, 4))
            service.kill_worker()
        ended = service.ended(job)
        assert ended["status"] == "succeeded", ended["error"]
        assert service.files(job) == _whole(large, tmp_path, recipe)
        assert service.artifacts() == [job["id"]]


@pytest.mark.faults
def test_kill_9_of_the_child_alone(large: Path, tmp_path: Path) -> None:
    """The worker lives and its child dies, as the kernel kills for memory: the job goes on when its lease runs out."""
    recipe = method_recipe("ties")
    with running_service(tmp_path / "data", large, **SLOWLY, **SOON_MISSED) as service:
        job = service.post(recipe)
        eventually(lambda: service.job(job)["progress"].get("bytes_read", 0) > 0)
        parent, child = sorted(service.worker_processes(), key=lambda process: process.create_time())[:2]
        assert child.ppid() == parent.pid
        child.kill()
        assert service.ended(job)["status"] == "succeeded"
        assert service.job(job)["attempt"] > 1
        assert service.files(job) == _whole(large, tmp_path, recipe)


@pytest.mark.faults
def test_a_child_that_hangs_is_replaced(large: Path, tmp_path: Path) -> None:
    """Stopped, as by a dead disk: its supervisor ends it when its lease has run out."""
    with running_service(tmp_path / "data", large, **SLOWLY, **SOON_MISSED) as service:
        job = service.post(method_recipe("ties"))
        eventually(lambda: service.job(job)["progress"].get("bytes_read", 0) > 0)
        for process in service.worker_processes():
            process.suspend()
        assert service.ended(job)["status"] == "succeeded"
        assert service.artifacts() == [job["id"]]


@pytest.mark.faults
def test_no_worker_outlives_a_service_killed_at_its_start(llamas: Path, tmp_path: Path) -> None:
    with running_service(tmp_path / "data", llamas) as service:
        before = service.worker_processes()
        service.kill_worker()
        workers = eventually(lambda: [worker for worker in service.worker_processes() if worker not in before])
        service.process.kill()
        service.process.wait()
        eventually(lambda: not any(map(is_alive, workers)))


@pytest.mark.faults
def test_a_database_locked_for_long_stops_nothing_for_good(llamas: Path, tmp_path: Path) -> None:
    with running_service(tmp_path / "data", llamas) as service:
        lock = sqlite3.connect(tmp_path / "data" / "jobs.sqlite", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        service.kill_worker()
        refused = service.http.post("/v1/merges", json=method_recipe("linear"))
        assert refused.status_code == 503 and refused.json()["code"] == "database-unavailable"
        assert service.http.get("/healthz").is_success
        lock.execute("ROLLBACK")
        lock.close()
        assert service.ended(service.post(method_recipe("linear")))["status"] == "succeeded"


@pytest.mark.faults
def test_kill_9_of_the_whole_service_then_a_new_one(large: Path, tmp_path: Path) -> None:
    recipe, temporary = method_recipe("ties-paper"), tmp_path / "tmp"
    short = {**SOON_MISSED, "TMPDIR": str(temporary)}
    temporary.mkdir()
    with running_service(tmp_path / "data", large, **SLOWLY, **short) as service:
        job = service.post(recipe)
        eventually(lambda: service.job(job)["progress"].get("bytes_read", 0) > 0)
        workers = service.worker_processes()
        service.process.kill()
        service.process.wait()
        eventually(lambda: not any(map(is_alive, workers)))
    assert not list(temporary.iterdir())
    with running_service(tmp_path / "data", large, **SLOWLY, **short) as service:
        assert service.ended(job)["status"] == "succeeded"
        assert service.files(job) == _whole(large, tmp_path, recipe)


@pytest.mark.faults
def test_a_lost_message_is_sent_again(llamas: Path, tmp_path: Path) -> None:
    """The job is in the database and its message nowhere, as after a worker died with it in hand."""
    from workers.jobs import JobStore
    from workers.settings import Settings

    store = JobStore(Settings(data=tmp_path / "data"))
    recipe = Recipe.from_data(method_recipe("linear"))
    lost = store.add(recipe.to_data(), {"tensors": 0})
    store.close()
    with running_service(tmp_path / "data", llamas, WEIGHTSMITH_REDELIVER_SECONDS="0.5") as service:
        assert service.ended({"urls": {"self": f"/v1/merges/{lost.id}"}})["status"] == "succeeded"


@pytest.mark.faults
def test_an_artifact_whose_job_did_not_hear_of_it_is_adopted(llamas: Path, tmp_path: Path) -> None:
    """The worker died after the artifact appeared and before the row said so."""
    from workers.jobs import JobStore
    from workers.queue import artifact_folder
    from workers.settings import Settings

    settings = Settings(data=tmp_path / "data", lease_seconds=0.1)
    store = JobStore(settings)
    recipe = Recipe.from_data(method_recipe("linear"))
    job = store.add(recipe.to_data(), {"tensors": 0})
    assert store.claim(job.id, "dead/1")
    artifact = merge(recipe, artifact_folder(settings, job.id), roots=[llamas])
    (artifact.folder / "journal.jsonl").touch()
    store.close()
    with running_service(tmp_path / "data", llamas) as service:
        adopted = {"urls": {"self": f"/v1/merges/{job.id}", "files": f"/v1/merges/{job.id}/files"}}
        assert service.ended(adopted)["status"] == "succeeded"
        assert service.files(adopted) == {file.path: file.sha256 for file in artifact.files}
        assert service.files(adopted).keys() == {path.name for path in artifact.folder.iterdir()}


@pytest.mark.faults
def test_stopping_the_service_hands_its_job_to_the_next(large: Path, tmp_path: Path) -> None:
    recipe = method_recipe("ties-paper")
    with running_service(tmp_path / "data", large, **SLOWLY) as service:
        job = service.post(recipe)
        eventually(lambda: service.job(job)["progress"].get("bytes_read", 0) > 0)
    with running_service(tmp_path / "data", large, **SLOWLY) as service:
        assert service.ended(job)["status"] == "succeeded"
        assert service.files(job) == _whole(large, tmp_path, recipe)
    shutil.rmtree(tmp_path / "data")


@pytest.mark.slow
def test_an_artifact_in_s3(large: Path, tmp_path: Path) -> None:
    """Stored before the row says so, served from there, gone with a cancel, and nothing of it stays on the disk."""
    recipe = method_recipe("linear", outputs={"max_shard_size": "20MB"})
    with running_s3() as bucket:
        with running_service(tmp_path / "data", large, **bucket.settings) as service:
            job = service.ended(service.post(recipe))
            assert job["status"] == "succeeded", job["error"]
            assert job["progress"]["tensors_done"] == 12
            folder = service.download(job, tmp_path / "merged")
            assert service.files(job) == _whole(large, tmp_path, recipe) == sha256_of(folder)
            assert {key.removeprefix(f"some/prefix/{job['id']}/") for key in bucket.objects()} == service.files(
                job
            ).keys()
            eventually(lambda: service.artifacts() == [])

            bucket.faults.append(lambda method, path: Fault(seconds=1) if "partNumber" in path else None)
            canceled = service.post(recipe)
            eventually(lambda: service.job(canceled)["phase"] == "storing")
            started = time.monotonic()
            service.http.post(canceled["urls"]["cancel"])
            assert service.ended(canceled)["status"] == "canceled" and time.monotonic() - started < 2.0
            bucket.faults.clear()
            eventually(lambda: service.artifacts() == [] and not any(canceled["id"] in key for key in bucket.objects()))

            killed = service.post(recipe)
            bucket.faults.append(lambda method, path: Fault(seconds=0.3) if "partNumber" in path else None)
            eventually(lambda: service.job(killed)["phase"] == "storing")
            service.kill_worker()
            bucket.faults.clear()
            assert service.ended(killed)["status"] == "succeeded"
            assert service.files(killed) == service.files(job)

            bucket.faults.append(lambda method, path: Fault(403, "AccessDenied"))
            refused = service.http.get(service.files_of(job)[0]["url"])
            assert refused.status_code == 503 and refused.json()["code"] == "storage-failed"
        assert "not-to-be-printed" not in service.log.read_text()


@pytest.mark.faults
def test_postgresql_and_redis_that_go_and_come_back(large: Path, tmp_path: Path, postgres: Postgres) -> None:
    """Every connection to the database dropped again and again; then a Redis that is killed while a worker has a
    message to acknowledge, and comes back empty.
    """
    recipe = method_recipe("linear")
    port = free_port()
    again = {"WEIGHTSMITH_REDELIVER_SECONDS": "0.5"}
    with postgres.database() as url, contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        broker = first.enter_context(running_redis(tmp_path / "first", port=port))
        where = {"DATABASE_URL": url, "REDIS_URL": broker}
        service = stack.enter_context(running_service(tmp_path / "data", large, **where, **SLOWLY, **again))

        job = service.post(recipe)
        eventually(lambda: service.job(job)["progress"].get("bytes_read", 0) > 0)
        for _ in range(3):
            assert postgres.drop_connections(url) > 0
            answer = service.http.get(job["urls"]["self"])
            assert answer.is_success or (answer.status_code == 503 and answer.headers["retry-after"])
            time.sleep(0.3)
        ended = eventually(lambda: _ended_or_none(service, job))
        assert ended["status"] == "succeeded" and ended["attempt"] == 1
        assert service.files(job) == _whole(large, tmp_path, recipe)

        running = service.post(recipe)
        eventually(lambda: service.job(running)["progress"].get("bytes_read", 0) > 0)
        first.close()
        assert service.ended(running)["status"] == "succeeded", "a job that runs needs no broker"
        waiting = service.post(recipe)
        assert service.http.get("/readyz").status_code == 503
        with running_redis(tmp_path / "second", port=port):
            assert service.ended(waiting)["status"] == "succeeded"
            assert service.files(waiting) == service.files(job)
    ours = [line for line in service.log.read_text().splitlines() if '"logger": "celery' not in line]
    assert not [line for line in ours if "Traceback" in line], "Celery tells of its broker at length; nobody else does"


def _ended_or_none(service: Service, job: dict[str, Any]) -> dict[str, Any] | None:
    """The job if it has ended; None also where the database cannot tell now."""
    answer = service.http.get(job["urls"]["self"])
    return answer.json() if answer.is_success and answer.json()["finished_at"] else None
