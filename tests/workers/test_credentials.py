"""Credentials: sealed where they are kept, open only to their owner, and in nothing that is said or written."""

from __future__ import annotations

import base64
import logging
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.fernet import Fernet
from fastapi.testclient import TestClient
from pydantic import SecretStr, ValidationError
from sqlalchemy import update

from app.cli import main
from app.main import create_app
from merge_core.errors import WeightsmithError
from workers.credentials import (
    KEY_FILE,
    CredentialNotFound,
    CredentialSealed,
    HubToken,
    NoSecretKey,
    S3Keys,
    Vault,
    open_credential,
)
from workers.jobs import JobStore
from workers.problems import problem
from workers.settings import Settings
from workers.tables import Credential

KEY = "WEIGHTSMITH_SECRET_KEY"
TOKEN = "hf_" + "SecretOfTheHub" * 3
S3 = {"kind": "s3", "access_key_id": "AKIAIOSFODNN7EXAMPLE", "secret_access_key": "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"}
SECRETS = (TOKEN, S3["access_key_id"], S3["secret_access_key"])


def hub(token: str = TOKEN) -> HubToken:
    return HubToken(token=SecretStr(token))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data")


@pytest.fixture
def store(settings: Settings) -> Iterator[JobStore]:
    store = JobStore(settings)
    yield store
    store.close()


def opened(settings: Settings, **changed: Any) -> JobStore:
    return JobStore(settings.model_copy(update=changed))


def test_what_was_put_comes_out_for_its_owner_alone(store: JobStore) -> None:
    vault = Vault(store)
    vault.put("ann", "hub", hub())
    vault.put("ben", "hub", hub("hf_another"))
    vault.put("ann", "store", S3Keys.model_validate({**S3, "endpoint": "https://s3.example", "region": "eu-1"}))
    assert open_credential(store, "ann", "hub") == hub()
    keys = open_credential(store, "ann", "store")
    assert isinstance(keys, S3Keys) and keys.secret_access_key.get_secret_value() == S3["secret_access_key"]
    assert (keys.endpoint, keys.region, keys.session_token) == ("https://s3.example", "eu-1", None)
    vault.put("ann", "hub", hub("hf_newer"))
    assert open_credential(store, "ann", "hub") == hub("hf_newer")
    assert vault.delete("ann", "hub") and not vault.delete("ann", "hub")
    with pytest.raises(CredentialNotFound, match="'hub' is not there, or no more"):
        open_credential(store, "ann", "hub")
    assert open_credential(store, "ben", "hub") == hub("hf_another")
    assert [each.name for each in vault.page("ann")] == ["store"] and vault.page("cat") == []


def test_a_row_that_was_moved_opens_to_nobody(store: JobStore) -> None:
    """Whoever can write to the database still cannot use what is another's."""
    Vault(store).put("ann", "hub", hub())
    with store.session() as session:
        session.execute(update(Credential).values(owner="mallory"))
    with pytest.raises(CredentialSealed):
        open_credential(store, "mallory", "hub")


def test_keys_are_changed_one_after_the_other(settings: Settings) -> None:
    old, new = (base64.b64encode(os.urandom(32)).decode() for _ in range(2))

    def under(*keys: str) -> JobStore:
        return opened(settings, secret_key=SecretStr(",".join(keys)))

    stores = [under(old), under(new, old), under(new), under("nonsense")]
    Vault(stores[0]).put("ann", "hub", hub())
    assert open_credential(stores[1], "ann", "hub") == hub()
    with pytest.raises(CredentialSealed, match="store it anew"):
        open_credential(stores[2], "ann", "hub")
    Vault(stores[1]).put("ann", "hub", hub("hf_again"))
    assert open_credential(stores[2], "ann", "hub") == hub("hf_again")
    with pytest.raises(NoSecretKey, match="32 random bytes in base64") as refused:
        open_credential(stores[3], "ann", "hub")
    assert "nonsense" not in str(refused.value)
    for store in stores:
        store.close()


def test_all_are_sealed_anew_under_the_new_key(settings: Settings) -> None:
    old, new, other = (Fernet.generate_key().decode() for _ in range(3))
    for key, name in ((old, "first"), (old, "second"), (other, "lost")):
        with closing(opened(settings, secret_key=SecretStr(key))) as store:
            Vault(store).put("ann", name, hub(name))

    said = CliRunner().invoke(main, ["reseal", "--data", str(settings.data)], env={KEY: f"{new},{old}"})

    assert said.exit_code == 1 and said.output.startswith("2 sealed anew")
    assert "ann: lost" in said.output and "first" not in said.output
    with closing(opened(settings, secret_key=SecretStr(new))) as store:
        for name in ("first", "second"):
            assert open_credential(store, "ann", name) == hub(name)
        Vault(store).delete("ann", "lost")
    said = CliRunner().invoke(main, ["reseal", "--data", str(settings.data)], env={KEY: new})
    assert said.exit_code == 0


def test_a_key_of_the_other_alphabet_is_one_too(settings: Settings) -> None:
    raw = bytes([255, 254, 253, 251] * 8)
    standard, urls = base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()
    assert standard != urls
    stores = [opened(settings, secret_key=SecretStr(key)) for key in (standard, urls)]
    Vault(stores[0]).put("ann", "hub", hub())
    assert open_credential(stores[1], "ann", "hub") == hub()
    for store in stores:
        store.close()


def test_the_key_s_file_is_made_once_and_nobody_else_s(store: JobStore, settings: Settings) -> None:
    threads = [threading.Thread(target=Vault(store).put, args=("ann", f"n{i}", hub())) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file = settings.data / KEY_FILE
    assert file.stat().st_mode & 0o777 == 0o600 and Fernet(file.read_bytes())
    assert all(open_credential(store, "ann", f"n{i}") == hub() for i in range(6))
    assert [path.name for path in settings.data.glob(f".{KEY_FILE}*")] == []
    file.chmod(0o644)
    with pytest.raises(NoSecretKey, match="chmod 600"):
        open_credential(store, "ann", "n0")
    file.unlink()
    with pytest.raises(CredentialSealed):
        open_credential(store, "ann", "n0")


def test_of_two_that_make_one_name_at_once_one_is_kept(store: JobStore) -> None:
    Vault(store).put("ann", "first", hub())
    start = threading.Barrier(6)
    failed: list[BaseException] = []

    def put(i: int) -> None:
        start.wait()
        try:
            Vault(store).put("ann", "hub", hub(f"hf_{i}"))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=put, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert open_credential(store, "ann", "hub") in [hub(f"hf_{i}") for i in range(6)]


def test_a_database_for_many_machines_needs_a_key_for_all(store: JobStore, settings: Settings) -> None:
    store.settings = Settings(data=settings.data, database_url="postgresql://db/weightsmith")
    with pytest.raises(NoSecretKey, match="set WEIGHTSMITH_SECRET_KEY to the same on all of them"):
        Vault(store).put("ann", "hub", hub())


WRONG: tuple[Any, ...] = (
    {},
    {"kind": "hub-token"},
    {"kind": TOKEN, "token": TOKEN},
    {"kind": "hub-token", "token": ""},
    {"kind": "hub-token", "token": TOKEN + "\n"},
    {"kind": "hub-token", "token": TOKEN + " " + TOKEN},
    {"kind": "hub-token", "token": [TOKEN]},
    {"kind": "hub-token", "token": TOKEN, "extra": TOKEN},
    {"kind": "hub-token", "token": TOKEN * 200},
    {**S3, "region": TOKEN},
    {**S3, "endpoint": "http://169.254.169.254/"},
    {**S3, "endpoint": "https://10.0.0.7/"},
    {**S3, "endpoint": f"https://user:{TOKEN}@s3.example"},
    {**S3, "secret_access_key": None},
    TOKEN,
    [TOKEN],
    None,
)


def test_what_is_wrong_is_refused_without_repeating_it(settings: Settings) -> None:
    with TestClient(create_app(settings)) as client:
        for wrong in WRONG:
            answer = client.put("/v1/credentials/hub", json=wrong)
            assert answer.status_code == 422 and answer.json()["code"] == "invalid-request", wrong
            assert not any(secret in answer.text for secret in SECRETS)
        assert client.get("/v1/credentials").json()["data"] == []


def test_over_http(settings: Settings) -> None:
    with TestClient(create_app(settings)) as client:
        for name in ("hub", "a", "b"):
            assert client.put(f"/v1/credentials/{name}", json={"kind": "hub-token", "token": TOKEN}).status_code == 204
        page = client.get("/v1/credentials?limit=2").json()
        assert [each["name"] for each in page["data"]] == ["a", "b"] and page["next"] == "b"
        assert client.get("/v1/credentials?after=b").json()["data"][0]["name"] == "hub"
        about = client.get("/v1/credentials/hub").json()
        assert about.keys() == {"name", "kind", "created_at", "changed_at"} and about["kind"] == "hub-token"
        assert client.delete("/v1/credentials/hub").status_code == 204
        for verb in ("GET", "DELETE"):
            assert client.request(verb, "/v1/credentials/hub").json()["code"] == "not-found"
        assert client.put("/v1/credentials/A%20B", json={"kind": "hub-token", "token": TOKEN}).status_code == 422
    with TestClient(create_app(settings.model_copy(update={"endpoint_allow": ["minio"]}))) as client:
        there = {**S3, "endpoint": "http://minio:9000"}
        assert client.put("/v1/credentials/store", json=there).status_code == 204


def test_a_secret_is_in_nothing_that_is_said_or_written(
    settings: Settings, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """After every use: the database with its log, the broker's files, what is logged, every answer, every message."""
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with TestClient(create_app(settings)) as client:
        for name, body in (("hub", {"kind": "hub-token", "token": TOKEN}), ("store", S3)):
            said += [client.put(f"/v1/credentials/{name}", json=body).text]
            said += [client.put(f"/v1/credentials/{name}", json={**body, "more": 1}).text]
            said += [client.put(f"/v1/merges/{name}", json=body).text, client.post("/v1/merges", json=body).text]
            said += [client.get(f"/v1/credentials/{name}").text, client.get("/v1/credentials").text]
        said += [client.get("/metrics").text, client.get("/openapi.json").text]
        store = JobStore(settings)
        for name in ("hub", "store"):
            found = open_credential(store, "local", name)
            said += [repr(found), str(found), f"{found}", found.model_dump_json(), repr(found.model_dump())]
            with pytest.raises(ValidationError) as refused:
                type(found).model_validate({**found.model_dump(), "extra": TOKEN})
            said += [str(refused.value), repr(refused.value)]
            said += [repr(Vault(store).find("local", name)), repr(Vault(store).page("local"))]
        said += [repr(settings.model_copy(update={"secret_key": SecretStr(TOKEN)}))]
        (settings.data / KEY_FILE).write_bytes(Fernet.generate_key())
        for name in ("hub", "store", "none"):
            with pytest.raises(WeightsmithError) as failed:
                open_credential(store, "local", name)
            said += [str(failed.value), repr(failed.value), repr(problem(failed.value)), repr(failed.value.__cause__)]
            said += [pickle.dumps(str(failed.value)).decode("latin-1")]
        written = [file for file in settings.data.rglob("*") if file.is_file()]
        assert any(file.name.endswith("-wal") for file in written)
        kept = [file.read_bytes().decode("latin-1") for file in written]
        store.close()
    told = capfd.readouterr()
    for text in [*said, *kept, caplog.text, told.out, told.err]:
        assert not any(secret in text for secret in SECRETS)
