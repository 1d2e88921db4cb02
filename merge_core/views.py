"""Merges on read: a recipe that is planned and prepared, and whose weights are computed when somebody reads them.

What is made beforehand is a folder with everything but the weights: what all tensors depend on (`on_demand.py`), config
and tokenizer files, index, card. `opened_view` computes the weights from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_core.artifact import RECIPE_NAME, Artifact, made_here, place_file, small_files
from merge_core.cards import CARD_NAME
from merge_core.errors import IncompatibleModels, Problem, RecipeError
from merge_core.files import WrittenFile, disk_error, write_text
from merge_core.journal import JOURNAL, Journal
from merge_core.layout import INDEX_NAME
from merge_core.merge import appear, check_output, plan_only
from merge_core.merged import leaves
from merge_core.model_card import model_card, parents_of
from merge_core.on_demand import PREPARED, OnDemand, Stop, on_demand
from merge_core.plan import Plan
from merge_core.progress import Report
from merge_core.recipe import Recipe
from merge_core.shards import unfinished

VIEW_LOCK_NAME = "view.lock.json"
BLOCK_ELEMENTS = 2**18
"""Of a block that is computed for a reader: smaller than a merge's, as many are kept and many readers hold one."""
_BESIDE_BYTES = 2**20


@dataclass(frozen=True)
class ViewPlan:
    """What will be shown, and what has to be found out before."""

    plan: Plan

    @property
    def warnings(self) -> Sequence[str]:
        return self.plan.warnings

    @property
    def output_bytes(self) -> int:
        """Bytes that are written: nothing of the weights."""
        return self.plan.beside_bytes + _BESIDE_BYTES

    def to_dict(self, *, steps: bool = False) -> dict[str, Any]:
        """The plan for people and for JSON: that of the merge, with the digest that stands for all its bytes."""
        digest, on_disk = self.plan.digest, self.output_bytes - self.plan.beside_bytes
        return {**self.plan.to_dict(steps=steps), "digest": digest, "bytes_on_disk": on_disk}


def plan_view(
    recipe: Recipe, *, roots: Sequence[Path] | None = None, memory: int | None = None, threads: int | None = None
) -> ViewPlan:
    """The plan alone: headers are read, no weights. Raises `WeightsmithError`, and for what cannot be read before it
    was made.
    """
    problems = []
    if recipe.outputs.kind != "full":
        what = f"how large the file of a {recipe.outputs.kind} is, is known only once it was made"
        problems.append(Problem(f"{what}; merge it", "#/outputs/kind"))
    if recipe.outputs.reversible:
        problems.append(
            Problem("a reversal is written with the merge; merge it, or leave this away", "#/outputs/reversible")
        )
    if recipe.outputs.hub is not None:
        problems.append(Problem("a view is published nowhere; merge it, or leave this away", "#/outputs/hub"))
    if problems:
        raise RecipeError.of([recipe.located(problem) for problem in problems])
    return ViewPlan(plan_only(recipe, roots=roots, memory=memory, threads=threads))


def prepare_view(
    recipe: Recipe,
    out: str | Path,
    *,
    roots: Sequence[Path] | None = None,
    partial: Path | None = None,
    memory: int | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    report: Report = lambda progress: None,
    stop: Stop = lambda: False,
) -> Artifact:
    """Find out what all tensors depend on, and put that and the small files into the folder `out`, which appears whole
    or not at all; see `merge`. A kill loses one pass over the models at most.
    """
    out = Path(out).absolute()
    partial = partial or out.parent / f".{out.name}.partial"
    try:
        check_output(out, partial)
        with (
            unfinished(partial),
            on_demand(recipe, partial, roots=roots, memory=memory, threads=threads, stop=stop) as made,
        ):
            with closing(Journal(partial / JOURNAL, made.plan.digest)) as journal:
                journal.open()
                journal.clear_folder()
            made.prepare(report)
            files = _small(made, partial)
            lock = {
                **made_here(),
                "exact_on": made.plan.exact_on,
                "recipe": made.plan.recipe.canonical(),
                "seed": made.plan.recipe.seed,
                "plan": made.plan.digest,
                "weights": dict(made.sizes),
                "files": [asdict(file) for file in files],
                "left_out": list(made.plan.left_out),
                "warnings": list(made.warnings),
            }
            files.append(write_text(partial / VIEW_LOCK_NAME, json.dumps(lock, indent=2, ensure_ascii=False) + "\n"))
            warnings = tuple(made.warnings)
        appear(partial, out)
    except OSError as error:
        raise disk_error(error, Path(error.filename or out), 0) from error
    return Artifact(out, tuple(files), {}, warnings)


def _small(made: OnDemand, folder: Path) -> list[WrittenFile]:
    """Every file but the weights."""
    found = [place_file(content, folder / name) for name, content in small_files(made.plan, made.inputs).items()]
    if INDEX_NAME in made.sizes:
        found.append(write_text(folder / INDEX_NAME, b"".join(map(bytes, made.read(INDEX_NAME))).decode()))
    found.append(write_text(folder / RECIPE_NAME, made.plan.recipe.to_yaml(with_place=False)))
    read = leaves(made.plan.models, made.inputs) | dict(made.compared)
    card = model_card(made.plan, parents_of(made.plan.recipe, read), made.warnings, is_made=False)
    found.append(write_text(folder / CARD_NAME, card))
    kept = [path for path in sorted(folder.iterdir()) if path.name == PREPARED or path.name in _permutations(made)]
    return found + [WrittenFile.of(path) for path in kept]


def _permutations(made: OnDemand) -> set[str]:
    """The files of permutations that were found."""
    plans = (made.plan, *made.plan.stages.values())
    return {plan.alignment.file for plan in plans if plan.alignment is not None and not plan.alignment.are_stored}


@contextmanager
def opened_view(
    recipe: Recipe,
    folder: Path,
    digest: str,
    *,
    roots: Sequence[Path] | None = None,
    memory: int | None = None,
    threads: int | None = None,
    stop: Stop = lambda: False,
) -> Iterator[OnDemand]:
    """A view to be read; `folder` has what was prepared, `digest` says which plan it was made for.

    Raises `IncompatibleModels` if the sources are others by now, and as `on_demand`.
    """
    how: dict[str, Any] = {"roots": roots, "memory": memory, "threads": threads, "block_elements": BLOCK_ELEMENTS}
    with on_demand(recipe, folder, stop=stop, **how) as made:
        if made.plan.digest != digest:
            raise IncompatibleModels("its sources, or Weightsmith, changed since it was planned; make a new view")
        yield made
