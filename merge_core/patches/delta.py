"""Deltas: what was learned, without the model it was learned on. One safetensors file that is added to a base.

Its metadata holds `format`, `version`, `tensors` (JSON: of each tensor its encoding, shape, format and base, and the
encoding's own numbers), `removed` (names that the base has and the model with the delta has not) and `provenance`.
A part of a tensor is stored as `TENSOR::PART`. A tensor that is not named is as the base has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from merge_core.cards import CARD_NAME, Card, read_card
from merge_core.checkpoint import Checkpoint, check_below
from merge_core.dtypes import STORED, DType
from merge_core.errors import CheckpointError, CheckpointNotFound
from merge_core.headers import MAX_DIMENSIONS, MAX_ELEMENTS, TensorInfo, clip, is_usable_name, read_metadata
from merge_core.patches.encoding import SEPARATOR, BaseTensor, DeltaTensor, Entry
from merge_core.patches.encodings import ENCODINGS

FORMAT = "weightsmith-delta"
VERSION = "1"
DELTA_NAME = "delta.safetensors"
"""What a delta is called in a folder."""


def find_delta(path: Path, roots: Sequence[Path] | None = None) -> Path | None:
    """The file of the delta that a path names, itself or in a folder; None if it names none that may be read."""
    try:
        check_below(path, roots)
        file = path / DELTA_NAME if path.is_dir() else path
        if file.suffix != ".safetensors" or not file.is_file():
            return None
        return file if read_metadata(file, roots).get("format") == FORMAT else None
    except (OSError, CheckpointError):
        return None  # whoever opens it says what is wrong


class Delta:
    """A delta, opened from its header.

    Attributes: `path`; `tensors`, name → `DeltaTensor`, as the metadata list them; `removed`, names of the base's
    tensors that go; `provenance`, what it was made from; `file`, its parts; `model`, config and tokenizer files that
    lie beside it, None where there are none.
    """

    def __init__(
        self, path: Path, file: Checkpoint, metadata: Mapping[str, str], model: Checkpoint | None = None
    ) -> None:
        self.path, self.file, self.model = path, file, model
        if metadata.get("format") != FORMAT:
            self._refuse("is no delta: its metadata does not say so")
        if metadata.get("version") != VERSION:
            wrong = f"is a delta of version {clip(metadata.get('version', ''))}, of which we know {VERSION}"
            self._refuse(wrong)
        described = self._json(metadata, "tensors", dict)
        self.provenance: Mapping[str, Any] = self._json(metadata, "provenance", dict)
        self.removed: tuple[str, ...] = tuple(self._json(metadata, "removed", list))
        for name in self.removed:
            if not isinstance(name, str) or not is_usable_name(name) or name in described:
                self._refuse(f"removes {clip(name)}, which it cannot")
        parts = self._parts(described)
        self.tensors: Mapping[str, DeltaTensor] = {
            name: self._tensor(name, entry, parts[name]) for name, entry in described.items()
        }

    @classmethod
    def open(cls, path: str | Path, *, roots: Sequence[Path] | None = None) -> Self:
        """Open a file, or the delta in a folder. Raises `CheckpointError` and its kin, naming file and tensor."""
        where = Path(path)
        try:
            check_below(where, roots)
            file = where / DELTA_NAME if where.is_dir() else where
            if not file.exists():
                raise CheckpointNotFound(clip(str(path)), f"is no delta, and no folder with a {DELTA_NAME}")
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(clip(str(path)), f"cannot be read: {clip(str(error))}") from None
        stored = Checkpoint.open(file, roots=roots)
        beside = Checkpoint.open(where, roots=roots, weights=False) if where.is_dir() else None
        return cls(file, stored, read_metadata(file, roots), beside if beside is not None and beside.config else None)

    @property
    def cards(self) -> Mapping[str, Card]:
        """The model card beside it, if there is one that can be read."""
        found = read_card(self.path.parent / CARD_NAME, self.file.roots)
        return {} if found is None else {CARD_NAME: found}

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _json(self, metadata: Mapping[str, str], key: str, kind: type) -> Any:
        try:
            read = json.loads(metadata.get(key, "null"))
        except (ValueError, RecursionError):
            read = None
        if not isinstance(read, kind):
            self._refuse(f"has metadata {key!r} that is no JSON {'object' if kind is dict else 'list'}")
        return read

    def _parts(self, described: Mapping[str, Any]) -> dict[str, dict[str, TensorInfo]]:
        """Tensor → part → where it is stored."""
        parts: dict[str, dict[str, TensorInfo]] = {name: {} for name in described}
        for info in self.file.tensors.values():
            name, separator, part = info.name.rpartition(SEPARATOR)
            if not separator or name not in parts:
                self._refuse(f"stores {clip(info.name)}, which its metadata says nothing of", info.name)
            parts[name][part] = info
        return parts

    def _tensor(self, name: str, written: Any, parts: Mapping[str, TensorInfo]) -> DeltaTensor:
        if not is_usable_name(name):
            self._refuse(f"has a tensor name that cannot be used: {clip(name)}")
        if not isinstance(written, dict):
            self._refuse(f"says nothing of {clip(name)} that could be meant", name)
        encoding = ENCODINGS.get(str(written.get("encoding")))
        if encoding is None:
            known = ", ".join(ENCODINGS)
            said = clip(str(written.get("encoding")))
            self._refuse(f"stores {clip(name)} by {said}, an encoding we do not know (we know {known})", name)
        base = written.get("base")
        if base is not None:
            if not isinstance(base, dict) or not isinstance(digest := base.get("blake3"), str) or len(digest) != 64:
                self._refuse(f"does not say what the base's {clip(name)} was", name)
            shape, dtype = self._shape(name, base.get("shape", written.get("shape"))), self._dtype(name, base)
            base = BaseTensor(shape, dtype, digest)
        settings = {key: value for key, value in written.items() if key not in ("encoding", "shape", "dtype", "base")}
        shape, dtype = self._shape(name, written.get("shape")), self._dtype(name, written)
        return encoding.tensor(Entry(name, encoding.name, shape, dtype, base, settings, parts), self.file)

    def _shape(self, name: str, written: Any) -> tuple[int, ...]:
        is_shape = isinstance(written, list) and len(written) <= MAX_DIMENSIONS
        if not is_shape or not all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in written):
            self._refuse(f"gives {clip(name)} a shape that is none", name)
        if math.prod(written) > MAX_ELEMENTS:
            self._refuse(f"gives {clip(name)} more elements than any tensor has", name)
        return tuple(written)

    def _dtype(self, name: str, written: Mapping[str, Any]) -> DType:
        dtype = STORED.get(str(written.get("dtype")))
        if dtype is None:
            self._refuse(f"gives {clip(name)} the dtype {clip(str(written.get('dtype')))}, which we do not know", name)
        return dtype

    def _refuse(self, reason: str, tensor: str | None = None) -> NoReturn:
        raise CheckpointError(self.path, reason, tensor=tensor)
