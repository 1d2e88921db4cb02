"""A plan under the service's own rules: models below its roots, its memory, the disk its artifacts are on."""

from __future__ import annotations

from merge_core.errors import Problem, RecipeError
from merge_core.merge import plan_only
from merge_core.plan import Plan
from merge_core.recipe import Recipe
from merge_core.shards import check_space
from workers.settings import Settings


def plan_for_service(recipe: Recipe, settings: Settings) -> Plan:
    """Raises `WeightsmithError` for everything that headers can tell."""
    if recipe.limits.memory > settings.max_memory:
        detail = f"this service gives a merge at most {settings.max_memory / 2**20:,.0f} MiB"
        raise RecipeError.of([Problem(detail, "#/limits/memory")])
    plan = plan_only(recipe, roots=settings.roots, threads=recipe.limits.threads or settings.threads)
    check_space(plan, settings.artifacts)
    return plan
