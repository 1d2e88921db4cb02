"""`weightsmith keys create | list | revoke`, on the machine itself: the database is written directly."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app.cli.terminal import DATA, failures_told, settings_of

if TYPE_CHECKING:
    from workers.jobs import JobStore

SCOPES = ("merges:read", "merges:write", "files:read", "admin")


@click.group()
def keys() -> None:
    """Make, list and revoke API keys, on the service's own machine and without the service."""


@keys.command("create")
@click.argument("owner")
@click.option("--name", default="", help="What it is for.")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(SCOPES), help="Repeatable.  [default: all but admin]"
)
@click.option("--days", type=click.FloatRange(0, min_open=True), help="So long it is good.  [default: until revoked]")
@DATA
def create_key(owner: str, name: str, scopes: tuple[str, ...], days: float | None, data: Path | None) -> None:
    """Make a key for OWNER and print its secret, which cannot be shown again."""
    with failures_told(), opened(data) as store:
        from workers.keys import USUAL, KeyRing, Scope

        if len(name) > 100:
            raise click.UsageError("a name has at most 100 characters")
        until = None if days is None else time.time() + days * 86_400
        wanted = [Scope(scope) for scope in scopes] or USUAL
        key, secret = KeyRing(store).create(owner, set(wanted), name=name, expires_at=until)
    click.echo(f"{key.id} for {owner}: {', '.join(key.scopes)}{_until(key.expires_at)}", err=True)
    click.echo(secret)


@keys.command("list")
@click.argument("owner", required=False)
@DATA
def list_keys(owner: str | None, data: Path | None) -> None:
    """Show the keys of OWNER, or of everybody; never their secrets."""
    with failures_told(), opened(data) as store:
        from workers.keys import KeyRing

        last = None
        while page := KeyRing(store).page(owner, before=last):
            for key in page:
                state = "  revoked" if key.revoked_at is not None else _until(key.expires_at)
                used = "never used" if key.used_at is None else f"used {_day(key.used_at)}"
                click.echo(f"{key.id}  {key.owner}  {','.join(key.scopes)}  {used}{state}  {key.name}".rstrip())
            last = page[-1].id


@keys.command("revoke")
@click.argument("key")
@DATA
def revoke_key(key: str, data: Path | None) -> None:
    """Make a KEY, by its id (key_…), good for nothing, at once and for ever."""
    with failures_told(), opened(data) as store:
        from workers.keys import KeyRing

        if not KeyRing(store).revoke(key):
            click.echo(f"error: there is no key {key[:60]}; `weightsmith keys list` shows those there are", err=True)
            sys.exit(1)


@contextmanager
def opened(data: Path | None) -> Iterator[JobStore]:
    """The database, as the service has it."""
    from workers.jobs import JobStore

    store = JobStore(settings_of(data, ()))
    try:
        yield store
    finally:
        store.close()


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _until(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"  {'expired' if seconds <= time.time() else 'good until'} {_day(seconds)}"
