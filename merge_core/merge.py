"""The whole flow: recipe → plan → tensors → shards → artifact.

Usage: `merge(Recipe.from_text(text), "merged")`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from merge_core.artifact import Artifact, SourceHashes, read_artifact, write_companions
from merge_core.checkpoint import Checkpoint, check_below
from merge_core.errors import CheckpointError, CheckpointNotFound, OutputExists, Problem, RecipeError
from merge_core.execute import Execution, share_one_heap
from merge_core.method import Randomness
from merge_core.plan import Plan
from merge_core.planner import BLOCK_ELEMENTS, make_plan, referenced_models
from merge_core.progress import Progress, Report
from merge_core.recipe import ModelRef, Recipe
from merge_core.shards import JOURNAL, ShardWriter, disk_error, fsync_folder, nearest_existing, unfinished


def merge(
    recipe: Recipe,
    out: str | Path,
    *,
    roots: Sequence[Path] | None = None,
    partial: Path | None = None,
    memory: int | None = None,
    threads: int | None = None,
    block_elements: int = BLOCK_ELEMENTS,
    max_shard_size: int | None = None,
    randomness: Randomness | None = None,
    report: Report = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Merge models as the recipe says into the folder `out`, which appears whole or not at all.

    `roots`: folders that models may lie in, relative paths starting there (None: anywhere, from the working directory).
    `partial`: where the unfinished output grows (beside `out` by default). After a kill, the same call goes on from
    there; after any `WeightsmithError` it is removed. `memory` (bytes), `threads` and `max_shard_size` (bytes) go
    before the recipe's. `report` is called with the progress after every block, and `stop` is asked whether to give up
    (`Canceled`).

    The bytes of every tensor depend on the recipe and the models alone. Raises `WeightsmithError`.
    """
    out = Path(out).absolute()
    partial = partial or out.parent / f".{out.name}.partial"
    share_one_heap()
    try:
        _check_output(out, partial)
        with opened(recipe, roots) as checkpoints:
            plan = make_plan(
                recipe,
                checkpoints,
                memory=memory,
                threads=threads,
                block_elements=block_elements,
                max_shard_size=max_shard_size,
            )
            inputs = [checkpoints[model] for model in plan.models]
            with unfinished(partial):
                return _carry_out(plan, inputs, partial, out, randomness or Randomness(recipe.seed), report, stop)
    except OSError as error:
        raise disk_error(error, Path(error.filename or out), 0) from error


def _carry_out(
    plan: Plan,
    inputs: Sequence[Checkpoint],
    partial: Path,
    out: Path,
    randomness: Randomness,
    report: Report,
    stop: Callable[[], bool],
) -> Artifact:
    try:
        with ExitStack() as stack:
            writer = stack.enter_context(ShardWriter(plan, partial))
            hashes = SourceHashes(plan, inputs, stop)
            stack.callback(hashes.close)
            execution = Execution(plan, inputs, writer, randomness, Progress(), report, stop)
            execution.run()
            weights = writer.finish()
            sources = hashes.result()
        for checkpoint in inputs:
            checkpoint.check_unchanged()
        warnings = (*plan.warnings, *execution.warnings)
        files = write_companions(
            plan, inputs, partial, weights=weights, tensors=writer.digests, sources=sources, warnings=warnings
        )
        _appear(partial, out)
    except OSError as error:
        raise disk_error(error, Path(error.filename or partial), 0) from error
    return Artifact(out, tuple(files), writer.digests, warnings, writer.resumed)


def _check_output(out: Path, partial: Path) -> None:
    """Raise `OutputExists` for anything that would keep the finished folder from appearing, before work is begun."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise OutputExists(f"{out} exists and is not an empty folder; give another name or remove it")
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise OutputExists(f"{partial}, where the unfinished output would grow, is no folder; remove it")
    if nearest_existing(out).stat().st_dev != nearest_existing(partial).stat().st_dev:
        raise OutputExists(f"{partial} and {out} are on different file systems, so the result could not appear at once")


def plan_only(
    recipe: Recipe, *, roots: Sequence[Path] | None = None, memory: int | None = None, threads: int | None = None
) -> Plan:
    """The plan alone: headers and configs are read, no weights. Raises `WeightsmithError`."""
    with opened(recipe, roots) as checkpoints:
        return make_plan(recipe, checkpoints, memory=memory, threads=threads)


@contextmanager
def opened(recipe: Recipe, roots: Sequence[Path] | None) -> Iterator[Mapping[ModelRef, Checkpoint]]:
    """Every model of the recipe, opened from its headers. Raises `CheckpointError` or `RecipeError` naming the key."""
    with ExitStack() as stack:
        found: dict[ModelRef, Checkpoint] = {}
        for ref, pointer in referenced_models(recipe).items():
            if ref.revision or ref.adapter:
                what = "an adapter" if ref.adapter else "a revision"
                raise RecipeError.of(
                    [Problem(f"{ref} names {what}, which is not supported yet; give a local folder", pointer)]
                )
            try:
                found[ref] = stack.enter_context(Checkpoint.open(locate(ref, roots), roots=roots))
            except CheckpointError as error:
                raise error.as_written(roots or (), pointer) from None
        yield found


def locate(ref: ModelRef, roots: Sequence[Path] | None) -> Path:
    """The path a model reference means: as it stands, or below the first root that has it."""
    written = Path(ref.path)
    if roots is None or written.is_absolute():
        return written.expanduser() if roots is None else written
    for root in roots:
        check_below(root / written, [root])
        if os.path.lexists(root / written):
            return root / written
    raise CheckpointNotFound(ref.path, "is in none of this service's model folders; Hub models are not supported yet")


def adopt(out: Path) -> Artifact:
    """An artifact that appeared, but whose maker was killed before it could say so."""
    (out / JOURNAL).unlink(missing_ok=True)
    return read_artifact(out)


def _appear(partial: Path, out: Path) -> None:
    """Make the finished folder appear under its name in one step; until then the journal shows whose it is."""
    fsync_folder(partial)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    (out / JOURNAL).unlink()
    fsync_folder(out.parent)
