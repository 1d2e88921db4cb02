"""What an encoding of a delta is: how the difference of one tensor becomes parts of a file, and rows again."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from merge_core import kernels
from merge_core.checkpoint import Checkpoint
from merge_core.dtypes import FLOAT32, FLOAT64, DType
from merge_core.errors import CheckpointError, NonFinite
from merge_core.files import disk_error
from merge_core.headers import TensorInfo, clip
from merge_core.kernels.plain import rounded
from merge_core.method import ExactOn
from merge_core.statistics import Grains
from merge_core.weights import Weights

SEPARATOR = "::"
"""Between a tensor's name and the name of one of its parts."""
BLOCK_ELEMENTS = 2**19
Bits = NDArray[Any]
FactorDType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BaseTensor:
    """The tensor that a difference was taken from: what it was, and the blake3 of its bytes."""

    shape: tuple[int, ...]
    dtype: DType
    blake3: str


@dataclass(frozen=True)
class Entry:
    """What a delta says of one tensor.

    `shape` and `dtype` are those of the tensor with the delta on it; `base` is None for a tensor that the base lacks;
    `settings` are the encoding's own numbers; `parts` are stored under the tensor's name and theirs.
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    dtype: DType
    base: BaseTensor | None
    settings: Mapping[str, Any]
    parts: Mapping[str, TensorInfo]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def grains(self) -> Grains:
        return Grains.of(self.shape)

    @property
    def is_same_kind(self) -> bool:
        """Whether the base has the tensor in the same shape and number format."""
        return self.base is not None and (self.base.shape, self.base.dtype) == (self.shape, self.dtype)


@dataclass
class DeltaTensor(ABC):
    """One tensor of a delta, read by rows. Raises `CheckpointError` for parts that do not fit what the header says."""

    entry: Entry
    file: Checkpoint

    replaces: ClassVar[bool] = False
    """Whether new values are stored, which say something on the very base they were taken from only."""

    def __post_init__(self) -> None:
        if not self.replaces and (self.entry.base is None or self.entry.base.shape != self.entry.shape):
            self.refuse("holds a change, but of nothing that the base has in that shape")
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Whether parts and settings are there and have the sizes they must have, as far as the header tells."""

    @abstractmethod
    def change(self, base: Tensor, start: int, stop: int) -> Tensor:
        """δ of some rows in the `working` format, given those of the base as they are stored."""

    def replaced(self, base: Tensor | None, start: int, stop: int) -> Tensor:
        """The stored new values of some rows, unchanged ones from the base; only of an encoding that `replaces`."""
        raise NotImplementedError

    def prepare(self) -> None:  # noqa: B027 — most have nothing to find out
        """Find out what must be known before rows can be had, and refuse what only reading shows to be wrong."""

    @property
    def working(self) -> DType:
        """What δ is computed in: float64 where anything is stored so."""
        base = (self.entry.base.dtype,) if self.entry.base else ()
        formats = (self.entry.dtype, *base, *(info.dtype for info in self.entry.parts.values()))
        return FLOAT64 if FLOAT64 in formats else FLOAT32

    @property
    def temporary(self) -> float:
        """Bytes of memory per element for computing rows, besides base and δ."""
        return 2.0 * self.entry.dtype.itemsize + 10

    @property
    def thread_bytes(self) -> int:
        """Bytes of memory per thread for computing rows, however many."""
        return 0

    def read(self, part: str, start: int, stop: int) -> Tensor:
        return self.file.rows(self.entry.parts[part], start, stop)

    def read_flat(self, part: str, start: int, stop: int) -> Tensor:
        """Some rows of the tensor from a part that holds one number per element, flat."""
        width = self.entry.grains.width
        return self.shaped(self.read(part, start * width, stop * width), start, stop)

    def shaped(self, values: Tensor, start: int, stop: int) -> Tensor:
        """The values of some rows in the shape that these rows have."""
        return values.reshape((stop - start, *self.entry.shape[1:]) if self.entry.shape else ())

    def expect(self, **parts: tuple[tuple[int, ...], Sequence[DType]]) -> None:
        """Refuse unless exactly these parts are there, each with its shape and in one of the formats."""
        if set(parts) != set(self.entry.parts):
            names = ", ".join(sorted(map(clip, self.entry.parts))) or "nothing"
            self.refuse(f"needs {' and '.join(sorted(parts))}, but has {names}")
        for name, (shape, formats) in parts.items():
            info = self.entry.parts[name]
            if info.shape != shape or info.dtype not in formats:
                wanted = f"{' or '.join(map(str, formats))} {list(shape)}"
                self.refuse(f"stores {name} as {info.dtype} {list(info.shape)}, not {wanted}")

    def refuse(self, reason: str) -> NoReturn:
        detail = f"{clip(self.entry.name)}: {self.entry.encoding} {reason}"
        raise CheckpointError(self.file.path, detail, tensor=self.entry.name)


class Encoding(BaseModel, ABC):
    """How differences are stored; the fields are what a recipe may say about it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    tensor: ClassVar[type[DeltaTensor]]
    exact_on: ClassVar[ExactOn] = "any machine"

    @abstractmethod
    def takes(self, difference: Difference) -> bool:
        """Whether it can store the difference of a tensor; what it cannot is stored as `dense`, else as `sparse`."""

    @abstractmethod
    def encode(self, difference: Difference, parts: Parts) -> Mapping[str, Any] | None:
        """Write the parts of one tensor; the settings of its entry, or None where nothing changed."""

    @abstractmethod
    def most_bytes(self, difference: Difference) -> int:
        """The most that its parts can come to."""

    def work_bytes(self, difference: Difference) -> int:
        """Bytes of memory that encoding a tensor takes at most."""
        return difference.block_bytes

    def is_whole(self, difference: Difference) -> bool:
        """Whether all rows of a tensor are held, or its sides squared."""
        return False


class Difference:
    """One tensor of a tuned model and its like in the base (None: it has none), read in runs of whole grains.

    `tick` is told how many bytes were read; it raises to stop. `covariance`: of what enters the columns of matrices, by
    tensor name, where somebody measured it.
    """

    def __init__(
        self,
        tuned: Weights,
        info: TensorInfo,
        base: Weights,
        base_info: TensorInfo | None,
        tick: Callable[[int], None] = lambda count: None,
        covariance: Weights | None = None,
    ) -> None:
        self.tuned, self.info, self.base, self.base_info, self.tick = tuned, info, base, base_info, tick
        self.covariance = covariance
        self._digest: str | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def dtype(self) -> DType:
        return self.info.dtype

    @property
    def grains(self) -> Grains:
        return Grains.of(self.info.shape)

    @property
    def is_same_kind(self) -> bool:
        """Whether the base has the tensor in the same shape and number format."""
        base = self.base_info
        return base is not None and (base.shape, base.dtype) == (self.info.shape, self.info.dtype)

    @property
    def is_numeric(self) -> bool:
        """Whether both are numbers in the same shape, of which a difference can be taken."""
        base = self.base_info
        is_there = base is not None and base.shape == self.info.shape and self.info.elements > 0
        return is_there and base is not None and base.dtype.kind == self.info.dtype.kind == "float"

    @property
    def working(self) -> DType:
        formats = (self.info.dtype, self.base_info.dtype if self.base_info else self.info.dtype)
        return FLOAT64 if FLOAT64 in formats else FLOAT32

    @property
    def is_computed(self) -> bool:
        """Whether the tuned rows lie nowhere as they are."""
        return self.tuned.place(self.info) is None

    @property
    def block_rows(self) -> int:
        """Rows of a block: whole grains, or all where the tuned rows can only be had at once."""
        return _block_rows(self.tuned, self.info)

    @property
    def block_elements(self) -> int:
        return min(self.block_rows, self.grains.rows) * self.grains.width

    @property
    def block_bytes(self) -> int:
        """Bytes of memory for a block of both, and what is made of them."""
        base = 0 if self.base_info is None else self.base_info.dtype.itemsize + self.base.temporary(self.base_info)
        each = 2 * self.info.dtype.itemsize + self.tuned.temporary(self.info) + base + 2 * self.working.itemsize + 2
        beside = self.tuned.thread_bytes(self.info)
        beside += 0 if self.base_info is None else self.base.thread_bytes(self.base_info)
        return math.ceil(self.block_elements * each) + beside

    def blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Start and stop row, the base's rows and the tuned ones, front to back."""
        assert self.base_info is not None
        digest = blake3()
        for start, stop, tuned in self.tuned_blocks():
            base = self.base.rows(self.base_info, start, stop)
            digest.update(raw(base))
            self.tick(base.nbytes)
            yield start, stop, base, tuned
        self._digest = digest.hexdigest()

    def tuned_blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Start and stop row and the tuned rows."""
        for start in range(0, self.info.rows if self.info.elements else 0, self.block_rows):
            stop = min(start + self.block_rows, self.info.rows)
            rows = self.tuned.rows(self.info, start, stop)
            self.tick(rows.nbytes)
            yield start, stop, rows

    def changes(self) -> Iterator[tuple[int, int, Tensor]]:
        """Start and stop row and δ, flat, in the working format. Raises `NonFinite`."""
        working = self.working.torch
        for start, stop, base, tuned in self.blocks():
            delta = (tuned.to(working) - base.to(working)).reshape(-1)
            if kernels.first_nonfinite(delta) >= 0:
                delta[(tuned == base).reshape(-1)] = 0  # an infinity that stayed, as in a mask
            if (found := kernels.first_nonfinite(delta)) >= 0:
                at = found + start * self.grains.width
                detail = (
                    f"{self.name} differs from the base by NaN or infinity at element {at:,}; only sparse stores it"
                )
                raise NonFinite(self.name, str(self.tuned.path), detail)
            yield start, stop, delta

    def fitted(self, numbers: Tensor, stored: DType) -> Tensor:
        """Numbers in the format that they are stored in, rounded once. Raises `NonFinite` where one does not fit."""
        found = rounded(numbers, stored.torch)
        if kernels.first_nonfinite(found) >= 0:
            detail = f"{self.name}: what it differs by from the base does not fit into {stored}; choose a wider dtype"
            raise NonFinite(self.name, str(self.tuned.path), detail)
        return found

    def base_tensor(self) -> BaseTensor | None:
        """What the base has; its digest is read where that was not done yet."""
        info = self.base_info
        if info is None:
            return None
        if self._digest is None:
            self._digest = digest_of(self.base, info, self.tick)
        return BaseTensor(info.shape, info.dtype, self._digest)


def digest_of(weights: Weights, info: TensorInfo, tick: Callable[[int], None] = lambda count: None) -> str:
    """The blake3 of a tensor's bytes."""
    digest, step = blake3(), _block_rows(weights, info)
    for start in range(0, info.rows if info.elements else 0, step):
        rows = weights.rows(info, start, min(start + step, info.rows))
        digest.update(raw(rows))
        tick(rows.nbytes)
    return digest.hexdigest()


def _block_rows(weights: Weights, info: TensorInfo) -> int:
    """Rows to read at once: whole grains, or all where they can only be had at once."""
    grains = Grains.of(info.shape)
    if weights.is_whole(info):
        return max(1, grains.rows)
    return max(1, BLOCK_ELEMENTS // max(1, grains.size * grains.width)) * grains.size


def raw(rows: Tensor) -> memoryview:
    """The bytes of rows."""
    return memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def bits(rows: Tensor) -> Bits:
    """Rows as unsigned integers of their size, flat: what is stored, whatever it means."""
    flat = rows.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"u{flat.element_size()}")


@dataclass
class WrittenPart:
    """A part that is in its file: `blake3` of its bytes."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    blake3: str


@dataclass
class _Part:
    dtype: DType
    width: int
    count: int = 0
    digest: Any = field(default_factory=blake3)


class Parts:
    """The parts of one tensor as they are written, each into a file of its own; those of another attempt are gone."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self._parts: dict[str, _Part] = {}
        for left in folder.glob(f"{number:06d}.*"):
            left.unlink()

    def path(self, part: str) -> Path:
        return self.folder / f"{self.number:06d}.{part}"

    def write(self, part: str, dtype: DType, values: Tensor | Bits, *, width: int | None = None) -> None:
        """Append values to a part; with `width` it is a matrix of rows that long, else a vector."""
        known = self._parts.setdefault(part, _Part(dtype, width or 0))
        data = raw(values) if isinstance(values, Tensor) else np.ascontiguousarray(values).view(np.uint8).data
        try:
            with self.path(part).open("ab") as file:
                file.write(data)
        except OSError as error:
            raise disk_error(error, self.folder, len(data)) from None
        known.digest.update(data)
        known.count += data.nbytes // dtype.itemsize

    def count(self, part: str) -> int:
        """How many numbers a part has so far."""
        return self._parts[part].count if part in self._parts else 0

    def read(self, part: str, start: int, count: int) -> Bits:
        """Some numbers of a part, as unsigned integers."""
        size = self._parts[part].dtype.itemsize
        return np.fromfile(self.path(part), f"u{size}", count, offset=start * size)

    def drop(self, part: str) -> None:
        """As if it had never been written."""
        if self._parts.pop(part, None) is not None:
            self.path(part).unlink()

    def finish(self) -> list[WrittenPart]:
        """What there is of the tensor."""
        return [
            WrittenPart(
                name,
                part.dtype,
                (part.count // part.width, part.width) if part.width else (part.count,),
                part.digest.hexdigest(),
            )
            for name, part in sorted(self._parts.items(), key=operator.itemgetter(0))
        ]
