"""The input side: a checkpoint is opened from its headers alone and read in blocks of rows.

A checkpoint is a folder in the Hugging Face layout (one `model.safetensors`, or shards with an index) or a single
`.safetensors` file. Nothing is trusted: every header is checked against its file before a weight is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from merge_core.cards import CARD_NAME, Card, read_card
from merge_core.errors import CheckpointError, CheckpointNotFound, PathNotAllowed, UnsafeFormat
from merge_core.headers import (
    IS_UNSAFE,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    MAX_TENSORS,
    OUTSIDE,
    Shard,
    TensorInfo,
    clip,
    is_usable_name,
    open_regular,
    read_header,
    read_json,
)
from merge_core.snapshots import Supply, folders_of, library_of, snapshot_of, supply_of
from merge_core.tokenizers import TOKENIZER_FILES
from merge_core.weights import Companions, Weights

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
COMPANIONS = (
    "generation_config.json",
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files beside the weights that belong to a model whatever its weights are; never code."""
MAX_COMPANION_BYTES = 256 * 2**20
_IN_MEMORY = 1e-6
"""Bytes per element, as good as none, that rows take besides themselves which no kernel can read from a file."""


class Checkpoint(Weights):
    """Named tensors in safetensors files; `shards` are those files by name."""

    def __init__(
        self,
        path: Path,
        shards: Mapping[str, Shard],
        tensors: Mapping[str, TensorInfo],
        config: Mapping[str, Any],
        roots: Sequence[Path] | None,
    ) -> None:
        self.path, self.shards, self.tensors, self.config, self.roots = path, shards, tensors, config, roots
        self.origins = tuple(snapshot for snapshot in [snapshot_of(path, roots)] if snapshot is not None)
        self._descriptors: dict[str, int] = {}

    @classmethod
    def open(cls, path: str | Path, *, roots: Sequence[Path] | None = None, weights: bool = True) -> Self:
        """Open from headers only.

        `roots`: the folders that every file must really lie in, links resolved (None: anywhere). Without `weights`,
        only a folder's config and tokenizer files count.
        Raises `CheckpointNotFound`, `PathNotAllowed`, `UnsafeFormat`, or `CheckpointError` naming file and tensor.
        """
        try:
            return cls._open(Path(path), roots, weights)
        except (OSError, RuntimeError, ValueError) as error:
            # Names that the system refuses, loops of links, folders that may not be entered.
            raise CheckpointError(clip(str(path)), f"cannot be read: {clip(str(error))}") from None

    @classmethod
    def _open(cls, path: Path, roots: Sequence[Path] | None, weights: bool) -> Self:
        check_below(path, roots)
        if path.is_dir():
            folder = path
            names, listed = _weight_files(path, roots) if weights else ([], None)
        elif path.exists():
            if path.suffix != ".safetensors":
                raise _not_safetensors(path)
            folder, names, listed = path.parent, [path.name], None
        else:
            what = "there is no such folder or file; a model is a folder with safetensors or one such file"
            raise CheckpointNotFound(clip(str(path)), what)

        shards: dict[str, Shard] = {}
        tensors: dict[str, TensorInfo] = {}
        for name in names:
            check_below(folder / name, roots)
            shards[name], found = read_header(folder / name, roots)
            for info in found:
                if listed is not None and (where := listed.get(info.name)) != name:
                    says = f"the index puts it in {where}" if where else "the index does not list it"
                    raise CheckpointError(folder / name, f"holds {clip(info.name)}, but {says}", tensor=info.name)
                tensors[info.name] = info
        if listed is not None and (missing := [name for name in listed if name not in tensors]):
            lacks = f"lacks {clip(missing[0])}, which the index puts there ({len(missing)} missing)"
            raise CheckpointError(folder / listed[missing[0]], lacks, tensor=missing[0])
        config: Mapping[str, Any] = {}
        if path.is_dir() and (folder / "config.json").exists():
            check_below(folder / "config.json", roots)
            config = read_json(folder / "config.json", MAX_CONFIG_BYTES, roots)
        return cls(path, shards, tensors, config, roots)

    @property
    def folder(self) -> Path | None:
        """Where config and tokenizer files lie; None for a single file, which has none."""
        return self.path if self.path.is_dir() else None

    @property
    def settings(self) -> Mapping[str, Path]:
        return {"config.json": self.path / "config.json"} if self.config else {}

    @property
    def companions(self) -> Companions:
        if self.folder is None:
            return {}
        found = [self.folder / name for name in COMPANIONS if (self.folder / name).is_file()]
        for path in found:
            check_below(path, self.roots)
        return {path.name: path for path in found if path.stat().st_size <= MAX_COMPANION_BYTES}

    @property
    def cards(self) -> Mapping[str, Card]:
        found = None if self.folder is None else read_card(self.folder / CARD_NAME, self.roots)
        return {} if found is None else {CARD_NAME: found}

    def rows(self, info: TensorInfo, start: int, stop: int, space: Tensor | None = None) -> Tensor:
        size = self.row_bytes(info) * (stop - start)
        buffer = torch.empty(size, dtype=torch.uint8) if space is None else space[:size]
        offset = info.begin + start * self.row_bytes(info)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        if (supply := self._supply(info.file)) is not None and not supply.in_files:
            supply.read(self.shards[info.file].path, offset, view)
        else:
            self._read(info, offset, view)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        return buffer.view(info.dtype.torch).reshape(shape)

    def _read(self, info: TensorInfo, offset: int, space: memoryview) -> None:
        descriptor = self.descriptor(info.file)
        done = 0
        while done < len(space):
            count = os.preadv(descriptor, [space[done:]], offset + done)
            if count == 0:
                raise self.ends_inside(info)
            done += count

    def _supply(self, file: str) -> Supply | None:
        """Where the bytes of a file come from that is here by a stand-in only."""
        return supply_of(self.roots) if self.shards[file].is_stand_in else None

    def place(self, info: TensorInfo) -> tuple[int, int] | None:
        if (supply := self._supply(info.file)) is not None and not supply.in_files:
            return None
        return self.descriptor(info.file), info.begin

    def ranges(self, info: TensorInfo) -> Iterator[tuple[str, int, int]]:
        yield info.file, info.begin, info.begin + info.nbytes

    def temporary(self, info: TensorInfo) -> float:
        supply = self._supply(info.file)
        return 0 if supply is None or supply.in_files else _IN_MEMORY

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def descriptor(self, file: str) -> int:
        if (supply := self._supply(file)) is not None:
            return supply.open(self.shards[file].path)
        if file not in self._descriptors:
            shard = self.shards[file]
            opened, now = open_regular(shard.path)
            if not shard.is_still(now):
                os.close(opened)
                raise CheckpointError(shard.path, "changed after its header was read; start the merge again")
            if self._descriptors.setdefault(file, opened) != opened:
                os.close(opened)
        return self._descriptors[file]


def locate(path: str, roots: Sequence[Path] | None, revision: str | None = None) -> Path:
    """The path that a recipe means: as it stands, below the first root that has it, or in a snapshot.

    Only a repository has revisions: a name with one is looked for among snapshots alone. Raises `CheckpointError`.
    """
    library, written = library_of(roots), Path(path)
    if library is not None and (known := library.known(path, revision)) is not None:
        return known[1]
    is_anywhere = folders_of(roots) is None
    if revision is None:
        if is_anywhere and (library is None or os.path.lexists(written.expanduser())):
            return written.expanduser()
        if written.is_absolute():
            return written
        for root in roots or ():
            check_below(root / written, [root])
            if os.path.lexists(root / written):
                return root / written
    if library is not None and (found := library.find(path, revision)) is not None:
        return found[1]
    if revision is not None:
        raise CheckpointNotFound(clip(f"{path}@{revision}"), "is no repository of a Hub, which alone has revisions")
    if is_anywhere:
        return written.expanduser()
    detail = "is in none of this service's model folders"
    raise CheckpointNotFound(clip(path), detail + (", and no Hub id (org/name)" if library is not None else ""))


def check_below(path: Path, roots: Sequence[Path] | None) -> None:
    """Raise `PathNotAllowed` unless a path, links resolved, lies in one of the roots (None: anywhere)."""
    folders = folders_of(roots)
    if folders is None:
        return
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(clip(str(path)), f"cannot be read: {clip(str(error))}") from None
    if not any(real.is_relative_to(root.resolve()) for root in folders):
        raise PathNotAllowed(clip(str(path)), OUTSIDE)


def _not_safetensors(path: Path) -> CheckpointError:
    if path.suffix in PICKLED:
        return UnsafeFormat(path, f"is a pickle, which {IS_UNSAFE}")
    return CheckpointError(path, "is not a .safetensors file")


def _weight_files(folder: Path, roots: Sequence[Path] | None) -> tuple[list[str], dict[str, str] | None]:
    """The shard names of a folder in order, and the index's tensor → shard map where there is an index."""
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"], None
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    index = folder / "model.safetensors.index.json"
    if index not in indexes and len(indexes) == 1:
        index = indexes[0]
    if index.exists():
        check_below(index, roots)
        return _shards_of_index(index, roots)
    single = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(single) == 1:
        return single, None
    if single:
        raise CheckpointError(folder, f"has {len(single)} safetensors files and no index ({', '.join(single[:3])}, …)")
    if pickles := sorted(file for file in folder.iterdir() if file.suffix in PICKLED):
        raise _not_safetensors(pickles[0])
    raise CheckpointNotFound(folder, "holds no safetensors file")


def _shards_of_index(index: Path, roots: Sequence[Path] | None) -> tuple[list[str], dict[str, str]]:
    weight_map = read_json(index, MAX_INDEX_BYTES, roots).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "has no weight_map")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(index, f"names {len(weight_map):,} tensors; at most {MAX_TENSORS:,} are read")
    shards = {name for name in weight_map.values() if isinstance(name, str)}
    there = {name for name in shards if name == Path(name).name and (index.parent / name).exists()}
    for tensor, name in weight_map.items():
        if not is_usable_name(tensor):
            raise CheckpointError(index, f"weight_map has a tensor name that cannot be used: {clip(tensor)}")
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            wrong = f"weight_map sends {clip(tensor)} to {clip(name)!r}, which is no shard name"
            raise CheckpointError(index, wrong, tensor=tensor)
        if name not in there:
            wrong = f"weight_map sends {clip(tensor)} to {clip(name)}, which is not there"
            raise CheckpointError(index, wrong, tensor=tensor)
    return sorted(shards), weight_map
