"""Two users: nothing of one is visible or changeable to the other, through any route.

The routes are read from the OpenAPI document. One that is added is tried with everything that there is of the other
user; one with a parameter that is not known here fails the test until it is said what of hers to put there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from app.auth import needed
from app.main import create_app
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.conftest import method_recipe, mixed_tensors, write_checkpoint
from workers.jobs import JobKind, JobStore
from workers.keys import USUAL, KeyRing
from workers.queue import artifact_folder
from workers.settings import Settings

PARAMETERS = {"job_id", "path", "key_id", "name", "delivery_id", "code", "owner", "shelf", "repo", "revision"}
"""What may stand in a path; see `World.values`."""
SEARCH: dict[str, Any] = {
    "method": "greedy_soup",
    "evaluator": {"command": {"name": "score"}},
    "metrics": {"score": "maximize"},
}
CALIBRATION: dict[str, Any] = {
    "merge_method": "atlas",
    "base_model": "runs",
    "models": [{"model": "runs-too"}],
    "calibrate": {"method": "atlas", "data": [{"file": "data.txt"}]},
}
REQUEST_ID = {"X-Request-ID": "the-same"}


@dataclass
class User:
    """What one of the two has. `mark` is in every name that can be given: wherever it is seen, it is theirs."""

    name: str
    mark: str
    headers: dict[str, str]
    jobs: dict[JobKind, list[str]] = field(default_factory=lambda: {kind: [] for kind in JobKind})
    keys: list[str] = field(default_factory=list)
    credentials: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)
    made: int = 0

    def fresh(self) -> str:
        self.made += 1
        return f"{self.mark}-{self.made}"

    def traces(self) -> list[str]:
        """What must not be seen of them: their ids, their secrets, all names that they gave."""
        return [*(job for jobs in self.jobs.values() for job in jobs), *self.keys, *self.secrets, self.mark]


class World:
    """A service with keys, two users, and what they do."""

    def __init__(self, folder: Path) -> None:
        for seed, name in enumerate(["base", "m0", "m1", "m2"]):
            write_checkpoint(folder / "models" / name, mixed_tensors(seed))
        recipe = Recipe.from_data(method_recipe("linear"))
        merge(recipe, folder / "models" / "published", roots=[folder / "models"])
        for seed, name in enumerate(["runs", "runs-too"]):
            write_checkpoint(folder / "models" / name, mixed_tensors(seed), config={"model_type": "llama"})
            (folder / "models" / name / "tokenizer.json").write_text("{}")
        (folder / "models" / "data.txt").write_text("a text")
        self.settings = Settings(
            data=folder / "data",
            model_roots=[folder / "models"],
            auth="keys",
            evaluator_commands={"score": ["true"]},
        )
        self.client = TestClient(create_app(self.settings))
        self.client.__enter__()
        self.store = JobStore(self.settings)
        self.pairs = 0
        self.users = self.new_pair()
        self.document = self.client.get("/openapi.json").json()
        self.operations = [
            (verb.upper(), path)
            for path, verbs in self.document["paths"].items()
            for verb in verbs
            if needed(verb.upper(), path) is not None
        ]

    def close(self) -> None:
        self.store.close()
        self.client.__exit__(None, None, None)

    def new_pair(self) -> list[User]:
        """Two who are new here."""
        self.pairs += 1
        return [self._user(f"{name}{self.pairs}") for name in ("ann", "ben")]

    def _user(self, name: str) -> User:
        key, secret = KeyRing(self.store).create(name, USUAL, name=f"mark-of-{name}-")
        return User(name, f"mark-of-{name}-", {"Authorization": f"Bearer {secret}"}, keys=[key.id], secrets=[secret])

    def ask(self, user: User, verb: str, path: str, **more: Any) -> httpx2.Response:
        headers = {**user.headers, **REQUEST_ID, **more.pop("headers", {})}
        return self.client.request(verb, path, headers=headers, **more)

    # What they do.

    def make_job(self, user: User, kind: JobKind) -> str:
        mark = user.fresh()
        document = {
            JobKind.MERGE: method_recipe("linear", name=mark),
            JobKind.ALIGNMENT: {"models": ["m0", "m1"], "alignment": {"to": "first", "spec": _no_permutations()}},
            JobKind.PATCH: {
                "operation": "extract",
                "base_model": "base",
                "clean": "m0",
                "corrupted": ["m1"],
                "layers": 1,
            },
            JobKind.VERIFICATION: {"model": "published", "sample": 1},
            JobKind.VIEW: method_recipe("linear", name=mark),
            JobKind.SEARCH: method_recipe("linear", name=mark) | {"search": SEARCH},
            JobKind.ANALYSIS: {"base_model": "base", "models": ["m0", "m1"]},
            JobKind.CALIBRATION: CALIBRATION | {"name": mark},
        }[kind]
        query = {"label": f"owner:{mark}"}
        answer = self.ask(
            user, "POST", f"/v1/{kind.plural}", json=document, params=query, headers={"Idempotency-Key": mark}
        )
        assert answer.status_code == 202, answer.text
        user.jobs[kind].append(answer.json()["id"])
        return str(answer.json()["id"])

    def finish(self, user: User) -> str:
        """A merge that has succeeded, as by a worker, with its files."""
        job_id = self.make_job(user, JobKind.MERGE)
        lease = self.store.claim(job_id, "w/1")
        assert lease is not None
        recipe = Recipe.from_data(lease.recipe)
        artifact = merge(recipe, artifact_folder(self.settings, job_id), roots=self.settings.roots)
        self.store.succeed(lease, files=[vars(file) for file in artifact.files], warnings=[], progress={})
        return job_id

    def make_key(self, user: User) -> str:
        made = self.ask(user, "POST", "/v1/api-keys", json={"name": user.fresh()}).json()
        user.keys.append(made["id"])
        user.secrets.append(made["secret"])
        return str(made["id"])

    def put_credential(self, user: User) -> str:
        name, token = user.fresh(), f"hf_secret{user.fresh()}"
        answer = self.ask(user, "PUT", f"/v1/credentials/{name}", json={"kind": "hub-token", "token": token})
        assert answer.status_code == 204, answer.text
        user.credentials.append(name)
        user.secrets.append(token)
        return name

    def put_data(self, user: User) -> str:
        name = user.fresh()
        answer = self.ask(user, "PUT", f"/v1/data/{name}", content=b"{}")
        assert answer.status_code == 200, answer.text
        user.data.append(name)
        return name

    # What they see.

    def view(self, user: User) -> dict[str, Any]:
        """All that there is to see for a user, but what changes by looking at it."""
        pages = [f"/v1/{kind.plural}" for kind in JobKind] + ["/v1/api-keys", "/v1/credentials", "/v1/data"]
        seen = {path: self.ask(user, "GET", path, params={"limit": 100}) for path in pages}
        for kind, jobs in user.jobs.items():
            for job in jobs:
                for part in ("", "/files", "/recipe", "/manifest", "/report", "/logs", "/events"):
                    path = f"/v1/{kind.plural}/{job}{part}"
                    if not part or f"/v1/{kind.plural}/{{job_id}}{part}" in self.document["paths"]:
                        seen[path] = self.ask(user, "GET", path)
        told = {}
        for path, answer in seen.items():
            told[path] = (answer.status_code, re.sub(r'"used_at":"[^"]*"', "", answer.text))
        return told

    def things(self, other: User) -> Iterator[dict[str, str]]:
        """What of another's to put into the parameters of a path, one thing after the other."""
        for kind, jobs in other.jobs.items():
            for job in jobs:
                for path in ("model.safetensors", "config.json"):
                    yield {"job_id": job, "path": path, "kind": kind, "delivery_id": job}
                    yield {"shelf": kind.plural, "repo": job, "path": path, "revision": "main"}
        for key in other.keys:
            yield {"key_id": key, "code": key}
        for name in (*other.credentials, *other.data):
            yield {"name": name}
        yield {"owner": other.name, "name": other.name, "code": other.name}

    def fitting(self, other: User, path: str) -> list[dict[str, str]]:
        """Which things of another's a path is tried with: all that fit, and of jobs of other kinds one."""
        names = set(_parameters(path))
        assert names <= PARAMETERS, f"{path}: say in `World.things` what of another's to put there"
        found, kinds = [], {kind.plural: kind for kind in JobKind}
        seen: set[str] = set()
        for thing in self.things(other):
            key = "".join(thing[name] for name in sorted(names & thing.keys()))
            if "job_id" in names and thing.get("kind") != kinds[path.split("/")[2]]:
                key = "another kind"
            if names <= thing.keys() and key not in seen:
                seen.add(key)
                found.append(thing)
        return found

    def pry(self, user: User, other: User, verb: str, path: str, thing: Mapping[str, str]) -> None:
        """One operation on one thing of another's: answered as for what is not there, and tells nothing."""
        names = _parameters(path)
        filled, missing = path, path
        for name in names:
            theirs = thing[name]
            filled = filled.replace(f"{{{name}}}", theirs)
            missing = missing.replace(f"{{{name}}}", _no_such(theirs) if name != "path" else theirs)
        more = self._more(verb, path, other, thing)
        answer = self.ask(user, verb, filled, **more)
        if verb in ("PUT", "POST") and answer.is_success:
            self._is_their_own(user, other, verb, path, filled, answer)
            return
        assert answer.status_code < 500, answer.text
        told = answer.text
        for name in names:
            told = told.replace(thing[name], "…")
        if names:
            again = self.ask(user, verb, missing, **self._more(verb, path, other, thing))
            expected = again.text
            for name in names:
                expected = expected.replace(_no_such(thing[name]), "…").replace(thing[name], "…")
            assert (answer.status_code, told) == (again.status_code, expected), f"{verb} {path} tells them apart"
            assert not answer.is_success or not set(names) & {"job_id", "key_id", "repo"}, (
                f"{verb} {path}: {answer.text[:300]}"
            )
        for trace in other.traces():
            assert trace not in told, f"{verb} {path} shows {trace} of {other.name}'s"

    def _more(self, verb: str, path: str, other: User, thing: Mapping[str, str]) -> dict[str, Any]:
        """A body that the route takes, and query parameters and headers that are another's."""
        more: dict[str, Any] = {"headers": {}}
        found = self.document["paths"][path][verb.lower()]
        for parameter in found.get("parameters", []):
            value = {
                "owner": other.name,
                "after": thing.get("job_id", "x"),
                "cursor": thing.get("repo", "x"),
                "label": f"owner:{other.mark}-1",
            }.get(parameter["name"])
            if parameter["in"] == "query" and value is not None and verb == "GET":
                more.setdefault("params", {})[parameter["name"]] = value
        more["headers"] |= {"If-Match": "*", "Last-Event-ID": "0"}
        if path == "/v1/merges":
            more["headers"]["Idempotency-Key"] = f"{other.mark}-1"
        if path in BODIES:
            more["json"] = BODIES[path]
        elif "requestBody" in found:
            more["json"] = method_recipe("linear")
        return more

    def _is_their_own(
        self, user: User, other: User, verb: str, path: str, filled: str, answer: httpx2.Response
    ) -> None:
        """What they made is theirs, whatever of the other's they named on the way."""
        for trace in other.traces():
            shown = answer.text + str(answer.headers)
            assert trace not in shown.replace(filled, "").replace(f'"{filled.rpartition("/")[2]}"', ""), (
                f"{verb} {path} shows {trace} of {other.name}'s"
            )
        if "{" not in path and answer.status_code in (201, 202):
            made = answer.json()["id"]
            if path == "/v1/api-keys":
                user.keys.append(made)
                user.secrets.append(answer.json()["secret"])
            else:
                user.jobs[next(kind for kind in JobKind if kind.plural in path)].append(made)
        elif path in ("/v1/credentials/{name}", "/v1/data/{name}"):
            self.ask(user, "DELETE", filled)
        else:
            assert path.startswith("/v1/recipes:") or answer.status_code == 200, f"{verb} {path} made something"


BODIES: dict[str, Any] = {
    "/hub/api/models/{shelf}/{repo}/paths-info/{revision}": {"paths": ["config.json"]},
    "/v1/api-keys": {},
    "/v1/credentials/{name}": {"kind": "hub-token", "token": "hf_of_the_pryer"},
    "/v1/patches": {"operation": "extract", "base_model": "base", "clean": "m0", "corrupted": ["m1"], "layers": 1},
    "/v1/alignments": {"models": ["m0", "m1"], "alignment": {"to": "first"}},
    "/v1/verify": {"model": "published", "sample": 1},
}


def _parameters(path: str) -> list[str]:
    return re.findall(r"\{(\w+)(?::\w+)?\}", path)


def _no_permutations() -> dict[str, Any]:
    spec: dict[str, Any] = {name: [None] * len(tensor.shape) for name, tensor in mixed_tensors(0).items()}
    for layer in range(3):
        spec[f"model.layers.{layer}.mlp.up_proj.weight"] = [f"P{layer}", None]
        spec[f"model.layers.{layer}.mlp.down_proj.weight"] = [None, f"P{layer}"]
    return spec


BODIES["/v1/alignments"] = {"models": ["m0", "m1"], "alignment": {"to": "first", "spec": _no_permutations()}}


def _no_such(theirs: str) -> str:
    """A name of the same form of which there is none."""
    return theirs[:4] + "".join("z" if letter != "z" else "y" for letter in theirs[4:])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()


def test_every_route_on_everything_of_the_other_s(world: World) -> None:
    """Whatever state it is in: queued, canceled, failed, finished, deleted."""
    ann, ben = world.users
    for user in world.users:
        jobs = [world.make_job(user, kind) for kind in JobKind]
        world.finish(user)
        failing = world.store.claim(world.make_job(user, JobKind.MERGE), "w/2")
        assert failing is not None
        world.store.fail(failing, {"code": "non-finite", "title": user.mark, "detail": user.mark, "retryable": False})
        world.ask(user, "POST", f"/v1/merges/{world.make_job(user, JobKind.MERGE)}/cancel")
        assert all(jobs) and world.make_key(user) and world.put_credential(user) and world.put_data(user)
    assert len(world.operations) >= 20
    before, tried = world.view(ann), 0
    for verb, path in world.operations:
        fitting = world.fitting(ann, path)
        assert fitting, f"{path}: there is nothing of another's to put there"
        for thing in fitting:
            world.pry(ben, ann, verb, path, thing)
            tried += 1
    assert tried > 100
    assert world.view(ann) == before, "what one saw before, one sees still"


def test_a_name_may_be_both_s(world: World) -> None:
    ann, ben = world.users
    for user in world.users:
        body = {"kind": "hub-token", "token": f"hf_token_of_{user.name}"}
        assert world.ask(user, "PUT", "/v1/credentials/same", json=body).status_code == 204
    assert world.ask(ben, "DELETE", "/v1/credentials/same").status_code == 204
    assert world.ask(ann, "GET", "/v1/credentials/same").status_code == 200
    same = {"Idempotency-Key": "the-same-key"}
    jobs = [
        world.ask(user, "POST", "/v1/merges", json=method_recipe("linear"), headers=same).json()["id"]
        for user in world.users
    ]
    assert jobs[0] != jobs[1]
    for user, job in zip(world.users, jobs, strict=True):
        user.jobs[JobKind.MERGE].append(job)


def test_two_users_whatever_they_do(world: World) -> None:
    """Any sequence of what they may do with their own, with attempts at the other's in between."""

    class TwoUsers(RuleBasedStateMachine):
        which = st.sampled_from((0, 1))

        def __init__(self) -> None:
            super().__init__()
            self.users = world.new_pair()
            self.seen = [world.view(user) for user in self.users]

        @rule(who=which, kind=st.sampled_from(JobKind))
        def make(self, who: int, kind: JobKind) -> None:
            world.make_job(self.users[who], kind)
            self._did(who)

        @rule(who=which)
        def make_key(self, who: int) -> None:
            world.make_key(self.users[who])
            self._did(who)

        @rule(who=which)
        def put_credential(self, who: int) -> None:
            world.put_credential(self.users[who])
            world.put_data(self.users[who])
            self._did(who)

        @rule(who=which, any_of=st.randoms(), what=st.sampled_from(["cancel", "retry", ""]))
        def change(self, who: int, any_of: Any, what: str) -> None:
            mine = [(kind, job) for kind, jobs in self.users[who].jobs.items() for job in jobs]
            if mine:
                kind, job = any_of.choice(mine)
                path = f"/v1/{kind.plural}/{job}"
                world.ask(self.users[who], "POST" if what else "DELETE", f"{path}/{what}" if what else path)
                self._did(who)

        @rule(who=which, tries=st.lists(st.tuples(st.sampled_from(world.operations), st.randoms()), max_size=5))
        def pry(self, who: int, tries: list[tuple[tuple[str, str], Any]]) -> None:
            other = self.users[1 - who]
            for operation, any_of in tries:
                if fitting := world.fitting(other, operation[1]):
                    world.pry(self.users[who], other, *operation, any_of.choice(fitting))
            self._did(who)

        def _did(self, who: int) -> None:
            """Whoever did something sees it; the other sees what was there before, and nothing of this."""
            seen = [world.view(user) for user in self.users]
            assert seen[1 - who] == self.seen[1 - who]
            for told, other in zip(seen, self.users[::-1], strict=True):
                assert not [trace for trace in other.traces() if trace in json.dumps(told)]
            self.seen = seen

    TwoUsers.TestCase.settings = settings(
        max_examples=3, stateful_step_count=6, deadline=None, suppress_health_check=list(HealthCheck)
    )
    TwoUsers.TestCase().runTest()
