"""Model cards as people wrote them: what their front matter says, read with suspicion.

A card is a README.md that begins with YAML between two lines of `---`. Nothing needs one: what cannot be read says
nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merge_core.documents import load_documents
from merge_core.errors import CheckpointError, RecipeError
from merge_core.headers import read_small

CARD_NAME = "README.md"
MAX_CARD_BYTES = 2 * 2**20
_FENCE = "---"
_PLAIN = re.compile(r"[\w.+-]{1,64}", re.ASCII)
_TITLE = re.compile(r"[\w.+,() /-]{1,100}")
_LINK = re.compile(r"https?://[^\s<>`'\"\\]{1,400}")


@dataclass(frozen=True)
class License:
    """What a card says of its license: the names that the Hub has for it, or else its own name and its place."""

    names: tuple[str, ...]
    own_name: str | None = None
    link: str | None = None

    def front(self) -> dict[str, Any]:
        """As front matter says it."""
        found: dict[str, Any] = {"license": self.names[0] if len(self.names) == 1 else list(self.names)}
        if self.own_name:
            found["license_name"] = self.own_name
        if self.link:
            found["license_link"] = self.link
        return found

    def __str__(self) -> str:
        more = ", ".join(filter(None, (self.own_name, self.link)))
        return " or ".join(self.names) + (f" ({more})" if more else "")


@dataclass(frozen=True)
class Card:
    """A card: its file, and what stands at its top, of which what is plain enough can be taken over."""

    size: int
    sha256: str
    front: Mapping[str, Any]

    @cached_property
    def license(self) -> License | None:
        names = tuple(name for name in texts(self.front.get("license")) if _PLAIN.fullmatch(name))
        own, link = self.front.get("license_name"), self.front.get("license_link")
        return (
            License(
                names,
                own if isinstance(own, str) and _TITLE.fullmatch(own) else None,
                link if isinstance(link, str) and _LINK.fullmatch(link) else None,
            )
            if names
            else None
        )

    @cached_property
    def languages(self) -> list[str]:
        written = self.front.get("language")
        # What YAML reads as the opposite of yes is Norwegian.
        found = ["no" if each is False else each for each in (written if isinstance(written, list) else [written])]
        return [each for each in texts(found) if _PLAIN.fullmatch(each)]

    def plain(self, key: str) -> str | None:
        """The value of a key, where it is a plain word."""
        value = self.front.get(key)
        return value if isinstance(value, str) and _PLAIN.fullmatch(value) else None


def read_card(file: Path, roots: Sequence[Path] | None) -> Card | None:
    """The card in a file; None where there is none, or where it is not to be read: too large, no file, a link out of
    the roots.
    """
    try:
        raw = read_small(file, MAX_CARD_BYTES, roots)
    except CheckpointError:
        return None
    return Card(len(raw), hashlib.sha256(raw).hexdigest(), front_matter(raw))


def front_matter(card: bytes) -> Mapping[str, Any]:
    """The keys at the top of a card; none where there are none, or where they are no plain YAML."""
    first, *lines = card.decode("utf-8-sig", errors="replace").splitlines() or [""]
    end = next((i for i, line in enumerate(lines) if line.rstrip() == _FENCE), None)
    if first.rstrip() != _FENCE or end is None:
        return {}
    try:
        found = load_documents("\n".join(lines[:end]), "front matter")
    except RecipeError:
        return {}
    if len(found) != 1 or not isinstance(found[0], Mapping):
        return {}
    return {key: value for key, value in found[0].items() if isinstance(key, str)}


def texts(value: Any) -> list[str]:
    """A text, or the texts of a list."""
    return [value] if isinstance(value, str) else [each for each in _items(value) if isinstance(each, str)]


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
