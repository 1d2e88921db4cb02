"""The whole flow: recipe → plan → tensors → shards → artifact.

>>> from merge_core.merge import merge                                         # doctest: +SKIP
>>> merge(Recipe.from_text(open("recipe.yml").read()), "merged")               # doctest: +SKIP
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from merge_core.artifact import Artifact, SourceHashes, write_companions
from merge_core.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, CheckpointNotFound, OutputExists, Problem, RecipeError, WeightsmithError
from merge_core.execute import Execution, share_one_heap
from merge_core.method import Randomness
from merge_core.plan import Plan
from merge_core.planner import BLOCK_ELEMENTS, make_plan, referenced_models
from merge_core.progress import Progress, Report
from merge_core.recipe import ModelRef, Recipe
from merge_core.shards import JOURNAL, ShardWriter, fsync_folder


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
    out = Path(out)
    partial = partial or out.parent / f".{out.name}.partial"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExists(f"{out} exists and is not an empty folder; give another name or remove it")
    share_one_heap()
    try:
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
            with ExitStack() as stack:
                writer = stack.enter_context(ShardWriter(plan, partial))
                hashes = SourceHashes(plan, inputs, stop)
                stack.callback(hashes.close)
                execution = Execution(
                    plan, inputs, writer, randomness or Randomness(recipe.seed), Progress(), report, stop
                )
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
            return Artifact(out, tuple(files), writer.digests, warnings, writer.resumed)
    except WeightsmithError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
                error.problems = tuple(
                    Problem(problem.detail, pointer, problem.tensor, problem.file) for problem in error.problems
                )
                raise
        yield found


def locate(ref: ModelRef, roots: Sequence[Path] | None) -> Path:
    """The path a model reference means: as it stands, or below the first root that has it."""
    written = Path(ref.path).expanduser() if roots is None else Path(ref.path)
    if roots is None or written.is_absolute():
        return written
    candidates = [root / written for root in roots]
    for candidate in candidates:
        if os.path.lexists(candidate):
            return candidate
    raise CheckpointNotFound(ref.path, "is in none of this service's model folders; Hub models are not supported yet")


def _appear(partial: Path, out: Path) -> None:
    """Make the finished folder appear under its name in one step."""
    (partial / JOURNAL).unlink()
    fsync_folder(partial)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    fsync_folder(out.parent)
