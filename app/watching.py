"""Requests that wait for a job to change, and how little that costs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field

from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from workers.jobs import FINISHED, JobStore, Pulse

POLL_SECONDS = 0.25
MOST_AT_ONCE = 500
log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Waiter:
    version: int
    found: asyncio.Future[Pulse | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Watch:
    """Tells whoever waits when a job's row changes.

    However many wait, for however many jobs, there is one query each quarter of a second, one more for who comes and
    knows nothing yet, and none if nobody waits.
    To be used from one event loop.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._waiting: dict[str, set[_Waiter]] = {}
        self._polling: asyncio.Task[None] | None = None
        self._newcomer = asyncio.Event()
        self.is_closed = False

    async def changed(self, job_id: str, version: int, seconds: float) -> Pulse | None:
        """The job's pulse as soon as its version is not this one, which for -1 is at once; None if it still is after so
        many seconds, or if the service stops.
        """
        if self.is_closed or seconds <= 0:
            return None
        waiter = _Waiter(version)
        self._waiting.setdefault(job_id, set()).add(waiter)
        if version < 0:
            self._newcomer.set()
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())
        try:
            return await asyncio.wait_for(waiter.found, seconds)
        except TimeoutError:
            return None
        finally:
            self._waiting[job_id].discard(waiter)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def ended(self, job_id: str, version: int, seconds: float) -> None:
        """Return when the job has ended, or after so many seconds."""
        until = time.monotonic() + seconds
        while pulse := await self.changed(job_id, version, until - time.monotonic()):
            if pulse.state in FINISHED or pulse.is_deleted:
                return
            version = pulse.version

    async def close(self) -> None:
        """Let everybody who waits go."""
        self.is_closed = True
        for waiter in [waiter for waiting in self._waiting.values() for waiter in waiting]:
            if not waiter.found.done():
                waiter.found.set_result(None)
        if self._polling is not None:
            self._polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._polling

    async def _poll(self) -> None:
        try:
            while self._waiting:
                ids = sorted(self._waiting)
                for start in range(0, len(ids), MOST_AT_ONCE):
                    try:
                        pulses = await run_in_threadpool(self._store.pulses, ids[start : start + MOST_AT_ONCE])
                    except SQLAlchemyError as error:
                        log.warning("jobs cannot be watched now: %s", error)
                    else:
                        self._tell(pulses)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._newcomer.wait(), POLL_SECONDS)
                self._newcomer.clear()
        finally:
            self._polling = None

    def _tell(self, pulses: dict[str, Pulse]) -> None:
        for job_id, pulse in pulses.items():
            for waiter in self._waiting.get(job_id, ()):
                if waiter.version != pulse.version and not waiter.found.done():
                    waiter.found.set_result(pulse)
