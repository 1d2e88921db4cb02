"""How the files of a result are sent."""

from __future__ import annotations


def is_large(path: str) -> bool:
    """Whether a file is stored by its sha256, apart from the commit that names it."""
    return path.endswith(".safetensors")
