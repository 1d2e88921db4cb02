"""Searches over real HTTP: workers, an evaluator that reads candidates in the Hub's protocol, and what can go wrong."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
import safetensors.torch
import torch
import yaml
from safetensors.torch import load_file
from standardwebhooks import Webhook

from tests.app.test_hub import LLAMA, tiny_llama
from tests.conftest import write_checkpoint
from tests.golden import _compare
from tests.receivers import Received, receiving
from tests.services import Job, Service, eventually, running_service
from tests.workers.test_model_evaluators import write_world

pytestmark = pytest.mark.xdist_group("service")
GOLDEN = Path(__file__).parent / "data" / "golden"
OPEN_WITHIN = {"WEIGHTSMITH_EVALUATOR_ALLOW": "127.0.0.1", "WEIGHTSMITH_ALONE_SECONDS": "0", "WEIGHTSMITH_THREADS": "1"}
Answer = Callable[[dict[str, Any]], Any]


class Scorer:
    """An evaluator of somebody else's: answers metrics, or whatever it is told (bytes as they are), and writes down
    what it is asked.
    """

    def __init__(self, received: Received, answer: Answer) -> None:
        self.url, self.answer = f"http://127.0.0.1:{received.port}/score", answer
        self.asked: list[tuple[float, dict[str, str], dict[str, Any]]] = []
        received.answer = self._reply

    def _reply(self, handler: Any) -> None:
        headers, body = handler.message
        told = json.loads(body)
        self.asked.append((time.time(), headers, told))
        found = self.answer(told["data"])
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked may have been killed
            handler.wfile.write(text)


@contextmanager
def scoring(answer: Answer) -> Iterator[Scorer]:
    with receiving() as received:
        yield Scorer(received, answer)


def weights_of(told: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A candidate's weights, as a client of the Hub reads them."""
    url = f"{told['endpoint']}/{told['repo']}/resolve/main/model.safetensors"
    return safetensors.torch.load(httpx2.get(url, trust_env=False, timeout=60).content)


def submit(service: Service, document: Any) -> Job:
    answer = service.http.post("/v1/searches", json=document)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def trials_of(service: Service, job: Job) -> list[dict[str, Any]]:
    return list(service.get(f"/v1/searches/{job['id']}/trials?limit=1000")["data"])


def found_by(service: Service, job: Job) -> tuple[dict[str, Any], Any]:
    """The report of a search, and the recipe that it found."""
    report = service.http.get(f"/v1/searches/{job['id']}/files/search.json").json()
    return report, yaml.safe_load(service.http.get(f"/v1/searches/{job['id']}/files/recipe.yml").text)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Llamas, and the models of the golden soup."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", "m0", "m1"]):
        write_checkpoint(folder / name, tiny_llama(seed), config=LLAMA)
    for path in (GOLDEN / "inputs").glob("greedy_m*.safetensors"):
        shutil.copy(path, folder)
    return folder


COMMAND = """
import json, os, sys
request = json.load(open(os.environ["WEIGHTSMITH_REQUEST"]))
value = -(request["values"]["density"] - 0.6) ** 2 if os.listdir(sys.argv[1]) else "nothing there"
print(json.dumps({"score": value}))
"""


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    commands = json.dumps({"near": [sys.executable, "-S", "-c", COMMAND]})
    settings = OPEN_WITHIN | {"WEIGHTSMITH_EVALUATOR_COMMANDS": commands}
    with running_service(tmp_path_factory.mktemp("service") / "data", models, **settings) as found:
        yield found


def test_the_greedy_soup_of_the_authors_code(service: Service, tmp_path: Path) -> None:
    (case,) = [c for c in json.loads((GOLDEN / "manifest.json").read_text())["cases"] if c["id"] == "soup_greedy"]
    target = load_file(GOLDEN / case["inputs"]["target"])
    names = [Path(path).stem for path in case["inputs"]["models"]]

    def score(told: dict[str, Any]) -> Any:
        merged = weights_of(told)
        far = torch.cat([(merged[name] - target[name]).flatten() for name in sorted(target)])
        return {"metrics": {"nearness": -float((far * far).mean())}}

    with scoring(score) as scorer:
        search = {"method": "greedy_soup", "evaluator": {"http": {"url": scorer.url}}, "merge": True}
        search |= {"metrics": {"nearness": "maximize"}}
        models = [{"model": f"{name}.safetensors"} for name in names]
        job = submit(service, {"merge_method": "linear", "models": models, "search": search})
        ended = service.ended(job)
        assert ended["status"] == "succeeded", ended["error"]
        report, recipe = found_by(service, job)

        expected = case["expected"]
        scores = {f"model_{i}": report["trials"][i]["metrics"]["nearness"] for i in range(len(names))}
        assert scores == pytest.approx(expected["scores"])
        assert sorted(scores, key=scores.__getitem__)[::-1] == expected["order"]
        assert [f"model_{names.index(Path(m['model']).stem)}" for m in recipe["models"]] == expected["ingredients"]
        assert report["trials"][report["best"]]["metrics"]["nearness"] == pytest.approx(expected["final_score"])
        made = load_file(service.download(job, tmp_path / "out") / "model.safetensors")
        assert _compare(made, load_file(GOLDEN / case["output"]), case["tolerance"], {}) == ""

        assert len(scorer.asked) == len(report["trials"]) == 11
        secret = service.get("/v1/webhook-secret")["secret"]
        for (_, headers, told), trial in zip(scorer.asked, report["trials"], strict=True):
            Webhook(secret).verify(json.dumps(told, ensure_ascii=False, separators=(",", ":")), headers)
            assert told["data"]["trial"] == trial["number"] and told["type"] == "candidate.evaluate"
        assert service.get("/v1/views")["data"] == [] and service.artifacts() == [job["id"]]
        shown = scorer.asked[-1][2]["data"]["repo"]
        assert service.http.get(f"/hub/{shown}/resolve/main/model.safetensors").status_code == 404
        # The same once more: nothing is asked that is known.
        again = service.ended(submit(service, {"merge_method": "linear", "models": models, "search": search}))
        assert again["status"] == "succeeded" and len(scorer.asked) == 11
        assert [t["metrics"] for t in trials_of(service, again)] == [t["metrics"] for t in report["trials"]]


def over_llamas(scorer: Scorer | None = None, **keys: Any) -> dict[str, Any]:
    space = {"weight": {"low": 0, "high": 1, "per_model": True}, "density": {"low": 0.2, "high": 1}}
    search = {"method": "tpe", "space": space, "trials": 8}
    search |= {"evaluator": {"http": {"url": scorer.url}}} if scorer is not None else {}
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "m0"}, {"model": "m1"}],
        "parameters": {"weight": 0.5},
        "search": search | {"metrics": {"score": "maximize"}} | keys,
    }


def by_values(told: dict[str, Any]) -> Any:
    values = told["values"]
    return {"score": -((values["weight[0]"] - 0.3) ** 2) - (values["density"] - 0.6) ** 2}


def test_a_bad_evaluator_fails_the_search_with_what_it_said_and_loses_nothing(service: Service) -> None:
    answers: list[Any] = []
    given_up = threading.Event()
    bad = {3: {"score": "excellent"}, 4: b"<html>busy", 5: "late"}

    def turns_bad(told: dict[str, Any]) -> Any:
        answers.append(bad.get(len(answers)) or by_values(told))
        if answers[-1] == "late":
            given_up.wait(60)
        return answers[-1]

    with scoring(turns_bad) as scorer:
        evaluator = {"http": {"url": scorer.url, "timeout": 5}}
        job = submit(service, over_llamas(scorer, trials=5, parallel=2, seed=1, evaluator=evaluator))
        for said in ('{"score": "excellent"}', "answered no JSON: <html>busy", "no metrics within 5"):
            ended = service.ended(job)
            assert ended["status"] == "failed" and ended["error"]["code"] == "evaluation-failed"
            assert "trial 3 (" in ended["error"]["detail"] and said in ended["error"]["detail"]
            assert [trial["status"] for trial in trials_of(service, job)] == ["done", "done", "done", "open"]
            assert service.http.post(f"/v1/searches/{job['id']}/retry").status_code == 202
        given_up.set()
        ended = service.ended(job)
        assert ended["status"] == "succeeded", ended["error"]
        assert len(answers) == 5 + len(bad) and {trial["status"] for trial in trials_of(service, job)} == {"done"}
        assert ended["progress"]["trials_done"] == ended["progress"]["trials_total"] == 5


@pytest.mark.slow  # commands have tests of their own in tests/workers/test_evaluators.py
def test_a_command_scores_candidates(service: Service) -> None:
    space = {"density": {"low": 0.2, "high": 1, "step": 0.2}}
    document = over_llamas(method="grid", trials=None, space=space, evaluator={"command": {"name": "near"}})
    job = submit(service, document)
    ended = service.ended(job)
    assert ended["status"] == "succeeded", ended["error"]
    report, recipe = found_by(service, job)
    assert recipe["parameters"] == {"weight": 0.5, "density": 0.6} and report["best"] == 2
    assert [trial["values"]["density"] for trial in report["trials"]] == [0.2, 0.4, 0.6, 0.8, 1.0]
    refused = service.http.post("/v1/searches", json=document | {"merge_method": "tiess"})
    assert refused.status_code == 422 and "did you mean ties?" in refused.text
    merge = service.http.post("/v1/merges", json=document)
    assert merge.status_code == 422 and "job of its own kind" in merge.text
    manifest = service.get(f"/v1/searches/{job['id']}/manifest")
    assert {each["name"] for each in manifest["subject"]} == {"recipe.yml", "search.json", "search.lock.json"}
    assert service.get(f"/v1/searches/{job['id']}/report")["status"] == "succeeded"


@pytest.mark.slow  # what is measured is held in tests/workers/test_model_evaluators.py
def test_a_worker_scores_by_perplexity(tmp_path: Path) -> None:
    world = write_world(tmp_path / "models")
    search = {"method": "grid", "space": {"lambda": {"low": 0, "high": 1, "points": 3}}, "merge": True}
    search |= {"evaluator": {"perplexity": {"file": "text.txt"}}}
    recipe = {"merge_method": "task_arithmetic", "base_model": "lm", "parameters": {"weight": 1}}
    with running_service(tmp_path / "data", world) as service:
        job = submit(service, recipe | {"models": [{"model": "other"}], "search": search})
        ended = service.ended(job)
        assert ended["status"] == "succeeded", ended["error"]["detail"]
        report, _ = found_by(service, job)
        known = [trial["metrics"]["perplexity"] for trial in report["trials"]]
        assert len(set(known)) == 3 and known[report["best"]] == min(known)
        assert {"model.safetensors", "tokenizer.json", "merge.lock.json"} <= service.files(job).keys()
        nowhere = recipe | {
            "models": [{"model": "other"}],
            "search": search | {"evaluator": {"perplexity": {"file": "no"}}},
        }
        refused = service.http.post("/v1/searches", json=nowhere)
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["pointer"] == "#/search/evaluator/perplexity/file"


def kill_workers(service: Service) -> int:
    """`kill -9` of every worker and its child, at once; how many."""
    found = service.worker_processes()
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return len(found)


def survives(service: Service, scorer: Scorer, document: Any, trials: int, kills: int) -> None:
    """A search goes on whatever is killed, and asks nothing again that it knew when that was asked."""
    job = submit(service, document)
    for number in range(1, kills + 1):
        enough = trials * number // (kills + 2)
        eventually(lambda enough=enough: sum(t["status"] == "done" for t in trials_of(service, job)) >= enough)
        assert kill_workers(service) >= 2
    ended = service.ended(job)
    assert ended["status"] == "succeeded", ended["error"]
    assert ended["attempt"] >= 2 and ended["progress"]["trials_done"] == trials
    rows = trials_of(service, job)
    assert [row["number"] for row in rows] == list(range(trials)) and {row["status"] for row in rows} == {"done"}
    finished = {f"msg_{row['digest'][:32]}": row["finished_at"] for row in rows}
    for at, headers, _ in scorer.asked:
        assert at <= datetime.fromisoformat(finished[headers["webhook-id"]]).timestamp()
    # What was in a worker's hands when it died is asked again, and nothing else.
    assert len(scorer.asked) <= len(set(finished)) + 2 * kills
    again = service.ended(submit(service, document))
    report, _ = found_by(service, job)
    assert [row["values"] for row in trials_of(service, again)] == [trial["values"] for trial in report["trials"]]
    assert len({headers["webhook-id"] for _, headers, _ in scorer.asked}) == len(set(finished))


@pytest.mark.slow  # the law itself is held in tests/merge_core/test_search.py, without processes that are killed
def test_a_search_survives_its_workers(models: Path, tmp_path: Path) -> None:
    settings = OPEN_WITHIN | {"WEIGHTSMITH_WORKERS": "2", "WEIGHTSMITH_KERNELS": "plain"}
    with scoring(by_values) as scorer, running_service(tmp_path / "data", models, **settings) as service:
        survives(service, scorer, over_llamas(scorer, trials=6, parallel=3), 6, 1)


@pytest.mark.slow
def test_a_search_of_forty_trials_survives_its_workers(models: Path, tmp_path: Path) -> None:
    def slowly(told: dict[str, Any]) -> Any:
        time.sleep(0.2)
        return by_values(told)

    settings = OPEN_WITHIN | {"WEIGHTSMITH_WORKERS": "2", "WEIGHTSMITH_KERNELS": "plain"}
    with scoring(slowly) as scorer, running_service(tmp_path / "data", models, **settings) as service:
        survives(service, scorer, over_llamas(scorer, trials=40), 40, 3)
        assert len({headers["webhook-id"] for _, headers, _ in scorer.asked}) == 40
        assert max(Counter(headers["webhook-id"] for _, headers, _ in scorer.asked).values()) <= 4
