"""`weightsmith verify`."""

from __future__ import annotations

import sys

import click

from app.cli.terminal import MEMORY, THREADS, cache_folder, failures_told, model_places, progress_bar, size_of
from merge_core.imports import quick_imports

_STATUS = {"agrees": 0, "differs": 1, "unchecked": 3}


@click.command()
@click.argument("model", metavar="REPO_OR_DIR")
@click.option("--all", "all_", is_flag=True, help="Make every tensor again.")
@click.option("--sample", type=click.IntRange(1), default=16, show_default=True, help="Make so many tensors again.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Draws the sample.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="NAME=PLACE",
    help="Where a model is now that the lock calls NAME; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@MEMORY
@THREADS
def verify(
    model: str,
    all_: bool,
    sample: int,
    seed: int,
    sources: tuple[str, ...],
    as_json: bool,
    memory: str | None,
    threads: int | None,
) -> None:
    """Prove a published merge: hash its files, and make a sample of its tensors again from its merge.lock.json.

    Model paths are as seen from here. The exit status is 0 if what was looked at agrees, 1 if anything differs, 3 if
    no tensor could be made again, as where the sources are not there.
    """
    import json

    most = size_of(memory)
    if not all("=" in each for each in sources):
        raise click.UsageError("a source is written NAME=PLACE")
    with failures_told():
        with quick_imports():
            from merge_core.verification import VerifyDocument, find_published
            from merge_core.verify import verify as core

        named = {name: place for name, _, place in (each.partition("=") for each in sources)}
        document = VerifyDocument.from_data({"model": model, "sources": named})
        places = model_places()
        with progress_bar() as report:
            found = core(
                find_published(document, places),
                sample=None if all_ else sample,
                seed=seed,
                sources=document.sources,
                roots=places,
                memory=most,
                threads=threads,
                cache=cache_folder(),
                report=report,
            )
    click.echo(json.dumps(found.to_data(), indent=2) if as_json else found.to_text(), nl=as_json)
    sys.exit(_STATUS[found.outcome])
