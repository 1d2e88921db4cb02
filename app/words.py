"""Sizes, durations and moments as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def shown_bytes(count: float) -> str:
    """Such as `1.5 GB`."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} bytes" if units[0] == "bytes" else f"{count:.1f} {units[0]}"


def shown_seconds(seconds: float | None) -> str:
    """How long: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def shown_time(at: float | datetime) -> str:
    """A moment as everybody reads it; the browser says it in the reader's own time zone."""
    found = at if isinstance(at, datetime) else datetime.fromtimestamp(at, UTC)
    return f"{found:%Y-%m-%d %H:%M} UTC"


def iso_time(at: float) -> str:
    """A moment as browsers read it."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
