"""Jobs of one kind, in the API's words."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from app.client import downloads
from app.client.bars import download_bar, job_bar
from app.client.documents import Document, body_of
from app.client.errors import JobCanceled, JobFailed, ServiceError
from app.client.events import follow
from app.client.objects import Event, File, Job, Plan
from app.client.transport import Transport, entries

WAIT_SECONDS, SHOWN_SECONDS, LEAST_SECONDS = 25.0, 1.0, 0.5
"""How long one request waits for a job's end: unseen, and behind a bar; and the least time from one to the next."""
PAGE = 100


class Jobs:
    """`client.merges` and its like. A job is named by its id, or by the `Job` itself."""

    def __init__(self, transport: Transport, plural: str) -> None:
        self._transport, self._prefix = transport, f"/v1/{plural}"

    def submit(
        self,
        document: Document,
        *,
        idempotency_key: str | None = None,
        labels: Mapping[str, str] | None = None,
        priority: int | None = None,
        deadline: datetime | timedelta | float | None = None,
        webhook: str | None = None,
    ) -> Job:
        """POST a document: a dict, a list of them, text (YAML or JSON), or the path of a file.

        Asked again with the same `idempotency_key`, the service answers with the job that there is; without one, each
        call makes one job, however often its request has to be repeated. `deadline` is a moment, or how long from
        now (seconds). `webhook` is told of the job's end.
        """
        body, media_type = body_of(document)
        headers = {"Content-Type": media_type, "Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        asked = _asked(labels, priority, deadline, webhook)
        return Job.of(self._transport.json("POST", self._prefix, content=body, headers=headers, params=asked))

    def plan(self, document: Document, *, steps: bool = False) -> Plan:
        """What the document would read, write and need; nothing is made. Raises `Refused` where it cannot work."""
        body, media_type = body_of(document)
        asked = {"dry_run": "true"} | ({"steps": "true"} if steps else {})
        headers = {"Content-Type": media_type}
        return Plan.of(self._transport.json("POST", self._prefix, content=body, headers=headers, params=asked))

    def get(self, job: Job | str) -> Job:
        return Job.of(self._transport.json("GET", self._path(job)))

    def list(self, *, status: str | None = None, labels: Mapping[str, str] | None = None) -> Iterator[Job]:
        """All jobs, newest first; pages are asked for as they are needed."""
        asked: list[tuple[str, Any]] = [("limit", PAGE), *_labels(labels)]
        if status:
            asked.append(("status", status))
        page = self._transport.json("GET", self._prefix, params=asked)
        while True:
            yield from map(Job.of, entries(page))
            if not page.get("next"):
                return
            page = self._transport.json("GET", self._prefix, params=[*asked, ("after", page["next"])])

    def wait(
        self,
        job: Job | str,
        *,
        timeout: float | None = None,
        progress: bool | Callable[[Job], None] = False,
        check: bool = True,
    ) -> Job:
        """Wait until the job has ended; the job as it is then.

        `progress` shows a bar on a terminal, or is called with the job whenever it is further. Raises `JobFailed` or
        `JobCanceled` unless it succeeded or `check` is false, and `TimeoutError` after so many seconds.
        """
        until = None if timeout is None else time.monotonic() + timeout
        at_once = SHOWN_SECONDS if progress else WAIT_SECONDS
        with job_bar(progress) as report:
            while not (found := self._once_ended(job, at_once, until)).is_finished:
                report(found)
                if until is not None and time.monotonic() >= until:
                    raise TimeoutError(f"{found.id} is still {found.status}")
            report(found)
        if check and found.status != "succeeded":
            raise (JobCanceled if found.status == "canceled" else JobFailed)(found)
        return found

    def events(self, job: Job | str, *, after: int = 0) -> Iterator[Event]:
        """What has happened since event number `after`, then what happens, until the job has ended."""
        return follow(self._transport, f"{self._path(job)}/events", after)

    def logs(self, job: Job | str) -> str:
        return self._transport.request("GET", f"{self._path(job)}/logs").text

    def cancel(self, job: Job | str) -> Job:
        """Ask the job to stop. Raises `Refused` (`invalid-state`) where it has ended otherwise already."""
        return Job.of(self._transport.json("POST", f"{self._path(job)}/cancel"))

    def retry(self, job: Job | str) -> Job:
        """Queue a failed or canceled job again; it goes on with what it had finished."""
        return Job.of(self._transport.json("POST", f"{self._path(job)}/retry", repeatable=False))

    def delete(self, job: Job | str) -> None:
        """Remove a job that has ended, and its files."""
        self._transport.request("DELETE", self._path(job))

    def files(self, job: Job | str) -> Sequence[File]:
        return [File.of(each) for each in self._transport.many(f"{self._path(job)}/files")]

    def download(self, job: Job | str, folder: Path | str, *, progress: bool = False) -> Sequence[Path]:
        """Every file of a job that succeeded, into a folder; where they are then.

        Each appears once its sha256 is right. Files that are there stay; what an earlier call left unfinished is
        continued.
        """
        files = self.files(job)
        with download_bar(progress, sum(file.size for file in files)) as arrived:
            return downloads.download(self._transport, f"{self._path(job)}/files", files, Path(folder), arrived)

    def manifest(self, job: Job | str) -> dict[str, Any]:
        """What was made of what: sha256 of every file, the commits and versions behind them."""
        return self._transport.json("GET", f"{self._path(job)}/manifest")

    def recipe(self, job: Job | str) -> str:
        """The job's document as YAML."""
        return self._transport.request("GET", f"{self._path(job)}/recipe").text

    def report(self, job: Job | str) -> dict[str, Any]:
        """What was measured on the way."""
        return self._transport.json("GET", f"{self._path(job)}/report")

    def _path(self, job: Job | str) -> str:
        job_id = job if isinstance(job, str) else job.id
        if not job_id:
            raise ServiceError("a job's id is needed")
        return f"{self._prefix}/{quote(job_id, safe='')}"

    def _once_ended(self, job: Job | str, seconds: float, until: float | None) -> Job:
        """The job when it has ended, or as it is after so long."""
        started = time.monotonic()
        if until is not None:
            seconds = max(min(seconds, until - started), 0)
        timeout = self._transport.timeout + seconds
        asked = {"wait": f"{seconds:.3f}"}
        found = Job.of(self._transport.json("GET", self._path(job), params=asked, timeout=timeout))
        if not found.is_finished:
            # A service that is being stopped answers at once.
            time.sleep(max(min(seconds, LEAST_SECONDS) - (time.monotonic() - started), 0))
        return found


def _asked(
    labels: Mapping[str, str] | None,
    priority: int | None,
    deadline: datetime | timedelta | float | None,
    webhook: str | None,
) -> list[tuple[str, Any]]:
    return _labels(labels)


def _labels(labels: Mapping[str, str] | None) -> list[tuple[str, str]]:
    return [("label", f"{name}={value}") for name, value in (labels or {}).items()]
