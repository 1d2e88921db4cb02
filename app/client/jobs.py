"""Jobs of one kind, in the API's words."""

from __future__ import annotations

import math
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
from app.client.transport import Transport

WAIT_SECONDS = 25
"""How long one request waits for news of a job."""
SHOWN_PAUSE, LONGEST_PAUSE = 0.25, 1.0
"""From one answer to the next question: behind a bar, and at most."""
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
        hub_credential: str | None = None,
        hub_endpoint: str | None = None,
        webhook: str | None = None,
        webhook_events: Sequence[str] = (),
    ) -> Job:
        """POST a document: a dict, a list of them, text (YAML or JSON), or the path of a file.

        Asked again with the same `idempotency_key`, the service answers with the job that there is; without one, each
        call makes one job, however often its request has to be repeated. `deadline` is a moment, or how long from
        now (seconds). Models named by Hub id are read with the credential of that name, and from that endpoint if it
        is not the usual one. `webhook` is an address that is told of these events, by default all there are.
        """
        body, media_type = body_of(document)
        headers = {"Content-Type": media_type, "Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        if webhook is not None:
            headers["Webhook-Url"] = webhook
        if webhook_events:
            headers["Webhook-Events"] = ", ".join(webhook_events)
        asked = [*_asked(labels, priority, deadline), *_hub(hub_credential, hub_endpoint)]
        return Job.of(self._transport.json("POST", self._prefix, content=body, headers=headers, params=asked))

    def plan(self, document: Document, *, hub_credential: str | None = None, hub_endpoint: str | None = None) -> Plan:
        """What the document would read, write and need; nothing is made. Raises `Refused` where it cannot work."""
        body, media_type = body_of(document)
        asked = [("dry_run", "true"), *_hub(hub_credential, hub_endpoint)]
        headers = {"Content-Type": media_type}
        return Plan.of(self._transport.json("POST", self._prefix, content=body, headers=headers, params=asked))

    def get(self, job: Job | str) -> Job:
        return Job.of(self._transport.json("GET", self._path(job)))

    def list(
        self, *, status: str | Sequence[str] = (), labels: Mapping[str, str] | None = None, page: int = PAGE
    ) -> Iterator[Job]:
        """The jobs in this state, or one of these, with all these labels: newest first, all by default. So many are
        asked for at once, as they are needed.
        """
        states = [status] if isinstance(status, str) else status
        asked = [("limit", page), *(("status", state) for state in states), *_labels(labels)]
        yield from map(Job.of, self._transport.pages(self._prefix, asked))

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
        started = time.monotonic()
        with job_bar(progress) as report:
            while True:
                left = None if timeout is None else started + timeout - time.monotonic()
                report(found := self._with_news(job, left))
                if found.is_finished:
                    break
                waited = time.monotonic() - started
                if timeout is not None and waited >= timeout:
                    raise TimeoutError(f"{found.id} is still {found.status}")
                # Who sees nothing of the news need not ask for all of them.
                time.sleep(SHOWN_PAUSE if progress else min(waited / 10, LONGEST_PAUSE))
        if check and found.status != "succeeded":
            raise (JobCanceled if found.status == "canceled" else JobFailed)(found)
        return found

    def events(self, job: Job | str, *, after: int = 0) -> Iterator[Event]:
        """What has happened since event number `after`, then what happens, until the job has ended."""
        return follow(self._transport, f"{self._path(job)}/events", after)

    def deliveries(self, job: Job | str) -> Sequence[dict[str, Any]]:
        """What the job's webhook was told, or is to be told."""
        return self._transport.many(f"{self._path(job)}/deliveries")

    def logs(self, job: Job | str) -> str:
        return self._transport.request("GET", f"{self._path(job)}/logs").text

    def cancel(self, job: Job | str) -> Job:
        """Ask the job to stop. Raises `Refused` (`invalid-state`) where it has ended otherwise already."""
        return Job.of(self._transport.json("POST", f"{self._path(job)}/cancel"))

    def retry(self, job: Job | str, *, deadline: datetime | timedelta | float | None = None) -> Job:
        """Queue a failed or canceled job again; it goes on with what it had finished."""
        asked = _asked(None, None, deadline)
        return Job.of(self._transport.json("POST", f"{self._path(job)}/retry", params=asked, repeatable=False))

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

    def tensors(self, job: Job | str) -> dict[str, Any]:
        """The tensors that it writes, and which places among these are whole, as runs."""
        return self._transport.json("GET", f"{self._path(job)}/tensors")

    def _path(self, job: Job | str) -> str:
        job_id = job if isinstance(job, str) else job.id
        if not job_id:
            raise ServiceError("a job's id is needed")
        return f"{self._prefix}/{quote(job_id, safe='')}"

    def _with_news(self, job: Job | str, seconds: float | None) -> Job:
        """The job as soon as anything of it changes, or as it is after so long."""
        wait = WAIT_SECONDS if seconds is None else max(0, min(WAIT_SECONDS, math.ceil(seconds)))
        timeout = self._transport.timeout + wait
        return Job.of(self._transport.json("GET", self._path(job), params={"wait": wait}, timeout=timeout))


class Searches(Jobs):
    """`client.searches`: jobs that have trials."""

    def trials(self, job: Job | str) -> Iterator[dict[str, Any]]:
        """What was tried so far and what it came to, in order."""
        yield from self._transport.pages(f"{self._path(job)}/trials", [("limit", 1000)])


def _asked(
    labels: Mapping[str, str] | None,
    priority: int | None,
    deadline: datetime | timedelta | float | None,
) -> list[tuple[str, Any]]:
    asked: list[tuple[str, Any]] = _labels(labels)
    if priority is not None:
        asked.append(("priority", priority))
    if deadline is not None:
        asked.append(("deadline", _seconds_until(deadline)))
    return asked


def _hub(credential: str | None, endpoint: str | None) -> list[tuple[str, Any]]:
    asked = {"hub_credential": credential, "hub_endpoint": endpoint}
    return [(name, value) for name, value in asked.items() if value is not None]


def _seconds_until(deadline: datetime | timedelta | float) -> int:
    """Whole seconds from now, at least one."""
    if isinstance(deadline, datetime):
        deadline = deadline - datetime.now(deadline.tzinfo)
    if isinstance(deadline, timedelta):
        deadline = deadline.total_seconds()
    return max(1, math.ceil(deadline))


def _labels(labels: Mapping[str, str] | None) -> list[tuple[str, Any]]:
    return [("label", f"{name}:{value}") for name, value in (labels or {}).items()]
