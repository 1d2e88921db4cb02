"""Recipes and their like, however they are at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Document = Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | bytes | Path
"""A document as a dict, several as a list of them, as text (YAML or JSON), or a file with such text."""


def body_of(document: Document) -> tuple[bytes, str]:
    """The bytes to send, and their media type. Raises `OSError` for a file that cannot be read."""
    if isinstance(document, str) and is_path(document):
        document = Path(document)
    if isinstance(document, Path):
        document = document.read_bytes()
    if isinstance(document, str):
        document = document.encode()
    if isinstance(document, bytes):
        return document, "application/yaml"
    return json.dumps(document).encode(), "application/json"


def is_path(text: str) -> bool:
    """Whether a text rather names a file: no document is one line without a colon."""
    return bool(text) and "\n" not in text and ":" not in text
