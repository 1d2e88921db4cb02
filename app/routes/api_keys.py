"""API keys over HTTP: an owner's own, and everybody's for administrators."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from app.auth import Caller, CallerDep
from app.deps import QueueDep
from app.errors import HttpProblem, answers
from workers.keys import OWNER_PATTERN, USUAL, KeyRing, Scope
from workers.tables import ApiKey

router = APIRouter(prefix="/v1/api-keys", tags=["api-keys"])


def _key_ring(queue: QueueDep) -> KeyRing:
    return KeyRing(queue.store)


KeyRingDep = Annotated[KeyRing, Depends(_key_ring)]
KeyId = Annotated[str, Path(max_length=32)]


class KeyWanted(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("", max_length=100, description="what you will know it by")
    scopes: list[Scope] = Field(
        list(USUAL), min_length=1, max_length=len(Scope), description="no more than the key has that asks"
    )
    expires_at: AwareDatetime | None = Field(None, description="not later than the key that asks; null: never")
    owner: str | None = Field(
        None, pattern=OWNER_PATTERN, description="for administrators: whose it is (default: yours)"
    )


class KeyRead(BaseModel):
    """A key, without its secret. `used_at` is exact to a minute."""

    id: str
    owner: str
    name: str
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None

    @classmethod
    def of(cls, key: ApiKey, **more: Any) -> Self:
        """The key as its resource."""
        return cls(
            id=key.id,
            owner=key.owner,
            name=key.name,
            scopes=[Scope(scope) for scope in key.scopes],
            created_at=datetime.fromtimestamp(key.created_at, UTC),
            expires_at=_moment(key.expires_at),
            revoked_at=_moment(key.revoked_at),
            used_at=_moment(key.used_at),
            **more,
        )


class KeyMade(KeyRead):
    """A new key."""

    secret: str = Field(description="shown this once; send it as `Authorization: Bearer …`")


class KeyPage(BaseModel):
    """Keys, newest first; `next` is the `after` of the following page."""

    data: list[KeyRead]
    has_more: bool
    next: str | None


@router.post("", status_code=201, responses=answers("forbidden", "invalid-request"))
def create_key(wanted: KeyWanted, ring: KeyRingDep, caller: CallerDep, response: Response) -> KeyMade:
    """Make a key. The answer has its secret, which is shown nowhere else and never again."""
    if wanted.owner is not None and wanted.owner != caller.owner and not caller.is_admin:
        raise HttpProblem("forbidden", "only an administrator makes keys for others")
    if more := [scope for scope in wanted.scopes if not caller.may(scope)]:
        raise HttpProblem("forbidden", f"this key cannot give {', '.join(more)}, which it does not have")
    until = wanted.expires_at.timestamp() if wanted.expires_at else None
    if until is not None and until <= time.time():
        raise HttpProblem("invalid-request", "expires_at: that is past", errors=[_at("expires_at", "that is past")])
    if caller.expires_at is not None and (until is None or until > caller.expires_at):
        until_then = datetime.fromtimestamp(caller.expires_at, UTC).isoformat()
        raise HttpProblem("forbidden", f"this key cannot make one that outlives it: it is good until {until_then}")
    key, secret = ring.create(wanted.owner or caller.owner, set(wanted.scopes), name=wanted.name, expires_at=until)
    response.headers["Location"] = f"/v1/api-keys/{key.id}"
    response.headers["Cache-Control"] = "no-store"
    return KeyMade.of(key, secret=secret)


@router.get("")
def list_keys(
    ring: KeyRingDep,
    caller: CallerDep,
    owner: Annotated[str | None, Query(max_length=100, description="for administrators: only this owner's")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    after: Annotated[str | None, Query(max_length=32, description="the `next` of the page before")] = None,
) -> KeyPage:
    """Your keys, also those that are good no more; an administrator sees everybody's."""
    found = ring.page(owner if caller.is_admin else caller.owner, limit=limit + 1, before=after)
    page = [KeyRead.of(key) for key in found[:limit]]
    more = len(found) > limit
    return KeyPage(data=page, has_more=more, next=page[-1].id if more else None)


@router.get("/{key_id}", responses=answers("not-found"))
def read_key(key_id: KeyId, ring: KeyRingDep, caller: CallerDep) -> KeyRead:
    """One key."""
    return KeyRead.of(_find(key_id, ring, caller))


@router.delete("/{key_id}", status_code=204, responses=answers("not-found", "forbidden"))
def revoke_key(key_id: KeyId, ring: KeyRingDep, caller: CallerDep) -> None:
    """Revoke a key: from now on it is good for nothing. It stays in the list. A key revokes none that may do more."""
    key = _find(key_id, ring, caller)
    if more := [scope for scope in map(Scope, key.scopes) if not caller.may(scope)]:
        raise HttpProblem("forbidden", f"a key without {', '.join(more)} cannot revoke one that has it")
    ring.revoke(key.id)


def _find(key_id: str, ring: KeyRing, caller: Caller) -> ApiKey:
    key = ring.find(key_id, None if caller.is_admin else caller.owner)
    if key is None:
        raise HttpProblem("not-found", f"there is no key {key_id[:60]!r}")
    return key


def _at(name: str, what: str) -> dict[str, str]:
    return {"pointer": f"#/body/{name}", "detail": what}


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
