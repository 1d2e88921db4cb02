"""The store makes every move exactly once, and only along the table."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import update

from workers.celery_app import make_celery
from workers.idempotency import KeyReused, Repeated, RequestKey
from workers.jobs import FINISHED, MOVES, IllegalMove, JobKind, JobState, JobStore, Lease, LeaseLost, new_id
from workers.queue import Queue
from workers.settings import Settings
from workers.tables import Job


@pytest.fixture
def store(tmp_path: Path, database: dict[str, str]) -> Iterator[JobStore]:
    store = JobStore(Settings(data=tmp_path / "data", lease_seconds=60, max_attempts=3, **database))
    yield store
    store.close()


def state(store: JobStore, job: Job) -> str:
    found = store.get(job.id)
    assert found is not None
    return found.state


def claimed(store: JobStore, job: Job, owner: str = "w/1") -> Lease:
    lease = store.claim(job.id, owner)
    assert lease is not None
    return lease


def test_ids_sort_by_age() -> None:
    """Many are made in each millisecond."""
    ids = [new_id("mrg_") for _ in range(5000)]
    assert ids == sorted(set(ids)) and len({len(i) for i in ids}) == 1 and ids[0].startswith("mrg_")


def test_only_one_of_many_claims_a_job(store: JobStore) -> None:
    job = store.add({"a": 1}, {})
    leases: list[Lease | None] = []
    threads = [threading.Thread(target=lambda i=i: leases.append(store.claim(job.id, f"w/{i}"))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([lease for lease in leases if lease]) == 1


def test_an_expired_lease_is_claimed_by_another_and_the_first_writes_nothing(
    tmp_path: Path, database: dict[str, str]
) -> None:
    store = JobStore(Settings(data=tmp_path / "data", lease_seconds=0.05, **database))
    job = store.add({}, {})
    slow = claimed(store, job, "slow/1")
    time.sleep(0.1)
    store.give_back_expired()
    quick = claimed(store, job, "quick/1")

    assert quick.attempt == 2
    with pytest.raises(LeaseLost):
        store.heartbeat(slow, phase="merging", progress={})
    with pytest.raises(LeaseLost):
        store.succeed(slow, files=[], warnings=[], progress={})
    with pytest.raises(LeaseLost):
        store.fail(slow, {})
    store.succeed(quick, files=[{"path": "x"}], warnings=["w"], progress={})
    assert state(store, job) == "succeeded"
    store.close()


def test_cancel_of_a_queued_job_is_done_at_once(store: JobStore) -> None:
    job = store.add({}, {})
    store.cancel(job.id)
    assert state(store, job) == "canceled"
    assert store.claim(job.id, "w/1") is None


def test_cancel_of_a_running_job_waits_for_its_worker(store: JobStore) -> None:
    job = store.add({}, {})
    lease = claimed(store, job)
    store.cancel(job.id)
    assert state(store, job) == "canceling"
    assert store.heartbeat(lease, phase="", progress={}) is JobState.CANCELING
    store.confirm_cancel(lease)
    assert state(store, job) == "canceled"
    assert store.cancel(job.id) is not None, "canceling again is no error"


def test_what_has_ended_cannot_be_canceled(store: JobStore) -> None:
    job = store.add({}, {})
    store.fail(claimed(store, job), {"code": "x"})
    with pytest.raises(IllegalMove, match="is failed"):
        store.cancel(job.id)
    assert store.cancel("mrg_none") is None


def test_a_dead_worker_s_jobs_are_given_back_and_others_kept(store: JobStore) -> None:
    running, canceling, other = (store.add({}, {}) for _ in range(3))
    for job, owner in [(running, "dead/1"), (canceling, "dead/2"), (other, "deadly/1")]:
        claimed(store, job, owner)
    store.cancel(canceling.id)

    store.release("dead/")

    assert [state(store, job) for job in (running, canceling, other)] == ["queued", "canceled", "running"]


def test_given_back_once_and_not_again(tmp_path: Path, database: dict[str, str]) -> None:
    store = JobStore(Settings(data=tmp_path / "data", lease_seconds=60, **database))
    job = store.add({}, {})
    claimed(store, job)
    assert not store.is_silent("w/")
    with store.session() as session:
        session.execute(update(Job).values(lease_until=time.time() - 1))
    assert store.is_silent("w/")
    store.give_back_expired()
    assert state(store, job) == "queued" and not store.is_silent("w/")
    claimed(store, job)
    store.give_back_expired()
    found = store.get(job.id)
    assert found is not None and found.deaths == 1
    store.close()


def test_a_job_that_kills_its_workers_is_given_up(store: JobStore) -> None:
    job = store.add({}, {})
    for i in range(3):
        claimed(store, job, f"w{i}/1")
        store.release(f"w{i}/")
    assert store.claim(job.id, "w/1") is None
    assert store.give_up() == [job.id]
    found = store.get(job.id)
    assert found is not None and found.state == "failed" and found.error is not None
    assert found.error["code"] == "worker-lost"


def test_being_told_to_stop_is_no_death(store: JobStore) -> None:
    job = store.add({}, {})
    for i in range(10):
        claimed(store, job, f"w{i}/1")
        store.release(f"w{i}/", died=False)
    assert store.give_up() == [] and state(store, job) == "queued"


def test_canceling_a_queued_job_removes_what_earlier_attempts_left(store: JobStore) -> None:
    job = store.add({}, {})
    (store.settings.artifacts / f".{job.id}.1.partial").mkdir()
    Queue(store, make_celery(store.settings)).cancel(job.id)
    assert list(store.settings.artifacts.iterdir()) == []


def test_odd_folders_are_kept_apart(tmp_path: Path) -> None:
    stores = [JobStore(Settings(data=tmp_path / name)) for name in ("q?x", "q?y")]
    stores[0].add({}, {})
    assert [len(store.page()) for store in stores] == [1, 0]
    for store in stores:
        store.close()


def test_a_lost_message_is_sent_again_ever_more_rarely(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr("workers.jobs.time", SimpleNamespace(time=lambda: now))
    wait = store.settings.redeliver_seconds
    job = store.add({}, {})
    assert store.overdue() == []
    now += 1.5 * wait
    assert store.overdue() == [job.id]
    for _ in range(3):
        store.announced(job.id)
    now += 1.5 * wait
    assert store.overdue() == []


def test_pages(store: JobStore) -> None:
    jobs = [store.add({}, {}) for _ in range(5)]
    ids = sorted((job.id for job in jobs), reverse=True)
    assert [job.id for job in store.page(limit=2)] == ids[:2]
    assert [job.id for job in store.page(limit=2, before=ids[1])] == ids[2:4]
    assert store.page(states=[JobState.RUNNING]) == []


def test_jobs_of_each_kind_are_lists_of_their_own(store: JobStore) -> None:
    jobs = {kind: store.add({"of": kind}, {}, kind=kind) for kind in JobKind}
    assert [job.id[:4] for job in jobs.values()] == ["mrg_", "aln_", "pat_", "vrf_", "viw_", "anl_", "sch_", "cal_"]
    for kind, job in jobs.items():
        assert [found.id for found in store.page(kind=kind)] == [job.id]
        assert claimed(store, job).kind is kind


def test_jobs_of_all_kinds_are_one_list_by_age(store: JobStore) -> None:
    made = []
    for kind in [*JobKind, *reversed(JobKind)]:
        made.append(store.add({}, {}, kind=kind).id)
        time.sleep(0.002)
    newest, found = made[::-1], [job.id for job in store.newest(limit=4)]
    assert found == newest[:4]
    assert [job.id for job in store.newest(limit=100, before=found[-1])] == newest[4:]
    views = [job.id for job in store.newest(kinds=[JobKind.VIEW], before=newest[0])]
    assert views == [each for each in newest if each.startswith("viw_")]


def test_pages_of_labels_and_states(store: JobStore) -> None:
    one, both = store.add({}, {}, labels={"a/b.c": "x"}), store.add({}, {}, labels={"a/b.c": "x", "d": "ü'\"%"})
    store.add({}, {})
    assert [job.id for job in store.page(labels={"a/b.c": "x"})] == [both.id, one.id]
    assert [job.id for job in store.page(labels={"a/b.c": "x", "d": "ü'\"%"})] == [both.id]
    assert store.page(labels={"d": "x"}) == [] == store.page(labels={"a": "x"})
    store.cancel(one.id)
    assert [job.id for job in store.page(states=[JobState.CANCELED, JobState.RUNNING])] == [one.id]


def test_a_request_makes_one_job(store: JobStore) -> None:
    request = RequestKey("local", "key", "digest")
    job = store.add({}, {}, request=request)
    for repeated in (lambda: store.check_new(request), lambda: store.add({}, {}, request=request)):
        with pytest.raises(Repeated) as found:
            repeated()
        assert found.value.job.id == job.id
    with pytest.raises(KeyReused):
        store.add({}, {}, request=RequestKey("local", "key", "other"))
    assert store.add({}, {}, owner="somebody", request=RequestKey("somebody", "key", "other")).id != job.id
    assert [found.id for found in store.page()] == [job.id]


def test_a_retry_begins_anew(store: JobStore) -> None:
    job = store.add({}, {}, deadline_at=1.0)
    assert store.end_late() == [job.id]
    before = store.pulses([job.id])[job.id]
    again = store.retry(job.id)
    assert again is not None and (again.state, again.error, again.deaths, again.deadline_at) == (
        "queued",
        None,
        0,
        None,
    )
    now = store.pulses([job.id])[job.id]
    assert now.version > before.version and now.events == before.events + 1 and not now.is_deleted
    assert store.retry("mrg_none") is None
    with pytest.raises(IllegalMove, match="is queued; it cannot be retried"):
        store.retry(job.id)


def test_what_is_deleted_is_forgotten(store: JobStore) -> None:
    job = store.add({"secret": 1}, {"secret": 1}, ["secret"], labels={"secret": "x"})
    with pytest.raises(IllegalMove, match="cancel it first"):
        store.delete(job.id)
    store.cancel(job.id)
    assert store.delete(job.id) and not store.delete(job.id) and not store.delete("mrg_none")
    assert store.get(job.id) is None and store.events(job.id) == [] and store.page() == []
    assert store.pulses([job.id])[job.id].is_deleted and store.retry(job.id) is None
    with store.session() as session:
        row = session.get(Job, job.id)
        assert row is not None and "secret" not in repr(vars(row))


class Lives(RuleBasedStateMachine):
    """Any number of workers, dying and canceled at any time: a job moves only along the table."""

    @initialize(folder=st.uuids())
    def start(self, folder: object) -> None:
        settings = Settings(data=Path(self.root) / str(folder), lease_seconds=60, max_attempts=100, **self.database)
        self.store = JobStore(settings)
        self.job = self.store.add({}, {})
        self.leases: list[Lease] = []
        self.seen = JobState.QUEUED
        self.version = 0

    root = ""
    database: ClassVar[dict[str, str]] = {}

    @rule(worker=st.integers(0, 2))
    def claim(self, worker: int) -> None:
        lease = self.store.claim(self.job.id, f"w{worker}/1")
        assert (lease is not None) == (self.seen is JobState.QUEUED)
        self.leases += [lease] if lease else []

    @rule(which=st.integers(0, 50), how=st.sampled_from(["succeed", "fail", "confirm_cancel", "heartbeat"]))
    def write(self, which: int, how: str) -> None:
        if not self.leases:
            return
        lease = self.leases[which % len(self.leases)]
        arguments: dict[str, object] = {
            "succeed": {"files": [], "warnings": [], "progress": {}},
            "fail": {"error": {"code": "x"}},
            "heartbeat": {"phase": "", "progress": {}},
        }.get(how, {})
        holds = lease is self.leases[-1] and self.seen in (JobState.RUNNING, JobState.CANCELING)
        if how == "confirm_cancel":
            holds = holds and self.seen is JobState.CANCELING
        try:
            getattr(self.store, how)(lease, **arguments)
            assert holds
        except LeaseLost:
            assert not holds

    @rule()
    def cancel(self) -> None:
        try:
            self.store.cancel(self.job.id)
        except IllegalMove:
            assert self.seen in (JobState.SUCCEEDED, JobState.FAILED)

    @rule()
    def retry(self) -> None:
        try:
            self.store.retry(self.job.id)
            assert self.seen in (JobState.FAILED, JobState.CANCELED)
        except IllegalMove:
            assert self.seen not in (JobState.FAILED, JobState.CANCELED)

    @rule(worker=st.integers(0, 2))
    def die(self, worker: int) -> None:
        self.store.release(f"w{worker}/")

    @invariant()
    def moves_along_the_table(self) -> None:
        now = JobState(state(self.store, self.job))
        if now is not self.seen:
            assert now in MOVES[self.seen]
        found = self.store.get(self.job.id)
        assert found is not None and (found.finished_at is not None) == (now in FINISHED)
        assert now in (JobState.RUNNING, JobState.CANCELING) or found.holder is None
        assert found.version >= self.version, "it never runs backwards"
        self.version = found.version
        self.seen = now

    def teardown(self) -> None:
        self.store.close()


def test_lives(tmp_path: Path, database: dict[str, str]) -> None:
    machine = Lives.TestCase
    Lives.root, Lives.database = str(tmp_path), database
    machine.settings = settings(max_examples=5 if database else 25, stateful_step_count=20, deadline=None)
    machine().runTest()
