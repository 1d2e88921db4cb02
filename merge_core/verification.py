"""To verify as work of its own: a document says what, a plan what it takes, and a folder with the report comes out.

Usage: `run(VerifyDocument.from_text(text), "out")`. The report is `verification.json`, in words `verification.txt`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from merge_core import __version__
from merge_core.artifact import Artifact, made_here
from merge_core.checkpoint import locate
from merge_core.documents import LoneDocument, canonical_json, read_as, unknown_keys
from merge_core.errors import CheckpointError, Problem, RecipeError, WeightsmithError
from merge_core.files import disk_error, remove_folder, write_text
from merge_core.journal import JOURNAL, Journal
from merge_core.keys import Limits
from merge_core.merge import appear, check_output, plan_only
from merge_core.progress import Report
from merge_core.references import ModelRef
from merge_core.shards import unfinished
from merge_core.verify import USUAL_SAMPLE, Lock, Outcome, Published, PublishedFolder, verify

REPORT_NAME = "verification.json"
WORDS_NAME = "verification.txt"
LOCK_NAME = "verification.lock.json"
_REPORT_BYTES = 2**20
_OF_TENSOR = 512


class VerifyDocument(LoneDocument):
    """Which published merge is to be verified, and how much of it."""

    a_kind: ClassVar[str] = "a verification"

    model: ModelRef | None = Field(
        None, description="a published merge: a folder with its merge.lock.json, or a Hub id"
    )
    job: str | None = Field(None, max_length=32, description="instead of that, a finished merge of yours by its id")
    sample: int = Field(USUAL_SAMPLE, ge=1, le=1_000_000, description="so many tensors are made again")
    all: bool = Field(False, description="all tensors are made again, whatever `sample` says")
    seed: int = Field(0, ge=0, lt=2**63, description="draws the sample")
    sources: dict[str, ModelRef] = Field(
        {}, description="where models that the lock names are now, by their names there"
    )
    limits: Limits = Limits()

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read parsed YAML or JSON. Raises `RecipeError` naming every key that is wrong."""
        if not isinstance(data, Mapping):
            raise RecipeError("a verification is a mapping with a model or a job")
        document = read_as(cls, data)
        problems = list(unknown_keys(document, "#"))
        if document.model is None and document.job is None:
            problems.append(Problem("say which model, or which job of yours", "#/model"))
        if document.model is not None and document.job is not None:
            problems.append(Problem("a model or a job, not both", "#/job"))
        if document.model is not None and document.model.adapter is not None:
            problems.append(Problem(f"{document.model} is two things; name the one that was published", "#/model"))
        if problems:
            raise RecipeError.of(problems)
        return document

    @property
    def count(self) -> int | None:
        """So many tensors; None: all."""
        return None if self.all else self.sample


@dataclass(frozen=True)
class VerifyPlan:
    """What verifying takes. `again`: bytes that may have to be written to make it again."""

    document: VerifyDocument
    lock: Lock
    read: int
    again: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The same for the same question about the same lock."""
        told = [__version__, self.document.to_data(), self.lock.model_dump(mode="json")]
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()

    @property
    def output_bytes(self) -> int:
        named = len(self.lock.files) + len(self.lock.tensors) + sum(len(source.files) for source in self.lock.sources)
        return _REPORT_BYTES + 2 * _OF_TENSOR * named + self.again

    def to_dict(self, *, steps: bool = False) -> dict[str, Any]:
        """The plan for people and for JSON; `steps` adds the names of all tensors."""
        total = len(self.lock.tensors)
        told = {
            "method": self.lock.method,
            "files": len(self.lock.files),
            "tensors": min(self.document.count or total, total),
            "tensors_total": total,
            "bytes_read": self.read,
            "bytes_written": self.output_bytes,
            "warnings": list(self.warnings),
        }
        return told | ({"steps": sorted(self.lock.tensors)} if steps else {})


def plan_verification(
    document: VerifyDocument,
    *,
    roots: Sequence[Path] | None = None,
    memory: int | None = None,
    threads: int | None = None,
    published: Published | None = None,
) -> VerifyPlan:
    """The plan alone: the lock and headers are read. `published`: the files of the job that the document names.

    Sources that are not there are no reason to refuse: files can be checked without them. Raises `WeightsmithError`.
    """
    with _as_asked(roots):
        found = published or find_published(document, roots)
        lock = Lock.of(found)
        sizes = found.sizes()
    read = sum(sizes.get(file.path, 0) for file in lock.files)
    try:
        again = lock.made_again(lock.places(document.sources, roots))
        made = plan_only(again, roots=roots, memory=memory, threads=threads)
    except WeightsmithError as error:
        return VerifyPlan(document, lock, read, warnings=(f"no tensor can be made again here: {str(error)[:500]}",))
    share = min(1.0, (document.count or len(made.steps)) / max(1, len(made.steps)))
    written = 0 if made.difference is None else made.output_bytes
    return VerifyPlan(document, lock, read + int(share * (made.input_bytes + made.output_bytes)), written)


def find_published(document: VerifyDocument, roots: Sequence[Path] | None) -> Published:
    """The published merge that a document names. Raises `CheckpointError`."""
    assert document.model is not None
    name = str(document.model)
    return PublishedFolder(locate(document.model.path, roots, document.model.revision), roots=roots, name=name)


def run(
    document: VerifyDocument,
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
    published: Published | None = None,
) -> Artifact:
    """Verify, and put the report into the folder `out`, which appears whole or not at all; see `merge`.

    A merge that is not what its lock says is a finding, not a failure: the artifact's warnings tell it.
    """
    out = Path(out).absolute()
    partial = partial or out.parent / f".{out.name}.partial"
    try:
        check_output(out, partial)
        plan = plan_verification(document, roots=roots, memory=memory, threads=threads, published=published)
        with unfinished(partial), closing(Journal(partial / JOURNAL, plan.digest)) as journal:
            journal.open()
            journal.clear_folder()
            scratch = partial / "scratch"
            with _as_asked(roots):
                found = verify(
                    published or find_published(document, roots),
                    sample=document.count,
                    seed=document.seed,
                    sources=document.sources,
                    roots=roots,
                    memory=memory or document.limits.memory,
                    threads=threads or document.limits.threads,
                    scratch=scratch,
                    cache=cache,
                    report=report,
                    stop=stop,
                )
            words = found.to_text()
            warnings = [] if found.outcome is Outcome.AGREES else words.splitlines()[:20]
            told = json.dumps(found.to_data(), indent=2, ensure_ascii=False) + "\n"
            files = [write_text(partial / REPORT_NAME, told), write_text(partial / WORDS_NAME, words)]
            lock = {
                **made_here(),
                "verification": document.to_data(),
                "outcome": found.outcome,
                "plan": plan.digest,
                "files": [asdict(file) for file in files],
                "warnings": warnings,
            }
            files.append(write_text(partial / LOCK_NAME, json.dumps(lock, indent=2, ensure_ascii=False) + "\n"))
            remove_folder(scratch)
            appear(partial, out)
    except OSError as error:
        raise disk_error(error, Path(error.filename or out), 0) from error
    return Artifact(out, tuple(files), {}, tuple(warnings))


@contextmanager
def _as_asked(roots: Sequence[Path] | None) -> Iterator[None]:
    """Errors of what was published, as the document sees the world."""
    try:
        yield
    except CheckpointError as error:
        raise error.as_written(roots or (), "#/model") from None
