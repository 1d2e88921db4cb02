"""Submit, cancel, reap: the only module that sends messages. Losing any of them loses nothing."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from merge_core.errors import StorageFailed
from merge_core.files import remove_folder
from workers.artifacts import open_artifacts
from workers.idempotency import RequestKey
from workers.jobs import JobKind, JobState, JobStore, RecipeData
from workers.logs import current_request
from workers.reservations import needed
from workers.settings import Settings
from workers.tables import LOCAL_OWNER, Job
from workers.units import UnitStore

RUN_JOB = "weightsmith.run_job"
_WAKE_SECONDS = 3.0
log = logging.getLogger(__name__)


class Queue:
    """The store, the artifacts and the broker together."""

    def __init__(self, store: JobStore, celery_app: Celery) -> None:
        self.store, self.celery_app = store, celery_app
        self.artifacts = open_artifacts(store.settings)
        self.units = UnitStore(store)
        self._woke = 0.0

    def submit(
        self,
        recipe: RecipeData,
        plan: Mapping[str, Any],
        warnings: Sequence[str] = (),
        *,
        kind: JobKind = JobKind.MERGE,
        owner: str = LOCAL_OWNER,
        request: RequestKey | None = None,
        **fields: Any,
    ) -> Job:
        """Make a job and announce it. With no broker it waits in the database until the reaper can announce it. Raises
        as `JobStore.add`.
        """
        fields.setdefault("request_id", current_request())
        fields.setdefault("reserved_bytes", needed(plan))
        job = self.store.add(recipe, plan, warnings, kind=kind, owner=owner, request=request, **fields)
        log.info("queued", extra={"job_id": job.id, "owner": owner})
        self._announce(job.id)
        return job

    def cancel(self, job_id: str) -> Job | None:
        """See `JobStore.cancel`; what earlier attempts at a queued job left goes with it."""
        job = self.store.cancel(job_id)
        if job is not None and job.state == JobState.CANCELED:
            remove_partial(self.store.settings, job_id)
        return job

    def retry(self, job_id: str, *, deadline_at: float | None = None) -> Job | None:
        """See `JobStore.retry`; the job is announced like a new one."""
        job = self.store.retry(job_id, deadline_at=deadline_at)
        if job is not None:
            self._announce(job_id)
        return job

    def delete(self, job_id: str) -> bool:
        """See `JobStore.delete`; its files go with it. What cannot be removed now, the janitor removes."""
        if not self.store.delete(job_id):
            return False
        with contextlib.suppress(StorageFailed):
            self._remove_files(job_id)
        return True

    def _remove_files(self, job_id: str) -> None:
        remove_partial(self.store.settings, job_id)
        discard(artifact_folder(self.store.settings, job_id))
        self.artifacts.delete(job_id)

    def reap(self) -> None:
        """Put right what kills and lost messages left; to be called about every second, by any number of processes."""
        if self.store.is_idle():
            return
        self.store.give_back_expired()
        self.store.give_up()
        self.store.end_late()
        for job_id in self.store.overdue():
            if not self._announce(job_id):
                break
        if time.monotonic() - self._woke > _WAKE_SECONDS:
            self._woke = time.monotonic()
            for job_id, count in self.units.open_units():
                self.wake(job_id, count)

    def wake(self, job_id: str, count: int) -> None:
        """Call as many idle workers to a running job as there are, up to `count`."""
        for _ in range(min(count, self.units.idle()) if count > 0 else 0):
            if not self._send(job_id):
                break

    def broker_is_reachable(self) -> bool:
        try:
            with self.celery_app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, timeout=2)
        except (OperationalError, OSError):
            return False
        return True

    def _announce(self, job_id: str) -> bool:
        sent = self._send(job_id)
        self.store.announced(job_id, sent=sent)
        return sent

    def _send(self, job_id: str) -> bool:
        try:
            self.celery_app.send_task(RUN_JOB, args=[job_id], retry=False)
        except (OperationalError, OSError) as error:
            log.warning("no broker for %s now, it will be announced later: %s", job_id, error)
            return False
        return True


def artifact_folder(settings: Settings, job_id: str) -> Path:
    """Where a job's finished artifact appears; it stays there if there is no other store."""
    return settings.artifacts / job_id


def partial_folder(settings: Settings, job_id: str, number: int) -> Path:
    """Where a job's unfinished output grows; there is another only where a worker not quite dead keeps the first."""
    return settings.artifacts / f".{job_id}.{number}.partial"


def partial_folders(settings: Settings, job_id: str) -> dict[int, Path]:
    """What the attempts at a job left unfinished, by number."""
    return {int(path.name.split(".")[2]): path for path in settings.artifacts.glob(f".{job_id}.*.partial")}


def remove_partial(settings: Settings, job_id: str) -> None:
    """Leave nothing half-written behind."""
    for folder in partial_folders(settings, job_id).values():
        discard(folder)


def discard(folder: Path) -> None:
    """Remove a folder, which is out of everybody's sight at once: nobody takes half of it for the whole."""
    hidden = folder.with_name(f".{folder.name.removeprefix('.').partition('.')[0]}.{uuid.uuid4().hex}.discarded")
    with contextlib.suppress(OSError):
        folder.rename(hidden)
        remove_folder(hidden)
