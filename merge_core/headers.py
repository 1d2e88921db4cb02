"""safetensors headers and small JSON files, read as if an enemy had written them.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from merge_core.dtypes import STORED, DType
from merge_core.errors import CheckpointError, PathNotAllowed, UnsafeFormat
from merge_core.snapshots import Snapshot, folders_of, snapshot_of

MAX_HEADER_BYTES = 25_000_000
MAX_JSON_BYTES = 64_000_000
MAX_INDEX_BYTES = 25_000_000
MAX_CONFIG_BYTES = 4_000_000
MAX_TENSORS = 200_000
MAX_PARTS = 1_000_000
"""Objects, lists and keys, each, in a JSON file; and a quarter of its commas."""
MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**56
OUTSIDE = "lies outside the folders that this service may read models from"
IS_UNSAFE = "can run code when it is read; convert it to safetensors first"
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How what `torch.save` writes begins, or a bare pickle."""


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
    """A safetensors file as it was when its header was read; `snapshot`: the one it is in, if it lies elsewhere."""

    path: Path
    size: int
    device: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    header_sha256: str
    snapshot: Snapshot | None = None

    @property
    def is_stand_in(self) -> bool:
        """Whether there is no more of it here than its header."""
        return self.snapshot is not None and self.path.name in self.snapshot.stand_ins

    def is_still(self, now: os.stat_result) -> bool:
        """Whether a file is this one, unchanged."""
        found = (now.st_size, now.st_dev, now.st_ino, now.st_mtime_ns, now.st_ctime_ns)
        return found == (self.size, self.device, self.inode, self.mtime_ns, self.ctime_ns)


def open_regular(path: Path, roots: Sequence[Path] | None = None) -> tuple[int, os.stat_result]:
    """Open a file for reading without ever waiting for it; the caller closes the descriptor.

    `roots`: the folders that what was opened must lie in (None: anywhere), which is looked at after it was opened, so
    that a link put there in between leads nowhere. Raises `PathNotAllowed`, or `CheckpointError` for anything that is
    no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(path, "is no regular file")
        if roots is not None:
            _check_opened(path, descriptor, roots)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, found


def _check_opened(path: Path, descriptor: int, roots: Sequence[Path]) -> None:
    opened = Path(f"/proc/self/fd/{descriptor}").readlink()
    folders = folders_of(roots)
    if folders is not None and not any(opened.is_relative_to(root.resolve()) for root in folders):
        raise PathNotAllowed(clip(str(path)), OUTSIDE)


def read_small(path: Path, most: int = MAX_JSON_BYTES, roots: Sequence[Path] | None = None) -> bytes:
    """A small file whole. Raises `CheckpointError`, as `open_regular` does."""
    descriptor, found = open_regular(path, roots)
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size > most or len(raw := file.read(most + 1)) > most:
            raise CheckpointError(path, f"is larger than {most:,} bytes")
        return raw


def read_json(path: Path, most: int = MAX_JSON_BYTES, roots: Sequence[Path] | None = None) -> dict[str, Any]:
    """A JSON object from a small file, no key twice. Raises `CheckpointError`, as `open_regular` does."""
    return parse_json(path, read_small(path, most, roots))


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """A JSON object from the bytes of a file, no key twice. Raises `CheckpointError`."""
    return _parse_json(path, raw, "is not")


def read_header(path: Path, roots: Sequence[Path] | None = None) -> tuple[Shard, list[TensorInfo]]:
    """What a safetensors file holds, in storage order. Raises `CheckpointError` for a header that lies in any way, or
    as `open_regular` does.
    """
    raw, found = _read_header(path, roots)
    infos = parse_header(path, raw, found.st_size)
    digest = hashlib.sha256(raw).hexdigest()
    stamps = (found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    return Shard(path, *stamps, digest, snapshot_of(path, roots)), infos


def parse_header(path: Path, raw: bytes, size: int) -> list[TensorInfo]:
    """What the header `raw` (without the 8 bytes of its length) says that a file of so many bytes holds, in storage
    order. Raises `CheckpointError` for a header that lies in any way.
    """
    header = _parse_header(path, raw)
    _metadata(path, header)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(path, f"names {len(header):,} tensors; at most {MAX_TENSORS:,} are read")
    infos = sorted(_parse_entries(path, header, 8 + len(raw)), key=lambda info: (info.begin, info.nbytes))
    at = 8 + len(raw)
    for info in infos:
        if info.begin != at:
            lie = f"has a header that lies: {clip(info.name)} begins at {info.begin}, not {at}"
            raise CheckpointError(path, lie, tensor=info.name)
        at += info.nbytes
    if at != size:
        said = f"its header describes {at:,} bytes, but it has {size:,}"
        wrong = f"is cut short: {said}" if at > size else f"has bytes that no tensor owns: {said}"
        raise CheckpointError(path, wrong, tensor=infos[-1].name if infos else None)
    return infos


def read_metadata(path: Path, roots: Sequence[Path] | None = None) -> dict[str, str]:
    """What a safetensors file says of itself: texts by name. Raises `CheckpointError`, as `open_regular` does."""
    return _metadata(path, _parse_header(path, _read_header(path, roots)[0]))


def _metadata(path: Path, header: Mapping[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__")
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(path, "has metadata that are not texts by name")
    return metadata


def _read_header(path: Path, roots: Sequence[Path] | None) -> tuple[bytes, os.stat_result]:
    descriptor, found = open_regular(path, roots)
    with os.fdopen(descriptor, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix.startswith(_PICKLED) and length > MAX_HEADER_BYTES:
            raise UnsafeFormat(path, f"is a pickle by another name, which {IS_UNSAFE}")
        if len(prefix) < 8 or 8 + length > found.st_size:
            raise CheckpointError(path, f"is cut short: {found.st_size:,} bytes do not hold its header")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(path, f"has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
        raw = file.read(length)
    if len(raw) < length:
        raise CheckpointError(path, "became shorter while it was read")
    return raw, found


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    if raw.count(b"{") > MAX_TENSORS + 2:
        raise CheckpointError(path, f"names more tensors than the {MAX_TENSORS:,} that are read")
    header = _parse_json(path, raw, "has a header that is not", parse_constant=_no_number)
    if not raw.startswith(b"{"):
        raise CheckpointError(path, "has a header that is not a JSON object from its first byte")
    return header


def is_usable_name(name: str) -> bool:
    """Whether a tensor name can be written and shown."""
    return 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()


def clip(name: object) -> str:
    """A text from a file, short and printable enough for a message."""
    shown = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def _parse_json(path: Path, raw: bytes, lead: str, **how: Any) -> dict[str, Any]:
    keys = raw.count(b'":') - raw.count(b'\\":')
    if max(raw.count(b"{"), raw.count(b"["), keys, raw.count(b",") // 4) > MAX_PARTS:
        raise CheckpointError(path, f"{lead} JSON of at most {MAX_PARTS:,} parts")
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_no_duplicates, **how)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"{lead} valid JSON: {clip(str(error))}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(path, f"{lead} a JSON object")
    return parsed


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {clip(name)!r} appears twice")
    return found


def _parse_entries(path: Path, header: Mapping[str, Any], data: int) -> Iterator[TensorInfo]:
    for name, entry in header.items():
        if not is_usable_name(name):
            raise CheckpointError(path, f"has a tensor name that cannot be used ({len(name)} characters): {clip(name)}")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(path, f"describes {clip(name)} without dtype, shape and data_offsets", tensor=name)
        dtype, shape, offsets = STORED.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
        if dtype is None:
            unknown = clip(str(entry["dtype"]))
            raise CheckpointError(path, f"stores {clip(name)} as {unknown}, a dtype we do not know", tensor=name)
        if not _natural_numbers(shape) or not _natural_numbers(offsets) or len(offsets) != 2:
            wrong = f"describes {clip(name)} with a shape or offsets that are no whole numbers of a sensible size"
            raise CheckpointError(path, wrong, tensor=name)
        info = TensorInfo(name, dtype, tuple(shape), path.name, data + offsets[0])
        if info.nbytes != offsets[1] - offsets[0]:
            lie = f"has a header that lies: {clip(name)}, {dtype} {shape}, needs {info.nbytes:,} bytes"
            raise CheckpointError(path, f"{lie} but is given {offsets[1] - offsets[0]:,}", tensor=name)
        yield info


def _natural_numbers(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value <= MAX_ELEMENTS for value in values)
    )
