"""Calibrations of tiny models of transformers: what is learned is what the merge then has, and what cannot be done is
told in words.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge_core.calibration.document import Calibration
from merge_core.calibration.run import calibrate
from merge_core.errors import CalibrationFailed, Canceled, WeightsmithError
from merge_core.merge import merge
from merge_core.progress import Progress
from merge_core.recipe import Recipe
from tests.workers.test_model_evaluators import WORDS, write_world
from workers.calibrating import TransformersModels, check_models
from workers.evaluators.data import Shelves
from workers.settings import Settings


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"))


def write_models(folder: Path) -> Path:
    """Models of each kind, and two that were made of each of them; nothing is trained, so all are told apart."""
    write_world(folder)
    for kind in ("lm", "texts", "images"):
        for number in (0, 1):
            place = folder / f"{kind}-{number}"
            shutil.copytree(folder / kind, place)
            generator = torch.Generator().manual_seed(number)
            tensors = {
                name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
                for name, tensor in load_file(place / "model.safetensors").items()
            }
            save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    # A classifier with a head of its own, and an adapter.
    place = folder / "topics"
    shutil.copytree(folder / "texts-1", place)
    tensors = load_file(place / "model.safetensors")
    tensors |= {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3)}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    names = {str(i): f"topic {i}" for i in range(3)}
    config |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    (place / "config.json").write_text(json.dumps(config))
    rows = [{"text": " ".join(WORDS[i : i + 4]), "label": f"topic {i}"} for i in range(3)]
    (folder / "topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_adapter(folder / "adapter")
    # Language models whose head is their embedding.
    for name in ("tied", "tied-0", "tied-1"):
        shutil.copytree(folder / name.replace("tied", "lm"), folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        tensors = load_file(folder / name / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    for number in (0, 1):
        rows = [{"text": " ".join(WORDS[i : i + 5 + number]), "label": i % 3} for i in range(6)]
        (folder / f"rows-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_images(folder)
    return folder


def write_adapter(folder: Path) -> None:
    folder.mkdir()
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{module}.lora_A.weight": torch.randn(2, 16), f"{module}.lora_B.weight": 0.1 * torch.randn(32, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_images(folder: Path) -> None:
    from PIL import Image

    rows = []
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 30, 200 - 50 * i)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": ["cats", "dogs", "none"][i % 3]})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def document(method: str, kind: str = "lm", *, recipe: Any = {}, **keys: Any) -> Any:  # noqa: B006
    data = [{"model": f"{kind}-{i}", "file": f"rows-{i}.jsonl"} for i in (0, 1)]
    tasks = {"texts": "text_classification", "images": "image_classification"}
    task = tasks.get(kind, "language_model")
    base = {} if method == "learned_soup" else {"base_model": kind}
    calibrate = {"method": method, "task": task, "data": data, "context": 8} | keys
    return {
        "merge_method": method,
        **base,
        "models": [{"model": f"{kind}-{i}"} for i in (0, 1)],
        "calibrate": calibrate,
        **recipe,
    }


class Worker:
    """Does what a worker does with a document."""

    def __init__(self, world: Path, tmp_path: Path) -> None:
        self.world, self.folder = world, tmp_path
        self.settings = Settings(data=tmp_path / "data", model_roots=[world], threads=1)
        store: Any = SimpleNamespace(settings=self.settings)
        self.shelves = Shelves(store, "ann", self.settings.roots)
        self.told: list[tuple[str, int, int]] = []
        self.made = 0

    def run(self, written: Any, *, out: str | None = None, stop: Callable[[], bool] = lambda: False) -> Path:
        asked = Calibration.from_data(written)
        check_models(asked, self.shelves)
        self.made += 1
        target = self.folder / (out or f"out-{self.made}")

        def report(progress: Progress) -> None:
            self.told.append((progress.phase, progress.steps_done, progress.steps_total))

        models = TransformersModels(asked, self.shelves)
        calibrate(asked, target, models=models, roots=self.settings.roots, threads=1, report=report, stop=stop)
        return target

    def applied(self, found: Path) -> Path:
        """The recipe that was found, merged as anybody would."""
        roots = self.folder / "roots"
        (roots / "calibrated").mkdir(parents=True, exist_ok=True)
        for file in found.glob("coefficients-*"):
            shutil.copy(file, roots / "calibrated")
        recipe = Recipe.from_text((found / "recipe.yml").read_text())
        self.made += 1
        return merge(recipe, self.folder / f"merged-{self.made}", roots=[self.world, roots], threads=1).folder


@pytest.fixture
def worker(world: Path, tmp_path: Path) -> Worker:
    return Worker(world, tmp_path)


CASES: dict[str, Any] = {
    "expert merging": document("expert_merging", accumulate=2, epochs=2),
    "expert merging ++": document("expert_merging", accumulate=2, epochs=2, chunks=2.0, hidden_weight=0),
    "atlas": document("atlas", epochs=3, rate=0.05, batch=3),
    "atlas x3 of texts": document("atlas", "texts", epochs=3, rate=0.05, partitions=3),
    "atlas of tied embeddings": document("atlas", "tied", epochs=3, rate=0.05, batch=3),
    "adamerging of texts": document("adamerging", "texts", steps=6, rate=0.05),
    "adamerging per model": document("adamerging", steps=6, rate=0.05, per="model"),
    "learned soup of images": document(
        "learned_soup", "images", epochs=3, data=[{"file": "pictures.jsonl"}], batch=2, merge=True
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_learned_lowers_the_loss_and_is_what_the_recipe_merges(worker: Worker, case: str) -> None:
    asked = CASES[case] | {"dtype": "float32"}
    found = worker.run(asked)
    report = json.loads((found / "calibration.json").read_text())
    assert report["method"] == asked["calibrate"]["method"] and report["version"] == 1
    points = report["curves"][-1]["points"]
    assert [point["step"] for point in points] == list(range(report["steps"]))
    losses = [point["loss"] for point in points]
    assert sum(losses[-2:]) < sum(losses[:2]), losses

    by_name = {each["tensor"]: each["coefficients"] for each in report["tensors"]}
    merged = load_file(worker.applied(found) / "model.safetensors")
    kind = asked["models"][0]["model"].rpartition("-")[0]
    base, *models = (load_file(worker.world / name / "model.safetensors") for name in (kind, f"{kind}-0", f"{kind}-1"))
    singles = [name for name, coefficients in by_name.items() if len(coefficients[0]) == 1]
    assert by_name.keys() <= merged.keys() and (singles or "x3" in case)
    for name in singles:
        mine = [coefficients[0] for coefficients in by_name[name]]
        expected = sum(c * (m[name] - base[name]) for c, m in zip(mine, models, strict=True)) + base[name]
        if asked["merge_method"] == "learned_soup":
            expected = sum(c * m[name] for c, m in zip(mine, models, strict=True))
            assert sum(mine) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-5)
    if case == "expert merging":
        assert not any("norm" in name or "embed" in name for name in by_name)
        assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])
    if asked["calibrate"].get("merge"):
        assert torch.equal(load_file(found / "model.safetensors")["classifier.weight"], merged["classifier.weight"])
        assert {file.name for file in found.iterdir()} >= {"merge.lock.json", "recipe.yml", "config.json"}


def test_a_merge_that_runs_is_what_its_recipe_makes(worker: Worker) -> None:
    """Chunks and random parts too: the best loss on what is held out is that of the merged files."""
    both: list[Any] = [{"method": "atlas", "partitions": 4}, {"method": "expert_merging", "chunks": 3.0, "anchor": 0}]
    for keys in both:
        asked = document(
            **keys, epochs=2, every=5, rate=0.2, data=[{"file": "rows-0.jsonl"}], check=[{"file": "rows-1.jsonl"}]
        )
        found = worker.run(asked | {"dtype": "float32"})
        report = json.loads((found / "calibration.json").read_text())
        best = next(p for p in report["curves"][-1]["points"] if p["step"] == report["best_step"])
        measured = TransformersModels(Calibration.from_data(asked), worker.shelves)
        folder = worker.applied(found)
        with measured.working(), torch.no_grad():
            module = measured.load(folder)
            (group,) = measured.groups(folder, [], check=True)
            losses = []
            for batch in group.batches:
                logits = measured.run(module, batch).logits[:, :-1]
                assert batch.labels is not None
                losses.append(torch.nn.functional.cross_entropy(logits[0], batch.labels[0, 1:]).item())
        assert sum(losses) / len(losses) == pytest.approx(best["labels"], rel=1e-5)


def test_the_same_document_gives_the_same_bytes_also_after_a_kill(worker: Worker, monkeypatch: Any) -> None:
    asked = document("expert_merging", accumulate=1, check=[{"file": "rows-0.jsonl", "samples": 2}], compare=[0.3])
    whole = worker.run(asked)
    report = json.loads((whole / "calibration.json").read_text())
    assert [line["name"] for line in report["lines"]] == ["task arithmetic at 0.3"]
    assert [curve["name"] for curve in report["curves"]] == ["training", "check"]
    assert report["best_step"] is not None and {"labels", "rows-0.jsonl"} <= report["curves"][1]["points"][0].keys()
    phases = list(dict.fromkeys(phase for phase, _, _ in worker.told))
    assert phases == ["reading data", "teachers", "training", "finishing"]
    assert ("teachers", 14, 24) in worker.told and ("training", 24, 24) in worker.told

    monkeypatch.setattr("merge_core.calibration.training._SAVED_AFTER", 0.0)
    worker.told.clear()

    def dies() -> bool:
        if ("training", 20, 24) in worker.told:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        worker.run(asked, out="again", stop=dies)
    worker.told.clear()
    again = worker.run(asked, out="again")
    done = [step for phase, step, _ in worker.told if phase == "training"]
    assert done[0] == 20 and not any(phase == "teachers" and 0 < step < 14 for phase, step, _ in worker.told)
    for name in ("coefficients-0.safetensors", "coefficients-1.safetensors", "recipe.yml", "calibration.json"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()


def test_each_expert_may_have_a_head_of_its_own(worker: Worker) -> None:
    data = [{"model": "texts-0", "file": "rows-0.jsonl"}, {"model": "topics", "file": "topics.jsonl"}]
    recipe = {"models": [{"model": "texts-0"}, {"model": "topics"}], "exclude": ["classifier"], "dtype": "float32"}
    asked = document("atlas", "texts", data=data, heads=["classifier"], epochs=4, rate=0.05, recipe=recipe)
    found = worker.run(asked)
    report = json.loads((found / "calibration.json").read_text())
    points = report["curves"][0]["points"]
    assert points[-1]["loss"] < points[0]["loss"] and {"on texts-0", "on topics"} <= points[0].keys()
    assert not any("classifier" in each["tensor"] for each in report["tensors"])
    # At first nothing is added: the loss is the base's, with the head of each expert.
    base, first = (load_file(worker.world / name / "model.safetensors") for name in ("texts", "topics"))
    measured = TransformersModels(Calibration.from_data(asked), worker.shelves)
    places = [worker.world / name for name in ("texts-0", "topics")]
    with measured.working(), torch.no_grad():
        module = measured.load(worker.world / "topics")
        headless = {name: tensor for name, tensor in base.items() if "classifier" not in name}
        module.load_state_dict(headless | {name: first[name] for name in first.keys() - headless.keys()})
        batch = measured.groups(worker.world / "texts", places, check=False)[1].batches[0]
        assert batch.labels is not None and batch.labels.tolist() == [0]
        logits = measured.run(module, batch).logits
    expected = torch.nn.functional.cross_entropy(logits, batch.labels).item()
    assert points[0]["on topics"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(WeightsmithError, match="say which model"):
        worker.run(document("atlas", "texts", data=[*data[:1], {"file": "topics.jsonl"}], heads=["classifier"]))


def test_a_model_with_an_adapter_is_made_first(worker: Worker) -> None:
    recipe = {"models": [{"model": "lm+adapter"}, {"model": "lm-1"}], "dtype": "float32"}
    data = [{"model": "lm+adapter", "file": "rows-0.jsonl", "samples": 2}]
    found = worker.run(document("expert_merging", data=data, anchor=0, accumulate=1, epochs=4, recipe=recipe))
    report = json.loads((found / "calibration.json").read_text())
    (up,) = [e["coefficients"] for e in report["tensors"] if e["tensor"].endswith("up_proj.weight")]
    assert up[0][0] > 0.1 and "fetching: lm+adapter" in {phase for phase, _, _ in worker.told}
    # What the adapter does not change has no gradient.
    (down,) = [e["coefficients"] for e in report["tensors"] if e["tensor"].endswith("down_proj.weight")]
    assert down[0][0] == pytest.approx(0.1, abs=1e-3) and down[1][0] < 0.1


def test_a_cancel_is_heard(worker: Worker) -> None:
    with pytest.raises(Canceled):
        worker.run(document("atlas"), stop=lambda: ("training", 2, 120) in worker.told)
    assert not list(worker.folder.glob("out-*"))


@pytest.mark.parametrize(
    ("written", "pointer", "words"),
    [
        (document("atlas", data=[{"file": "no.jsonl"}]), "#/calibrate/data/0/file", "in none of"),
        (document("atlas", data=[{"file": "rows-0.jsonl", "model": "lm"}]), "#/calibrate/data/0/model", "is none of"),
        (document("atlas", rate=-1), "#/calibrate/rate", "greater than 0"),
        (document("atlas", parttions=3), "#/calibrate/parttions", "did you mean partitions?"),
        (document("atlas", recipe={"merge_method": "ties"}), "#/merge_method", "write merge_method: atlas"),
        (document("atlas") | {"calibrate": {"data": []}}, "#/calibrate/method", "one of adamerging"),
        (document("atlas") | {"calibrate": {"method": "atlass"}}, "#/calibrate/method", "did you mean atlas?"),
        (document("atlas", every=3), "#/calibrate/every", "nothing is held out"),
        (document("atlas", task="text_classification"), "#/calibrate/task", "LlamaForCausalLM"),
        (document("learned_soup", recipe={"base_model": "lm"}), "#/base_model", "has no base"),
        (document("atlas", recipe={"alignment": {}}), "#/alignment", "align the models first"),
        (document("atlas", place="/etc"), "#/calibrate/place", "match pattern"),
        (document("atlas", batch=1024, context=32, recipe={"limits": {"memory": "600MiB"}}), "#/limits/memory", "MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_with_its_place(worker: Worker, written: Any, pointer: str, words: str) -> None:
    with pytest.raises(WeightsmithError) as refused:
        worker.run(written)
    found = [each.pointer for each in refused.value.problems if words in str(each)]
    assert found[:1] == [pointer], refused.value


def broken(world: Path, folder: Path, what: str) -> Path:
    """The same world, with one thing that is wrong."""
    shutil.copytree(world, folder)
    if what == "no tokenizer":
        for file in folder.glob("lm*/tokenizer*"):
            file.unlink()
    if what == "no config":
        (folder / "lm-1" / "config.json").unlink()
    if what == "no samples":
        (folder / "rows-0.jsonl").write_text("\n" * 3)
    if what == "no text":
        (folder / "rows-0.jsonl").write_text('{"words": "a"}\n')
    if what == "no head":
        for name in ("lm", "lm-0", "lm-1"):
            config = json.loads((folder / name / "config.json").read_text())
            (folder / name / "config.json").write_text(json.dumps(config | {"architectures": None}))
            tensors = load_file(folder / name / "model.safetensors")
            del tensors["lm_head.weight"]
            save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no tokenizer", "lm has no tokenizer"),
        ("no config", "lm-1 has no config.json"),
        ("no samples", "rows-0.jsonl has no samples"),
        ("no text", "line 1: there is no field 'text'; it has 'words'"),
        ("no head", "lacks lm_head.weight, which a LlamaForCausalLM needs"),
    ],
)
def test_what_only_files_tell_fails_with_words(world: Path, tmp_path: Path, what: str, words: str) -> None:
    worker = Worker(broken(world, tmp_path / "world", what), tmp_path)
    with pytest.raises(WeightsmithError, match=words):
        worker.run(document("atlas"))


def test_labels_that_are_missing_are_asked_for(worker: Worker, tmp_path: Path) -> None:
    (worker.world / "unlabelled.jsonl").write_text('{"text": "the cat"}\n')
    data = [{"file": "unlabelled.jsonl"}]
    with pytest.raises(CalibrationFailed, match="no field 'label'"):
        worker.run(document("atlas", "texts", data=data))
    worker.run(document("atlas", "texts", data=data, minimize="entropy", epochs=1))


def test_documents_come_back_as_they_were() -> None:
    written = document("expert_merging", chunks=1.2)
    found = Calibration.from_text(yaml.safe_dump(written))
    assert Calibration.from_data(found.to_data()).to_data() == written
    with pytest.raises(WeightsmithError, match="a job of its own kind"):
        Recipe.from_data(written)
