"""Whether the service lives, and whether it can do its work."""

from __future__ import annotations

import shutil

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.deps import QueueDep, SettingsDep
from app.errors import answers, problem_response
from app.schemas import Health
from merge_core.shards import SPARE_BYTES
from workers.problems import problem_of

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def live() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", response_model=Health, responses=answers("not-ready"))
def ready(queue: QueueDep, settings: SettingsDep) -> Health | JSONResponse:
    """The database can be written, the broker reached, and there is room on the disk."""
    checks = {
        "database": _database_is_writable(queue),
        "broker": queue.broker_is_reachable(),
        "disk": shutil.disk_usage(settings.artifacts).free > SPARE_BYTES,
    }
    if all(checks.values()):
        return Health(status="ok", checks=checks)
    missing = ", ".join(name for name, good in checks.items() if not good)
    return problem_response(problem_of("not-ready", f"not working: {missing}", checks=checks))


def _database_is_writable(queue: QueueDep) -> bool:
    try:
        with queue.store.engine.begin() as connection:
            connection.execute(text("UPDATE jobs SET id = id WHERE id = ''"))
    except SQLAlchemyError:
        return False
    return True
