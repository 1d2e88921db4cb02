"""Statistics that are measured with tiny models of transformers, and the merges that they are for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.calibration.tensor_file import TensorFile
from merge_core.errors import CalibrationFailed, WeightsmithError
from merge_core.merge import merge
from merge_core.recipe import Recipe
from tests.workers.test_calibrating import Worker, worker, world

__all__ = ["worker", "world"]


def document(method: str, kind: str = "lm", *, models: Sequence[int] = (0, 1), recipe: Any = {}, **keys: Any) -> Any:  # noqa: B006
    data = [{"model": f"{kind}-{i}", "file": f"rows-{i}.jsonl"} for i in models]
    task = {"lm": "language_model", "texts": "text_classification", "images": "image_classification"}[kind]
    calibrate = {"method": method, "task": task, "data": data, "context": 8} | keys
    listed = [{"model": f"{kind}-{i}"} for i in models]
    return {"merge_method": method, "models": listed, "dtype": "float32", "calibrate": calibrate} | recipe


def one(method: str, kind: str = "lm", **keys: Any) -> Any:
    return document(method, kind, models=(1,), **keys)


def based(kind: str, **keys: Any) -> Any:
    return {"base_model": kind, **keys}


FORGET = {"forget": [{"file": "rows-0.jsonl", "samples": 2}]}
CASES: Mapping[str, Any] = {
    "fisher": document("fisher", recipe={"parameters": {"fisher_floor": 1e-12}}),
    "fisher of texts": document("fisher", "texts", batch=3),
    "fisher of images, empirical": document("fisher", "images", labels="given", data=[{"file": "pictures.jsonl"}]),
    "wise-ft": one("fisher", recipe=based("lm", merge_method="wise_ft"), labels="given"),
    "regmean": document("regmean", batch=3),
    "regmean of texts": document("regmean", "texts", batch=3),
    "eora": one("eora", recipe=based("lm", parameters={"rank": 2}), batch=4),
    "ssd": one("ssd", **FORGET, batch=3),
    "ssd of texts without labels": one("ssd", "texts", **FORGET, without_labels=True),
    "darex analytic": one("darex", recipe=based("lm", parameters={"drop_rate": 0.8}), by="analytic"),
}


def applied(worker: Worker, found: Path, name: str = "applied") -> dict[str, Tensor]:
    """The recipe that was found, merged as anybody would."""
    roots = worker.folder / "roots"
    shutil.copytree(found, roots / "calibrated")
    recipe = Recipe.from_text((found / "recipe.yml").read_text())
    made = merge(recipe, worker.folder / name, roots=[worker.world, roots], threads=1)
    return load_file(made.folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_what_was_measured_is_what_the_recipe_merges_with(worker: Worker, case: str) -> None:
    found = worker.run(CASES[case])
    report = json.loads((found / "calibration.json").read_text())
    merged = applied(worker, found)

    assert report["method"] == CASES[case]["calibrate"]["method"]
    models = [load_file(worker.world / each["model"] / "model.safetensors") for each in CASES[case]["models"]]
    assert merged.keys() == models[0].keys()
    assert all(torch.isfinite(each).all() for each in merged.values() if each.is_floating_point())
    plain = {name: sum(each[name] for each in models) / len(models) for name in merged}
    assert any(not torch.allclose(each, plain[name]) for name, each in merged.items())
    for file in found.glob("*.safetensors"):
        numbers = load_file(file)
        assert numbers and numbers.keys() <= merged.keys()
        assert any(bool((each != 0).any()) for each in numbers.values())


def module_of(worker: Worker, name: str) -> Any:
    import transformers

    kind = "AutoModelForCausalLM" if name.startswith("lm") else "AutoModelForSequenceClassification"
    return getattr(transformers, kind).from_pretrained(worker.world / name, dtype=torch.float32).eval()


def rows_of(worker: Worker, name: str, file: str, context: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels of a file, padded as transformers does it."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(worker.world / name)
    rows = [json.loads(line) for line in (worker.world / file).read_text().splitlines()]
    tokens = [tokenizer(row["text"])["input_ids"][:context] for row in rows]
    longest = max(map(len, tokens))
    padded = torch.tensor([each + [0] * (longest - len(each)) for each in tokens])
    mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in tokens])
    return padded, mask, torch.tensor([row["label"] for row in rows])


def test_fisher_information_of_texts_is_that_of_each_samples_loss(worker: Worker) -> None:
    """Transformers' own loss, the mean over a sample's next tokens, without any of ours; batches do not matter."""
    asked = document("fisher", labels="given", batch=4)
    found = load_file(worker.run(asked) / "fisher-1.safetensors")

    model = module_of(worker, "lm-1")
    tokens, mask, _ = rows_of(worker, "lm-1", "rows-1.jsonl")
    expected = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    for row, there in zip(tokens, mask, strict=True):
        model.zero_grad()
        text = row[None, : int(there.sum())]
        (model(input_ids=text, labels=text).loss * (text.shape[1] - 1)).backward()
        for name, each in model.named_parameters():
            expected[name] += each.grad**2 / len(tokens)
    for name, numbers in found.items():
        torch.testing.assert_close(numbers, expected[name], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(("floor", "share"), [(1e3, "100%"), (1e-12, None)])
def test_a_floor_that_hides_what_was_measured_is_told_of(worker: Worker, floor: float, share: str | None) -> None:
    found = worker.run(one("fisher", recipe={"parameters": {"fisher_floor": floor}}, samples=1))
    report = json.loads((found / "calibration.json").read_text())
    warnings = json.loads((found / "calibration.lock.json").read_text())["warnings"]
    assert [each.split(" ")[0] for each in warnings if "fisher_floor" in each] == ([share] if share else [])
    assert (report["below_floor"]["fisher-0.safetensors"] == 1) == (share is not None)


@pytest.mark.parametrize("kind", ["lm", "texts"])
def test_importances_are_those_of_padded_batches(worker: Worker, kind: str) -> None:
    asked = one("ssd", kind, forget=[{"file": "rows-0.jsonl"}], batch=4)
    found = load_file(worker.run(asked) / "forget_importance.safetensors")

    model = module_of(worker, f"{kind}-1")
    tokens, mask, labels = rows_of(worker, kind, "rows-0.jsonl")
    expected = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    for at in (slice(0, 4), slice(4, 6)):
        model.zero_grad()
        wanted = tokens[at].masked_fill(mask[at] == 0, -100) if kind == "lm" else labels[at]
        model(input_ids=tokens[at], attention_mask=mask[at], labels=wanted).loss.backward()
        for name, each in model.named_parameters():
            expected[name] += each.grad**2 / 2
    for name, numbers in found.items():
        torch.testing.assert_close(numbers, expected[name], rtol=1e-3, atol=1e-8)


def test_grams_are_those_of_the_tokens_that_are_there(worker: Worker) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    found = load_file(worker.run(document("regmean", batch=6, exclude=["down_proj"])) / "gram-0.safetensors")
    assert not any("down_proj" in each for each in found) and any("up_proj" in each for each in found)

    model = module_of(worker, "lm-0")
    tokens, mask, _ = rows_of(worker, "lm-0", "rows-0.jsonl")
    with torch.no_grad():
        layer = model.model.layers[0]
        rows = layer.input_layernorm(model.model.embed_tokens(tokens))[mask.bool()]
    torch.testing.assert_close(found[name], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[name], found[name.replace("k_proj", "q_proj")])


DROPPED = {"drop_rate": 0.8}


@pytest.mark.parametrize(
    "asked",
    [
        document("darex", recipe=based("lm", parameters=DROPPED), by="labels", masks=2, samples=2),
        one("darex", recipe=based("lm", parameters=DROPPED), samples=2),
        pytest.param(
            one("darex", "texts", recipe=based("texts", parameters=DROPPED), samples=3, batch=3),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["of two, by labels", "by the largest logits", "by the last hidden layer"],
)
def test_a_q_that_was_searched_is_the_best_of_what_was_tried(worker: Worker, asked: Any) -> None:
    asked["calibrate"] |= {"most": 0.4, "step": 0.1}
    found = worker.run(asked)
    report = json.loads((found / "calibration.json").read_text())
    recipe = Recipe.from_text((found / "recipe.yml").read_text()).to_data()
    assert isinstance(recipe, dict)
    assert report["across"] == "q"
    for told, curve, entry in zip(report["divisors"], report["curves"], recipe["models"], strict=True):
        tried = dict(map(tuple, told["tried"]))
        assert entry["parameters"]["q"] == told["q"] == min(tried, key=lambda q: (tried[q], q))
        assert [(point["step"], point["loss"]) for point in curve["points"]] == sorted(tried.items())
        assert all(0.199 < q < 0.401 for q in tried) and len(tried) > 5


@pytest.mark.slow
def test_q_of_each_layer_is_what_the_recipe_says_of_it(worker: Worker) -> None:
    drop_rate = [{"filter": "lm_head", "value": 0}, {"value": 0.8}]
    recipe = based("lm", parameters={"drop_rate": drop_rate})
    found = worker.run(one("darex", recipe=recipe, by="gradient", steps=20, samples=2))
    report = json.loads((found / "calibration.json").read_text())
    (told,) = report["divisors"]
    points = report["curves"][0]["points"]
    best = next(point for point in points if point["step"] == told["best_step"])
    assert best["loss"] < points[0]["loss"]

    merged = applied(worker, found)
    base, fine = (load_file(worker.world / name / "model.safetensors") for name in ("lm", "lm-1"))
    for each in told["tensors"]:
        delta = (fine[each["tensor"]] - base[each["tensor"]]) / each["q"]
        kept = merged[each["tensor"]] != base[each["tensor"]]
        added = merged[each["tensor"]] - base[each["tensor"]]
        assert 0 < int(kept.sum()) < kept.numel()
        torch.testing.assert_close(added[kept], delta[kept], rtol=1e-3, atol=1e-5)
    assert len({each["q"] for each in told["tensors"]}) > 5
    torch.testing.assert_close(merged["lm_head.weight"], fine["lm_head.weight"])


def test_what_was_measured_before_a_kill_is_not_measured_again(worker: Worker) -> None:
    asked = document("regmean")
    whole = worker.run(asked)
    worker.told.clear()

    def dies() -> bool:
        if any(phase == "measuring lm-1" and done > 2 for phase, done, _ in worker.told):
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        worker.run(asked, out="again", stop=dies)
    worker.told.clear()
    again = worker.run(asked, out="again")
    assert {phase for phase, _, _ in worker.told} == {"reading data", "measuring lm-1", "finishing"}
    for name in ("gram-0.safetensors", "gram-1.safetensors", "recipe.yml"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()


UNLABELLED = [{"file": "unlabelled.jsonl"}]
MIXED = {"drop_rate": [{"filter": "mlp", "value": 0.5}, {"value": 0.9}]}


@pytest.mark.parametrize(
    ("written", "pointer", "words"),
    [
        (document("fisher", labels="expected"), "#/calibrate/labels", "take drawn"),
        (document("fisher", labels="given", draws=3), "#/calibrate/draws", "nothing is drawn"),
        (document("fisher", recipe={"base_model": "lm"}), "#/base_model", "list it among the models"),
        (document("fisher", data=[{"file": "rows-0.jsonl", "model": "lm-0"}]), "#/models/1/model", "no data are about"),
        (
            document("regmean", data=[{"file": "rows-0.jsonl", "weight": 2}]),
            "#/calibrate/data/0/weight",
            "counts alike",
        ),
        (document("regmean", recipe={"statistics": {"gram": "g.safetensors"}}), "#/statistics", "leave this away"),
        (document("regmean", recipe={"merge_method": "fisher"}), "#/merge_method", "write merge_method: regmean"),
        (document("regmean", labels="given"), "#/calibrate/labels", "unknown key"),
        (one("ssd"), "#/calibrate/forget", "required"),
        (one("ssd", forget=[{"file": "no.jsonl"}]), "#/calibrate/forget/0/file", "in none of"),
        (one("ssd", forget=[{"file": "rows-0.jsonl", "model": "lm"}]), "#/calibrate/forget/0/model", "is none of"),
        (one("darex"), "#/base_model", "name it as base_model"),
        (one("darex", recipe=based("lm", parameters={"q": 0.2})), "#/parameters/q", "looked for"),
        (one("darex", recipe=based("lm"), by="analytic", masks=2), "#/calibrate/masks", "no use for it"),
        (one("darex", recipe=based("lm", parameters=MIXED)), "#/parameters/drop_rate", "for one drop_rate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_measured_is_refused_with_its_place(
    worker: Worker, written: Any, pointer: str, words: str
) -> None:
    with pytest.raises(WeightsmithError) as refused:
        worker.run(written)
    found = [each.pointer for each in refused.value.problems if words in str(each)]
    assert found[:1] == [pointer], refused.value


def test_labels_that_are_missing_are_asked_for(worker: Worker) -> None:
    (worker.world / "unlabelled.jsonl").write_text('{"text": "the cat"}\n')
    with pytest.raises(CalibrationFailed, match="no field 'label'"):
        worker.run(document("fisher", "texts", data=UNLABELLED, labels="given"))
    worker.run(document("fisher", "texts", data=UNLABELLED))


def test_a_model_that_says_no_numbers_fails_with_words(worker: Worker) -> None:
    place = worker.world / "lm-broken"
    shutil.copytree(worker.world / "lm-0", place)
    tensors = load_file(place / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += torch.inf
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    models = {"models": [{"model": "lm-broken"}]}
    data = [{"file": "rows-0.jsonl", "samples": 1}]
    with pytest.raises(CalibrationFailed, match="no number; look at the model's weights"):
        worker.run(one("fisher", recipe=models, data=data))
    with pytest.raises(CalibrationFailed, match="no finite number; look at the model's weights"):
        worker.run(one("ssd", recipe=models, data=data, forget=data))
    darex = models | based("lm", parameters=DROPPED)
    with pytest.raises(CalibrationFailed, match="whatever q is"):
        worker.run(one("darex", recipe=darex, data=data))


def test_a_file_of_tensors_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "numbers.safetensors"
    tensors = {"größe": torch.randn(3, 2), "0-d": torch.tensor(2.0), "empty": torch.zeros(0, 4)}
    with TensorFile(path, [*tensors, "never given"]) as file:
        for name, each in tensors.items():
            file.add(name, each)
        assert not path.exists()
    found = load_file(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], each) for name, each in tensors.items())
    other = tmp_path / "other.safetensors"
    with pytest.raises(KeyError), TensorFile(other, ["a"]) as file:
        file.add("a", torch.zeros(3))
        raise KeyError
    assert list(tmp_path.iterdir()) == [path]
