"""Settings: keys, credentials, quota, the webhooks' secret, and what the service is."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from app.auth import CallerDep, doors_of
from app.deps import QueueDep, SettingsDep
from app.pages.rendering import PageDep
from app.routes.api_keys import KeyRead, list_keys
from app.routes.credentials import list_credentials
from app.routes.quota import read_quota
from app.routes.system import MAX_PAGE, read_system
from workers.credentials import Vault
from workers.keys import USUAL, KeyRing, Scope

router = APIRouter()
SCOPES = {
    Scope.MERGES_READ: "see jobs, plans and models",
    Scope.MERGES_WRITE: "make, cancel and delete jobs; keep credentials",
    Scope.FILES_READ: "download what was merged",
    Scope.ADMIN: "everything, for everybody",
}
_NAMES = {
    "running_jobs": "Jobs at work; further ones wait",
    "queued_jobs": "Jobs that wait",
    "job_bytes": "What one job reads and writes",
    "daily_bytes": "Read and written in 24 hours",
    "disk_bytes": "Disk, with what is promised to jobs that are not finished",
}
LIFETIMES = {7: "in a week", 30: "in 30 days", 90: "in 90 days", 365: "in a year"}
"""After how many days a key may expire, in words."""


@router.get("/settings")
def read(request: Request, page: PageDep, queue: QueueDep, settings: SettingsDep, caller: CallerDep) -> HTMLResponse:
    """All of it; what the caller's key may not do is not offered."""
    now = time.time()
    ring, vault = KeyRing(queue.store), Vault(queue.store)
    keys = list_keys(ring, caller, None, MAX_PAGE, None)
    credentials = list_credentials(vault, caller, MAX_PAGE, "")
    lifetimes = {
        days: words
        for days, words in LIFETIMES.items()
        if caller.expires_at is None or now + days * 86_400 <= caller.expires_at
    }
    return page(
        "settings.html",
        doors=doors_of(request.app).value,
        caller=caller,
        can_write=caller.may(Scope.MERGES_WRITE),
        scopes={scope: words for scope, words in SCOPES.items() if caller.may(scope)},
        usual=USUAL,
        lifetimes=lifetimes,
        never=caller.expires_at is None,
        keys=[(key, _state(key, now), all(map(caller.may, key.scopes))) for key in keys.data],
        more_keys=keys.has_more,
        credentials=credentials.data,
        more_credentials=credentials.has_more,
        quota=read_quota(queue, caller),
        quota_names=_NAMES,
        system=read_system(queue, settings),
    )


def _state(key: KeyRead, now: float) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at.timestamp() <= now else "good"
