"""Recipes that are only looked at."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool

from app.auth import CallerDep
from app.deps import CARD_BODY, CardDep, QueueDep, RecipeDep, SettingsDep, document_body
from app.errors import answers
from app.options import HubDep
from app.planning import REFUSALS, plan_for_service
from app.schemas import IgnoredKey, Imported, Validation
from merge_core.published import read_published
from workers.hub.opening import JobHub
from workers.jobs import JobKind

router = APIRouter(prefix="/v1", tags=["recipes"])


@router.post("/recipes:validate", openapi_extra=document_body(JobKind.MERGE), responses=answers(*REFUSALS))
async def validate_recipe(
    recipe: RecipeDep,
    settings: SettingsDep,
    queue: QueueDep,
    caller: CallerDep,
    hub_options: HubDep,
    steps: Annotated[bool, Query(description="with one entry per output tensor")] = False,
) -> Validation:
    """The plan of a recipe: what would be read, written and needed. No weight is read."""

    def look() -> Validation:
        hub = JobHub(queue.store, caller.owner, hub_options)
        plan = plan_for_service(JobKind.MERGE, recipe, settings, hub)
        return Validation(plan=plan.to_dict(steps=steps), recipe=recipe.to_data(), resolved=hub.resolved)

    return await run_in_threadpool(look)


@router.post(
    "/recipes:import",
    openapi_extra=CARD_BODY,
    responses=answers("invalid-recipe", "invalid-request", "payload-too-large"),
)
async def import_recipe(card: CardDep) -> Imported:
    """Read a published recipe, or a model card with one in it: what it means here, and which keys have no effect."""
    published = await run_in_threadpool(read_published, card)
    return Imported(
        recipe=published.recipe.to_data(),
        yaml=published.recipe.to_yaml(),
        found_in=published.found_in,
        ignored=[IgnoredKey(pointer=each.pointer, what=each.what) for each in published.ignored],
    )
