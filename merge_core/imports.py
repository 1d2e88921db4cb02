"""Quick imports of large libraries."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_NOT_NEEDED = "torch._meta_registrations"
"""Python stand-ins of torch's operators for tensors without data, which compilers ask for; nothing else does."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without the garbage collector, spare it what was imported for good, and leave out what no merge needs.

    Importing torch makes half a million objects that all stay. Walking through them again and again takes a third of a
    second at the start of a process and as long at its end. A quarter of the rest, and 18 MB, are stand-ins for tensors
    without data; whoever imports them later gets them.
    """
    if "torch" in sys.modules:
        # To freeze again would keep whatever the merges since then left behind.
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    sys.modules[_NOT_NEEDED] = _Absent(_NOT_NEEDED)
    try:
        yield
    finally:
        _uncover()
        gc.freeze()
        if was_enabled:
            gc.enable()


def whole_torch() -> None:
    """Import what was left out of torch, for libraries that use more of it: in their own order it would not import."""
    import torch  # noqa: F401 — which has to be there first

    importlib.import_module(_NOT_NEEDED)


class _Absent(ModuleType):
    """Stands for a module until something of it is wanted."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _uncover()
        return getattr(importlib.import_module(self.__name__), name)


def _uncover() -> None:
    """Let the next import find the module itself."""
    if isinstance(sys.modules.get(_NOT_NEEDED), _Absent):
        del sys.modules[_NOT_NEEDED]
    package, _, name = _NOT_NEEDED.rpartition(".")
    if isinstance(getattr(sys.modules.get(package), name, None), _Absent):
        delattr(sys.modules[package], name)
