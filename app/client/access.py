"""Who may do what: API keys, and credentials for other services."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from app.client.objects import ApiKey, Credential
from app.client.transport import Transport


class ApiKeys:
    """`client.api_keys`: the owner's keys."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self,
        name: str = "",
        *,
        scopes: Sequence[str] | None = None,
        expires_at: datetime | None = None,
        owner: str | None = None,
    ) -> ApiKey:
        """A new key, with the usual scopes unless others are named. Its `secret` is told here and never again."""
        asked: dict[str, Any] = {"name": name}
        if scopes is not None:
            asked["scopes"] = list(scopes)
        if expires_at is not None:
            asked["expires_at"] = expires_at.astimezone().isoformat()
        if owner is not None:
            asked["owner"] = owner
        return ApiKey.of(self._transport.json("POST", "/v1/api-keys", json=asked, repeatable=False))

    def list(self) -> Iterator[ApiKey]:
        """Newest first, also those that are good no more."""
        return map(ApiKey.of, self._transport.pages("/v1/api-keys"))

    def get(self, key_id: str) -> ApiKey:
        return ApiKey.of(self._transport.json("GET", f"/v1/api-keys/{quote(key_id, safe='')}"))

    def delete(self, key: ApiKey | str) -> None:
        """Revoke a key: nobody is let in by it from now on."""
        key_id = key if isinstance(key, str) else key.id
        self._transport.request("DELETE", f"/v1/api-keys/{quote(key_id, safe='')}")


class Credentials:
    """`client.credentials`: secrets for other services, which jobs name. No answer ever holds one."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def put(self, name: str, *, kind: str, **secret: str) -> None:
        """Store or replace a secret, such as `put("hub", kind="hub", token=…)`."""
        asked: Mapping[str, str] = {"kind": kind, **secret}
        self._transport.request("PUT", self._path(name), json=asked)

    def get(self, name: str) -> Credential:
        """What there is to tell of a secret without telling it."""
        return Credential.of(self._transport.json("GET", self._path(name)))

    def list(self) -> Iterator[Credential]:
        return map(Credential.of, self._transport.pages("/v1/credentials"))

    def delete(self, name: str) -> None:
        self._transport.request("DELETE", self._path(name))

    @staticmethod
    def _path(name: str) -> str:
        return f"/v1/credentials/{quote(name, safe='')}"
