"""Which workers live: each supervisor says so of its worker every few seconds."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from sqlalchemy import delete, select, update

from workers.jobs import JobStore
from workers.tables import WorkerProcess

REPORT_SECONDS = 10.0
MISSED = 3
"""Who missed so many reports is taken for dead."""


def report(store: JobStore, name: str, *, device: str) -> None:
    """Say that a worker lives."""
    now, host = time.time(), socket.gethostname()[:100]
    seen = update(WorkerProcess).where(WorkerProcess.name == name).values(seen_at=now)
    with store.session() as session:
        if not session.execute(seen).rowcount:  # type: ignore[attr-defined]
            where = {"host": host, "site": store.settings.site, "device": device}
            session.add(WorkerProcess(name=name, **where, started_at=now, seen_at=now))


def take_leave(store: JobStore, name: str) -> None:
    """Say that a worker has ended."""
    with store.session() as session:
        session.execute(delete(WorkerProcess).where(WorkerProcess.name == name))


def living(store: JobStore) -> Sequence[WorkerProcess]:
    """The workers that reported lately."""
    lately = time.time() - MISSED * REPORT_SECONDS
    with store.reading() as session:
        return session.scalars(select(WorkerProcess).where(WorkerProcess.seen_at > lately)).all()


def forget_dead(store: JobStore) -> None:
    """Remove the rows of workers that have been silent for a day."""
    with store.session() as session:
        session.execute(delete(WorkerProcess).where(WorkerProcess.seen_at < time.time() - 86_400))
