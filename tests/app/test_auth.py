"""Who may come in: keys, scopes, loopback, other sites' pages."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner, Result
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from app.auth import Doors, doors_for, is_loopback, needed
from app.cli import main
from app.main import create_app
from tests.conftest import method_recipe
from tests.services import running_service
from workers.jobs import JobStore
from workers.keys import EVERYTHING, USUAL, KeyRing, Scope, new_secret
from workers.settings import Settings
from workers.tables import ApiKey

Headers = dict[str, str]


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", model_roots=[models], auth="keys")


@pytest.fixture
def store(settings: Settings) -> Iterator[JobStore]:
    store = JobStore(settings)
    yield store
    store.close()


@pytest.fixture
def ring(store: JobStore) -> KeyRing:
    return KeyRing(store)


@pytest.fixture
def client(settings: Settings, store: JobStore) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def bearer(secret: str) -> Headers:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def key(ring: KeyRing) -> Callable[..., Headers]:
    """Makes a key and gives the headers that show it."""

    def make(owner: str = "ann", *scopes: Scope, **more: Any) -> Headers:
        return bearer(ring.create(owner, scopes or USUAL, **more)[1])

    return make


def operations(client: TestClient) -> list[tuple[str, str]]:
    paths = client.get("/openapi.json").json()["paths"]
    return [(verb.upper(), path) for path, verbs in paths.items() for verb in verbs]


def ask(client: TestClient, verb: str, path: str, **more: Any) -> httpx2.Response:
    return client.request(verb, re.sub(r"\{\w+\}", "x", path), **more)


OPEN = {"/healthz", "/readyz", "/v1/methods", "/v1/methods/{name}", "/v1/problems", "/v1/problems/{code}"}


def test_every_route_asks_for_a_key_but_those_that_tell_nothing_of_anybody(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    seen = operations(client)
    assert len(seen) > 15
    for verb, path in seen:
        answer = ask(client, verb, path)
        described = document["paths"][path][verb.lower()]
        if path in OPEN:
            assert answer.status_code != 401 and "security" not in described, path
        else:
            assert answer.status_code == 401 and answer.json()["code"] == "unauthorized", path
            assert answer.headers["www-authenticate"].startswith("Bearer ")
            assert described["security"] and {"401", "403"} <= described["responses"].keys(), path
    assert client.get("/v1/nowhere").status_code == 401, "what there is, is not told to strangers"
    assert client.get("/docs").status_code == 200


def test_every_route_needs_its_scope(client: TestClient, key: Callable[..., Headers]) -> None:
    for verb, path in operations(client):
        wanted = needed(verb, path)
        if wanted is None or wanted not in EVERYTHING:
            continue
        for scope in EVERYTHING:
            answer = ask(client, verb, path, headers=key("ann", scope))
            if scope in (wanted, Scope.ADMIN):
                assert answer.status_code not in (401, 403), (verb, path, scope, answer.text)
            else:
                assert answer.status_code == 403 and answer.json()["code"] == "forbidden", (verb, path, scope)
                assert f'scope="{wanted}"' in answer.headers["www-authenticate"] and wanted in answer.json()["detail"]


def test_jobs_of_every_kind_and_their_files_have_scopes() -> None:
    for kind in ("merges", "alignments", "patches"):
        assert needed("GET", f"/v1/{kind}") == needed("HEAD", f"/v1/{kind}/x/events") == Scope.MERGES_READ
        assert needed("POST", f"/v1/{kind}") == needed("DELETE", f"/v1/{kind}/x") == Scope.MERGES_WRITE
        assert needed("GET", f"/v1/{kind}/x/files") == needed("GET", f"/v1/{kind}/x/files/a/b") == Scope.FILES_READ
    for unheard in ("/v1/anything", "/v2/merges", "/v1/merges.json", "//v1/merges", "/v1/recipes:", "/metrics", ""):
        assert needed("GET", unheard) == Scope.ADMIN


BAD: dict[str, Any] = {
    "another kind": {"Authorization": "Basic dTpw"},
    "no kind": {"Authorization": new_secret()},
    "nothing": {"Authorization": ""},
    "only the kind": {"Authorization": "Bearer"},
    "unknown": bearer(new_secret()),
    "too short": bearer("wsk_abc"),
    "too long": bearer(new_secret() * 1000),
    "other letters": {"Authorization": "Bearer wsk_\u00e9\u00ff".encode("latin-1")},
    "quotes": bearer("wsk_' OR 1=1 --"),
}


@pytest.mark.parametrize("title", BAD)
def test_a_header_that_is_no_key_is_refused(client: TestClient, title: str) -> None:
    answer = client.get("/v1/merges", headers=BAD[title])
    assert answer.status_code == 401 and 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert answer.headers["content-type"] == "application/problem+json"


def test_two_headers_are_refused(client: TestClient, key: Callable[..., Headers]) -> None:
    good = key()["Authorization"]
    answer = client.get("/v1/merges", headers=[("Authorization", good), ("Authorization", good)])
    assert answer.status_code == 401


def test_unknown_revoked_and_expired_are_refused_in_the_same_words(client: TestClient, ring: KeyRing) -> None:
    made = [ring.create("ann", USUAL), ring.create("ann", USUAL, expires_at=time.time() - 1)]
    ring.revoke(made[0][0].id)
    told = []
    for secret in (new_secret(), made[0][1], made[1][1]):
        answer = client.get("/v1/merges", headers=bearer(secret) | {"X-Request-ID": "the-same"})
        told.append((answer.status_code, answer.text, answer.headers["www-authenticate"]))
    assert told[0][0] == 401 and told == [told[0]] * 3


@given(secret=st.text())
def test_only_a_secret_has_the_form_of_one(secret: str) -> None:
    assert KeyRing(None).known(secret) is None  # type: ignore[arg-type]


def test_secrets_are_long_and_all_different() -> None:
    secrets = {new_secret() for _ in range(1000)}
    assert len(secrets) == 1000 and all(re.fullmatch(r"wsk_[0-9A-Za-z]{43}", secret) for secret in secrets)


def test_a_key_is_kept_as_its_digest_alone(client: TestClient, key: Callable[..., Headers], settings: Settings) -> None:
    admin = key("root", Scope.ADMIN)
    made = client.post("/v1/api-keys", json={"owner": "ann", "name": "mine"}, headers=admin)
    assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
    secret = made.json()["secret"]
    assert client.get("/v1/merges", headers=bearer(secret)).is_success
    for answer in (client.get("/v1/api-keys", headers=admin), client.get(made.headers["location"], headers=admin)):
        assert answer.is_success and secret[4:] not in answer.text
    for file in settings.data.rglob("*"):
        assert not file.is_file() or secret[4:].encode() not in file.read_bytes(), file


def test_use_is_noted_once_a_minute(client: TestClient, ring: KeyRing, store: JobStore) -> None:
    key, secret = ring.create("ann", USUAL)
    client.get("/v1/merges", headers=bearer(secret))
    first = ring.find(key.id)
    client.get("/v1/merges", headers=bearer(secret))
    second = ring.find(key.id)
    assert first and second and first.used_at and second.used_at == first.used_at
    with store.session() as session:
        row = session.get(ApiKey, key.id)
        assert row is not None
        row.used_at = first.used_at - 61
    client.get("/v1/merges", headers=bearer(secret))
    third = ring.find(key.id)
    assert third and third.used_at and third.used_at >= first.used_at


def test_an_owner_s_keys_beget_no_stronger_ones(client: TestClient, key: Callable[..., Headers]) -> None:
    reading = key("ann", Scope.MERGES_READ)
    for wanted in (
        {"scopes": ["merges:write"]},
        {"scopes": ["admin"]},
        {"owner": "ben", "scopes": ["merges:read"]},
        {},
    ):
        refused = client.post("/v1/api-keys", json=wanted, headers=reading)
        assert refused.status_code == 403 and refused.json()["code"] == "forbidden", wanted
    child = client.post("/v1/api-keys", json={"scopes": ["merges:read"], "owner": "ann"}, headers=reading).json()
    assert child["owner"] == "ann" and child["scopes"] == ["merges:read"]
    stronger = client.post("/v1/api-keys", json={}, headers=key("ann")).json()
    assert client.delete(f"/v1/api-keys/{stronger['id']}", headers=reading).status_code == 403
    assert client.delete(f"/v1/api-keys/{child['id']}", headers=reading).status_code == 204
    assert client.get("/v1/merges", headers=bearer(child["secret"])).status_code == 401
    assert client.delete(f"/v1/api-keys/{child['id']}", headers=reading).status_code == 204, "twice is once"


def test_a_key_begets_none_that_outlives_it(client: TestClient, key: Callable[..., Headers]) -> None:
    short = key("ann", expires_at=time.time() + 3600)
    for until in (None, "2999-01-01T00:00:00Z"):
        assert client.post("/v1/api-keys", json={"expires_at": until}, headers=short).status_code == 403
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
    assert client.post("/v1/api-keys", json={"expires_at": soon}, headers=short).status_code == 201
    for wrong in (
        {"expires_at": "2001-01-01T00:00:00Z"},
        {"expires_at": "2999-01-01T00:00:00"},
        {"scopes": []},
        {"x": 1},
    ):
        assert client.post("/v1/api-keys", json=wrong, headers=key("ann")).status_code == 422, wrong


def test_an_administrator_manages_everybody_s(client: TestClient, key: Callable[..., Headers]) -> None:
    admin, ann, ben = key("root", Scope.ADMIN), key("ann"), key("ben")
    assert {each["owner"] for each in client.get("/v1/api-keys", headers=admin).json()["data"]} == {
        "root",
        "ann",
        "ben",
    }
    [hers] = client.get("/v1/api-keys?owner=ann", headers=admin).json()["data"]
    assert client.get("/v1/api-keys?owner=ann", headers=ben).json()["data"][0]["owner"] == "ben"
    assert client.delete(f"/v1/api-keys/{hers['id']}", headers=ben).status_code == 404
    assert client.get("/v1/merges", headers=ann).status_code == 200
    assert client.delete(f"/v1/api-keys/{hers['id']}", headers=admin).status_code == 204
    assert client.get("/v1/merges", headers=ann).status_code == 401
    page = client.get("/v1/api-keys?limit=2", headers=admin).json()
    rest = client.get(f"/v1/api-keys?limit=2&after={page['next']}", headers=admin).json()
    assert page["has_more"] and not rest["has_more"] and len(page["data"] + rest["data"]) == 3


def test_jobs_belong_to_the_key_s_owner(client: TestClient, key: Callable[..., Headers]) -> None:
    ann, also_ann, ben = key("ann"), key("ann"), key("ben")
    job = client.post("/v1/merges", json=method_recipe("linear"), headers=ann).json()
    assert client.get(job["urls"]["self"], headers=also_ann).json()["id"] == job["id"]
    assert client.get(job["urls"]["self"], headers=ben).status_code == 404


# Without keys.


def doored(settings: Settings, doors: str, host: str | None = "127.0.0.1") -> TestClient:
    app = create_app(settings.model_copy(update={"auth": doors}), host=host)
    return TestClient(app, base_url="http://localhost:8000")


@pytest.mark.parametrize(
    ("auth", "host", "doors"),
    [
        ("auto", "127.0.0.1", Doors.LOOPBACK),
        ("auto", "::1", Doors.LOOPBACK),
        ("auto", "localhost", Doors.LOOPBACK),
        ("auto", "0.0.0.0", Doors.KEYS),
        ("auto", "::", Doors.KEYS),
        ("auto", "10.0.0.1", Doors.KEYS),
        ("auto", "", Doors.KEYS),
        ("auto", None, Doors.KEYS),
        ("keys", "127.0.0.1", Doors.KEYS),
        ("none", "0.0.0.0", Doors.OPEN),
    ],
)
def test_keys_are_asked_for_unless_bound_to_loopback(auth: Any, host: str | None, doors: Doors) -> None:
    assert doors_for(Settings(auth=auth), host) is doors


def test_which_names_are_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "LOCALHOST.", "a.localhost", "127.8.0.1", "::1")))
    others = ("0.0.0.0", "::", "192.168.0.7", "localhost.evil.org", "127.0.0.1.evil.org", "", "evil.org", "2130706433")
    assert not any(map(is_loopback, others))


def test_loopback_needs_no_key_and_hears_one(settings: Settings, key: Callable[..., Headers]) -> None:
    with doored(settings, "auto") as client:
        job = client.post("/v1/merges", json=method_recipe("linear"))
        assert job.status_code == 202
        assert client.get("/v1/merges", headers=key("ann")).json()["data"] == []
        assert client.get("/v1/merges", headers=bearer(new_secret())).status_code == 401
        assert client.get("/v1/merges", headers={"Authorization": "Basic dTpw"}).json()["data"]
        assert client.post("/v1/api-keys", json={"owner": "ann", "scopes": ["admin"]}).status_code == 201


OTHER_NAMES = ("evil.example", "localhost.evil.example:8000", "192.168.1.1", "[::2]:80", "[", "a b", "")


def test_a_name_that_was_made_to_lead_here_is_refused(settings: Settings) -> None:
    """DNS rebinding: a page of evil.example whose name now resolves to 127.0.0.1."""
    with doored(settings, "auto") as client:
        for host in OTHER_NAMES:
            for path in ("/v1/merges", "/openapi.json", "/healthz"):
                answer = client.get(path, headers={"Host": host})
                assert answer.status_code == 421 and answer.json()["code"] == "misdirected-request", host
        for host in ("localhost", "127.0.0.1:1", "[::1]:8000", "weightsmith.localhost"):
            assert client.get("/v1/merges", headers={"Host": host}).is_success, host
    with doored(settings, "none") as client:
        assert client.get("/v1/merges", headers={"Host": "merges.example"}).is_success, "behind somebody's proxy"


@pytest.mark.parametrize("doors", ["auto", "none"])
def test_another_site_s_page_changes_nothing(settings: Settings, doors: str) -> None:
    """A form that posts text/plain needs nobody's leave to be sent."""
    recipe = method_recipe("linear")
    with doored(settings, doors) as client:
        for origin in (
            "https://evil.example",
            "null",
            "http://localhost:3000",
            "http://localhost:8000.evil.example",
            "",
        ):
            answer = client.post("/v1/merges", json=recipe, headers={"Origin": origin, "Content-Type": "text/plain"})
            assert answer.status_code == 403 and answer.json()["code"] == "forbidden", origin
        assert client.get("/v1/merges", headers={"Origin": "https://evil.example"}).json()["data"] == []
        assert client.post("/v1/merges", json=recipe, headers={"Origin": "http://localhost:8000"}).status_code == 202


def test_with_keys_the_name_does_not_matter(client: TestClient, key: Callable[..., Headers]) -> None:
    there = {"Host": "merges.example", "Origin": "https://app.example"}
    assert client.post("/v1/merges", json=method_recipe("linear"), headers=key() | there).status_code == 202


# The command line.


def said(settings: Settings, *arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["keys", *arguments, "--data", str(settings.data)])
    assert result.exit_code == status, result.output
    return result


def test_keys_are_made_on_the_machine_itself(client: TestClient, settings: Settings) -> None:
    made = said(settings, "create", "root", "--scope", "admin", "--name", "first")
    secret = made.stdout.strip()
    assert client.get("/v1/api-keys", headers=bearer(secret)).is_success
    listed = said(settings, "list").stdout
    assert "root  admin" in listed and listed.strip().endswith("first") and secret not in listed
    said(settings, "create", "ann", "--days", "2")
    assert "good until" in said(settings, "list", "ann").stdout and "root" not in said(settings, "list", "ann").stdout
    said(settings, "revoke", listed.split()[0])
    assert client.get("/v1/api-keys", headers=bearer(secret)).status_code == 401
    assert "revoked" in said(settings, "list", "root").stdout
    assert "there is no key" in said(settings, "revoke", "key_none", status=1).stderr
    assert "cannot be an owner" in said(settings, "create", "A B", status=1).stderr


@pytest.mark.xdist_group("service")
def test_a_public_service_asks_for_keys_by_default(models: Path, tmp_path: Path) -> None:
    """Over real HTTP: `serve` knows where it listens."""
    with running_service(tmp_path / "data", models, host="0.0.0.0") as service:
        assert service.http.get("/v1/merges").status_code == 401
        secret = said(Settings(data=tmp_path / "data"), "create", "ann").stdout.strip()
        assert service.http.get("/v1/merges", headers=bearer(secret)).is_success
        large = service.http.post("/v1/merges", content=b"x" * 10_000_000)
        assert large.status_code == 401, "nobody's body is read"
        assert "weightsmith keys create" in service.log.read_text()
