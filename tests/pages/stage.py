"""A service without workers, and jobs that tests play the worker of: what a page shows of them is theirs to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import delete

from tests.services import Service, running_service
from workers.jobs import JobKind, JobState, JobStore, Lease
from workers.problems import problem_of
from workers.settings import Settings
from workers.tables import Job

LINEAR = {"merge_method": "linear", "models": [{"model": "chat"}, {"model": "code"}], "parameters": {"weight": 0.5}}
PROGRESS = {
    "tensors_done": 3,
    "tensors_total": 12,
    "bytes_read": 2_500_000,
    "bytes_read_total": 10_000_000,
    "bytes_written": 1_000_000,
    "bytes_written_total": 4_000_000,
    "bytes_received": 0,
    "bytes_sent": 0,
    "fraction": 0.25,
    "bytes_per_second": 1_200_000,
    "seconds_left": 8.0,
    "tensor": "model.layers.1.w",
}


@dataclass
class Stage:
    """The service, and the store it shows."""

    service: Service
    store: JobStore

    def clear(self) -> None:
        """No jobs at all."""
        with self.store.session() as session:
            session.execute(delete(Job))

    def queued(self, document: Any = LINEAR, *, kind: JobKind = JobKind.MERGE, **fields: Any) -> str:
        """A job that nobody works at; its id."""
        return self.store.add(document, fields.pop("plan", {}), kind=kind, **fields).id

    def running(self, document: Any = LINEAR, **fields: Any) -> Lease:
        """A job that the test works at."""
        lease = self.store.claim(self.queued(document, **fields), "test/1")
        assert lease is not None
        return lease

    def beat(self, lease: Lease, phase: str, progress: Mapping[str, Any] = PROGRESS) -> JobState:
        """Go on: the phase is told if it is another."""
        job = self.store.get(lease.job_id)
        if job is not None and job.phase != phase:
            self.store.tell(lease, "phase", {"phase": phase})
        return self.store.heartbeat(lease, phase=phase, progress=progress)

    def log(self, lease: Lease, message: str) -> None:
        """Tell something, which is seen with the next beat."""
        self.store.tell(lease, "log", {"level": "info", "message": message})
        job = self.store.get(lease.job_id)
        assert job is not None
        self.store.heartbeat(lease, phase=job.phase, progress=job.progress)

    def fail(self, lease: Lease, code: str, detail: str, **members: Any) -> None:
        self.store.fail(lease, problem_of(code, detail, **members))

    def succeed(self, lease: Lease) -> None:
        self.store.succeed(lease, files=[], warnings=[], progress=PROGRESS | {"fraction": 1.0})


@contextmanager
def empty_stage(data: Path, models: Path, **settings: str) -> Iterator[Stage]:
    """A service without workers."""
    with running_service(data, models, WEIGHTSMITH_WORKERS="0", **settings) as service:
        store = JobStore(Settings(data=data, lease_seconds=600))
        try:
            yield Stage(service, store)
        finally:
            store.close()
