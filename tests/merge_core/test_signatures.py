"""Robust weight signatures: extracted, applied, composed and taken off again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from merge_core.errors import Canceled, IncompatibleModels, NonFinite, RecipeError, WeightsmithError
from merge_core.merge import merge
from merge_core.patches.delta import Delta
from merge_core.patching import Patch, describe, patch, plan_patch
from merge_core.progress import Progress
from merge_core.recipe import Recipe
from tests.conftest import FORMS, kernels_in, write_checkpoint
from tests.merge_core.test_deltas import assert_same_bits

NORM = ("weight", "bias", "running_mean", "running_var")
SHAPES: dict[str, tuple[int, ...]] = {
    "features.0.weight": (6, 3, 3, 3),
    "features.0.bias": (6,),
    **{f"features.1.{part}": (6,) for part in NORM},
    "features.4.weight": (260, 6, 7, 7),
    "features.4.bias": (260,),
    **{f"features.5.{part}": (260,) for part in NORM},
    "features.8.weight": (4, 260, 1, 1),
    "classifier.weight": (10, 4),
    "classifier.bias": (10,),
}
"""A net with BatchNorm whose second convolution has more than one grain."""
FIRST = ["features.0.weight", "features.0.bias", "features.4.weight", "features.4.bias"]
NORMS = [name for name in SHAPES if name.startswith(("features.1.", "features.5."))]


def tensors(seed: int) -> dict[str, Tensor]:
    """A model; those of other seeds than 0 were tuned from it."""
    start, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        tensor = torch.randn(shape, generator=start) + 0.1 * torch.randn(shape, generator=own) * (seed > 0)
        found[name] = tensor.abs() if name.endswith("var") else tensor
    counts = {f"features.{i}.num_batches_tracked": torch.tensor(seed) for i in (1, 5)}
    return found | counts


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nets")
    for seed, name in enumerate(["base", "clean", "blur", "noise", "other"]):
        write_checkpoint(folder / name, tensors(seed), shards=1 + (seed == 1), config={"model_type": "net"})
    run(folder, extraction(), "signature")
    run(folder, extraction(corrupted=["noise"], encoding="dense"), "dense")
    return folder


def extraction(**keys: Any) -> dict[str, Any]:
    models = {"base_model": "base", "clean": "clean", "corrupted": ["blur"]}
    return {"operation": "extract", **models, "layers": 2, **keys}


def application(model: str, *patches: tuple[str, float], **keys: Any) -> dict[str, Any]:
    put = [{"patch": name, "strength": strength} for name, strength in patches]
    return {"operation": "apply", "model": model, "patches": put, **keys}


def run(folder: Path, document: Mapping[str, Any], out: str | Path, **how: Any) -> Path:
    patch(Patch.from_data(document), folder / out, **{"roots": [folder], **how})
    return folder / out


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def change(folder: Path) -> dict[str, Tensor]:
    """What a signature adds to zeros."""
    with Delta.open(folder) as delta:
        return {
            name: tensor.change(torch.zeros(SHAPES[name]), 0, SHAPES[name][0]) for name, tensor in delta.tensors.items()
        }


def expected(name: str, corrupted: list[int]) -> Tensor:
    origin, clean = tensors(0)[name].double(), tensors(1)[name].double()
    direction = clean - origin
    mean = torch.stack([tensors(seed)[name].double() for seed in corrupted]).mean(0) - origin
    return mean - (mean * direction).sum() / (direction * direction).sum() * direction


def test_what_is_kept_is_orthogonal_to_the_clean_task_vector(nets: Path) -> None:
    found = change(nets / "dense")
    assert list(found) == [name for name in found if name in {*FIRST, *NORMS}] and len(found) == len(FIRST) + len(NORMS)
    for name in FIRST:
        wanted, direction = expected(name, [3]), tensors(1)[name] - tensors(0)[name]
        assert torch.allclose(found[name].double(), wanted, atol=1e-6)
        product = (found[name].double() * direction.double()).sum() / (found[name].norm() * direction.norm())
        assert abs(float(product)) < 1e-6
    for name in NORMS:
        assert torch.equal(found[name], tensors(3)[name])


def test_levels_are_half_a_step_away_at_most(nets: Path) -> None:
    found = change(nets / "signature")
    for name in FIRST:
        wanted = expected(name, [2])
        step = float(wanted.max() - wanted.min()) / 255
        assert float((found[name].double() - wanted).abs().max()) <= step / 2 + 1e-6


def test_several_corruptions_count_by_their_mean(nets: Path, tmp_path: Path) -> None:
    both = run(nets, extraction(corrupted=["blur", "noise"], encoding="dense"), tmp_path / "both")
    found = change(both)
    for name in FIRST:
        assert torch.allclose(found[name].double(), expected(name, [2, 3]), atol=1e-6)
    for name in NORMS:
        assert torch.equal(found[name], (tensors(2)[name] + tensors(3)[name]) / 2)


def test_signatures_of_strengths_that_come_to_one_give_the_mean_of_norms(nets: Path, tmp_path: Path) -> None:
    made = weights(run(nets, application("other", ("signature", 0.5), ("dense", 0.5)), tmp_path / "out"))
    for name in NORMS:
        assert torch.allclose(made[name], (tensors(2)[name] + tensors(3)[name]) / 2, atol=1e-6)
    assert torch.equal(made["classifier.weight"], tensors(4)["classifier.weight"])
    wanted = tensors(4)["features.4.weight"] + 0.5 * change(nets / "signature")["features.4.weight"]
    wanted = wanted + 0.5 * change(nets / "dense")["features.4.weight"]
    assert torch.allclose(made["features.4.weight"], wanted, atol=1e-6)


def test_what_is_replaced_is_so_whatever_was_there(nets: Path, tmp_path: Path) -> None:
    vast = {name: tensor * 1e9 if name in NORMS else tensor for name, tensor in tensors(4).items()}
    write_checkpoint(tmp_path / "vast", vast)
    named = run(nets, extraction(replace=["features.0.weight"], encoding="dense"), tmp_path / "named")
    made = weights(run(nets, application(str(tmp_path / "vast"), (str(named), 1.0)), tmp_path / "out", roots=None))
    for name in [*NORMS, "features.0.weight"]:
        assert torch.equal(made[name], tensors(2)[name])


def test_replacing_beyond_the_values_is_told(nets: Path) -> None:
    def warnings(*patches: tuple[str, float]) -> list[str]:
        return list(plan_patch(Patch.from_data(application("other", *patches)), roots=[nets]).warnings)

    assert warnings(("signature", 0.5), ("dense", 0.5)) == []
    (told,) = warnings(("signature", 1.0), ("dense", 1.0))
    assert "features.1.bias and 7 more with strengths that come to 2" in told
    assert warnings(("signature", -0.5))


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"layers": 1}, {"features.0.weight", "features.0.bias", *NORMS}),
        ({"batch_norm": "leave"}, {*FIRST}),
        ({"batch_norm": "project", "layers": 1}, {*FIRST[:2], "features.1.weight", "features.1.bias"}),
        ({"batch_norm": "leave", "layers": ["classifier.w", "features.0"]}, {*FIRST[:2], "classifier.weight"}),
        ({"layers": 1, "replace": ["features.8"]}, {*FIRST[:2], *NORMS, "features.8.weight"}),
    ],
)
def test_layers_are_chosen_by_count_or_name(nets: Path, keys: dict[str, Any], names: set[str]) -> None:
    plan = plan_patch(Patch.from_data(extraction(**keys)), roots=[nets])
    assert {step["tensor"] for step in plan.to_dict(steps=True)["steps"]} == names


def test_the_same_file_by_any_threads_and_form(nets: Path, tmp_path: Path) -> None:
    wanted = (nets / "signature" / "delta.safetensors").read_bytes()
    for i, form in enumerate(FORMS):
        with kernels_in(form):
            made = run(nets, extraction(), tmp_path / str(i), threads=1 + i)
            assert (made / "delta.safetensors").read_bytes() == wanted


def test_an_unchanged_clean_tensor_leaves_all_of_the_change(nets: Path, tmp_path: Path) -> None:
    same = run(nets, extraction(clean="base", encoding="dense", batch_norm="leave"), tmp_path / "same")
    for name, found in change(same).items():
        assert torch.equal(found, tensors(2)[name] - tensors(0)[name])


def test_provenance_says_what_it_was_made_of(nets: Path) -> None:
    with Delta.open(nets / "signature") as delta:
        told = describe(delta)
    made = told["provenance"]
    assert (told["kind"], made["clean"], made["corrupted"], made["layers"]) == (
        "robust weight signature",
        "clean",
        ["blur"],
        2,
    )
    assert [source["model"] for source in made["sources"]] == ["base", "clean", "blur"]
    assert [len(source["files"]) for source in made["sources"]] == [2, 3, 2]  # with each a config.json
    assert all(len(file["sha256"]) == 64 for source in made["sources"] for file in source["files"])
    assert set(made["projection"]) == set(FIRST)
    assert all(0 < each["share"] <= 1 for each in made["projection"].values())
    lock = json.loads((nets / "signature" / "patch.lock.json").read_text())
    assert lock["patch"] == extraction() and lock["sources"] == made["sources"]


@settings(max_examples=5)
@given(strength=st.floats(-3, 3, width=32), many=st.booleans())
def test_whatever_is_applied_comes_off_bit_for_bit(
    nets: Path, tmp_path_factory: pytest.TempPathFactory, strength: float, many: bool
) -> None:
    folder = tmp_path_factory.mktemp("applied")
    patches = [("signature", strength), ("dense", 1.0)][: 1 + many]
    run(nets, application("other", *patches), folder / "on")
    off = {"operation": "remove", "model": str(folder / "on")}
    patch(Patch.from_data(off), folder / "off")
    assert_same_bits(weights(folder / "off"), weights(nets / "other"))
    # In any order, and one after the other:
    turned = run(nets, application("other", *patches[::-1]), folder / "turned")
    assert_same_bits(weights(turned), weights(folder / "on"))


def test_without_a_reversal_the_lock_proves_the_source(nets: Path, tmp_path: Path) -> None:
    on = run(nets, application("other", ("signature", 0.5), reversible=False), nets / "on")
    assert not (on / "reversal.safetensors").exists()
    run(nets, {"operation": "remove", "model": "on"}, tmp_path / "off")
    assert_same_bits(weights(tmp_path / "off"), weights(nets / "other"))
    elsewhere = {"operation": "remove", "model": "on", "sources": {"other": "clean"}}
    with pytest.raises(IncompatibleModels, match="is not the file that on was made from"):
        run(nets, elsewhere, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    lock = json.loads((on / "merge.lock.json").read_text())
    for recipe, why in (
        ({**lock["recipe"], "merge_method": "no"}, "cannot be made again"),
        ([[[]]], "made without patches"),
        ("?", "made without patches"),
    ):
        (on / "merge.lock.json").write_text(json.dumps({**lock, "recipe": recipe}))
        with pytest.raises(RecipeError, match=why):
            run(nets, {"operation": "remove", "model": "on"}, tmp_path / "hostile")
    (on / "merge.lock.json").write_text(json.dumps({**lock, "sources": [7, {"files": [None]}]}))
    with pytest.raises(IncompatibleModels, match="is not the file that on was made from"):
        run(nets, {"operation": "remove", "model": "on"}, tmp_path / "hostile")
    (on / "merge.lock.json").unlink()
    with pytest.raises(RecipeError, match=r"no reversal.safetensors and no merge.lock.json.*give its reversal"):
        run(nets, {"operation": "remove", "model": "on"}, tmp_path / "lost")


def test_each_source_must_be_what_it_was(nets: Path, tmp_path: Path) -> None:
    models = [{"model": str(nets / name), "parameters": {"weight": i}} for i, name in enumerate(("clean", "other"), 1)]
    recipe = {"merge_method": "linear", "models": models, "patches": [{"patch": str(nets / "signature")}]}
    merge(Recipe.from_data(recipe), tmp_path / "on")
    remove = {"operation": "remove", "model": str(tmp_path / "on")}
    clean, other = (each["model"] for each in models)
    with pytest.raises(IncompatibleModels, match="is not the file that"):
        run(tmp_path, remove | {"sources": {clean: other, other: clean}}, "turned", roots=None)
    off = run(tmp_path, remove | {"sources": {clean: clean}}, "off", roots=None)
    merge(Recipe.from_data(recipe | {"patches": []}), tmp_path / "plain")
    assert_same_bits(weights(off), weights(tmp_path / "plain"))


def test_a_reversal_is_for_its_own_model(nets: Path, tmp_path: Path) -> None:
    on = run(nets, application("other", ("signature", 1.0)), tmp_path / "on")
    remove = {"operation": "remove", "model": "clean", "reversal": str(on / "reversal.safetensors")}
    with pytest.raises(IncompatibleModels, match="for its own base alone"):
        patch(Patch.from_data({**remove, "model": str(nets / "clean")}), tmp_path / "off")
    with pytest.raises(RecipeError, match="but no reversal"):
        run(nets, {"operation": "remove", "model": "clean", "reversal": "signature"}, tmp_path / "off")
    with pytest.raises(RecipeError, match=r"no reversal\.safetensors and no"):
        run(nets, {"operation": "remove", "model": "clean"}, tmp_path / "off")


@pytest.mark.parametrize(
    ("document", "pointer", "why"),
    [
        ({"operation": "extrakt"}, "#/operation", "extract"),
        ({}, "#/operation", "say which"),
        (extraction(corrupted=[]), "#/corrupted", "extract needs corrupted"),
        (extraction(corrupted=["blur", "blur"]), "#/corrupted/1", "listed twice"),
        (extraction(layers=0), "#/layers", "1 or more"),
        (extraction(layers=True), "#/layers", "1 or more"),
        (extraction(layers=[1]), "#/layers", "1 or more"),
        (extraction(layers=[]), "#/layers", "needs layers"),
        (extraction(layers=[""]), "#/layers/0", "in every name"),
        (extraction(layers=9), "#/layers", "there are 3 besides the head"),
        (extraction(replace=["downsample"]), "#/replace/0", "no tensor's name contains"),
        (extraction(replace=[""]), "#/replace/0", "in every name"),
        (extraction(layers=["attention"]), "#/layers/0", "no tensor's name contains"),
        (extraction(levels=1), "#/levels", "greater"),
        (extraction(levels=2, scale="log"), "#/levels", "3 levels"),
        (extraction(encoding="dense", levels=4), "#/levels", "leave this away"),
        (extraction(layer=2), "#/layer", "did you mean layers"),
        (extraction(model="clean"), "#/model", "extract has no model"),
        (application("clean"), "#/patches", "apply needs patches"),
        (application("nowhere", ("signature", 1.0)), "#/model", "nowhere"),
        (application("clean", ("nowhere", 1.0)), "#/patches/0/patch", "nowhere"),
        ({"operation": "remove"}, "#/model", "remove needs model"),
        ({"operation": "remove", "model": "clean+signature"}, "#/model", "not the folder"),
        ({"operation": "remove", "model": "nowhere"}, "#/model", "nowhere"),
        ({"operation": "remove", "model": "/etc"}, "#/model", "outside"),
        ({"operation": "remove", "model": "x" * 300}, "#/model", "x"),
        ({"operation": "remove", "model": "clean", "reversal": "../.."}, "#/reversal", "outside"),
        ({"operation": "remove", "model": "clean", "reversal": "clean"}, "#/reversal", "no delta"),
    ],
)
def test_what_cannot_be_meant_is_refused(nets: Path, document: dict[str, Any], pointer: str, why: str) -> None:
    with pytest.raises(WeightsmithError) as refused:
        plan_patch(Patch.from_data(document), roots=[nets])
    assert pointer in [problem.pointer for problem in refused.value.problems]
    assert why in str(refused.value)


def test_models_that_do_not_fit_are_refused(nets: Path, tmp_path: Path) -> None:
    odd = tensors(2) | {"features.0.weight": torch.zeros(6, 3, 5, 5)}
    del odd["features.4.bias"]
    write_checkpoint(tmp_path / "odd", odd)
    document = extraction(base_model=str(nets / "base"), clean=str(nets / "clean"), corrupted=[str(tmp_path / "odd")])
    with pytest.raises(IncompatibleModels) as refused:
        plan_patch(Patch.from_data(document), roots=None)
    assert {problem.tensor for problem in refused.value.problems} == {"features.0.weight", "features.4.bias"}
    write_checkpoint(tmp_path / "nan", tensors(2) | {"features.0.bias": torch.tensor([0.0, 1, torch.nan, 3, 4, 5])})
    document["corrupted"] = [str(tmp_path / "nan")]
    with pytest.raises(NonFinite, match="element 2"):
        patch(Patch.from_data(document), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_cancel_leaves_nothing_and_a_kill_goes_on(nets: Path, tmp_path: Path) -> None:
    with pytest.raises(Canceled):
        run(nets, extraction(), tmp_path / "out", stop=after(4, lambda: True))
    assert not any(tmp_path.iterdir())

    def killed(progress: Progress) -> None:
        if progress.tensors_done == 3:
            raise KeyboardInterrupt

    (tmp_path / ".out.partial").mkdir()
    for left in ("journal.jsonl", "model.safetensors"):  # of a merge that was killed there before
        (tmp_path / ".out.partial" / left).write_text("")
    with pytest.raises(KeyboardInterrupt):
        run(nets, extraction(), tmp_path / "out", report=killed, threads=1)
    artifact = patch(Patch.from_data(extraction()), tmp_path / "out", roots=[nets])
    assert artifact.resumed_tensors >= 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"delta.safetensors", "patch.lock.json"}
    made = (tmp_path / "out" / "delta.safetensors").read_bytes()
    assert made == (nets / "signature" / "delta.safetensors").read_bytes()


def after(calls: int, then: Callable[[], bool]) -> Callable[[], bool]:
    """False so many times, and then what is asked."""
    left = iter(range(calls))
    return lambda: next(left, None) is None and then()


def test_a_signature_of_resnet_50_is_thirteen_times_smaller(tmp_path: Path) -> None:
    models = {name: sparse_resnet(tmp_path / name, seed) for seed, name in enumerate(["base", "clean", "blur"])}
    document = extraction(
        base_model=str(models["base"]), clean=str(models["clean"]), corrupted=[str(models["blur"])], layers=7
    )
    plan = plan_patch(Patch.from_data(document), roots=None).to_dict(steps=True)
    artifact = patch(Patch.from_data(document), tmp_path / "out")
    size = sum(file.size for file in artifact.files)
    assert plan["bytes_of_model"] == 102_440_608  # 25.6 million parameters and the running statistics, float32
    assert size <= plan["bytes_written"] + 20_000
    assert plan["bytes_of_model"] / size >= 13
    blocks = {step["tensor"].split(".conv")[0] for step in plan["steps"] if step["kept"] == "orthogonal part"}
    assert {"layer1.0", "layer1.2", "layer2.2"} < blocks and not any("layer2.3" in block for block in blocks)


def resnet_50() -> dict[str, tuple[int, ...]]:
    """The shapes of its tensors, by their names in torchvision."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, norm: str, out: int, into: int, size: int) -> None:
        found[f"{name}.weight"] = (out, into, size, size)
        found.update({f"{norm}.{part}": (out,) for part in NORM})

    conv("conv1", "bn1", 64, 3, 7)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        width = 32 * 2**stage
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            conv(f"{at}.conv1", f"{at}.bn1", width, channels, 1)
            conv(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            conv(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if block == 0:
                conv(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, channels, 1)
            channels = 4 * width
    return found | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


def sparse_resnet(folder: Path, seed: int) -> Path:
    """A file with random numbers where the first layers are, and holes for the rest."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    header: dict[str, Any] = {}
    written: list[tuple[int, bytes]] = []
    at = 0
    for name, shape in sorted(resnet_50().items()):
        count = math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * count]}
        if name.startswith(("conv1", "bn", "layer1", "layer2")):
            written.append((at, torch.randn(count, generator=generator).numpy().tobytes()))
        at += 4 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin, data in written:
            file.seek(8 + len(text) + begin)
            file.write(data)
        file.truncate(8 + len(text) + at)
    return folder / "model.safetensors"
