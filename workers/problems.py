"""Expected failures as plain data, for the job's row and for HTTP alike."""

from __future__ import annotations

from typing import Any

from merge_core.errors import WeightsmithError


def problem(error: WeightsmithError) -> dict[str, Any]:
    """`code`, `title`, `detail`, `retryable` and one entry in `errors` for each place that is wrong."""
    places = [
        {key: value for key, value in vars(found).items() if value is not None}
        for found in error.problems
        if found.pointer or found.tensor or found.file
    ]
    return {"code": error.code, "title": error.title, "detail": str(error), "retryable": error.retryable} | (
        {"errors": places} if places else {}
    )
