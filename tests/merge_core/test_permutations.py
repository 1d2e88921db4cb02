"""Permuted models, and the file that permutations are kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from merge_core.alignment.permutations import Permutations, Permuted
from merge_core.alignment.spec import Axes, Blocks, Concat, Fixed, PermutationSpec
from merge_core.alignment.spec import Permuted as Moved
from merge_core.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, IncompatibleModels
from merge_core.headers import TensorInfo, read_metadata
from merge_core.weights import Derived
from tests.conftest import write_checkpoint

BLOCKS = Blocks("heads", 2, (Moved("a"), Moved("b")))
SPEC = PermutationSpec(
    {"P": 300, "heads": 2, "a": 3, "b": 3},
    {
        "rows": (Moved("P"), None),
        "bias": (Moved("P"),),
        "both": (Concat((BLOCKS, Fixed(2), BLOCKS)), Moved("P"), None),
        "columns": (None, BLOCKS, Moved("P")),
        "none": (None, None),
        "count": (),
        "empty": (None, Moved("P")),
    },
)
SHAPES = {"rows": (300, 70), "bias": (300,), "both": (14, 300, 2), "columns": (4, 6, 300), "none": (3, 2), "count": ()}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made |= {"bias": made["bias"].to(torch.bfloat16), "columns": made["columns"].to(torch.float8_e4m3fn)}
    return made | {"empty": torch.empty(0, 300, dtype=torch.float64), "both": made["both"] > 0}


@pytest.fixture
def stored(tmp_path: Path) -> Checkpoint:
    write_checkpoint(tmp_path / "model", tensors())
    return Checkpoint.open(tmp_path / "model")


def expected(values: Tensor, axes: Axes, indexed: Mapping[str, Any]) -> Tensor:
    values = values.view(torch.uint8) if values.dtype.itemsize == 1 else values
    for number, axis in enumerate(axes):
        if axis is not None:
            values = values.index_select(number, torch.from_numpy(SPEC.index(axis, indexed)))
    return values


def all_rows(weights: Permuted, name: str, step: int, *, spaced: bool = False) -> Tensor:
    info = weights.tensors[name]
    parts = []
    for start in range(0, info.rows, step):
        stop = min(start + step, info.rows)
        space = torch.empty(info.nbytes + 64, dtype=torch.uint8) if spaced else None
        rows = weights.rows(info, start, stop, space)
        assert space is None or not rows.numel() or rows.data_ptr() == space.data_ptr()
        parts.append(rows if info.shape else rows[None])
    whole = torch.cat(parts) if parts else torch.empty(info.shape, dtype=info.dtype.torch)
    return whole.view(torch.uint8) if info.dtype.itemsize == 1 else whole


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("spaced", [False, True])
def test_rows_are_those_of_the_permuted_tensors(stored: Checkpoint, step: int, spaced: bool) -> None:
    indexed = SPEC.random(5)
    permuted = Permuted(stored, SPEC, indexed)

    for name, values in tensors().items():
        rows = all_rows(permuted, name, step, spaced=spaced)
        assert torch.equal(rows.reshape(values.shape), expected(values, SPEC.axes[name], indexed)), name


def test_permuting_and_undoing_it_gives_the_same_bits(stored: Checkpoint) -> None:
    indexed = SPEC.random(6)

    back = Permuted(Permuted(stored, SPEC, indexed), SPEC, SPEC.inverse(indexed))

    for name, values in tensors().items():
        same = values.view(torch.uint8) if values.dtype.itemsize == 1 else values
        assert torch.equal(all_rows(back, name, 5).reshape(values.shape), same), name


def test_only_what_stays_lies_somewhere(stored: Checkpoint) -> None:
    unknown, identity = Permuted(stored, SPEC), Permuted(stored, SPEC, SPEC.identity())

    places = {name: unknown.place(info) is not None for name, info in stored.tensors.items()}

    assert places == {name: name in ("none", "count") for name in stored.tensors}
    assert all(identity.place(info) == stored.place(info) for info in stored.tensors.values())
    assert unknown.temporary(stored.tensors["none"]) == 0 == unknown.thread_bytes(stored.tensors["none"])
    assert unknown.temporary(stored.tensors["bias"]) >= 40
    assert unknown.temporary(stored.tensors["columns"]) == 2 < unknown.thread_bytes(stored.tensors["rows"])
    assert list(unknown.ranges(stored.tensors["rows"])) == list(stored.ranges(stored.tensors["rows"]))
    unknown.arrange(SPEC.identity())
    assert unknown.place(stored.tensors["rows"]) == stored.place(stored.tensors["rows"])


class Whole(Derived):
    """Weights whose rows can only be computed all at once."""

    def is_whole(self, info: TensorInfo) -> bool:
        return True

    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        assert (start, stop) == (0, info.rows)
        return self.inner.rows(info, start, stop)


def test_what_is_computed_at_once_is_asked_for_at_once(stored: Checkpoint) -> None:
    indexed = SPEC.random(7)
    permuted = Permuted(Whole(stored), SPEC, indexed)

    rows = all_rows(permuted, "rows", 300)

    assert permuted.is_whole(stored.tensors["rows"])
    assert torch.equal(rows, expected(tensors()["rows"], SPEC.axes["rows"], indexed))


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    spec = PermutationSpec({"P": 8}, {"wide": (Moved("P"), None)})
    write_checkpoint(tmp_path, {"wide": torch.ones(8, 400)})
    with Permuted(Checkpoint.open(tmp_path), spec, spec.random(1)) as permuted:
        permuted.rows(permuted.tensors["wide"], 0, 8)
        os.truncate(tmp_path / "model.safetensors", 5000)

        with pytest.raises(CheckpointError, match="ends inside wide"):
            permuted.rows(permuted.tensors["wide"], 0, 8)


def test_a_spec_that_does_not_fit_the_model_is_refused(stored: Checkpoint) -> None:
    with pytest.raises(IncompatibleModels, match="does not say what happens to"):
        Permuted(stored, PermutationSpec({}, {}))


# The file.


@pytest.fixture
def found() -> Permutations:
    return Permutations(SPEC, {"one": SPEC.random(1), "org/two": SPEC.random(2)}, {"seed": 3})


def equal(one: Permutations, other: Permutations) -> bool:
    return one.models.keys() == other.models.keys() and all(
        np.array_equal(index, other.models[model][name])
        for model, indexed in one.models.items()
        for name, index in indexed.items()
    )


def test_the_file_gives_the_same_permutations_again(found: Permutations, tmp_path: Path) -> None:
    written = found.save(tmp_path / "alignment.safetensors")
    read = Permutations.open(tmp_path / "alignment.safetensors")

    assert equal(read, found)
    assert (read.spec, read.provenance) == (SPEC, {"seed": 3})
    assert written.size == (tmp_path / "alignment.safetensors").stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["alignment.safetensors"]
    assert equal(found.then(found.inverse()), Permutations.identity(SPEC, ["one", "org/two"]))
    assert found.moved("one")["P"] > 290
    assert set(Permutations.identity(SPEC, ["one"]).moved("one").values()) == {0}


def test_permutations_of_other_models_are_not_chained(found: Permutations) -> None:
    with pytest.raises(IncompatibleModels, match="same models"):
        found.then(Permutations.identity(SPEC, ["one"]))


def _lies() -> dict[str, tuple[dict[str, Any], dict[str, str], str]]:
    """What is wrong → other vectors (None: gone), other metadata, and what the refusal says."""
    return {
        "twice": ({"0::a": np.array([0, 0, 1], np.int32)}, {}, "no permutation"),
        "outside": ({"0::a": np.array([0, 1, 3], np.int32)}, {}, "no permutation"),
        "negative": ({"0::a": np.array([0, 1, -1], np.int32)}, {}, "no permutation"),
        "short": ({"0::a": np.array([0, 1], np.int32)}, {}, r"expected int32 \[3\]"),
        "floats": ({"0::a": np.array([0, 1, 2], np.float32)}, {}, "expected int32"),
        "missing": ({"0::a": None}, {}, "lacks 0::a"),
        "too many": ({"2::a": np.array([0, 1, 2], np.int32)}, {}, "holds 2::a"),
        "format": ({}, {"format": "pt"}, "holds no permutations"),
        "version": ({}, {"version": "2"}, "of version 2"),
        "models": ({}, {"models": '["one", 3]'}, "no list of model names"),
        "same models": ({}, {"models": '["one", "one"]'}, "names a model twice"),
        "provenance": ({}, {"provenance": "[]"}, "no JSON object"),
        "json": ({}, {"spec": "{"}, "no JSON"),
        "deep": ({}, {"spec": "[" * 100_000}, "no JSON"),
        "spec": ({}, {"spec": '{"w": ["P"]}'}, "how large P is"),
        "blocks": ({}, {"spec": '{"w": [{"blocks": null, "count": 2, "of": []}]}'}, "0 expressions"),
    }


@pytest.mark.parametrize("name", _lies())
def test_a_file_that_lies_is_refused(found: Permutations, name: str, tmp_path: Path) -> None:
    vectors, metadata, says = _lies()[name]
    file = tmp_path / "alignment.safetensors"
    found.save(file)
    changed = {key: vector for key, vector in (load_file(file) | vectors).items() if vector is not None}
    save_file(changed, file, {**read_metadata(file), **metadata})

    with pytest.raises(CheckpointError, match=says):
        Permutations.open(file)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text(json.dumps({"not": "tensors"}))

    with pytest.raises(CheckpointError):
        Permutations.open(tmp_path / "text.safetensors")
    write_checkpoint(tmp_path / "model", tensors())
    with pytest.raises(CheckpointError, match="holds no permutations"):
        Permutations.open(tmp_path / "model" / "model.safetensors")
    write_checkpoint(tmp_path / "sharded", tensors(), shards=2)
    with pytest.raises(CheckpointError, match="in several files"):
        Permutations.open(tmp_path / "sharded")


def test_a_file_that_speaks_of_more_than_any_holds_is_refused(found: Permutations, tmp_path: Path) -> None:
    file = tmp_path / "alignment.safetensors"
    found.save(file)
    sizes = {f"P{i}": 1 for i in range(5000)}
    metadata = {"spec": json.dumps({"axes": {}, "permutations": sizes}), "models": json.dumps([*sizes])}
    save_file(load_file(file), file, {**read_metadata(file), **metadata})

    with pytest.raises(CheckpointError, match="names 25,000,000 vectors"):
        Permutations.open(file)
