"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(written: Any) -> Any:
    """`"5GB"`, `"512 MiB"` or a number, as bytes. Raises ValueError."""
    if not isinstance(written, str):
        return written
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]{0,3})\s*", written)
    if not found or found[2].lower() not in _UNITS:
        raise ValueError(f"{written[:40]!r} is not a size; write bytes, or a number with KB, MB, GB, KiB, MiB, GiB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
