"""Quick imports of large libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Import without the garbage collector, and spare it what was imported for good.

    Importing torch makes half a million objects that all stay. Walking through them again and again takes a third of a
    second at the start of a process and as long at its end.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
