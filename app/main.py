"""`create_app`: routers, error handlers, and what lives as long as the service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from starlette.routing import BaseRoute

from app import auth, errors, pages
from app.armor import Armor
from app.head import HeadAsGet
from app.hub import InHubWords
from app.repos import open_shelves
from app.requests import Requests
from app.routes import (
    api_keys,
    credentials,
    data,
    health,
    hub,
    methods,
    metrics,
    models,
    problems,
    quota,
    recipes,
    system,
    trials,
    webhooks,
)
from app.routes.files import files_router
from app.routes.jobs import jobs_router
from app.routes.records import records_router
from app.schemas import Manifest, ProblemRead
from app.views import Views, ViewShelf
from app.watching import Watch
from merge_core import __version__
from workers.celery_app import make_celery
from workers.jobs import JobKind, JobStore
from workers.kinds import WORK
from workers.outbound import Guard
from workers.queue import Queue
from workers.settings import Settings

DATABASE_PATIENCE = 5.0
DESCRIPTION = """
Merge model weights: POST a recipe (mergekit's format, YAML or JSON), watch the job, download the checkpoint.

Errors are problems as in RFC 9457: `type`, `title`, `status`, `detail`, `code`, and `errors` with a JSON pointer into
the recipe, a tensor or a file for each place that is wrong. `type` leads to what the code means. Wherever GET is, HEAD
is too.
"""
EVERYWHERE = ("invalid-request", "internal-error", "database-unavailable")
"""What any route may answer."""


def create_app(settings: Settings | None = None, *, host: str | None = None) -> FastAPI:
    """The service for these settings (the environment's by default). `host`: where it will listen; unless that is known
    to be loopback, it asks for keys.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = JobStore(settings, patience=DATABASE_PATIENCE)
        app.state.queue, app.state.watch = Queue(store, make_celery(settings)), Watch(store)
        views = Views(app.state.queue)
        app.state.shelves = {**open_shelves(app.state.queue), JobKind.VIEW.plural: ViewShelf(views)}
        yield
        await run_in_threadpool(views.close)
        await app.state.watch.close()
        store.close()

    app = _Service(
        title="Weightsmith",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # the page has one of its own, without a CDN
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.doors = auth.doors_for(settings, host)
    app.add_middleware(auth.Gate, doors=app.state.doors, settings=settings)
    app.add_middleware(InHubWords)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Armor)
    app.add_middleware(Requests)
    app.state.guard = Guard(settings.webhook_allow)
    errors.install(app)
    app.router.routes.extend(_routes())
    return app


@cache
def _routes() -> Sequence[BaseRoute]:
    """Every route. FastAPI prepares those of an app when the first of them is asked for, in a third of a second; here
    all apps of a process share them.
    """
    app = FastAPI(responses=errors.answers(*EVERYWHERE), openapi_url=None)
    for kind in WORK:
        app.include_router(jobs_router(kind))
        app.include_router(records_router(kind))
        app.include_router(files_router(kind))
        app.include_router(webhooks.deliveries_router(kind))
    named = (recipes, methods, models, webhooks, problems, api_keys, system, health, metrics, credentials, data, quota)
    for module in (*named, trials, hub):
        app.include_router(module.router)
    pages.install(app)
    return app.routes


class _Service(FastAPI):
    """Describes itself when it is first asked to, which takes longer than all the rest of its start."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            super().openapi()
            _describe_documents(self)
            auth.describe(self)
        return super().openapi()


def _describe_documents(app: FastAPI) -> None:
    """Describe in the OpenAPI document what no route's types tell: problems, and recipes and their like, which are
    read by hand, because they may be YAML.
    """
    schemas = app.openapi()["components"]["schemas"]
    described: list[Any] = [ProblemRead, Manifest, *(work().document for work in WORK.values())]
    for document in described:
        schema = document.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**schema.pop("$defs", {}), document.__name__: schema}
