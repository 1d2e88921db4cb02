"""Counts that only grow, kept where every process can add to them: in the database, in their event's transaction.

A count of rows would cost more the more rows there are, and fall when one is removed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from workers.tables import Counter

JOBS_ENDED = "jobs_ended"
"""By kind, state and merge method (empty where there is none)."""
LEASES_EXPIRED = "leases_expired"
RESERVATIONS = "reservations"
JANITOR = "janitor"
OLD_EVENTS = "old_events"
PHASE_SECONDS = "phase_seconds"
PHASES = "phases"
"""How often a phase was gone through, by phase."""


def count(session: Session, name: str, *labels: str, by: float = 1.0) -> None:
    """Add to a count."""
    label = "\t".join(labels)[:200]
    more = update(Counter).where(Counter.name == name, Counter.labels == label).values(value=Counter.value + by)
    if session.execute(more).rowcount:  # type: ignore[attr-defined]
        return
    try:
        with session.begin_nested():
            session.add(Counter(name=name, labels=label, value=by))
    except IntegrityError:
        # Somebody else counted for the first time at the same moment.
        session.execute(more)


def count_ends(session: Session, ended: Iterable[tuple[str, str, str | None]]) -> None:
    """Count jobs that ended: kind, state, method of each. In one order everywhere, so that nobody waits in a ring."""
    for kind, state, method in sorted((kind, state, method or "") for kind, state, method in ended):
        count(session, JOBS_ENDED, kind, state, method)


def counts(session: Session, name: str) -> Sequence[tuple[list[str], float]]:
    """The labels and the value of each count of that name."""
    rows = session.execute(select(Counter.labels, Counter.value).where(Counter.name == name).order_by(Counter.labels))
    return [(labels.split("\t"), value) for labels, value in rows]


def take_turn(session: Session, name: str, seconds: float) -> bool:
    """Whether to do what is done once in so many seconds, by whoever asks first: its count is the time until then."""
    now = time.time()
    turn = Counter.name == name, Counter.labels == ""
    due = update(Counter).where(*turn, Counter.value < now).values(value=now + seconds)
    if session.execute(due).rowcount:  # type: ignore[attr-defined]
        return True
    if session.scalars(select(Counter.value).where(*turn)).first() is not None:
        return False
    try:
        with session.begin_nested():
            session.add(Counter(name=name, labels="", value=now + seconds))
    except IntegrityError:
        return False
    return True
