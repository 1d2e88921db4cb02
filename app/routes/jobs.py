"""Jobs: POST a document, watch the job, cancel it. `/v1/merges` and its like differ in the document alone."""

# No `from __future__ import annotations`: the routes' annotations name dependencies of the function they are made in.

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from fastapi.concurrency import run_in_threadpool

from app.auth import CallerDep
from app.deps import QueueDep, SettingsDep, document_body, document_of, job_of
from app.planning import plan_for_service
from app.schemas import JobPage, JobRead
from app.webhooks import WebhookDep
from workers.jobs import FINISHED, JobKind, JobState
from workers.kinds import Document
from workers.tables import Job

POLL_SECONDS = "1"


def jobs_router(kind: JobKind) -> APIRouter:
    """The routes of the jobs of a kind."""
    prefix = f"/v1/{kind.plural}"
    router = APIRouter(prefix=prefix, tags=[kind.plural])

    @router.post("", name=f"create_{kind}", status_code=202, openapi_extra=document_body(kind))
    async def create(
        document: Annotated[Document, Depends(document_of(kind))],
        queue: QueueDep,
        settings: SettingsDep,
        caller: CallerDep,
        webhook: WebhookDep,
        response: Response,
    ) -> JobRead:
        """Accept a document. It is planned from headers first, so that what cannot work is refused here; then the job
        is queued.
        """

        def plan_and_submit() -> Job:
            plan = plan_for_service(kind, document, settings)
            return queue.submit(
                document.to_data(), plan.to_dict(), plan.warnings, kind=kind, owner=caller.owner, webhook=webhook
            )

        job = await run_in_threadpool(plan_and_submit)
        response.headers["Location"] = f"{prefix}/{job.id}"
        response.headers["Retry-After"] = POLL_SECONDS
        return JobRead.of(job)

    @router.get("", name=f"list_{kind.plural}")
    def list_jobs(
        queue: QueueDep,
        caller: CallerDep,
        status: JobState | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 50,
        after: Annotated[str | None, Query(max_length=32, description="the `next` of the page before")] = None,
    ) -> JobPage:
        """Newest first."""
        found = queue.store.page(owner=caller.owner, kind=kind, state=status, limit=limit + 1, before=after)
        page = [JobRead.of(job) for job in found[:limit]]
        more = len(found) > limit
        return JobPage(data=page, has_more=more, next=page[-1].id if more else None)

    @router.get("/{job_id}", name=f"read_{kind}")
    def read(job: Annotated[Job, Depends(job_of(kind))], response: Response) -> JobRead:
        """One job and how far it is."""
        if JobState(job.state) not in FINISHED:
            response.headers["Retry-After"] = POLL_SECONDS
        return JobRead.of(job)

    @router.post("/{job_id}/cancel", name=f"cancel_{kind}", status_code=202)
    def cancel(job: Annotated[Job, Depends(job_of(kind))], queue: QueueDep, response: Response) -> JobRead:
        """Stop a job and remove what it wrote. 202 while the worker still has to notice, 200 when it is canceled."""
        found = queue.cancel(job.id) or job
        if found.state == JobState.CANCELED:
            response.status_code = 200
        return JobRead.of(found)

    return router
