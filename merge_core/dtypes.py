"""The number formats of safetensors, and what may be done with each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["float", "integer", "bool", "packed"]


@dataclass(frozen=True)
class DType:
    """A stored number format: its safetensors name, size in bytes, torch dtype, and kind.

    Only `float` is ever averaged; `integer` and `bool` are copied; `packed` (8-bit floats, whose scales live in
    other tensors) can only be passed through whole.
    """

    name: str
    itemsize: int
    torch: torch.dtype
    kind: Kind
    word: str

    def __str__(self) -> str:
        return self.word


_ALL = (
    DType("F64", 8, torch.float64, "float", "float64"),
    DType("F32", 4, torch.float32, "float", "float32"),
    DType("F16", 2, torch.float16, "float", "float16"),
    DType("BF16", 2, torch.bfloat16, "float", "bfloat16"),
    DType("F8_E4M3", 1, torch.float8_e4m3fn, "packed", "float8_e4m3fn"),
    DType("F8_E5M2", 1, torch.float8_e5m2, "packed", "float8_e5m2"),
    DType("I64", 8, torch.int64, "integer", "int64"),
    DType("I32", 4, torch.int32, "integer", "int32"),
    DType("I16", 2, torch.int16, "integer", "int16"),
    DType("I8", 1, torch.int8, "integer", "int8"),
    DType("U64", 8, torch.uint64, "integer", "uint64"),
    DType("U32", 4, torch.uint32, "integer", "uint32"),
    DType("U16", 2, torch.uint16, "integer", "uint16"),
    DType("U8", 1, torch.uint8, "integer", "uint8"),
    DType("BOOL", 1, torch.bool, "bool", "bool"),
)
STORED: dict[str, DType] = {dtype.name: dtype for dtype in _ALL}
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = _ALL[:4]
OUTPUT: dict[str, DType] = {dtype.word: dtype for dtype in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)}
