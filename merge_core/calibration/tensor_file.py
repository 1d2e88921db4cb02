"""A safetensors file that is written tensor by tensor, of which only the names are known before."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from merge_core.dtypes import OUTPUT
from merge_core.files import fsync_folder

_LONGEST_ENTRY = 160
_ALIGNMENT = 8


class TensorFile:
    """Appears whole, or not at all. Room for the header is left before the first tensor, with an entry for each of the
    `names`; what it is more than the header, is filled with spaces.

        with TensorFile(path, names) as file:
            file.add(name, tensor)
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._path, self._new = path, path.with_name(f".{path.name}")
        room = 8 + 100 + sum(len(json.dumps(name).encode()) + _LONGEST_ENTRY for name in names)
        self._begin = room + -room % _ALIGNMENT
        self._entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._end = 0

    def __enter__(self) -> Self:
        self._file = self._new.open("wb")
        self._file.seek(self._begin)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor more, whole."""
        data = tensor.detach().cpu().contiguous()
        kind = OUTPUT[str(data.dtype).removeprefix("torch.")].name
        offsets = [self._end, self._end + data.nbytes]
        self._entries[name] = {"dtype": kind, "shape": list(data.shape), "data_offsets": offsets}
        self._file.write(memoryview(data.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        self._end = offsets[1]

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                header = json.dumps(self._entries, separators=(",", ":")).encode()
                self._file.seek(0)
                self._file.write((self._begin - 8).to_bytes(8, "little") + header.ljust(self._begin - 8))
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is not None:
            self._new.unlink(missing_ok=True)
            return
        self._new.replace(self._path)
        fsync_folder(self._path.parent)
