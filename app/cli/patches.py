"""`weightsmith patch extract | apply | remove | inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from app.cli.terminal import (
    MEMORY,
    THREADS,
    cache_folder,
    failures_told,
    model_places,
    progress_bar,
    size_of,
    tell_of,
)
from app.words import shown_bytes
from merge_core.imports import quick_imports


@click.group()
def patch() -> None:
    """Signatures and deltas: extract, apply, remove and inspect them."""


@patch.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, metavar="MODEL", help="What the others were tuned from.")
@click.option("--clean", required=True, metavar="MODEL", help="Tuned on clean data.")
@click.option("--corrupted", required=True, multiple=True, metavar="MODEL", help="Tuned on corrupted data; repeatable.")
@click.option("--layers", type=click.IntRange(1), help="So many layers from the input on.")
@click.option("--layer", "pieces", multiple=True, metavar="PIECE", help="Or pieces of tensor names; repeatable.")
@click.option("--levels", type=int, default=256, show_default=True, help="Levels to round to; 256 take a byte each.")
@click.option("--scale", type=click.Choice(["linear", "log"]), default="linear", show_default=True)
@click.option("--dense", is_flag=True, help="All numbers in float32 instead of levels.")
@click.option("--batch-norm", type=click.Choice(["replace", "project", "leave"]), default="replace", show_default=True)
@click.option("--replace", multiple=True, metavar="PIECE", help="Replace tensors with this in their names; repeatable.")
@MEMORY
@THREADS
def extract(
    out: Path,
    base: str,
    clean: str,
    corrupted: tuple[str, ...],
    layers: int | None,
    pieces: tuple[str, ...],
    levels: int,
    scale: str,
    dense: bool,
    batch_norm: str,
    replace: tuple[str, ...],
    memory: str | None,
    threads: int | None,
) -> None:
    """Write into the folder OUT the robust weight signature of models tuned on corrupted data.

    That is what they learned in their first layers and the clean model did not, as one small file.
    """
    if (layers is None) != bool(pieces):
        raise click.UsageError("give either --layers or --layer")
    stored = {"encoding": "dense"} if dense else {"levels": levels, "scale": scale}
    chosen = layers if layers is not None else list(pieces)
    document = {"operation": "extract", "base_model": base, "clean": clean, "corrupted": list(corrupted)}
    how = {"layers": chosen, "batch_norm": batch_norm, "replace": list(replace)}
    _patch({**document, **how, **stored}, out, memory, threads)


@patch.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "-p",
    "--patch",
    "patches",
    required=True,
    multiple=True,
    type=(str, float),
    metavar="FILE STRENGTH",
    help="A delta or signature and how much of it; repeatable.",
)
@click.option("--no-reversal", is_flag=True, help="Keep nothing to take the patches off again.")
@MEMORY
@THREADS
def apply(
    model: str,
    out: Path,
    patches: tuple[tuple[str, float], ...],
    no_reversal: bool,
    memory: str | None,
    threads: int | None,
) -> None:
    """Write into the folder OUT the MODEL with patches on it.

    The same as a recipe that passes the model through, with `patches`. What they changed is kept beside it.
    """
    put = [{"patch": name, "strength": strength} for name, strength in patches]
    document = {"operation": "apply", "model": model, "patches": put, "reversible": not no_reversal}
    _patch(document, out, memory, threads)


@patch.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--reversal", metavar="FILE", help="If it is not in the model's folder.")
@click.option("--source", "sources", multiple=True, type=(str, str), metavar="NAME MODEL", help="Where a model is now.")
@MEMORY
@THREADS
def remove(
    model: str,
    out: Path,
    reversal: str | None,
    sources: tuple[tuple[str, str], ...],
    memory: str | None,
    threads: int | None,
) -> None:
    """Write into the folder OUT the MODEL as it was before its patches, bit for bit.

    By its reversal, or made again without patches from the models that its lock names and proves.
    """
    given = {"reversal": reversal} if reversal else {}
    _patch({"operation": "remove", "model": model, "sources": dict(sources), **given}, out, memory, threads)


@patch.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def inspect(file: Path, as_json: bool) -> None:
    """Show what FILE, a delta or signature, changes and what it was made of."""
    import json

    with failures_told():
        with quick_imports():
            from merge_core.headers import clip
            from merge_core.patches.delta import Delta
            from merge_core.patching import describe

        with Delta.open(file) as delta:
            told = describe(delta)
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    click.echo(f"{clip(told['kind'])}: {len(told['tensors'])} tensors in {shown_bytes(told['bytes'])}")
    for key, value in told["provenance"].items():
        if isinstance(value, str | int) or (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            shown = value if isinstance(value, int) else clip(value if isinstance(value, str) else ", ".join(value))
            click.echo(f"{clip(key):<11} {shown}")
    for tensor in told["tensors"]:
        shape, size = tensor["shape"], shown_bytes(tensor["bytes"])
        click.echo(f"{tensor['tensor']}  {tensor['dtype']}{shape}  {tensor['encoding']}, {size}")
    for name in told["removed"]:
        click.echo(f"{name}  removed")


def _patch(document: dict[str, Any], out: Path, memory: str | None, threads: int | None) -> None:
    most = size_of(memory)
    with failures_told("interrupted; the same command goes on from here"):
        with quick_imports():
            from merge_core import patching

        with progress_bar() as report:
            artifact = patching.patch(
                patching.Patch.from_data(document),
                out,
                roots=model_places(),
                memory=most,
                threads=threads,
                cache=cache_folder(),
                report=report,
            )
    tell_of(artifact, out)
