"""Trials in the database: made once, known by what they are. Candidates are in no list, and go with their search."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from merge_core.search.trials import Outcome, Trial
from workers.artifacts import open_artifacts
from workers.janitor import Janitor
from workers.jobs import JobKind, JobStore, Lease
from workers.settings import Settings
from workers.tables import Job
from workers.tables import Trial as Row
from workers.trials import TrialStore, trials_of

DONE = Outcome("done", {"score": 0.5}, {1: 0.25})


@pytest.fixture
def store(tmp_path: Path, database: dict[str, str]) -> Iterator[JobStore]:
    store = JobStore(Settings(data=tmp_path / "data", **database))
    yield store
    store.close()


def search_of(store: JobStore, owner: str = "ann") -> tuple[Lease, TrialStore]:
    lease = store.claim(store.add({}, {}, kind=JobKind.SEARCH, owner=owner).id, "w/1")
    assert lease is not None
    return lease, TrialStore(store, lease.job_id, owner)


def trials(*digests: str) -> list[Trial]:
    return [Trial(number, {"x": number}, digest) for number, digest in enumerate(digests)]


def rows(store: JobStore, lease: Lease) -> list[tuple[int, str, Any]]:
    return [(row.number, row.state, row.outcome) for row in trials_of(store, lease.job_id)]


def test_a_trial_is_known_from_when_it_is_kept(store: JobStore) -> None:
    lease, kept = search_of(store)
    one, two, three = trials("a", "b", "a")
    kept.begin([one, two, three])
    assert kept.find(["a", "b"]) == {} and [row[1] for row in rows(store, lease)] == ["open"] * 3
    kept.keep(one, DONE, 1.5)
    assert kept.find(["a", "b"]) == {"a": DONE}
    assert rows(store, lease) == [(0, "done", DONE.to_data()), (1, "open", None), (2, "done", DONE.to_data())]
    kept.keep(one, Outcome("done", {"score": 9}), 1.5)  # by somebody who was slow
    kept.begin([one, two, three])  # by whoever leads next
    assert kept.find(["a", "b"]) == {"a": DONE} and [row[1] for row in rows(store, lease)] == ["done", "open", "done"]


def test_another_search_of_the_owner_knows_it_and_nobody_else(store: JobStore) -> None:
    _, first = search_of(store)
    first.begin(trials("a", "b"))
    for trial, outcome in zip(trials("a", "b"), (DONE, Outcome("pruned")), strict=True):
        first.keep(trial, outcome, 1.0)
    lease, second = search_of(store)
    second.begin(trials("b", "a"))
    assert [row[1] for row in rows(store, lease)] == ["open", "done"]  # what was given up there may be worth it here
    assert second.find(["a", "b"]) == {"a": DONE}
    _, other = search_of(store, "ben")
    assert other.find(["a", "b"]) == {}


def test_trials_of_other_models_take_the_place_of_those_before(store: JobStore) -> None:
    lease, kept = search_of(store)
    kept.begin(trials("a"))
    kept.keep(*trials("a"), DONE, 1.0)
    kept.begin(trials("changed"))
    assert rows(store, lease) == [(0, "open", None)] and kept.find(["changed"]) == {}


def test_what_is_deleted_is_forgotten(store: JobStore) -> None:
    lease, kept = search_of(store)
    kept.begin(trials("a"))
    kept.keep(*trials("a"), DONE, 1.0)
    store.fail(lease, {"code": "evaluation-failed"})
    assert kept.find(["a"]) == {"a": DONE}  # a retry goes on
    assert store.delete(lease.job_id)
    with store.reading() as session:
        assert session.scalars(select(Row)).all() == []


def test_a_candidate_is_found_by_its_name_alone_and_goes_with_its_search(store: JobStore) -> None:
    lease, _ = search_of(store)
    names = [f"viw_0000000000000000000000000{i}" for i in range(2)]
    for name in names:
        store.add_candidate(name, lease, {"digest": "d"}, recipe={}, files=[])
    assert store.find(names[0], "ann", JobKind.VIEW) is not None and store.find(names[0], "ben", JobKind.VIEW) is None
    assert store.page(owner="ann", kind=JobKind.VIEW) == []
    assert store.forget_candidates(Job.id == names[0]) == [names[0]]
    janitor = Janitor(store, open_artifacts(store.settings))
    janitor.sweep_rows()
    assert store.get(names[1]) is not None
    store.end_late()
    store.fail(lease, {"code": "evaluation-failed"})
    janitor.sweep_rows()
    assert store.get(names[1]) is None and store.get(lease.job_id) is not None


def test_trials_come_in_pages(store: JobStore) -> None:
    lease, kept = search_of(store)
    kept.begin(trials(*(str(number) for number in range(5))))
    assert [row.number for row in trials_of(store, lease.job_id, after=2, limit=2)] == [2, 3]
    assert time.time() - trials_of(store, lease.job_id)[0].created_at < 60
