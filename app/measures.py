"""What `/metrics` tells: what this process measured of itself, and what the database knows at that moment.

Nothing here is per job. A scrape costs the same whatever number of jobs have ended: what ended is in counters.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from workers import alive
from workers.counters import JOBS_ENDED, LEASES_EXPIRED, PHASE_SECONDS, PHASES, counts
from workers.jobs import JobKind, JobState, JobStore
from workers.states import FINISHED
from workers.tables import Job, Unit

MEASURES = CollectorRegistry()
"""Not the library's own registry: two services in one process, as in tests, would share and double it."""
REQUEST_SECONDS = Histogram(
    "weightsmith_http_request_duration_seconds",
    "From a request's arrival to its answer's last byte; streams of events are not counted.",
    ("method", "route", "status"),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120),
    registry=MEASURES,
)
ProcessCollector(registry=MEASURES)
_ACTIVE = [state for state in JobState if state not in FINISHED]


class DatabaseCollector(Collector):
    """Reads the database when it is asked."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        with self._store.reading() as session:
            yield from _ended(session)
            yield from _phases(session)
            yield from _active(session)
        yield from self._workers()
        free = shutil.disk_usage(self._store.settings.artifacts).free
        yield GaugeMetricFamily("weightsmith_disk_free_bytes", "Free where work grows.", free)

    def _workers(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily("weightsmith_workers", "Workers that reported lately.", labels=["device"])
        devices = [worker.device for worker in alive.living(self._store)]
        for device in sorted({*devices} or {self._store.settings.device}):
            workers.add_metric([device], devices.count(device))
        yield workers


def _ended(session: Session) -> Iterator[Metric]:
    merges = CounterMetricFamily("weightsmith_merges", "Merges that ended.", labels=["status", "method"])
    jobs = CounterMetricFamily("weightsmith_jobs", "Jobs of every kind that ended.", labels=["kind", "status"])
    ended: dict[tuple[str, str], float] = {}
    for (kind, state, method), value in counts(session, JOBS_ENDED):
        ended[kind, state] = ended.get((kind, state), 0) + value
        if kind == JobKind.MERGE:
            merges.add_metric([state, method], value)
    for labels, value in ended.items():
        jobs.add_metric(labels, value)
    expired = sum(value for _, value in counts(session, LEASES_EXPIRED))
    yield from (merges, jobs)
    yield CounterMetricFamily("weightsmith_lease_expired", "Leases that ran out: their workers fell silent.", expired)


def _phases(session: Session) -> Iterator[Metric]:
    name, told = "weightsmith_merge_phase_seconds", "How long workers were in a phase of a job."
    phases = SummaryMetricFamily(name, told, labels=["kind", "phase"])
    times = {tuple(labels): value for labels, value in counts(session, PHASES)}
    for labels, seconds in counts(session, PHASE_SECONDS):
        phases.add_metric(labels, int(times.get(tuple(labels), 0)), seconds)
    yield phases


def _active(session: Session) -> Iterator[Metric]:
    by_state = select(Job.state, func.count(), func.min(Job.created_at), func.sum(Job.reserved_bytes))
    found = {row[0]: row[1:] for row in session.execute(by_state.where(Job.state.in_(_ACTIVE)).group_by(Job.state))}
    queued, oldest, _ = found.get(JobState.QUEUED, (0, None, 0))
    yield GaugeMetricFamily("weightsmith_queue_depth", "Jobs that wait for a worker.", queued)
    waited = max(0.0, time.time() - oldest) if oldest else 0.0
    yield GaugeMetricFamily("weightsmith_queue_oldest_seconds", "How long the oldest of them has waited.", waited)
    running = sum(row[0] for state, row in found.items() if state != JobState.QUEUED)
    yield GaugeMetricFamily("weightsmith_running", "Jobs that a worker has.", running)
    reserved = sum(row[2] or 0 for row in found.values())
    yield GaugeMetricFamily("weightsmith_disk_reserved_bytes", "Disk promised to jobs that have not ended.", reserved)
    units = GaugeMetricFamily("weightsmith_units", "Parts of running jobs.", labels=["state"])
    of_running = select(Unit.state, func.count()).join(Job, Job.id == Unit.job_id).where(Job.state.in_(_ACTIVE))
    for state, number in session.execute(of_running.group_by(Unit.state).order_by(Unit.state)):
        units.add_metric([state], number)
    yield units
