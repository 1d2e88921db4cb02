"""Searches: the same trials whoever makes them and however often they are begun, and never one twice."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from merge_core.coefficients.greedy_soup import greedy_soup
from merge_core.coefficients.pareto import front
from merge_core.coefficients.spaces import Range
from merge_core.coefficients.strategies import Scored, Strategy, sampled
from merge_core.errors import Canceled, EvaluationFailed, RecipeError
from merge_core.merge import merge
from merge_core.merged import MergedWeights
from merge_core.recipe import Recipe
from merge_core.search.document import Search
from merge_core.search.plan import plan_search
from merge_core.search.run import REPORT_NAME, assist, search
from merge_core.search.together import merge_together
from merge_core.search.trials import Candidate, Outcome, Trial, bars_of, checked
from tests.conftest import mixed_tensors, write_checkpoint
from tests.services import sha256_of

TARGET = 0.62
SPACE: dict[str, Any] = {
    "lambda": {"low": 0, "high": 1},
    "weight": {"low": 0.5, "high": 2, "log": True, "per_model": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of zeros, and models whose every number is one of theirs: what is merged is known by one number."""
    folder = tmp_path_factory.mktemp("models")
    for name, value in {"base": 0.0, "one": 1.0, "half": 0.5, "third": 0.3}.items():
        write_checkpoint(folder / name, {"w": torch.full((4, 3), value)})
    return folder


def recipe(**keys: Any) -> dict[str, Any]:
    told = {"method": "tpe", "space": SPACE, "trials": 10, "evaluator": {"command": {"name": "near"}}}
    return {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "one", "parameters": {"weight": 1}}, {"model": "half", "parameters": {"weight": 1}}],
        "search": told | {"metrics": {"near": "maximize"}} | keys,
    }


def soup(**keys: Any) -> dict[str, Any]:
    told = {"method": "greedy_soup", "evaluator": {"command": {"name": "near"}}, "metrics": {"near": "maximize"}}
    names = ("base", "one", "half", "third")
    return {"merge_method": "linear", "models": [{"model": name} for name in names], "search": told | keys}


class Near:
    """Scores how near a candidate is to a number, which its recipe tells, or its weights; counts what it is asked."""

    digest = "near"

    def __init__(self, answer: Callable[[float, Candidate], Any] | None = None, *, reads: bool = False) -> None:
        self.asked: list[str] = []
        self.answer = answer or (lambda value, _: {"near": -abs(value - TARGET)})
        self.needs_folder = reads
        self._counting = threading.Lock()

    def evaluate(self, candidate: Candidate) -> Any:
        with self._counting:
            self.asked.append(candidate.trial.digest)
        if not self.needs_folder:
            return self.answer(value_of(candidate.recipe), candidate)
        assert candidate.folder is not None
        return self.answer(float(load_file(candidate.folder / "model.safetensors")["w"][0, 0]), candidate)


def value_of(recipe: Recipe) -> float:
    """The one number of all weights that a recipe makes."""
    if recipe.stages:
        return value_of(recipe.stages[0])
    weights = [(entry.parameters or recipe.parameters)["weight"].written for entry in recipe.models or ()]
    numbers = [{"base": 0.0, "one": 1.0, "half": 0.5, "third": 0.3}[str(entry.model)] for entry in recipe.models or ()]
    total = sum(weight * number for weight, number in zip(weights, numbers, strict=True))
    return total / sum(weights) if recipe.merge_method == "linear" else recipe.parameters["lambda"].written * total


def run(models: Path, out: Path, document: Any, evaluator: Near | None = None, **how: Any) -> dict[str, Any]:
    search(Search.from_data(document), out, evaluator=evaluator or Near(), roots=[models], threads=1, **how)
    return dict(json.loads((out / REPORT_NAME).read_text()))


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("random", "cma_es")]


@pytest.mark.parametrize("method", ["tpe", "grid", *SLOW])
def test_what_is_found_is_a_recipe_that_makes_what_was_scored(models: Path, tmp_path: Path, method: str) -> None:
    space = {"space": {"lambda": {"low": 0, "high": 1, "step": 0.25}, "weight": {"low": 0.5, "high": 1, "points": 2}}}
    document = recipe(method=method, merge=True, **(space if method == "grid" else {}))
    document["search"]["trials"] = 6
    found = run(models, tmp_path / "out", document, Near(reads=True))

    best = found["trials"][found["best"]]
    assert best["metrics"]["near"] == max(trial["metrics"]["near"] for trial in found["trials"])
    assert len(found["trials"]) == 6
    written = Recipe.from_text((tmp_path / "out" / "recipe.yml").read_text())
    merge(written, tmp_path / "again", roots=[models])
    again, made = (load_file(tmp_path / place / "model.safetensors")["w"] for place in ("again", "out"))
    assert torch.equal(again, made)
    assert -abs(float(made[0, 0]) - TARGET) == best["metrics"]["near"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "merge.lock.json", "mergekit_config.yml", "model.safetensors", "recipe.yml", "search.json")
    ]


class Shared:
    """Units that several threads take, as workers do; each its own view of them."""

    unit_bytes = None

    def __init__(self, workers: int) -> None:
        self.changing, self.open_units, self.finished = threading.Condition(), {}, {}
        self.is_over = False

    def open(self, phase: str, count: int) -> None:
        with self.changing:
            self.open_units.setdefault(phase, list(range(count)))

    def take(self, phase: str) -> int | None:
        with self.changing:
            units = self.open_units.get(phase, [])
            return units.pop() if units else None

    def done(self, phase: str, number: int, result: Mapping[str, Any]) -> None:
        with self.changing:
            self.finished.setdefault(phase, {})[number] = result
            self.changing.notify_all()

    def results(self, phase: str) -> Mapping[int, Any]:
        with self.changing:
            return {unit: result for unit, result in self.finished.get(phase, {}).items() if result}

    def wait(self) -> bool:
        with self.changing:
            self.changing.wait(0.01)
        return not self.is_over

    def forget(self) -> None: ...

    def again(self, phase: str, number: int) -> None: ...

    def prove(self) -> None: ...


class Memory:
    """Trials in memory, for many at once."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}

    def find(self, digests: Sequence[str]) -> Mapping[str, Outcome]:
        return {digest: self.outcomes[digest] for digest in digests if digest in self.outcomes}

    def begin(self, trials: Sequence[Trial]) -> None: ...

    def keep(self, trial: Trial, outcome: Outcome, seconds: float) -> None:
        self.outcomes[trial.digest] = outcome


def test_several_workers_make_the_same_search_as_one(models: Path, tmp_path: Path) -> None:
    alone = run(models, tmp_path / "alone", recipe())
    share, memory, evaluator = Shared(2), Memory(), Near()
    document = Search.from_data(recipe())
    partial = tmp_path / ".shared.partial"
    with ThreadPoolExecutor(1) as pool:
        how: dict[str, Any] = {"evaluator": evaluator, "kept": memory, "roots": [models], "threads": 1}
        partial.mkdir()
        helping = pool.submit(assist, document, partial, share, **how)
        search(document, tmp_path / "shared", partial=partial, share=share, **how)
        share.is_over = True
        helping.result()

    assert json.loads((tmp_path / "shared" / REPORT_NAME).read_text()) == alone
    assert len(evaluator.asked) == len(set(evaluator.asked)) == 10


class Killed(BaseException):
    """What no handler of expected failures sees."""


@pytest.mark.parametrize("after", [0, 3, 9])
def test_who_goes_on_makes_no_trial_again(models: Path, tmp_path: Path, after: int) -> None:
    whole = run(models, tmp_path / "whole", recipe())
    first, second = Near(), Near()

    def dies(value: float, candidate: Candidate) -> Any:
        if len(first.asked) > after:
            raise Killed
        return {"near": -abs(value - TARGET)}

    first.answer = dies
    with pytest.raises(Killed):
        run(models, tmp_path / "out", recipe(), first)
    assert run(models, tmp_path / "out", recipe(), second) == whole
    assert not set(first.asked[:after]) & set(second.asked)
    assert len(first.asked) + len(second.asked) == 10 + 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 1}},
    "ties over the model": {"merge_method": "ties", "scope": "model", "base_model": "base"},
}


@pytest.mark.parametrize("name", METHODS)
def test_candidates_made_side_by_side_are_those_made_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for seed, model in enumerate(["base", "m0", "m1"]):
        write_checkpoint(tmp_path / model, mixed_tensors(seed), shards=2, config={"model_type": "llama"})
    order: list[tuple[str, str]] = []
    make = MergedWeights.make

    def noted(self: MergedWeights, step: Any, *more: Any) -> Any:
        order.append((self.plan.digest, step.name))
        return make(self, step, *more)

    monkeypatch.setattr(MergedWeights, "make", noted)
    recipes = []
    for number in (0.2, 0.5, 0.9):
        models = [{"model": model, "parameters": {"weight": number}} for model in ("m0", "m1")]
        parameters = {"density": number} if "ties" in name else {"normalize": False}
        shards = {"outputs": {"max_shard_size": 9000}}
        recipes.append(Recipe.from_data(METHODS[name] | shards | {"models": models, "parameters": parameters}))
    folders = [tmp_path / f"candidate-{i}" for i in range(3)]
    how: dict[str, Any] = {"roots": [tmp_path], "threads": 2, "stop": lambda: False}
    merge_together(recipes, folders, memory=2**30, **how)

    digests = list(dict.fromkeys(digest for digest, _ in order))
    assert len(digests) == 3
    done = dict.fromkeys(digests, 0)
    for digest, _ in order:  # nobody is further ahead of another than its threads compute ahead
        done[digest] += 1
        assert max(done.values()) - min(done.values()) <= 5
    for i, (recipe, folder) in enumerate(zip(recipes, folders, strict=True)):
        merge(recipe, tmp_path / f"alone-{i}", roots=[tmp_path])
        alone = sha256_of(tmp_path / f"alone-{i}")
        mine = {path.name: path for path in folder.iterdir() if path.is_file()}
        assert {*mine} == {*alone} - {"README.md", "merge.lock.json", "mergekit_config.yml"}
        assert {file: alone[file] for file in mine} == sha256_of_files(mine)


def sha256_of_files(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


@given(st.lists(st.integers(0, 5), min_size=15, max_size=15), st.sampled_from(["gt", "ge"]))
def test_a_greedy_soup_is_the_authors(scores: list[int], accept: Any) -> None:
    """The document's strategy asks what the function asks, and comes to the same soup."""

    def score(chosen: Sequence[int]) -> float:
        return float(scores[sum(2**number for number in chosen) - 1])

    asked: list[tuple[int, ...]] = []
    strategy = Search.from_data(soup(accept=accept)).strategy()
    answer = None
    while True:
        try:
            values = next(strategy) if answer is None else strategy.send(answer)
        except StopIteration:
            break
        asked += [tuple(each["models"]) for each in values]
        answer = [Scored((score(each["models"]),)) for each in values]
    expected: list[tuple[int, ...]] = []
    found = greedy_soup(4, lambda chosen: expected.append(tuple(chosen)) or score(chosen), accept=accept)
    assert asked == expected
    assert found.ingredients[0] == max(range(4), key=lambda number: (score([number]), number))


def test_a_greedy_soup_is_an_ordinary_recipe(models: Path, tmp_path: Path) -> None:
    found = run(models, tmp_path / "out", soup(), Near(reads=True))
    # 0.62 is nearest to 0.5, then come 1 → 0.75 is further; 0.3 → 0.4 is further; 0 → 0.25 is further
    assert found["trials"][found["best"]]["values"] == {"models": [2]}
    found = run(
        models, tmp_path / "small", soup(metrics={"far": "minimize"}), Near(lambda v, _: {"far": abs(v - 0.75)})
    )
    assert found["trials"][found["best"]]["values"] == {"models": [2, 1]}
    written = yaml.safe_load((tmp_path / "small" / "recipe.yml").read_text())
    assert written == {
        "merge_method": "linear",
        "models": [{"model": "half"}, {"model": "one"}],
        "parameters": {"weight": 1},
    }


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"near": "good"}, '\'near\' is not a finite number; the evaluator answered {"near": "good"}'),
        ({"near": float("nan")}, "'near' is not a finite number"),
        ({"near": float("inf")}, "'near' is not a finite number"),
        ({"near": True}, "'near' is not a finite number"),
        ({"near": None}, "'near' is not a finite number"),
        ({"far": 1}, "there is no 'near' among the metrics; the evaluator answered {\"far\": 1}"),
        ([1], "metrics are a mapping of names to numbers; the evaluator answered [1]"),
        ("x" * 1000, "metrics are a mapping"),
    ],
)
def test_what_is_no_score_is_told(answer: Any, said: str) -> None:
    with pytest.raises(EvaluationFailed) as failed:
        checked(answer, {"near": "maximize"}, Trial(5, {"lambda": 0.5}, "digest"))
    assert said in str(failed.value) and str(failed.value).startswith("trial 5 (lambda = 0.5): ")
    assert len(str(failed.value)) < 400


def test_a_bad_evaluator_loses_no_trial(models: Path, tmp_path: Path) -> None:
    evaluator, memory = Near(), Memory()
    evaluator.answer = lambda value, _: {"near": "good" if len(evaluator.asked) == 6 else -abs(value - TARGET)}
    with pytest.raises(EvaluationFailed, match="trial 5 "):
        run(models, tmp_path / "out", recipe(), evaluator, kept=memory)
    assert len(memory.outcomes) == 5 and list(tmp_path.iterdir()) == []
    assert run(models, tmp_path / "out", recipe(), evaluator, kept=memory) == run(models, tmp_path / "whole", recipe())
    assert len(evaluator.asked) == 11


def test_trials_are_known_by_what_they_are(models: Path, tmp_path: Path) -> None:
    """Another search, with other keys, asks for none that was made; another version of the evaluator for all."""
    memory, evaluator = Memory(), Near()
    grid = {"method": "grid", "trials": None, "space": {"lambda": {"low": 0, "high": 1, "points": 3}}}
    run(models, tmp_path / "a", recipe(**grid), evaluator, kept=memory)
    assert len(evaluator.asked) == 3
    wider = grid | {"space": {"lambda": {"low": 0, "high": 1, "points": 5}}, "together": 2, "merge": True}
    run(models, tmp_path / "b", recipe(**wider), evaluator, kept=memory)
    assert len(evaluator.asked) == 5
    newer = grid | {"evaluator": {"command": {"name": "near"}, "version": "2"}}
    run(models, tmp_path / "c", recipe(**newer), evaluator, kept=memory)
    assert len(evaluator.asked) == 8


def test_several_metrics_have_a_front(models: Path, tmp_path: Path) -> None:
    metrics = {"near": "maximize", "size": "minimize"}
    grid = {"method": "grid", "trials": None, "space": {"lambda": {"low": 0, "high": 1, "points": 11}}}
    evaluator = Near(lambda value, _: {"near": -abs(value - TARGET), "size": value, "beside": 1, "text": "left away"})
    found = run(models, tmp_path / "out", recipe(metrics=metrics, **grid), evaluator)
    # λ · 1.5 is nearest to 0.62 at 0.4 (0.6); all that are smaller are on the front
    assert found["best"] == 4 and found["front"] == [0, 1, 2, 3, 4]
    assert set(found["trials"][0]["metrics"]) == {"near", "size", "beside"}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_nothing_beats_the_front_and_it_beats_all_others(rows: list[tuple[int, int]]) -> None:
    kept = front(rows)

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one != other and one[0] >= other[0] and one[1] >= other[1]

    assert kept and not any(beats(row, rows[i]) for row in rows for i in kept)
    assert all(any(beats(rows[i], rows[j]) for i in kept) for j in set(range(len(rows))) - set(kept))


def test_a_trial_that_is_worse_than_the_median_is_given_up(models: Path, tmp_path: Path) -> None:
    ended: list[float] = []

    def in_steps(value: float, candidate: Candidate) -> Any:
        score = -abs(value - TARGET)
        candidate.tell(1, score)
        ended.append(score)
        return {"near": score}

    keys = {"method": "tpe", "trials": 16, "prune": True}
    found = run(models, tmp_path / "out", recipe(**keys), Near(in_steps))
    states = [trial["state"] for trial in found["trials"]]
    assert states[:4] == ["done"] * 4 and 0 < states.count("pruned") < 12
    done = [trial for trial in found["trials"] if trial["state"] == "done"]
    assert len(ended) == len(done) and all("metrics" not in t for t in found["trials"] if t["state"] == "pruned")
    bar = bars_of([Outcome("done", {}, {1: value}) for value in (1, 2, 3, 4)], "maximize")
    assert bar == {1: 2} and bars_of([Outcome("done", {}, {1: 1})] * 3, "maximize") == {}


def test_what_cannot_be_planned_is_passed_over(models: Path, tmp_path: Path) -> None:
    """Weights that sum to nothing are no average; the others are."""
    document = soup(method="grid", space={"weight": {"low": 0, "high": 1, "integer": True, "per_model": True}})
    document["models"] = document["models"][1:3]
    plan = plan_search(Search.from_data(document), roots=[models])
    assert "such as weight[0] = 0, weight[1] = 0: parameters: the weights sum to zero" in plan.warnings[-1]
    found = run(models, tmp_path / "out", document)
    assert [trial["state"] for trial in found["trials"]] == ["refused", "done", "done", "done"]
    assert found["trials"][found["best"]]["values"] == {"weight[0]": 0, "weight[1]": 1}


def test_after_its_time_no_trial_begins(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merge_core.search import run as module

    now = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])

    def slowly(value: float, candidate: Candidate) -> Any:
        now[0] += 10
        return {"near": -abs(value - TARGET)}

    found = run(models, tmp_path / "out", recipe(trials=None, seconds=55), Near(slowly))
    assert len(found["trials"]) == 6


def test_a_search_that_is_canceled_leaves_nothing(models: Path, tmp_path: Path) -> None:
    evaluator = Near()
    with pytest.raises(Canceled):
        run(models, tmp_path / "out", recipe(), evaluator, stop=lambda: len(evaluator.asked) > 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["tpe", "cma_es"])
@pytest.mark.parametrize("parallel", [1, 5])
def test_a_sampler_depends_on_what_it_was_sent_alone(method: Any, parallel: int) -> None:
    spaces = {"a": Range(0, 1), "b": Range(1e-3, 1, log=True), "c": Range(1, 5, integer=True)}

    def driven() -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        first = {"a": 0.5, "b": 0.5, "c": 2}
        strategy: Strategy = sampled(method, spaces, ["minimize"], trials=18, parallel=parallel, seed=7, first=first)
        asked = next(strategy)
        while True:
            found += asked
            try:
                asked = strategy.send([Scored(((v["a"] - 0.3) ** 2 + v["b"],) if v["c"] < 5 else None) for v in asked])
            except StopIteration:
                return found

    once = driven()
    assert once == driven() and len(once) == 18 and once[0] == {"a": 0.5, "b": 0.5, "c": 2}
    assert all(space.holds(values[name]) for values in once for name, space in spaces.items())


@pytest.mark.parametrize(
    ("keys", "pointer", "said"),
    [
        ({"method": "tpee"}, "#/search/method", "'greedy_soup', 'grid', 'random', 'tpe' or 'cma_es'"),
        ({"trails": 3}, "#/search/trails", "did you mean trials?"),
        ({"trials": None}, "#/search/trials", "without an end"),
        ({"space": {}}, "#/search/space", "at least one number"),
        ({"space": {"w": {"low": 1, "high": 0}}}, "#/search/space/w", "low comes first"),
        ({"space": {"w": {"low": 1}}}, "#/search/space/w", "give low and high, or choices"),
        ({"space": {"w": {"low": 0, "high": 1, "log": True}}}, "#/search/space/w", "numbers above 0"),
        ({"space": {"w": {"low": True, "high": 1}}}, "#/search/space/w/low", "a truth value"),
        ({"space": {"w": {"low": 0.5, "high": 1, "integer": True}}}, "#/search/space/w", "whole numbers"),
        ({"space": {"w": {"choices": [1, 1]}}}, "#/search/space/w", "listed twice"),
        ({"space": {"w": {"choices": [1], "low": 0}}}, "#/search/space/w", "leave low away"),
        ({"space": {"w": {"low": 0, "high": 1, "at": "parameters/w"}}}, "#/search/space/w/at", "no JSON pointer"),
        (
            {"space": {"w": {"low": 0, "high": 1, "at": "#/models/9/parameters/weight"}}},
            "#/search/space/w/at",
            "no such place",
        ),
        ({"space": {"w": {"low": 0, "high": 1, "at": "s#/parameters/t"}}}, "#/search/space/w/at", "no stage 's'"),
        ({"space": {"w": {"choices": ["a"], "at": "#/models/0/model"}}}, "#/search/space/w/at", "which files are read"),
        (
            {"space": {"w": {"low": 1, "high": 2, "at": "#/search/trials"}}},
            "#/search/space/w/at",
            "nothing to search for",
        ),
        (
            {"space": {"lambda": {"low": 0, "high": 1}, "b": {"low": 0, "high": 1, "at": "#/parameters/lambda"}}},
            "#/search/space/b",
            "is lambda's already",
        ),
        ({"method": "cma_es", "space": {"lambda": {"low": 0, "high": 1}}}, "#/search/method", "two numbers or more"),
        (
            {"method": "grid", "trials": None, "space": {"lambda": {"low": 0, "high": 1, "step": 1e-5}}},
            "#/search/space",
            "100,001 trials",
        ),
        ({"method": "greedy_soup"}, "#/search/space", "leave this away"),
        ({"accept": "ge"}, "#/search/accept", "only a greedy soup"),
        ({"metrics": None}, "#/search/metrics", "which metrics of command count"),
        ({"metrics": {"near": "up"}}, "#/search/metrics/near", "'maximize' or 'minimize'"),
        ({"evaluator": {}}, "#/search/evaluator", "name one evaluator"),
        (
            {"evaluator": {"http": {"url": "https://e"}, "command": {"name": "a"}}},
            "#/search/evaluator",
            "name one evaluator",
        ),
        ({"evaluator": {"command": {"nam": "a"}}}, "#/search/evaluator/command/name", "Field required"),
    ],
)
def test_what_is_wrong_is_told_where(keys: dict[str, Any], pointer: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Search.from_data(recipe(**keys))
    assert any(problem.pointer == pointer and said in problem.detail for problem in refused.value.problems), [
        *refused.value.problems
    ]


def test_a_merge_has_no_search_and_a_search_has_one() -> None:
    with pytest.raises(RecipeError, match="a job of its own kind"):
        Recipe.from_data(recipe())
    with pytest.raises(RecipeError, match="say what is searched for"):
        Search.from_data({key: value for key, value in recipe().items() if key != "search"})
    stage, output = recipe() | {"name": "first"}, recipe() | {"models": [{"model": "first"}]}
    with pytest.raises(RecipeError, match="put it into the output's document"):
        Search.from_data([stage, output])


def test_numbers_of_a_stage_are_searched_for_too(models: Path, tmp_path: Path) -> None:
    document = recipe(
        method="grid", trials=None, space={"λ": {"low": 0, "high": 1, "points": 3, "at": "first#/parameters/lambda"}}
    )
    stage = {key: value for key, value in document.items() if key != "search"} | {"name": "first"}
    output = {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 1}}]}
    documents = [stage, output | {"search": document["search"]}]
    assert Search.from_data(Search.from_data(documents).to_data()).to_data() == Search.from_data(documents).to_data()
    found = run(models, tmp_path / "out", documents)
    assert [trial["metrics"]["near"] for trial in found["trials"]] == pytest.approx([-0.62, -0.13, -0.88])
    assert len(list(yaml.safe_load_all((tmp_path / "out" / "recipe.yml").read_text()))) == 2
