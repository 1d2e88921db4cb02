"""The trials of a search, drawn and in a table, as far as it is: a part of the job's page, which asks for it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import HTMLResponse
from markupsafe import Markup
from pydantic import ValidationError

from app.deps import QueueDep, job_of
from app.drawing.searches import Trials, Tried
from app.drawing.svg import shown
from app.pages.rendering import PageDep
from app.pages.words import models_of, output_of
from merge_core.coefficients.strategies import Direction
from merge_core.errors import StorageFailed
from merge_core.search.keys import MOST_TRIALS, SearchKeys
from workers.jobs import JobKind, JobState
from workers.queue import Queue
from workers.tables import Job, Trial
from workers.trials import OPEN, trials_of

RECIPE_NAME = "recipe.yml"
_MOST_ROWS = 200
_MOST_COLUMNS = 6
"""Numbers that have columns of their own; where there are more, they share one."""
_MOST_RECIPE = 2**20
router = APIRouter()


@router.get("/jobs/{job_id}/trials")
def read_trials(job: Annotated[Job, Depends(job_of(JobKind.SEARCH))], page: PageDep, queue: QueueDep) -> HTMLResponse:
    """Curves, front, trials, and the recipe that was found."""
    document = output_of(job.recipe)
    wanted = _wanted(document)
    trials = Trials(
        [_tried(row) for row in trials_of(queue.store, job.id, limit=MOST_TRIALS)], wanted, models_of(job.recipe)
    )
    names = list(dict.fromkeys(name for each in trials.all for name in each.values))
    has_columns = len(names) <= _MOST_COLUMNS
    kept = {each.number for each in trials.front} if len(wanted) > 1 else set()
    best = trials.best
    return page(
        "job_search_trials.html",
        job=job,
        api=f"/v1/{JobKind.SEARCH.plural}/{job.id}",
        trials=trials,
        best=best and _row(trials, best, names if has_columns else None),
        best_number=best and best.number,
        drawings=list(_drawn(trials)),
        columns=names if has_columns else ["values"],
        metrics=list(wanted),
        rows=[_row(trials, each, names if has_columns else None) for each in trials.by_score[:_MOST_ROWS]],
        more=max(0, len(trials.all) - _MOST_ROWS),
        front=kept,
        recipe=recipe_of(queue, job) if job.state == JobState.SUCCEEDED else None,
    )


def _wanted(document: Mapping[str, Any]) -> Mapping[str, Direction]:
    """What counts, as the search has it. A document that was accepted once may be refused by a later version."""
    try:
        return SearchKeys.model_validate(document.get("search")).wanted
    except ValidationError:
        return {}


def _tried(row: Trial) -> Tried:
    outcome = row.outcome or {}
    return Tried(row.number, row.state, row.tried, outcome.get("metrics", {}), row.seconds, outcome.get("detail"))


def _drawn(trials: Trials) -> Iterator[tuple[str, str, Markup]]:
    for name, title, drawing in trials.drawings():
        yield name, title, Markup(drawing.to_svg())  # noqa: S704 — every text in it is escaped where it is put in


def _row(trials: Trials, each: Tried, names: list[str] | None) -> dict[str, Any]:
    """A trial as the table has it; `names`: of its columns, None where all values share one."""
    values = each.values
    return {
        "number": each.number,
        "state": "running" if each.state == OPEN else each.state,
        "values": [trials.word(name, values[name]) if name in values else "" for name in names]
        if names is not None
        else [trials.words(values)],
        "metrics": [shown(each.metrics.get(name)) for name in trials.wanted],
        "seconds": "" if each.seconds is None else f"{each.seconds:.1f} s",
        "detail": each.detail or "",
    }


def recipe_of(queue: Queue, job: Job) -> str | None:
    """The recipe that a job found. None: it is not there, or too long to be shown."""
    file = next((file for file in job.files if file["path"] == RECIPE_NAME), None)
    if file is None or file["size"] > _MOST_RECIPE:
        return None
    try:
        return b"".join(queue.artifacts.read(job.id, RECIPE_NAME, 0, file["size"])).decode()
    except (FileNotFoundError, StorageFailed):
        return None
