"""One file per encoding of a delta. Adding a file here is all it takes: recipes and deltas read `ENCODINGS`."""

from __future__ import annotations

import importlib
import pkgutil

from merge_core.patches.encoding import Encoding


def _load() -> dict[str, type[Encoding]]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        for member in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(member, type) and issubclass(member, Encoding) and "name" in vars(member):
                found[member.name] = member
    return dict(sorted(found.items()))


ENCODINGS: dict[str, type[Encoding]] = _load()
"""Name in recipes and files → encoding."""
