"""Removes what is no longer of use: from the disk whatever no row names, from the database what nobody will ask for.

After a sweep nothing is on the disk that no row names, but what is younger than `YOUNG` seconds or at work. One process
at a time sweeps a data folder (a lock file there), and one a database (a row there). A sweep takes as long as there are
artifacts, so the next comes the later the longer it took.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeAlias

from sqlalchemy import Row, and_, delete, or_, select, update
from sqlalchemy.orm import Session

from merge_core.errors import StorageFailed
from merge_core.files import is_held, remove_folder
from workers import alive
from workers.artifacts import ArtifactStore
from workers.counters import JANITOR, OLD_EVENTS, take_turn
from workers.idempotency import REMEMBERED_SECONDS
from workers.jobs import JobStore
from workers.queue import discard
from workers.states import FINISHED, JobKind, JobState
from workers.tables import Event, IdempotencyKey, Job, Unit

SWEEP_SECONDS = 60.0
SHARE = 0.01
"""The most of a core's time that sweeping takes."""
YOUNG = 600.0
DAY = 86_400.0
CACHED_SECONDS = 30 * DAY
"""How long what is in the cache stays after it was last read; file systems note that once a day, or never."""
_JOB = re.compile(rf"\.?((?:{'|'.join(kind.prefix for kind in JobKind)})[0-9A-HJKMNP-TV-Z]{{26}})(?:\..*)?")
_MANY = 500
_Row: TypeAlias = "Row[str, str, float | None, float | None]"
_ACTIVE = select(Job.id).where(Job.state.not_in(FINISHED))
log = logging.getLogger(__name__)


class Janitor:
    """Sweeps when its time has come; `sweep_now` whenever it is called."""

    def __init__(self, store: JobStore, artifacts: ArtifactStore) -> None:
        self._store, self._artifacts, self._settings = store, artifacts, store.settings
        self._next = 0.0

    def sweep(self) -> None:
        """Sweep, unless that was done a moment ago; to be called often."""
        began = time.monotonic()
        if began < self._next:
            return
        try:
            self.sweep_now()
        finally:
            took = time.monotonic() - began
            self._next = time.monotonic() + max(SWEEP_SECONDS, took / SHARE)

    def sweep_now(self) -> None:
        """Sweep what nobody else is sweeping."""
        with self._store.session() as session:
            turn = take_turn(session, JANITOR, SWEEP_SECONDS / 2)
        if turn:
            self.sweep_rows()
        with self._alone() as mine:
            if mine:
                self.sweep_folders()
                self._sweep_cache()
                self._sweep_snapshots()
                self._sweep_messages()
        if turn:
            self.sweep_artifacts()

    def sweep_rows(self) -> None:
        """Remove old events and keys, candidates of searches that ended, and let artifacts expire."""
        now = time.time()
        of_done = select(Job.id).where(
            Job.id == Unit.job_id, or_(Job.state == JobState.SUCCEEDED, Job.deleted_at.is_not(None))
        )
        with self._store.session() as session:
            session.execute(delete(Unit).where(of_done.exists()))
            session.execute(delete(Job).where(Job.parent.is_not(None), Job.parent.not_in(_ACTIVE)))
            session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < now - REMEMBERED_SECONDS))
            for job_id in _expire(session, now):
                log.info("its artifact expired and is removed", extra={"job_id": job_id})
            hourly = take_turn(session, OLD_EVENTS, 3600)
        if hourly:
            self._forget_events(now - self._settings.event_days * DAY)
        alive.forget_dead(self._store)

    def _forget_events(self, before: float) -> None:
        """Remove what happened to jobs that ended before then, some jobs at a time: others write meanwhile."""
        ended = and_(Job.id == Event.job_id, Job.state.in_(FINISHED), Job.finished_at < before)
        old = select(Event.job_id).join(Job, ended).where(Event.at < before).distinct().limit(_MANY)
        while True:
            with self._store.session() as session:
                ids = session.scalars(old).all()
                session.execute(delete(Event).where(Event.job_id.in_(ids)))
            if len(ids) < _MANY:
                return

    def sweep_folders(self) -> None:
        """Remove the folders of artifacts and of work that no row names, in the data folder."""
        for folder, job_id, row in self._known(path.name for path in self._settings.artifacts.iterdir()):
            path = self._settings.artifacts / folder
            if self._is_rubbish(job_id, row, unfinished=folder.startswith("."), stored_elsewhere=self._is_copy(folder)):
                with contextlib.suppress(OSError):
                    if not is_held(path):
                        log.info("removing what no job needs: %s", folder)
                        discard(path)

    def sweep_artifacts(self) -> None:
        """Remove the artifacts that no row names, where the artifact store is another."""
        try:
            for name, job_id, row in self._known(self._artifacts.list()):
                if self._is_rubbish(job_id, row):
                    log.info("removing an artifact that no job has: %s", name)
                    self._artifacts.delete(job_id)
        except StorageFailed as error:
            log.warning("the artifact store was not swept: %s", error)

    def _is_copy(self, folder: str) -> bool:
        """Whether a finished folder is only where the artifact was made, and the store has it."""
        path = self._settings.artifacts / folder
        return not self._settings.keep_local and not self._artifacts.holds(path)

    @staticmethod
    def _is_rubbish(job_id: str, row: _Row | None, *, unfinished: bool = False, stored_elsewhere: bool = False) -> bool:
        if row is None:
            # Rows are there before folders; the guard is for clocks, and for a database that was restored.
            return time.time() - created(job_id) > YOUNG
        if row.deleted_at is not None:
            return True
        if row.state not in FINISHED:
            return False
        expired = row.expires_at is not None and row.expires_at < time.time()
        return unfinished or stored_elsewhere or expired or row.state != JobState.SUCCEEDED

    def _known(self, names: Iterable[str]) -> Iterator[tuple[str, str, _Row | None]]:
        """Names of jobs' folders, the jobs' ids and what their rows say; what has another name is not ours."""
        found = ((name, match[1]) for name in names if (match := _JOB.fullmatch(name)))
        while some := list(islice(found, _MANY)):
            rows = self._rows([job_id for _, job_id in some])
            for name, job_id in some:
                yield name, job_id, rows.get(job_id)

    def _rows(self, ids: Sequence[str]) -> Mapping[str, _Row]:
        columns = select(Job.id, Job.state, Job.deleted_at, Job.expires_at).where(Job.id.in_(ids))
        with self._store.reading() as session:
            return {row.id: row for row in session.execute(columns)}

    def _sweep_snapshots(self) -> None:
        """Remove what is known of Hub models that nobody named for long; it is asked for again if somebody does."""
        for place in (self._settings.hub_folder / "snapshots").glob("*/*/*/*@*"):
            with contextlib.suppress(OSError):
                is_whole = not place.name.startswith(".")
                used = (place / "files" if is_whole else place).stat().st_mtime
                if time.time() - used > (CACHED_SECONDS if is_whole else DAY):
                    remove_folder(place)

    def _sweep_cache(self) -> None:
        for kept in self._settings.cache.glob("*/*"):
            with contextlib.suppress(OSError):
                if time.time() - max(kept.stat().st_atime, kept.stat().st_mtime) > CACHED_SECONDS:
                    shutil.rmtree(kept) if kept.is_dir() else kept.unlink()

    def _sweep_messages(self) -> None:
        """Remove the messages that were never whole (`workers.broker`), because who wrote them was killed."""
        for growing in (self._settings.broker / "queue").glob(".*"):
            with contextlib.suppress(OSError):
                if time.time() - growing.stat().st_mtime > YOUNG:
                    growing.unlink()

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        with (self._settings.data / "janitor.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def created(job_id: str) -> float:
    """When an id was made."""
    digits = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    number = 0
    for digit in job_id.partition("_")[2]:
        number = number * 32 + digits.index(digit)
    return (number >> 80) / 1000


def _expire(session: Session, now: float) -> list[str]:
    """Take what expired off its owner's account; its folder goes with the sweep. The ids."""
    late = and_(Job.expires_at < now, Job.deleted_at.is_(None), Job.stored_bytes > 0)
    expired = update(Job).where(late).values(stored_bytes=0, version=Job.version + 1, events=Job.events + 1)
    rows = session.execute(expired.returning(Job.id, Job.events)).all()
    for row in rows:
        told = {"level": "info", "message": "its files expired and were removed"}
        session.add(Event(job_id=row.id, seq=row.events, at=now, kind="log", data=told))
    return [row.id for row in rows]
