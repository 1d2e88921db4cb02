"""Whether the service lives, and whether it can do its work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.deps import QueueDep
from app.errors import answers, problem_response
from app.schemas import Check, Health
from workers import alive, database
from workers.problems import problem_of
from workers.queue import Queue

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def live() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", response_model=Health, responses=answers("not-ready"))
def ready(queue: QueueDep) -> Health | JSONResponse:
    """Whether a job sent now would be kept and, sooner or later, done: the database can be written and has the tables
    of this version, the broker can be reached, and there is room on the disk. That no worker lives is a warning alone:
    jobs wait for one.
    """
    checks = {name: check(queue) for name, check in CHECKS.items()}
    failing = [f"{name}: {check.detail}" for name, check in checks.items() if check.status == "failing"]
    if not failing:
        return Health(status="ok", checks=checks)
    shown = {name: check.model_dump() for name, check in checks.items()}
    return problem_response(problem_of("not-ready", "; ".join(failing), checks=shown), {"Retry-After": "5"})


def _database(queue: Queue) -> Check:
    try:
        with queue.store.engine.begin() as connection:
            connection.execute(text("UPDATE jobs SET id = id WHERE id = ''"))
        found = database.revision(queue.store.engine)
    except SQLAlchemyError as error:
        return Check(status="failing", detail=f"cannot be written ({type(error).__name__}); the log says more")
    if found != database.head():
        detail = f"its tables are at revision {found}, this version's at {database.head()}; start the newer version"
        return Check(status="failing", detail=detail)
    return Check(status="ok", detail=f"can be written, at revision {found}")


def _broker(queue: Queue) -> Check:
    if queue.broker_is_reachable():
        return Check(status="ok", detail="can be reached")
    return Check(status="failing", detail="cannot be reached; jobs are kept, and start when it is back")


def _disk(queue: Queue) -> Check:
    settings = queue.store.settings
    free = shutil.disk_usage(settings.artifacts).free
    detail = f"{free / 1e9:,.2f} GB free, of which {settings.disk_reserve / 1e9:,.2f} GB are given to no job"
    return Check(status="ok" if free > settings.disk_reserve else "failing", detail=detail)


def _workers(queue: Queue) -> Check:
    try:
        workers = alive.living(queue.store)
    except SQLAlchemyError:
        return Check(status="warning", detail="unknown without the database")
    if not workers:
        return Check(status="warning", detail="no worker reported lately; jobs are taken, and wait for one")
    return Check(status="ok", detail=f"{len(workers)} reported lately")


CHECKS: Mapping[str, Callable[[Queue], Check]] = {
    "database": _database,
    "broker": _broker,
    "disk": _disk,
    "workers": _workers,
}
