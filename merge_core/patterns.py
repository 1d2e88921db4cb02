"""Patterns of module names in an adapter's config, as PEFT reads them: a regular expression for the end of the name.

They come from files that nobody vouches for, and matching an expression can take longer than the universe has. So only
plain ones are taken, runs of characters, classes and one list of alternatives, and matched without going back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_core.errors import CheckpointError
from merge_core.headers import clip

_LITERAL = re.compile(r"[\w.-]+")
_ATOM = re.compile(r"(?P<one>\\[.\w-]|\[[\w-]+\]|[\w.-])(?P<repeat>[*+?]?)|\((?P<words>[\w-]+(?:\|[\w-]+)*)\)")
_MAX_LENGTH = 1000
_MAX_WORK = 1_000_000
"""Parts of patterns, at places in names, that are tried before a config is given up."""


@dataclass(frozen=True)
class _Atom:
    """A character of a kind, once or as `repeat` says, or one of some words."""

    fits: Callable[[str], bool] = str.isprintable
    repeat: str = ""
    words: tuple[str, ...] = ()

    def after(self, name: str, places: set[int]) -> set[int]:
        """Where a match can have come to, from where it was."""
        if self.words:
            return {place + len(word) for place in places for word in self.words if name.startswith(word, place)}
        found = set(places) if self.repeat in ("*", "?") else set()
        edge = places
        while edge := {place + 1 for place in edge if place < len(name) and self.fits(name[place])} - found:
            found |= edge
            if self.repeat not in ("*", "+"):
                break
        return found


class Patterns:
    """Pattern → number; a name gets the number of the first pattern that matches.

    >>> patterns = Patterns(Path("adapter_config.json"), "rank_pattern", {"layers.0.q": 4, "layers.(1|2).q": 8, "q": 2})
    >>> [patterns.get(f"model.layers.{layer}.q") for layer in range(4)], patterns.get("model.q_norm")
    ([4, 8, 8, 2], None)
    """

    def __init__(self, file: Path, key: str, written: Mapping[str, float]) -> None:
        self._file, self._key, self._work = file, key, 0
        self._values = list(written.values())
        self._literal: dict[str, int] = {}
        self._expressions: list[tuple[int, bool, list[_Atom]]] = []
        for i, pattern in enumerate(written):
            if _LITERAL.fullmatch(pattern):
                self._literal[pattern] = i
            else:
                self._expressions += [(i, *expression) for expression in self._parse(pattern)]

    def get(self, module: str) -> float | None:
        """The number for a module, or None. Raises `CheckpointError` where that would take too long."""
        first = min(self._matching(module), default=None)
        return None if first is None else self._values[first]

    def _parse(self, pattern: str) -> Iterator[tuple[bool, list[_Atom]]]:
        """Each alternative of a pattern: whether it begins with the name, and its parts."""
        for alternative in [pattern] if "(" in pattern else pattern.split("|"):
            text = alternative.removeprefix("^").removesuffix("$")
            atoms, at = [], 0
            while (found := _ATOM.match(text, at)) and (atom := _atom(found)):
                atoms.append(atom)
                at = found.end()
            if at < len(text) or not text or len(pattern) > _MAX_LENGTH:
                raise CheckpointError(self._file, f"{self._key} has a pattern that is no plain one: {clip(pattern)}")
            yield alternative.startswith("^"), atoms

    def _matching(self, module: str) -> Iterator[int]:
        starts = {0, *(i + 1 for i, sign in enumerate(module) if sign == ".")}
        yield from (self._literal[module[i:]] for i in starts if module[i:] in self._literal)
        for number, is_anchored, atoms in self._expressions:
            places = {0} if is_anchored else starts
            for atom in atoms:
                self._work += (1 + len(atom.words)) * (1 + len(places))
                if self._work > _MAX_WORK:
                    raise CheckpointError(self._file, f"{self._key} has too many patterns for so many modules")
                places = atom.after(module, places)
            if len(module) in places:
                yield number


def _atom(found: re.Match[str]) -> _Atom | None:
    if found["words"]:
        return _Atom(words=tuple(found["words"].split("|")))
    one, repeat = found["one"], found["repeat"]
    if one == ".":
        return _Atom(repeat=repeat)
    try:
        kind = re.compile(one if len(one) > 1 else re.escape(one))
    except re.error:
        return None  # a class such as [z-a]
    return _Atom(lambda sign: kind.fullmatch(sign) is not None, repeat)
