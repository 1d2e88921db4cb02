"""`create_app`: routers, error handlers, and what lives as long as the service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app import errors
from app.routes import files, health, merges, methods, recipes
from merge_core import __version__
from merge_core.recipe import Recipe
from workers.celery_app import make_celery
from workers.jobs import JobStore
from workers.queue import Queue
from workers.settings import Settings

DATABASE_PATIENCE = 5.0
DESCRIPTION = """
Merge model weights: POST a recipe (mergekit's format, YAML or JSON), watch the job, download the checkpoint.

Errors are problems as in RFC 9457: `type`, `title`, `status`, `detail`, `code`, and `errors` with a JSON pointer into
the recipe, a tensor or a file for each place that is wrong.
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service for these settings (the environment's by default)."""
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = JobStore(settings, patience=DATABASE_PATIENCE)
        app.state.queue = Queue(store, make_celery(settings))
        yield
        store.close()

    app = FastAPI(
        title="Weightsmith", version=__version__, description=DESCRIPTION, lifespan=lifespan, responses=errors.RESPONSES
    )
    app.state.settings = settings
    errors.install(app)
    for module in (merges, files, recipes, methods, health):
        app.include_router(module.router)
    _document_recipes(app)
    return app


def _document_recipes(app: FastAPI) -> None:
    """Describe recipes in the OpenAPI document: routes read them by hand, because they may be YAML."""
    schema = app.openapi()
    recipe = Recipe.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["components"]["schemas"] |= {**recipe.pop("$defs", {}), "Recipe": recipe}
