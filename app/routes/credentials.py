"""Secrets for other services. They come in and are named; none ever goes out."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Self

from fastapi import APIRouter, Body, Depends, Path, Query
from pydantic import BaseModel

from app.auth import CallerDep
from app.deps import QueueDep
from app.errors import HttpProblem, answers
from workers.credentials import NAME_PATTERN, Secrets, Vault
from workers.tables import Credential

router = APIRouter(prefix="/v1/credentials", tags=["credentials"])
Name = Annotated[str, Path(pattern=NAME_PATTERN, description="what jobs call it")]


def _vault(queue: QueueDep) -> Vault:
    return Vault(queue.store)


VaultDep = Annotated[Vault, Depends(_vault)]


class CredentialRead(BaseModel):
    """A credential, without what is secret."""

    name: str
    kind: str
    created_at: datetime
    changed_at: datetime

    @classmethod
    def of(cls, found: Credential) -> Self:
        """The credential as its resource."""
        created, changed = (datetime.fromtimestamp(at, UTC) for at in (found.created_at, found.changed_at))
        return cls(name=found.name, kind=found.kind, created_at=created, changed_at=changed)


class CredentialPage(BaseModel):
    """Credentials by name; `next` is the `after` of the following page."""

    data: list[CredentialRead]
    has_more: bool
    next: str | None


@router.put("/{name}", status_code=204, responses=answers("invalid-request", "no-secret-key"))
def put_credential(name: Name, secrets: Annotated[Secrets, Body()], vault: VaultDep, caller: CallerDep) -> None:
    """Keep a Hub token or S3 keys under a name, in place of what had it. It is sealed, and no answer has it again."""
    try:
        vault.put(caller.owner, name, secrets)
    except ValueError as error:
        place = {"pointer": "#/body/endpoint", "detail": str(error)}
        raise HttpProblem("invalid-request", f"endpoint: {error}", errors=[place]) from None


@router.get("")
def list_credentials(
    vault: VaultDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    after: Annotated[str, Query(max_length=64, description="the `next` of the page before")] = "",
) -> CredentialPage:
    """Your credentials: names and kinds."""
    found = vault.page(caller.owner, limit=limit + 1, after=after)
    page = [CredentialRead.of(each) for each in found[:limit]]
    more = len(found) > limit
    return CredentialPage(data=page, has_more=more, next=page[-1].name if more else None)


@router.get("/{name}", responses=answers("not-found"))
def read_credential(name: Name, vault: VaultDep, caller: CallerDep) -> CredentialRead:
    """What there is to tell of one."""
    found = vault.find(caller.owner, name)
    if found is None:
        raise _missing(name)
    return CredentialRead.of(found)


@router.delete("/{name}", status_code=204, responses=answers("not-found"))
def delete_credential(name: Name, vault: VaultDep, caller: CallerDep) -> None:
    """Forget it. A job that names it fails when it comes to need it."""
    if not vault.delete(caller.owner, name):
        raise _missing(name)


def _missing(name: str) -> HttpProblem:
    return HttpProblem("not-found", f"there is no credential {name!r}")
