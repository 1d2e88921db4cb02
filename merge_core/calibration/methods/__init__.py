"""One file per way of calibrating. Adding a file here is all it takes."""

from __future__ import annotations

import importlib
import pkgutil
from typing import get_args

from merge_core.calibration.method import Calibrator


def _load() -> dict[str, type[Calibrator]]:
    found: dict[str, type[Calibrator]] = {}
    for module in pkgutil.iter_modules(__path__):
        defined = importlib.import_module(f"{__name__}.{module.name}")
        for member in vars(defined).values():
            if isinstance(member, type) and issubclass(member, Calibrator) and member.__module__ == defined.__name__:
                (name,) = get_args(member.model_fields["method"].annotation)
                found[name] = member
    return dict(sorted(found.items()))


CALIBRATORS: dict[str, type[Calibrator]] = _load()
"""By the names that documents have for them."""
