"""`weightsmith merge | plan | import`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from app.cli.terminal import (
    MEMORY,
    RECIPE,
    THREADS,
    cache_folder,
    failures_told,
    model_places,
    progress_bar,
    read_recipe,
    size_of,
    tell_alignment,
    tell_of,
)
from app.words import shown_bytes
from merge_core.imports import quick_imports


@click.command()
@click.argument("recipe", type=RECIPE)
@click.argument("out", type=click.Path(path_type=Path))
@MEMORY
@THREADS
@click.option("--shard-size", metavar="SIZE", help="Most bytes of tensors in one file, such as 5GB.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 … or auto; the bytes are the same.")
def merge(
    recipe: Path, out: Path, memory: str | None, threads: int | None, shard_size: str | None, device: str
) -> None:
    """Merge by RECIPE into the folder OUT, without a service.

    Model paths are as seen from here; what is not here and looks like org/name is a model on the Hub. Interrupted, the
    same command goes on where it was.
    """
    most, shard = size_of(memory), size_of(shard_size)
    with failures_told("interrupted; the same command goes on from here"):
        with quick_imports():
            from merge_core import merge as core
            from merge_core.errors import Problem, RecipeError

        read = read_recipe(recipe)
        if read.outputs.hub is not None:
            detail = (
                "a service publishes what it merges (weightsmith serve, then submit); to merge here, leave this away"
            )
            raise RecipeError.of([Problem(detail, "#/outputs/hub")])
        with progress_bar() as report:
            artifact = core.merge(
                read,
                out,
                roots=model_places(),
                memory=most,
                threads=threads,
                max_shard_size=shard,
                cache=cache_folder(),
                device=device,
                report=report,
            )
    tell_of(artifact, out)


@click.command()
@click.argument("recipe", type=RECIPE)
@MEMORY
@THREADS
@click.option("--steps", is_flag=True, help="One line per output tensor.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def plan(recipe: Path, memory: str | None, threads: int | None, steps: bool, as_json: bool) -> None:
    """Show what RECIPE would read, write and need. No weight is read."""
    import json

    most = size_of(memory)
    with failures_told():
        with quick_imports():
            from merge_core.merge import plan_only

        made = plan_only(read_recipe(recipe), roots=model_places(), memory=most, threads=threads).to_dict(steps=steps)
    if as_json:
        click.echo(json.dumps(made, indent=2))
        return
    click.echo(f"method      {made['method']}, {made['semantics']}'s meaning, measured per {made['scope']}")
    for stage in made.get("stages", []):
        click.echo(f"stage       {stage['name']}: {stage['method']} of {', '.join(stage['models'])}")
    roles = [f"{model} ({made['roles'][model]})" if model in made["roles"] else model for model in made["models"]]
    click.echo(f"models      {', '.join(roles)}")
    for put in made.get("patches", []):
        click.echo(f"patch       {put['strength']:g} · {put['patch']} on {put['tensors']} tensors")
    for each in (made, *made.get("stages", [])):
        tell_alignment(each.get("alignment"))
    copied = made["tensors"] - made["tensors_merged"]
    click.echo(f"tensors     {made['tensors_merged']} merged, {copied} copied")
    click.echo(
        f"reads       {shown_bytes(made['bytes_read'])} in {made['passes']} pass{'es' if made['passes'] > 1 else ''}"
    )
    shards = ", ".join(shard["file"] for shard in made["shards"][:3]) + (", …" if made["shards"][3:] else "")
    bound = "at most " if made["bytes_written_at_most"] else ""
    click.echo(f"writes      {bound}{shown_bytes(made['bytes_written'])}: {shards}")
    if outputs := made.get("outputs"):
        whole = f", {outputs['held_whole']} tensors held whole" if outputs["held_whole"] else ""
        click.echo(f"output      {outputs['kind']}, {outputs['encoding']}{whole}")
    click.echo(f"memory      at most {shown_bytes(made['peak_memory'])} with {made['threads']} threads")
    for note in made["left_out"]:
        click.echo(f"left out    {note}")
    for warning in made["warnings"]:
        click.echo(f"warning     {warning}")
    for step in made.get("steps", []):
        given = [source for each in step["given"].values() for source in each if source]
        sources = ", ".join(f"{source['model']}:{source['tensor']}" for source in [*step["sources"], *given])
        how = f"copied, {step['copied_because']}" if step["copied_because"] else json.dumps(step["parameters"])
        how += "".join(f" + {strength:g} · {patch}" for patch, strength in step.get("patches", {}).items())
        click.echo(f"{step['tensor']}  {step['dtype']}{step['shape']}  {how}  ← {sources}")


@click.command("import")
@click.argument("file", type=RECIPE)
def import_(file: Path) -> None:
    """Print the recipe in FILE, a published recipe or a model card, as it is read here.

    Keys without effect are taken out, and told on the standard error output with what mergekit does with them.
    """
    with failures_told():
        with quick_imports():
            from merge_core.published import read_published

        published = read_published(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes())
    click.echo(published.recipe.to_yaml(), nl=False)
    for each in published.ignored:
        click.echo(f"{each.pointer}: {each.what}", err=True)
