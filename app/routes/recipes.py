"""Recipes that are only looked at."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool

from app.deps import RECIPE_BODY, RecipeDep, SettingsDep
from app.planning import plan_for_service
from app.schemas import Validation

router = APIRouter(prefix="/v1", tags=["recipes"])


@router.post("/recipes:validate", openapi_extra=RECIPE_BODY)
async def validate_recipe(
    recipe: RecipeDep,
    settings: SettingsDep,
    steps: Annotated[bool, Query(description="with one entry per output tensor")] = False,
) -> Validation:
    """The plan of a recipe: what would be read, written and needed. No weight is read."""

    def look() -> Validation:
        return Validation(plan=plan_for_service(recipe, settings).to_dict(steps=steps), recipe=recipe.to_data())

    return await run_in_threadpool(look)
