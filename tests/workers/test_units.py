"""Units in the database: taken once, recorded once, given back when whoever had them is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from workers import alive
from workers.celery_app import make_celery
from workers.jobs import IllegalMove, JobStore, Lease, LeaseLost
from workers.queue import Queue
from workers.settings import Settings
from workers.supervisor import shared_out, visible_gpus
from workers.tables import Job, Unit
from workers.units import Assisting, Leading, NothingToDo, Taken, UnitStore

PHASE = "merging 0123456789ab"


@pytest.fixture
def store(tmp_path: Path, database: dict[str, str]) -> Iterator[JobStore]:
    often = {"lease_seconds": 60, "heartbeat_seconds": 0.05, "max_attempts": 9, "alone_seconds": 0}
    store = JobStore(Settings(data=tmp_path / "data", **often, **database))
    yield store
    store.close()


@pytest.fixture
def units(store: JobStore) -> UnitStore:
    return UnitStore(store)


def begun(store: JobStore, count: int = 4) -> Lease:
    """A running job with open units."""
    lease = store.claim(store.add({}, {}).id, "leader/1")
    assert lease is not None
    UnitStore(store).open(lease, PHASE, count)
    return lease


def taken(units: UnitStore, lease: Lease, holder: str, *, leads: bool = False) -> Taken:
    unit = units.take(lease.job_id, PHASE, holder, leads=leads)
    assert unit is not None
    return unit


def leading(store: JobStore, lease: Lease) -> Leading:
    def prove() -> None:
        store.heartbeat(lease, phase="", progress={})

    return Leading(store, lease, stop=lambda: False, prove=prove, wake=lambda count: None)


def test_who_leads_takes_from_the_front_and_others_from_the_back(store: JobStore, units: UnitStore) -> None:
    lease = begun(store)
    first, last, second = (
        taken(units, lease, "leader/1", leads=True),
        taken(units, lease, "a/1"),
        taken(units, lease, "b/1"),
    )
    assert [unit.number for unit in (first, last, second)] == [0, 3, 2]
    assert all(units.done(unit, {"n": unit.number}) for unit in (first, last, second))
    assert units.results(lease.job_id, PHASE, {}) == {0: {"n": 0}, 2: {"n": 2}, 3: {"n": 3}}


def test_a_retry_that_is_refused_takes_no_unit_from_its_worker(store: JobStore, units: UnitStore) -> None:
    lease = begun(store)
    unit = taken(units, lease, "leader/1", leads=True)
    with pytest.raises(IllegalMove):
        store.retry(lease.job_id)
    assert units.done(unit, {})


def test_many_workers_take_every_unit_once(store: JobStore, units: UnitStore) -> None:
    lease = begun(store, 40)
    found: list[int] = []

    def work(name: str) -> None:
        while unit := units.take(lease.job_id, PHASE, name, leads=name == "leader/1"):
            assert units.done(unit, {"by": name})
            found.append(unit.number)

    names = ["leader/1", "a/1", "b/1", "c/1"]
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(40))
    assert len(units.results(lease.job_id, PHASE, {})) == 40


def test_a_unit_that_passed_on_is_not_recorded_by_whoever_lost_it(store: JobStore, units: UnitStore) -> None:
    lease = begun(store, 1)
    slow = taken(units, lease, "slow/1")
    store.release("slow/")
    quick = taken(units, lease, "quick/1")
    assert quick.run == 2
    assert not units.done(slow, {"by": "slow"}) and not units.renew(lease.job_id, slow)
    units.give_back(slow)
    assert units.done(quick, {"by": "quick"})
    assert not units.done(slow, {"by": "slow"})
    assert units.results(lease.job_id, PHASE, {}) == {0: {"by": "quick"}}


def test_an_answer_that_was_lost_is_given_again(store: JobStore, units: UnitStore) -> None:
    """The connection broke after the database had done what it was asked: asking again changes nothing."""
    lease = begun(store)
    one = taken(units, lease, "a/1")
    assert units.take(lease.job_id, PHASE, "a/1", leads=False) == one
    assert units.done(one, {}) and units.done(one, {})


def test_units_of_a_dead_leader_are_given_back_and_those_of_living_assistants_kept(
    store: JobStore, units: UnitStore
) -> None:
    lease = begun(store)
    of_leader, of_assistant = taken(units, lease, "leader/1", leads=True), taken(units, lease, "a/1")
    store.release("leader/")
    assert units.renew(lease.job_id, of_assistant), "a queued job goes on"
    assert units.take(lease.job_id, PHASE, "b/1", leads=False) is None, "nobody leads now"
    again = store.claim(lease.job_id, "other/1")
    assert again is not None
    units.open(again, PHASE, 4)
    assert taken(units, again, "other/1", leads=True).number == of_leader.number
    assert not units.done(of_leader, {}) and units.done(of_assistant, {})


def test_leases_of_units_run_out(tmp_path: Path, database: dict[str, str]) -> None:
    store = JobStore(Settings(data=tmp_path / "data", lease_seconds=60, **database))
    units, lease = UnitStore(store), begun(store)
    taken(units, lease, "leader/1", leads=True)
    silent = taken(units, lease, "a/1")
    assert not store.is_silent("a/")
    with store.session() as session:
        session.execute(update(Job).values(lease_until=time.time() - 1))
        session.execute(update(Unit).where(Unit.lease_until.is_not(None)).values(lease_until=time.time() - 1))
    assert store.is_silent("a/")
    store.heartbeat(lease, phase="", progress={})
    store.give_back_expired()
    assert not store.is_silent("a/") and not units.renew(lease.job_id, silent)
    assert taken(units, lease, "b/1").run == 2, "whoever leads has its units as long as the job"
    store.close()


def test_what_a_zombie_leader_does_is_refused(store: JobStore, units: UnitStore) -> None:
    zombie = begun(store)
    store.release("leader/")
    assert store.claim(zombie.job_id, "other/1")
    share = leading(store, zombie)
    for act in (share.forget, share.prove, lambda: share.open("x", 3), lambda: share.again(PHASE, 0)):
        with pytest.raises(LeaseLost):
            act()
    assert len(units.open_units()) == 1


def test_what_is_done_again_is_left_to_whoever_leads(store: JobStore, units: UnitStore) -> None:
    lease = begun(store, 2)
    share = leading(store, lease)
    assert units.done(taken(units, lease, "a/1"), {"n": 1})
    assert share.results(PHASE) == {1: {"n": 1}}
    share.again(PHASE, 1)
    assert share.results(PHASE) == {}
    assert taken(units, lease, "a/1").number == 0
    assert share.take(PHASE) == 1
    share.done(PHASE, 1, {"n": 2})
    assert share.results(PHASE) == {1: {"n": 2}}


def test_a_unit_at_which_an_assistant_fails_or_dies_too_often_is_left_to_whoever_leads(
    store: JobStore, units: UnitStore
) -> None:
    lease = begun(store, 2)
    with Assisting(store, lease.job_id, "a/1") as share:
        assert share.take(PHASE) == 1
        share.fail()
    for i in range(3):
        assert taken(units, lease, f"w{i}/1").number == 0
        store.release(f"w{i}/")
    assert units.take(lease.job_id, PHASE, "b/1", leads=False) is None and units.find(lease.job_id) is None
    assert [taken(units, lease, f"leader/{i}", leads=True).number for i in range(2)] == [1, 0]


def test_an_assistant_hands_its_unit_back(store: JobStore, units: UnitStore) -> None:
    lease = begun(store, 1)
    with Assisting(store, lease.job_id, "a/1") as share:
        assert share.take(PHASE) == 0
    assert taken(units, lease, "b/1").run == 2


@pytest.mark.parametrize("end", ["cancel", "fail", "lose"])
def test_an_assistant_learns_within_a_moment_that_it_is_over(store: JobStore, units: UnitStore, end: str) -> None:
    lease = begun(store)
    with Assisting(store, lease.job_id, "a/1") as share, pytest.raises(NothingToDo):
        assert share.take(PHASE) == 3
        if end == "cancel":
            store.cancel(lease.job_id)
        elif end == "fail":
            store.fail(lease, {"code": "x"})
        else:
            store.release("a/")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert not share.stop()
            time.sleep(0.01)


def test_an_assistant_that_slept_stops_before_it_writes(tmp_path: Path) -> None:
    """Even before it can ask anybody: its lease has passed, and so may its unit have."""
    store = JobStore(Settings(data=tmp_path / "data", lease_seconds=60, heartbeat_seconds=600))
    lease = begun(store)
    with Assisting(store, lease.job_id, "a/1") as share:
        assert share.take(PHASE) == 3 and not share.stop()
        share._renewed -= 61
        with pytest.raises(NothingToDo):
            share.stop()
        share._done.set()
    store.close()


def test_an_assistant_leaves_for_a_job_that_waits(store: JobStore) -> None:
    lease = begun(store)
    with Assisting(store, lease.job_id, "a/1") as share:
        assert share.take(PHASE) == 3
        share.done(PHASE, 3, {})
        assert share.wait()
        store.add({}, {})
        assert share.take(PHASE) is None and not share.wait()


def test_an_assistant_waits_for_the_next_phase_and_not_after_the_last(store: JobStore) -> None:
    lease = begun(store)
    with Assisting(store, lease.job_id, "a/1") as share:
        store.heartbeat(lease, phase="measuring: ranks", progress={})
        assert share.wait()
        store.heartbeat(lease, phase="merging", progress={})
        assert not share.wait()


def test_idle_workers_of_the_site_are_called(store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(store, make_celery(store.settings))
    sent: list[str] = []
    monkeypatch.setattr(queue, "_send", lambda job_id: sent.append(job_id) or True)
    for name in ("leader", "a", "b", "c"):
        alive.report(store, name, device="cpu")
    lease = begun(store, 8)
    taken(queue.units, lease, "a/1")
    queue.wake(lease.job_id, 7)
    assert sent == [lease.job_id] * 2
    queue.reap()
    queue.reap()
    assert sent == [lease.job_id] * 4, "not at every round"
    monkeypatch.setitem(vars(store.settings), "site", "elsewhere")
    assert queue.units.find(lease.job_id) is None and queue.units.idle() == 0 and not queue.units.open_units()


def test_what_was_measured_or_written_for_another_folder_does_not_count(store: JobStore, units: UnitStore) -> None:
    lease = begun(store)
    assert units.done(taken(units, lease, "a/1"), {"n": 3})
    late = taken(units, lease, "b/1")
    share = leading(store, lease)
    share.forget()
    share.open(PHASE, 4)
    assert share.results(PHASE) == {} and not units.done(late, {"n": 2})
    assert len({share.take(PHASE)}) == 1


def test_a_site_is_named_once(tmp_path: Path) -> None:
    names = []
    threads = [
        threading.Thread(target=lambda: names.append(JobStore(Settings(data=tmp_path / "data")).settings.site))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 1 and len(names[0]) == 32
    assert Settings(data=tmp_path / "other").data != tmp_path / "data"


@pytest.mark.parametrize(
    ("named", "gpus"), [("", []), ("-1", []), ("0", ["0"]), ("2, GPU-1f", ["2", "GPU-1f"]), ("1,-1,2", ["1"])]
)
def test_the_gpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch, named: str, gpus: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == gpus


def test_one_worker_for_each_gpu_and_cores_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))

    def shares(**given: object) -> list[tuple[str | None, ...]]:
        names = ("WEIGHTSMITH_DEVICE", "CUDA_VISIBLE_DEVICES", "WEIGHTSMITH_THREADS")
        return [tuple(map(each.get, names)) for each in shared_out(Settings(data=tmp_path, **given))]  # type: ignore[arg-type]

    assert shares(device="auto") == [("cuda", "3", "3"), ("cuda", "5", "3")]
    assert shares(device="cuda", workers=3) == [("cuda", "3", "2"), ("cuda", "5", "2"), ("cuda", "3", "2")]
    assert shares(device="cpu") == [("cpu", None, None)]
    assert shares(device="cuda:1") == [("cuda:1", None, None)]
    assert shares(workers=4, threads=2) == [("cpu", None, "2")] * 4
    assert shares(workers=0) == []
