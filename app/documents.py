"""Documents as YAML, for people."""

from __future__ import annotations

import yaml

from workers.jobs import RecipeData


def written(document: RecipeData) -> str:
    """A document, or several, as YAML. POSTed again it makes the same."""
    documents = document if isinstance(document, list) else [document]
    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)
