"""A plan under the service's own rules: models below its roots, its memory, the disk its artifacts are on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from merge_core.errors import Problem, RecipeError
from merge_core.shards import check_space
from workers.artifacts import open_artifacts
from workers.hub.access import check_write, place_of
from workers.hub.opening import JobHub
from workers.jobs import JobKind
from workers.kinds import WORK, Document, Plan
from workers.published import published_by
from workers.settings import Settings

if TYPE_CHECKING:
    from merge_core.calibration.document import Calibration
    from merge_core.search.document import Search

REFUSALS = (
    *("invalid-recipe", "invalid-request", "model-not-found", "incompatible-models", "bad-checkpoint", "unsafe-format"),
    *("memory-limit", "path-not-allowed", "payload-too-large", "unsupported-media-type", "insufficient-storage"),
    *("storage-failed", "database-unavailable", "model-gated", "hub-unavailable", "hub-token-refused"),
    *("upstream-hub-error", "hub-not-allowed", "credential-not-found", "credential-sealed", "no-secret-key"),
    *("hub-forbidden", "hub-conflict"),
)
"""What planning a document may come to."""


def plan_for_service(kind: JobKind, document: Document, settings: Settings, hub: JobHub) -> Plan:
    """The plan; from then on `hub` knows what the names of models meant. Raises `WeightsmithError` for everything that
    headers can tell.
    """
    work, limits = WORK[kind](), document.limits
    if limits.memory > settings.max_memory:
        article = "an" if kind in (JobKind.ALIGNMENT, JobKind.ANALYSIS) else "a"
        detail = f"this service gives {article} {kind} at most {settings.max_memory / 2**20:,.0f} MiB"
        raise RecipeError.of([Problem(detail, "#/limits/memory")])
    place = place_of(document)
    if place is not None and kind is not JobKind.MERGE:
        raise RecipeError.of([Problem(f"only a merge is published, not a {kind}; leave this away", "#/outputs/hub")])
    make: Callable[..., Plan] = work.plan
    if work.reads_jobs:
        make = partial(make, published=published_by(hub.store, open_artifacts(settings), hub.owner, document))
    if kind is JobKind.VIEW:
        make = partial(make, memory=settings.memory_of_view)
    plan = make(document, roots=hub.roots, threads=limits.threads or settings.threads)
    if kind is JobKind.SEARCH:
        from workers.evaluators import check_evaluator
        from workers.evaluators.data import Shelves

        check_evaluator(cast("Search", document), Shelves(hub.store, hub.owner, hub.roots))
    if kind is JobKind.CALIBRATION:
        from workers.calibrating import check_models
        from workers.evaluators.data import Shelves

        check_models(cast("Calibration", document), Shelves(hub.store, hub.owner, hub.roots))
    planned = plan.to_dict()
    check_space(planned.get("bytes_on_disk", plan.output_bytes), settings.artifacts)
    if place is not None:
        check_write(hub.publisher(), place)
    return plan
