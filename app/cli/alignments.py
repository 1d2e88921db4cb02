"""`weightsmith align` and `weightsmith permutations inspect | invert | apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from app.cli.terminal import (
    FILE,
    MEMORY,
    THREADS,
    cache_folder,
    failures_told,
    model_places,
    progress_bar,
    size_of,
    tell_alignment,
    tell_of,
)
from merge_core.imports import quick_imports


@click.command()
@click.argument("given", nargs=-1, required=True, metavar="RECIPE OUT | MODEL MODEL… -o OUT")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder for what is found, with models named directly."
)
@click.option(
    "--to", type=click.Choice(["base", "first", "mean"]), help="What to match with.  [default: base, else first]"
)
@click.option("--base", metavar="MODEL", help="The base that all models are matched with.")
@click.option("--spec", metavar="FILE", help="Which permutations there are, as JSON.  [default: derived]")
@click.option("--residual", is_flag=True, help="Permute the residual stream too: for models of different starts.")
@click.option("--seed", type=click.IntRange(0), help="Of the order of visits.  [default: 0]")
@click.option("--full-report", is_flag=True, help="Compare the strong directions of every matrix too.")
@click.option("--plan", "only_plan", is_flag=True, help="Show what it would take; no weight is read.")
@MEMORY
@THREADS
def align(
    given: tuple[str, ...],
    out: Path | None,
    memory: str | None,
    threads: int | None,
    only_plan: bool,
    full_report: bool,
    **how: Any,
) -> None:
    """Find the permutations of neurons that bring models into one order.

    By a document, or with the models named directly. Into the folder OUT come alignment.safetensors, which any recipe
    takes as `alignment: {permutations: FILE}`, and report.json. Interrupted, the same command goes on where it was.
    """
    most = size_of(memory)
    with failures_told("interrupted; the same command goes on from here"):
        with quick_imports():
            from merge_core import align as core
            from merge_core.aligned import FILE_NAME

        asked = full_report or any(how.values())
        if out is None and len(given) == 2 and not asked and Path(given[0]).is_file():
            document = core.AlignmentDocument.from_text(Path(given[0]).read_bytes())
            out = Path(given[1])
        elif out is None:
            raise click.UsageError("give a document, which says all else, and a folder, or models and -o FOLDER")
        else:
            base, keys = how.pop("base"), {key: value for key, value in how.items() if value}
            written = {"models": list(given), "alignment": keys, "report": "full" if full_report else None}
            document = core.AlignmentDocument.from_data(written | ({"base_model": base} if base else {}))
        if only_plan:
            tell_alignment(core.plan_only(document, roots=model_places(), memory=most, threads=threads).to_dict())
            return
        with progress_bar() as report:
            core.align(
                document,
                out,
                roots=model_places(),
                memory=most,
                threads=threads,
                cache=cache_folder(),
                report=report,
            )
    import json

    told = json.loads((out / core.REPORT_NAME).read_text())
    for model, about in told["models"].items():
        if model != told["compared_with"]:
            apart = about.get("l2") or [about["analysis"][f"distance_{when}"] for when in ("before", "after")]
            moved = f"moved {sum(about['moved'].values()):,} neurons"
            click.echo(f"{model}: {moved}; {apart[0]:.4g} from {told['compared_with']}, now {apart[1]:.4g}")
    click.echo(f"{out / FILE_NAME}")


@click.group()
def permutations() -> None:
    """Look at, undo or apply permutations that were found: the file alignment.safetensors of an artifact."""


@permutations.command("inspect")
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with every permutation and how it was found.")
def inspect_permutations(file: Path, as_json: bool) -> None:
    """Show which models FILE permutes, and how much of each it moves."""
    import json

    with failures_told():
        with quick_imports():
            from merge_core.alignment.permutations import Permutations

        found = Permutations.open(file)
    moved = {model: found.moved(model) for model in found.models}
    if as_json:
        told = {"models": moved, "sizes": dict(found.spec.permutations), "provenance": dict(found.provenance)}
        click.echo(json.dumps(told, indent=2))
        return
    elements = sum(found.spec.permutations.values())
    click.echo(
        f"{len(found.spec.permutations)} permutations of {elements:,} elements on {len(found.spec.axes)} tensors"
    )
    for model, counts in moved.items():
        many = sum(count > 0 for count in counts.values())
        click.echo(f"{model}  moves {sum(counts.values()):,} elements in {many} permutations")


@permutations.command("invert")
@click.argument("file", type=FILE)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def invert_permutations(file: Path, out: Path) -> None:
    """Write to OUT the permutations that undo those in FILE."""
    with failures_told():
        with quick_imports():
            from merge_core.alignment.permutations import Permutations

        if out.exists():
            raise click.UsageError(f"{out} exists; give another name or remove it")
        if out.suffix != ".safetensors":
            raise click.UsageError(f"{out} is to hold permutations; give it a name that ends in .safetensors")
        Permutations.open(file).inverse().save(out)


@permutations.command("apply")
@click.argument("file", type=FILE)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--as", "name", metavar="NAME", help="What FILE calls the model, if not what it is called here.")
@MEMORY
@THREADS
def apply_permutations(
    file: Path, model: str, out: Path, name: str | None, memory: str | None, threads: int | None
) -> None:
    """Write MODEL with its neurons in the order that FILE says into the folder OUT.

    The model that comes out computes what MODEL does. The same as a recipe that passes it through with
    `alignment: {permutations: FILE}`.
    """
    most = size_of(memory)
    with failures_told("interrupted; the same command goes on from here"):
        with quick_imports():
            from merge_core import align
            from merge_core import merge as core

        with progress_bar() as report:
            recipe = align.applying(file, model, name)
            artifact = core.merge(recipe, out, memory=most, threads=threads, cache=cache_folder(), report=report)
    tell_of(artifact, out)
