"""A merge that is cut into units: whoever does which, whoever dies at what, the files are those of the plain merge."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.artifact import Artifact
from merge_core.errors import NonFinite
from merge_core.merge import assist, merge
from merge_core.progress import Progress
from merge_core.recipe import Recipe
from merge_core.statistics import (
    Counts,
    GrainSums,
    Largest,
    RowValues,
    Statistic,
    add_up,
    load_statistics,
    save_statistics,
)
from merge_core.units import Result, cut_output
from tests.conftest import CONFIG, FORMS, kernels_in, method_recipe, mixed_tensors, write_checkpoint
from tests.merge_core.test_adapters import EMBEDDING, THREE, write_adapter

Parts = dict[str, list[Any]]


class Killed(BaseException):
    """What a worker does not live to handle."""


@dataclass
class Board:
    """What a database would know of units: states, holders, results; and how often each was taken."""

    chance: random.Random
    unit_bytes: int = 1500
    open: dict[str, dict[int, str]] = field(default_factory=dict)
    results: dict[str, dict[int, Result]] = field(default_factory=lambda: defaultdict(dict))
    runs: Counter[tuple[str, int]] = field(default_factory=Counter)
    by: Counter[str] = field(default_factory=Counter)
    is_over: bool = False
    is_for_all: bool = False
    begun: float = field(default_factory=time.monotonic)
    takers: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def give_back(self, name: str) -> None:
        """What a dead worker held is open again."""
        with self.lock:
            for units in self.open.values():
                for number, holder in units.items():
                    if holder == name:
                        units[number] = ""


@dataclass
class Shared:
    """One worker's view of the board; `die` is asked at every step, a true answer kills it."""

    board: Board
    name: str
    leads: bool = False
    die: Callable[[], bool] = lambda: False
    idle: int = 0

    @property
    def unit_bytes(self) -> int:
        return self.board.unit_bytes

    def forget(self) -> None:
        self.board.open.clear()
        self.board.results.clear()

    def open(self, phase: str, count: int) -> None:
        with self.board.lock:
            units = self.board.open.setdefault(phase, {})
            for number in range(count):
                if number not in self.board.results[phase]:
                    units.setdefault(number, "")

    def take(self, phase: str) -> int | None:
        if self.die():
            raise Killed
        with self.board.lock:
            free = [number for number, holder in self.board.open.get(phase, {}).items() if not holder]
            others = sum(bool(holder) for holder in self.board.open.get(phase, {}).values())
            # Whoever leads leaves something for others, or they might come too late in so small a merge.
            if not free or (self.leads and others < 2 and self.board.chance.random() < 0.5 and self.name != "alone"):
                return None
            if self.board.is_for_all and self.others_are_late(len(free)):
                return None
            number = min(free) if self.leads else max(free)
            self.board.open[phase][number] = self.name
            self.board.runs[phase, number] += 1
            self.board.takers.add(self.name)
            return number

    def others_are_late(self, free: int) -> bool:
        """Whether all others have done nothing so far; then something is left to them, unless that takes too long."""
        if time.monotonic() > self.board.begun + 30:
            return False
        takers = self.board.takers
        return not takers - {self.name} if self.leads else free == 1 and bool(takers) and "leader" not in takers

    def done(self, phase: str, number: int, result: Result) -> None:
        if self.die():
            raise Killed
        with self.board.lock:
            assert self.board.open[phase].pop(number) == self.name
            assert number not in self.board.results[phase], "no unit's result is written twice"
            self.board.results[phase][number] = result
            self.board.by[self.name] += 1

    def results(self, phase: str) -> Mapping[int, Result]:
        with self.board.lock:
            return dict(self.board.results[phase])

    def again(self, phase: str, number: int) -> None:
        with self.board.lock:
            del self.board.results[phase][number]
            self.board.open[phase][number] = ""

    def wait(self) -> bool:
        if self.die():
            raise Killed
        time.sleep(0.002)
        return not self.board.is_over

    def prove(self) -> None:
        """It leads."""


def shared(
    recipe: Recipe, models: Path, out: Path, *, assistants: int = 1, board: Board | None = None, **how: Any
) -> tuple[Artifact, Board]:
    """Merge with assistants beside, in threads of this process."""
    board = board or Board(random.Random(1), is_for_all=True)
    partial, errors = out.parent / f".{out.name}.partial", list[BaseException]()

    def take_part(share: Shared) -> None:
        try:
            assist(recipe, partial, share, roots=[models], threads=1, max_shard_size=how.get("max_shard_size"))
        except BaseException as error:
            errors.append(error)
            board.give_back(share.name)

    threads = [threading.Thread(target=take_part, args=(Shared(board, f"assistant {i}"),)) for i in range(assistants)]
    for thread in threads:
        thread.start()
    try:
        artifact = merge(recipe, out, roots=[models], share=Shared(board, "leader", leads=True), **how)
    finally:
        board.is_over = True
        for thread in threads:
            thread.join()
    assert not errors
    return artifact, board


def files_of(artifact: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for file in artifact.files}


def assert_sharing_changes_nothing(
    recipe: Recipe, models: Path, folder: Path, assistants: int = 1, **how: Any
) -> Board:
    plain = merge(recipe, folder / "plain", roots=[models], **how)
    artifact, board = shared(recipe, models, folder / "shared", assistants=assistants, **how)
    assert files_of(artifact) == files_of(plain)
    assert {path.name for path in artifact.folder.iterdir()} == {file.path for file in artifact.files}
    assert set(board.runs.values()) <= {1}
    return board


OF_EACH_KIND: dict[str, dict[str, Any]] = {
    **{title: {} for title in ("linear", "ties", "ties-paper", "dare_ties", "della", "darex", "graft", "pcb")},
    **{title: {} for title in ("widen", "iso_c", "half_reset", "model_stock")},
    **{title: {"scope": "model"} for title in ("geometric_median", "breadcrumbs")},
}
"""Every way to measure and to merge."""


@pytest.mark.parametrize("title", OF_EACH_KIND)
def test_the_files_of_a_shared_merge_are_those_of_the_plain_one(models: Path, tmp_path: Path, title: str) -> None:
    recipe = Recipe.from_data(method_recipe(title, **OF_EACH_KIND[title]))
    board = assert_sharing_changes_nothing(recipe, models, tmp_path, assistants=2, max_shard_size=12_000)
    assert board.by["leader"] and sum(board.by.values()) > board.by["leader"]
    assert any(phase.startswith("merging") for phase, _ in board.runs)


@pytest.mark.parametrize("form", FORMS)
def test_every_stage_of_a_whole_model_is_a_phase(models: Path, tmp_path: Path, form: str) -> None:
    recipe = Recipe.from_data(method_recipe("ties-model-rescaled"))
    with kernels_in(form):
        board = assert_sharing_changes_nothing(recipe, models, tmp_path)
    phases = {phase.partition(":")[0] for phase, _ in board.runs if phase.startswith("measuring")}
    assert len(phases) >= 3


def of_documents(models: Path) -> Any:
    stage = method_recipe("ties", name="one", dtype="bfloat16")
    return [stage, method_recipe("task_arithmetic", models=[{"model": "one"}, {"model": "m2"}])]


def of_adapters(models: Path) -> Any:
    write_adapter(models / "adapter", THREE | EMBEDDING)
    return method_recipe("ties-model", models=[{"model": "base+adapter"}, {"model": "m1"}, {"model": "m2"}])


def of_other_formats(models: Path) -> Any:
    write_checkpoint(models / "m1", mixed_tensors(2, torch.float16), config=CONFIG)
    return method_recipe("ties-paper", out_dtype="float16")


def of_patches(models: Path) -> Any:
    outputs = {"kind": "delta", "encoding": "dense"}
    delta = {"merge_method": "passthrough", "base_model": "base", "models": [{"model": "m0"}], "outputs": outputs}
    merge(Recipe.from_data(delta), models / "patch", roots=[models])
    return method_recipe("ties", patches=[{"patch": "patch", "strength": 0.5}], outputs={"reversible": True})


@pytest.mark.parametrize("make", [of_documents, of_adapters, of_other_formats, of_patches])
def test_whatever_the_models_are(models: Path, tmp_path: Path, make: Callable[[Path], Any]) -> None:
    for file in (models / "m1").glob("*") if make is of_other_formats else ():
        file.unlink()
    board = assert_sharing_changes_nothing(Recipe.from_data(make(models)), models, tmp_path)
    assert board.by["assistant 0"]


def a_delta(models: Path) -> Any:
    return {"merge_method": "passthrough", "models": [{"model": "m0"}], "base_model": "base", "outputs": "delta"}


def a_whole_model_below(models: Path) -> Any:
    stage = method_recipe("ties-model", name="one")
    return [stage, method_recipe("task_arithmetic", models=[{"model": "one"}, {"model": "m2"}])]


@pytest.mark.parametrize("make", [a_delta, a_whole_model_below])
def test_what_cannot_be_cut_is_done_alone(models: Path, tmp_path: Path, make: Callable[[Path], Any]) -> None:
    board = assert_sharing_changes_nothing(Recipe.from_data(make(models)), models, tmp_path)
    assert not board.runs


def test_a_small_merge_is_one_unit(models: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_data(method_recipe("ties-model"))
    _, board = shared(recipe, models, tmp_path / "out", board=Board(random.Random(1), unit_bytes=2**20))
    assert not board.runs


@pytest.mark.parametrize("unit_bytes", [None, 1, 1500, 10**9])
@pytest.mark.parametrize("shard_bytes", [3000, 10**9])
def test_units_are_the_output_once_and_in_order(models: Path, unit_bytes: int | None, shard_bytes: int) -> None:
    from merge_core.merge import plan_only

    recipe = Recipe.from_data(method_recipe("linear", outputs={"max_shard_size": shard_bytes}))
    plan = plan_only(recipe, roots=[models])
    units = cut_output(plan.shards, unit_bytes)
    assert [unit.number for unit in units] == list(range(len(units)))
    assert [slot for unit in units for slot in unit.slots] == [slot for shard in plan.shards for slot in shard.slots]
    for unit in units:
        assert [slot.name for slot in unit.slots if slot not in unit.shard.slots] == []
        assert unit_bytes is None or unit.slots[-1].begin - unit.begin < unit_bytes or len(unit.slots) == 1


@pytest.mark.parametrize(("title", "seed"), [("linear", 0), ("ties", 1), ("ties-model", 2), ("ties-model", 3)])
def test_workers_that_die_at_any_moment_cost_a_unit_each(models: Path, tmp_path: Path, title: str, seed: int) -> None:
    """Leaders and assistants are killed again and again; others go on with what is there."""
    chance = random.Random(seed)
    recipe = Recipe.from_data(method_recipe(title))
    plain = merge(recipe, tmp_path / "plain", roots=[models], max_shard_size=12_000)
    board = Board(chance)
    partial, out = tmp_path / ".out.partial", tmp_path / "out"
    deaths = [0]

    def dies_after(steps: int) -> Callable[[], bool]:
        left = [steps]

        def die() -> bool:
            left[0] -= 1
            return left[0] < 0

        return die

    def take_part(number: int) -> None:
        while not board.is_over:
            deaths[0] += 1
            name = f"assistant {number}.{deaths[0]}"
            try:
                share = Shared(board, name, die=dies_after(chance.randrange(40)))
                assist(recipe, partial, share, roots=[models], threads=1, max_shard_size=12_000)
            except Killed:
                board.give_back(name)

    assistant = threading.Thread(target=take_part, args=(0,))
    assistant.start()
    try:
        for attempt in range(1000):
            deaths[0] += 1
            name = f"leader {attempt}"
            try:
                lives = chance.randrange(12, 40) + attempt
                leader = Shared(board, name, leads=True, die=dies_after(lives))
                artifact = merge(
                    recipe, out, roots=[models], share=leader, partial=partial, threads=1, max_shard_size=12_000
                )
                break
            except Killed:
                board.give_back(name)
    finally:
        board.is_over = True
        assistant.join()

    assert files_of(artifact) == files_of(plain)
    assert sum(board.runs.values()) - len(board.runs) <= deaths[0]


def test_what_an_assistant_wrote_is_proved_and_made_again(models: Path, tmp_path: Path) -> None:
    """A assistant whose memory, disk or network changes what it wrote costs time and never a wrong weight."""
    recipe = Recipe.from_data(method_recipe("ties-model"))
    plain = merge(recipe, tmp_path / "plain", roots=[models])
    board = Board(random.Random(1), is_for_all=True)
    spoiled = []

    class Spoiling(Shared):
        def done(self, phase: str, number: int, result: Result) -> None:
            if len(spoiled) < 20 and not self.leads:
                spoiled.append((phase, number))
                lie = {"statistics": "0" * 64, "tensors": dict.fromkeys(result.get("tensors", {}), "0" * 64)}
                result = {**result, **{key: lie[key] for key in lie if key in result}}
            super().done(phase, number, result)

    partial = tmp_path / ".out.partial"

    def take_part() -> None:
        assist(recipe, partial, Spoiling(board, "assistant"), roots=[models], threads=1)

    assistant = threading.Thread(target=take_part)
    assistant.start()
    try:
        leader = Shared(board, "leader", leads=True)
        artifact = merge(recipe, tmp_path / "out", roots=[models], share=leader)
    finally:
        board.is_over = True
        assistant.join()
    assert files_of(artifact) == files_of(plain)
    assert spoiled and all(board.runs[unit] > 1 for unit in spoiled)


def test_progress_counts_what_all_have_done(models: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    phases: list[str] = []
    finished: list[tuple[int, int]] = []

    def watch(progress: Progress) -> None:
        seen.append((progress.tensors_done, progress.bytes_read, progress.bytes_written))
        phases.append(progress.phase.partition(":")[0])
        finished[:] = progress.finished.runs()
        assert 0 <= progress.fraction <= 1

    recipe = Recipe.from_data(method_recipe("ties-model"))
    shared(recipe, models, tmp_path / "out", report=watch)
    assert seen == sorted(seen) and finished == [(0, 20)]
    assert seen[-1][0] == 20 and list(dict.fromkeys(phases)) == ["measuring", "merging", "finishing"]


def test_what_an_assistant_cannot_do_whoever_leads_tells(models: Path, tmp_path: Path) -> None:
    broken = mixed_tensors(1)
    broken["model.norm.weight"][3] = float("nan")
    write_checkpoint(models / "m0", broken, shards=2, config=CONFIG)
    recipe = Recipe.from_data(method_recipe("linear"))
    board = Board(random.Random(1))
    partial = tmp_path / ".out.partial"
    failed: list[BaseException] = []

    def take_part() -> None:
        try:
            assist(recipe, partial, Shared(board, "assistant"), roots=[models], threads=1)
        except NonFinite as error:
            failed.append(error)
            board.give_back("assistant")

    assistant = threading.Thread(target=take_part)
    assistant.start()
    with pytest.raises(NonFinite, match=r"model\.norm\.weight of m0 holds NaN"):
        merge(recipe, tmp_path / "out", roots=[models], share=Shared(board, "leader", leads=True))
    board.is_over = True
    assistant.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def numbers(shape: tuple[int, ...], seed: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()


def observed(names: list[str], worker: int, seed: int) -> dict[str, Statistic]:
    """What a worker may have found in some tensors: one of every statistic."""
    chance = random.Random(seed * 7 + worker)
    found: dict[str, Statistic] = {
        "\0counts": Counts(torch.randint(0, 9, (3, 50), generator=torch.Generator().manual_seed(worker)).numpy()),
        "largest / é": Largest(torch.randint(0, 99, (4,), generator=torch.Generator().manual_seed(worker)).numpy()),
    }
    sums, rows = GrainSums(), RowValues()
    for i, name in enumerate(names):
        grains = list(range(1 + (seed + i) % 9))
        chance.shuffle(grains)
        for grain in grains:
            sums.put(name, len(grains), grain, numbers((2,), grain + 100 * i))
        rows.put(name, 5, worker % 5, numbers((1, 3), i))
    return found | ({"sums": sums, "rows": rows} if names else {})


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 4), st.randoms(use_true_random=False))
def test_statistics_that_cross_workers_add_up_to_the_same_bits(
    seed: int, tensors: int, workers: int, chance: random.Random
) -> None:
    names = [f"layers.{i}.w é \0" for i in range(tensors)]
    of = {worker: [name for i, name in enumerate(names) if i % workers == worker] for worker in range(workers)}

    def total(parts: list[dict[str, Statistic]]) -> tuple[bytes, dict[str, Any]]:
        whole: dict[str, Statistic] = {}
        for part in parts:
            add_up(whole, part)
        sums, rows = whole["sums"], whole["rows"]
        assert isinstance(sums, GrainSums) and isinstance(rows, RowValues)
        arrays = {name: whole[name].to_arrays()["values"].tolist() for name in ("\0counts", "largest / é")}
        values = {name: rows.rows[name].tobytes() for name in sorted(rows.rows)}
        return sums.total().tobytes(), arrays | values

    here = total([observed(of[worker], worker, seed) for worker in of])
    crossed = [load_statistics(save_statistics(observed(of[worker], worker, seed))) for worker in of]
    chance.shuffle(crossed)
    assert total(crossed) == here
