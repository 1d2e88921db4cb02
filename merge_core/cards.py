"""Model cards as people wrote them: what their front matter says, read with suspicion.

A card is a README.md that begins with YAML between two lines of `---`. Nothing needs one: what cannot be read says
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_core.documents import load_documents
from merge_core.errors import RecipeError

CARD_NAME = "README.md"
MAX_CARD_BYTES = 2 * 2**20
_FENCE = "---"


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
    return found[0] if len(found) == 1 and isinstance(found[0], Mapping) else {}
