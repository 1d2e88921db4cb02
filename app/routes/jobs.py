"""Jobs: POST a document, watch the job, cancel it. `/v1/merges` and its like differ in the document alone."""

# No `from __future__ import annotations`: the routes' annotations name dependencies of the function they are made in.

import functools
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from app.auth import CallerDep
from app.deps import QueueDep, RequestKeyDep, SettingsDep, WatchDep, document_body, document_of, job_of
from app.errors import HttpProblem, answers
from app.headers import MAX_WAIT_SECONDS, is_known, next_link, preferred_wait
from app.options import DeadlineQuery, HubDep, JobOptionsDep, LabelsDep, deadline_at
from app.planning import REFUSALS, plan_for_service
from app.schemas import JobPage, JobRead, Validation
from app.webhooks import WebhookDep
from workers.hub.opening import JobHub
from workers.idempotency import Repeated
from workers.jobs import FINISHED, JobKind, JobState
from workers.kinds import Document
from workers.tables import Job

POLL_SECONDS = "1"
_TEXT = {"schema": {"type": "string"}}
_JOB_HEADERS = {
    "ETag": {"description": "the row's version, for If-None-Match", **_TEXT},
    "Retry-After": {"description": "while the job is active: seconds after which it is worth asking again", **_TEXT},
}
_MADE_HEADERS = {
    "Location": {"description": "the job", **_TEXT},
    "Idempotency-Replayed": {"description": "`true`: an earlier request with this key made the job", **_TEXT},
    "Preference-Applied": {"description": "that `Prefer: wait` was heeded", **_TEXT},
}
WaitQuery = Annotated[int | None, Query(ge=0, le=MAX_WAIT_SECONDS, description="seconds to hold the answer back for")]
PreferHeader = Annotated[str | None, Header(description="`wait=n`: the same as `?wait=n`")]


@functools.cache
def jobs_router(kind: JobKind) -> APIRouter:
    """The routes of the jobs of a kind."""
    prefix = f"/v1/{kind.plural}"
    router = APIRouter(prefix=prefix, tags=[kind.plural])
    JobDep = Annotated[Job, Depends(job_of(kind))]  # noqa: N806

    @router.post(
        "",
        name=f"create_{kind}",
        status_code=202,
        openapi_extra=document_body(kind),
        response_model=JobRead,
        responses={
            **answers(*REFUSALS, "quota", "quota-exceeded", "gone", "idempotency-key-reused"),
            200: {"model": Validation, "description": "`dry_run`: the plan. Nothing was made."},
            202: {"headers": _JOB_HEADERS | _MADE_HEADERS},
        },
    )
    async def create(
        document: Annotated[Document, Depends(document_of(kind))],
        options: JobOptionsDep,
        hub_options: HubDep,
        request_key: RequestKeyDep,
        queue: QueueDep,
        settings: SettingsDep,
        watch: WatchDep,
        caller: CallerDep,
        webhook: WebhookDep,
        request: Request,
        response: Response,
        dry_run: Annotated[bool, Query(description="only plan, and answer 200 with the plan")] = False,
        wait: WaitQuery = None,
        prefer: PreferHeader = None,
    ) -> Any:
        """Accept a document. It is planned from headers first, so that what cannot work is refused here; then the job
        is queued. With `wait` the answer comes when the job has ended, or after so many seconds.

        What no folder of the service has and looks like `org/name` is a model on the Hub; its revision is resolved to a
        commit here, once and for all attempts.
        """
        if dry_run:

            def look() -> Validation:
                hub = JobHub(queue.store, caller.owner, hub_options)
                plan = plan_for_service(kind, document, settings, hub)
                return Validation(plan=plan.to_dict(), recipe=document.to_data(), resolved=hub.resolved)

            told = await run_in_threadpool(look)
            return Response(told.model_dump_json(), media_type="application/json")

        def plan_and_submit() -> Job:
            if request_key is not None:
                queue.store.check_new(request_key)
            hub = JobHub(queue.store, caller.owner, hub_options)
            plan = plan_for_service(kind, document, settings, hub)
            return queue.submit(
                document.to_data(),
                plan.to_dict(),
                plan.warnings,
                kind=kind,
                owner=caller.owner,
                request=request_key,
                webhook=webhook,
                **hub.fields(),
                **options.fields(),
            )

        try:
            job = await run_in_threadpool(plan_and_submit)
        except Repeated as repeated:
            job = repeated.job
            if job.deleted_at is not None:
                raise HttpProblem("gone", f"the request with this key made {job.id}, which was deleted") from None
            response.headers["Idempotency-Replayed"] = "true"
        preferred = preferred_wait(request)
        if wait is None and preferred is not None:
            wait = preferred
            response.headers["Preference-Applied"] = f"wait={wait}"
        if wait and JobState(job.state) not in FINISHED:
            await watch.ended(job.id, job.version, min(wait, settings.max_wait))
            found = await run_in_threadpool(queue.store.get, job.id)
            job = found or job
        response.headers["Location"] = f"{prefix}/{job.id}"
        return _told(job, response)

    @router.get(
        "",
        name=f"list_{kind.plural}",
        responses={
            **answers("invalid-request"),
            200: {"headers": {"Link": {"description": 'the following page, as `rel="next"`', **_TEXT}}},
        },
    )
    def list_jobs(
        queue: QueueDep,
        caller: CallerDep,
        labels: LabelsDep,
        request: Request,
        response: Response,
        status: Annotated[list[JobState], Query(description="one of these; may be repeated")] = [],  # noqa: B006
        limit: Annotated[int, Query(ge=1, le=100)] = 50,
        after: Annotated[str | None, Query(max_length=32, description="the `next` of the page before")] = None,
    ) -> JobPage:
        """Newest first; with all the labels."""
        found = queue.store.page(
            owner=caller.owner, kind=kind, states=status, labels=labels, limit=limit + 1, before=after
        )
        page = [JobRead.of(job) for job in found[:limit]]
        following = page[-1].id if len(found) > limit else None
        if following:
            response.headers["Link"] = next_link(request, following)
        return JobPage(data=page, has_more=following is not None, next=following)

    @router.get(
        "/{job_id}",
        name=f"read_{kind}",
        response_model=JobRead,
        responses={
            **answers("not-found", "invalid-request"),
            200: {"headers": _JOB_HEADERS},
            304: {"description": "It is still as `If-None-Match` says.", "headers": _JOB_HEADERS},
        },
    )
    async def read(
        job: JobDep,
        queue: QueueDep,
        settings: SettingsDep,
        watch: WatchDep,
        request: Request,
        response: Response,
        wait: WaitQuery = None,
        prefer: PreferHeader = None,
        if_none_match: Annotated[str | None, Header(description="the ETag of what the caller has")] = None,
    ) -> Any:
        """One job and how far it is. With `wait` the answer comes when it is other than what `If-None-Match` names
        (without that: than it is now), when it has ended, or after so many seconds.
        """
        preferred = preferred_wait(request)
        if wait is None and preferred is not None:
            wait = preferred
            response.headers["Preference-Applied"] = f"wait={wait}"
        is_news = if_none_match is not None and not is_known(request, _etag(job))
        if wait and not is_news and JobState(job.state) not in FINISHED:
            await watch.changed(job.id, job.version, min(wait, settings.max_wait))
            found = await run_in_threadpool(queue.store.get, job.id)
            if found is None:
                raise HttpProblem("not-found", f"{job.id} was deleted")
            job = found
        told = _told(job, response)
        return Response(status_code=304, headers=response.headers) if is_known(request, _etag(job)) else told

    @router.post(
        "/{job_id}/cancel",
        name=f"cancel_{kind}",
        status_code=202,
        responses={
            **answers("not-found", "invalid-state"),
            200: {"model": JobRead, "description": "It is canceled.", "headers": _JOB_HEADERS},
            202: {"description": "The worker still has to notice.", "headers": _JOB_HEADERS},
        },
    )
    def cancel(job: JobDep, queue: QueueDep, response: Response) -> JobRead:
        """Stop a job and remove what it wrote."""
        found = queue.cancel(job.id) or job
        if found.state == JobState.CANCELED:
            response.status_code = 200
        return _told(found, response)

    @router.post(
        "/{job_id}/retry",
        name=f"retry_{kind}",
        status_code=202,
        responses={
            **answers(
                "not-found", "invalid-state", "invalid-request", "insufficient-storage", "quota", "quota-exceeded"
            ),
            202: {"headers": _JOB_HEADERS},
        },
    )
    def retry(job: JobDep, queue: QueueDep, response: Response, deadline: DeadlineQuery = None) -> JobRead:
        """Queue a failed or canceled job again. What is left of its work is not done again."""
        found = queue.retry(job.id, deadline_at=deadline_at(deadline))
        if found is None:
            raise HttpProblem("not-found", f"{job.id} was deleted")
        return _told(found, response)

    @router.delete("/{job_id}", name=f"delete_{kind}", status_code=204, responses=answers("not-found", "invalid-state"))
    def delete(job: JobDep, queue: QueueDep) -> None:
        """Forget a finished job and remove its files and events. One that is active is to be canceled first."""
        if not queue.delete(job.id):
            raise HttpProblem("not-found", f"{job.id} was deleted")

    return router


def _etag(job: Job) -> str:
    return f'"{job.version}"'


def _told(job: Job, response: Response) -> JobRead:
    """The job's resource, and the headers that go with it."""
    response.headers["ETag"] = _etag(job)
    response.headers["Cache-Control"] = "private, no-cache"
    if JobState(job.state) not in FINISHED:
        response.headers["Retry-After"] = POLL_SECONDS
    return JobRead.of(job)
