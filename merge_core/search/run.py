"""A search as it is carried out: whoever leads asks the strategy for a round, whoever has time tries what is in it.

The artifact has the recipe that was found (`recipe.yml`), all trials (`search.json`), and the merged model if it was
asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_core.artifact import LOCK_NAME, Artifact, made_here
from merge_core.documents import canonical_json
from merge_core.errors import Canceled, EvaluationFailed, MemoryLimitExceeded, WeightsmithError
from merge_core.files import WrittenFile, disk_error, is_held, remove_folder, write_text
from merge_core.journal import JOURNAL, Journal
from merge_core.merge import appear, check_output, merge, plan_only
from merge_core.progress import Progress, Report
from merge_core.recipe import Recipe
from merge_core.search.document import Search
from merge_core.search.plan import SearchPlan, plan_search
from merge_core.search.together import merge_together
from merge_core.search.trials import (
    Candidate,
    Evaluator,
    Found,
    Kept,
    KeptInJournal,
    Outcome,
    Pruned,
    Trial,
    bars_of,
    checked,
    scored,
)
from merge_core.shards import unfinished
from merge_core.snapshots import snapshots_of
from merge_core.units import Alone, Share

RECIPE_NAME = "recipe.yml"
REPORT_NAME = "search.json"
SEARCH_LOCK_NAME = "search.lock.json"
PHASE = "trying"
_CANDIDATES = "candidates-"


@dataclass
class Places:
    """How candidates are merged."""

    roots: Sequence[Path] | None
    memory: int | None
    threads: int | None
    cache: Path | None
    device: str


def search(
    document: Search,
    out: str | Path,
    *,
    evaluator: Evaluator,
    kept: Kept | None = None,
    roots: Sequence[Path] | None = None,
    partial: Path | None = None,
    memory: int | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    report: Report = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    share: Share | None = None,
) -> Artifact:
    """Try the recipes of a search, and put what is found into the folder `out`, which appears whole or not at all; see
    `merge`. `kept` remembers trials (None: the unfinished output does). After a kill, the same call goes on.

    Raises `EvaluationFailed` where the evaluator does not score a candidate, and what merging raises.
    """
    out = Path(out).absolute()
    partial = partial or out.parent / f".{out.name}.partial"
    places = Places(roots, memory, threads, cache, device)
    try:
        check_output(out, partial)
        plan = plan_search(document, roots=roots, memory=memory, threads=threads)
        with unfinished(partial), closing(Journal(partial / JOURNAL, plan.digest)) as journal:
            journal.open()
            journal.clear_folder()
            for left in partial.glob(f"{_CANDIDATES}*"):
                with contextlib.suppress(OSError):
                    if not is_held(left):
                        remove_folder(left)
            progress = Progress(PHASE, trials_total=document.most_trials)
            memory_of = kept or KeptInJournal(journal)
            work = _Work(document, evaluator, memory_of, places, partial, share or Alone(), progress, report, stop)
            files, warnings = work.lead(plan, journal)
            work.share.prove()
            appear(partial, out)
    except OSError as error:
        raise disk_error(error, Path(error.filename or out), 0) from error
    return Artifact(out, tuple(files), {}, warnings)


def assist(
    document: Search,
    partial: Path,
    share: Share,
    *,
    evaluator: Evaluator,
    kept: Kept,
    roots: Sequence[Path] | None = None,
    memory: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Take trials of a search that somebody else leads, until there is nothing more to do. Raises as `search`."""
    plan = plan_search(document, roots=roots, memory=memory, threads=threads)
    places = Places(roots, memory, threads, None, device)
    try:
        work = _Work(document, evaluator, kept, places, partial, share, Progress(), lambda progress: None, stop)
        journal = Journal(partial / JOURNAL, plan.digest)
        while True:
            journal.read()
            if (note := journal.notes.get("round")) is not None:
                work.assist(_Round.of(note))
            if not share.wait():
                return
    except OSError as error:
        raise disk_error(error, Path(error.filename or partial), 0) from error


@dataclass(frozen=True)
class _Round:
    """Trials of which none depends on another, in units; `until`: the moment from when on none is begun."""

    phase: str
    units: Sequence[Sequence[Trial]]
    bars: Mapping[int, float]
    until: float | None

    def to_data(self) -> dict[str, Any]:
        units = [[trial.to_data() for trial in unit] for unit in self.units]
        return {"phase": self.phase, "units": units, "bars": list(self.bars.items()), "until": self.until}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> _Round:
        units = [[Trial(**trial) for trial in unit] for unit in data["units"]]
        return cls(data["phase"], units, dict(data["bars"]), data["until"])

    @property
    def is_over(self) -> bool:
        return self.until is not None and time.time() >= self.until


@dataclass
class _Work:
    document: Search
    evaluator: Evaluator
    kept: Kept
    places: Places
    partial: Path
    share: Share
    progress: Progress
    report: Report
    stop: Callable[[], bool]
    tried: list[tuple[Trial, Outcome]] = field(default_factory=list)

    # Leading.

    def lead(self, plan: SearchPlan, journal: Journal) -> tuple[list[WrittenFile], tuple[str, ...]]:
        keys = self.document.keys
        if "began" not in journal.notes:
            journal.note("began", time.time())
        until = None if keys.seconds is None else journal.notes["began"] + keys.seconds
        self._tick()
        strategy, answer = self.document.strategy(), None
        number = 0
        while True:
            try:
                asked = next(strategy) if answer is None else strategy.send(answer)
            except StopIteration:
                break
            trials = [self._trial(len(self.tried) + place, values) for place, values in enumerate(asked)]
            outcomes = self._round(number, [trial for trial, _ in trials], dict(_refused(trials)), journal, until)
            self.tried += [(trial, outcomes[trial.digest]) for trial, _ in trials if trial.digest in outcomes]
            self._tick()
            if len(outcomes) < len({trial.digest for trial, _ in trials}):
                break  # the time is over
            answer = [scored(outcomes[trial.digest], keys.wanted) for trial, _ in trials]
            number += 1
        return self._finish(plan)

    def _trial(self, number: int, values: Mapping[str, Any]) -> tuple[Trial, Outcome | None]:
        """A trial and, where its recipe cannot be planned, that it is refused."""
        if self.stop():
            raise Canceled("the search was canceled")
        try:
            return Trial(number, values, self._digest(self._planned(values)[1])), None
        except WeightsmithError as error:
            if self.document.keys.method == "greedy_soup":
                raise
            digest = hashlib.sha256(canonical_json(["refused", self.document.template, dict(values)]).encode())
            return Trial(number, values, digest.hexdigest()), Outcome("refused", detail=str(error)[:1000])

    def _planned(self, values: Mapping[str, Any]) -> tuple[Recipe, str]:
        recipe = self.document.candidate(values)
        places = self.places
        return recipe, plan_only(recipe, roots=places.roots, memory=places.memory, threads=places.threads).digest

    def _digest(self, plan: str) -> str:
        told = canonical_json([plan, self.evaluator.digest, self.document.keys.evaluator.version])
        return hashlib.sha256(told.encode()).hexdigest()

    def _round(
        self,
        number: int,
        trials: Sequence[Trial],
        known: dict[str, Outcome],
        journal: Journal,
        until: float | None,
    ) -> Mapping[str, Outcome]:
        """Have all trials of a round tried that are not known; what they came to, as far as there was time."""
        self.kept.begin(trials)
        for trial in trials:
            if trial.digest in known:
                self.kept.keep(trial, known[trial.digest], 0.0)
        each = list({trial.digest: trial for trial in trials if trial.digest not in known}.values())
        digests = [trial.digest for trial in each]
        if len(found := self.kept.find(digests)) < len(each):
            size = self.document.keys.at_a_time
            units = [each[place : place + size] for place in range(0, len(each), size)]
            name = hashlib.sha256(canonical_json([size, digests]).encode()).hexdigest()[:12]
            bars = {} if not self.document.keys.prune else self._bars()
            this = _Round(f"{PHASE} {number} {name}", units, bars, until)
            journal.note("round", this.to_data())
            self.share.open(this.phase, len(units))
            self._until_done(this)
            found = self.kept.find(digests)
        return {**known, **found}

    def _until_done(self, this: _Round) -> None:
        done: set[int] = set()
        while len(done) < len(this.units) and not this.is_over:
            if (unit := self.share.take(this.phase)) is not None:
                self._try(this, this.units[unit])
                self.share.done(this.phase, unit, {"trials": len(this.units[unit])})
                news = {unit}
            else:
                news = set(self.share.results(this.phase)) - done
                if not news:
                    self.share.wait()
            self.progress.trials_done += sum(len(this.units[unit]) for unit in news - done)
            done |= news
            self._tick()

    def _bars(self) -> Mapping[int, float]:
        direction = next(iter(self.document.keys.wanted.values()))
        return bars_of([outcome for _, outcome in self.tried], direction)

    # Assisting.

    def assist(self, this: _Round) -> None:
        """Take trials of a round, from its end."""
        while not this.is_over and (unit := self.share.take(this.phase)) is not None:
            self._try(this, this.units[unit])
            self.share.done(this.phase, unit, {"trials": len(this.units[unit])})

    # Trying.

    def _try(self, this: _Round, trials: Sequence[Trial]) -> None:
        """Score candidates, those that are known already left away; each is kept as soon as it is known."""
        known = self.kept.find([trial.digest for trial in trials])
        left = [trial for trial in trials if trial.digest not in known]
        if not left:
            return
        planned = {trial.digest: self._planned(trial.values) for trial in left}
        with ExitStack() as stack:
            folders: Mapping[str, Path] = {}
            began = time.monotonic()
            if self.evaluator.needs_folder:
                folders = stack.enter_context(self._merged(left, {d: recipe for d, (recipe, _) in planned.items()}))
            merging = (time.monotonic() - began) / len(left)
            for trial in left:
                recipe, plan = planned[trial.digest]
                if self._digest(plan) != trial.digest:
                    raise EvaluationFailed(
                        f"{trial.told}: its models changed while it was tried; start the search again"
                    )
                self._tick(f"{trial.told}: evaluating")
                began = time.monotonic()
                outcome = self._score(this, trial, recipe, plan, folders.get(trial.digest))
                self.kept.keep(trial, outcome, merging + time.monotonic() - began)

    def _score(self, this: _Round, trial: Trial, recipe: Recipe, plan: str, folder: Path | None) -> Outcome:
        wanted = self.document.keys.wanted
        metric, direction = next(iter(wanted.items()))
        candidate = Candidate(trial, recipe, plan, folder, self.stop, this.bars, metric, direction)
        try:
            answer = self.evaluator.evaluate(candidate)
        except Pruned:
            return Outcome("pruned", steps=candidate.steps)
        except EvaluationFailed as error:
            raise EvaluationFailed(f"{trial.told}: {error}", error.problems) from None
        return Outcome("done", checked(answer, wanted, trial), candidate.steps)

    @contextmanager
    def _merged(self, trials: Sequence[Trial], recipes: Mapping[str, Recipe]) -> Iterator[Mapping[str, Path]]:
        """Folders with the candidates' files, as long as they are needed."""
        scratch = Path(tempfile.mkdtemp(prefix=_CANDIDATES, dir=self.partial))
        held = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            found = {trial.digest: scratch / str(trial.number) for trial in trials}
            if not self._merge_together([recipes[digest] for digest in found], list(found.values())):
                for trial in trials:
                    self._tick(f"{trial.told}: merging")
                    self._merge(recipes[trial.digest], found[trial.digest])
            yield found
        finally:
            os.close(held)
            remove_folder(scratch)

    def _merge_together(self, recipes: Sequence[Recipe], folders: Sequence[Path]) -> bool:
        """Make several candidates side by side; False where they have to be made one after the other: on a GPU, from
        models that are fetched, or in too little memory.
        """
        where = self.places
        if len(recipes) < 2 or where.device != "cpu" or any(snapshots_of(where.roots or ())):
            return False
        self._tick(f"merging {len(recipes)} candidates")
        memory = where.memory or self.document.limits.memory
        how: dict[str, Any] = {"roots": where.roots, "threads": where.threads, "stop": self.stop}
        try:
            merge_together(recipes, folders, memory=memory, **how)
        except MemoryLimitExceeded:
            for folder in folders:
                remove_folder(folder)
            return False
        return True

    def _merge(self, recipe: Recipe, folder: Path) -> None:
        where = self.places
        how: dict[str, Any] = {"roots": where.roots, "memory": where.memory, "threads": where.threads}
        merge(recipe, folder, cache=where.cache, device=where.device, stop=self.stop, **how)

    # What comes out.

    def _finish(self, plan: SearchPlan) -> tuple[list[WrittenFile], tuple[str, ...]]:
        keys = self.document.keys
        found = Found.of(self.tried, keys.wanted)
        if found is None:
            refused = next((outcome.detail for _, outcome in self.tried if outcome.detail), None)
            why = f"; the first of them: {refused}" if refused else "; give it more time"
            raise EvaluationFailed(f"none of {len(self.tried)} trials came to an end{why}")
        best = next(trial for trial, _ in self.tried if trial.number == found.best)
        recipe = self.document.candidate(best.values, whole=False)
        told = json.dumps(self._told(found), indent=2, ensure_ascii=False) + "\n"
        self.progress.phase = "merging" if keys.merge else "finishing"
        self._tick(f"{best.told}, the best")
        made = self._best_model(recipe) if keys.merge else None
        files = [write_text(self.partial / RECIPE_NAME, recipe.to_yaml(with_place=False))]
        files.append(write_text(self.partial / REPORT_NAME, told))
        refused_count = sum(outcome.state == "refused" for _, outcome in self.tried)
        warnings = list(plan.warnings if made is None else (*plan.notes, *made.warnings))
        if refused_count:
            warnings.append(f"{refused_count} of {len(self.tried)} trials were passed over; {REPORT_NAME} says why")
        if made is None:
            lock: dict[str, Any] = {**made_here(), "recipe": recipe.canonical(), "seed": recipe.seed, "files": []}
            name = SEARCH_LOCK_NAME
        else:
            lock, name = json.loads((self.partial / LOCK_NAME).read_text()), LOCK_NAME
            files = [*(file for file in made.files if file.path != LOCK_NAME), *files]
        lock |= {"search": self.document.to_data(), "search_plan": plan.digest, "warnings": warnings}
        lock["files"] = [asdict(file) for file in files]
        files.append(write_text(self.partial / name, json.dumps(lock, indent=2, ensure_ascii=False) + "\n"))
        for left in self.partial.iterdir():
            if left.is_dir():
                remove_folder(left)
        return files, tuple(warnings)

    def _best_model(self, recipe: Recipe) -> Artifact:
        """The merge of what was found, its files in the unfinished output."""
        folder = self.partial / "best"
        if folder.exists():
            remove_folder(folder)
        where = self.places
        how: dict[str, Any] = {"roots": where.roots, "memory": where.memory, "threads": where.threads}
        made = merge(recipe, folder, cache=where.cache, device=where.device, stop=self.stop, **how)
        for file in made.files:
            (folder / file.path).rename(self.partial / file.path)
        return replace(made, folder=self.partial)

    def _told(self, found: Found) -> dict[str, Any]:
        keys = self.document.keys
        trials = [
            {**trial.to_data(), **{key: value for key, value in outcome.to_data().items() if value}}
            for trial, outcome in found.trials
        ]
        return {
            "version": 1,
            "method": keys.method,
            "seed": keys.seed,
            "metrics": dict(keys.wanted),
            "best": found.best,
            "front": list(found.front),
            "trials": trials,
        }

    def _tick(self, what: str = "") -> None:
        if self.stop():
            raise Canceled("the search was canceled")
        self.progress.tensor = what
        self.progress.trials_done = max(self.progress.trials_done, len(self.tried))
        self.report(self.progress)


def _refused(trials: Sequence[tuple[Trial, Outcome | None]]) -> Iterator[tuple[str, Outcome]]:
    for trial, outcome in trials:
        if outcome is not None:
            yield trial.digest, outcome
