"""How a delta is written: the difference of each tensor is encoded into files of its own, which are then put together.

How large each becomes only the values tell, so nothing can be laid out before. A journal records what is encoded;
whoever continues proves it by its digest and goes on with the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from blake3 import blake3

from merge_core.dtypes import STORED, DType
from merge_core.errors import IncompatibleModels, Problem
from merge_core.files import WrittenFile, disk_error
from merge_core.headers import MAX_HEADER_BYTES, MAX_NAME_LENGTH, MAX_TENSORS
from merge_core.journal import Journal
from merge_core.layout import ShardLayout, Slot, lay_out
from merge_core.patches.delta import DELTA_NAME, FORMAT, VERSION
from merge_core.patches.encoding import SEPARATOR, BaseTensor, Difference, Encoding, Parts, WrittenPart
from merge_core.patches.encodings.dense import Dense
from merge_core.patches.encodings.sparse import Sparse
from merge_core.weights import Weights

PARTS = "parts"
"""The folder that parts lie in until they become one file."""
ALIGNMENT = 8
ONE_FILE = 2**62
_READ = 2**22
_LONGEST_PART = 32
_WATCHED_SECONDS = 0.25


@dataclass(frozen=True)
class Encoded:
    """One tensor's difference, encoded: what is written about it, and its parts in files of their own."""

    name: str
    number: int
    encoding: str
    settings: Mapping[str, Any]
    base: BaseTensor | None
    parts: tuple[WrittenPart, ...]


@dataclass(frozen=True)
class Extraction:
    """What is to be done: each tensor's difference and how it is stored, and the names that only the base has."""

    pairs: tuple[tuple[Difference, Encoding], ...]
    removed: tuple[str, ...]

    @classmethod
    def of(
        cls,
        base: Weights,
        tuned: Weights,
        encoding: Encoding,
        tick: Callable[[int], None] = lambda count: None,
        covariance: Weights | None = None,
    ) -> Self:
        """Everything by which two models differ; what an encoding cannot take is stored as `dense`, else as `sparse`.

        Raises `IncompatibleModels`.
        """
        pairs = []
        for info in tuned.tensors.values():
            if len(info.name) > MAX_NAME_LENGTH - _LONGEST_PART:
                detail = f"{info.name[:60]}… is too long a name for a delta, by {_LONGEST_PART} characters at most"
                raise IncompatibleModels.of([Problem(detail, tensor=info.name)])
            difference = Difference(tuned, info, base, base.tensors.get(info.name), tick, covariance)
            fitting = next(each for each in (encoding, Dense(), Sparse()) if each.takes(difference))
            pairs.append((difference, fitting))
        return cls(tuple(pairs), tuple(name for name in base.tensors if name not in tuned.tensors))

    def most_bytes(self, provenance: Mapping[str, Any]) -> int:
        """The most that the file can come to."""
        about = [600 + 12 * len(difference.name.encode()) for difference, _ in self.pairs]
        about += [4 * len(text.encode()) for text in (_json(provenance), _json(self.removed))]
        return 1000 + sum(about) + sum(encoding.most_bytes(difference) for difference, encoding in self.pairs)

    def worst(self) -> tuple[int, Difference] | None:
        """What takes the most memory, and how much."""
        needs = [(encoding.work_bytes(difference), difference) for difference, encoding in self.pairs]
        return max(needs, key=lambda need: need[0], default=None)


def encode_all(
    extraction: Extraction,
    folder: Path,
    journal: Journal,
    *,
    threads: int,
    done: Callable[[Difference], None] = lambda difference: None,
    watch: Callable[[], None] = lambda: None,
) -> tuple[list[Encoded], int]:
    """Encode every tensor that differs into files below `folder`, going on where the journal ends; also how many were
    encoded before. `done` is told of each that is; `watch` is called every now and then, and raises to stop.
    """
    parts = folder / PARTS
    parts.mkdir(exist_ok=True)
    found: list[Encoded] = []
    resumed = 0
    pool = ThreadPoolExecutor(threads, "encode", torch.set_num_threads, (1,))
    pending: deque[tuple[Difference, Future[Encoded | None]]] = deque()

    def collect() -> None:
        difference, future = pending.popleft()
        while not wait([future], _WATCHED_SECONDS).done:
            watch()
        if (encoded := future.result()) is not None:
            found.append(encoded)
        if _noted(difference) not in journal.notes or journal.notes[_noted(difference)] != _to_data(encoded):
            journal.note(_noted(difference), _to_data(encoded))
        done(difference)
        watch()

    try:
        for number, (difference, encoding) in enumerate(extraction.pairs):
            known = journal.notes.get(_noted(difference), {})
            if known is None or (known and _is_there(_from_data(known), parts)):
                job: Future[Encoded | None] = Future()
                job.set_result(None if known is None else _from_data(known))
                resumed += 1
            else:
                job = pool.submit(_encode, difference, encoding, parts, number)
            pending.append((difference, job))
            while len(pending) > 2 * threads:
                collect()
        while pending:
            collect()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return found, resumed


def _encode(difference: Difference, encoding: Encoding, folder: Path, number: int) -> Encoded | None:
    difference.tuned.prepare(difference.info, None)
    if difference.base_info is not None:
        difference.base.prepare(difference.base_info, None)
    parts = Parts(folder, number)
    settings = encoding.encode(difference, parts)
    if settings is None:
        return None
    return Encoded(difference.name, number, encoding.name, settings, difference.base_tensor(), tuple(parts.finish()))


def assemble(
    encoded: Sequence[Encoded],
    extraction: Extraction,
    folder: Path,
    provenance: Mapping[str, Any],
    *,
    name: str = DELTA_NAME,
    stop: Callable[[], None] = lambda: None,
) -> tuple[WrittenFile, dict[str, str]]:
    """Put the delta together from its parts, which are gone then; the file, and the blake3 of each of its tensors."""
    about = {difference.name: difference for difference, _ in extraction.pairs}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": _json({each.name: _entry(each, about[each.name]) for each in encoded}),
        "removed": _json(list(extraction.removed)),
        "provenance": _json(provenance),
    }
    parts = {
        f"{each.name}{SEPARATOR}{part.name}": (part, folder / PARTS / f"{each.number:06d}.{part.name}")
        for each in encoded
        for part in each.parts
    }
    slots = [Slot(name, part.dtype, part.shape) for name, (part, _) in parts.items()]
    (layout,) = lay_out(slots, ONE_FILE, metadata, stem=Path(name).stem, alignment=ALIGNMENT)
    written = write_file(layout, folder, {name: file for name, (_, file) in parts.items()}, stop)
    shutil.rmtree(folder / PARTS)
    return written, {name: part.blake3 for name, (part, _) in parts.items()}


def write_file(layout: ShardLayout, folder: Path, files: Mapping[str, Path], stop: Callable[[], None]) -> WrittenFile:
    """A safetensors file of tensors that lie in files of their own, each of which is removed once it is in there.

    Raises `IncompatibleModels` where there are too many.
    """
    if len(layout.slots) > MAX_TENSORS:
        what = f"{layout.file} would hold {len(layout.slots):,} parts; at most {MAX_TENSORS:,} are read"
        raise IncompatibleModels(what)
    if len(layout.header) > MAX_HEADER_BYTES:
        what = f"the header of {layout.file} would take {len(layout.header):,} bytes; {MAX_HEADER_BYTES:,} may be read"
        raise IncompatibleModels(what)
    digest, target = hashlib.sha256(layout.header), folder / layout.file
    try:
        with target.open("wb") as file:
            file.write(layout.header)
            for slot in layout.slots:
                for data in _runs(files[slot.name]):
                    stop()
                    digest.update(data)
                    file.write(data)
                files[slot.name].unlink()
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, folder, layout.size) from None
    return WrittenFile(layout.file, layout.size, digest.hexdigest())


def _runs(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(_READ):
            yield data


def _entry(encoded: Encoded, difference: Difference) -> dict[str, Any]:
    """What the metadata says of one tensor."""
    info, base = difference.info, encoded.base
    entry: dict[str, Any] = {"encoding": encoded.encoding, "shape": list(info.shape), "dtype": info.dtype.name}
    if base is not None:
        other = {} if base.shape == info.shape else {"shape": list(base.shape)}
        entry["base"] = {**other, "dtype": base.dtype.name, "blake3": base.blake3}
    return {**entry, **encoded.settings}


def _is_there(encoded: Encoded, folder: Path) -> bool:
    """Whether all parts are in their files as they were recorded."""
    for part in encoded.parts:
        file, digest = folder / f"{encoded.number:06d}.{part.name}", blake3()
        if not file.is_file():
            return False
        for data in _runs(file):
            digest.update(data)
        if digest.hexdigest() != part.blake3:
            return False
    return True


def _noted(difference: Difference) -> str:
    return f"encoded {difference.name}"


def _to_data(encoded: Encoded | None) -> dict[str, Any] | None:
    if encoded is None:
        return None
    data = asdict(encoded) | {"parts": [asdict(part) for part in encoded.parts]}
    if encoded.base is not None:
        data["base"] |= {"dtype": encoded.base.dtype.name, "shape": list(encoded.base.shape)}
    for part, written in zip(data["parts"], encoded.parts, strict=True):
        part["dtype"], part["shape"] = written.dtype.name, list(written.shape)
    return data


def _from_data(data: Mapping[str, Any]) -> Encoded:
    def typed(found: Mapping[str, Any]) -> dict[str, Any]:
        dtype: DType = STORED[found["dtype"]]
        return {**found, "dtype": dtype, "shape": tuple(found["shape"])}

    base = None if data["base"] is None else BaseTensor(**typed(data["base"]))
    return Encoded(**{**data, "base": base, "parts": tuple(WrittenPart(**typed(part)) for part in data["parts"])})


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)
