"""Candidates of searches where others can read them: views, each there for as long as it is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement

from workers.artifacts import open_artifacts
from workers.jobs import JobStore, Lease, new_id
from workers.queue import artifact_folder, discard, partial_folder, remove_partial
from workers.states import JobKind
from workers.tables import Job

if TYPE_CHECKING:
    from merge_core.recipe import Recipe


@contextmanager
def shown(
    store: JobStore, lease: Lease, recipe: Recipe, roots: Sequence[Path], stop: Callable[[], bool]
) -> Iterator[str]:
    """Let a candidate of the search that this lease is for be read in the Hub's protocol; yields the view's id.

    Raises what preparing a view does.
    """
    from merge_core.views import plan_view, prepare_view

    settings, view = store.settings, new_id(JobKind.VIEW.prefix)
    how = {"roots": roots, "threads": recipe.limits.threads or settings.threads}
    plan = plan_view(recipe, memory=settings.memory_of_view, **how)  # type: ignore[arg-type]
    try:
        made = prepare_view(
            recipe,
            artifact_folder(settings, view),
            partial=partial_folder(settings, view, 1),
            memory=min(recipe.limits.memory, settings.max_memory),
            stop=stop,
            **how,  # type: ignore[arg-type]
        )
        open_artifacts(settings).put_folder(view, made.folder, made.files, stop=stop)
        files = [asdict(file) for file in made.files]
        store.add_candidate(view, lease, plan.to_dict(), recipe=recipe.to_data(), files=files)
        yield view
    finally:
        forget_candidates(store, Job.id == view)
        _remove_files(store, view)


def forget_candidates(store: JobStore, *which: ColumnElement[bool]) -> None:
    """Let candidates not be read any more. Raises `StorageFailed` where their files cannot be removed."""
    for view in store.forget_candidates(*which):
        _remove_files(store, view)


def _remove_files(store: JobStore, view: str) -> None:
    remove_partial(store.settings, view)
    discard(artifact_folder(store.settings, view))
    open_artifacts(store.settings).delete(view)
