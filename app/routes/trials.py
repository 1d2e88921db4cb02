"""The trials of a search, as far as it is."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from app.deps import QueueDep, job_of
from app.errors import answers
from app.headers import next_link
from app.schemas import TrialPage, TrialRead
from workers.jobs import JobKind
from workers.tables import Job
from workers.trials import trials_of

router = APIRouter(prefix=f"/v1/{JobKind.SEARCH.plural}/{{job_id}}", tags=[JobKind.SEARCH.plural])
_SearchDep = Annotated[Job, Depends(job_of(JobKind.SEARCH))]


@router.get(
    "/trials",
    response_model=TrialPage,
    responses={
        **answers("not-found", "invalid-request"),
        200: {"headers": {"Link": {"description": "the following page", "schema": {"type": "string"}}}},
    },
)
def list_trials(
    job: _SearchDep,
    queue: QueueDep,
    request: Request,
    response: Response,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="so many trials, the first, are not sent")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Any:
    """What was tried so far and what it came to, in order."""
    found = trials_of(queue.store, job.id, after=after, limit=limit + 1)
    following = found[limit].number if len(found) > limit else None
    if following is not None:
        response.headers["Link"] = next_link(request, following)
    page = [TrialRead.of(row) for row in found[:limit]]
    return TrialPage(data=page, has_more=following is not None, next=following)
