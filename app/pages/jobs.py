"""Jobs of all kinds: the list, newest first."""

from __future__ import annotations

import re
import time
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Header, Query
from fastapi.responses import HTMLResponse

from app.auth import CallerDep
from app.deps import QueueDep
from app.options import LABEL
from app.pages.rendering import PageDep
from workers.jobs import FINISHED, JobKind, JobState

PAGE_LENGTH = 25
router = APIRouter()


@router.get("/jobs")
def list_jobs(
    page: PageDep,
    queue: QueueDep,
    caller: CallerDep,
    kind: Annotated[str, Query(max_length=32)] = "",
    status: Annotated[str, Query(max_length=32)] = "",
    label: Annotated[str, Query(max_length=200)] = "",
    after: Annotated[str, Query(max_length=32)] = "",
    hx_request: Annotated[str | None, Header()] = None,
) -> HTMLResponse:
    """The list, or only what changes of it, as a page that is open asks for it again."""
    label = label.strip()
    is_label = re.fullmatch(LABEL, label) is not None
    name, _, value = label.partition(":")
    found = queue.store.newest(
        owner=caller.owner,
        kinds=[JobKind(kind)] if kind in set(JobKind) else JobKind,
        states=[JobState(status)] if status in set(JobState) else (),
        labels={name: value} if is_label else {},
        limit=PAGE_LENGTH + 1,
        before=after or None,
    )
    jobs = found[:PAGE_LENGTH]
    chosen = {key: value for key, value in (("kind", kind), ("status", status), ("label", label)) if value}
    return page(
        "jobs_list.html" if hx_request else "jobs.html",
        jobs=jobs,
        now=time.time(),
        finished=FINISHED,
        kinds=list(JobKind),
        states=list(JobState),
        chosen={"kind": kind, "status": status, "label": label},
        is_filtered=bool(chosen),
        bad_label=bool(label) and not is_label,
        first=f"/jobs?{urlencode(chosen)}" if after else None,
        older=f"/jobs?{urlencode(chosen | {'after': jobs[-1].id})}" if len(found) > PAGE_LENGTH else None,
    )
