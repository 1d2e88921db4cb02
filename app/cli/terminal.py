"""What commands share: their options, and how they talk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import SecretStr, ValidationError

from app.bars import terminal_bar
from app.words import shown_bytes
from merge_core.errors import WeightsmithError

if TYPE_CHECKING:
    from merge_core.artifact import Artifact
    from merge_core.progress import Progress as MergeProgress
    from merge_core.recipe import Recipe
    from merge_core.snapshots import Roots


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


def settings_of(data: Path | None, models: tuple[Path, ...], **others: Any) -> Any:
    """The environment's settings, with what `DATA`, `MODELS` and others said instead."""
    from workers.settings import Settings

    given: dict[str, Any] = {name: value for name, value in others.items() if value is not None}
    if data is not None:
        given["data"] = data
    if models:
        given["model_roots"] = list(models)
    return Settings(**given)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a file, or from the standard input for `-`."""
    from merge_core.recipe import Recipe

    return Recipe.from_text(sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes())


def tell_alignment(made: dict[str, Any] | None) -> None:
    """Say what a plan says of an alignment."""
    if made is None:
        return
    sizes = ", ".join(f"{each['count']} of {each['size']:,}" for each in made["permutations"][:4])
    sizes += ", …" if made["permutations"][4:] else ""
    models = ", ".join(made["models"])
    if made["stored"]:
        click.echo(f"aligned     {models} by {made['file']}: permutations {sizes}")
        return
    click.echo(f"aligns      {models} with {made['matched_with']}: permutations {sizes}")
    sweep, most = shown_bytes(made["bytes_per_sweep"]), shown_bytes(made["peak_memory"])
    click.echo(f"            reads {sweep} a sweep, at most {most} of memory")


def cache_folder() -> Path:
    """Where this user's commands keep what need not be found out twice."""
    return Path(click.get_app_dir("weightsmith")) / "cache"


def model_places() -> Roots:
    """Where models lie for a command: anywhere here, and on the Hub, as whoever types it may see it.

    That is their own shell, so `HF_TOKEN` and `HF_ENDPOINT` count, as for other programs of theirs.
    """
    import os

    from merge_core.snapshots import Roots
    from workers.hub.client import HubClient
    from workers.hub.opening import open_library
    from workers.settings import Settings

    given: dict[str, Any] = {}
    if endpoint := os.environ.get("HF_ENDPOINT"):
        given["hub_endpoint"] = endpoint
    settings = Settings(data=Path(click.get_app_dir("weightsmith")), **given)
    token = SecretStr(os.environ["HF_TOKEN"]) if os.environ.get("HF_TOKEN") else None
    library = open_library(settings, lambda: HubClient.of(settings, token=token))
    return Roots(library=library, anywhere=True)


def tell_of(artifact: Artifact, out: Path) -> None:
    """Say what was made."""
    for warning in artifact.warnings:
        click.echo(f"warning: {warning}", err=True)
    size = sum(file.size for file in artifact.files)
    click.echo(f"{out}: {len(artifact.tensors)} tensors, {shown_bytes(size)} in {len(artifact.files)} files")


def size_of(written: str | None) -> int | None:
    """Bytes of a size such as 1GiB. Raises `UsageError`."""
    from merge_core.sizes import parse_bytes

    try:
        size = None if written is None else int(parse_bytes(written))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if size == 0:
        raise click.UsageError("a size of nothing leaves no room for anything")
    return size


def _tell_settings(error: ValidationError) -> None:
    """Which variables are wrong and why, without what they are."""
    from workers.settings import Settings

    names = Settings.variables()
    for found in error.errors(include_input=False, include_url=False):
        where = str(found["loc"][0]) if found["loc"] else ""
        click.echo(f"error: {names.get(where, where)}: {found['msg'].removeprefix('Value error, ')}", err=True)


@contextmanager
def failures_told(interrupted: str = "interrupted") -> Iterator[None]:
    """Expected failures as one message and exit status 1, without a traceback."""
    try:
        yield
    except ValidationError as error:
        _tell_settings(error)
        sys.exit(1)
    except (WeightsmithError, OSError, ValueError) as error:
        # ValueError: settings and URLs that cannot be read, texts that are no UTF-8.
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo(interrupted, err=True)
        sys.exit(130)


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar with rate and time left on a terminal, nothing elsewhere; yields the function to report to."""
    with terminal_bar() as bar:
        if bar is None:
            yield lambda progress: None
            return
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
