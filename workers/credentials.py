"""Secrets of owners for other services: sealed in the database, opened where they are used, and nowhere shown.

Sealed by Fernet (AES-128-CBC and HMAC-SHA256) under `WEIGHTSMITH_SECRET_KEY`, else under a key in a file of the data
folder. Owner and name are sealed in with the secret: a row that was moved to somebody else's name opens to nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, SecretStr, Tag, TypeAdapter
from sqlalchemy import delete, make_url, select, update
from sqlalchemy.exc import IntegrityError

from merge_core.errors import WeightsmithError
from workers.jobs import JobStore
from workers.outbound import ForbiddenAddress, Guard
from workers.settings import Settings
from workers.tables import Credential

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""What a credential may be called."""
KEY_FILE = "secret.key"
HOW_TO_MAKE = "openssl rand -base64 32"


class CredentialNotFound(WeightsmithError):
    """A credential that a job names is not there, or no more."""

    code = "credential-not-found"
    title = "There is no such credential"


class CredentialSealed(WeightsmithError):
    """A credential cannot be opened: the key it was sealed under is not there."""

    code = "credential-sealed"
    title = "The credential cannot be opened"


class NoSecretKey(WeightsmithError):
    """There is no key to seal credentials under, or it cannot be used."""

    code = "no-secret-key"
    title = "Credentials cannot be kept here"


def _printable(secret: SecretStr) -> SecretStr:
    written = secret.get_secret_value()
    if not (1 <= len(written) <= 4096 and written.isascii() and written.isprintable() and " " not in written):
        raise ValueError("1 to 4096 ASCII characters without spaces")
    return secret


_Secret = Annotated[SecretStr, AfterValidator(_printable)]


class _Fields(BaseModel):
    """What is sealed. Its repr shows no secret."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class HubToken(_Fields):
    """A token of the Hugging Face Hub."""

    kind: Literal["hub-token"] = "hub-token"
    token: _Secret


class S3Keys(_Fields):
    """Keys of an S3 store. `endpoint`: its https URL, if it is not Amazon's."""

    kind: Literal["s3"] = "s3"
    access_key_id: _Secret
    secret_access_key: _Secret
    session_token: _Secret | None = None
    endpoint: str | None = Field(None, max_length=2000)
    region: str | None = Field(None, pattern=r"^[a-z0-9-]{1,64}$")


def _kind(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) and kind in ("hub-token", "s3") else None


Secrets = Annotated[
    Annotated[HubToken, Tag("hub-token")] | Annotated[S3Keys, Tag("s3")],
    # Not a plain discriminator, whose message would repeat what was sent.
    Discriminator(_kind, custom_error_type="kind", custom_error_message="`kind` is to be hub-token or s3"),
]
"""A credential of any kind."""
_SECRETS: TypeAdapter[HubToken | S3Keys] = TypeAdapter(Secrets)


class Vault:
    """The credentials of all owners."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def put(self, owner: str, name: str, secrets: HubToken | S3Keys) -> None:
        """Keep a credential, in place of one of the same name. Raises `NoSecretKey`; ValueError for an endpoint that is
        not called.
        """
        if isinstance(secrets, S3Keys) and secrets.endpoint is not None:
            _check_endpoint(secrets.endpoint, self._store.settings)
        now = time.time()
        sealed = _seal(self._store.settings, owner, name, secrets)
        values = {"kind": secrets.kind, "sealed": sealed, "changed_at": now}
        changed = update(Credential).where(*_named(owner, name)).values(values).returning(Credential.name)
        with contextlib.suppress(IntegrityError), self._store.session() as session:
            if not session.execute(changed).all():
                session.add(Credential(owner=owner, name=name, created_at=now, **values))
            return
        # Somebody made one of that name at the same time.
        with self._store.session() as session:
            session.execute(changed)

    def find(self, owner: str, name: str) -> Credential | None:
        """What is known of a credential, still sealed."""
        with self._store.reading() as session:
            return session.scalars(select(Credential).where(*_named(owner, name))).one_or_none()

    def page(self, owner: str, *, limit: int = 100, after: str = "") -> Sequence[Credential]:
        """An owner's credentials by name, still sealed."""
        query = select(Credential).where(Credential.owner == owner, Credential.name > after)
        with self._store.reading() as session:
            return session.scalars(query.order_by(Credential.name).limit(limit)).all()

    def delete(self, owner: str, name: str) -> bool:
        """Forget a credential; a job that names it fails when it comes to need it. False: there is none."""
        with self._store.session() as session:
            return bool(
                session.execute(delete(Credential).where(*_named(owner, name)).returning(Credential.name)).all()
            )


def reseal(store: JobStore) -> tuple[int, list[tuple[str, str]]]:
    """Seal every credential anew under the first key, so that the others can go: how many, and owner and name of those
    that no key opens. What changes meanwhile stays as it was changed. Raises `NoSecretKey`.
    """
    fernet, lost = seal_of(store.settings), []
    with store.reading() as session:
        found = session.execute(select(Credential.owner, Credential.name, Credential.sealed)).all()
    for owner, name, sealed in found:
        try:
            again = fernet.rotate(sealed)
        except InvalidToken:
            lost.append((owner, name))
            continue
        with store.session() as session:
            same = (*_named(owner, name), Credential.sealed == sealed)
            session.execute(update(Credential).where(*same).values(sealed=again))
    return len(found) - len(lost), lost


def open_credential(store: JobStore, owner: str, name: str) -> HubToken | S3Keys:
    """A credential, open. Raises `CredentialNotFound`, `CredentialSealed` or `NoSecretKey`, which name it and no more.

    Where an endpoint's name leads is not known before it is called: call it through `workers.outbound.Guard`.
    """
    found = Vault(store).find(owner, name)
    if found is None:
        detail = (
            f"the credential {name[:64]!r} is not there, or no more; PUT it to /v1/credentials/{name[:64]} and retry"
        )
        raise CredentialNotFound(detail)
    lost = CredentialSealed(
        f"the credential {name[:64]!r} was sealed under another key than WEIGHTSMITH_SECRET_KEY has now; store it anew"
    )
    try:
        written = json.loads(seal_of(store.settings).decrypt(found.sealed))
    except (InvalidToken, ValueError):
        raise lost from None
    if (written["owner"], written["name"]) != (owner, name):
        raise lost
    return _SECRETS.validate_python(written["secrets"])


def _seal(settings: Settings, owner: str, name: str, secrets: HubToken | S3Keys) -> bytes:
    plain = {
        key: value.get_secret_value() if isinstance(value, SecretStr) else value
        for key, value in secrets.model_dump().items()
    }
    return seal_of(settings).encrypt(json.dumps({"owner": owner, "name": name, "secrets": plain}).encode())


def seal_of(settings: Settings) -> MultiFernet:
    """What seals under the first key and opens under any. Raises `NoSecretKey`."""
    if settings.secret_key is None:
        return MultiFernet([Fernet(_key_in_file(settings))])
    keys = settings.secret_key.get_secret_value().replace(",", " ").split()
    try:
        # Fernet writes keys in the URLs' alphabet of base64, openssl in the other.
        return MultiFernet([Fernet(key.replace("+", "-").replace("/", "_")) for key in keys])
    except ValueError:
        detail = (
            f"WEIGHTSMITH_SECRET_KEY is to be 32 random bytes in base64 ({HOW_TO_MAKE}); several, separated by commas"
        )
        raise NoSecretKey(f"{detail}: new ones are sealed under the first") from None


def _key_in_file(settings: Settings) -> bytes:
    if make_url(settings.database).get_backend_name() != "sqlite":
        detail = "the database is one for several machines: set WEIGHTSMITH_SECRET_KEY to the same on all of them"
        raise NoSecretKey(f"{detail} ({HOW_TO_MAKE})")
    file = settings.data.absolute() / KEY_FILE
    if not file.exists():
        _make_key(file)
    if file.stat().st_mode & 0o077:
        raise NoSecretKey(f"{KEY_FILE} in the data folder can be read by others: chmod 600, and store credentials anew")
    return file.read_bytes().strip()


def _make_key(file: Path) -> None:
    """Appears whole or not at all; of two processes that make one, the first is heard."""
    draft = file.with_name(f".{KEY_FILE}.{os.getpid()}.{time.monotonic_ns()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(Fernet.generate_key())
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            file.hardlink_to(draft)
    finally:
        draft.unlink()


def _check_endpoint(endpoint: str, settings: Settings) -> None:
    try:
        Guard(settings.endpoint_allow).check(endpoint)
    except ForbiddenAddress as error:
        raise ValueError(str(error)) from None


def _named(owner: str, name: str) -> tuple[Any, Any]:
    return Credential.owner == owner, Credential.name == name
