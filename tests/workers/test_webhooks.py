"""What becomes of a job is told to its webhook: with the move, signed, until it arrives, and to nobody else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from standardwebhooks import Webhook, WebhookVerificationError

from tests.receivers import Received, plain_answer, receiving
from tests.services import eventually
from workers.jobs import JobStore, Lease
from workers.outbound import Guard
from workers.settings import Settings
from workers.signing import KEY_FILE, NoSigningKey, Signer
from workers.tables import Delivery, Job
from workers.webhooks import EVENTS, MAX_ATTEMPTS, Courier, deliveries_of

ALL = list(EVENTS.values())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(Settings(data=tmp_path / "data"))
    yield store
    store.close()


@pytest.fixture
def receiver() -> Iterator[Received]:
    with receiving() as received:
        yield received


def courier(store: JobStore, allow: str = "127.0.0.1") -> Courier:
    return Courier(store, Guard([allow]))


def job_with(store: JobStore, receiver: Received, events: list[str] = ALL) -> Job:
    url = f"http://127.0.0.1:{receiver.port}/hook?key=private"
    return store.add({}, {}, webhook={"url": url, "events": events}, labels={"team": "vision"})


def claimed(store: JobStore, job: Job) -> Lease:
    lease = store.claim(job.id, "w/1")
    assert lease is not None
    return lease


def deliver_all(courier: Courier) -> None:
    while (delivery := courier.claim()) is not None:
        courier.deliver(delivery)


def in_the_past(store: JobStore) -> None:
    """As if time had passed: whatever waits is due."""
    with store.session() as session:
        session.execute(update(Delivery).where(Delivery.next_at.is_not(None)).values(next_at=1.0))


def told(receiver: Received) -> list[str]:
    return [json.loads(body)["type"] for _, _, body in receiver.requests]


def test_each_move_is_told_once_signed_and_thin(store: JobStore, receiver: Received) -> None:
    job = job_with(store, receiver)
    lease = claimed(store, job)
    store.succeed(lease, files=[], warnings=[], progress={})
    canceled = job_with(store, receiver)
    store.cancel(canceled.id)
    failed = job_with(store, receiver)
    store.fail(claimed(store, failed), {"code": "bad-checkpoint", "detail": "is cut short"})

    deliver_all(courier(store))

    expected = ["started", "succeeded", "canceled", "started", "failed"]
    assert sorted(told(receiver)) == sorted(f"merge.{event}" for event in expected)
    secret = Signer(store.settings).secret("local")
    for path, headers, body in receiver.requests:
        assert path == "/hook?key=private" and headers["content-type"] == "application/json"
        Webhook(secret).verify(body, headers)
        data = json.loads(body)["data"]
        assert data["id"] in (job.id, canceled.id, failed.id) and data["labels"] == {"team": "vision"}
        assert data["url"] == f"/v1/merges/{data['id']}" and "recipe" not in data
    last = next(json.loads(body)["data"] for _, _, body in receiver.requests if b"merge.failed" in body)
    assert last["status"] == "failed" and last["error"]["detail"] == "is cut short"
    assert len({headers["webhook-id"] for _, headers, _ in receiver.requests}) == 5
    assert all(each.delivered_at and each.next_at is None for each in deliveries_of(store, job.id))


def test_only_what_was_asked_for_is_told_and_further_attempts_are_not(store: JobStore, receiver: Received) -> None:
    job = job_with(store, receiver, ["started", "failed"])
    claimed(store, job)
    store.release("w/")
    store.succeed(claimed(store, job), files=[], warnings=[], progress={})
    store.cancel(store.add({}, {}).id)
    deliver_all(courier(store))
    assert told(receiver) == ["merge.started"]


def test_a_move_that_does_not_count_tells_nothing(store: JobStore, receiver: Received) -> None:
    job = job_with(store, receiver, ["succeeded"])
    lease = claimed(store, job)
    with pytest.raises(ZeroDivisionError), store.session() as session:
        store._move(session, update(Job).where(Job.id == job.id), state=EVENTS_BY_NAME["succeeded"])
        raise ZeroDivisionError
    assert deliveries_of(store, job.id) == []
    store.release("w/")
    with pytest.raises(Exception, match=job.id):
        store.succeed(lease, files=[], warnings=[], progress={})
    assert deliveries_of(store, job.id) == []


EVENTS_BY_NAME = {event: state for state, event in EVENTS.items()}


def one_delivery(store: JobStore, receiver: Received) -> str:
    job = job_with(store, receiver, ["canceled"])
    store.cancel(job.id)
    return job.id


@pytest.mark.parametrize("status", [500, 503, 404, 302, 429])
def test_what_does_not_arrive_is_sent_again_with_the_same_id(store: JobStore, receiver: Received, status: int) -> None:
    location = [("Location", f"http://127.0.0.1:{receiver.port}/elsewhere")]
    receiver.answer = lambda handler: plain_answer(handler, status, location)
    job_id, sender = one_delivery(store, receiver), courier(store)
    deliver_all(sender)
    (waiting,) = deliveries_of(store, job_id)
    assert waiting.next_at is not None and f"it answered {status}" in str(waiting.last_error)

    receiver.answer = lambda handler: plain_answer(handler, 204)
    in_the_past(store)
    deliver_all(sender)

    (delivered,) = deliveries_of(store, job_id)
    assert delivered.delivered_at and delivered.last_error is None and delivered.attempts == 2
    (first, second) = receiver.requests
    assert first[1]["webhook-id"] == second[1]["webhook-id"] and first[2] == second[2] and second[0] != "/elsewhere"


def test_retries_come_ever_later_over_about_a_day_and_end(store: JobStore, receiver: Received) -> None:
    receiver.answer = lambda handler: plain_answer(handler, 500)
    job_id, sender, waits = one_delivery(store, receiver), courier(store), []
    for _ in range(MAX_ATTEMPTS):
        in_the_past(store)
        delivery = sender.claim()
        assert delivery is not None
        waits.append(sender._wait(delivery.attempts))
        sender.deliver(delivery)
    assert 5 <= waits[0] <= 6.25 and all(later > 1.5 * wait for wait, later in pairwise(waits[:-1]))
    assert 18 * 3600 < sum(waits[:-1]) < 30 * 3600
    (given_up,) = deliveries_of(store, job_id)
    assert given_up.next_at is None and given_up.delivered_at is None and given_up.attempts == MAX_ATTEMPTS


def test_410_ends_it_for_the_whole_job(store: JobStore, receiver: Received) -> None:
    receiver.answer = lambda handler: plain_answer(handler, 410)
    job = job_with(store, receiver)
    lease = claimed(store, job)
    store.succeed(lease, files=[], warnings=[], progress={})
    sender = courier(store)
    first = sender.claim()
    assert first is not None
    sender.deliver(first)
    in_the_past(store)
    assert sender.claim() is None and len(receiver.requests) == 1
    assert ["410" in str(each.last_error) for each in deliveries_of(store, job.id)] == [True, True]
    found = store.get(job.id)
    assert found is not None and found.webhook is None


def test_an_address_that_turned_out_to_be_inside_is_not_called(store: JobStore, receiver: Received) -> None:
    job = store.add({}, {}, webhook={"url": "https://hook.example/", "events": ALL})
    store.cancel(job.id)
    sender = Courier(store, Guard(resolve=lambda host, port: ["10.11.12.13"]))
    deliver_all(sender)
    (refused,) = deliveries_of(store, job.id)
    assert refused.next_at is None and "no public address" in str(refused.last_error)
    assert "10.11.12.13" not in str(refused.last_error), "what names mean inside is not for users"


def test_what_goes_wrong_here_is_tried_again_and_ends_too(
    store: JobStore, receiver: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, sender = one_delivery(store, receiver), courier(store)
    monkeypatch.setattr(sender, "_send", lambda delivery: 1 / 0)
    for _ in range(MAX_ATTEMPTS):
        in_the_past(store)
        deliver_all(sender)
    (given_up,) = deliveries_of(store, job_id)
    assert given_up.next_at is None and given_up.attempts == MAX_ATTEMPTS and "log" in str(given_up.last_error)


def test_many_couriers_send_each_once(store: JobStore, receiver: Received, tmp_path: Path) -> None:
    for _ in range(20):
        one_delivery(store, receiver)
    stores = [JobStore(store.settings) for _ in range(3)]
    couriers = [courier(each) for each in stores]
    for i, each in enumerate(couriers):
        each._name = f"host/{i}"
    threads = [threading.Thread(target=deliver_all, args=(each,)) for each in couriers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deliver_all(couriers[0])
    assert len(receiver.requests) == 20
    assert len({headers["webhook-id"] for _, headers, _ in receiver.requests}) == 20
    for each in stores:
        each.close()


def test_a_courier_that_died_is_stood_in_for_and_writes_nothing_late(store: JobStore, receiver: Received) -> None:
    job_id, dead, other = one_delivery(store, receiver), courier(store), courier(store)
    dead._name, other._name = "a/1", "b/1"
    taken = dead.claim()
    assert taken is not None and other.claim() is None
    in_the_past(store)
    again = other.claim()
    assert again is not None and again.id == taken.id and again.attempts == 2
    dead._end(taken, next_at=None, last_error="late")
    other.deliver(again)
    (delivered,) = deliveries_of(store, job_id)
    assert delivered.delivered_at and delivered.last_error is None


def test_what_ended_long_ago_is_forgotten(store: JobStore, receiver: Received) -> None:
    job_id, waiting = one_delivery(store, receiver), one_delivery(store, receiver)
    sender = courier(store)
    delivery = sender.claim()
    assert delivery is not None
    sender.deliver(delivery)
    with store.session() as session:
        session.execute(update(Delivery).values(created_at=1.0))
    sender.forget()
    assert (len(deliveries_of(store, job_id)), len(deliveries_of(store, waiting))) == (0, 1)


def test_a_courier_at_work_sends_what_comes_and_stops_at_once(store: JobStore, receiver: Received) -> None:
    sender = courier(store)
    sender.start()
    one_delivery(store, receiver)
    eventually(lambda: receiver.requests)
    sender.stop()
    one_delivery(store, receiver)
    assert sender.claim() is not None

    def states() -> list[Any]:
        with store.reading() as session:
            return list(session.scalars(select(Delivery.delivered_at).where(Delivery.delivered_at.is_not(None))))

    eventually(states)


def test_each_owner_has_a_secret_that_stays(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    secret = Signer(settings).secret("ann")
    assert secret == Signer(settings).secret("ann") != Signer(settings).secret("ben")
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_a_key_is_renewed_while_receivers_know_the_old_one(tmp_path: Path) -> None:
    old, new = "o" * 32, "n" * 32
    known = Signer(Settings(data=tmp_path, webhook_key=old)).secret("ann")
    both = Signer(Settings(data=tmp_path, webhook_key=f"{new}, {old}"))
    now = datetime.now(UTC)
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(now.timestamp()))}
    headers["webhook-signature"] = both.sign("ann", "msg_1", now, "{}")
    for secret in (known, both.secret("ann")):
        Webhook(secret).verify("{}", headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(both.secret("ben")).verify("{}", headers)


@pytest.mark.parametrize("keys", [{"webhook_key": "short"}, {"database_url": "postgresql://db/weightsmith"}])
def test_without_a_key_that_all_machines_share_nothing_is_signed(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(NoSigningKey, match="WEIGHTSMITH_WEBHOOK_KEY"):
        Signer(Settings(data=tmp_path, **keys))
