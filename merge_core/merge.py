"""The whole flow: recipe → plan → tensors → shards → artifact.

Usage: `merge(Recipe.from_text(text), "merged")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from merge_core import kernels
from merge_core.adapted import Adapted
from merge_core.adapter_sums import Placed
from merge_core.adapters import Adapter, is_adapter
from merge_core.aligned import Alignment
from merge_core.artifact import Artifact, read_artifact, write_companions
from merge_core.blocks import CPU
from merge_core.checkpoint import Checkpoint, locate
from merge_core.delivery import Delivery
from merge_core.differences import DifferenceExecution, plan_difference, read_beside
from merge_core.errors import (
    CheckpointError,
    DeviceNotFound,
    IncompatibleModels,
    OutputExists,
    Problem,
    RecipeError,
)
from merge_core.execute import Execution, share_one_heap
from merge_core.files import WrittenFile, disk_error, fsync_folder, nearest_existing
from merge_core.journal import JOURNAL
from merge_core.memory import BLOCK_ELEMENTS
from merge_core.merged import MergedWeights, Unrounded, make_plan_in_stages
from merge_core.method import Randomness
from merge_core.patches.delta import Delta, find_delta
from merge_core.patches.patched import Patched, ScaledDelta
from merge_core.plan import AlignmentPlan, Plan, Step
from merge_core.progress import Progress, Report
from merge_core.recipe import Recipe, referenced_models
from merge_core.references import ModelRef
from merge_core.reversal import write_reversal
from merge_core.shards import ShardWriter, unfinished
from merge_core.snapshots import Supply, library_of, supplied
from merge_core.sources import Sources
from merge_core.units import Alone, Share
from merge_core.weights import Weights


def merge(
    recipe: Recipe,
    out: str | Path,
    *,
    roots: Sequence[Path] | None = None,
    partial: Path | None = None,
    memory: int | None = None,
    threads: int | None = None,
    block_elements: int | None = None,
    max_shard_size: int | None = None,
    randomness: Randomness | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    report: Report = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    share: Share | None = None,
    delivery: Delivery | None = None,
) -> Artifact:
    """Merge models as the recipe says into the folder `out`, which appears whole or not at all.

    `roots`: folders that models may lie in, relative paths starting there (None: anywhere, from the working directory);
    a `Roots` may have snapshots of what lies elsewhere too.
    `partial`: where the unfinished output grows (beside `out` by default). After a kill, the same call goes on from
    there; after any `WeightsmithError` it is removed. `memory` (bytes), `threads` and `max_shard_size` (bytes) go
    before the recipe's. `device` is `cpu`, `cuda`, `cuda:1` … or `auto`; it changes no byte. `cache`: a folder for what
    need not be found out twice, which is the inputs' hashes. `report` is called with the progress after every block,
    and `stop` is asked whether to give up (`Canceled`). `share`: who else may take a part in it, by `assist`, where it
    can be cut into parts. `delivery` is given each file of a model's weights that is complete; if it removes them they
    are not in `out`, and nobody else takes a part.

    The bytes of every tensor depend on the recipe and the models alone. Raises `WeightsmithError`.
    """
    out = Path(out).absolute()
    partial = partial or out.parent / f".{out.name}.partial"
    where = _device(device)
    share_one_heap()
    try:
        check_output(out, partial)
        with opened(recipe, roots) as checkpoints, opened_patches(recipe, roots) as patches:
            plan, models, stages, alignments = planned(
                recipe,
                checkpoints,
                patches,
                roots,
                memory=memory,
                threads=threads,
                block_elements=block_elements or BLOCK_ELEMENTS,
                on_gpu=where != CPU,
                max_shard_size=max_shard_size,
            )
            inputs = [models[model] for model in plan.models]
            draws, progress = randomness or Randomness(recipe.seed), Progress()
            stays = delivery is None or not delivery.removes
            can_be_cut = stays and randomness is None and _can_be_cut(plan)
            shared = share if share is not None and can_be_cut else Alone()
            with unfinished(partial), supplied(roots, plan.memory.window, stop, progress.receive) as supply:
                work = _Work(
                    plan,
                    inputs,
                    checkpoints,
                    stages,
                    alignments,
                    draws,
                    where,
                    report,
                    stop,
                    shared,
                    progress,
                    supply,
                    delivery,
                )
                return work.carry_out(partial, out, cache)
    except OSError as error:
        raise disk_error(error, Path(error.filename or out), 0) from error


def assist(
    recipe: Recipe,
    partial: Path,
    share: Share,
    *,
    roots: Sequence[Path] | None = None,
    memory: int | None = None,
    threads: int | None = None,
    block_elements: int | None = None,
    max_shard_size: int | None = None,
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Take a part in a merge that another worker leads in the folder `partial`, as long as `share` has one to give.

    The parameters are those of `merge`; recipe, roots and `max_shard_size` must be the same. Raises `WeightsmithError`,
    and whatever `share` raises; what was begun is then nobody's, and the folder is left as it is.
    """
    where = _device(device)
    share_one_heap()
    try:
        with opened(recipe, roots) as checkpoints, opened_patches(recipe, roots) as patches:
            plan, models, stages, alignments = planned(
                recipe,
                checkpoints,
                patches,
                roots,
                memory=memory,
                threads=threads,
                block_elements=block_elements or BLOCK_ELEMENTS,
                on_gpu=where != CPU,
                max_shard_size=max_shard_size,
            )
            if _can_be_cut(plan):
                inputs, draws = [models[model] for model in plan.models], Randomness(recipe.seed)
                nobody: Report = lambda progress: None  # noqa: E731
                progress = Progress()
                with supplied(roots, plan.memory.window, stop, progress.receive) as supply:
                    work = _Work(
                        plan,
                        inputs,
                        checkpoints,
                        stages,
                        alignments,
                        draws,
                        where,
                        nobody,
                        stop,
                        share,
                        progress,
                        supply,
                    )
                    work.assist(partial)
    except OSError as error:
        raise disk_error(error, Path(error.filename or partial), 0) from error


def _can_be_cut(plan: Plan) -> bool:
    """Whether the weights of a plan are made tensor by tensor, with nothing found out on the way that others need."""
    measures_whole = any(stage.scope == "model" and stage.measured for stage in plan.stages.values())
    is_aligned = any(each.alignment and not each.alignment.are_stored for each in (plan, *plan.stages.values()))
    return plan.difference is None and not measures_whole and not is_aligned


def _device(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where there is one. Raises `DeviceNotFound`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cpu" and not number:
        return CPU
    if kind != "cuda" or not (number or "0").isdecimal():
        raise DeviceNotFound(f"{name[:40]!r} is no device; write cpu, cuda, cuda:1 … or auto")
    if int(number or 0) >= torch.cuda.device_count():
        raise DeviceNotFound(f"{name} is not there: this process sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", int(number or 0))


@dataclass(frozen=True)
class _Written:
    """The weights that were written: their files, the digest of each tensor, warnings, how many were there before."""

    files: Sequence[WrittenFile]
    tensors: Mapping[str, str]
    warnings: Sequence[str]
    resumed: int


@dataclass
class _Work:
    """A plan as it is carried out: `inputs` are its models, `opened` the models as they lie on the disk."""

    plan: Plan
    inputs: Sequence[Weights]
    opened: Mapping[ModelRef, Weights]
    stages: Sequence[MergedWeights]
    alignments: Sequence[tuple[Alignment, AlignmentPlan]]
    randomness: Randomness
    device: torch.device
    report: Report
    stop: Callable[[], bool]
    share: Share
    progress: Progress
    supply: Supply | None
    delivery: Delivery | None = None

    def carry_out(self, partial: Path, out: Path, cache: Path | None) -> Artifact:
        plan = self.plan
        beside = [] if plan.difference is None else read_beside(plan, self.opened)
        compared = self._compared()
        beside += compared.values()
        try:
            with closing(Sources.of(plan, self.inputs, cache, self.stop, beside, self.supply)) as sources:
                self._load_kernels()
                write = self._write_model if plan.difference is None else self._write_difference
                written = write(partial, sources.merged)
                hashes = sources.result()
            for weights in (*self.inputs, *beside):
                weights.check_unchanged()
            warnings = (*plan.warnings, *written.warnings, *sources.notes)
            files = write_companions(
                plan,
                self.inputs,
                partial,
                weights=written.files,
                tensors=written.tensors,
                sources=hashes,
                warnings=warnings,
                beside=compared,
            )
            self.share.prove()
            appear(partial, out)
        except OSError as error:
            raise disk_error(error, Path(error.filename or partial), 0) from error
        return Artifact(out, tuple(files), written.tensors, warnings, written.resumed)

    def _compared(self) -> dict[ModelRef, Weights]:
        """The models that are read to bring others into their order, whether they are merged or not."""
        found = [ref for alignment, plan in self.alignments if not plan.are_stored for ref in alignment.models]
        return {ref: self.opened[ref] for ref in found if ref in self.opened}

    @property
    def _plans(self) -> Iterator[Plan]:
        yield self.plan
        yield from self.plan.stages.values()

    def _load_kernels(self) -> None:
        if self.device == CPU and any(step.is_fused for made in self._plans for step in made.steps):
            kernels.load()

    def assist(self, partial: Path) -> None:
        self._load_kernels()
        with ShardWriter(self.plan, partial, self.stop, unit_bytes=self.share.unit_bytes, assists=True) as writer:
            self._execution(writer, lambda step: None).assist()

    def _execution(self, writer: ShardWriter, merged: Callable[[Step], None]) -> Execution:
        return Execution(
            self.plan,
            self.inputs,
            writer,
            self.randomness,
            merged,
            self.progress,
            self.report,
            self.stop,
            self.device,
            stages=self.stages,
            alignments=self.alignments,
            share=self.share,
            supply=self.supply,
        )

    def _write_model(self, partial: Path, merged: Callable[[Step], None]) -> _Written:
        unit_bytes, delivery = self.share.unit_bytes, self.delivery
        with ShardWriter(self.plan, partial, self.stop, unit_bytes=unit_bytes, delivery=delivery) as writer:
            execution = self._execution(writer, merged)
            execution.run()
            writer.wait_for_deliveries(0, lambda: execution.enter("uploading"))
            files = [*writer.finish(), *execution.permutations]
            if self.plan.recipe.outputs.reversible:
                execution.enter("keeping what the patches changed")
                before = self.stages[-1]
                assert isinstance(before, Unrounded)
                files.append(write_reversal(self.plan, before, partial, writer.records, self.stop))
            return _Written(files, writer.digests, execution.warnings, writer.resumed)

    def _write_difference(self, partial: Path, merged: Callable[[Step], None]) -> _Written:
        execution = DifferenceExecution(
            self.plan,
            self.inputs,
            self.opened,
            partial,
            merged,
            self.progress,
            self.report,
            self.stop,
            self.device,
            self.stages,
            self.alignments,
        )
        execution.run()
        return _Written(execution.files, execution.digests, execution.warnings, execution.resumed)


def check_output(out: Path, partial: Path) -> None:
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
    with opened(recipe, roots) as checkpoints, opened_patches(recipe, roots) as patches:
        return planned(recipe, checkpoints, patches, roots, memory=memory, threads=threads)[0]


@contextmanager
def opened(recipe: Recipe, roots: Sequence[Path] | None) -> Iterator[Mapping[ModelRef, Weights]]:
    """Every model that the recipe and its stages name, opened from its headers; the stages themselves are not there.

    Raises `CheckpointError`, `IncompatibleModels` or `RecipeError` naming the key.
    """
    names = {stage.name for stage in recipe.stages}
    with ExitStack() as stack:
        found: dict[ModelRef, Weights] = {}
        places: dict[ModelRef, str] = {}
        for document in (*recipe.stages, recipe):
            for ref, written in referenced_models(document).items():
                pointer = document.located(Problem("", written)).pointer or "#"
                if ref.path in names and (ref.revision or ref.adapter):
                    detail = f"{ref.path} is a stage, which has no revisions and takes no adapter; write its name alone"
                    raise RecipeError.of([Problem(detail, pointer)])
                if ref.path in names or ref in found:
                    continue
                places[ref] = pointer
                is_merged = not written.startswith("#/tokenizer")
                try:
                    found[ref] = stack.enter_context(open_model(ref, pointer, roots, weights=is_merged))
                except CheckpointError as error:
                    raise error.as_written(roots or (), pointer) from None
        alone = [ref for ref, weights in found.items() if isinstance(weights, Placed)]
        if alone and (len(alone) < len(found) or recipe.stages):
            detail = f"{alone[0]} is an adapter, not a model; write the model it is for before it: base+{alone[0]}"
            raise RecipeError.of([Problem(detail, places[alone[0]])])
        if alone and recipe.alignment is not None:
            detail = "adapters alone have no neurons that could be aligned; write the models they are for before them"
            raise RecipeError.of([Problem(detail, "#/alignment")])
        if alone and (recipe.vocabulary or recipe.chat_template):
            key = "chat_template" if recipe.chat_template else "tokenizer"
            raise RecipeError.of([Problem("adapters have no vocabulary of their own; leave this away", f"#/{key}")])
        yield found


@contextmanager
def opened_patches(recipe: Recipe, roots: Sequence[Path] | None) -> Iterator[Mapping[ModelRef, Delta]]:
    """Every patch that the recipe and its stages name, opened from its header. Raises `CheckpointError`."""
    with ExitStack() as stack:
        found: dict[ModelRef, Delta] = {}
        for document in (*recipe.stages, recipe):
            for i, put in enumerate(document.patches):
                if put.patch not in found:
                    try:
                        found[put.patch] = stack.enter_context(
                            Delta.open(locate(put.patch.path, roots, put.patch.revision), roots=roots)
                        )
                    except CheckpointError as error:
                        pointer = document.located(Problem("", f"#/patches/{i}/patch")).pointer or "#"
                        raise error.as_written(roots or (), pointer) from None
        yield found


def planned(
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Weights],
    patches: Mapping[ModelRef, Delta],
    roots: Sequence[Path] | None,
    **how: Any,
) -> tuple[Plan, Mapping[ModelRef, Weights], Sequence[MergedWeights], Sequence[tuple[Alignment, AlignmentPlan]]]:
    """The plan, its models, its stages and their alignments; errors as the recipe sees the world. `how`: as `make_plan`
    takes it. Raises `WeightsmithError`.
    """
    try:
        plan, models, stages, alignments = make_plan_in_stages(recipe, checkpoints, patches, roots, **how)
        if recipe.outputs.kind != "full":
            inputs = [models[model] for model in plan.models]
            plan = plan_difference(plan, inputs, checkpoints, how.get("memory"))
        return plan, models, stages, alignments
    except CheckpointError as error:
        raise error.as_written(roots or (), error.problems[0].pointer or "#/tokenizer") from None


def open_model(ref: ModelRef, pointer: str, roots: Sequence[Path] | None, *, weights: bool) -> Weights:
    """A model, with the adapter or delta on it where it names one, or an adapter alone."""
    if library_of(roots) is None:
        for path, revision in ((ref.path, ref.revision), (ref.adapter, ref.adapter_revision)):
            if revision:
                detail = f"{path}@{revision}: a local folder has no revisions; leave @{revision} away"
                raise RecipeError.of([Problem(detail, pointer)])
    where = locate(ref.path, roots, ref.revision)
    if is_adapter(where):
        if ref.adapter is not None:
            detail = f"{ref.path} is an adapter, not a model that {ref.adapter} could be put on"
            raise RecipeError.of([Problem(detail, pointer)])
        return Placed(Adapter.open(where, roots=roots))
    if find_delta(where, roots):
        detail = f"{ref.path} is a delta, not a model; write the model it is for before it: base+{ref.path}"
        raise RecipeError.of([Problem(detail, pointer)])
    base = Checkpoint.open(where, roots=roots, weights=weights)
    if ref.adapter is None:
        return base
    added = locate(ref.adapter, roots, ref.adapter_revision)
    try:
        if find_delta(added, roots):
            delta = Delta.open(added, roots=roots)
            return Patched(base, [ScaledDelta(delta, ref.adapter)], delta.model)
        return Adapted(base, Adapter.open(added, roots=roots), ref.adapter)
    except IncompatibleModels as error:
        raise IncompatibleModels.of(replace(problem, pointer=pointer) for problem in error.problems) from None


def adopt(out: Path) -> Artifact:
    """An artifact that appeared, but whose maker was killed before it could say so."""
    (out / JOURNAL).unlink(missing_ok=True)
    return read_artifact(out)


def appear(partial: Path, out: Path) -> None:
    """Make the finished folder appear under its name in one step; until then the journal shows whose it is."""
    fsync_folder(partial)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    (out / JOURNAL).unlink()
    fsync_folder(out.parent)
