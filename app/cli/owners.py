"""`weightsmith owners list | limit`, on the machine itself: the database is written directly."""

from __future__ import annotations

from pathlib import Path

import click

from app.cli.keys import opened
from app.cli.terminal import DATA, failures_told, size_of
from app.words import shown_bytes

_HELP = "a number, `none`, or `usual`: as the service has it for everybody"


@click.group()
def owners() -> None:
    """Show and set what owners may have, on the service's own machine and without the service."""


@owners.command("list")
@DATA
def list_owners(data: Path | None) -> None:
    """Show who has keys or limits of their own, and what they have."""
    with failures_told(), opened(data) as store:
        from workers import quotas

        with store.reading() as session:
            for owner in quotas.owners(session):
                allowed, has = quotas.limits(session, store.settings, owner), quotas.used(session, owner)
                told = [f"{name} {_of(name, has.get(name), limit)}" for name, limit in allowed.items()]
                click.echo(f"{owner}  {', '.join(told)}")


@owners.command("limit")
@click.argument("owner")
@click.option("--running-jobs", metavar="N", help=f"Jobs that may run at once: {_HELP}.")
@click.option("--queued-jobs", metavar="N", help="Jobs that may wait.")
@click.option("--job-bytes", metavar="SIZE", help="What one job may read and write, such as 500GB.")
@click.option("--daily-bytes", metavar="SIZE", help="What jobs may read and write in 24 hours.")
@click.option("--disk-bytes", metavar="SIZE", help="What artifacts and unfinished jobs may take.")
@DATA
def limit_owner(owner: str, data: Path | None, **written: str | None) -> None:
    """Give OWNER limits of their own."""
    changed = {name: _limit(name, value) for name, value in written.items() if value is not None}
    if not changed:
        raise click.UsageError("say which limit, such as --running-jobs 2")
    with failures_told(), opened(data) as store:
        from workers import quotas
        from workers.keys import check_owner

        check_owner(owner)
        with store.session() as session:
            quotas.set_limits(session, owner, changed)


def _limit(name: str, written: str) -> int | None:
    if written == "usual":
        return None
    if written == "none":
        return -1
    if name.endswith("_bytes"):
        return size_of(written)
    if not written.isascii() or not written.isdecimal() or len(written) > 9:
        raise click.UsageError(f"{written[:60]!r} is no limit: give {_HELP}")
    return int(written)


def _of(name: str, has: int | None, limit: int | None) -> str:
    shown = [
        "any" if count is None else shown_bytes(count) if name.endswith("_bytes") else str(count)
        for count in (has, limit)
    ]
    return shown[1] if has is None else f"{shown[0]} of {shown[1]}"
