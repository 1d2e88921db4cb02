"""A calibration as it is carried out. The artifact has the files of statistics, the recipe that names them
(`recipe.yml`), what was learned and how (`calibration.json`), and the merged model if it was asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_core.artifact import LOCK_NAME, Artifact, made_here
from merge_core.calibration.bench import Bench
from merge_core.calibration.document import Calibration
from merge_core.calibration.method import Made
from merge_core.calibration.models import Models
from merge_core.calibration.plan import CalibrationPlan, lies_elsewhere, plan_calibration
from merge_core.checkpoint import locate
from merge_core.documents import canonical_json
from merge_core.files import WrittenFile, disk_error, remove_folder, write_text
from merge_core.journal import JOURNAL, Journal
from merge_core.merge import appear, check_output, merge
from merge_core.progress import Progress, Report
from merge_core.recipe import Recipe
from merge_core.references import ModelRef
from merge_core.shards import unfinished
from merge_core.snapshots import Roots, library_of

RECIPE_NAME = "recipe.yml"
REPORT_NAME = "calibration.json"
CALIBRATION_LOCK_NAME = "calibration.lock.json"
_WORK, _MODELS = "work", "models"


def calibrate(
    document: Calibration,
    out: str | Path,
    *,
    models: Models,
    roots: Sequence[Path] | None = None,
    partial: Path | None = None,
    memory: int | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    report: Report = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Learn or measure what the document asks for, into the folder `out`, which appears whole or not at all; see
    `merge_core.merge.merge`. `models` runs whole models on the data. After a kill, the same call goes on from the last
    steps that were saved. Raises `CalibrationFailed`, and what merging raises.
    """
    out = Path(out).absolute()
    partial = partial or out.parent / f".{out.name}.partial"
    try:
        check_output(out, partial)
        plan = plan_calibration(document, roots=roots, memory=memory, threads=threads)
        digest = hashlib.sha256(canonical_json([plan.digest, models.digest]).encode()).hexdigest()
        with unfinished(partial), closing(Journal(partial / JOURNAL, digest)) as journal:
            journal.open()
            journal.clear_folder()
            where = _Where(roots, memory or document.limits.memory, threads, cache, device)
            work = _Work(document, plan, models, where, partial, journal, Progress("starting"), report, stop)
            with models.working():
                files, warnings = work.carry_out()
            appear(partial, out)
    except OSError as error:
        raise disk_error(error, Path(error.filename or out), 0) from error
    return Artifact(out, tuple(files), {}, warnings)


@dataclass
class _Where:
    """How models are merged."""

    roots: Sequence[Path] | None
    memory: int
    threads: int | None
    cache: Path | None
    device: str

    def within(self, folder: Path) -> Roots:
        """Models may lie in this folder too, which is looked into first."""
        others = [Path.cwd(), Path("/")] if self.roots is None else [*self.roots]
        return Roots([folder, *others], library_of(self.roots))


@dataclass
class _Work:
    document: Calibration
    plan: CalibrationPlan
    models: Models
    where: _Where
    partial: Path
    journal: Journal
    progress: Progress
    report: Report
    stop: Callable[[], bool]

    def carry_out(self) -> tuple[list[WrittenFile], tuple[str, ...]]:
        folder, keys = self.partial / _WORK, self.document.keys
        made_in = folder / "roots" / keys.place
        made_in.mkdir(parents=True, exist_ok=True)
        base = self.document.base_model if self.document.method.base == "required" else None
        refs = [entry.model for entry in self.document.models or ()]
        bench = Bench(
            plan=self.plan,
            models=self.models,
            folder=folder,
            out=made_in,
            base=None if base is None else self._here(base),
            places=[self._here(ref) for ref in refs],
            journal=self.journal,
            memory=self.where.memory,
            progress=self.progress,
            report=self.report,
            stop=self.stop,
        )
        made = keys.run(bench)
        recipe = self._recipe(made)
        bench.tick("merging" if keys.merge else "finishing")
        model = self._merged(recipe, folder / "roots") if keys.merge else None
        return self._finish(bench, made, recipe, model)

    def _here(self, ref: ModelRef) -> Path:
        """A folder with the model's files: its own, or one that is made, where it has adapters on it or lies elsewhere.
        In the latter case its bits are copied, in the former it is in float32.
        """
        roots = self.where.roots
        if not lies_elsewhere(ref, roots):
            return locate(ref.path, roots, ref.revision)
        name = hashlib.sha256(str(ref).encode()).hexdigest()[:16]
        folder = self.partial / _WORK / _MODELS / name
        if not folder.exists():
            self.progress.phase = f"fetching: {ref}"
            self.report(self.progress)
            dtype = {} if ref.adapter is None else {"dtype": "float32"}
            entry = {"model": ref.model_dump(mode="json")}
            self._merge(Recipe.from_data({"merge_method": "passthrough", "models": [entry], **dtype}), folder, roots)
        return folder

    def _recipe(self, made: Made) -> Recipe:
        """The recipe as it was sent, with what was found."""
        data, place = self.document.without, self.document.keys.place
        for name, files in made.statistics.items():
            if isinstance(files, str):
                data["statistics"] = {**(data.get("statistics") or {}), name: f"{place}/{files}"}
                continue
            for entry, file in zip(data["models"], files, strict=True):
                if file is not None:
                    entry["statistics"] = {**(entry.get("statistics") or {}), name: f"{place}/{file}"}
        for entry, parameters in zip(data["models"], made.beside, strict=bool(made.beside)):
            entry["parameters"] = {**(entry.get("parameters") or {}), **parameters}
        if made.parameters:
            data["parameters"] = {**(data.get("parameters") or {}), **made.parameters}
        return Recipe.from_data(data)

    def _merged(self, recipe: Recipe, root: Path) -> Artifact:
        folder = self.partial / _WORK / "merged"
        if folder.exists():
            remove_folder(folder)
        return self._merge(recipe, folder, self.where.within(root))

    def _merge(self, recipe: Recipe, folder: Path, roots: Sequence[Path] | None) -> Artifact:
        where = self.where
        return merge(
            recipe,
            folder,
            roots=roots,
            memory=where.memory,
            threads=where.threads,
            cache=where.cache,
            device=where.device,
            stop=self.stop,
        )

    def _finish(
        self, bench: Bench, made: Made, recipe: Recipe, model: Artifact | None
    ) -> tuple[list[WrittenFile], tuple[str, ...]]:
        files = []
        for name in bench.written:
            (bench.out / name).rename(self.partial / name)
            files.append(WrittenFile.of(self.partial / name))
        if model is not None:
            for file in model.files:
                (model.folder / file.path).rename(self.partial / file.path)
            files = [*(file for file in model.files if file.path != LOCK_NAME), *files]
        told = json.dumps(self._told(bench, made), indent=2, ensure_ascii=False) + "\n"
        files.append(write_text(self.partial / RECIPE_NAME, recipe.to_yaml(with_place=False)))
        files.append(write_text(self.partial / REPORT_NAME, told))
        warnings = tuple(dict.fromkeys((*self.plan.warnings, *made.warnings, *(model.warnings if model else ()))))
        if model is None:
            lock: dict[str, Any] = {**made_here(), "recipe": recipe.canonical(), "seed": recipe.seed, "files": []}
            name = CALIBRATION_LOCK_NAME
        else:
            lock, name = json.loads((self.partial / LOCK_NAME).read_text()), LOCK_NAME
        lock |= {"calibration": self.document.to_data(), "calibration_plan": self.plan.digest}
        lock |= {"data": self.models.digest, "warnings": list(warnings), "files": [asdict(file) for file in files]}
        files.append(write_text(self.partial / name, json.dumps(lock, indent=2, ensure_ascii=False) + "\n"))
        for left in self.partial.iterdir():
            if left.is_dir():
                remove_folder(left)
        return files, warnings

    def _told(self, bench: Bench, made: Made) -> Mapping[str, Any]:
        data = [{"model": group.model, "file": group.file, "samples": group.samples} for group in bench.groups]
        return {"version": 1, "method": self.document.keys.method, "data": data, **made.told}
