"""Merges: POST a recipe, watch the job, cancel it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from fastapi.concurrency import run_in_threadpool

from app.deps import RECIPE_BODY, JobDep, QueueDep, RecipeDep, SettingsDep
from app.errors import HttpProblem
from app.planning import plan_for_service
from app.schemas import JobPage, JobRead
from workers.jobs import FINISHED, Job, JobState

router = APIRouter(prefix="/v1/merges", tags=["merges"])
POLL_SECONDS = "1"


@router.post("", status_code=202, openapi_extra=RECIPE_BODY)
async def create_merge(recipe: RecipeDep, queue: QueueDep, settings: SettingsDep, response: Response) -> JobRead:
    """Accept a recipe. It is planned from headers first, so that what cannot work is refused here; then the job is
    queued.
    """

    def plan_and_submit() -> Job:
        plan = plan_for_service(recipe, settings)
        return queue.submit(recipe.to_data(), plan.to_dict(), plan.warnings)

    job = await run_in_threadpool(plan_and_submit)
    response.headers["Location"] = f"/v1/merges/{job.id}"
    response.headers["Retry-After"] = POLL_SECONDS
    return JobRead.of(job)


@router.get("")
def list_merges(
    queue: QueueDep,
    status: JobState | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    after: Annotated[str | None, Query(max_length=32, description="the `next` of the page before")] = None,
) -> JobPage:
    """Merges, newest first."""
    found = queue.store.page(state=status, limit=limit + 1, before=after)
    page = [JobRead.of(job) for job in found[:limit]]
    more = len(found) > limit
    return JobPage(data=page, has_more=more, next=page[-1].id if more else None)


@router.get("/{merge_id}")
def read_merge(job: JobDep, response: Response) -> JobRead:
    """One merge and how far it is."""
    if JobState(job.state) not in FINISHED:
        response.headers["Retry-After"] = POLL_SECONDS
    return JobRead.of(job)


@router.post("/{merge_id}/cancel", status_code=202)
def cancel_merge(merge_id: Annotated[str, Path(max_length=32)], queue: QueueDep, response: Response) -> JobRead:
    """Stop a merge and remove what it wrote. 202 while the worker still has to notice, 200 when it is canceled."""
    job = queue.cancel(merge_id)
    if job is None:
        raise HttpProblem(404, "not-found", "Not found", f"there is no merge {merge_id!r}")
    if job.state == JobState.CANCELED:
        response.status_code = 200
    return JobRead.of(job)
