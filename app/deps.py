"""The dependencies a route may ask for."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from app.errors import HttpProblem
from merge_core.documents import MAX_DOCUMENT_BYTES
from merge_core.published import MAX_CARD_BYTES
from merge_core.recipe import Recipe
from workers.jobs import Job
from workers.queue import Queue
from workers.settings import Settings

YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml", "text/plain")


def _settings(request: Request) -> Settings:
    found = request.app.state.settings
    assert isinstance(found, Settings)
    return found


def _queue(request: Request) -> Queue:
    found = request.app.state.queue
    assert isinstance(found, Queue)
    return found


async def _recipe(request: Request) -> Recipe:
    """The body as a recipe: JSON, which is YAML too, or YAML."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind not in ("application/json", *YAML_TYPES):
        raise HttpProblem(
            415,
            "unsupported-media-type",
            "Unsupported media type",
            f"send a recipe as application/json or application/yaml, not {kind}",
        )
    return await run_in_threadpool(Recipe.from_text, await _body(request, MAX_DOCUMENT_BYTES))


async def _card(request: Request) -> bytes:
    """The body as it is: a recipe or a model card, whatever it calls itself."""
    return await _body(request, MAX_CARD_BYTES)


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            detail = f"at most {most:,} bytes are read here"
            raise HttpProblem(413, "payload-too-large", "Payload too large", detail, {"Connection": "close"})
    return bytes(body)


def _job(merge_id: str, queue: Annotated[Queue, Depends(_queue)]) -> Job:
    job = queue.store.get(merge_id)
    if job is None:
        raise HttpProblem(404, "not-found", "Not found", f"there is no merge {merge_id[:60]!r}")
    return job


SettingsDep = Annotated[Settings, Depends(_settings)]
QueueDep = Annotated[Queue, Depends(_queue)]
RecipeDep = Annotated[Recipe, Depends(_recipe)]
CardDep = Annotated[bytes, Depends(_card)]
JobDep = Annotated[Job, Depends(_job)]
_RECIPE = {"$ref": "#/components/schemas/Recipe"}
RECIPE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"anyOf": [_RECIPE, {"type": "array", "items": _RECIPE, "minItems": 1}]}},
            "application/yaml": {
                "schema": {"type": "string", "description": "a mergekit recipe, of one document or several"}
            },
        },
    }
}
"""What the OpenAPI document says of a recipe's body, which is read by hand because it may be YAML."""
CARD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "string", "description": "a published recipe, or a model card with one in it"}}
            for kind in ("application/yaml", "text/markdown")
        },
    }
}
"""What it says of a published recipe's body."""
