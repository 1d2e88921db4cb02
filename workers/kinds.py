"""What jobs of each kind do with their documents: how one is read, planned and run.

To add a kind, name it in `JobKind` and give it an entry in `WORK`: its routes, its place in the queue and its worker
follow. What makes an entry is called where its modules are needed, because they import torch, which must not happen
before a worker forks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

from workers.jobs import JobKind, RecipeData

if TYPE_CHECKING:
    from merge_core.artifact import Artifact
    from merge_core.keys import Limits
    from merge_core.progress import Report


class Document(Protocol):
    """What was asked for, validated."""

    @property
    def limits(self) -> Limits: ...

    @classmethod
    def from_text(cls, text: str | bytes) -> Self:
        """Read YAML or JSON. Raises `RecipeError`."""

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """Read what `to_data` gave. Raises `RecipeError`."""

    def to_data(self) -> RecipeData: ...

    @classmethod
    def model_json_schema(cls, *, ref_template: str) -> dict[str, Any]: ...


class Plan(Protocol):
    """What will be done, made from headers."""

    @property
    def warnings(self) -> Sequence[str]: ...

    @property
    def output_bytes(self) -> int: ...

    def to_dict(self, *, steps: bool = False) -> dict[str, Any]: ...


class MakePlan(Protocol):
    """Reads headers, no weights. Raises `WeightsmithError` for everything they can tell."""

    def __call__(
        self, document: Any, /, *, roots: Sequence[Path] | None, memory: int | None = None, threads: int | None
    ) -> Plan: ...


class Run(Protocol):
    """Makes the folder `out`, whole or not at all; see `merge_core.merge.merge`."""

    def __call__(
        self,
        document: Any,
        out: Path,
        /,
        *,
        roots: Sequence[Path] | None,
        partial: Path | None,
        memory: int | None,
        threads: int | None,
        cache: Path | None,
        device: str,
        report: Report,
        stop: Callable[[], bool],
    ) -> Artifact: ...


@dataclass(frozen=True)
class Work:
    """The work of one kind. `in_stages`: whether several documents may make one job; `assist`: how other workers take
    a part in it, where they may, so that `run` takes a `share`; `reads_jobs`: whether a document may name a finished
    job, so that `plan` and `run` take what that `published`; `evaluates`: whether candidates are scored, so that `run`
    and `assist` take an `evaluator`, and `kept` for what it said; `runs_models`: whether `run` takes `models`, which
    loads whole ones and runs them on data.
    """

    document: type[Document]
    plan: MakePlan
    run: Run
    in_stages: bool = False
    assist: Callable[..., None] | None = None
    reads_jobs: bool = False
    evaluates: bool = False
    runs_models: bool = False


def _merge() -> Work:
    from merge_core.merge import assist, merge, plan_only
    from merge_core.recipe import Recipe

    return Work(Recipe, plan_only, merge, in_stages=True, assist=assist)


def _alignment() -> Work:
    from merge_core.align import AlignmentDocument, align, plan_only

    return Work(AlignmentDocument, plan_only, align)


def _patch() -> Work:
    from merge_core.patching import Patch, patch, plan_patch

    return Work(Patch, plan_patch, patch)


def _verification() -> Work:
    from merge_core.verification import VerifyDocument, plan_verification, run

    return Work(VerifyDocument, plan_verification, run, reads_jobs=True)


def _view() -> Work:
    from merge_core.recipe import Recipe
    from merge_core.views import plan_view, prepare_view

    return Work(Recipe, plan_view, prepare_view, in_stages=True)


def _analysis() -> Work:
    from merge_core.analysis.document import AnalysisDocument, analyse, plan_analysis

    return Work(AnalysisDocument, plan_analysis, analyse)


def _search() -> Work:
    from merge_core.search.document import Search
    from merge_core.search.plan import plan_search
    from merge_core.search.run import assist, search

    run = cast(Run, search)  # which takes an evaluator too
    return Work(Search, plan_search, run, in_stages=True, assist=assist, evaluates=True)


def _calibration() -> Work:
    from merge_core.calibration.document import Calibration
    from merge_core.calibration.plan import plan_calibration
    from merge_core.calibration.run import calibrate

    run = cast(Run, calibrate)  # which takes models too
    return Work(Calibration, plan_calibration, run, runs_models=True)


WORK: Mapping[JobKind, Callable[[], Work]] = {
    JobKind.MERGE: _merge,
    JobKind.ALIGNMENT: _alignment,
    JobKind.PATCH: _patch,
    JobKind.VERIFICATION: _verification,
    JobKind.VIEW: _view,
    JobKind.ANALYSIS: _analysis,
    JobKind.SEARCH: _search,
    JobKind.CALIBRATION: _calibration,
}
