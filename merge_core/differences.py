"""The difference of a merge to its base: merged rows are made as they are compared, and never written themselves.

What a recipe asks for under `outputs` is done here: planned from headers, with the most that it can come to, and
carried out tensor by tensor into one file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from merge_core import __version__
from merge_core.adapters import WEIGHTS_NAME
from merge_core.aligned import Alignment, settle
from merge_core.blocks import CPU
from merge_core.errors import Canceled, IncompatibleModels, MemoryLimitExceeded, Problem
from merge_core.journal import JOURNAL, Journal
from merge_core.memory import FLOOR_BYTES
from merge_core.merged import MergedWeights
from merge_core.patches.delta import DELTA_NAME
from merge_core.patches.encoding import Difference
from merge_core.patches.lora import AdapterExtraction, assemble_adapter
from merge_core.patches.writing import Extraction, assemble, encode_all
from merge_core.plan import AlignmentPlan, DifferencePlan, Plan
from merge_core.progress import Progress, Report
from merge_core.references import ModelRef
from merge_core.shards import check_space
from merge_core.weights import Weights

_MERGED = "the merged model"


def plan_difference(
    plan: Plan, inputs: Sequence[Weights], opened: Mapping[ModelRef, Weights], memory: int | None
) -> Plan:
    """The plan of a merge of which only the difference to its base is kept.

    `inputs` are the models of the plan, `opened` the models as they lie on the disk. Raises `IncompatibleModels` or
    `MemoryLimitExceeded`.
    """
    recipe = plan.recipe
    base = _base(plan, opened)
    extraction = _extraction(plan, base, MergedWeights(_MERGED, plan, inputs), opened)
    wanted = recipe.outputs.made_encoding()
    limit, threads, peak = memory or recipe.limits.memory, plan.memory.threads, plan.memory.peak
    floor = FLOOR_BYTES + plan.memory.window
    merging = (peak - floor) // threads
    if (worst := extraction.worst()) is not None:
        needed, difference = worst
        if needed > limit - floor:
            takes = f"to encode {difference.name} {list(difference.info.shape)} takes {needed / 2**20:,.0f} MiB"
            besides = f"{floor / 2**20:,.0f} MiB besides, but the limit is {limit / 2**20:,.0f} MiB"
            detail = f"{takes} and {besides}; raise limits.memory"
            raise MemoryLimitExceeded(detail, [Problem(detail, "#/limits/memory", tensor=difference.name)])
        each = max(needed, merging)
        threads = max(1, min(threads, (limit - floor) // max(1, each)))
        peak = max(peak, floor + threads * each)
    assert recipe.outputs.kind != "full"
    return replace(
        plan,
        memory=replace(plan.memory, peak=peak),
        difference=DifferencePlan(
            kind=recipe.outputs.kind,
            file=WEIGHTS_NAME if recipe.outputs.kind == "adapter" else DELTA_NAME,
            encoding=wanted.name,
            most_bytes=extraction.most_bytes(_provenance(plan)),
            read_bytes=sum(difference.base_info.nbytes for difference, _ in extraction.pairs if difference.base_info),
            threads=threads,
            held_whole=sum(encoding.is_whole(difference) for difference, encoding in extraction.pairs),
            exact_on=wanted.exact_on,
        ),
    )


def read_beside(plan: Plan, opened: Mapping[ModelRef, Weights]) -> list[Weights]:
    """What is read besides what the merge itself reads."""
    covariance = plan.recipe.outputs.covariance
    return [_base(plan, opened), *([opened[covariance]] if covariance is not None else [])]


def _base(plan: Plan, opened: Mapping[ModelRef, Weights]) -> Weights:
    ref = plan.recipe.base_model
    assert ref is not None
    if ref not in opened:
        detail = f"{ref} is a stage, which is stored nowhere, so that nothing could be put on it; write a model"
        raise IncompatibleModels.of([plan.recipe.located(Problem(detail, "#/base_model"))])
    return opened[ref]


def _extraction(
    plan: Plan,
    base: Weights,
    merged: Weights,
    opened: Mapping[ModelRef, Weights],
    tick: Callable[[int], None] = lambda count: None,
) -> Extraction:
    outputs = plan.recipe.outputs
    covariance = opened[outputs.covariance] if outputs.covariance is not None else None
    made = AdapterExtraction if outputs.kind == "adapter" else Extraction
    extraction = made.of(base, merged, outputs.made_encoding(), tick, covariance)
    if covariance is not None:
        _check_covariance(plan, covariance, extraction)
    return extraction


def _check_covariance(plan: Plan, covariance: Weights, extraction: Extraction) -> None:
    """Refuse a covariance that is none of what enters the columns, or of nothing that is encoded."""
    found, problems = 0, []
    for difference, _ in extraction.pairs:
        info, width = covariance.tensors.get(difference.name), difference.grains.width
        if info is not None and len(difference.info.shape) > 1:
            found += 1
            if info.shape != (width, width) or info.dtype.kind != "float":
                detail = f"the covariance of {info.name} is {info.dtype} {list(info.shape)}, not {[width, width]}"
                problems.append(Problem(detail, "#/outputs/covariance", tensor=info.name))
    if not found:
        problems.append(Problem(f"{plan.recipe.outputs.covariance} names no matrix", "#/outputs/covariance"))
    if problems:
        raise IncompatibleModels.of(map(plan.recipe.located, problems))


def _provenance(plan: Plan) -> dict[str, Any]:
    return {
        "made_with": f"weightsmith {__version__}",
        "base": str(plan.recipe.base_model),
        "recipe": plan.recipe.canonical(),
    }


@dataclass
class DifferenceExecution:
    """Carries out the plan of a difference into the folder `partial`; see `Execution`."""

    plan: Plan
    inputs: Sequence[Weights]
    opened: Mapping[ModelRef, Weights]
    partial: Path
    merged: Callable[[Any], None] = lambda step: None
    progress: Progress = field(default_factory=Progress)
    report: Report = lambda progress: None
    stop: Callable[[], bool] = lambda: False
    device: torch.device = CPU
    stages: Sequence[MergedWeights] = ()
    alignments: Sequence[tuple[Alignment, AlignmentPlan]] = ()

    def run(self) -> None:
        """Encode every tensor that is not there yet, and write the file."""
        assert self.plan.difference is not None
        check_space(self.plan.output_bytes, self.partial)
        self._counting, self._is_over = threading.Lock(), False
        self._journal = Journal(self.partial / JOURNAL, self.plan.digest)
        self._journal.open()
        try:
            self._journal.clear_folder()
            self._run(self.plan.difference)
        finally:
            self._is_over = True
            self._journal.close()

    def _run(self, wanted: DifferencePlan) -> None:
        self.warnings: list[str] = list(self._journal.notes.get("warnings", []))
        made = MergedWeights(_MERGED, self.plan, self.inputs)
        extraction = _extraction(self.plan, _base(self.plan, self.opened), made, self.opened, self._tick)
        self.progress.tensors_total = len(extraction.pairs)
        self.progress.bytes_read_total = self.plan.input_bytes
        self.progress.bytes_written_total = wanted.most_bytes
        stages = (*self.stages, made)
        for stage in stages:
            stage.start(
                self.plan.memory, progress=self.progress, stop=self._is_stopped, device=self.device, warn=self._warn
            )
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self.plan.memory.threads, "merge", torch.set_num_threads, (1,)) as pool:
                permutations = []
                if self.alignments:
                    self._enter("aligning")
                    folder, digest = self.partial, self.plan.digest
                    permutations = settle(self.alignments, folder, digest, self.progress, self.report, self.stop)
                self._enter("measuring")
                for stage in stages:
                    stage.check_tied(pool)
                if self.plan.scope == "model" and extraction.pairs:
                    made.prepare(extraction.pairs[0][0].info, pool)
            self._enter("comparing")
            encoded, self.resumed = encode_all(
                extraction, self.partial, self._journal, threads=wanted.threads, done=self._done, watch=self._watch
            )
        finally:
            torch.set_num_threads(before)
        self._enter("writing")
        if isinstance(extraction, AdapterExtraction):
            base = str(self.plan.recipe.base_model)
            self.files, self.digests, notes = assemble_adapter(
                encoded, extraction, self.partial, base, stop=self._watch
            )
            for note in notes:
                self._warn(note)
        else:
            file, self.digests = assemble(encoded, extraction, self.partial, _provenance(self.plan), stop=self._watch)
            self.files = [file]
        self.progress.bytes_written += sum(file.size for file in self.files)
        self.files = [*self.files, *permutations]
        self.warnings.sort()
        self.progress.complete()
        self._watch()

    def _done(self, difference: Difference) -> None:
        self.progress.tensor = difference.name
        self.progress.tensors_done += 1
        self.merged(self.plan.by_name[difference.name])

    def _tick(self, count: int) -> None:
        with self._counting:
            self.progress.bytes_read += count
        if self._is_stopped():
            raise Canceled("the merge was canceled")

    def _is_stopped(self) -> bool:
        return self._is_over or self.stop()

    def _watch(self) -> None:
        if self.stop():
            self._is_over = True
            raise Canceled("the merge was canceled")
        self.report(self.progress)

    def _enter(self, phase: str) -> None:
        self.progress.phase = phase
        self._watch()

    def _warn(self, warning: str) -> None:
        with self._counting:
            told = warning.removeprefix(f"{_MERGED}: ")
            if told not in self.warnings:
                self.warnings.append(told)
                self._journal.note("warnings", list(self.warnings))
