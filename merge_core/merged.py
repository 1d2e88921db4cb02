"""Stages: what one merge would write is what another reads, computed when it is asked for and never on a disk.

A stage's rows are the grains of its own plan's steps, rounded to its own output dtype as if they had been written. What
its methods have to measure is measured once, per tensor or for the whole model, when it is first needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_core.aligned import FILE_NAME, Alignment, align_models, plan_alignment
from merge_core.blocks import CPU, Blocks, Span
from merge_core.dtypes import DType
from merge_core.errors import IncompatibleModels, Problem, RecipeError
from merge_core.gathered import Gathered
from merge_core.headers import TensorInfo
from merge_core.keys import ModelEntry
from merge_core.method import Known, Randomness, Stage
from merge_core.patches.delta import Delta
from merge_core.patches.patched import Patched, ScaledDelta
from merge_core.plan import AlignmentPlan, MemoryPlan, Plan, PlannedPatch, Step
from merge_core.planner import make_plan
from merge_core.progress import Progress
from merge_core.recipe import Recipe, referenced_models
from merge_core.references import ModelRef
from merge_core.runs import digest_of
from merge_core.snapshots import window_of
from merge_core.vocabularies import in_equal_rows, in_one_vocabulary
from merge_core.weights import Companions, Derived, Weights

Measured = Mapping[str, Any]
"""What the passes over a whole model came to so far, as plain data: how many `stages` are done, and what is `known`."""
_NO_LIMIT = 2**62
"""A stage's memory is part of the plan of the merge that reads it."""
_MAX_LAYERS = 4096
"""Layers that the slices of all documents make together."""
_MAX_READS = 1000
"""Models that a document reads, a stage counted as what it reads itself each time: it is computed anew for each."""


def make_plan_in_stages(
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Weights],
    patches: Mapping[ModelRef, Delta] | None = None,
    roots: Sequence[Path] | None = None,
    **how: Any,
) -> tuple[Plan, Mapping[ModelRef, Weights], list[MergedWeights], list[tuple[Alignment, AlignmentPlan]]]:
    """Plan a recipe and before it the stages it reads; returns also the models of the plan, all the stages, and how
    the models of each document come to be in one order, in the order in which that is found out.

    `patches` are those that the documents name. `how` is what `make_plan` takes. A problem's JSON pointer starts with
    the number of its document.
    """
    found = dict(checkpoints)
    stages: dict[ModelRef, Plan] = {}
    made: list[MergedWeights] = []
    alignments: list[tuple[Alignment, AlignmentPlan]] = []
    _check_size(recipe)
    memory, threads = how.get("memory") or recipe.limits.memory, how.get("threads") or recipe.limits.threads
    window = window_of(roots, memory)
    for number, document in enumerate((*recipe.stages, recipe), 1):
        try:
            models = in_one_vocabulary(document, {model: found[model] for model in referenced_models(document)})
            models = in_equal_rows(document, models)
            alignment = aligning = None
            if document.alignment is not None:
                named, base = document.aligned_models(), document.base_model
                alignment = align_models(document.alignment, named, models, base, roots)
                file = FILE_NAME if document is recipe else f"alignment-{number}.safetensors"
                aligning = plan_alignment(alignment, file, memory - window, threads)
                alignments.append((alignment, aligning))
                models = {**models, **alignment.moved}
            if document.patches:
                before, models = _before_patches(document, models, patches or {})
                stages[next(iter(models))] = before.plan
                made.append(before)
            if document is recipe:
                plan = _plan(recipe, models, stages=stages, window=window, **how)
                plan = _with_alignment(plan, alignment, aligning)
                peak = max([plan.memory.peak, *(aligning.peak + window for _, aligning in alignments)])
                return replace(plan, memory=replace(plan.memory, peak=peak)), models, made, alignments
            plan = _with_alignment(_plan(document, models, memory=_NO_LIMIT, threads=1), alignment, aligning)
        except (RecipeError, IncompatibleModels) as error:
            raise type(error).of(document.located(problem) for problem in error.problems) from None
        ref = ModelRef(path=document.name or "")
        stages[ref] = plan
        made.append(MergedWeights(str(ref), plan, [models[model] for model in plan.models]))
        found[ref] = made[-1]
    raise AssertionError("a recipe comes after its stages")


def _check_size(recipe: Recipe) -> None:
    """Refuse what a few lines can ask for and no machine can plan: stages of stages double what they take."""
    reads: dict[str, int] = {}
    layers = 0
    for document in (*recipe.stages, recipe):
        for pointer, part in document.parts().values():
            layers += sum(last - first for piece in part.slices or [] for first, last in [piece.sources[0].layer_range])
            if layers > _MAX_LAYERS:
                detail = f"the slices make {layers:,} layers; at most {_MAX_LAYERS:,} are planned"
                raise RecipeError.of([document.located(Problem(detail, f"{pointer}/slices"))])
        count = sum(reads.get(ref.path, 1) for ref in referenced_models(document))
        if count > _MAX_READS:
            detail = f"with all its stages this reads models {count:,} times; at most {_MAX_READS:,} are planned"
            raise RecipeError.of([document.located(Problem(detail, "#"))])
        reads[document.name or ""] = count


def _with_alignment(plan: Plan, alignment: Alignment | None, aligning: AlignmentPlan | None) -> Plan:
    """A plan and how its models come to be in one order, by models that it may not read itself."""
    if alignment is None:
        return plan
    digest = json.dumps([plan.sources_digest, digest_of(list(alignment.models), alignment.models), alignment.digest])
    return replace(plan, alignment=aligning, sources_digest=hashlib.sha256(digest.encode()).hexdigest())


def _before_patches(
    document: Recipe, models: Mapping[ModelRef, Weights], patches: Mapping[ModelRef, Delta]
) -> tuple[Unrounded, Mapping[ModelRef, Weights]]:
    """What a document makes before its patches, as a stage, and that stage with the patches on it.

    Patches are added in the order of their names, so that the order in which they stand changes no byte.
    """
    plan = replace(make_plan(document, models, memory=_NO_LIMIT, threads=1), is_before_patches=True)
    if plan.adapter_config is not None:
        raise RecipeError.of([Problem("adapters are summed alone; add patches to whole models", "#/patches")])
    put = sorted(document.patches, key=lambda each: str(each.patch))
    parts = [part for each in put for part in patches[each.patch].tensors.values()]
    stored = {part.entry.name for part in parts if part.replaces}  # new values are for what is stored
    unrounded = {part.entry.name for part in parts} - stored
    ref = ModelRef(path=f"{document.name or document.merge_method}, before patches")
    before = Unrounded(str(ref), plan, [models[model] for model in plan.models], unrounded)
    try:
        patched = Patched(before, [ScaledDelta(patches[each.patch], str(each.patch), each.strength) for each in put])
        if document.outputs.reversible and patched.described_by is not None:
            name = patched.described_by.name
            detail = f"{name}: brings a config for other shapes, which a reversal of tensors cannot take back"
            raise IncompatibleModels.of([Problem(f"{detail}; write reversible: false", file=name)])
    except IncompatibleModels as error:
        places = {str(each.patch): f"#/patches/{i}/patch" for i, each in enumerate(document.patches)}
        found = [replace(each, pointer=places.get(each.file or ""), file=None) for each in error.problems]
        raise IncompatibleModels.of(found) from None
    return before, {ref: patched}


def _plan(document: Recipe, models: Mapping[ModelRef, Weights], **how: Any) -> Plan:
    """The plan of a document; where it has patches, its one model is what comes before them with the patches on it."""
    if not document.patches:
        return make_plan(document, models, **how)
    ((ref, patched),) = models.items()
    assert isinstance(patched, Patched) and isinstance(patched.base, Unrounded)
    plan, before = make_plan(_copying(document, ref), models, written=document, **how), patched.base.plan
    of_patches = {put.name: put for put in patched.patches}
    return replace(
        plan,
        sources_digest=hashlib.sha256(f"{before.sources_digest} {plan.sources_digest}".encode()).hexdigest(),
        left_out=(*before.left_out, *plan.left_out),
        warnings=tuple(dict.fromkeys((*before.warnings, *plan.warnings))),
        patches=tuple(
            PlannedPatch(put.patch, put.strength, tuple(of_patches[str(put.patch)].delta.tensors))
            for put in document.patches
        ),
    )


def _copying(document: Recipe, model: ModelRef) -> Recipe:
    """A document that only copies a model, into the outputs and number format of the one that is given."""
    nothing = Recipe(merge_method="passthrough", models=[ModelEntry(model=model)])
    kept = ("dtype", "out_dtype", "name", "seed", "allow_nonfinite", "outputs", "limits", "unknown_keys")
    fields = {name: getattr(nothing, name) for name in Recipe.model_fields if name not in kept}
    return document.model_copy(update=fields)


_MOST_NUMBERS = 2**18
"""Of what tensors' statistics come to; what was forgotten is measured again."""


def leaves(models: Sequence[ModelRef], inputs: Sequence[Weights]) -> dict[ModelRef, Weights]:
    """The models that stages are made from in the end, and those that are none, each once."""
    found: dict[ModelRef, Weights] = {}
    for model, weights in zip(models, inputs, strict=True):
        stage = weights
        while isinstance(stage, Gathered | Derived):
            stage = stage.inner
        put = stage.patches if isinstance(stage, Patched) and isinstance(stage.base, MergedWeights) else ()
        stage = stage.base if isinstance(stage, Patched) and put else stage
        below = leaves(stage.plan.models, stage.inputs) if isinstance(stage, MergedWeights) else {model: weights}
        below |= {_patch_of(each.name): each.delta.file for each in put}
        found |= {ref: below[ref] for ref in below if ref not in found}
    return found


def _patch_of(name: str) -> ModelRef:
    path, _, revision = name.partition("@")
    return ModelRef(path=path, revision=revision) if revision else ModelRef(path=name)


def _numbers(known: Any) -> int:
    """How many numbers there are in plain data."""
    if isinstance(known, Mapping):
        return sum(map(_numbers, known.values()))
    return sum(map(_numbers, known)) if isinstance(known, list | tuple) else 1


class MergedWeights(Weights):
    """The output of a plan as weights; `inputs` are the models of the plan.

    `shards` are the files of all inputs, each name led by its model's.
    """

    def __init__(self, name: str, plan: Plan, inputs: Sequence[Weights]) -> None:
        self.path, self.name, self.plan, self.inputs = Path(name), name, plan, tuple(inputs)
        self.tensors = {
            slot.name: TensorInfo(slot.name, slot.dtype, slot.shape, shard.file, 0)
            for shard in plan.shards
            for slot in shard.slots
        }
        self._files = {
            self._file(model, file): (weights, file) for model, weights in enumerate(inputs) for file in weights.shards
        }
        self.shards = {name: weights.shards[file] for name, (weights, file) in self._files.items()}
        self.config = plan.edited_config(self.inputs[plan.donor].config)
        self._of_tensors: dict[str, Known] = {}
        self._room = _MOST_NUMBERS
        self._of_model: Known | None = None
        self._measuring, self._remembering = threading.Lock(), threading.Lock()
        self._blocks = Blocks(plan, self.inputs, Randomness(plan.recipe.seed), stage=name)

    def start(
        self,
        memory: MemoryPlan,
        *,
        progress: Progress | None = None,
        stop: Callable[[], bool] = lambda: False,
        device: torch.device = CPU,
        warn: Callable[[str], None] = lambda warning: None,
    ) -> None:
        """Work under the plan of the merge that reads this stage."""
        named = f"{self.name}: " if self.name else ""
        self.plan = replace(self.plan, memory=memory)
        self._blocks = Blocks(
            self.plan,
            self.inputs,
            Randomness(self.plan.recipe.seed),
            progress or Progress(),
            stop,
            device,
            lambda warning: warn(f"{named}{warning}"),
            self.name,
        )

    def check_tied(self, pool: Executor) -> None:
        """Raise if tensors that a config calls one are not."""
        for pair in self.plan.tied:
            self._blocks.check_tied(pool, pair)

    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        size = self.row_bytes(info) * (stop - start)
        out = torch.empty(size, dtype=torch.uint8) if space is None else space[:size]
        rows = out.view(info.dtype.torch).reshape((stop - start, *info.shape[1:]) if info.shape else ())
        if size == 0:
            return rows
        step = self._step(info)
        known, grains = self._known(step), step.grains
        first, last = (0, grains.count) if self.is_whole(info) else (start // grains.size, -(-stop // grains.size))
        begin, end = grains.row_range(first, last)
        if (begin, end) == (start, stop):
            return self._blocks.make(step, known, (first, last), out, reads=0)
        made = torch.empty(self.row_bytes(info) * (end - begin), dtype=torch.uint8)
        rows.copy_(self._blocks.make(step, known, (first, last), made, reads=0)[start - begin : stop - begin])
        return rows

    def make(self, step: Step, span: Span, out: Tensor) -> Tensor:
        """One block of a tensor, as `Blocks.make` makes it."""
        return self._blocks.make(step, self._known(step), span, out)

    def spans(self, step: Step) -> Iterator[Span]:
        """The blocks of a tensor, as long as the plan's."""
        return self._blocks.spans(step)

    def prepare(self, info: TensorInfo, pool: Executor | None) -> None:
        step = self._step(info)
        self._blocks.prepare(pool, step)
        if self._remembered(step) is None:
            self._measure(pool, step)

    def place(self, info: TensorInfo) -> None:
        return None

    def ranges(self, info: TensorInfo) -> Iterator[tuple[str, int, int]]:
        for source in self._step(info).reads:
            for file, begin, end in self.inputs[source.model].ranges(source.info):
                yield self._file(source.model, file), begin, end

    def always_read(self) -> Iterator[str]:
        for model, weights in enumerate(self.inputs):
            yield from (self._file(model, file) for file in weights.always_read())
        for pair in self.plan.tied:
            for info in (pair.tensor, pair.partner):
                yield from (self._file(pair.model, file) for file, _, _ in self.inputs[pair.model].ranges(info))
        if self.plan.scope == "model":
            yield from (file for info in self.tensors.values() for file, _, _ in self.ranges(info))

    def temporary(self, info: TensorInfo) -> float:
        step = self._step(info)
        return step.element_bytes() + step.dtype.itemsize

    def thread_bytes(self, info: TensorInfo) -> int:
        step = self._step(info)
        # Rows that begin or end inside a grain cost the grain.
        beside = 2 * min(step.grains.size, step.grains.rows) * step.grains.width * self.temporary(info)
        return step.thread_bytes(self.plan.scope) + math.ceil(beside)

    def is_whole(self, info: TensorInfo) -> bool:
        step = self._step(info)
        return step.least_rows > step.grains.size

    @property
    def companions(self) -> Companions:
        return self.plan.companions

    def descriptor(self, file: str) -> int:
        weights, own = self._files[file]
        return weights.descriptor(own)

    def close(self) -> None:
        """Nothing: the inputs are closed by whoever opened them."""

    def _step(self, info: TensorInfo) -> Step:
        return self.plan.by_name[info.name]

    def _file(self, model: int, file: str) -> str:
        return file if isinstance(self.inputs[model], MergedWeights) else f"{self.plan.models[model]}/{file}"

    def _known(self, step: Step) -> Known:
        """What is known of a tensor; whoever comes unprepared measures it alone, while others wait."""
        known = self._remembered(step)
        if known is None:
            with self._measuring:
                self.prepare(self.tensors[step.name], None)
                known = self._remembered(step)
                return self._measure(None, step) if known is None else known
        return known

    def _remembered(self, step: Step) -> Known | None:
        if self.plan.scope == "model":
            return self._of_model
        return {} if step.method is None else self._of_tensors.get(step.name)

    def _measure(self, pool: Executor | None, step: Step) -> Known:
        """Measure a tensor, and remember what it comes to as long as there is room: sums per column add up."""
        if self.plan.scope == "model":
            for _ in self.measure_model(pool):
                pass
            return self._of_model or {}
        known = self._blocks.measure_tensor(pool, step)
        with self._remembering:
            self._room += _numbers(self._of_tensors.pop(step.name, {})) - _numbers(known)
            self._of_tensors[step.name] = known
            while self._room < 0 and len(self._of_tensors) > 1:
                self._room += _numbers(self._of_tensors.pop(next(iter(self._of_tensors))))
        return known

    def measure_model(
        self,
        pool: Executor | None,
        measured: Measured | None = None,
        remember: Callable[[Measured], None] = lambda measured: None,
    ) -> Iterator[Stage]:
        """Make those passes but for the ones that are `measured` already; yields after each block, and what is to be
        known after each pass is told to `remember`.
        """
        measured = measured or {"stages": 0, "known": {}}
        known, done = dict(measured["known"]), measured["stages"]

        def finished() -> None:
            nonlocal done
            done += 1
            remember({"stages": done, "known": known})

        yield from self._blocks.measure_all(pool, self.plan.measured, self.plan.passes_before[done:], known, finished)
        for warning in self.plan.warnings_of(known):
            self._blocks.warn(warning)
        self._of_model = known


class Unrounded(MergedWeights):
    """A stage of which some tensors come as they are computed, for whoever adds to them before the one rounding."""

    def __init__(self, name: str, plan: Plan, inputs: Sequence[Weights], unrounded: Collection[str]) -> None:
        """`unrounded` are the names of those tensors; numbers that are no floats stay as they are."""
        steps = tuple(
            replace(step, dtype=step.working) if step.name in unrounded and step.dtype.kind == "float" else step
            for step in plan.steps
        )
        self.rounded = plan
        super().__init__(name, replace(plan, steps=steps), inputs)
        self.tensors = {name: replace(info, dtype=self._step(info).dtype) for name, info in self.tensors.items()}

    def format(self, info: TensorInfo) -> DType:
        return self.rounded.by_name[info.name].dtype
