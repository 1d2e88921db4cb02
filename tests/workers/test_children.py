"""Many small jobs: a worker's child does several one after the other, and a service's threads write in turn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import event

from merge_core.memory import FLOOR_BYTES
from workers.celery_app import CHILD_BYTES
from workers.jobs import JobStore
from workers.settings import Settings


def test_a_child_goes_on_only_while_it_is_as_small_as_plans_count_on() -> None:
    assert CHILD_BYTES == FLOOR_BYTES


def test_the_threads_of_a_process_queue_for_the_database(tmp_path: Path) -> None:
    """SQLite gives its lock to whoever asks at the right moment: of many that ask some never get it."""
    store = JobStore(Settings(data=tmp_path))
    asking: list[int] = []
    most = 0

    @event.listens_for(store.engine, "begin", insert=True)
    def _begin(_: object) -> None:
        nonlocal most
        asking.append(1)
        most = max(most, len(asking))

    @event.listens_for(store.engine, "commit")
    def _commit(_: object) -> None:
        asking.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.add({}, {}), range(40)))
    assert most == 1
    assert len(store.page(limit=100)) == 40
    store.close()
