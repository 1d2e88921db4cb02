"""`weightsmith submit`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from app.cli.terminal import RECIPE, URL, failures_told


@click.command()
@click.argument("recipe", type=RECIPE)
@URL
@click.option(
    "--as",
    "kind",
    type=click.Choice(["merges", "alignments", "patches"]),
    default="merges",
    show_default=True,
    help="What RECIPE asks for.",
)
@click.option("--wait", is_flag=True, help="Watch the job to its end.")
@click.option(
    "--download",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Then download the result, checked by sha256 (implies --wait).",
)
def submit(recipe: Path, url: str, kind: str, wait: bool, download: Path | None) -> None:
    """POST RECIPE to a service; prints the job's id."""
    with failures_told("interrupted; the job goes on without you"):
        from app.client import Client, Jobs

        body = sys.stdin.buffer.read() if str(recipe) == "-" else recipe
        if download:
            download.mkdir(parents=True, exist_ok=True)
        with Client(url) as client:
            jobs: Jobs = getattr(client, kind)
            job = jobs.submit(body)
            click.echo(job.id)
            if wait or download:
                job = jobs.wait(job, progress=True)
                for warning in job.warnings:
                    click.echo(f"warning: {warning}", err=True)
            if download:
                jobs.download(job, download, progress=True)
                click.echo(str(download))
