"""One job, of whichever kind, live.

What all kinds have is shown of every kind: state, progress, phases, log, files, commands. A new kind needs nothing
here. What only one kind has goes into files of its own, which the page uses where they exist:

    templates/job_<kind>.html        its result, shown once the job has succeeded
    templates/job_<kind>_live.html   instead: what there is of it, whatever state the job is in
    static/job_<kind>.css            its style
    static/job_<kind>.js             a module; to `document` come the events `job-changed`, when the result may have
                                     come, and `job-progress`, whose `detail` is the progress

The templates have, besides what all templates have,

    job               the row (`workers.tables.Job`): `job.id`, `job.plan`, `job.recipe`, `job.files`, …
    read_json(name)   what is in a JSON file that the job made, by the end of its name; None: there is none
    file_url(path)    where a file that the job made is: for `<img src>`, for links, for `fetch`

and obey the page's policy: no script and no style but from `static`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Header, Path, Request
from fastapi.responses import HTMLResponse

from app import provenance
from app.auth import CallerDep
from app.deps import QueueDep, ShelvesDep
from app.documents import written
from app.pages.rendering import PageDep, exists
from merge_core.errors import StorageFailed
from workers.jobs import FINISHED, JobKind, JobState
from workers.problems import PROBLEMS
from workers.queue import Queue
from workers.states import AT_WORK
from workers.tables import Job

MOST_EVENTS = 5_000
_PLAIN = re.compile(r"[\w./-]+", re.ASCII)
_MOST_IN_A_COMMAND = 200
router = APIRouter()


@router.get("/jobs/{job_id}")
def read_job(
    job_id: Annotated[str, Path(max_length=32)],
    page: PageDep,
    queue: QueueDep,
    shelves: ShelvesDep,
    caller: CallerDep,
    request: Request,
    hx_request: Annotated[str | None, Header()] = None,
) -> HTMLResponse:
    """The page, or only what changes of it when the job's state, phase or warnings do."""
    kind = next((kind for kind in JobKind if job_id.startswith(kind.prefix)), None)
    job = queue.store.find(job_id, caller.owner, kind) if kind else None
    if kind is None or job is None:
        return page("job_missing.html", status=404, job_id=job_id)
    events = queue.store.events(job.id, limit=MOST_EVENTS, kinds=("state", "phase"))
    api = f"/v1/{kind.plural}/{job.id}"
    has_succeeded = job.state == JobState.SUCCEEDED
    is_model = kind.plural in shelves and (kind is JobKind.VIEW or any(f["path"] == "config.json" for f in job.files))
    result, live = f"job_{kind}.html", f"job_{kind}_live.html"
    return page(
        "job_body.html" if hx_request else "job.html",
        job=job,
        kind=kind,
        api=api,
        origin=str(request.base_url).rstrip("/"),
        now=time.time(),
        is_active=JobState(job.state) not in FINISHED,
        is_at_work=job.state in AT_WORK,
        phases=provenance.report(job, events, None, None)["phases"],
        meaning=PROBLEMS[job.error["code"]].meaning if job.error and job.error.get("code") in PROBLEMS else "",
        recipe=written(job.recipe),
        result=next(
            (each for each in (live, result if has_succeeded else "") if each and exists(f"templates/{each}")), None
        ),
        module=f"job_{kind}.js" if exists(f"static/job_{kind}.js") else None,
        style=f"job_{kind}.css" if exists(f"static/job_{kind}.css") else None,
        model=f"{kind.plural}/{job.id}" if has_succeeded and is_model else None,
        in_curl=_in_curl(job),
        can_edit=kind is JobKind.MERGE,
        can_verify=kind is JobKind.MERGE and has_succeeded and bool(job.files),
        read_json=partial(_read_json, queue, job),
        file_url=lambda path: f"{api}/files/{quote(path)}",
    )


def _read_json(queue: Queue, job: Job, name: str) -> Mapping[str, Any] | None:
    try:
        return provenance.read_json(queue.artifacts, job, name)
    except (FileNotFoundError, StorageFailed):
        return None


def _in_curl(job: Job) -> str | None:
    """The files' names as curl takes many in one address; None where it would not."""
    names = [str(file["path"]) for file in job.files]
    if not names or len(names) > _MOST_IN_A_COMMAND or not all(_PLAIN.fullmatch(name) for name in names):
        return None
    return "{" + ",".join(names) + "}"
