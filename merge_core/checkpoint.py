"""The input side: a checkpoint is opened from its headers alone and read in blocks of rows.

A checkpoint is a folder in the Hugging Face layout (one `model.safetensors`, or shards with an index) or a single
`.safetensors` file. Nothing is trusted: every header is checked against its file before a weight is read.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from merge_core.dtypes import STORED, DType
from merge_core.errors import CheckpointError, CheckpointNotFound, PathNotAllowed, UnsafeFormat

MAX_HEADER_BYTES = 25_000_000
MAX_INDEX_BYTES = 64_000_000
MAX_TENSORS = 200_000
MAX_NAME_LENGTH = 1024
MAX_ELEMENTS = 2**56
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_EMBEDDING = re.compile(r"embed(?!_out)|(^|[._])(wte|wpe|shared|project_in|patch|pre_layrnorm|pre_layernorm)([._]|$)")


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: what it is and where its bytes begin. `file` is the shard's name inside the checkpoint."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    begin: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class Shard:
    """A safetensors file as it was when its header was read; `header_sha256` and the stat fields prove it is the
    same."""

    path: Path
    size: int
    mtime_ns: int
    header_sha256: str


def is_embedding(tensor: str) -> bool:
    """Whether a tensor outside the layers stands before them (embeddings) rather than after (final norm, head)."""
    return _EMBEDDING.search(tensor) is not None


class Checkpoint:
    """Named tensors in safetensors files, described by headers, read by rows.

    Attributes: `path`, what was opened; `tensors`, name → `TensorInfo` in storage order; `shards`, file name → `Shard`;
    `config`, the parsed `config.json` or an empty dict.
    """

    def __init__(
        self, path: Path, shards: Mapping[str, Shard], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> None:
        self.path, self.shards, self.tensors, self.config = path, shards, tensors, config
        self._descriptors: dict[str, int] = {}

    @classmethod
    def open(cls, path: str | Path, *, roots: Sequence[Path] | None = None) -> Self:
        """Open from headers only.

        `roots`: the folders that every file must really lie in, links resolved (None: anywhere).
        Raises `CheckpointNotFound`, `PathNotAllowed`, `UnsafeFormat`, or `CheckpointError` naming file and tensor.
        """
        path = Path(path)
        _check_below(path, roots)
        if path.is_file():
            if path.suffix != ".safetensors":
                raise _not_safetensors(path)
            folder, names, listed = path.parent, [path.name], None
        elif path.is_dir():
            folder = path
            names, listed = _weight_files(path)
        else:
            raise CheckpointNotFound(
                path, "there is no such folder or file; a model is a folder with safetensors or one file"
            )

        shards: dict[str, Shard] = {}
        tensors: dict[str, TensorInfo] = {}
        for name in names:
            _check_below(folder / name, roots)
            shard, found = _read_header(folder / name)
            shards[name] = shard
            for info in found:
                if listed is not None and listed.get(info.name) != name:
                    where = listed.get(info.name)
                    says = f"the index puts it in {where}" if where else "the index does not list it"
                    raise CheckpointError(folder / name, f"holds {info.name}, but {says}", tensor=info.name)
                tensors[info.name] = info
        if listed is not None and (missing := [name for name in listed if name not in tensors]):
            first = missing[0]
            raise CheckpointError(
                folder / listed[first],
                f"lacks {first}, which the index puts there ({len(missing)} missing)",
                tensor=first,
            )
        config_file = folder / "config.json"
        config: Mapping[str, Any] = {}
        if path.is_dir() and config_file.is_file():
            _check_below(config_file, roots)
            config = _read_json(config_file, MAX_INDEX_BYTES)
        return cls(path, shards, tensors, config)

    @property
    def folder(self) -> Path | None:
        """Where config and tokenizer files lie; None for a single file, which has none."""
        return self.path if self.path.is_dir() else None

    @property
    def ties_embeddings(self) -> bool:
        """Whether the config says that the output head is the input embedding."""
        text = self.config.get("text_config")
        nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        return bool(self.config.get("tie_word_embeddings", nested or False))

    def find(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo | None:
        """The stored tensor that answers to `name`: itself, or the embedding that the config ties it to.

        A tied head is not stored; its partner is the only stored embedding of the wanted `shape`.
        """
        if name in self.tensors:
            return self.tensors[name]
        if shape is None or not self.ties_embeddings or len(shape) != 2 or is_embedding(name):
            return None
        partners = [info for info in self.tensors.values() if info.shape == shape and is_embedding(info.name)]
        return partners[0] if len(partners) == 1 else None

    def rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor in its stored dtype, `[stop - start, *shape[1:]]`; a 0-d tensor has one
        row."""
        row = info.elements // info.rows if info.rows else 0
        size = (stop - start) * row * info.dtype.itemsize
        buffer = torch.empty(size, dtype=torch.uint8)
        offset = info.begin + start * row * info.dtype.itemsize
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        done = 0
        while done < size:
            count = os.preadv(self._descriptor(info.file), [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    self.shards[info.file].path,
                    f"ends inside {info.name}; it was changed while being read",
                    tensor=info.name,
                )
            done += count
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        return buffer.view(info.dtype.torch).reshape(shape)

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a shard is no longer the file whose header was read."""
        for shard in self.shards.values():
            stat = shard.path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (shard.size, shard.mtime_ns):
                raise CheckpointError(shard.path, "changed while it was being merged; start the merge again")

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            opened = os.open(self.shards[file].path, os.O_RDONLY | os.O_CLOEXEC)
            if self._descriptors.setdefault(file, opened) != opened:
                os.close(opened)
        return self._descriptors[file]


def _check_below(path: Path, roots: Sequence[Path] | None) -> None:
    if roots is None:
        return
    real = path.resolve()
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        raise PathNotAllowed(path, "lies outside the folders that this service may read models from")


def _not_safetensors(path: Path) -> CheckpointError:
    if path.suffix in PICKLED:
        return UnsafeFormat(path, "is a pickle, which can run code when it is read; convert it to safetensors first")
    return CheckpointError(path, "is not a .safetensors file")


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The shard names of a folder in order, and the index's tensor → shard map where there is an index."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"], None
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    index = folder / "model.safetensors.index.json"
    if index not in indexes and len(indexes) == 1:
        index = indexes[0]
    if index.is_file():
        weight_map = _read_json(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(index, "has no weight_map")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    index, f"weight_map sends {tensor} to {name!r}, which is no shard name", tensor=tensor
                )
            if not (folder / name).is_file():
                raise CheckpointError(index, f"weight_map sends {tensor} to {name}, which is not there", tensor=tensor)
        return sorted(set(weight_map.values())), weight_map
    single = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(single) == 1:
        return single, None
    if single:
        raise CheckpointError(folder, f"has {len(single)} safetensors files and no index ({', '.join(single[:3])}, …)")
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED):
        raise UnsafeFormat(
            folder / pickles[0], "is a pickle, which can run code when it is read; convert it to safetensors first"
        )
    raise CheckpointNotFound(folder, "holds no safetensors file")


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    if path.stat().st_size > limit:
        raise CheckpointError(path, f"is larger than {limit:,} bytes")
    try:
        parsed = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(path, "is not a JSON object")
    return parsed


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {name[:60]!r} appears twice")
    return found


def _read_header(path: Path) -> tuple[Shard, list[TensorInfo]]:
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or 8 + length > stat.st_size:
                raise CheckpointError(path, f"is cut short: {stat.st_size:,} bytes do not hold its header")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(path, f"has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"has a header that is not valid JSON: {error}") from None
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise CheckpointError(path, "has a header that is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(path, f"names {len(header):,} tensors; at most {MAX_TENSORS:,} are read")
    infos = sorted(_parse_entries(path, header, 8 + length), key=lambda info: (info.begin, info.nbytes))
    at = 8 + length
    for info in infos:
        if info.begin != at:
            raise CheckpointError(
                path, f"has a header that lies: {info.name} begins at {info.begin}, not {at}", tensor=info.name
            )
        at += info.nbytes
    if at != stat.st_size:
        last = infos[-1].name if infos else None
        said = f"its header describes {at:,} bytes, but it has {stat.st_size:,}"
        raise CheckpointError(
            path, f"is cut short: {said}" if at > stat.st_size else f"has bytes no tensor owns: {said}", tensor=last
        )
    return Shard(path, stat.st_size, stat.st_mtime_ns, hashlib.sha256(raw).hexdigest()), infos


def _parse_entries(path: Path, header: Mapping[str, Any], data: int) -> Iterator[TensorInfo]:
    for name, entry in header.items():
        if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
            raise CheckpointError(
                path, f"has a tensor name of {len(name)} characters that cannot be used: {name[:60]!r}"
            )
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(path, f"describes {name} without dtype, shape and data_offsets", tensor=name)
        dtype, shape, offsets = STORED.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise CheckpointError(
                path, f"stores {name} as {str(entry['dtype'])[:40]!r}, a dtype we do not know", tensor=name
            )
        if not _natural_numbers(shape) or not _natural_numbers(offsets) or len(offsets) != 2:
            raise CheckpointError(
                path, f"describes {name} with a shape or offsets that are no whole numbers", tensor=name
            )
        info = TensorInfo(name, dtype, tuple(shape), path.name, data + offsets[0])
        if len(shape) > 16 or info.elements > MAX_ELEMENTS or info.nbytes != offsets[1] - offsets[0]:
            raise CheckpointError(
                path,
                f"has a header that lies: {name}, {dtype} {shape}, needs {info.nbytes:,} bytes "
                f"but is given {offsets[1] - offsets[0]:,}",
                tensor=name,
            )
        yield info


def _natural_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
