"""Deltas: what differs between a model and its base, stored small and added back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from merge_core.checkpoint import Checkpoint
from merge_core.errors import (
    Canceled,
    CheckpointError,
    IncompatibleModels,
    MemoryLimitExceeded,
    NonFinite,
    RecipeError,
    WeightsmithError,
)
from merge_core.journal import JOURNAL, Journal
from merge_core.merge import merge, plan_only
from merge_core.patches.delta import DELTA_NAME, Delta
from merge_core.patches.encoding import Encoding
from merge_core.patches.encodings.dense import Dense
from merge_core.patches.encodings.levels import Levels
from merge_core.patches.encodings.low_rank import LowRank
from merge_core.patches.encodings.sign import Sign
from merge_core.patches.encodings.sparse import Sparse
from merge_core.patches.patched import Patched, ScaledDelta
from merge_core.patches.writing import Extraction, assemble, encode_all
from merge_core.patching import describe
from merge_core.plan import Plan
from merge_core.progress import Progress
from merge_core.recipe import Recipe
from tests.conftest import method_recipe, mixed_tensors, write_checkpoint

Tensors = Mapping[str, Tensor]
DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint16,
    torch.bool,
]


def extract(folder: Path, base: Tensors, tuned: Tensors, encoding: Encoding) -> Path:
    """Write both models and their delta; the folder with it."""
    for name, tensors in (("base", base), ("tuned", tuned)):
        write_checkpoint(folder / name, tensors)
    out = folder / "delta"
    out.mkdir()
    with Checkpoint.open(folder / "base") as one, Checkpoint.open(folder / "tuned") as other:
        extraction = Extraction.of(one, other, encoding)
        journal = Journal(out / JOURNAL, "")
        journal.open()
        encoded, _ = encode_all(extraction, out, journal, threads=2)
        assemble(encoded, extraction, out, {})
        journal.close()
    (out / JOURNAL).unlink()
    return out


def patched(base: Path, delta: Path, strength: float = 1.0, step: int = 10**9) -> dict[str, Tensor]:
    """All tensors of a model with a delta on it, read by so many rows."""
    with Patched(Checkpoint.open(base), [ScaledDelta(Delta.open(delta), "delta", strength)]) as model:
        found = {}
        for name, info in model.tensors.items():
            runs = [
                model.rows(info, start, min(start + step, info.rows)) for start in range(0, max(1, info.rows), step)
            ]
            found[name] = runs[0] if not info.shape else torch.cat(runs)
        return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def changed(tensor: Tensor, share: float, seed: int = 0) -> Tensor:
    """A tensor of which about that share has other bits."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tensor.shape, generator=generator) < share
    if tensor.dtype == torch.bool:
        return tensor ^ mask
    found = tensor.clone()
    bits(found).reshape(*tensor.shape, tensor.element_size())[mask] ^= 1
    return found


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A tensor of any bits, NaN, infinities and signed zeros included, and one of which some bits are others."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
    base = raw.view(dtype).reshape(shape)
    return base, changed(base, draw(st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.97, 1.0])), draw(st.integers(0, 99)))


@settings(max_examples=30)
@given(pair=pairs(), step=st.sampled_from([1, 2, 5, 100]))
def test_sparse_gives_the_very_bits(tmp_path_factory: pytest.TempPathFactory, pair: tuple[Tensor, Tensor], step: int):
    folder = tmp_path_factory.mktemp("sparse")
    base, tuned = {"w": pair[0], "same": torch.arange(3)}, {"w": pair[1], "same": torch.arange(3)}

    delta = extract(folder, base, tuned, Sparse())

    assert_same_bits(patched(folder / "base", delta, step=step), tuned)


def test_whatever_differs_is_kept(tmp_path: Path):
    base = mixed_tensors(0)
    tuned = {name: changed(tensor, 0.1) for name, tensor in base.items()}
    tuned["model.layers.0.self_attn.q_proj.weight"] = torch.randn(30, 24)  # another shape and format
    tuned["model.layers.1.self_attn.q_proj.weight"] = torch.randn(24, 24).double()
    tuned["model.added"] = torch.tensor(2.0)
    del tuned["model.mask"]

    delta = extract(tmp_path, base, tuned, Sparse())

    assert_same_bits(patched(tmp_path / "base", delta), tuned)
    with Delta.open(delta) as opened:
        assert opened.removed == ("model.mask",)
        assert "model.nothing" not in opened.tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.03125, 0.2, 0.33])
def test_a_sparse_delta_is_smaller_than_the_model(tmp_path: Path, dtype: torch.dtype, share: float):
    base = {"w": torch.randn(100, 90).to(dtype), "same": torch.randn(50, 50)}
    tuned = base | {"w": changed(base["w"], share)}

    delta = extract(tmp_path, base, tuned, Sparse())

    size, dense = (folder.stat().st_size for folder in (delta / DELTA_NAME, tmp_path / "tuned/model.safetensors"))
    count = int((base["w"] != tuned["w"]).sum())
    smallest = min(9000 // 8, 4 * count) + count * dtype.itemsize
    assert size < dense
    assert size - 700 <= smallest <= size  # the header comes on top


def test_bitmap_or_index_of_one_size(tmp_path: Path):
    base = {"w": torch.zeros(32, 8)}
    tuned = {"w": base["w"].clone()}
    tuned["w"].view(-1)[::32] = 1.0  # 8 of 256: 32 bytes either way

    delta = extract(tmp_path, base, tuned, Sparse())

    with Delta.open(delta) as opened:
        assert set(opened.tensors["w"].entry.parts) == {"bitmap", "values"}
    assert_same_bits(patched(tmp_path / "base", delta), tuned)


def test_nothing_changed_is_an_empty_delta(tmp_path: Path):
    base = mixed_tensors(0)

    delta = extract(tmp_path, base, base, Sparse())

    assert (delta / DELTA_NAME).stat().st_size < 300
    assert_same_bits(patched(tmp_path / "base", delta), base)


def test_a_sparse_delta_is_for_its_own_base(tmp_path: Path):
    base, tuned = ({"w": torch.randn(40, 30), "v": torch.randn(5)} for _ in range(2))
    tuned["v"] = base["v"]
    delta = extract(tmp_path, base, tuned | {"w": changed(base["w"], 0.1)}, Sparse())
    write_checkpoint(tmp_path / "other", base | {"w": changed(base["w"], 0.001, seed=7)})
    write_checkpoint(tmp_path / "narrow", base | {"w": base["w"].half()})
    write_checkpoint(tmp_path / "lacking", {"v": base["v"]})
    write_checkpoint(tmp_path / "elsewhere", base | {"v": torch.randn(5)})

    with pytest.raises(IncompatibleModels, match="w of the base is not the one"):
        patched(tmp_path / "other", delta)
    with pytest.raises(IncompatibleModels, match="float32, but that of the base is in float16"):
        patched(tmp_path / "narrow", delta)
    with pytest.raises(IncompatibleModels, match="changes w, which the base has not"):
        patched(tmp_path / "lacking", delta)
    patched(tmp_path / "elsewhere", delta)  # of tensors that it leaves alone it says nothing


@pytest.mark.parametrize("encoding", [Sparse(), Dense()], ids=lambda each: each.name)
def test_strength_scales_the_difference(tmp_path: Path, encoding: Encoding):
    base = {"w": torch.randn(40, 30).bfloat16(), "d": torch.randn(9).double(), "n": torch.arange(4)}
    tuned = {"w": changed(base["w"], 0.3), "d": changed(base["d"], 1.0), "n": torch.arange(4) + 1}
    delta = extract(tmp_path, base, tuned, encoding)

    found = patched(tmp_path / "base", delta, 0.5)

    assert found["w"].dtype == torch.float32
    torch.testing.assert_close(found["w"], (base["w"].float() + tuned["w"].float()) / 2)
    torch.testing.assert_close(found["d"], (base["d"] + tuned["d"]) / 2)
    assert torch.equal(found["n"], base["n"])  # half of another integer is none


def test_sign_has_the_mean_magnitude(tmp_path: Path):
    base = {"w": torch.randn(30, 7), "norm": torch.randn(7)}
    tuned = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in base.items()}

    delta = extract(tmp_path, base, tuned, Sign())

    change = tuned["w"] - base["w"]
    signs = torch.where(change >= 0, 1.0, -1.0)
    found = patched(tmp_path / "base", delta, step=4)
    torch.testing.assert_close(found["w"], base["w"] + change.abs().mean() * signs)
    torch.testing.assert_close(found["norm"], tuned["norm"])
    with Delta.open(delta) as opened:
        assert opened.tensors["w"].entry.parts["signs"].nbytes == 27


@pytest.mark.parametrize("encoding", [Dense(dtype="float16"), LowRank(rank=2, dtype="float16")], ids=type)
def test_a_change_must_fit_into_its_format(tmp_path: Path, encoding: Encoding):
    base = {"w": torch.zeros(8, 8)}
    with pytest.raises(NonFinite, match="does not fit into float16"):
        extract(tmp_path, base, {"w": torch.full((8, 8), 1e15)}, encoding)


@pytest.mark.parametrize("encoding", [Dense(), Levels(), Sign()], ids=type)
def test_an_infinity_that_stays_is_no_change(tmp_path: Path, encoding: Encoding):
    base = {"w": torch.zeros(4, 4), "mask": torch.full((4, 4), -torch.inf).triu(1)}
    delta = extract(tmp_path, base, {**base, "w": base["w"] + 1}, encoding)
    assert_same_bits(patched(tmp_path / "base", delta), {**base, "w": base["w"] + 1})


@pytest.mark.parametrize("encoding", [Sparse(), Dense()], ids=type)
def test_a_tied_head_follows_its_embedding(tmp_path: Path, encoding: Encoding):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    tied, tuned = {embedding: torch.rand(6, 4)}, {embedding: torch.rand(6, 4)}
    extract(tmp_path, tied, tuned, encoding)
    extract_of_both = extract(tmp_path / "both", tied | {head: tied[embedding].clone()}, tuned, encoding)
    config = {"tie_word_embeddings": True}
    write_checkpoint(tmp_path / "other", tied | {head: tied[embedding].clone()}, config=config)

    found = patched(tmp_path / "other", tmp_path / "delta", 0.5)
    assert torch.equal(found[head], found[embedding]) and not torch.equal(found[embedding], tied[embedding])
    found = patched(tmp_path / "other", extract_of_both, 0.5)  # which takes the head away
    assert found.keys() == {embedding}


def test_a_change_may_go_onto_another_base(tmp_path: Path):
    base = {"w": torch.randn(30, 7)}
    delta = extract(tmp_path, base, {"w": base["w"] + 1}, Dense())
    write_checkpoint(tmp_path / "other", {"w": torch.zeros(30, 7).half()})

    torch.testing.assert_close(patched(tmp_path / "other", delta)["w"], torch.ones(30, 7))


# As the output of a merge.


def run(models: Path, out: str, recipe: dict[str, Any], **how: Any) -> Path:
    """Carry out a recipe on the models of the fixture; the folder of the result."""
    merge(Recipe.from_data(recipe), models / out, roots=[models], threads=2, **how)
    return models / out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with Checkpoint.open(folder) as model:
        return {name: model.rows(info, 0, info.rows) for name, info in model.tensors.items()}


@pytest.mark.parametrize("title", ["linear", "ties-model", "tsv_m"])
def test_a_merge_as_a_delta_is_the_merge(models: Path, title: str):
    recipe = method_recipe(title) | {"base_model": "base"}

    full = run(models, "full", recipe)
    delta = run(models, "delta", recipe | {"outputs": "delta"})
    again = run(models, "again", {"merge_method": "passthrough", "models": [{"model": "base+delta"}]})

    assert_same_bits(tensors_of(again), tensors_of(full))
    lock = json.loads((delta / "merge.lock.json").read_text())
    assert lock["files"][0]["path"] == DELTA_NAME
    assert any(source["model"] == "base" and source["files"] for source in lock["sources"])
    for name in ("config.json", "README.md", "mergekit_config.yml"):
        assert (delta / name).is_file()
    planned = plan_only(Recipe.from_data(recipe | {"outputs": "delta"}), roots=[models])
    assert planned.to_dict()["bytes_written_at_most"]
    assert (delta / DELTA_NAME).stat().st_size <= planned.output_bytes


# As an adapter.


def layered(seed: int) -> dict[str, Tensor]:
    """A tiny layered model in float32; those of other seeds differ from that of 0 in everything."""
    start, own = (torch.Generator().manual_seed(number) for number in (0, seed))

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=start) + (0.1 * torch.randn(shape, generator=own) if seed else 0)

    found = {"model.embed_tokens.weight": some(20, 8), "model.norm.weight": some(8), "lm_head.weight": some(20, 8)}
    for layer in range(2):
        found |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": some(8, 8),
            f"model.layers.{layer}.self_attn.q_proj.bias": some(8),
            f"model.layers.{layer}.mlp.up_proj.weight": some(12, 8),
            f"model.layers.{layer}.mlp.down_proj.weight": some(8, 12),
            f"model.layers.{layer}.conv.weight": some(6, 4, 3, 3),
            f"model.layers.{layer}.input_layernorm.weight": some(8),
        }
    return found


def extracted(folder: Path, base: Tensors, tuned: Tensors, outputs: Any, config: Mapping[str, Any] = {}) -> Path:
    """An output of the difference between two models; a folder."""
    for name, tensors in (("base", base), ("tuned", tuned)):
        write_checkpoint(folder / name, tensors, config=config)
    return run(
        folder,
        "output",
        {"merge_method": "passthrough", "base_model": "base", "models": [{"model": "tuned"}], "outputs": outputs},
    )


def test_the_difference_of_two_models_loses_nothing(tmp_path: Path):
    base = mixed_tensors(0)
    tuned = {name: changed(tensor, 0.1) for name, tensor in base.items()} | {"model.added": torch.randn(3)}
    tuned["model.embed_tokens.weight"] = torch.randn(97, 24).bfloat16()
    del tuned["model.mask"]

    extracted(tmp_path, base, tuned, "delta")

    run(tmp_path, "again", {"merge_method": "passthrough", "models": [{"model": "base+output"}]})
    assert_same_bits(tensors_of(tmp_path / "again"), tuned)


def with_adapter(folder: Path) -> dict[str, Tensor]:
    run(folder, "again", {"merge_method": "passthrough", "models": [{"model": "base+output"}], "dtype": "float64"})
    return tensors_of(folder / "again")


@pytest.mark.parametrize("rank", [2, 8])
def test_an_adapter_is_the_nearest_of_its_rank(tmp_path: Path, rank: int):
    base, tuned = layered(0), layered(1)
    tuned["model.layers.1.mlp.up_proj.weight"] = base["model.layers.1.mlp.up_proj.weight"]

    adapter = extracted(tmp_path, base, tuned, {"kind": "adapter", "rank": rank}, {"model_type": "tiny"})

    found = with_adapter(tmp_path)
    for name, tensor in tuned.items():
        change = (tensor - base[name]).double().reshape(len(tensor), -1)
        if "layers" in name and change.shape[1] > 1:
            wanted = torch.linalg.svdvals(change)[rank:].square().sum().sqrt()
        else:
            wanted = change.norm() if name.endswith("bias") else torch.tensor(0.0)
        error = (found[name] - tensor).norm()
        torch.testing.assert_close(float(error), float(wanted), atol=1e-5, rtol=1e-4)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not (adapter / "config.json").exists()
    assert config["r"] == config["lora_alpha"] == rank
    assert config["modules_to_save"][0] == "lm_head"
    assert "model.layers.0.mlp.up_proj" in config["target_modules"]
    (warning,) = json.loads((adapter / "merge.lock.json").read_text())["warnings"]
    assert "self_attn.q_proj.bias" in warning
    with Checkpoint.open(adapter / "adapter_model.safetensors") as file:
        shapes = {name: info.shape for name, info in file.tensors.items() if "layers.0.conv" in name}
    assert sorted(shapes.values()) == [(min(rank, 6), 4, 3, 3), (6, min(rank, 6), 1, 1)]


def test_an_adapter_of_turned_layers(tmp_path: Path):
    name = "h.0.attn.c_attn.weight"
    base = {name: torch.randn(6, 18), "h.0.attn.c_proj.weight": torch.randn(6, 6)}
    tuned = {key: tensor + 0.1 * torch.randn(tensor.shape) for key, tensor in base.items()}

    adapter = extracted(tmp_path, base, tuned, {"kind": "adapter", "energy": 1.0}, {"model_type": "gpt2"})

    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"]
    assert config["target_modules"] == ["c_attn", "c_proj"]
    with Checkpoint.open(adapter / "adapter_model.safetensors") as file:
        assert file.tensors["base_model.model.h.0.attn.c_attn.lora_A.weight"].shape == (6, 6)
        assert file.tensors["base_model.model.h.0.attn.c_attn.lora_B.weight"].shape == (18, 6)
    for key, tensor in with_adapter(tmp_path).items():
        torch.testing.assert_close(tensor.float(), tuned[key], atol=1e-5, rtol=1e-4)


def test_what_an_adapter_cannot_be(tmp_path: Path):
    base = layered(0)
    grown = base | {"model.embed_tokens.weight": torch.randn(21, 8), "model.more": torch.zeros(1)}
    del grown["lm_head.weight"]

    with pytest.raises(IncompatibleModels) as refused:
        extracted(tmp_path, base, grown, "adapter")

    wanted = {"model.embed_tokens.weight", "model.more", "lm_head.weight"}
    assert {problem.tensor for problem in refused.value.problems} == wanted
    with pytest.raises(IncompatibleModels, match="no matrix inside a layer differs"):
        extracted(tmp_path, base, base | {"model.norm.weight": torch.randn(8)}, "adapter")


# What an enemy may send.

BASE_DIGEST = blake3(bytes(64)).hexdigest()
SPARSE = {"encoding": "sparse", "shape": [4, 4], "dtype": "F32", "base": {"dtype": "F32", "blake3": BASE_DIGEST}}
SIGN = {**SPARSE, "encoding": "sign", "scale": 1.0}
LOW_RANK = {**SPARSE, "encoding": "low_rank"}


def whole(*values: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(dtype)


@pytest.mark.parametrize(
    ("entry", "parts", "message"),
    [
        (SPARSE | {"encoding": "magic"}, {}, "encoding we do not know"),
        (SPARSE | {"shape": [4, -4]}, {}, "a shape that is none"),
        (SPARSE | {"shape": [2**50, 2**50]}, {}, "more elements than any tensor has"),
        (SPARSE | {"dtype": "F31"}, {}, "the dtype F31"),
        (SPARSE | {"base": {"dtype": "F32", "blake3": 7}}, {}, "does not say what the base's w was"),
        (SPARSE | {"shape": "4"}, {}, "a shape that is none"),
        (["sparse"], {}, "that could be meant"),
        (SPARSE, {}, "needs values"),
        (SPARSE, {"values": torch.ones(3)}, r"stores values as float32 \[3\], not float32 \[16\]"),
        (SPARSE, {"values": torch.ones(1), "bitmap": whole(1, 0, 0)}, r"stores bitmap as uint8 \[3\]"),
        (SPARSE, {"values": torch.ones(1), "bitmap": whole(0, 1), "index": whole(1)}, "needs bitmap and values"),
        (SPARSE, {"values": torch.ones(2), "bitmap": whole(0, 1)}, "marks 1 changed elements, but stores 2"),
        (SPARSE, {"values": torch.ones(17), "bitmap": whole(255, 255)}, "stores 17 values of 16"),
        (SPARSE | {"shape": [3, 5], "base": {**SPARSE["base"], "shape": [3, 5]}},
         {"values": torch.ones(1), "bitmap": whole(0, 128)}, "marks element 15"),
        (SPARSE, {"values": torch.ones(2), "index": whole(1, 16, dtype=torch.uint32)}, "an index of 16"),
        (SPARSE, {"values": torch.ones(2), "index": whole(5, 5, dtype=torch.uint32)}, "does not rise"),
        (SPARSE, {"values": torch.ones(2), "index": whole(5, 2, dtype=torch.uint32)}, "does not rise"),
        (SPARSE, {"values": torch.ones(2), "index": whole(5, 2, dtype=torch.int32)}, "stores index as int32"),
        (SPARSE, {"values": torch.ones(2), "index": whole(5, dtype=torch.uint32)}, "stores index as uint32"),
        (SPARSE | {"base": {**SPARSE["base"], "dtype": "F16"}},
         {"values": torch.ones(1), "bitmap": whole(0, 1)}, "another in shape or format"),
        (SIGN | {"scale": float("nan")}, {"signs": whole(0, 0)}, "a scale that is no finite number"),
        (SIGN | {"scale": "1"}, {"signs": whole(0, 0)}, "a scale that is no finite number"),
        (SIGN | {"scale": 10**400}, {"signs": whole(0, 0)}, "a scale that is no finite number"),
        (SIGN | {"base": None}, {"signs": whole(0, 0)}, "of nothing that the base has in that shape"),
        (SIGN | {"shape": [2, 8], "base": {**SPARSE["base"], "shape": [4, 4]}},
         {"signs": whole(0, 0)}, "of nothing that the base has in that shape"),
        (SIGN, {"signs": whole(0)}, r"stores signs as uint8 \[1\]"),
        (LOW_RANK, {"left": torch.ones(4, 2), "right": torch.ones(3, 4)}, r"stores right as float32 \[3, 4\]"),
        (LOW_RANK, {"left": torch.ones(4, 5), "right": torch.ones(5, 4)}, "a rank of 5"),
        (LOW_RANK, {"left": torch.ones(4), "right": torch.ones(4)}, "stores left as"),
        (LOW_RANK, {"left": torch.ones(4, 2)}, "needs left and right"),
    ],
)  # fmt: skip
def test_a_delta_that_lies_is_refused(tmp_path: Path, entry: Any, parts: Tensors, message: str):
    write_checkpoint(tmp_path / "base", {"w": torch.zeros(entry["shape"] if message == "marks element 15" else (4, 4))})
    if message == "marks element 15":
        entry["base"]["blake3"] = blake3(bytes(60)).hexdigest()
    forge(tmp_path / DELTA_NAME, {f"w::{part}": values for part, values in parts.items()}, {"w": entry})

    with pytest.raises(CheckpointError, match=message) as refused:
        patched(tmp_path / "base", tmp_path / DELTA_NAME)

    assert refused.value.file.endswith(DELTA_NAME)


def forge(path: Path, parts: Tensors, tensors: Any, /, **metadata: str) -> None:
    said = {"format": "weightsmith-delta", "version": "1", "removed": "[]", "provenance": "{}"}
    save_file(dict(parts), path, metadata=said | {"tensors": json.dumps(tensors)} | metadata)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "is no delta"),
        ({"version": "2"}, "version 2"),
        ({"tensors": "{"}, "'tensors' that is no JSON object"),
        ({"tensors": "[" * 100_000}, "'tensors' that is no JSON object"),
        ({"tensors": "{}"}, "stores w::values, which its metadata says nothing of"),
        ({"removed": '[{"w": 1}]'}, "which it cannot"),
        ({"removed": '["w"]'}, "removes w"),
        ({"provenance": "1"}, "'provenance' that is no JSON object"),
    ],
)
def test_metadata_that_lie_are_refused(tmp_path: Path, metadata: dict[str, str], message: str):
    forge(tmp_path / DELTA_NAME, {"w::values": torch.ones(16)}, {"w": SPARSE}, **metadata)

    with pytest.raises(CheckpointError, match=message):
        Delta.open(tmp_path)


def test_settings_hide_nothing(tmp_path: Path):
    forge(tmp_path / DELTA_NAME, {"w::signs": whole(0, 0)}, {"w": SIGN | {"tensor": "\x1b[2J", "bytes": "none"}})
    with Delta.open(tmp_path) as delta:
        (told,) = describe(delta)["tensors"]
    assert (told["tensor"], told["bytes"], told["scale"]) == ("w", 2, 1.0)


def test_a_delta_with_nan_is_refused_like_a_model_with_nan(tmp_path: Path):
    write_checkpoint(tmp_path / "base", {"w": torch.zeros(4, 4)})
    forge(
        tmp_path / "nan.safetensors",
        {"w::left": torch.full((4, 1), torch.nan), "w::right": torch.ones(1, 4)},
        {"w": LOW_RANK},
    )

    with pytest.raises(NonFinite, match="w of base"):
        run(tmp_path, "out", {"merge_method": "passthrough", "models": [{"model": "base+nan.safetensors"}]})


def test_where_a_delta_cannot_stand(models: Path):
    run(models, "delta", method_recipe("linear") | {"base_model": "base", "outputs": "delta"})

    def refused(message: str, **recipe: Any) -> None:
        with pytest.raises(WeightsmithError, match=message):
            run(models, "out", {"merge_method": "linear", "parameters": {"weight": 1}} | recipe)

    refused("delta is a delta, not a model; write the model it is for before it", models=[{"model": "delta"}])
    refused(
        "m0 is a model with something on it|m0\\+delta is a model",
        models=[{"model": "m1"}],
        base_model="m0+delta",
        outputs="delta",
    )
    refused("name it as base_model", models=[{"model": "m1"}], outputs="delta")
    refused(
        "one file; leave it away",
        models=[{"model": "m1"}],
        base_model="base",
        outputs={"kind": "delta", "max_shard_size": 5},
    )
    refused("is not the one that the delta was made from", models=[{"model": "m1+delta"}])


# Work that is interrupted, and what it may use.


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("outputs", ["delta", {"kind": "delta", "encoding": "low_rank", "rank": 2}], ids=str)
def test_a_killed_extraction_goes_on(models: Path, outputs: Any):
    recipe = Recipe.from_data(method_recipe("task_arithmetic", outputs=outputs))
    wanted = merge(recipe, models / "wanted", roots=[models], threads=1)

    def kill(progress: Progress) -> None:
        if progress.tensors_done == 6:
            raise Killed

    (models / ".out.partial").mkdir()
    for left in ("journal.jsonl", "model.safetensors"):  # of a merge that was killed there before
        (models / ".out.partial" / left).write_text("")
    with pytest.raises(Killed):
        merge(recipe, models / "out", roots=[models], threads=1, report=kill)
    assert not (models / "out").exists()
    next((models / ".out.partial/parts").glob("000003.*")).write_bytes(b"torn")
    found = merge(recipe, models / "out", roots=[models], threads=2)

    assert found.resumed_tensors == 5
    assert found.tensors == wanted.tensors
    assert found.files[0] == wanted.files[0]
    assert not (models / "out/model.safetensors").exists()


def test_a_canceled_extraction_leaves_nothing(models: Path):
    recipe = Recipe.from_data(method_recipe("task_arithmetic", outputs="delta"))
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 20

    with pytest.raises(Canceled):
        merge(recipe, models / "out", roots=[models], stop=stop)
    assert not (models / "out").exists()
    assert not (models / ".out.partial").exists()


def vast(folder: Path, name: str) -> None:
    """A model of one embedding of 4 GB, of which only the header is there."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2**19, 2**12], "data_offsets": [0, 2**32]}}).encode()
    (folder / name).mkdir()
    with (folder / name / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**32)


def test_memory_is_planned(tmp_path: Path):
    vast(tmp_path, "base")
    vast(tmp_path, "tuned")
    recipe = {"merge_method": "passthrough", "base_model": "base", "models": [{"model": "tuned"}]}

    def planned(outputs: Any) -> Plan:
        limits = {"memory": "512MiB", "threads": 2}
        return plan_only(Recipe.from_data(recipe | {"outputs": outputs, "limits": limits}), roots=[tmp_path])

    for encoding in ("sparse", "sign", "dense", "levels"):
        assert planned({"kind": "delta", "encoding": encoding}).memory.peak <= 512 * 2**20
    assert planned("delta").output_bytes < 2**32 + 10_000
    with pytest.raises(MemoryLimitExceeded, match="to encode w"):
        planned({"kind": "delta", "encoding": "low_rank", "rank": 8})
    assert planned("delta").to_dict()["outputs"] == {"kind": "delta", "encoding": "sparse", "held_whole": 0}


# Low ranks.


def test_low_rank_is_the_method_of_that_name(models: Path):
    recipe = {"base_model": "base", "models": [{"model": "m0"}], "dtype": "float64"}
    covariance = {"statistics": {"covariance": "square.safetensors"}}

    for method, numbers, outputs in (
        ("low_rank", {}, {}),
        ("eora", covariance, {"covariance": "square.safetensors"}),
    ):
        run(models, method, recipe | numbers | {"merge_method": method, "parameters": {"rank": 3}})
        outputs = {"kind": "delta", "encoding": "low_rank", "rank": 3, **outputs}
        run(models, f"{method}-delta", recipe | {"merge_method": "passthrough", "outputs": outputs})
        model = f"base+{method}-delta"
        run(
            models, f"{method}-again", {"merge_method": "passthrough", "models": [{"model": model}], "dtype": "float64"}
        )
        wanted, found = tensors_of(models / method), tensors_of(models / f"{method}-again")
        for name, tensor in wanted.items():
            if tensor.is_floating_point() and name != "model.double":  # whole is smaller than rank 3
                torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4, msg=f"{method} {name}")


def test_ranks_by_energy_and_by_one_threshold(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    values = torch.tensor([8.0, 4.0, 2.0, 1.0] + [0.1] * 20, dtype=torch.float64)
    base = {name: torch.zeros(24, 24, dtype=torch.float64) for name in ("steep", "flat")}
    tuned = {"steep": left * values @ right.T, "flat": left @ right.T}

    def ranks(number: int, **rule: float) -> dict[str, int | None]:
        folder = tmp_path / str(number)
        with Delta.open(extract(folder, base, tuned, LowRank(**rule))) as delta:
            found = {name: tensor.entry.parts.get("left") for name, tensor in delta.tensors.items()}
            return {name: None if info is None else info.shape[1] for name, info in found.items()}

    assert ranks(1, energy=0.93)["steep"] == 2  # 64 + 16 of 85.2
    assert ranks(2, energy=0.1) == {"steep": 1, "flat": 3}
    assert ranks(3, threshold=0.12) == {"steep": 4, "flat": None}
    assert ranks(4, threshold=0.12, min_ratio=0.9)["steep"] is None
    assert ranks(5, rank=30) == {"steep": None, "flat": None}  # no smaller than the matrix


def test_what_was_learned_goes_onto_a_new_base(models: Path):
    """Fine-tuning transfer, of a fine-tune that is kept as a delta."""
    recipe = {"merge_method": "transfer", "base_model": "m1"}
    run(
        models,
        "kept",
        {"merge_method": "passthrough", "base_model": "base", "models": [{"model": "m0"}], "outputs": "delta"},
    )

    whole = run(models, "whole", recipe | {"models": [{"model": "m0", "base_model": "base"}]})
    small = run(models, "small", recipe | {"models": [{"model": "base+kept", "base_model": "base"}]})

    assert_same_bits(tensors_of(small), tensors_of(whole))


@pytest.mark.parametrize(
    ("outputs", "pointer", "message"),
    [
        ("dleta", "#/outputs/kind", "'full', 'delta' or 'adapter'"),
        ({"kind": "delta", "encoding": "sparce"}, "#/outputs", "did you mean sparse"),
        ({"kind": "delta", "encoding": "low_rank"}, "#/outputs", "one of rank, energy and threshold"),
        ({"kind": "delta", "encoding": "low_rank", "rnk": 2, "rank": 2}, "#/outputs/rnk", "did you mean rank"),
        ({"kind": "delta", "rank": 2}, "#/outputs/rank", "unknown key"),
        ({"kind": "adapter", "encoding": "sign"}, "#/outputs", "low_rank by its nature"),
        ({"kind": "delta", "covariance": "c"}, "#/outputs", "weighs low_rank only"),
        ({"encoding": "sparse"}, "#/outputs", "write kind: delta"),
    ],
)  # fmt: skip
def test_outputs_that_mean_nothing(outputs: Any, pointer: str, message: str):
    recipe = {"merge_method": "passthrough", "base_model": "base", "models": [{"model": "m"}], "outputs": outputs}

    with pytest.raises(RecipeError, match=message) as refused:
        Recipe.from_data(recipe)

    assert refused.value.problems[0].pointer == pointer


def test_a_covariance_must_fit(models: Path):
    outputs = {"kind": "delta", "encoding": "low_rank", "rank": 2}
    recipe = {"merge_method": "passthrough", "base_model": "base", "models": [{"model": "m0"}]}

    with pytest.raises(
        IncompatibleModels, match=r"covariance of model.embed_tokens.weight is float16 \[24\], not \[24, 24\]"
    ):
        run(models, "out", recipe | {"outputs": outputs | {"covariance": "columns.safetensors"}})
    with pytest.raises(WeightsmithError, match="elsewhere"):
        run(models, "out", recipe | {"outputs": outputs | {"covariance": "elsewhere.safetensors"}})
