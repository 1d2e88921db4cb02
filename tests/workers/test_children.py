"""A worker's child, which does several jobs one after the other."""

from __future__ import annotations

from merge_core.memory import FLOOR_BYTES
from workers.celery_app import CHILD_BYTES


def test_a_child_goes_on_only_while_it_is_as_small_as_plans_count_on() -> None:
    assert CHILD_BYTES == FLOOR_BYTES
