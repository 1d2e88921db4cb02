"""`weightsmith submit` and `weightsmith jobs`: a service's jobs, by the Python client."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from app.cli.terminal import RECIPE, URL, failures_told
from app.words import shown_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.client import Client, Job, Jobs

KINDS = ("merges", "alignments", "patches", "verify", "views", "analyses", "searches", "calibrations")
KEY = click.option("--key", envvar="WEIGHTSMITH_API_KEY", show_envvar=True, help="API key, where one is needed.")
KIND = click.option("--as", "kind", type=click.Choice(KINDS), default="merges", show_default=True)
LABELS = click.option("--label", "labels", multiple=True, metavar="NAME:VALUE", help="Repeatable.")
JOB = click.argument("job_id", metavar="JOB")
JOBS = click.argument("job_ids", metavar="JOB…", nargs=-1, required=True)
DIR = click.Path(file_okay=False, path_type=Path)


def _service(command: Callable[..., None]) -> Callable[..., None]:
    return URL(KEY(command))


@click.command()
@click.argument("recipe", type=RECIPE)
@_service
@KIND
@LABELS
@click.option("--priority", type=click.IntRange(-100, 100), help="The highest is taken first.  [default: 0]")
@click.option("--deadline", type=click.IntRange(1), metavar="SECONDS", help="It has failed if it is not done then.")
@click.option("--hub-credential", metavar="NAME", help="Your credential for the Hub.  [default: hub, if you have it]")
@click.option("--hub-endpoint", metavar="URL", help="Another Hub, of those that the service allows.")
@click.option("--wait", is_flag=True, help="Watch the job to its end.")
@click.option(
    "--download", type=DIR, metavar="DIR", help="Then download the result, checked by sha256 (implies --wait)."
)
def submit(
    recipe: Path,
    url: str,
    key: str | None,
    kind: str,
    labels: tuple[str, ...],
    priority: int | None,
    deadline: int | None,
    hub_credential: str | None,
    hub_endpoint: str | None,
    wait: bool,
    download: Path | None,
) -> None:
    """POST RECIPE to a service; prints the job's id."""
    with failures_told("interrupted; the job goes on without you"):
        body = sys.stdin.buffer.read() if str(recipe) == "-" else recipe
        if download:
            download.mkdir(parents=True, exist_ok=True)
        with _client(url, key) as client:
            jobs: Jobs = getattr(client, kind)
            job = jobs.submit(
                body,
                labels=_pairs(labels),
                priority=priority,
                deadline=deadline,
                hub_credential=hub_credential,
                hub_endpoint=hub_endpoint,
            )
            click.echo(job.id)
            if wait or download:
                _watch(jobs, job.id)
            if download:
                jobs.download(job, download, progress=True)
                click.echo(str(download))


@click.group()
def jobs() -> None:
    """List, watch, cancel, retry, delete and download the jobs of a service."""


@jobs.command("list")
@_service
@KIND
@LABELS
@click.option("--status", "states", multiple=True, help="Only jobs in this state; repeatable.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="So many of the newest.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(
    url: str, key: str | None, kind: str, labels: tuple[str, ...], states: tuple[str, ...], limit: int, as_json: bool
) -> None:
    """List jobs, newest first."""
    with failures_told(), _client(url, key) as client:
        found = getattr(client, kind).list(status=states, labels=_pairs(labels), page=min(limit, 100))
        for _, job in zip(range(limit), found, strict=False):
            click.echo(json.dumps(dict(job.raw)) if as_json else _line(job))


@jobs.command()
@JOB
@_service
@click.option("--json", "as_json", is_flag=True, help="As the service has it.")
def show(job_id: str, url: str, key: str | None, as_json: bool) -> None:
    """Show JOB."""
    with failures_told(), _client(url, key) as client:
        job = client.jobs_of(job_id).get(job_id)
        if as_json:
            click.echo(json.dumps(dict(job.raw), indent=2))
            return
        click.echo(_line(job))
        for name, moment in (("created", job.created_at), ("started", job.started_at), ("finished", job.finished_at)):
            if moment:
                click.echo(f"{name:<11} {moment:%Y-%m-%d %H:%M:%S %Z}")
        for name, value in job.labels.items():
            click.echo(f"label       {name}:{value}")
        for warning in job.warnings:
            click.echo(f"warning     {warning}")
        if job.error:
            click.echo(f"error       {job.error.get('code')}: {job.error.get('detail')}")
            for place in job.error.get("errors", []):
                where = place.get("pointer") or place.get("tensor") or place.get("file")
                click.echo(f"            {where}: {place.get('detail')}")
        if job.status == "succeeded":
            for file in client.jobs_of(job_id).files(job):
                click.echo(f"file        {file.path}  {shown_bytes(file.size)}")


@jobs.command()
@JOB
@_service
def watch(job_id: str, url: str, key: str | None) -> None:
    """Watch JOB to its end; the exit status is 1 unless it succeeds."""
    with failures_told("interrupted; the job goes on without you"), _client(url, key) as client:
        _watch(client.jobs_of(job_id), job_id)


@jobs.command()
@JOBS
@_service
def cancel(job_ids: tuple[str, ...], url: str, key: str | None) -> None:
    """Stop jobs."""
    _each(job_ids, url, key, lambda jobs, job_id: _line(jobs.cancel(job_id)))


@jobs.command()
@JOBS
@_service
def retry(job_ids: tuple[str, ...], url: str, key: str | None) -> None:
    """Queue failed or canceled jobs again; they go on with what they had finished."""
    _each(job_ids, url, key, lambda jobs, job_id: _line(jobs.retry(job_id)))


@jobs.command()
@JOBS
@_service
def delete(job_ids: tuple[str, ...], url: str, key: str | None) -> None:
    """Delete jobs that have ended, and their files."""

    def gone(jobs: Jobs, job_id: str) -> str:
        jobs.delete(job_id)
        return f"{job_id}  deleted"

    _each(job_ids, url, key, gone)


@jobs.command()
@JOB
@click.argument("folder", type=DIR)
@_service
def download(job_id: str, folder: Path, url: str, key: str | None) -> None:
    """Download the files of JOB into FOLDER, checked by sha256. Interrupted, the same command goes on where it was."""
    with failures_told("interrupted; the same command goes on from here"), _client(url, key) as client:
        for path in client.jobs_of(job_id).download(job_id, folder, progress=True):
            click.echo(str(path))


@jobs.command()
@JOB
@_service
def logs(job_id: str, url: str, key: str | None) -> None:
    """Print what JOB's workers logged."""
    with failures_told(), _client(url, key) as client:
        click.echo(client.jobs_of(job_id).logs(job_id), nl=False)


def _client(url: str, key: str | None) -> Client:
    from app.client import Client

    return Client(url, api_key=key)


def _watch(jobs: Jobs, job_id: str) -> None:
    for warning in jobs.wait(job_id, progress=True).warnings:
        click.echo(f"warning: {warning}", err=True)


def _each(job_ids: tuple[str, ...], url: str, key: str | None, ask: Callable[[Jobs, str], str]) -> None:
    """Ask for every job, also after one was refused; exit status 1 if any was."""
    from app.client import Refused

    was_refused = False
    with failures_told(), _client(url, key) as client:
        for job_id in job_ids:
            try:
                click.echo(ask(client.jobs_of(job_id), job_id))
            except Refused as error:
                click.echo(f"error: {job_id}: {error}", err=True)
                was_refused = True
    if was_refused:
        sys.exit(1)


def _line(job: Job) -> str:
    """A job on one line."""
    done = f"{job.progress.fraction:6.1%}  {job.phase}" if job.status in ("running", "canceling") else ""
    made: Any = job.recipe[-1] if isinstance(job.recipe, list) else job.recipe or {}
    what = made.get("merge_method") or made.get("operation") or ""
    created = f"{job.created_at:%Y-%m-%d %H:%M}" if job.created_at else ""
    return f"{job.id}  {job.status:<9}  {created}  {what}  {done}".rstrip()


def _pairs(labels: tuple[str, ...]) -> dict[str, str]:
    found = dict(each.partition(":")[::2] for each in labels)
    if not all(":" in each for each in labels):
        raise click.UsageError("a label is written NAME:VALUE")
    return found
