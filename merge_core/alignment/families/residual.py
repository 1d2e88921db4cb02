"""The residual stream: what every layer of a tower reads from and adds to."""

from __future__ import annotations

from merge_core.alignment.families.draft import Draft


def place(draft: Draft) -> None:
    """Refuse: no permutation of the residual stream is derived."""
    draft.refuse(next(iter(draft.shapes)), "no permutation of the residual stream is derived")
