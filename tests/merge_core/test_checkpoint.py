"""Headers are not trusted; what is read is what safetensors reads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from merge_core.checkpoint import Checkpoint
from merge_core.errors import CheckpointError, CheckpointNotFound, PathNotAllowed, UnsafeFormat, WeightsmithError
from merge_core.headers import MAX_HEADER_BYTES
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), begin: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_number_format_by_rows(tmp_path: Path, shards: int) -> None:
    tensors = mixed_tensors(1)
    write_checkpoint(tmp_path / "m", tensors, shards=shards, config=CONFIG)

    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert checkpoint.tensors.keys() == tensors.keys()
        assert checkpoint.config == CONFIG
        for name, expected in tensors.items():
            info = checkpoint.tensors[name]
            assert torch.equal(checkpoint.rows(info, 0, info.rows), expected), name
            if expected.ndim and len(expected) > 2:
                assert torch.equal(checkpoint.rows(info, 1, 3), expected[1:3]), name


def test_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "weights.safetensors")
    with Checkpoint.open(tmp_path / "weights.safetensors") as checkpoint:
        assert list(checkpoint.tensors) == ["w"] and checkpoint.folder is None


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tensors = mixed_tensors(0)
    del tensors["lm_head.weight"]
    write_checkpoint(tmp_path / "m", tensors, config={**CONFIG, "tie_word_embeddings": True})
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        found = checkpoint.find("lm_head.weight", (96, 24))
        assert found is checkpoint.tensors["model.embed_tokens.weight"]
        assert checkpoint.find("lm_head.weight", (95, 24)) is None
        assert checkpoint.find("other.weight", (1, 2)) is None


SHAPED = b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}'
LIES: dict[str, tuple[Any, bytes]] = {
    "not JSON": (b"{nonsense", b""),
    "not an object": ([1, 2], b""),
    "leading space": (b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
    "deep nesting": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "duplicate key": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "unknown dtype": ({"a": entry("F17")}, b"\0" * 8),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
    "entry is a list": ({"a": [1]}, b"\0" * 8),
    "negative shape": ({"a": entry(shape=(-2,))}, b"\0" * 8),
    "shape is a float": ({"a": entry(shape=(2.0,))}, b"\0" * 8),  # type: ignore[arg-type]
    "shape is a truth": ({"a": entry("U8", (True,), 0, 1)}, b"\0"),
    "huge shape": ({"a": entry(shape=(2**40, 2**40))}, b"\0" * 8),
    "size of another shape": ({"a": entry(shape=(3,))}, b"\0" * 8),
    "begin after end": ({"a": entry(begin=8, end=0)}, b"\0" * 8),
    "hole": ({"a": entry(), "b": entry(begin=12, end=20)}, b"\0" * 20),
    "overlap": ({"a": entry(), "b": entry(begin=4, end=12)}, b"\0" * 12),
    "past the end": ({"a": entry()}, b"\0" * 4),
    "trailing bytes": ({"a": entry()}, b"\0" * 9),
    "dimension of a million digits": (
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "two million dimensions": (
        b'{"a":{"dtype":"U8","shape":[9' + b",9" * 2_000_000 + b'],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "name too long": ({"a" * 2000: entry()}, b"\0" * 8),
    "name with control characters": ({"a\x1b[2J": entry()}, b"\0" * 8),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    header, data = LIES[lie]
    path = write_raw(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        Checkpoint.open(path)


@pytest.mark.parametrize("length", [2**63, 10**12, MAX_HEADER_BYTES + 1])
def test_a_header_too_long_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "a.safetensors", b"{}", length=length)
    if length == MAX_HEADER_BYTES + 1:
        os.truncate(path, 2 * MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match=r"cut short|at most"):
        Checkpoint.open(path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", mixed_tensors(0), shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: is cut short"):
        Checkpoint.open(folder)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_the_library_refuses_we_refuse_and_the_rest_reads_alike(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int8), "c": torch.zeros(0, 2)}, path
    )
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) - 1, 40, 9, 3]))])

    try:
        with safe_open(path, "pt"):
            theirs = load_file(path)
    except (SafetensorError, UnicodeDecodeError, RuntimeError):
        theirs = None
    try:
        with Checkpoint.open(path) as checkpoint:
            ours = {name: checkpoint.rows(info, 0, info.rows) for name, info in checkpoint.tensors.items()}
    except WeightsmithError:
        return
    assert theirs is not None, "we read what the library refuses"
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 7, ""]
)
def test_an_index_leads_nowhere_but_to_shards_beside_it(tmp_path: Path, target: object) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": target}}))
    with pytest.raises(CheckpointError, match="no shard name"):
        Checkpoint.open(folder)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", mixed_tensors(0), shards=2)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())

    extra = {**listed, "weight_map": {**listed["weight_map"], "ghost": "model-00001-of-00002.safetensors"}}
    index.write_text(json.dumps(extra))
    with pytest.raises(CheckpointError, match="lacks ghost"):
        Checkpoint.open(folder)

    del listed["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=r"holds model\.norm\.weight, but the index does not list it"):
        Checkpoint.open(folder)


def test_paths_stay_below_the_roots(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    write_checkpoint(secret, mixed_tensors(0))
    write_checkpoint(root / "good", mixed_tensors(0))
    (root / "link").symlink_to(secret)
    (root / "half").mkdir()
    (root / "half" / "model.safetensors").symlink_to(secret / "model.safetensors")

    Checkpoint.open(root / "good", roots=[root]).close()
    for path in (secret, root / ".." / "secret", root / "link", root / "half"):
        with pytest.raises(PathNotAllowed):
            Checkpoint.open(path, roots=[root])


def test_pickles_and_nothing_are_told_apart(tmp_path: Path) -> None:
    pickled, empty = tmp_path / "pickled", tmp_path / "empty"
    pickled.mkdir()
    empty.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UnsafeFormat, match="convert it to safetensors"):
        Checkpoint.open(pickled)
    with pytest.raises(UnsafeFormat):
        Checkpoint.open(pickled / "pytorch_model.bin")
    for path in (empty, tmp_path / "nowhere"):
        with pytest.raises(CheckpointNotFound):
            Checkpoint.open(path)


def test_a_file_that_is_replaced_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"w": torch.ones(3)})
    with Checkpoint.open(folder) as checkpoint:
        save_file({"w": torch.zeros(3)}, tmp_path / "other.safetensors")
        (tmp_path / "other.safetensors").replace(folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="changed after its header was read"):
            checkpoint.rows(checkpoint.tensors["w"], 0, 3)


def _fifo(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "model.safetensors")


def _loop(folder: Path) -> None:
    folder.symlink_to(folder)


def _long_index(folder: Path) -> None:
    folder.mkdir()
    weight_map = {"w": "x" * 300 + ".safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _odd_names(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"\\ud800": "a.safetensors"}}')


def _folder_for_a_file(folder: Path) -> None:
    (folder / "model.safetensors").mkdir(parents=True)


def _folder_for_a_config(folder: Path) -> None:
    write_checkpoint(folder, {"w": torch.ones(1)})
    (folder / "config.json").mkdir()


@pytest.mark.parametrize("make", [_fifo, _loop, _long_index, _odd_names, _folder_for_a_file, _folder_for_a_config])
@pytest.mark.parametrize("rooted", [True, False])
def test_odd_things_in_place_of_files_are_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], rooted: bool
) -> None:
    make(tmp_path / "m")
    with pytest.raises(WeightsmithError) as refused:
        Checkpoint.open(tmp_path / "m", roots=[tmp_path] if rooted else None)
    str(refused.value).encode()
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
@pytest.mark.parametrize("rooted", [True, False])
def test_names_that_the_system_refuses(tmp_path: Path, path: str, rooted: bool) -> None:
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(tmp_path / path, roots=[tmp_path] if rooted else None)
    assert len(str(refused.value)) < 1000


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"w": torch.ones(100_000)})
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.rows(checkpoint.tensors["w"], 0, 1)
        os.truncate(folder / "model.safetensors", 1000)
        with pytest.raises(CheckpointError, match="changed while being read"):
            checkpoint.rows(checkpoint.tensors["w"], 0, 100_000)
        with pytest.raises(CheckpointError, match="changed"):
            checkpoint.check_unchanged()
