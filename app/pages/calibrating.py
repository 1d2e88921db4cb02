"""What a calibration came to, drawn and in numbers: a part of the job's page."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from app import provenance
from app.deps import QueueDep, job_of
from app.drawing.calibrations import Calibrated
from app.drawing.svg import shown
from app.pages.rendering import PageDep
from app.pages.searching import recipe_of
from app.pages.words import models_of
from merge_core.errors import StorageFailed
from workers.jobs import JobKind
from workers.queue import Queue
from workers.tables import Job

REPORT_NAME = "calibration.json"
router = APIRouter()


@router.get("/jobs/{job_id}/calibrated")
def read_calibrated(
    job: Annotated[Job, Depends(job_of(JobKind.CALIBRATION))], page: PageDep, queue: QueueDep
) -> HTMLResponse:
    """Losses, coefficients, and the recipe that names what was found."""
    report = _report(queue, job)
    found = Calibrated(report, models_of(job.recipe)) if report else None
    drawings = list(found.drawings()) if found else []
    return page(
        "job_calibrated.html",
        job=job,
        report=report,
        compared=found.compared if found else [],
        # Every text in a drawing is escaped where it is put in.
        drawings=[(name, title, about, Markup(made.to_svg())) for name, title, about, made in drawings],  # noqa: S704
        shown=shown,
        recipe=recipe_of(queue, job),
    )


def _report(queue: Queue, job: Job) -> dict[str, Any] | None:
    """None: there is none yet, it is gone, or too long to be drawn here."""
    try:
        return provenance.read_json(queue.artifacts, job, REPORT_NAME, most=provenance.MOST_DRAWN)
    except (FileNotFoundError, StorageFailed):
        return None
