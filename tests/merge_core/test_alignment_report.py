"""The report of an alignment against the definitions, computed the plain way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_core.alignment.permutations import Permuted
from merge_core.alignment.report import analyse, decomposition_bytes, interpolation
from merge_core.alignment.spec import PermutationSpec
from merge_core.checkpoint import Checkpoint
from merge_core.errors import Canceled, IncompatibleModels, MemoryLimitExceeded, NonFinite
from tests.conftest import write_checkpoint

SHAPES = {
    "up.weight": (24, 7),
    "up.bias": (24,),
    "conv.weight": (5, 24, 3, 2),
    "tall.weight": (40, 5, 2),
    "bn.running_mean": (24,),
    "head.weight": (3, 40),
    "head.bias": (3,),
    "steps": (),
}
SPEC = PermutationSpec.from_data(
    {
        "permutations": {"h": 24, "c": 5, "t": 40},
        "axes": {
            "up.weight": ["h", None],
            "up.bias": ["h"],
            "conv.weight": ["c", "h", None, None],
            "tall.weight": ["t", "c", None],
            "bn.running_mean": ["h"],
            "head.weight": [None, "t"],
            "head.bias": [None],
            "steps": [],
        },
        "unmeasured": ["bn.running_mean"],
    }
)


def some(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items() if shape}
    return {**tensors, "steps": torch.tensor(3)}


def opened(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(folder, tensors))


def plainly(one: Tensor, other: Tensor, top: int) -> tuple[float, float, float]:
    (u, _, vt), (u2, _, vt2) = (
        torch.linalg.svd(each.flatten(1).double(), full_matrices=False) for each in (one, other)
    )
    left, right = u[:, :top].T @ u2[:, :top], vt[:top] @ vt2[:top].T
    return float((left * right).sum()) / top, float(left.square().sum()) / top, float(right.square().sum()) / top


@pytest.mark.parametrize("top", [1, 3])
def test_says_what_the_definitions_say(tmp_path: Path, top: int) -> None:
    tensors = some(0), some(1)
    indexed = SPEC.random(5)
    with opened(tmp_path / "a", tensors[0]) as one, opened(tmp_path / "b", tensors[1]) as other:
        permuted = Permuted(other, SPEC, indexed)
        moved = {name: permuted.rows(info, 0, info.rows).reshape(info.shape) for name, info in other.tensors.items()}
        found = analyse(one, other, SPEC, indexed, top=top)
    assert {each.tensor for each in found.tensors} == {
        "up.weight",
        "up.bias",
        "conv.weight",
        "tall.weight",
        "head.weight",
    }
    squares = []
    for each in found.tensors:
        a, b, c = (one[each.tensor].double() for one in (*tensors, moved))
        whole = float(a.square().sum() + b.square().sum())
        squares.append([whole, float((a - b).square().sum()), float((a - c).square().sum())])
        assert each.distance_before == pytest.approx((squares[-1][1] / whole) ** 0.5)
        assert each.distance_after == pytest.approx((squares[-1][2] / whole) ** 0.5)
        if a.dim() == 1:
            assert each.before is each.spectra is None
            continue
        assert each.strong == (top, top)
        assert each.before is not None
        assert each.after is not None
        for directions, theirs in ((each.before, b), (each.after, c)):
            told = directions.overlap, directions.left, directions.right
            assert told == pytest.approx(plainly(a, theirs, top), abs=1e-9)
        values = [torch.linalg.svdvals(each.flatten(1)) for each in (a, b, c)]
        torch.testing.assert_close(values[1], values[2])
        assert each.spectra == pytest.approx(float((values[0] - values[1]).norm()) / whole**0.5)
    whole, before, after = (sum(column) for column in zip(*squares, strict=True))
    assert found.distance_before == pytest.approx((before / whole) ** 0.5)
    assert found.distance_after == pytest.approx((after / whole) ** 0.5)
    assert json.loads(json.dumps(found.to_data()))["tensors"][0]["tensor"] == found.tensors[0].tensor
    lines = found.table().splitlines()
    assert len(lines) == len(found.tensors) + 2
    assert lines[-1].split() == ["all", f"{found.distance_before:.3f}", f"{found.distance_after:.3f}"]


def test_a_permuted_copy_agrees_entirely(tmp_path: Path) -> None:
    tensors, indexed = some(0), SPEC.random(1)
    with opened(tmp_path / "a", tensors) as one:
        hidden = Permuted(one, SPEC, SPEC.inverse(indexed))
        copied = {name: hidden.rows(info, 0, info.rows).reshape(info.shape) for name, info in one.tensors.items()}
        with opened(tmp_path / "b", copied) as other:
            found = analyse(one, other, SPEC, indexed, share=0.5)
    assert found.distance_before > 0.5
    assert found.distance_after == 0
    for each in found.tensors:
        if each.after is not None and each.before is not None:
            assert each.spectra == pytest.approx(0, abs=1e-6)
            assert each.after.overlap == pytest.approx(1)
            assert each.before.overlap < 0.9


def test_strong_directions_are_those_near_the_largest(tmp_path: Path) -> None:
    spec = PermutationSpec.from_data({"permutations": {"h": 4}, "axes": {"w": ["h", None]}})
    values = torch.tensor([4.0, 2.0, 1.0, 0.0])
    with (
        opened(tmp_path / "a", {"w": torch.diag(values)}) as one,
        opened(tmp_path / "b", {"w": torch.zeros(4, 4)}) as nothing,
    ):
        (found,) = analyse(one, one, spec, spec.identity(), share=0.5).tensors
        assert found.strong == (2, 2)
        (found,) = analyse(one, one, spec, spec.identity(), top=9).tensors
        assert found.strong == (3, 3)
        (found,) = analyse(one, nothing, spec, spec.identity()).tensors
        assert (found.strong, found.spectra, found.before) == ((2, 0), 1.0, None)
        (found,) = analyse(nothing, nothing, spec, spec.identity()).tensors
        assert (found.distance_before, found.spectra) == (0, 0)


def test_refusals(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "a", some(0)) as one,
        opened(tmp_path / "b", {**some(1), "up.bias": torch.full((24,), torch.nan)}) as bad,
    ):
        needed = max(decomposition_bytes(info) for info in one.tensors.values())
        with pytest.raises(MemoryLimitExceeded, match="ask for distances only"):
            analyse(one, one, SPEC, SPEC.identity(), memory=needed)
        assert analyse(one, one, SPEC, SPEC.identity(), memory=needed, decompose=False).tensors[0].before is None
        with pytest.raises(NonFinite, match=r"up\.bias"):
            analyse(one, bad, SPEC, SPEC.identity())
        with pytest.raises(Canceled):
            analyse(one, one, SPEC, SPEC.identity(), stop=lambda: True)
        with pytest.raises(Canceled):
            interpolation(lambda tensors: {}, one, one, stop=lambda: True)
        with pytest.raises(ValueError, match="two ends"):
            interpolation(lambda tensors: {}, one, one, points=1)
    with (
        opened(tmp_path / "c", {"w": torch.ones(2)}) as one,
        opened(tmp_path / "d", {"w": torch.ones(3)}) as other,
        pytest.raises(IncompatibleModels, match=r"w is \[2\] and \[3\] in the two models"),
    ):
        interpolation(lambda tensors: {}, one, other)


def test_a_line_between_two_models_and_its_barrier(tmp_path: Path) -> None:
    first = {"w": torch.tensor([1.0, -1.0]).bfloat16(), "steps": torch.tensor(5)}
    second = {"w": torch.tensor([3.0, 1.0]), "steps": torch.tensor(7)}

    def evaluate(tensors: dict[str, Tensor]) -> dict[str, float]:
        assert int(tensors["steps"]) == 5
        loss = float(1 - tensors["w"][1] ** 2)
        return {"loss": loss, "accuracy": 1 - loss}

    with opened(tmp_path / "a", first) as one, opened(tmp_path / "b", second) as other:
        curve = interpolation(evaluate, one, other, points=5)
    assert curve.points == (0, 0.25, 0.5, 0.75, 1)
    assert curve.values["loss"] == pytest.approx((0, 0.75, 1, 0.75, 0))
    assert curve.barrier() == pytest.approx(1)
    assert curve.barrier("accuracy", higher_is_better=True) == pytest.approx(1)
    assert json.loads(json.dumps(curve.to_data()))["points"][2] == 0.5
