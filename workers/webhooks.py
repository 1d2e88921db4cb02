"""Webhooks: what is to be told is written with the job's move, and sent by whichever process comes to it first.

A delivery is a row (outbox). A `Courier` claims one for as long as an attempt may take; if it dies, another claims it
after that. So each is sent at least once, with the same id every time, and by one process at a time.
Form and signature: https://www.standardwebhooks.com.
"""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, select, update

from workers.database import TROUBLE, said
from workers.states import JobKind, JobState
from workers.tables import Delivery, Job

if TYPE_CHECKING:
    from workers.jobs import JobStore
    from workers.outbound import Guard

EVENTS: Mapping[JobState, str] = {
    JobState.RUNNING: "started",
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELED: "canceled",
}
"""The moves that a webhook may hear of, and what they are called there."""
MAX_ATTEMPTS = 9
_FACTOR, _LONGEST = 4.0, 12 * 3600.0
_SECONDS, _MOST_BYTES = 5.0, 64 * 1024
_CLAIM = 60.0
"""How long a claim is good: longer than looking a name up and an attempt can take."""
_POLL = 1.0
_THREADS = 4
_KEPT = timedelta(days=30)
log = logging.getLogger(__name__)


def deliveries(job: Any, state: JobState, error: Mapping[str, Any] | None) -> list[Delivery]:
    """What a job's webhook is to hear of its move to a state: nothing, or one delivery.

    `job` has `id`, `kind`, `attempt`, `labels` and `webhook` as they are after the move. Of the attempts at a job only
    the first is told.
    """
    event = EVENTS.get(state)
    if not job.webhook or event not in job.webhook["events"] or (state is JobState.RUNNING and job.attempt > 1):
        return []
    now = time.time()
    kind = JobKind(job.kind)
    told = {"id": job.id, "kind": kind, "status": state, "labels": job.labels, "url": f"/v1/{kind.plural}/{job.id}"}
    told |= {"error": dict(error)} if error else {}
    body = {"type": f"{kind}.{event}", "timestamp": datetime.fromtimestamp(now, UTC).isoformat(), "data": told}
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    message = f"msg_{secrets.token_hex(12)}"
    return [Delivery(id=message, job_id=job.id, url=job.webhook["url"], body=text, next_at=now, created_at=now)]


class Undelivered(Exception):
    """An attempt that failed."""


class NeverDelivered(Undelivered):
    """An attempt that failed as every other will."""


class Gone(NeverDelivered):
    """The webhook is not there any more, and asks not to be called again."""


class Courier:
    """Sends what is due, a few at a time."""

    def __init__(self, store: JobStore, guard: Guard) -> None:
        self._store, self._guard = store, guard
        self._name = f"{socket.gethostname()[:60]}/{os.getpid()}"
        self._stopping = threading.Event()
        self._free = threading.BoundedSemaphore(_THREADS)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="webhook")
        self._thread = threading.Thread(target=self._watch, name="webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Claim nothing more; what is on its way ends within seconds, or is sent again by another."""
        self._stopping.set()
        self._thread.join(_SECONDS)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _watch(self) -> None:
        rounds = 0
        while not self._stopping.is_set():
            delivery = None
            self._free.acquire()
            try:
                delivery = self.claim()
                if rounds % 3600 == 0:
                    self.forget()
            except TROUBLE as error:
                log.warning("the database cannot be used, trying again: %s", said(error))
            except Exception:
                log.exception("deliveries cannot be read; trying again")
            if delivery is None:
                self._free.release()
                rounds += 1
                self._stopping.wait(_POLL)
            else:
                self._pool.submit(self._deliver_and_free, delivery)

    def _deliver_and_free(self, delivery: Delivery) -> None:
        try:
            self.deliver(delivery)
        except TROUBLE as error:
            log.warning(
                "what came of %s could not be written down; it will be sent again: %s", delivery.id, said(error)
            )
        except Exception:
            log.exception("what came of %s could not be written down; it will be sent again", delivery.id)
        finally:
            self._free.release()

    def claim(self) -> Delivery | None:
        """Take a delivery that is due, first attempts before others; None: there is none."""
        now = time.time()
        due = select(Delivery.id).where(Delivery.next_at <= now).order_by(Delivery.attempts, Delivery.next_at).limit(1)
        with self._store.session() as session:
            if (found := session.scalars(due).first()) is None:
                return None
            taken = (
                update(Delivery)
                .where(Delivery.id == found, Delivery.next_at <= now)
                .values(holder=self._name, attempts=Delivery.attempts + 1, next_at=now + _CLAIM)
                .returning(Delivery)
            )
            return session.scalars(taken).one_or_none()

    def deliver(self, delivery: Delivery) -> None:
        """Make one attempt at a claimed delivery and write down what came of it."""
        try:
            self._send(delivery)
        except NeverDelivered as error:
            self._end(delivery, next_at=None, last_error=str(error))
            if isinstance(error, Gone):
                self._hang_up(delivery, str(error))
        except Undelivered as error:
            self._later(delivery, str(error))
        except Exception:
            log.exception("%s could not be sent", delivery.id)
            self._later(delivery, "it could not be sent from here; the service's log describes why")
        else:
            self._end(delivery, next_at=None, last_error=None, delivered_at=time.time())

    def _later(self, delivery: Delivery, why: str) -> None:
        again = None if delivery.attempts >= MAX_ATTEMPTS else time.time() + self._wait(delivery.attempts)
        self._end(delivery, next_at=again, last_error=why)

    def forget(self) -> None:
        """Remove what came to its end long ago."""
        long_ago = time.time() - _KEPT.total_seconds()
        with self._store.session() as session:
            session.execute(delete(Delivery).where(Delivery.next_at.is_(None), Delivery.created_at < long_ago))

    def _send(self, delivery: Delivery) -> None:
        """Raises `Undelivered`."""
        # Here and not above: every process writes deliveries, few send them.
        import httpx2

        from merge_core import __version__
        from workers.outbound import ForbiddenAddress
        from workers.signing import Signer

        with self._store.reading() as session:
            owner = session.scalars(select(Job.owner).where(Job.id == delivery.job_id)).one_or_none()
        if owner is None:
            raise NeverDelivered("the job is no more")
        now = datetime.now(UTC)
        headers = {
            "content-type": "application/json",
            "accept-encoding": "identity",
            "user-agent": f"Weightsmith/{__version__}",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Signer(self._store.settings).sign(owner, delivery.id, now, delivery.body),
        }
        transport = self._guard.transport(seconds=_SECONDS, most_bytes=_MOST_BYTES)
        try:
            with (
                httpx2.Client(transport=transport, trust_env=False, timeout=_SECONDS) as http,
                http.stream("POST", delivery.url, content=delivery.body.encode(), headers=headers) as answer,
            ):
                status = answer.status_code
        except ForbiddenAddress as error:
            raise NeverDelivered(str(error)) from None
        except httpx2.TimeoutException:
            raise Undelivered(f"no answer within {_SECONDS:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise Undelivered(f"no answer: {str(error)[:200] or type(error).__name__}") from None
        if status == 410:
            raise Gone("it answered 410: it is gone, and is not called again")
        if 300 <= status < 400:
            raise Undelivered(f"it answered {status}; redirects are not followed")
        if not 200 <= status < 300:
            raise Undelivered(f"it answered {status}; 2xx was expected")

    def _wait(self, attempts: int) -> float:
        """Seconds until the next attempt: each time longer, and never the same for all."""
        first = self._store.settings.webhook_retry_seconds
        return min(first * _FACTOR ** (attempts - 1), _LONGEST) * random.uniform(1, 1.25)  # noqa: S311

    def _hang_up(self, delivery: Delivery, why: str) -> None:
        """Tell a webhook that is gone no more of its job."""
        others = update(Delivery).where(
            Delivery.job_id == delivery.job_id, Delivery.url == delivery.url, Delivery.next_at.is_not(None)
        )
        job = update(Job).where(Job.id == delivery.job_id)
        with self._store.session() as session:
            session.execute(others.values(next_at=None, holder=None, last_error=why))
            session.execute(job.values(webhook=None, version=Job.version + 1))

    def _end(self, delivery: Delivery, **values: Any) -> None:
        """Write down what came of an attempt, unless somebody else has claimed it meanwhile."""
        mine = update(Delivery).where(
            Delivery.id == delivery.id, Delivery.holder == self._name, Delivery.attempts == delivery.attempts
        )
        with self._store.session() as session:
            session.execute(mine.values(holder=None, **values))


def deliveries_of(store: JobStore, job_id: str) -> Sequence[Delivery]:
    """Everything that a job's webhook was or is to be told, in order."""
    query = select(Delivery).where(Delivery.job_id == job_id).order_by(Delivery.created_at, Delivery.id)
    with store.reading() as session:
        return session.scalars(query).all()
