"""Patterns of module names in an adapter's config, as PEFT reads them: a regular expression for the end of the name.

They come from files that nobody vouches for, so that only expressions are taken which cannot take forever.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from merge_core.errors import CheckpointError
from merge_core.headers import clip

MAX_EXPRESSIONS = 256
_LITERAL = re.compile(r"\^?[\w.-]+")
_SIMPLE = re.compile(r"(?:[\w.^$|*+?-]|\\[.dw]|\[[\w-]+\])*(?:\([\w.|-]+\)(?:[\w.^$*+?-]|\\[.dw]|\[[\w-]+\])*)?")
_MAX_LENGTH = 1000
_MAX_REPEATS = 3


class Patterns:
    """Pattern → number; a name gets the number of the first pattern that matches.

    >>> patterns = Patterns(Path("adapter_config.json"), "rank_pattern", {"layers.0.q": 4, "layers.(1|2).q": 8, "q": 2})
    >>> [patterns.get(f"model.layers.{layer}.q") for layer in range(4)], patterns.get("model.q_norm")
    ([4, 8, 8, 2], None)
    """

    def __init__(self, file: Path, key: str, written: Mapping[str, float]) -> None:
        self._values = list(written.values())
        self._literal: dict[str, int] = {}
        self._anchored: dict[str, int] = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        for i, pattern in enumerate(written):
            if len(pattern) > _MAX_LENGTH or not _is_harmless(pattern):
                raise CheckpointError(file, f"{key} has a pattern that is no plain one: {clip(pattern)}")
            if _LITERAL.fullmatch(pattern):
                (self._anchored if pattern.startswith("^") else self._literal).setdefault(pattern.lstrip("^"), i)
                continue
            try:
                self._expressions.append((i, re.compile(rf"(.*\.)?({pattern})$")))
            except re.error as error:
                raise CheckpointError(file, f"{key}: {clip(pattern)} is no regular expression: {error}") from None
        if len(self._expressions) > MAX_EXPRESSIONS:
            raise CheckpointError(file, f"{key} has more than {MAX_EXPRESSIONS} regular expressions")

    def get(self, module: str) -> float | None:
        """The number for a module, or None."""
        first = min(self._matching(module), default=None)
        return None if first is None else self._values[first]

    def _matching(self, module: str) -> Iterator[int]:
        parts = module.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts))]
        yield from (self._literal[end] for end in ends if end in self._literal)
        if module in self._anchored:
            yield self._anchored[module]
        yield from (i for i, expression in self._expressions if expression.match(module))


def _is_harmless(pattern: str) -> bool:
    """Whether matching takes polynomial time of a low degree: at most one group, never repeated, and few repeats."""
    repeats = sum(pattern.count(sign) for sign in "*+?")
    return _SIMPLE.fullmatch(pattern) is not None and repeats <= _MAX_REPEATS and ")*" not in pattern
