"""Results that are published: submitted over HTTP, merged, committed to the double, and the same bytes from there."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import yaml
from huggingface_hub import snapshot_download

from merge_core.artifact import LOCK_NAME
from tests.conftest import CONFIG, method_recipe, mixed_tensors, write_checkpoint
from tests.hub import Hub, running_hub
from tests.hub.conftest import LOWEST
from tests.services import Service, contents_of, eventually, running_service, sha256_of, takes_less_than

ROOT = Path(__file__).parents[2]
SHARD = 6000


def settings_for(hub: Hub, **more: str) -> dict[str, str]:
    allow = f"127.0.0.1,{httpx2.URL(hub.cdn).host}"
    return {"WEIGHTSMITH_HUB_ENDPOINT": hub.endpoint, "WEIGHTSMITH_ENDPOINT_ALLOW": allow, **more}


@contextmanager
def publishing(folder: Path, models: Path, *, xet: bool = False, **settings: str) -> Iterator[tuple[Hub, Service]]:
    """A Hub, and a service that knows alice's token."""
    with (
        running_hub(folder / "hub", xet=xet, part=20_000) as hub,
        running_service(folder / "data", models, **settings_for(hub, **settings)) as service,
    ):
        keep_token(service, hub.alice.token)
        yield hub, service


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def models_folder(folder: Path) -> Path:
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        write_checkpoint(folder / "models" / name, mixed_tensors(seed), shards=2, config=CONFIG)
    return folder / "models"


@pytest.fixture(scope="module")
def running(folder: Path, models_folder: Path) -> Iterator[tuple[Hub, Service]]:
    """One Hub and one service for all tests that leave them as they are; each has a repo of its own."""
    with publishing(folder, models_folder) as (hub, service):
        yield hub, service


@pytest.fixture(scope="module")
def expected(folder: Path, models_folder: Path) -> dict[str, str]:
    """What the recipe comes to, by path."""
    return plain(models_folder, folder / "plain")


def keep_token(service: Service, token: str, name: str = "hub") -> None:
    answer = service.http.put(f"/v1/credentials/{name}", json={"kind": "hub-token", "token": token})
    assert answer.is_success, answer.text


def recipe(repo: str, title: str = "linear", *, keep: bool = True, **hub: Any) -> dict[str, Any]:
    outputs: dict[str, Any] = {"max_shard_size": SHARD, "hub": {"repo": repo, **hub}}
    return method_recipe(title, outputs=outputs if keep else {**outputs, "keep": False})


def published(hub: Hub, repo: str, folder: Path, revision: str = "main") -> dict[str, str]:
    """sha256 by path of what the real client gets."""
    found = snapshot_download(repo, revision=revision, endpoint=hub.endpoint, token=hub.alice.token, cache_dir=folder)
    return {path: digest for path, digest in sha256_of(Path(found)).items() if path != ".gitattributes"}


def plain(models: Path, folder: Path, title: str = "linear") -> dict[str, str]:
    """sha256 by path of the same merge, which goes nowhere."""
    from merge_core.merge import merge
    from merge_core.recipe import Recipe

    merge(Recipe.from_data(method_recipe(title, outputs={"max_shard_size": SHARD})), folder, roots=[models])
    return sha256_of(folder)


def check_published(
    hub: Hub, service: Service, done: dict[str, Any], repo: str, cache: Path, expected: dict[str, str]
) -> None:
    """A job succeeded, in one commit that says which, and everybody gets the bytes from there."""
    assert done["status"] == "succeeded", done["error"]
    (commit,) = hub.commits(repo)
    url = f"{hub.endpoint}/{repo}/commit/{commit.sha}"
    assert done["hub"] == {"repo": repo, "commit": commit.sha, "url": url, "pr_url": None}
    assert commit.message.splitlines()[-1] == f"Merge-Job: {done['id']}" and commit.author == "alice"
    assert published(hub, repo, cache) == expected


@pytest.mark.parametrize("keep", [pytest.param(True, marks=pytest.mark.slow), False])
def test_merged_committed_and_the_same_from_there(
    running: tuple[Hub, Service], expected: dict[str, str], tmp_path: Path, keep: bool
) -> None:
    hub, service = running
    repo = f"alice/keep-{keep}"
    before = hub.uploads.copy()

    done = service.ended(service.post(recipe(repo, keep=keep)))

    check_published(hub, service, done, repo, tmp_path, expected)
    assert hub.repos[repo].private
    weights = {path for path in expected if path.endswith(".safetensors")}
    there = {path: digest for path, digest in expected.items() if keep or path not in weights}
    assert service.files(done) == there
    assert {path.name for path in (service.data / "artifacts" / done["id"]).iterdir()} == set(there)
    assert max((hub.uploads - before).values(), default=1) == 1
    assert service.get(done["urls"]["manifest"])["subject"] and LOCK_NAME in there
    told = yaml.safe_load(hub.read(repo, "mergekit_config.yml"))
    assert told["outputs"] == {"max_shard_size": SHARD}


@pytest.mark.slow
def test_by_xet_where_the_hub_takes_it(models_folder: Path, expected: dict[str, str], tmp_path: Path) -> None:
    with publishing(tmp_path, models_folder, xet=True) as (hub, service):
        done = service.ended(service.post(recipe("alice/xet", keep=False)))
        check_published(hub, service, done, "alice/xet", tmp_path / "cache", expected)
        large = [entry for entry in hub.repos["alice/xet"].files().values() if entry.is_lfs]
        assert large and all(entry.xet_hash for entry in large) and not hub.uploads


@pytest.mark.slow
@pytest.mark.parametrize("xet", [False, True])
def test_by_the_lowest_client_too(
    models_folder: Path, expected: dict[str, str], tmp_path: Path, lowest_client: Path, xet: bool
) -> None:
    """Whose names for what a commit is made of are the same."""
    path = os.pathsep.join(map(str, (lowest_client, ROOT)))
    with publishing(tmp_path, models_folder, xet=xet, PYTHONPATH=path) as (hub, service):
        for keep in (True, False):
            repo = f"alice/keep-{keep}"
            done = service.ended(service.post(recipe(repo, keep=keep)))
            check_published(hub, service, done, repo, tmp_path / f"cache-{keep}", expected)
        agents = {each.agent for each in hub.asked("/commit/")}
        assert agents and all(f"hf_hub/{LOWEST}" in agent for agent in agents)
        assert len(hub.commits("alice/keep-False")) == 1


def test_a_branch_a_pull_request_a_message(
    running: tuple[Hub, Service], expected: dict[str, str], tmp_path: Path
) -> None:
    hub, service = running
    repo = "alice/asked"
    sha = hub.put(repo, {"model.safetensors": b"old", "pytorch_model.bin": b"old", "notes.md": b"mine"}, private=False)
    asked = {"revision": "experiments/one", "commit_message": "Try this\n\nFor the reasons given."}

    on_branch = service.ended(service.post(recipe(repo, **asked)))
    by_request = service.ended(service.post(recipe(repo, create_pr=True, keep=False)))

    assert hub.repos[repo].branches["main"] == sha and not hub.repos[repo].private
    commit = hub.commits(repo, "experiments/one")[0]
    assert (commit.title, commit.parent) == ("Try this", sha)
    assert commit.message == f"For the reasons given.\n\nMerge-Job: {on_branch['id']}"
    # What a loader would have taken for the weights is gone, what is no weights stays.
    mine = {"notes.md": hashlib.sha256(b"mine").hexdigest()}
    assert published(hub, repo, tmp_path, "experiments/one") == expected | mine
    assert by_request["hub"]["pr_url"] == f"{hub.endpoint}/{repo}/discussions/1"
    assert published(hub, repo, tmp_path, "refs/pr/1") == expected | mine
    assert hub.commits(repo, "refs/pr/1")[0].sha == by_request["hub"]["commit"]


def test_the_same_again_makes_no_commit(running: tuple[Hub, Service], expected: dict[str, str]) -> None:
    hub, service = running
    first, second = (service.ended(service.post(recipe("alice/twice"))) for _ in range(2))
    assert first["hub"] == second["hub"]
    assert len(hub.commits("alice/twice")) == 1


@pytest.mark.slow
def test_outputs_of_other_kinds_go_too(running: tuple[Hub, Service]) -> None:
    hub, service = running
    outputs = {"kind": "delta", "hub": {"repo": "alice/delta"}, "keep": False}
    tuned = {"merge_method": "passthrough", "models": [{"model": "m0"}], "base_model": "base", "outputs": outputs}
    done = service.ended(service.post(tuned))
    assert done["status"] == "succeeded", done["error"]
    there = set(hub.repos["alice/delta"].files()) - {".gitattributes"}
    assert any(path.endswith(".safetensors") for path in there)
    assert set(service.files(done)) == {path for path in there if not path.endswith(".safetensors")}


@pytest.mark.slow
def test_the_hub_s_bad_moments_pass(running: tuple[Hub, Service], expected: dict[str, str], tmp_path: Path) -> None:
    """Errors that pass, and an answer that is lost after the commit was made."""
    hub, service = running
    repo = "alice/patient"
    hub.put(repo, {"notes.md": b"mine"})
    faults = [
        hub.fail("^PUT /upload/", status=503, after=1),
        hub.fail(f"^POST /api/models/{repo}/commit/", status=502, afterwards=True),
        hub.fail(f"^GET /api/models/{repo}/commits/", status=429, headers={"Retry-After": "1"}),
    ]
    try:
        done = service.ended(service.post(recipe(repo, title="ties", keep=False)))
    finally:
        hub.faults.clear()
    assert done["status"] == "succeeded", done["error"]
    assert [commit.title for commit in hub.commits(repo)].count("Upload") == 1 and len(hub.commits(repo)) == 2
    assert done["hub"]["commit"] == hub.commits(repo)[0].sha
    assert all(fault.seen for fault in faults)


@pytest.mark.slow
def test_a_branch_that_moved_is_looked_at_again(running: tuple[Hub, Service], expected: dict[str, str]) -> None:
    hub, service = running
    repo = "alice/moves"
    hub.put(repo, {"notes.md": b"mine"})
    held = hub.fail(f"^POST /api/models/{repo}/commit/", seconds=60)
    job = service.post(recipe(repo))
    eventually(lambda: held.seen)
    other = hub.put(repo, {"notes.md": b"yours"})  # while the commit, which names its parent, is on its way
    held.seconds = 0
    done = service.ended(job)
    hub.faults.clear()
    assert done["status"] == "succeeded", done["error"]
    assert hub.commits(repo)[0].parent == other and hub.read(repo, "notes.md") == b"yours"
    assert len(hub.asked(f"^POST /api/models/{repo}/commit/")) == 2


def test_a_hub_that_lists_other_bytes_is_told_of(running: tuple[Hub, Service]) -> None:
    hub, service = running

    def lie(*arguments: Any, **named: Any) -> Any:
        entry = honest(*arguments, **named)
        entry.told_sha256 = "0" * 64
        return entry

    honest, hub._entry = hub._entry, lie  # type: ignore[method-assign]
    try:
        done = service.ended(service.post(recipe("alice/lies")))
    finally:
        hub._entry = honest  # type: ignore[method-assign]
    assert done["status"] == "failed" and done["error"]["code"] == "upstream-hub-error", done
    assert "other than it was sent" in done["error"]["detail"] and done["hub"] is None


def refused(service: Service, wanted: dict[str, Any], query: str = "") -> tuple[int, str, str]:
    answer = service.http.post(f"/v1/merges{query}", json=wanted)
    return answer.status_code, answer.json()["code"], answer.json()["detail"]


def test_what_may_not_be_written_is_refused_at_once(running: tuple[Hub, Service]) -> None:
    hub, service = running
    hub.put("bob/public", {"a.txt": b"a"})
    hub.put("bob/private", {"a.txt": b"a"}, private=True)
    keep_token(service, hub.reader.token, "reader")
    keep_token(service, "hf_" + "unknown0" * 4, "unknown")
    count = len(service.get("/v1/merges?limit=100")["data"])

    for repo in ("bob/public", "bob/private", "bob/none"):
        status, code, detail = refused(service, recipe(repo))
        assert (status, code) == (403, "hub-forbidden") and repo in detail and "alice" in detail
    assert refused(service, recipe("alice/new"), "?hub_credential=reader")[:2] == (403, "hub-forbidden")
    assert refused(service, recipe("alice/new"), "?hub_credential=unknown")[:2] == (422, "hub-token-refused")
    assert refused(service, recipe("alice/new"), "?hub_credential=none")[:2] == (422, "credential-not-found")
    assert refused(service, recipe("alice/new"), "?hub_endpoint=https://elsewhere")[:2] == (403, "hub-not-allowed")
    assert refused(service, recipe("../new"))[:2] == (422, "invalid-recipe")
    assert refused(service, recipe("bob/none"), "?dry_run=true")[:2] == (403, "hub-forbidden")
    hub.fail("whoami", status=503, times=None)
    assert refused(service, recipe("alice/new"))[:2] == (503, "hub-unavailable")
    hub.faults.clear()
    assert service.http.delete("/v1/credentials/hub").is_success
    status, code, detail = refused(service, recipe("alice/new"))
    assert (status, code) == (422, "invalid-recipe") and "/v1/credentials/hub" in detail
    keep_token(service, hub.alice.token)

    # Anybody may ask by a pull request; nothing above made a job or a repo.
    asked = service.ended(service.post(recipe("bob/public", create_pr=True)))
    assert asked["hub"] and asked["hub"]["pr_url"], asked["error"]
    assert len(service.get("/v1/merges?limit=100")["data"]) == count + 1
    assert "alice/new" not in hub.repos and not hub.commits("bob/private")[1:]


@pytest.mark.parametrize("where", ["^PUT /", "^POST .*/commit/"])
def test_a_cancel_while_the_hub_says_nothing(running: tuple[Hub, Service], where: str) -> None:
    takes_less_than(2.0, lambda: seconds_to_cancel(*running, where))


def seconds_to_cancel(hub: Hub, service: Service, where: str) -> float:
    repo = "alice/canceled-" + ("put" if "PUT" in where else "commit")
    held = hub.fail(where, times=None, seconds=600.0)
    try:
        # What is at the Hub already, as the other's bytes may be, is not sent again.
        job = service.post(recipe(repo, "slerp" if "PUT" in where else "linear", keep=False))
        eventually(lambda: held.seen)
        began = time.monotonic()
        assert service.http.post(job["urls"]["cancel"]).is_success
        assert service.ended(job)["status"] == "canceled"
        took = time.monotonic() - began
    finally:
        hub.faults.clear()
    assert not hub.commits(repo) and not any(job["id"] in name for name in service.artifacts())
    eventually(lambda: not senders(service))
    return took


def senders(service: Service) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(service.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "workers.hub.sender" in process.cmdline():
                found.append(process)
    return found


# What dies, and goes on.


def check_sent_once(hub: Hub, repo: str, expected: dict[str, str], before: dict[str, int]) -> None:
    weights = {path: digest for path, digest in expected.items() if path.endswith(".safetensors")}
    sent = {path: hub.uploads[digest] - before.get(digest, 0) for path, digest in weights.items()}
    assert set(sent.values()) == {1}, sent


@pytest.mark.slow
def test_killed_while_it_sends(models_folder: Path, tmp_path: Path) -> None:
    """Slowly enough to be hit among its files, and once more in the commit."""
    expected = plain(models_folder, tmp_path / "plain", "dare_ties")
    with publishing(tmp_path, models_folder, WEIGHTSMITH_LEASE_SECONDS="2") as (hub, service):
        slow = hub.fail("^PUT /", times=None, seconds=0.2)
        held = hub.fail("^POST .*/commit/", times=1, seconds=60)
        job = service.post(recipe("alice/killed", "dare_ties", keep=False))
        eventually(lambda: len(hub.uploads) >= 2)
        service.kill_worker()
        eventually(lambda: held.seen)
        service.kill_worker()
        held.seconds = 0
        done = service.ended(job)

        check_published(hub, service, done, "alice/killed", tmp_path / "cache", expected)
        check_sent_once(hub, "alice/killed", expected, {})
        assert done["attempt"] >= 3 and slow.seen
        eventually(lambda: not senders(service))


@pytest.mark.slow
@pytest.mark.parametrize("xet", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_killed_at_any_time(models_folder: Path, tmp_path: Path, keep: bool, xet: bool) -> None:
    """Twelve jobs, killed up to three times each at random moments."""
    chance = random.Random(f"{keep} {xet}")
    settings = {"WEIGHTSMITH_LEASE_SECONDS": "2", "WEIGHTSMITH_MAX_ATTEMPTS": "20"}
    with publishing(tmp_path, models_folder, xet=xet, **settings) as (hub, service):
        hub.fail("^PUT /", times=None, seconds=0.1)
        for number in range(12):
            title = ("linear", "ties", "slerp", "dare_ties")[number % 4]
            repo, seed = f"alice/r{number}", number
            asked = recipe(repo, title, keep=keep) | {"seed": seed}
            moments = [chance.uniform(0, 4.0) for _ in range(chance.randint(1, 3))]
            before = dict(hub.uploads)
            job = service.post(asked)
            for moment in moments:
                time.sleep(moment)
                service.kill_worker()
            done = service.ended(job, 300)
            assert done["status"] == "succeeded", (moments, done)
            (commit,) = hub.commits(repo)
            assert commit.sha == done["hub"]["commit"]
            shas = hub.sha256(repo)
            lock = json.loads(hub.read(repo, LOCK_NAME))
            assert {file["path"]: file["sha256"] for file in lock["files"]}.items() <= shas.items()
            sent = [hub.uploads[digest] - before.get(digest, 0) for digest in shas.values()]
            assert max(sent) <= 1, moments
            found = published(hub, repo, tmp_path / f"cache-{number}")
            assert {path: digest for path, digest in shas.items() if path != ".gitattributes"} == found


def test_no_more_than_two_files_are_on_the_disk(running: tuple[Hub, Service]) -> None:
    """As the disk sees it, all the time that a job is at work and sends slowly."""
    hub, service = running
    slow = hub.fail("^PUT /", times=None, seconds=0.05)
    artifacts, over, seen = service.data / "artifacts", threading.Event(), [0]

    def watch() -> None:
        while not over.is_set():
            size = 0
            with contextlib.suppress(OSError):  # folders appear and take other names
                for path in artifacts.glob(".*/*.safetensors"):
                    with contextlib.suppress(OSError):
                        size += path.stat().st_blocks * 512
                seen.append(size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = service.ended(service.post(recipe("alice/narrow", "breadcrumbs", keep=False)))
    finally:
        over.set()
        watcher.join()
        hub.faults.clear()
    assert done["status"] == "succeeded" and slow.seen, done
    sizes = [shard["size"] for shard in done["plan"]["shards"]]
    most = max(-(-a // 4096) * 4096 + -(-b // 4096) * 4096 for a, b in itertools.pairwise(sizes))
    assert 0 < max(seen) <= most < sum(sizes)
    assert done["plan"]["bytes_on_disk"] == max(a + b for a, b in itertools.pairwise(sizes))


def test_the_token_is_nowhere_but_in_the_hub_s_ears(running: tuple[Hub, Service]) -> None:
    """In no file of the service's, no answer, no command line, no environment, and not on the CDN."""
    hub, service = running
    held = hub.fail("^POST .*/commit/", seconds=60)
    job = service.post(recipe("alice/silent", keep=False))
    eventually(lambda: held.seen or service.job(job)["error"])
    told = []
    for process in [*psutil.Process(service.process.pid).children(recursive=True), psutil.Process(service.process.pid)]:
        with contextlib.suppress(psutil.Error):
            told.append(f"{process.cmdline()} {process.environ()}")
    assert len(told) > 2 and any("workers.hub.sender" in each for each in told)
    held.seconds = 0
    done = service.ended(job)
    failed = service.ended(service.post(recipe("alice/silent", revision="x/y")))
    urls = [done["urls"][name] for name in ("self", "events", "logs", "recipe", "files", "manifest", "report")]
    told += [service.http.get(url).text for url in (*urls, failed["urls"]["self"], "/metrics", "/v1/credentials")]
    told += [answer.path for answer in hub.requests]
    bodies = [*contents_of(service.data), service.log.read_bytes()]
    assert len(bodies) > 5
    for token in (hub.alice.token, hub.reader.token):
        assert not any(token in each for each in told)
        assert not any(token.encode() in body for body in bodies)
    assert hub.leaks == []
