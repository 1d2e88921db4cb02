"""Trials of searches, kept in the database by what they are: a finished one is never made again.

What a trial came to is true whoever writes it, so that these writes need no lease. One that was given up half-way
counts for its own search alone: in another it might have been worth going on with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, or_, select, update

from workers.database import persistently
from workers.jobs import JobStore
from workers.tables import Trial as Row

if TYPE_CHECKING:
    from merge_core.search.trials import Outcome, Trial

OPEN = "open"


class TrialStore:
    """The trials of one search (`merge_core.search.trials.Kept`), and what is known of others of its owner's."""

    def __init__(self, store: JobStore, job_id: str, owner: str) -> None:
        self._store, self._job_id, self._owner = store, job_id, owner

    def find(self, digests: Sequence[str]) -> Mapping[str, Outcome]:
        from merge_core.search.trials import Outcome

        return {digest: Outcome.of(data) for digest, data in self._known(digests).items()}

    def begin(self, trials: Sequence[Trial]) -> None:
        """Write the trials down, those that are known with what they came to."""
        known, now = self._known([trial.digest for trial in trials]), time.time()

        def write() -> None:
            with self._store.session() as session:
                for trial in trials:
                    row = session.get(Row, (self._job_id, trial.number))
                    if row is not None and row.digest == trial.digest and row.state != OPEN:
                        continue
                    outcome = known.get(trial.digest)
                    state = OPEN if outcome is None else outcome["state"]
                    told: dict[str, Any] = {"tried": dict(trial.values), "state": state, "outcome": outcome}
                    told |= {"finished_at": None if outcome is None else now}
                    if row is None:
                        its = {"job_id": self._job_id, "number": trial.number, "owner": self._owner}
                        session.add(Row(**its, digest=trial.digest, created_at=now, **told))
                    else:
                        row.digest = trial.digest
                        for name, value in told.items():
                            setattr(row, name, value)

        persistently(write, self._store.settings.lease_seconds)

    def keep(self, trial: Trial, outcome: Outcome, seconds: float) -> None:
        """Write down what a trial came to. One that is known stays as it is."""
        mine = (Row.job_id == self._job_id, Row.digest == trial.digest, Row.state == OPEN)
        told = {"state": outcome.state, "outcome": outcome.to_data(), "seconds": seconds, "finished_at": time.time()}

        def write() -> None:
            with self._store.session() as session:
                session.execute(update(Row).where(*mine).values(**told))

        persistently(write, self._store.settings.lease_seconds)

    def _known(self, digests: Sequence[str]) -> dict[str, dict[str, Any]]:
        counts = or_(Row.state == "done", and_(Row.job_id == self._job_id, Row.state != OPEN))
        query = select(Row.digest, Row.outcome).where(Row.owner == self._owner, Row.digest.in_(digests), counts)
        found: dict[str, dict[str, Any]] = {}

        def read() -> None:
            with self._store.reading() as session:
                found.update(
                    {row.digest: row.outcome for row in session.execute(query.order_by(Row.finished_at.desc()))}
                )

        persistently(read, self._store.settings.lease_seconds)
        return found


def trials_of(store: JobStore, job_id: str, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
    """The trials of a search, in order, but the first so many."""
    query = select(Row).where(Row.job_id == job_id, Row.number >= after).order_by(Row.number).limit(limit)
    with store.reading() as session:
        return session.scalars(query).all()
