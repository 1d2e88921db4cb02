"""The models of a document with their neurons in one order: before anything else is done with them, each is wrapped.

Names and shapes do not change, so a merge is planned before its permutations are known. Those that are stored are read
at once; those that are to be found are found between plan and merge, and stay with what they lead to.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_core.alignment.costs import bundles, measured_tensors
from merge_core.alignment.derive import derive
from merge_core.alignment.matching import Matching, Work, match, match_many, matching_bytes
from merge_core.alignment.mean import MeanOf
from merge_core.alignment.permutations import Permutations, Permuted
from merge_core.alignment.spec import Indexed, PermutationSpec
from merge_core.checkpoint import check_below, locate
from merge_core.documents import escaped, suggestion
from merge_core.errors import CheckpointError, IncompatibleModels, MemoryLimitExceeded, Problem, RecipeError
from merge_core.files import WrittenFile
from merge_core.headers import MAX_TENSORS, clip, read_json
from merge_core.keys import AlignmentKeys
from merge_core.memory import FLOOR_BYTES
from merge_core.plan import AlignmentPlan
from merge_core.progress import Progress, Report
from merge_core.references import ModelRef
from merge_core.weights import Derived, Weights

FILE_NAME = "alignment.safetensors"
PAPER = "https://arxiv.org/abs/2209.04836"


class Aligned(Permuted):
    """A model whose neurons are or will be in another order. `made_with`: the files that say in which."""

    def __init__(self, inner: Weights, spec: PermutationSpec, made_with: Mapping[str, Path]) -> None:
        super().__init__(inner, spec)
        self.made_with = made_with

    @property
    def settings(self) -> Mapping[str, Path]:
        return {**self.inner.settings, **self.made_with}


class _Only(Derived):
    """Some of a model's tensors."""

    def __init__(self, inner: Weights, names: Sequence[str]) -> None:
        super().__init__(inner)
        self.tensors = {name: inner.tensors[name] for name in names}


@dataclass(frozen=True)
class Alignment:
    """How the models of a document come to have their neurons in one order.

    `models`: all that take part, as far as they have the same tensors, of which `compared` speaks; `spec` speaks of all
    tensors of all models. The `moved` ones are permuted, all but the `reference` where there is one. `stored`: the
    permutations, if they were read from a file; otherwise `find` finds them.
    """

    keys: AlignmentKeys
    spec: PermutationSpec
    compared: PermutationSpec
    models: Mapping[ModelRef, Weights]
    moved: Mapping[ModelRef, Aligned]
    reference: ModelRef | None = None
    stored: Permutations | None = None

    @property
    def digest(self) -> str:
        """The same for the same spec, which may be a file's; its order counts, as permutations are visited by it."""
        return hashlib.sha256(json.dumps(self.spec.to_data()).encode()).hexdigest()

    def pair(self, ref: ModelRef) -> tuple[Weights, Weights]:
        """What a model is matched with, the reference or the mean of the others, and the model."""
        if self.reference is not None:
            return self.models[self.reference], self.models[ref]
        return MeanOf([weights for other, weights in self.models.items() if other != ref]), self.models[ref]

    def find(
        self,
        path: Path,
        plan: AlignmentPlan,
        digest: str,
        progress: Progress,
        report: Report,
        stop: Callable[[], bool],
    ) -> tuple[Permutations, WrittenFile]:
        """Find the permutations, keep them in a file, and arrange the models by them.

        What an earlier attempt left there is not found again if it was at the same, as its `digest` says. What is read
        counts in the `progress`. Raises `NonFinite`, `Canceled`, `StorageFailed`, `InsufficientStorage`.
        """
        found = self._left_by(path, digest)
        _check_machine(plan)
        for matched in self._matched(found.models, _Counting(plan, progress, report, stop).work()):
            reports = {**found.provenance["models"], **matched.reports}
            provenance = {**found.provenance, "models": reports}
            found = replace(found, models={**found.models, **matched.indexed}, provenance=provenance)
            found.save(path)
        for ref, weights in self.moved.items():
            weights.arrange(found.models[str(ref)])
        return found, found.save(path)

    def _left_by(self, path: Path, digest: str) -> Permutations:
        """What an earlier attempt found, or nothing."""
        about = {
            "plan": digest,
            "method": self.keys.method,
            "paper": PAPER,
            "matched_with": "the mean of the others" if self.reference is None else str(self.reference),
            "seed": self.keys.seed,
            "max_sweeps": self.keys.max_sweeps,
            "models": {},
        }
        try:
            left = Permutations.open(path)
        except CheckpointError:
            return Permutations(self.spec, {}, about)
        is_ours = left.spec == self.spec and left.provenance.get("plan") == digest
        return left if is_ours else Permutations(self.spec, {}, about)

    def _matched(self, known: Container[str], work: Work) -> Iterator[_Matched]:
        """The permutations of models that are not known, as they are found."""
        seed, most = self.keys.seed, self.keys.max_sweeps
        missing = [ref for ref in self.models if str(ref) not in known]
        if self.reference is None and missing:
            weights = list(self.models.values())
            many = match_many(self.compared, weights, seed=seed, max_rounds=most, work=work)
            names = [str(ref) for ref in self.models]
            reports = {name: {"rounds": many.rounds} for name in names}
            yield _Matched(dict(zip(names, many.indexed, strict=True)), reports)
            return
        for ref in missing:
            if ref == self.reference:
                yield _Matched({str(ref): self.spec.identity()}, {})
            else:
                found = match(self.compared, *self.pair(ref), seed=seed, max_sweeps=most, work=work)
                yield _Matched({str(ref): found.indexed}, {str(ref): _told(found)})


@dataclass(frozen=True)
class _Matched:
    """Permutations of some models, by name, and how they were found."""

    indexed: Mapping[str, Indexed]
    reports: Mapping[str, Mapping[str, Any]]


def _told(found: Matching) -> dict[str, Any]:
    """How permutations were found, and how far the models were from one another, in all and tensor by tensor."""
    moved = {name: found.before[name] for name in found.before if found.before[name] != found.after[name]}
    return {
        "sweeps": len(found.visit_orders),
        "solved": found.solved,
        "certified": found.certified,
        "l2": [found.l2_before, found.l2_after],
        "tensors": {name: [math.sqrt(each[name].difference) for each in (found.before, found.after)] for name in moved},
    }


@dataclass(frozen=True)
class _Counting:
    """What a matching reads counts as read by what it is a part of."""

    plan: AlignmentPlan
    progress: Progress
    report: Report
    stop: Callable[[], bool]

    def work(self) -> Work:
        """How a matching is run under the plan."""
        read, total = self.progress.bytes_read, self.progress.bytes_read_total

        def tell(own: Progress) -> None:
            self.progress.tensor = own.tensor
            self.progress.bytes_read = read + own.bytes_read
            self.progress.bytes_read_total = total + own.bytes_read_total
            self.report(self.progress)

        models = len(self.plan.moved) + (self.plan.reference is not None)
        memory = self.plan.peak - self.plan.window - FLOOR_BYTES - _index_bytes(models, self.plan.sizes)
        return Work(self.plan.threads, memory, Progress(), tell, self.stop)


def align_models(
    keys: AlignmentKeys,
    named: Mapping[ModelRef, str],
    models: Mapping[ModelRef, Weights],
    base: ModelRef | None,
    roots: Sequence[Path] | None,
) -> Alignment:
    """Wrap the `models` that are `named`, each with its JSON pointer, the base first where there is one.

    Raises `RecipeError`, `IncompatibleModels` or `CheckpointError`.
    """
    taking_part = {ref: models[ref] for ref in named}
    if keys.permutations is not None:
        return _stored(keys, keys.permutations, named, taking_part, roots)
    to = keys.to or ("first" if base is None else "base")
    first = next(ref for ref in named if to == "base" or ref != base)
    reference = None if to == "mean" else first
    spec = _spec(keys, taking_part, first, roots)
    moved = {ref: _wrapped(taking_part[ref], spec, named[ref], {}) for ref in named if ref != reference}
    common = [name for name in spec.axes if len({_shape(weights, name) for weights in taking_part.values()}) == 1]
    compared = _restricted(spec, common)
    if not any(any(axes) for axes in compared.axes.values()):
        detail = "the models have no tensor in common that is permuted, so that nothing tells which neurons correspond"
        raise IncompatibleModels.of([Problem(detail, "#/alignment")])
    parts = {ref: _Only(weights, common) for ref, weights in taking_part.items()}
    return Alignment(keys, spec, compared, parts, moved, reference)


def settle(
    alignments: Sequence[tuple[Alignment, AlignmentPlan]],
    folder: Path,
    digest: str,
    progress: Progress,
    report: Report,
    stop: Callable[[], bool],
) -> list[WrittenFile]:
    """Find what is not stored, in the order in which one document's merge may be another's model; see
    `Alignment.find`.
    """
    wanted = [(alignment, plan) for alignment, plan in alignments if not plan.are_stored]
    return [alignment.find(folder / plan.file, plan, digest, progress, report, stop)[1] for alignment, plan in wanted]


def _stored(
    keys: AlignmentKeys,
    file: str,
    named: Mapping[ModelRef, str],
    models: Mapping[ModelRef, Weights],
    roots: Sequence[Path] | None,
) -> Alignment:
    with _files_at("#/alignment/permutations", roots):
        path = locate(file, roots)
        found = Permutations.open(path, roots=roots)
    names = {ref: keys.names.get(str(ref), str(ref)) for ref in models}
    for name in keys.names:
        if name not in map(str, models):
            detail = f"no model of the recipe is written {clip(name)!r}{suggestion(name, map(str, models))}"
            raise RecipeError.of([Problem(detail, f"#/alignment/names/{escaped(name)}")])
    if lacking := [ref for ref, name in names.items() if name not in found.models]:
        known = ", ".join(map(clip, found.models))
        hint = "say under alignment.names which it is there"
        detail = f"{file} has no permutations of {names[lacking[0]]}; it has those of {clip(known)}: {hint}"
        raise RecipeError.of([Problem(detail, named[lacking[0]])])
    moved = {}
    for ref, name in names.items():
        if any(found.moved(name).values()):
            moved[ref] = _wrapped(models[ref], found.spec, named[ref], {FILE_NAME: path})
            moved[ref].arrange(found.models[name])
    return Alignment(keys, found.spec, found.spec, models, moved, stored=found)


def _spec(
    keys: AlignmentKeys,
    models: Mapping[ModelRef, Weights],
    first: ModelRef,
    roots: Sequence[Path] | None,
) -> PermutationSpec:
    """The spec of all tensors that any of the models has; where shapes differ, those of `first` count."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weights in (models[first], *models.values()):
        for name, info in weights.tensors.items():
            shapes.setdefault(name, info.shape)
    if keys.spec is None:
        configs = {ref: weights.config for ref, weights in models.items()}
        try:
            return _derived(shapes, configs, first, residual=keys.residual)
        except IncompatibleModels as error:
            raise IncompatibleModels.of(replace(problem, pointer="#/alignment") for problem in error.problems) from None
    written = keys.spec
    if isinstance(written, str):
        with _files_at("#/alignment/spec", roots):
            path = locate(written, roots)
            check_below(path, roots)
            written = read_json(path, roots=roots)
    try:
        spec = PermutationSpec.from_data(written, shapes)
        spec.check(shapes)
    except (RecipeError, IncompatibleModels) as error:
        where = (f"#/alignment/spec{(problem.pointer or '#')[1:]}" for problem in error.problems)
        raise type(error).of(
            replace(problem, pointer=pointer) for problem, pointer in zip(error.problems, where, strict=True)
        ) from None
    return spec


def _derived(
    shapes: Mapping[str, Sequence[int]],
    configs: Mapping[ModelRef, Mapping[str, Any]],
    first: ModelRef,
    *,
    residual: bool,
) -> PermutationSpec:
    """What is exact for the first of some models, and by their own configs, where they have one, for all others."""
    spec = derive(shapes, configs[first], residual=residual)
    for ref, config in configs.items():
        if config and config != configs[first] and derive(shapes, config, residual=residual) != spec:
            detail = f"other permutations leave {ref} as it is than {first}: their configs differ in heads or positions"
            raise IncompatibleModels(detail, [Problem(detail)])
    return spec


def plan_alignment(alignment: Alignment, file: str, memory: int, threads: int | None) -> AlignmentPlan:
    """What it takes to bring the models into one order, with found permutations put into a `file`.

    Finding them stays within `memory` (bytes), except for what is assigned as one. Raises `MemoryLimitExceeded`.
    """
    sizes = tuple(alignment.spec.permutations.values())
    moved = tuple(alignment.moved)
    if alignment.keys.permutations is not None:
        return AlignmentPlan(alignment.keys.permutations, True, moved, None, sizes)
    pairs = [alignment.pair(ref) for ref in alignment.models if ref != alignment.reference]
    if (vectors := len(alignment.models) * len(sizes)) > MAX_TENSORS:
        detail = (
            f"{len(sizes):,} permutations of each model are {vectors:,} vectors; a file holds {MAX_TENSORS:,} at most"
        )
        raise IncompatibleModels.of([Problem(detail, "#/alignment")])
    found = bundles(alignment.compared, measured_tensors(alignment.compared, *pairs[0]))
    assignment = max((bundle.nbytes for bundle in found), default=0)
    workers = threads or len(os.sched_getaffinity(0))

    def besides(workers: int) -> int:
        needed = max(matching_bytes(alignment.compared, *pair, workers)[0] for pair in pairs)
        return FLOOR_BYTES + _index_bytes(len(alignment.models), sizes) + needed - assignment

    alone = besides(1)
    each = besides(2) - alone
    workers = max(1, min(workers, 1 + (memory - alone) // each))
    if (needed := alone + (workers - 1) * each) > memory:
        detail = (
            f"to find permutations takes {needed / 2**20:,.0f} MiB besides what is assigned as one, but the limit is "
            f"{memory / 2**20:,.0f} MiB; raise limits.memory"
        )
        raise MemoryLimitExceeded(detail, [Problem(detail, "#/limits/memory")])
    room = max(assignment, memory - needed)
    return AlignmentPlan(
        file,
        are_stored=False,
        moved=moved,
        reference=alignment.reference,
        sizes=sizes,
        threads=workers,
        peak=needed + min(room, workers * assignment),
        assignment=assignment,
        read=sum(
            weights.tensors[term.tensor].nbytes
            for pair in pairs
            for weights in pair
            for bundle in found
            for term in bundle.terms
        ),
    )


def _index_bytes(models: int, sizes: Sequence[int]) -> int:
    """Memory for the permutations of so many models: where every element comes from, and again while it is written."""
    return 20 * models * sum(sizes)


def _check_machine(plan: AlignmentPlan) -> None:
    """Raise `MemoryLimitExceeded` if an assignment, which no limit keeps from being solved, cannot be solved here."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if FLOOR_BYTES + plan.assignment > memory:
        detail = (
            f"the largest permutation, of {max(plan.sizes):,} elements, is assigned as one, which takes "
            f"{plan.assignment / 2**20:,.0f} MiB; this machine has {memory / 2**20:,.0f} MiB"
        )
        raise MemoryLimitExceeded(detail, [Problem(detail, "#/alignment")])


def _shape(weights: Weights, tensor: str) -> tuple[int, ...] | None:
    info = weights.tensors.get(tensor)
    return None if info is None else info.shape


def _restricted(spec: PermutationSpec, tensors: Iterable[str]) -> PermutationSpec:
    """What a spec says of some tensors."""
    axes = {name: spec.axes[name] for name in tensors if name in spec.axes}
    return replace(spec, axes=axes, unmeasured=spec.unmeasured & axes.keys())


def _wrapped(weights: Weights, spec: PermutationSpec, pointer: str, made_with: Mapping[str, Path]) -> Aligned:
    """A model under what a spec says of its tensors, which need not be all that the spec knows."""
    try:
        return Aligned(weights, _restricted(spec, weights.tensors), made_with)
    except IncompatibleModels as error:
        raise IncompatibleModels.of(replace(problem, pointer=pointer) for problem in error.problems) from None


@contextmanager
def _files_at(pointer: str, roots: Sequence[Path] | None) -> Iterator[None]:
    """Errors of the files that are read here as the document sees the world."""
    try:
        yield
    except CheckpointError as error:
        raise error.as_written(roots or (), pointer) from None
