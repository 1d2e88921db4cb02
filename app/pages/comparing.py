"""Compare models: ask for an analysis, watch it run, and look at what it found."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from app import provenance
from app.auth import CallerDep
from app.deps import QueueDep, SettingsDep, job_of
from app.drawing.analyses import FIGURES, Analysis, Figure
from app.drawing.charts import HeatMap
from app.drawing.svg import Drawing, shown
from app.local_models import local_models
from app.pages.rendering import PageDep
from workers.jobs import JobKind, JobState
from workers.queue import Queue
from workers.tables import Job

REPORT_NAME = "analysis.json"
_MOST_KEPT = 3
_RECENT = 12
_SUGGESTED = 500
router = APIRouter()
JobDep = Annotated[Job, Depends(job_of(JobKind.ANALYSIS))]


@dataclass(frozen=True)
class Table:
    """The numbers of a drawing, for those who rather read them; the first of each row is its name."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Shown:
    """One card: a drawing, what it means, and its numbers."""

    name: str
    title: str
    about: str
    drawing: Drawing
    table: Table

    @property
    def svg(self) -> Markup:
        return Markup(self.drawing.to_svg())  # noqa: S704 — every text in it is escaped where it is put in


class _Reports:
    """The reports that were drawn last: whoever looks at one chooses again and again what to see of it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Analysis] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, job: Job, queue: Queue) -> Analysis | None:
        """None: it is gone, or too long to be drawn here."""
        with self._lock:
            if job.id in self._kept:
                self._kept.move_to_end(job.id)
                return self._kept[job.id]
        try:
            report = provenance.read_json(queue.artifacts, job, REPORT_NAME, most=provenance.MOST_DRAWN)
        except FileNotFoundError:
            return None
        if report is None:
            return None
        found = Analysis(report)
        with self._lock:
            self._kept[job.id] = found
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return found


_reports = _Reports()


@router.get("/compare")
def ask(page: PageDep, queue: QueueDep, settings: SettingsDep, caller: CallerDep) -> HTMLResponse:
    """The form, and what was compared before."""
    models, _ = local_models(settings.roots)
    recent = queue.store.page(owner=caller.owner, kind=JobKind.ANALYSIS, limit=_RECENT)
    return page(
        "compare.html",
        suggestions=[model.name for model in models[:_SUGGESTED]],
        recent=[_told(job) for job in recent],
    )


@router.get("/compare/{job_id}")
def read(
    page: PageDep,
    queue: QueueDep,
    job: JobDep,
    figure: Annotated[str, Query(max_length=40)] = "relative",
    model: Annotated[int, Query(ge=0, le=100)] = 0,
    other: Annotated[int, Query(ge=0, le=100)] = 1,
    tensor: Annotated[str, Query(max_length=4096)] = "",
) -> HTMLResponse:
    """One analysis: how far it is, or what it found."""
    analysis = _reports.of(job, queue) if job.state == JobState.SUCCEEDED else None
    about: dict[str, Any] = {"job": _told(job), "analysis": analysis, "api": f"/v1/{JobKind.ANALYSIS.plural}/{job.id}"}
    if analysis is None:
        return page("comparison.html", **about)
    chosen = FIGURES[figure] if figure in {each.name for each in analysis.figures} else FIGURES["relative"]
    last = len(analysis.models) - 1
    model, other = min(model, last), min(other, last)
    if model == other and last:
        other = 0 if model else 1
    matrix = next((each for each in analysis.matrices if each["tensor"] == tensor), None)
    matrix = matrix or (analysis.matrices[0] if analysis.matrices else None)
    return page(
        "comparison.html",
        **about,
        figure=chosen,
        model=model,
        other=other,
        tensor=matrix and matrix["tensor"],
        summary=list(_summary(analysis)),
        shown=list(_drawn(analysis, chosen, model, other, matrix)),
    )


def _told(job: Job) -> dict[str, Any]:
    """What pages say of a job."""
    document = job.recipe if isinstance(job.recipe, dict) else {}
    return {
        "id": job.id,
        "state": str(job.state),
        "phase": job.phase,
        "error": job.error,
        "warnings": job.warnings,
        "base": _name(document.get("base_model")),
        "models": [_name(each) for each in document.get("models", [])],
        "created_at": job.created_at,
        "is_over": job.state not in (JobState.QUEUED, JobState.RUNNING, JobState.CANCELING),
        "progress": job.progress,
    }


def _name(written: Any) -> str:
    """A model as a document has it: a text, or what its parts are."""
    if isinstance(written, dict):
        path = f"{written.get('path', '')}" + (f"@{written['revision']}" if written.get("revision") else "")
        return path + (f"+{written['adapter']}" if written.get("adapter") else "")
    return str(written or "")


def _summary(analysis: Analysis) -> Iterator[dict[str, str]]:
    """A row for each model: what it is to the base, over all tensors."""
    whole = analysis.report["whole"]["models"]
    for name, each in zip(analysis.models, whole, strict=True):
        yield {
            "name": name,
            "relative": shown(each["relative"]),
            "changed": _percent(each["changed"]),
            "threshold": shown(each["threshold"]),
            "kept": _percent(each["kept"]),
        }


def _drawn(analysis: Analysis, figure: Figure, model: int, other: int, matrix: Any) -> Iterator[Shown]:
    heat = analysis.heat(figure, model, other)
    drawing = analysis.heat_map(figure, model, other)
    yield Shown("heat", figure.title, figure.about, drawing, _table_of_heat(heat))
    names, whole = analysis.models, analysis.report["whole"]
    if len(names) > 1:
        about = "0 is at right angles, as task vectors that were found independently nearly are; 1 is the same way."
        table = Table(
            ["", *names], [[name, *map(shown, row)] for name, row in zip(names, whole["cosine"], strict=True)]
        )
        yield Shown("cosine", "Cosine between task vectors", about, analysis.cosines(), table)
        rows = [
            [name, *(_percent(value) for value in row)]
            for name, row in zip(names, whole["sign_conflicts_of_pairs"], strict=True)
        ]
        about = "Of the entries that both changed, the share with opposite signs; one half is what chance gives."
        yield Shown("conflicts", "Sign conflicts of pairs", about, analysis.conflicts(), Table(["", *names], rows))
    about = "How many entries have a magnitude of so much. Dashed: the threshold that the density comes to."
    drawing = analysis.histogram()
    yield Shown("histogram", "Magnitudes and thresholds", about, drawing, _table_of_histogram(analysis))
    about = "More than was asked is kept where entries tie at the threshold, less where fewer entries changed."
    kept = [
        [name, _percent(analysis.report["density"]), *(_percent(value) for value in each.values())]
        for name, each in zip(names, analysis.kept_shares, strict=True)
    ]
    head = ["", "asked", *analysis.kept_shares[0]]
    yield Shown("kept", "Kept against asked", about, analysis.kept(), Table(head, kept))
    if matrix is not None:
        about = "A few large values: what the model learned lies in few directions."
        if any(each.get("is_sketched") for each in matrix["models"]):
            about += " This matrix is large, so that the values are a sketch's: never above the true ones."
        table = _table_of_values(analysis, matrix)
        yield Shown("values", "Singular values of δ", about, analysis.singular_values(matrix), table)


def _table_of_heat(heat: HeatMap) -> Table:
    numbers = heat.numbers
    rows = [[name, *(shown(row[n]) if n in row else "" for n in numbers)] for name, row in heat.cells.items()]
    if not heat.single:
        return Table([heat.columns, *map(str, numbers)], rows)
    rows = [[*row, ""] for row in rows]
    rows += [[name, *[""] * len(numbers), shown(value)] for name, value in heat.single.items()]
    return Table([heat.columns, *map(str, numbers), "none"], rows)


def _table_of_histogram(analysis: Analysis) -> Table:
    whole = analysis.report["whole"]
    told = whole["histogram"]
    rows = []
    for place in range(len(told["counts"][0])):
        edge = 2.0 ** (told["first_octave"] + place / told["per_octave"])
        rows.append([shown(edge), *(_percent(counts[place] / whole["elements"]) for counts in told["counts"])])
    return Table(["|δ| from", *analysis.models], rows)


def _table_of_values(analysis: Analysis, matrix: Any) -> Table:
    each = [model.get("singular_values", []) for model in matrix["models"]]
    most = max(map(len, each), default=0)
    rows = [[str(n + 1), *(shown(values[n]) if n < len(values) else "" for values in each)] for n in range(most)]
    rows.append(["stable rank", *(shown(model.get("stable_rank")) for model in matrix["models"])])
    rows.append(["effective rank", *(shown(model.get("effective_rank")) for model in matrix["models"])])
    return Table(["number", *analysis.models], rows)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{shown(100 * value)} %"
