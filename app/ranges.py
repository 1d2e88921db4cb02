"""The parts of a thing that a caller asks for (RFC 9110, 14)."""

from __future__ import annotations

from app.errors import HttpProblem

MAX_PARTS = 32
"""Who asks for more parts than this gets the whole file: each part may be a request of its own to the store."""


def wanted_parts(written: str, size: int, path: str) -> list[tuple[int, int]]:
    """The Range to serve: the parts that are there, each from a byte to before another, in order and apart. None, for
    the whole file, where it makes no sense (RFC 9110, 14.2).

    Raises `HttpProblem` 416 where it makes sense and asks for nothing that is there.
    """
    unit, _, parts = written.partition("=")
    found = [part.strip().partition("-") for part in parts.split(",") if part.strip()]
    if (
        unit.strip().lower() != "bytes"
        or not 0 < len(found) <= MAX_PARTS
        or not all(_is_range(*part) for part in found)
    ):
        return []
    there = sorted(
        (int(first), min(int(last or size) + 1, size)) if first else (max(size - int(last), 0), size)
        for first, _, last in found
        if (int(first) < size if first else int(last) > 0 and size > 0)
    )
    if not there:
        detail = f"{path} has {size:,} bytes, and {written[:100]!r} asks for none of them"
        headers = {"Content-Range": f"bytes */{size}"}
        raise HttpProblem("range-not-satisfiable", detail, headers=headers)
    apart = [there[0]]
    for start, end in there[1:]:
        if start <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((start, end))
    return apart


def _is_range(first: str, dash: str, last: str) -> bool:
    if not dash or not (first + last).isascii() or not (first + last).isdecimal() or len(first + last) > 36:
        return False
    return not first or not last or int(first) <= int(last)
