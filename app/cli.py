"""`weightsmith serve | worker | merge | plan | patch | import | submit`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge_core import __version__
from merge_core.errors import WeightsmithError
from merge_core.imports import quick_imports

if TYPE_CHECKING:
    from merge_core.artifact import Artifact
    from merge_core.progress import Progress as MergeProgress
    from merge_core.recipe import Recipe
    from workers.supervisor import Supervisor

RECIPE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
URL = click.option(
    "--url", default="http://127.0.0.1:8000", envvar="WEIGHTSMITH_URL", show_default=True, help="The service."
)
DATA = click.option(
    "--data", type=click.Path(path_type=Path), help="Where jobs and artifacts live.  [default: ./weightsmith-data]"
)
MODELS = click.option(
    "--models",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that recipes may name models in; may be repeated.  [default: DATA/models]",
)
MEMORY = click.option("--memory", metavar="SIZE", help="Most memory of the whole process, such as 1GiB.")
THREADS = click.option("--threads", type=click.IntRange(1), help="Compute threads (default: one per core).")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="weightsmith")
def main() -> None:
    """Merge model weights: POST a recipe, get a checkpoint."""


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@DATA
@MODELS
def serve(host: str, port: int, data: Path | None, models: tuple[Path, ...]) -> None:
    """Run the service and one worker: no Redis, no Docker.

    Models are read only from the folders given by --models; recipes name them by their paths below these.
    """
    with _told():
        import uvicorn

        from app.main import create_app
        from workers.supervisor import Supervisor

        settings = _settings(data, models)
        if host not in ("127.0.0.1", "::1", "localhost"):
            click.echo(f"warning: anybody who can reach {host} can use this service; it has no accounts yet", err=True)
        config = uvicorn.Config(
            create_app(settings), host=host, port=port, log_level="warning", timeout_graceful_shutdown=5
        )
        listening = config.bind_socket()
        with _supervised(Supervisor(settings)):
            roots = ", ".join(map(str, settings.roots))
            click.echo(f"Weightsmith {__version__}: http://{host}:{listening.getsockname()[1]}/docs", err=True)
            click.echo(f"  models in {roots}\n  data in {settings.data.absolute()}", err=True)
            uvicorn.Server(config).run(sockets=[listening])


@main.command()
@DATA
@MODELS
def worker(data: Path | None, models: tuple[Path, ...]) -> None:
    """Run one more worker on this machine, or on another with the same data folder, database and broker."""
    with _told():
        from workers.supervisor import Supervisor

        supervisor = Supervisor(_settings(data, models))
        with _supervised(supervisor):
            supervisor.wait()


@main.command()
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

    Model paths are as seen from here. Interrupted, the same command goes on where it was.
    """
    most, shard = _size(memory), _size(shard_size)
    with _told("interrupted; the same command goes on from here"):
        with quick_imports():
            from merge_core import merge as core

        with _progress_bar() as report:
            artifact = core.merge(
                _read(recipe),
                out,
                memory=most,
                threads=threads,
                max_shard_size=shard,
                cache=_cache(),
                device=device,
                report=report,
            )
    _tell_of(artifact, out)


@main.command()
@click.argument("recipe", type=RECIPE)
@MEMORY
@THREADS
@click.option("--steps", is_flag=True, help="One line per output tensor.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def plan(recipe: Path, memory: str | None, threads: int | None, steps: bool, as_json: bool) -> None:
    """Show what RECIPE would read, write and need. No weight is read."""
    import json

    most = _size(memory)
    with _told():
        with quick_imports():
            from merge_core.merge import plan_only

        made = plan_only(_read(recipe), memory=most, threads=threads).to_dict(steps=steps)
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
        _tell_alignment(each.get("alignment"))
    copied = made["tensors"] - made["tensors_merged"]
    click.echo(f"tensors     {made['tensors_merged']} merged, {copied} copied")
    click.echo(f"reads       {_bytes(made['bytes_read'])} in {made['passes']} pass{'es' if made['passes'] > 1 else ''}")
    shards = ", ".join(shard["file"] for shard in made["shards"][:3]) + (", …" if made["shards"][3:] else "")
    bound = "at most " if made["bytes_written_at_most"] else ""
    click.echo(f"writes      {bound}{_bytes(made['bytes_written'])}: {shards}")
    if outputs := made.get("outputs"):
        whole = f", {outputs['held_whole']} tensors held whole" if outputs["held_whole"] else ""
        click.echo(f"output      {outputs['kind']}, {outputs['encoding']}{whole}")
    click.echo(f"memory      at most {_bytes(made['peak_memory'])} with {made['threads']} threads")
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


@main.group()
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

    with _told():
        with quick_imports():
            from merge_core.headers import clip
            from merge_core.patches.delta import Delta
            from merge_core.patching import describe

        with Delta.open(file) as delta:
            told = describe(delta)
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    click.echo(f"{clip(told['kind'])}: {len(told['tensors'])} tensors in {_bytes(told['bytes'])}")
    for key, value in told["provenance"].items():
        if isinstance(value, str | int) or (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            shown = value if isinstance(value, int) else clip(value if isinstance(value, str) else ", ".join(value))
            click.echo(f"{clip(key):<11} {shown}")
    for tensor in told["tensors"]:
        shape, size = tensor["shape"], _bytes(tensor["bytes"])
        click.echo(f"{tensor['tensor']}  {tensor['dtype']}{shape}  {tensor['encoding']}, {size}")
    for name in told["removed"]:
        click.echo(f"{name}  removed")


def _patch(document: dict[str, Any], out: Path, memory: str | None, threads: int | None) -> None:
    most = _size(memory)
    with _told("interrupted; the same command goes on from here"):
        with quick_imports():
            from merge_core import patching

        with _progress_bar() as report:
            artifact = patching.patch(
                patching.Patch.from_data(document),
                out,
                memory=most,
                threads=threads,
                cache=_cache(),
                report=report,
            )
    _tell_of(artifact, out)


@main.command()
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
    most = _size(memory)
    with _told("interrupted; the same command goes on from here"):
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
            _tell_alignment(core.plan_only(document, memory=most, threads=threads).to_dict())
            return
        with _progress_bar() as report:
            core.align(document, out, memory=most, threads=threads, cache=_cache(), report=report)
    import json

    told = json.loads((out / core.REPORT_NAME).read_text())
    for model, about in told["models"].items():
        if model != told["compared_with"]:
            apart = about.get("l2") or [about["analysis"][f"distance_{when}"] for when in ("before", "after")]
            moved = f"moved {sum(about['moved'].values()):,} neurons"
            click.echo(f"{model}: {moved}; {apart[0]:.4g} from {told['compared_with']}, now {apart[1]:.4g}")
    click.echo(f"{out / FILE_NAME}")


@main.group()
def permutations() -> None:
    """Look at, undo or apply permutations that were found: the file alignment.safetensors of an artifact."""


@permutations.command("inspect")
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with every permutation and how it was found.")
def inspect_permutations(file: Path, as_json: bool) -> None:
    """Show which models FILE permutes, and how much of each it moves."""
    import json

    with _told():
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
    with _told():
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
    most = _size(memory)
    with _told("interrupted; the same command goes on from here"):
        with quick_imports():
            from merge_core import align
            from merge_core import merge as core

        with _progress_bar() as report:
            recipe = align.applying(file, model, name)
            artifact = core.merge(recipe, out, memory=most, threads=threads, cache=_cache(), report=report)
    _tell_of(artifact, out)


@main.command("import")
@click.argument("file", type=RECIPE)
def import_(file: Path) -> None:
    """Print the recipe in FILE, a published recipe or a model card, as it is read here.

    Keys without effect are taken out, and told on the standard error output with what mergekit does with them.
    """
    with _told():
        with quick_imports():
            from merge_core.published import read_published

        published = read_published(sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes())
    click.echo(published.recipe.to_yaml(), nl=False)
    for each in published.ignored:
        click.echo(f"{each.pointer}: {each.what}", err=True)


@main.command()
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
    with _told("interrupted; the job goes on without you"):
        from app.client import Client

        body = sys.stdin.buffer.read() if str(recipe) == "-" else recipe.read_bytes()
        if download:
            download.mkdir(parents=True, exist_ok=True)
        with Client(url) as client:
            job = client.submit(body, kind)
            click.echo(job["id"])
            if wait or download:
                with _progress_bar() as report:
                    job = client.wait(job, report)
                for warning in job["warnings"]:
                    click.echo(f"warning: {warning}", err=True)
            if download:
                client.download(job, download)
                click.echo(str(download))


def _leave(*_: object) -> None:
    """SIGTERM is Ctrl-C: what was started is stopped on the way out."""
    raise KeyboardInterrupt


@contextmanager
def _supervised(supervisor: Supervisor) -> Iterator[None]:
    """A worker that runs until the end, however that comes; once it is being stopped no further signal is heard."""
    signal.signal(signal.SIGTERM, _leave)
    supervisor.start()
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        supervisor.stop()


def _settings(data: Path | None, models: tuple[Path, ...]) -> Any:
    from workers.settings import Settings

    given: dict[str, Any] = {}
    if data is not None:
        given["data"] = data
    if models:
        given["model_roots"] = list(models)
    return Settings(**given)


def _read(path: Path) -> Recipe:
    from merge_core.recipe import Recipe

    return Recipe.from_text(sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes())


def _tell_alignment(made: dict[str, Any] | None) -> None:
    if made is None:
        return
    sizes = ", ".join(f"{each['count']} of {each['size']:,}" for each in made["permutations"][:4])
    sizes += ", …" if made["permutations"][4:] else ""
    models = ", ".join(made["models"])
    if made["stored"]:
        click.echo(f"aligned     {models} by {made['file']}: permutations {sizes}")
        return
    click.echo(f"aligns      {models} with {made['matched_with']}: permutations {sizes}")
    click.echo(
        f"            reads {_bytes(made['bytes_per_sweep'])} a sweep, at most {_bytes(made['peak_memory'])} of memory"
    )


def _cache() -> Path:
    return Path(click.get_app_dir("weightsmith")) / "cache"


def _tell_of(artifact: Artifact, out: Path) -> None:
    for warning in artifact.warnings:
        click.echo(f"warning: {warning}", err=True)
    size = sum(file.size for file in artifact.files)
    click.echo(f"{out}: {len(artifact.tensors)} tensors, {_bytes(size)} in {len(artifact.files)} files")


def _size(written: str | None) -> int | None:
    from merge_core.sizes import parse_bytes

    try:
        size = None if written is None else int(parse_bytes(written))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if size == 0:
        raise click.UsageError("a size of nothing leaves no room for anything")
    return size


def _bytes(count: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} bytes" if units[0] == "bytes" else f"{count:.1f} {units[0]}"


@contextmanager
def _told(interrupted: str = "interrupted") -> Iterator[None]:
    """Expected failures as one message and exit status 1, without a traceback."""
    try:
        yield
    except (WeightsmithError, OSError, ValueError) as error:
        # ValueError: settings and URLs that cannot be read, texts that are no UTF-8.
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo(interrupted, err=True)
        sys.exit(130)


@contextmanager
def _progress_bar() -> Iterator[Any]:
    """A bar with rate and time left on a terminal, a line every few seconds elsewhere; yields the function to report
    to.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda progress: None
        return
    columns = (
        TextColumn("{task.description:>24.24}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("planning", total=None)

        def report(progress: MergeProgress) -> None:
            total = progress.bytes_read_total + progress.bytes_written_total
            bar.update(
                task,
                description=progress.phase,
                completed=progress.bytes_read + progress.bytes_written,
                total=total or None,
            )

        yield report


if __name__ == "__main__":
    main()
