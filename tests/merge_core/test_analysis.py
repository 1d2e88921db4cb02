"""Analyses of models: against float64 arithmetic on whole tensors, to the same bytes whatever the blocks."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_core.analysis.document import REPORT_NAME, AnalysisDocument, analyse, plan_analysis
from merge_core.analysis.spectra import spectrum
from merge_core.analysis.survey import OCTAVES, bits_for, histogram_bytes
from merge_core.errors import (
    Canceled,
    IncompatibleModels,
    MemoryLimitExceeded,
    NonFinite,
    RecipeError,
    WeightsmithError,
)
from merge_core.matrices import Delta
from merge_core.method import Block
from tests.conftest import CONFIG, FORMS, kernels_in, mixed_tensors, write_checkpoint
from tests.merge_core.test_aligned import AXES, mlp, permuted
from tests.merge_core.test_aligned import SPEC as OF_MLP
from tests.merge_core.test_on_demand import models as sources  # noqa: F401 — a fixture

MODELS = ["m0", "m1", "m2"]
DOCUMENT = {"base_model": "base", "models": MODELS, "density": 0.3, "top": 5}


def analysed(document: Mapping[str, Any], root: Path, out: Path, **how: Any) -> dict[str, Any]:
    analyse(AnalysisDocument.from_data(document), out, roots=[root], **how)
    return json.loads((out / REPORT_NAME).read_text())  # type: ignore[no-any-return]


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def tune(base: Mapping[str, Tensor], seed: int, by: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + by * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in base.items()
    }


def random_model(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in ("q_proj", "up_proj")]
    return {name: torch.randn(64, 48, generator=generator).to(dtype) for name in names}


def test_figures_are_those_of_whole_tensors(models: Path, tmp_path: Path) -> None:
    """Every figure of every tensor, by numpy in float64 from δ in float32 (float64 where stored so)."""
    found = analysed(DOCUMENT, models, tmp_path / "out")
    base, *tuned = (loaded(models / name) for name in ["base", *MODELS])
    floats = {name for name, tensor in base.items() if tensor.is_floating_point() and tensor.numel()}
    assert {each["tensor"] for each in found["tensors"]} == floats
    assert {each["tensor"] for each in found["not_measured"]} == set(base) - floats

    for told in found["tensors"]:
        name = told["tensor"]
        working = torch.float64 if base[name].dtype == torch.float64 else torch.float32
        origin = base[name].to(working)
        deltas = [(model[name].to(working) - origin).double().numpy().ravel() for model in tuned]
        length = np.linalg.norm(origin.double().numpy())
        assert told["base_norm"] == pytest.approx(length, rel=1e-5)
        for i, (each, delta) in enumerate(zip(told["models"], deltas, strict=True)):
            magnitudes = np.abs(delta).astype(np.float32)
            threshold = np.sort(magnitudes)[::-1][max(1, int(0.3 * delta.size)) - 1]
            assert each["relative"] == pytest.approx(np.linalg.norm(delta) / length, rel=1e-5)
            assert each["changed"] == pytest.approx((delta != 0).mean(), rel=1e-5)
            assert each["threshold"] == pytest.approx(threshold, rel=1e-5)
            assert each["ties"] == (magnitudes == threshold).sum()
            assert each["kept"] == pytest.approx((magnitudes >= threshold)[delta != 0].sum() / delta.size, rel=1e-5)
            for j in range(3):
                both = (delta != 0) & (deltas[j] != 0)
                opposed = np.sign(delta) * np.sign(deltas[j]) < 0
                cosine = delta @ deltas[j] / np.linalg.norm(delta) / np.linalg.norm(deltas[j])
                assert told["cosine"][i][j] == pytest.approx(cosine, abs=1e-5)
                assert told["sign_conflicts_of_pairs"][i][j] == pytest.approx(opposed.sum() / both.sum(), abs=1e-5)
            if len(told["shape"]) > 1:
                values = np.linalg.svd(delta.reshape(told["shape"]), compute_uv=False)
                shares = values / values.sum()
                assert each["singular_values"] == pytest.approx(values[:5], rel=1e-4)
                assert each["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
                assert each["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-4)
        signs = np.sign(np.stack(deltas))
        shared = (signs != 0).sum(axis=0) >= 2
        goes_both_ways = (signs.max(axis=0) > 0) & (signs.min(axis=0) < 0)
        assert told["sign_conflicts"] == pytest.approx(goes_both_ways.sum() / shared.sum(), abs=1e-5)


def test_layers_and_the_whole_are_sums_of_tensors(models: Path, tmp_path: Path) -> None:
    found = analysed(DOCUMENT, models, tmp_path / "out")
    inside = [each for each in found["tensors"] if each["layer"] == 1]
    layer = next(each for each in found["layers"] if each["layer"] == 1)
    for whole, parts in ((found["whole"], found["tensors"]), (layer, inside)):
        assert whole["elements"] == sum(each["elements"] for each in parts)
        for model in range(3):
            squares = sum(each["models"][model]["norm"] ** 2 for each in parts)
            changed = sum(each["models"][model]["changed"] * each["elements"] for each in parts)
            assert whole["models"][model]["norm"] == pytest.approx(math.sqrt(squares), rel=1e-4)
            assert sum(whole["histogram"]["counts"][model]) == pytest.approx(changed, rel=1e-4)
    for model in range(3):
        kept = sum(each["models"][model]["kept_by_model"] * each["elements"] for each in found["tensors"])
        assert found["whole"]["models"][model]["kept"] == pytest.approx(kept / found["whole"]["elements"], rel=1e-4)
        assert 0.3 <= found["whole"]["models"][model]["kept"] < 0.32  # bfloat16 ties


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with a tensor of many grains, one that lies down, and some of one grain."""
    folder = tmp_path_factory.mktemp("tall")

    def model(seed: int) -> dict[str, Tensor]:
        return mixed_tensors(seed) | {
            "model.tall": torch.randn(4000, 96, generator=torch.Generator().manual_seed(seed)).bfloat16(),
            "model.wide": torch.randn(70, 3000, generator=torch.Generator().manual_seed(seed)).half(),
        }

    for seed, name in enumerate(["base", *MODELS]):
        write_checkpoint(folder / name, model(seed), shards=2, config=CONFIG)
    return folder


def test_the_same_bytes_for_any_threads_blocks_and_kernels(tall: Path, tmp_path: Path) -> None:
    found = set()
    ways: list[tuple[str, int, int]] = [("compiled", 1, 1), ("compiled", 3, 2**20), ("compiled", 2, 2**17)]
    for number, (form, threads, block_elements) in enumerate([*ways, ("plain", 2, 2**16)]):
        with kernels_in(form):
            out = tmp_path / str(number)
            analysed({**DOCUMENT, "exact_up_to": 64}, tall, out, threads=threads, block_elements=block_elements)
            found.add((out / REPORT_NAME).read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("form", FORMS)
def test_kept_against_asked(tmp_path: Path, form: str) -> None:
    """Ties at the threshold are all kept, which is more than was asked; what never changed is not, which is less."""
    base = torch.zeros(100, 100)
    tied, sparse = base.clone(), base.clone()
    tied[:50], tied[:5] = 1.0, 2.0
    sparse[:7] = torch.rand(7, 100) + 1
    for name, tensor in {"base": base, "tied": tied, "sparse": sparse}.items():
        write_checkpoint(tmp_path / name, {"a.weight": tensor})
    with kernels_in(form):
        found = analysed({"base_model": "base", "models": ["tied", "sparse"], "density": 0.2}, tmp_path, tmp_path / "o")
    (tensor,) = found["tensors"]
    one, other = tensor["models"]
    assert (one["threshold"], one["ties"], one["kept"], one["kept_by_model"]) == (1.0, 4500, 0.5, 0.5)
    assert (other["threshold"], other["kept"], other["changed"]) == (0.0, 0.07, 0.07)
    assert other["kept_by_model"] == 0.07
    assert one["relative"] is None and tensor["base_norm"] == 0


def low_rank(seed: int, rows: int, columns: int, strengths: list[float]) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and its right singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(strengths), generator=generator, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    return left * torch.tensor(strengths, dtype=torch.float64) @ right.T, right


@pytest.mark.parametrize("shape", [(500, 120), (120, 500)])
def test_a_sketch_finds_the_strong_directions(shape: tuple[int, int]) -> None:
    """Values that stand out above noise, to a per cent and never above the true ones."""
    strengths = [16.0, 8.0, 4.0, 2.0]
    matrix, _ = low_rank(1, *shape, strengths)
    matrix += 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (delta,) = Delta.each(Block.of([matrix.float()], torch.zeros(shape)))
    exact, sketched = (spectrum(delta, "a", 4, limit) for limit in (1000, 10))

    assert not exact.is_sketched and sketched.is_sketched
    assert sketched.effective_rank is None and exact.effective_rank is not None
    assert sketched.values == pytest.approx(exact.values, rel=1e-2)
    assert all(ours <= theirs * (1 + 1e-9) for ours, theirs in zip(sketched.values, exact.values, strict=True))
    assert (sketched.vectors.T @ exact.vectors).abs().diagonal().min() > 0.99


def test_overlap_is_shared_subspace(tmp_path: Path) -> None:
    """1 for the same directions however strong, 0 for others; both when decomposed whole and when sketched."""
    one, _ = low_rank(1, 90, 40, [3.0, 2.0])
    left, _, right = torch.linalg.svd(one)
    other = 5 * left[:, 1:2] @ right[1:2] + 4 * left[:, :1] @ right[:1]
    apart = 3 * left[:, 10:11] @ right[10:11] + 2 * left[:, 11:12] @ right[11:12]
    base = torch.randn(90, 40, generator=torch.Generator().manual_seed(0))
    write_checkpoint(tmp_path / "base", {"w": base})
    for name, delta in {"one": one, "other": other, "apart": apart}.items():
        write_checkpoint(tmp_path / name, {"w": (base + delta).float()})
    for limit in (1024, 8):
        document = {"base_model": "base", "models": ["one", "other", "apart"], "top": 2, "exact_up_to": limit}
        (told,) = analysed(document, tmp_path, tmp_path / str(limit))["tensors"]
        assert told["overlap"][0][1] == pytest.approx(1, abs=1e-6)
        assert told["overlap"][0][2] == pytest.approx(0, abs=1e-6)
        assert told["overlap_by_chance"] == 0.05


def rules(found: Mapping[str, Any]) -> set[tuple[str, tuple[int, ...]]]:
    return {(each["rule"], tuple(each["models"])) for each in found["suspicions"]}


def test_a_wrong_base_is_suspected(tmp_path: Path) -> None:
    """Planted: a base that has nothing to do with the models, one that they share most of the way from, one of another
    model; and the base itself and its copy in another format among the models. An honest family raises none.
    """
    honest, other = random_model(1), random_model(2)
    later = tune(honest, 3, by=0.3)
    family: dict[str, dict[str, Tensor]] = {
        "honest": honest,
        "other": other,
        "copy": honest,
        "half": {name: tensor.half() for name, tensor in honest.items()},
        "full": {name: tensor.float() + 1e-4 * torch.randn(tensor.shape) for name, tensor in honest.items()},
        "of-other": tune(other, 13),
        **{f"t{seed}": tune(honest, seed) for seed in (10, 11, 12)},
        **{f"l{seed}": tune(later, seed) for seed in (14, 15)},
        "far-tuned": tune(honest, 16, by=0.3),
    }
    for name, tensors in family.items():
        write_checkpoint(tmp_path / name, tensors)
    numbers = itertools.count()

    def suspected(base: str, *models: str) -> set[tuple[str, tuple[int, ...]]]:
        document = {"base_model": base, "models": list(models), "top": 0}
        return rules(analysed(document, tmp_path, tmp_path / f"out-{next(numbers)}"))

    assert suspected("honest", "t10", "t11", "t12") == set()
    far = {("far", (0,)), ("far", (1,)), ("together", (0, 1))}
    assert suspected("other", "t10", "t11") == far
    assert suspected("honest", "t10", "t11", "of-other") == {("far", (2,))}
    assert suspected("honest", "l14", "l15") == {("together", (0, 1))}
    assert suspected("honest", "t10", "t11", "far-tuned") == {("outlier", (2,))}
    assert suspected("honest", "t10", "copy") == {("same", (1,))}
    assert suspected("full", "honest", "t10") == {("rounded", (0,))}


def test_the_order_of_neurons_is_told(tmp_path: Path) -> None:
    """A copy with its neurons elsewhere is far from its base, and the same once it is aligned."""
    write_checkpoint(tmp_path / "a", mlp(0))
    write_checkpoint(tmp_path / "b", permuted(mlp(0), OF_MLP.random(1)))
    document = {"base_model": "a", "models": ["b"], "top": 0}
    before = analysed(document, tmp_path, tmp_path / "before")
    found = analysed(document | {"alignment": {"spec": AXES}}, tmp_path, tmp_path / "after")

    assert before["whole"]["models"][0]["relative"] > 0.5 and before["alignment"] is None
    assert found["whole"]["models"][0]["relative"] == 0
    told = found["alignment"]["models"]["b"]
    assert found["alignment"]["compared_with"] == "a" and told["sizes"] == {"P_0": 24, "P_1": 16}
    assert min(told["moved"].values()) > 0
    assert told["distance_before"] > 0.5 and told["distance_after"] == 0
    assert (tmp_path / "after" / "alignment.safetensors").exists()

    stored = {"permutations": "after/alignment.safetensors"}
    again = analysed(document | {"alignment": stored}, tmp_path, tmp_path / "again")
    assert again["alignment"]["models"]["b"]["distance_after"] == 0 and again["whole"] == found["whole"]


@pytest.mark.parametrize(
    ("document", "pointer"),
    [
        ({"models": ["m0"]}, "#/base_model"),
        ({"base_model": "base"}, "#/models"),
        ({"base_model": "base", "models": []}, "#/models"),
        ({"base_model": "base", "models": ["m0", "m0"]}, "#/models/1"),
        ({"base_model": "base", "models": ["base"]}, "#/models/0"),
        ({"base_model": "base", "models": ["m0"], "density": 0}, "#/density"),
        ({"base_model": "base", "models": ["m0"], "densty": 0.2}, "#/densty"),
        ({"base_model": "base", "models": ["m0", "nowhere"]}, "#/models/1"),
        ({"base_model": "nowhere", "models": ["m0"]}, "#/base_model"),
        ({"base_model": "base", "models": ["m0"], "exclude": ["nowhere"]}, "#/exclude/0"),
        ({"base_model": "base", "models": ["m0"], "alignment": {"permutations": "gone"}}, "#/alignment/permutations"),
        ({"base_model": "base", "models": ["m0"], "alignment": {"too": "base"}}, "#/alignment/too"),
        ({"base_model": "base", "models": [f"m{i}" for i in range(17)]}, "#/models"),
    ],
)
def test_what_cannot_be_meant_is_refused(models: Path, document: dict[str, Any], pointer: str) -> None:
    with pytest.raises(WeightsmithError) as refused:
        plan_analysis(AnalysisDocument.from_data(document), roots=[models])
    assert refused.value.problems[0].pointer == pointer, refused.value


def test_models_that_do_not_fit_are_refused_from_headers(models: Path) -> None:
    tensors = mixed_tensors(1)
    tensors["model.norm.weight"] = torch.zeros(25)
    write_checkpoint(models / "odd", tensors)
    with pytest.raises(IncompatibleModels) as refused:
        plan_analysis(AnalysisDocument.from_data({"base_model": "base", "models": ["m0", "odd"]}), roots=[models])
    assert refused.value.problems[0].pointer == "#/models/1"
    assert refused.value.problems[0].tensor == "model.norm.weight"
    with pytest.raises(RecipeError, match="a mapping"):
        AnalysisDocument.from_text("[1]")


def test_a_spectrum_that_memory_does_not_hold_is_refused(tmp_path: Path) -> None:
    for name in ("base", "m"):
        write_checkpoint(tmp_path / name, {"w": torch.zeros(5000, 4100, dtype=torch.bfloat16)})
    document = {"base_model": "base", "models": ["m"], "exact_up_to": 8192}
    with pytest.raises(MemoryLimitExceeded, match="exact_up_to") as refused:
        plan_analysis(AnalysisDocument.from_data(document), roots=[tmp_path])
    assert refused.value.problems[0].tensor == "w"
    plan = plan_analysis(AnalysisDocument.from_data({**document, "exact_up_to": 1024}), roots=[tmp_path])
    assert plan.to_dict()["matrices_sketched"] == 1 and plan.merge.memory.peak < 2**30


def test_the_plan_says_the_most_that_is_written(models: Path, tmp_path: Path) -> None:
    document = AnalysisDocument.from_data({**DOCUMENT, "top": 16})
    plan = plan_analysis(document, roots=[models])
    artifact = analyse(document, tmp_path / "out", roots=[models])
    assert sum(file.size for file in artifact.files) < plan.output_bytes
    assert len(plan.to_dict(steps=True)["steps"]) == plan.to_dict()["tensors"] == 17


def test_histograms_of_many_tensors_are_coarser() -> None:
    assert [bits_for(tensors, 8) for tensors in (10, 1000, 20_000, 10**6)] == [7, 6, 1, 0]
    assert histogram_bytes(1, 1, 7) == 8 * OCTAVES * 128


def test_nothing_is_left_of_what_was_given_up(models: Path, tmp_path: Path) -> None:
    """Canceled, or stopped by a NaN, with nothing in the folder."""
    asked = itertools.count()
    with pytest.raises(Canceled):
        analysed(DOCUMENT, models, tmp_path / "out", stop=lambda: next(asked) > 20)
    tensors = mixed_tensors(1)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    write_checkpoint(models / "m1", tensors, shards=2, config=CONFIG)
    with pytest.raises(NonFinite, match=r"model.layers.2.mlp.up_proj.weight of m1"):
        analysed(DOCUMENT, models, tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


def test_progress_ends_where_it_said(models: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, int, int]] = []
    report: Callable[[Any], None] = lambda each: told.append(  # noqa: E731
        (each.tensors_done, each.tensors_total, each.bytes_read, each.bytes_read_total)
    )
    analysed(DOCUMENT, models, tmp_path / "out", report=report)
    done, total, read, read_total = told[-1]
    assert done == total == 17 and read == read_total > 0
    assert told[-2][2] == pytest.approx(told[-2][3], rel=0.02)


def test_whatever_a_recipe_reads(sources: Path, tmp_path: Path) -> None:  # noqa: F811
    """An adapter changes the tensor it is for, a delta what it holds, and vocabularies are made one."""
    found = analysed({"base_model": "base", "models": ["base+adapter", "base+p"]}, sources, tmp_path / "adapter")
    changed = {each["tensor"] for each in found["tensors"] if each["models"][0]["changed"]}
    assert changed == {"model.layers.1.self_attn.q_proj.weight"}
    told = next(each for each in found["tensors"] if each["tensor"] in changed)
    assert len(told["models"][0]["singular_values"]) == 4  # the adapter's rank
    assert found["whole"]["models"][1]["changed"] > 0

    document = {"base_model": "latin", "models": ["more"], "tokenizer": {"source": "union"}}
    told = analysed(document, sources, tmp_path / "union")["tensors"]
    assert next(each["shape"] for each in told if "embed" in each["tensor"])[0] > 4


MEASURED = """
import sys
from pathlib import Path
from merge_core.analysis.document import AnalysisDocument, analyse, plan_analysis

root, limit = sys.argv[1:]
document = AnalysisDocument.from_data({"base_model": "base", "models": ["m0", "m1"], "limits": {"memory": limit}})
planned = plan_analysis(document, roots=[Path(root)], threads=2).merge.memory.peak
analyse(document, Path(root) / "out", roots=[Path(root)], threads=2)
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(planned, int(status["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.slow
def test_memory_is_as_planned(tmp_path: Path) -> None:
    """Of matrices that stand, lie, and are sketched; the models are larger than the limit."""
    for seed, name in enumerate(["base", "m0", "m1"]):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"tall": (60_000, 1200), "wide": (1000, 30_000), "large": (3000, 9000)}
        tensors = {part: torch.randn(*shape, generator=generator).bfloat16() for part, shape in shapes.items()}
        write_checkpoint(tmp_path / name, tensors)
    command = [sys.executable, "-c", MEASURED, str(tmp_path), "700MiB"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    planned, peak = map(int, ran.stdout.split())
    assert peak <= planned <= 700 * 2**20
