"""Quantised differences and values put in place: how near, how small, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from merge_core.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, NonFinite
from merge_core.patches.delta import FORMAT, VERSION, Delta
from merge_core.patches.encoding import Difference, Encoding, Parts
from merge_core.patches.encodings.levels import Levels, code_bits, pack, unpack
from merge_core.patches.encodings.replacement import Replacement

BASE = {"dtype": "F32", "blake3": "0" * 64}
ENTRY = {"encoding": "levels", "shape": [5], "dtype": "F32", "base": BASE, "levels": 4, "scale": "linear"}


def stored(
    folder: Path, encoding: Encoding, change: Tensor, base: Tensor | None = None
) -> tuple[Delta, Mapping[str, Any]]:
    """A delta of one tensor `w`, and the settings of its entry."""
    base = torch.zeros_like(change) if base is None else base
    for name, tensor in (("base", base), ("tuned", base + change)):
        save_file({"w": tensor}, folder / f"{name}.safetensors")
    with Checkpoint.open(folder / "base.safetensors") as origin, Checkpoint.open(folder / "tuned.safetensors") as tuned:
        difference = Difference(tuned, tuned.tensors["w"], origin, origin.tensors["w"])
        parts = Parts(folder, 0)
        settings = encoding.encode(difference, parts)
        assert settings is not None
        whole = {
            f"w::{part.name}": torch.from_numpy(parts.read(part.name, 0, parts.count(part.name)))
            .view(part.dtype.torch)
            .reshape(part.shape)
            for part in parts.finish()
        }
        dtype = difference.dtype.name
    entry = {
        "encoding": encoding.name,
        "shape": list(change.shape),
        "dtype": dtype,
        "base": BASE | {"dtype": dtype},
        **settings,
    }
    return written(folder, entry, whole), settings


def written(folder: Path, entry: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Delta:
    described = json.dumps({"w": entry})
    metadata = {"format": FORMAT, "version": VERSION, "tensors": described, "removed": "[]", "provenance": "{}"}
    save_file(dict(parts), folder / "delta.safetensors", metadata)
    return Delta.open(folder / "delta.safetensors")


def changes(delta: Delta, shape: tuple[int, ...]) -> Tensor:
    return delta.tensors["w"].change(torch.zeros(shape), 0, shape[0] if shape else 1)


@given(
    count=st.integers(2, 300),
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([(), (1,), (7,), (5, 3), (2, 3, 3)]),
    is_log=st.booleans(),
)
def test_no_number_is_further_away_than_half_a_step(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, shape: tuple[int, ...], is_log: bool
) -> None:
    folder = tmp_path_factory.mktemp("levels")
    change = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scale = "log" if is_log and count > 2 else "linear"

    delta, _ = stored(folder, Levels(levels=count, scale=scale), change)
    got = changes(delta, shape).double()

    wanted = change.double()
    if scale == "linear":
        step = (wanted.max() - wanted.min()) / (count - 1)
        assert bool(((got - wanted).abs() <= step / 2 + 1e-6).all())
    else:
        sizes, levels = wanted.abs(), (count - 1) // 2
        step = (sizes.max() / sizes.min()).log() / max(1, levels - 1)
        assert bool(torch.equal(got.sign(), wanted.sign()))
        if levels > 1:
            assert bool(((got.abs() / sizes).log().abs() <= step / 2 + 1e-6).all())
    delta.close()


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_constants_extremes_and_zeros_are_exact(tmp_path: Path, scale: str) -> None:
    encoding = Levels(levels=16, scale=scale)
    constant = torch.full((3, 5), -0.3)
    assert torch.equal(changes(stored(tmp_path, encoding, constant)[0], (3, 5)), constant)
    mixed = torch.tensor([0.0, 0.1, -3.0, 0.0, 0.7])
    got = changes(stored(tmp_path, encoding, mixed)[0], (5,))
    assert float(got.min()) == -3.0
    if scale == "log":
        assert got[[0, 3]].tolist() == [0.0, 0.0]
    else:
        assert float(got.max()) == pytest.approx(0.7)


def test_nothing_changed_is_not_stored(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "m.safetensors")
    with Checkpoint.open(tmp_path / "m.safetensors") as model:
        difference = Difference(model, model.tensors["w"], model, model.tensors["w"])
        assert Levels().encode(difference, Parts(tmp_path, 0)) is None


def test_codes_take_the_fewest_bits(tmp_path: Path) -> None:
    change = torch.randn(1000)
    for count, size in ((2, 125), (3, 250), (16, 500), (17, 625), (256, 1000), (257, 1125)):
        delta, _ = stored(tmp_path, Levels(levels=count), change)
        assert delta.tensors["w"].entry.parts["codes"].nbytes == size


@given(bits=st.integers(1, 16), codes=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40), data=st.data())
def test_any_run_of_codes_is_read_back(bits: int, codes: list[int], data: st.DataObject) -> None:
    wanted = np.array(codes, np.int64) % 2**bits
    packed = pack(wanted, bits)
    assert len(packed) == -(-len(codes) * bits // 8)
    first = data.draw(st.integers(0, len(codes) - 1))
    found = unpack(packed[first * bits // 8 :], bits, first * bits % 8, len(codes) - first)
    assert found.tolist() == wanted[first:].tolist()


def test_a_change_too_small_for_float32_takes_nothing_from_the_others(tmp_path: Path) -> None:
    change = torch.tensor([1e-60, 1.0, -2.0], dtype=torch.float64)
    delta, _ = stored(tmp_path, Levels(levels=255, scale="log"), change)
    assert torch.allclose(changes(delta, (3,)), change, rtol=0.5, atol=1e-30)


def test_rows_do_not_depend_on_how_many_are_read(tmp_path: Path) -> None:
    delta, _ = stored(tmp_path, Levels(levels=5), torch.randn(9, 3, 7))
    base = torch.zeros(9, 3, 7)
    whole = delta.tensors["w"].change(base, 0, 9)
    rows = [delta.tensors["w"].change(base[row : row + 1], row, row + 1) for row in range(9)]
    assert torch.equal(torch.cat(rows), whole)
    assert code_bits(5) == 3


def test_a_replacement_gives_the_new_values_on_any_base(tmp_path: Path) -> None:
    base, change = torch.rand(6), torch.rand(6)
    delta, _ = stored(tmp_path, Replacement(), change, base)
    new, other = base + change, torch.rand(6)
    assert torch.equal(delta.tensors["w"].change(other, 0, 6), new - other)
    assert torch.allclose(other + delta.tensors["w"].change(other, 0, 6), new)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    for encoding in (Levels(), Replacement()):
        with pytest.raises(NonFinite, match="element 2"):
            stored(tmp_path, encoding, torch.tensor([0.0, 1.0, torch.nan, 2.0]))


@pytest.mark.parametrize(
    ("entry", "parts", "why"),
    [
        ({"levels": 1}, {}, "2 to 65,536 levels"),
        ({"levels": True}, {}, "2 to 65,536 levels"),
        ({"levels": 2**40}, {}, "2 to 65,536 levels"),
        ({"scale": "cubic"}, {}, "a scale, linear or log"),
        ({"shape": [2**40]}, {}, "stores codes as uint8"),
        ({}, {"w::codes": torch.zeros(1, dtype=torch.uint8)}, "stores codes as uint8"),
        ({}, {"w::range": torch.zeros(3)}, "stores range as float32"),
        ({}, {"w::extra": torch.zeros(3)}, "needs codes and range"),
        ({}, {"w::range": torch.tensor([0.0, torch.inf])}, "NaN or infinity"),
        ({}, {"w::range": torch.tensor([1.0, 0.0])}, "down to"),
        ({"levels": 3}, {"w::codes": torch.tensor([255, 255], dtype=torch.uint8)}, "only 3 levels"),
        ({"scale": "log"}, {}, "needs codes and table"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, entry: dict[str, Any], parts: dict[str, Tensor], why: str) -> None:
    sound = {"w::codes": torch.zeros(2, dtype=torch.uint8), "w::range": torch.tensor([0.0, 1.0])}
    with pytest.raises(CheckpointError, match=why):
        delta = written(tmp_path, ENTRY | entry, sound | parts)
        delta.tensors["w"].prepare()
        changes(delta, (5,))
