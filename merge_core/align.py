"""Alignments: documents that ask for permutations alone, and what can be done with those that were found.

Usage: `align(AlignmentDocument.from_text(text), "aligned")`; then any recipe may have
`alignment: {permutations: aligned/alignment.safetensors}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from merge_core import __version__
from merge_core.adapter_sums import Placed
from merge_core.aligned import FILE_NAME, Alignment, align_models, plan_alignment
from merge_core.alignment.permutations import Permutations
from merge_core.alignment.report import analyse, analysis_bytes
from merge_core.artifact import Artifact, made_here, source_entry
from merge_core.documents import LoneDocument, canonical_json, read_as, unknown_keys
from merge_core.errors import CheckpointError, MemoryLimitExceeded, Problem, RecipeError
from merge_core.execute import share_one_heap
from merge_core.files import WrittenFile, disk_error, write_text
from merge_core.headers import clip
from merge_core.journal import JOURNAL, Journal
from merge_core.keys import AlignmentKeys, Limits
from merge_core.memory import FLOOR_BYTES
from merge_core.merge import appear, check_output, open_model
from merge_core.plan import AlignmentPlan
from merge_core.progress import Progress, Report
from merge_core.recipe import Recipe, alignment_structure
from merge_core.references import ModelRef
from merge_core.runs import digest_of
from merge_core.shards import unfinished
from merge_core.snapshots import Supply, supplied, window_of
from merge_core.sources import Sources
from merge_core.weights import Weights

LOCK_NAME = "alignment.lock.json"
REPORT_NAME = "report.json"
DOCUMENT_NAME = "alignment.yml"
_INDEX_BYTES = 4
_ABOUT_BYTES = 2**20
"""What an artifact takes besides index vectors, about."""


class AlignmentDocument(LoneDocument):
    """Which models are to be brought into one order, and how."""

    a_kind: ClassVar[str] = "an alignment"

    models: list[ModelRef] = Field(min_length=1, max_length=64)
    base_model: ModelRef | None = Field(
        None, description="what all models are matched with, unless `to` says otherwise"
    )
    alignment: AlignmentKeys = AlignmentKeys()
    report: Literal["distances", "full"] = Field(
        "distances", description="full: also how well the strong directions of every matrix agree, before and after"
    )
    limits: Limits = Limits()

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read parsed YAML or JSON. Raises `RecipeError` naming every key that is wrong."""
        if not isinstance(data, Mapping):
            raise RecipeError("an alignment is a mapping with models and, to say how, alignment")
        document = read_as(cls, data, missing={"models": "say which models are to be aligned"})
        problems = [*document._structure(), *unknown_keys(document, "#")]
        if problems:
            raise RecipeError.of(problems)
        return document

    def canonical(self) -> dict[str, Any]:
        """What the document means: without what cannot change a byte of the permutations."""
        return {key: value for key, value in self.to_data().items() if key != "limits"}

    def aligned_models(self) -> dict[ModelRef, str]:
        """Every model, the base first, and its JSON pointer."""
        found = {} if self.base_model is None else {self.base_model: "#/base_model"}
        for i, model in enumerate(self.models):
            found.setdefault(model, f"#/models/{i}")
        return found

    def _structure(self) -> Iterator[Problem]:
        for i, model in enumerate(self.models):
            if model in self.models[:i]:
                yield Problem(f"{model} is listed twice", f"#/models/{i}")
        if self.alignment.is_stored:
            yield Problem("these were found before; an alignment finds new ones", "#/alignment/permutations")
            return
        yield from alignment_structure(
            self.alignment, has_base=self.base_model is not None, models=len(self.aligned_models())
        )


@dataclass(frozen=True)
class DocumentPlan:
    """What finding the permutations of a document takes."""

    document: AlignmentDocument
    alignment: Alignment
    plan: AlignmentPlan
    sources_digest: str
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The same for two runs that find the same: document, sources, version."""
        text = canonical_json([__version__, self.document.canonical(), self.sources_digest, self.alignment.digest])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def output_bytes(self) -> int:
        return _INDEX_BYTES * len(self.alignment.models) * sum(self.plan.sizes) + _ABOUT_BYTES

    def to_dict(self, *, steps: bool = False) -> dict[str, Any]:
        """The plan for people and for JSON; `steps` adds the size of every permutation."""
        told = {
            **self.plan.to_dict(),
            "aligned": [str(model) for model in self.alignment.models],
            "tensors": len(self.alignment.spec.axes),
            "bytes_written": self.output_bytes,
            "threads": self.plan.threads,
            "warnings": list(self.warnings),
        }
        return told | ({"steps": dict(self.alignment.spec.permutations)} if steps else {})


def plan_only(
    document: AlignmentDocument,
    *,
    roots: Sequence[Path] | None = None,
    memory: int | None = None,
    threads: int | None = None,
) -> DocumentPlan:
    """The plan alone: headers and configs are read, no weights. Raises `WeightsmithError`."""
    with _opened(document, roots) as models:
        return _planned(document, models, roots, memory, threads)


def align(
    document: AlignmentDocument,
    out: str | Path,
    *,
    roots: Sequence[Path] | None = None,
    partial: Path | None = None,
    memory: int | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    report: Report = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Find permutations as the document says into the folder `out`, which appears whole or not at all.

    All is as `merge` has it, but `device`: whatever it is, permutations are found on the CPU. What is found depends on
    the document, the models and the machine. Raises `WeightsmithError`.
    """
    out = Path(out).absolute()
    partial = partial or out.parent / f".{out.name}.partial"
    share_one_heap()
    try:
        check_output(out, partial)
        with _opened(document, roots) as models:
            plan = _planned(document, models, roots, memory, threads)
            progress = Progress("aligning")
            with unfinished(partial), supplied(roots, plan.plan.window, stop, progress.receive) as supply:
                files = _carry_out(plan, models, partial, cache, progress, report, stop, supply)
                appear(partial, out)
    except OSError as error:
        raise disk_error(error, Path(error.filename or out), 0) from error
    return Artifact(out, tuple(files), {}, plan.warnings)


@contextmanager
def _opened(document: AlignmentDocument, roots: Sequence[Path] | None) -> Iterator[Mapping[ModelRef, Weights]]:
    with ExitStack() as stack:
        found = {}
        for ref, pointer in document.aligned_models().items():
            try:
                found[ref] = stack.enter_context(open_model(ref, pointer, roots, weights=True))
            except CheckpointError as error:
                raise error.as_written(roots or (), pointer) from None
            if isinstance(found[ref], Placed):
                detail = f"{ref} is an adapter, not a model; write the model it is for before it: base+{ref}"
                raise RecipeError.of([Problem(detail, pointer)])
        yield found


def _planned(
    document: AlignmentDocument,
    models: Mapping[ModelRef, Weights],
    roots: Sequence[Path] | None,
    memory: int | None,
    threads: int | None,
) -> DocumentPlan:
    limit = memory or document.limits.memory
    window = window_of(roots, limit)
    limit -= window
    alignment = align_models(document.alignment, document.aligned_models(), models, document.base_model, roots)
    plan = plan_alignment(alignment, FILE_NAME, limit, threads or document.limits.threads)
    if document.report == "full":
        first, *others = alignment.models.values()
        found = (analysis_bytes(first, each, alignment.compared) for each in others)
        needed, worst = max(found, key=lambda each: each[0])
        needed += FLOOR_BYTES
        if worst is not None and needed > limit:
            detail = (
                f"the full report takes {needed / 2**20:,.0f} MiB to decompose {worst.name} {list(worst.shape)}, but "
                f"the limit is {limit / 2**20:,.0f} MiB; raise limits.memory, or leave report: full away"
            )
            raise MemoryLimitExceeded(detail, [Problem(detail, "#/limits/memory", tensor=worst.name)])
        plan = replace(plan, peak=max(plan.peak, needed))
    plan = replace(plan, peak=plan.peak + window, window=window)
    return DocumentPlan(document, alignment, plan, digest_of(list(models), models))


def _carry_out(
    plan: DocumentPlan,
    models: Mapping[ModelRef, Weights],
    folder: Path,
    cache: Path | None,
    progress: Progress,
    report: Report,
    stop: Callable[[], bool],
    supply: Supply | None,
) -> list[WrittenFile]:
    """Fill the folder; the lock, which names all other files, comes last."""
    inputs = list(models.values())
    everything = [(number, file) for number, weights in enumerate(inputs) for file in weights.shards]
    with ExitStack() as stack:
        journal = stack.enter_context(closing(Journal(folder / JOURNAL, plan.digest)))
        journal.open()
        journal.clear_folder()
        sources = Sources(
            inputs,
            everything,
            threads=plan.plan.threads,
            output_bytes=plan.output_bytes,
            cache=cache,
            stop=stop,
            supply=supply,
        )
        stack.callback(sources.close)
        report(progress)
        found, file = plan.alignment.find(folder / FILE_NAME, plan.plan, plan.digest, progress, report, stop)
        with _one_thread():
            told = _report(plan, found, report, stop)
        progress.phase = "hashing the models"
        progress.complete()
        report(progress)
        hashes = sources.result()
    for weights in inputs:
        weights.check_unchanged()
    files = [
        file,
        write_text(folder / REPORT_NAME, json.dumps(told, indent=2, ensure_ascii=False) + "\n"),
        write_text(folder / DOCUMENT_NAME, plan.document.to_yaml()),
    ]
    lock = {
        **made_here(),
        "exact_on": "this machine",
        "alignment": plan.document.canonical(),
        "plan": plan.digest,
        "sources": [source_entry(model, weights, hashes) for model, weights in models.items()],
        "files": [asdict(file) for file in files],
        "warnings": list(plan.warnings),
    }
    return [*files, write_text(folder / LOCK_NAME, json.dumps(lock, indent=2, ensure_ascii=False) + "\n")]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Decompose with one thread: what comes out must not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _report(plan: DocumentPlan, found: Permutations, report: Report, stop: Callable[[], bool]) -> dict[str, Any]:
    """What the permutations did to every model: how they were found, and how far the models were and are apart."""
    told: dict[str, Any] = {key: value for key, value in found.provenance.items() if key != "models"}
    models = {str(ref): weights for ref, weights in plan.alignment.models.items()}
    first = next(iter(models)) if plan.alignment.reference is None else str(plan.alignment.reference)
    told["compared_with"] = first
    told["models"] = {name: {"moved": found.moved(name), **about} for name, about in found.provenance["models"].items()}
    is_full = plan.document.report == "full"
    for name in models:
        if name != first and (is_full or plan.alignment.reference is None):
            compared = analyse(
                models[first],
                models[name],
                plan.alignment.compared,
                found.models[name],
                decompose=is_full,
                report=report,
                stop=stop,
            )
            told["models"][name]["analysis"] = compared.to_data()
    return told


def applying(permutations: str | Path, model: str, name: str | None = None) -> Recipe:
    """The recipe that writes a model with its neurons in the order that a file says.

    `name`: what the file calls the model; by default what it is called here, or whichever is the only one that moves.
    Raises `RecipeError` or `CheckpointError`.
    """
    ref = ModelRef.model_validate(model)
    if name is None:
        found = Permutations.open(permutations)
        moving = [known for known in found.models if any(found.moved(known).values())]
        if str(ref) not in found.models and len(moving) != 1:
            known = ", ".join(map(clip, found.models))
            raise RecipeError(f"{permutations} has permutations of {known}; say which of them {ref} is to follow")
        name = str(ref) if str(ref) in found.models else moving[0]
    keys = {"permutations": str(permutations), "names": {str(ref): name}}
    return Recipe.from_data({"merge_method": "passthrough", "models": [{"model": ref.model_dump()}], "alignment": keys})
