"""Analyses: a document says which models, a plan what it takes, and a folder with the report comes out.

Usage: `analyse(AnalysisDocument.from_text(text), "out")`. `report.py` says what is in the report, `analysis.json`.

Every tensor is read once, as are blocks of a merge, and a sixteenth of it before (`survey.py`); what is decomposed is
read again while it is still in memory (`spectra.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from merge_core import __version__, kernels
from merge_core.aligned import Alignment, settle
from merge_core.alignment.permutations import Permutations
from merge_core.alignment.report import analyse as compare
from merge_core.analysis.report import HISTOGRAM_NUMBERS, AnalysisReport, TensorFigures
from merge_core.analysis.spectra import Spectrum, is_matrix, is_sketched, readings, spectrum, spectrum_bytes
from merge_core.analysis.survey import Figures, Survey, bits_for, histogram_bytes
from merge_core.artifact import Artifact, made_here, source_entry
from merge_core.blocks import Blocks
from merge_core.documents import LoneDocument, canonical_json, read_as, unknown_keys
from merge_core.errors import IncompatibleModels, MemoryLimitExceeded, Problem, RecipeError, WeightsmithError
from merge_core.execute import pool_of, share_one_heap
from merge_core.files import WrittenFile, disk_error, write_text
from merge_core.journal import JOURNAL, Journal
from merge_core.keys import AlignmentKeys, Limits, TokenizerKeys
from merge_core.layers import layer_of
from merge_core.matrices import Delta
from merge_core.memory import BLOCK_ELEMENTS, FLOOR_BYTES, plan_memory
from merge_core.merge import appear, check_output, opened, planned
from merge_core.method import Known, Randomness
from merge_core.plan import AlignmentPlan, Plan, Step
from merge_core.progress import Progress, Report
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.shards import check_space, unfinished
from merge_core.snapshots import Supply, supplied
from merge_core.sources import Sources
from merge_core.weights import Weights

REPORT_NAME = "analysis.json"
LOCK_NAME = "analysis.lock.json"
MOST_MODELS = 16
_NUMBER_BYTES = 14
_TOLD_BYTES = 2**18
_TICK_SECONDS = 0.5


class AnalysisDocument(LoneDocument):
    """Which models are to be compared with their base and with one another."""

    a_kind: ClassVar[str] = "an analysis"

    base_model: ModelRef = Field(description="what the models were tuned from")
    models: list[ModelRef] = Field(min_length=1, max_length=MOST_MODELS)
    density: float = Field(0.2, gt=0, le=1, description="the share of each task vector that a merge would be to keep")
    top: int = Field(16, ge=0, le=256, description="so many singular values of each matrix; 0: none are decomposed")
    exact_up_to: int = Field(
        1024,
        ge=1,
        le=16384,
        description="matrices with a short side of so many elements are decomposed whole; of larger ones a sketch "
        "tells the strongest directions",
    )
    exclude: list[str] = Field([], max_length=1000, description="pieces of names of tensors to leave out")
    tokenizer: TokenizerKeys | None = Field(None, description="as in a recipe, where vocabularies differ")
    alignment: AlignmentKeys | None = Field(None, description="as in a recipe: permute the models first")
    limits: Limits = Limits()

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read parsed YAML or JSON. Raises `RecipeError` naming every key that is wrong."""
        if not isinstance(data, Mapping):
            raise RecipeError("an analysis is a mapping with a base_model and models")
        missing = {"base_model": "say what the models were tuned from", "models": "say which models are compared"}
        document = read_as(cls, data, missing=missing)
        problems = list(unknown_keys(document, "#"))
        for i, model in enumerate(document.models):
            if model in document.models[:i]:
                problems.append(Problem(f"{model} is listed twice", f"#/models/{i}"))
            if model == document.base_model:
                problems.append(Problem(f"{model} is the base; name models tuned from it", f"#/models/{i}"))
        if problems:
            raise RecipeError.of(problems)
        with _as_asked():
            document.as_recipe()
        return document

    def canonical(self) -> dict[str, Any]:
        """What the document means: without what cannot change a byte of the report."""
        return {key: value for key, value in self.to_data().items() if key != "limits"}

    def as_recipe(self) -> Recipe:
        """The recipe whose task vectors these are. Raises `RecipeError`."""
        shared = {"tokenizer", "alignment", "exclude", "limits"}
        summed = {
            "merge_method": "task_arithmetic",
            "models": [{"model": model.model_dump()} for model in self.models],
            "base_model": self.base_model.model_dump(),
            "parameters": {"weight": 1},
        }
        return Recipe.from_data({**summed, **self.model_dump(mode="json", exclude_unset=True, include=shared)})


@dataclass(frozen=True)
class AnalysisPlan:
    """What an analysis takes. `merge`: the merge whose steps measure instead; `others`: tensors that are not measured,
    and why; of the `measured`, `decomposed` are, `sketched` of them by a sketch, by so many `threads` at once.
    """

    document: AnalysisDocument
    merge: Plan
    others: Mapping[str, str]
    bits: int
    threads: int

    @property
    def measured(self) -> tuple[Step, ...]:
        return self.merge.steps

    @cached_property
    def decomposed(self) -> tuple[Step, ...]:
        return tuple(step for step in self.measured if self.document.top and is_matrix(step.shape))

    @property
    def digest(self) -> str:
        """The same for two runs that tell the same: document, sources, version."""
        text = canonical_json([__version__, self.document.canonical(), self.merge.sources_digest])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.merge.warnings

    @property
    def input_bytes(self) -> int:
        """Bytes read from the models, every pass counted that is reckoned with."""
        again = sum(readings(step.shape, self.document.exact_up_to) * step.stored_bytes for step in self.decomposed)
        return sum(_survey_bytes(step) for step in self.measured) + again

    @property
    def output_bytes(self) -> int:
        models = len(self.document.models)
        layers = {place[:2] for step in self.measured if (place := layer_of(step.name)) is not None}
        of_layers = (1 + len(layers)) * models * HISTOGRAM_NUMBERS * _NUMBER_BYTES
        of_tensor = 512 + _NUMBER_BYTES * (models * (10 + self.document.top) + 4 * models**2)
        permutations = 0
        if (alignment := self.merge.alignment) is not None and not alignment.are_stored:
            permutations = 4 * (models + 1) * sum(alignment.sizes)
        return _TOLD_BYTES + of_layers + 2 * of_tensor * (len(self.measured) + len(self.others)) + permutations

    def to_dict(self, *, steps: bool = False) -> dict[str, Any]:
        """The plan for people and for JSON; `steps` adds the names of all tensors that are measured."""
        exact_up_to = self.document.exact_up_to
        told = {
            "models": [str(model) for model in self.document.models],
            "base_model": str(self.document.base_model),
            "tensors": len(self.measured),
            "tensors_left_out": len(self.others),
            "matrices": len(self.decomposed),
            "matrices_sketched": sum(is_sketched(step.shape, exact_up_to) for step in self.decomposed),
            "bytes_read": self.input_bytes,
            "bytes_written": self.output_bytes,
            "peak_memory": self.merge.memory.peak,
            "threads": self.merge.memory.threads,
            "warnings": list(self.warnings),
        }
        if self.merge.alignment is not None:
            told["alignment"] = self.merge.alignment.to_dict()
        return told | ({"steps": [step.name for step in self.measured]} if steps else {})


def plan_analysis(
    document: AnalysisDocument,
    *,
    roots: Sequence[Path] | None = None,
    memory: int | None = None,
    threads: int | None = None,
) -> AnalysisPlan:
    """The plan alone: headers and configs are read, no weights. Raises `WeightsmithError`."""
    with _opened(document, roots, memory, threads) as (plan, _, _, _):
        return plan


def analyse(
    document: AnalysisDocument,
    out: str | Path,
    *,
    roots: Sequence[Path] | None = None,
    partial: Path | None = None,
    memory: int | None = None,
    threads: int | None = None,
    block_elements: int = BLOCK_ELEMENTS,
    cache: Path | None = None,
    device: str = "cpu",
    report: Report = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Compare models as the document says into the folder `out`, which appears whole or not at all.

    All is as `merge` has it, but `device`: whatever it is, models are measured on the CPU; and a kill loses what was
    measured. The report's bytes depend on the document and the models alone, and where matrices are decomposed on the
    machine. Raises `WeightsmithError`.
    """
    out = Path(out).absolute()
    partial = partial or out.parent / f".{out.name}.partial"
    share_one_heap()
    try:
        check_output(out, partial)
        with _opened(document, roots, memory, threads, block_elements) as (plan, models, inputs, alignments):
            progress = Progress("measuring")
            window = plan.merge.memory.window
            with unfinished(partial), supplied(roots, window, stop, progress.receive) as supply:
                check_space(plan.output_bytes, partial)
                work = _Work(plan, models, inputs, alignments, partial, progress, report, stop, supply)
                files = work.carry_out(cache)
                appear(partial, out)
    except OSError as error:
        raise disk_error(error, Path(error.filename or out), 0) from error
    return Artifact(out, tuple(files), {}, work.warnings)


_Alignments = Sequence[tuple[Alignment, AlignmentPlan]]


@contextmanager
def _opened(
    document: AnalysisDocument,
    roots: Sequence[Path] | None,
    memory: int | None,
    threads: int | None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Iterator[tuple[AnalysisPlan, Mapping[ModelRef, Weights], Sequence[Weights], _Alignments]]:
    """The plan; the models as they lie on the disk; those of the plan; how they come to be in one order."""
    with ExitStack() as stack:
        with _as_asked():
            recipe = document.as_recipe()
            found = stack.enter_context(opened(recipe, roots))
            merge, models, _, alignments = planned(
                recipe, found, {}, roots, memory=memory, threads=threads, block_elements=block_elements
            )
            limit = memory or document.limits.memory
            plan = _planned(document, merge, limit, threads or document.limits.threads, block_elements)
        yield plan, found, [models[model] for model in merge.models], alignments


@contextmanager
def _as_asked() -> Iterator[None]:
    """Problems of the recipe, as the document sees the world: its models are listed without keys."""
    try:
        yield
    except (RecipeError, IncompatibleModels) as error:
        raise type(error).of(map(_as_written, error.problems)) if error.problems else error from None
    except WeightsmithError as error:
        error.problems = tuple(map(_as_written, error.problems))
        raise


def _as_written(problem: Problem) -> Problem:
    pointer = problem.pointer or ""
    parts = pointer.split("/")
    is_model = len(parts) > 3 and parts[1] == "models" and parts[3] == "model"
    return replace(problem, pointer="/".join((*parts[:3], *parts[4:]))) if is_model else problem


def _planned(
    document: AnalysisDocument, merge: Plan, limit: int, threads: int | None, block_elements: int
) -> AnalysisPlan:
    """The plan of a merge with all that it would merge measured instead. Raises `IncompatibleModels` or
    `MemoryLimitExceeded`.
    """
    wanted = [step for step in merge.steps if step.method is not None and step.base is not None]
    others = {step.name: step.reason or "it has no base" for step in merge.steps if step.method is None}
    if not wanted:
        raise IncompatibleModels("the models have no numbers that could be compared")
    models = len(document.models)
    bits = bits_for(len(wanted), models)
    survey = Survey(density=document.density, bits=bits)
    steps = tuple(replace(step, method=survey) for step in wanted)
    kept = histogram_bytes(len(steps), models, bits)
    window = merge.memory.window
    memory = plan_memory(steps, "tensor", limit, threads, block_elements, on_gpu=False, window=window + kept)
    peak, at_once = max(memory.peak, merge.alignment.peak if merge.alignment else 0), 1
    if matrices := [step for step in steps if document.top and is_matrix(step.shape)]:
        floor = FLOOR_BYTES + window + kept
        needs = [(_decomposing_bytes(document, step), step) for step in matrices]
        most, worst = max(needs, key=lambda need: need[0])
        if most > limit - floor:
            detail = (
                f"to decompose {worst.name} {list(worst.shape)} takes {most / 2**20:,.0f} MiB and "
                f"{floor / 2**20:,.0f} MiB besides, but the limit is {limit / 2**20:,.0f} MiB; raise limits.memory, "
                "lower exact_up_to, or write top: 0 to decompose none"
            )
            raise MemoryLimitExceeded(detail, [Problem(detail, "#/limits/memory", tensor=worst.name)])
        at_once = max(1, min(memory.threads, models, (limit - floor) // max(1, most)))
        peak = max(peak, floor + at_once * most)
    memory = replace(memory, peak=peak, window=window)
    return AnalysisPlan(document, replace(merge, steps=steps, memory=memory, scope="tensor"), others, bits, at_once)


def _decomposing_bytes(document: AnalysisDocument, step: Step) -> int:
    """What a matrix takes of one model, its share of all models' directions included."""
    short = min(step.shape[0], math.prod(step.shape[1:]))
    directions = 8 * short * document.top * len(document.models)
    held = sum(source.info.nbytes for source in step.reads if source.is_whole)
    return spectrum_bytes(step.shape, document.top, document.exact_up_to, step.working.itemsize) + directions + held


def _survey_bytes(step: Step) -> int:
    stages = step.method.stages("tensor") if step.method else ()
    return sum(int(stage.reads * step.stored_bytes) for stage in stages if stage.expected)


@dataclass
class _Work:
    """A plan as it is carried out: `models` as they lie on the disk, `inputs` those of the plan."""

    plan: AnalysisPlan
    models: Mapping[ModelRef, Weights]
    inputs: Sequence[Weights]
    alignments: _Alignments
    folder: Path
    progress: Progress
    report: Report
    stop: Callable[[], bool]
    supply: Supply | None
    warnings: tuple[str, ...] = ()
    _of_tensors: list[TensorFigures] = field(default_factory=list)

    def carry_out(self, cache: Path | None) -> list[WrittenFile]:
        """Fill the folder; the lock, which names all other files, comes last."""
        merge = self.plan.merge
        with ExitStack() as stack:
            journal = stack.enter_context(closing(Journal(self.folder / JOURNAL, self.plan.digest)))
            journal.open()
            journal.clear_folder()
            beside = list(self.models.values()) if self.alignments else []
            made = Sources.of(merge, self.inputs, cache, self.stop, beside, self.supply)
            sources = stack.enter_context(closing(made))
            pool = stack.enter_context(pool_of(merge.memory.threads))
            kernels.load()
            self.progress.tensors_total = len(merge.steps)
            self.progress.bytes_read_total = self.plan.input_bytes
            files = self._align()
            aligned = self._compare_orders()
            self._enter("measuring")
            self._expect()
            blocks = Blocks(merge, self.inputs, Randomness(0), self.progress, self.stop)
            try:
                for step in merge.steps:
                    self._of_tensors.append(self._measured(blocks, pool, step))
                    sources.merged(step)
                    self.progress.tensors_done += 1
                    self.report(self.progress)
            finally:
                blocks.is_over = True
            self._enter("hashing the models")
            hashes = sources.result()
            self.warnings = (*merge.warnings, *sources.notes)
        for weights in self.inputs:
            weights.check_unchanged()
        told = AnalysisReport(self.plan.document, self._of_tensors, self.plan.others, self.plan.bits, aligned).to_json()
        files.append(write_text(self.folder / REPORT_NAME, told))
        lock = {
            **made_here(),
            "exact_on": "this machine" if self.plan.decomposed or self.alignments else "any machine",
            "analysis": self.plan.document.canonical(),
            "plan": self.plan.digest,
            "sources": [source_entry(ref, weights, hashes) for ref, weights in self.models.items()],
            "files": [asdict(file) for file in files],
            "left_out": list(merge.left_out),
            "warnings": list(self.warnings),
        }
        self.progress.complete()
        self.report(self.progress)
        return [*files, write_text(self.folder / LOCK_NAME, json.dumps(lock, indent=2, ensure_ascii=False) + "\n")]

    def _enter(self, phase: str) -> None:
        self.progress.phase = phase
        self.report(self.progress)

    def _measured(self, blocks: Blocks, pool: ThreadPoolExecutor, step: Step) -> TensorFigures:
        """Everything about one tensor."""
        assert step.method is not None
        self.progress.tensor = step.name
        known: Known = {}
        for _ in blocks.measure_all(pool, [step], step.method.stages("tensor"), known):
            self.report(self.progress)
        spectra = self._decomposed(blocks, pool, step) if self.plan.document.top and is_matrix(step.shape) else []
        formats = tuple(self.inputs[source.model].format(source.info) for source in step.merges)
        return TensorFigures.of(step.name, step.shape, formats, Figures.of(known), known, spectra)

    def _decomposed(self, blocks: Blocks, pool: ThreadPoolExecutor, step: Step) -> list[Spectrum]:
        """The spectrum of each model's task vector, some at once."""
        document = self.plan.document
        deltas = Delta.each(blocks.whole(step, reads=readings(step.shape, document.exact_up_to)))
        found: list[Spectrum] = []
        for start in range(0, len(deltas), self.plan.threads):
            pending = [
                pool.submit(spectrum, delta, step.name, document.top, document.exact_up_to)
                for delta in deltas[start : start + self.plan.threads]
            ]
            while wait(pending, timeout=_TICK_SECONDS).not_done:
                self.report(self.progress)
            found += [future.result() for future in pending]
        return found

    def _expect(self) -> None:
        """Tell the supply which tensors will be read, in this order."""
        if self.supply is not None:
            self.supply.expect((step.name, list(self._stand_ins(step))) for step in self.plan.measured)

    def _stand_ins(self, step: Step) -> Iterator[tuple[Path, int, int]]:
        for source in step.reads:
            weights = self.inputs[source.model]
            for name, begin, end in weights.ranges(source.info):
                if (shard := weights.shards[name]).is_stand_in:
                    yield shard.path, begin, end

    def _align(self) -> list[WrittenFile]:
        if all(plan.are_stored for _, plan in self.alignments):
            return []
        self._enter("aligning")
        return settle(self.alignments, self.folder, self.plan.digest, self.progress, self.report, self.stop)

    def _compare_orders(self) -> dict[str, Any] | None:
        """How good the permutations are: how many units they move, and how far each model was and is from the first of
        them that stays.
        """
        if not self.alignments:
            return None
        self._enter("comparing orders")
        ((alignment, plan),) = self.alignments
        found = alignment.stored or Permutations.open(self.folder / plan.file)
        names = {ref: alignment.keys.names.get(str(ref), str(ref)) for ref in alignment.models}
        first = alignment.reference or next((ref for ref in alignment.models if ref not in alignment.moved), None)
        first = first or next(iter(alignment.models))
        told: dict[str, Any] = {}
        for ref, name in names.items():
            told[str(ref)] = {"moved": found.moved(name), "sizes": dict(alignment.spec.permutations)}
            if ref == first:
                continue
            compared = compare(
                alignment.models[first],
                alignment.models[ref],
                alignment.compared,
                found.models[name],
                decompose=False,
                report=lambda progress: self.report(self.progress),
                stop=self.stop,
            )
            told[str(ref)] |= {"distance_before": compared.distance_before, "distance_after": compared.distance_after}
        return {"compared_with": str(first), "models": told}
