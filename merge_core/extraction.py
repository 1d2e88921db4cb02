"""Extracting a robust weight signature: planned from headers, then measured, rounded and written as one small file."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_core import __version__
from merge_core.artifact import Artifact, made_here, source_entry
from merge_core.documents import canonical_json
from merge_core.errors import Canceled, CheckpointError, IncompatibleModels, MemoryLimitExceeded, Problem
from merge_core.execute import share_one_heap
from merge_core.files import disk_error, write_text
from merge_core.journal import JOURNAL, Journal
from merge_core.memory import FLOOR_BYTES
from merge_core.merge import appear, check_output, open_model
from merge_core.patches.encoding import Encoding
from merge_core.patches.encodings.replacement import Replacement
from merge_core.patches.signatures import BatchNorm, Mean, Orthogonal, Trio, select
from merge_core.patches.writing import Extraction, assemble, encode_all
from merge_core.progress import Progress, Report
from merge_core.references import ModelRef
from merge_core.runs import digest_of
from merge_core.shards import check_space, unfinished
from merge_core.snapshots import Supply, supplied, window_of
from merge_core.sources import Sources
from merge_core.weights import Weights

LOCK_NAME = "patch.lock.json"
KIND = "robust weight signature"
"""What a signature's provenance says it is."""
_PASSES = 3
"""How often a tensor is read at most: for its products, its extremes and its codes."""
_TOLD_BYTES = 1200
"""What provenance says of a tensor or a file at most."""


@dataclass(frozen=True)
class Wanted:
    """What a signature is to be made of, and how it is stored."""

    base_model: ModelRef
    clean: ModelRef
    corrupted: tuple[ModelRef, ...]
    layers: int | tuple[str, ...]
    batch_norm: BatchNorm
    replace: tuple[str, ...]
    encoding: Encoding

    @property
    def roles(self) -> tuple[ModelRef, ...]:
        """The models as a signature is made of them: the base, the clean one, the corrupted ones."""
        return (self.base_model, self.clean, *self.corrupted)

    @property
    def models(self) -> dict[ModelRef, str]:
        """Every model, and its JSON pointer."""
        found = {self.base_model: "#/base_model"}
        found.setdefault(self.clean, "#/clean")
        for i, model in enumerate(self.corrupted):
            found.setdefault(model, f"#/corrupted/{i}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """As a signature says what it was made of."""
        return {
            "base_model": str(self.base_model),
            "clean": str(self.clean),
            "corrupted": [str(model) for model in self.corrupted],
            "layers": self.layers if isinstance(self.layers, int) else list(self.layers),
            "batch_norm": self.batch_norm,
            **({"replace": list(self.replace)} if self.replace else {}),
            "encoding": {"kind": self.encoding.name, **self.encoding.model_dump()},
        }


@dataclass(frozen=True)
class SignaturePlan:
    """What will be done, made from headers."""

    wanted: Wanted
    orthogonal: tuple[str, ...]
    replaced: tuple[str, ...]
    model_bytes: int
    input_bytes: int
    output_bytes: int
    threads: int
    peak: int
    digest: str
    warnings: tuple[str, ...] = ()

    def to_dict(self, *, steps: bool = False) -> dict[str, Any]:
        """The plan for people and for JSON; `steps` adds one entry per tensor. `bytes_written` is the most."""
        plan = {
            "operation": "extract",
            **self.wanted.to_dict(),
            "tensors": len(self.orthogonal) + len(self.replaced),
            "tensors_replaced": len(self.replaced),
            "bytes_of_model": self.model_bytes,
            "bytes_read": self.input_bytes,
            "bytes_written": self.output_bytes,
            "peak_memory": self.peak,
            "threads": self.threads,
            "warnings": list(self.warnings),
        }
        kept = [("orthogonal part", self.orthogonal), ("replaced", self.replaced)]
        each = [{"tensor": name, "kept": what} for what, names in kept for name in names]
        return plan | ({"steps": each} if steps else {})


def plan_signature(
    wanted: Wanted, *, roots: Sequence[Path] | None, limit: int, threads: int | None = None
) -> SignaturePlan:
    """The plan alone: headers are read, no weights. `limit`: bytes of memory. Raises `WeightsmithError`."""
    with _opened(wanted, roots) as trio:
        return _planned(wanted, trio, limit, threads, window_of(roots, limit))[0]


def extract_signature(
    wanted: Wanted,
    out: Path,
    *,
    document: Mapping[str, Any],
    roots: Sequence[Path] | None,
    partial: Path,
    limit: int,
    threads: int | None,
    cache: Path | None,
    report: Report,
    stop: Callable[[], bool],
) -> Artifact:
    """Write a signature into the folder `out`, which appears whole or not at all; see `merge`.

    `document` is what was asked for, for the lock.
    """
    share_one_heap()
    try:
        check_output(out, partial)
        with _opened(wanted, roots) as trio:
            work = _Work(Progress(), report, stop)
            window = window_of(roots, limit)
            plan, extraction = _planned(wanted, trio, limit, threads, window, work.read)
            with unfinished(partial), supplied(roots, window, stop, work.progress.receive) as supply:
                check_space(plan.output_bytes, partial)
                journal = Journal(partial / JOURNAL, plan.digest)
                journal.open()
                try:
                    journal.clear_folder()
                    artifact = work.write(plan, trio, extraction, partial, out, journal, document, cache, supply)
                finally:
                    journal.close()
                for weights in trio.all:
                    weights.check_unchanged()
                appear(partial, out)
                return artifact
    except OSError as error:
        raise disk_error(error, Path(error.filename or out), 0) from error


@contextmanager
def _opened(wanted: Wanted, roots: Sequence[Path] | None) -> Iterator[Trio]:
    with ExitStack() as stack:
        found: dict[ModelRef, Weights] = {}
        for ref, pointer in wanted.models.items():
            try:
                found[ref] = stack.enter_context(open_model(ref, pointer, roots, weights=True))
            except CheckpointError as error:
                raise error.as_written(roots or (), pointer) from None
        origin, clean, *corrupted = (found[ref] for ref in wanted.roles)
        yield Trio(origin, clean, tuple(corrupted), tuple(map(str, wanted.roles)))


def _planned(
    wanted: Wanted,
    trio: Trio,
    limit: int,
    threads: int | None,
    window: int,
    tick: Callable[[int], None] = lambda count: None,
) -> tuple[SignaturePlan, Extraction]:
    orthogonal, replaced = select(trio, wanted.layers, wanted.batch_norm, wanted.replace)
    if not orthogonal and not replaced:
        raise IncompatibleModels("none of the models' tensors would be in the signature; choose other layers")
    pairs: list[tuple[Mean, Encoding]] = [(Orthogonal(trio, name, tick), wanted.encoding) for name in orthogonal]
    pairs += [(Mean(trio, name, tick), Replacement()) for name in replaced]
    extraction = Extraction(tuple(pairs), ())
    needs = [(encoding.work_bytes(difference), difference.name) for difference, encoding in pairs]
    most, worst = max(needs)
    floor = FLOOR_BYTES + window
    if most > limit - floor:
        detail = (
            f"{worst} needs {most / 2**20:,.0f} MiB and {floor / 2**20:,.0f} MiB besides, but the limit is "
            f"{limit / 2**20:,.0f} MiB; raise limits.memory"
        )
        raise MemoryLimitExceeded(detail, [Problem(detail, "#/limits/memory", tensor=worst)])
    threads = min(threads or len(os.sched_getaffinity(0)), (limit - floor) // most, len(pairs))
    opened = dict(zip(wanted.roles, trio.all, strict=True))
    files = [shard for weights in trio.all for shard in weights.shards]
    made = [__version__, wanted.to_dict(), digest_of(list(opened), opened)]
    plan = SignaturePlan(
        wanted,
        tuple(orthogonal),
        tuple(replaced),
        model_bytes=sum(info.nbytes for info in trio.clean.tensors.values()),
        input_bytes=sum(_PASSES * difference.info.nbytes * len(difference.read) for difference, _ in pairs),
        output_bytes=extraction.most_bytes(wanted.to_dict()) + _TOLD_BYTES * (len(pairs) + len(files)),
        threads=threads,
        peak=floor + threads * most,
        digest=hashlib.sha256(canonical_json(made).encode()).hexdigest(),
        warnings=tuple(dict.fromkeys(note for weights in trio.all for note in weights.notes)),
    )
    return plan, extraction


@dataclass
class _Work:
    """An extraction on its way; `report` and `stop` as in `merge`."""

    progress: Progress
    report: Report
    stop: Callable[[], bool]

    def __post_init__(self) -> None:
        self._counting = threading.Lock()

    def read(self, count: int) -> None:
        """So many bytes were read, by whichever thread."""
        with self._counting:
            self.progress.bytes_read += count
        self._watch()

    def _watch(self) -> None:
        if self.stop():
            raise Canceled("the extraction was canceled")
        self.report(self.progress)

    def write(
        self,
        plan: SignaturePlan,
        trio: Trio,
        extraction: Extraction,
        folder: Path,
        out: Path,
        journal: Journal,
        document: Mapping[str, Any],
        cache: Path | None,
        supply: Supply | None,
    ) -> Artifact:
        progress = self.progress
        progress.tensors_total, progress.bytes_read_total = len(extraction.pairs), plan.input_bytes
        progress.bytes_written_total = plan.output_bytes
        progress.phase = "extracting"

        def done(difference: Any) -> None:
            progress.tensor, progress.tensors_done = difference.name, progress.tensors_done + 1
            self._watch()

        encoded, resumed = encode_all(extraction, folder, journal, threads=plan.threads, done=done, watch=self._watch)
        progress.phase = "hashing"
        self._watch()
        with closing(
            Sources.whole(trio.all, threads=plan.threads, cache=cache, stop=self.stop, supply=supply)
        ) as files:
            hashes = files.result()
        opened = dict(zip(plan.wanted.roles, trio.all, strict=True))
        sources = [source_entry(model, weights, hashes) for model, weights in opened.items()]
        progress.phase = "writing"
        provenance = {
            "kind": KIND,
            "paper": "https://arxiv.org/abs/2302.12480",
            "made_with": f"weightsmith {__version__}",
            **plan.wanted.to_dict(),
            "sources": sources,
            "projection": {
                difference.name: {"coefficient": difference.coefficient, "share": round(difference.share, 6)}
                for difference, _ in extraction.pairs
                if isinstance(difference, Orthogonal)
            },
        }
        file, tensors = assemble(encoded, extraction, folder, provenance, stop=self._watch)
        lock = {
            **made_here(),
            "exact_on": "any machine",
            "patch": document,
            "plan": plan.digest,
            "sources": sources,
            "files": [asdict(file)],
            "tensors": {name: {"blake3": tensors[name]} for name in sorted(tensors)},
            "warnings": list(plan.warnings),
        }
        locked = write_text(folder / LOCK_NAME, json.dumps(lock, indent=2, ensure_ascii=False) + "\n")
        progress.complete()
        self._watch()
        return Artifact(out, (file, locked), tensors, plan.warnings, resumed)
