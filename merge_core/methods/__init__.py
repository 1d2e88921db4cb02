"""One file per merge method. Adding a file here is all it takes: the recipe schema, the service and the contract tests
read `METHODS`.
"""

from __future__ import annotations

from merge_core.method import MergeMethod, Semantics, load_methods

METHODS: dict[str, dict[Semantics, type[MergeMethod]]] = load_methods(__name__)
"""Recipe name → whose meaning of it → method. A name with one meaning has only that of mergekit, or only its
paper's.
"""


def find_method(name: str, semantics: Semantics) -> type[MergeMethod]:
    """The method of that name with that meaning, or with the only meaning it has. KeyError: no such name."""
    meanings = METHODS[name]
    return meanings.get(semantics) or next(iter(meanings.values()))
