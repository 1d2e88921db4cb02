"""Every line is one JSON object that says whose it is, and holds no secret; a job's lines are its events too."""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workers import logs
from workers.jobs import JobStore, Lease
from workers.logs import bind_process, configure_logs, logs_of
from workers.settings import Settings


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(Settings(data=tmp_path / "data"))
    yield store
    store.close()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def claimed(store: JobStore) -> Lease:
    store.add({}, {}, owner="ann", request_id="req_1")
    lease = store.claim_next("w/1")
    assert lease
    return lease


def test_whoever_logs_it_a_record_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_format="json"), "worker")
    logging.getLogger("app.x").info("two\nlines %s", "of text", extra={"status": 200})
    logging.getLogger("celery.app.trace").error("refused")
    logging.getLogger("uvicorn.error").warning("slow")
    with pytest.warns(UserWarning, match="old"):
        warnings.warn("old", stacklevel=1)
    try:
        raise ValueError("at https://ann:hunter2@hub.example/x with hf_abcdefghijklmnopqrstuvwxyz012345")
    except ValueError:
        logging.getLogger("workers.x").exception("it broke")

    found = lines(capsys)

    assert [(line["logger"], line["level"]) for line in found] == [
        ("app.x", "info"),
        ("celery.app.trace", "error"),
        ("uvicorn.error", "warning"),
        ("workers.x", "error"),
    ]
    assert found[0]["message"] == "two\nlines of text" and found[0]["status"] == 200
    assert all(line["process"] == "worker" and line["timestamp"].endswith("Z") for line in found)
    assert "ValueError" in found[-1]["exception"] and "Traceback" in found[-1]["exception"]
    assert "hunter2" not in str(found) and "abcdefghij" not in str(found)


def test_others_are_heard_from_warnings_on_and_ours_as_the_setting_says(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_format="json", log_level="error"), "worker")
    logging.getLogger("celery").info("ready")
    logging.getLogger("workers.x").warning("slow")
    logging.getLogger("celery").warning("lost")
    assert [line["message"] for line in lines(capsys)] == ["lost"]


def test_on_a_terminal_it_is_for_eyes(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_format="console"), "worker")
    logging.getLogger("workers.x").info("hello")
    written = capsys.readouterr().err
    assert "hello" in written and not written.startswith("{")


def test_what_a_job_logs_names_it_in_every_thread_and_becomes_its_events(
    store: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs(Settings(log_format="json"), "worker")
    bind_process(worker="w")
    lease = claimed(store)
    log = logging.getLogger("workers.x")
    with logs_of(store, lease):
        log.info("token=abcdef0123456789 is used")
        log.debug("not worth keeping")
        logging.getLogger("somebody").warning("else's")
        thread = threading.Thread(target=log.warning, args=("from a thread",))
        thread.start()
        thread.join()
    log.info("after it")

    *during, after = lines(capsys)

    job = {"job_id": lease.job_id, "attempt": 1, "owner": "ann", "request_id": "req_1", "worker": "w"}
    assert len(during) == 3 and all(job.items() <= line.items() for line in during)
    assert not job.keys() & after.keys() - {"worker"}
    kept = [event.data for event in store.events(lease.job_id) if event.kind == "log"]
    assert [line["level"] for line in kept] == ["info", "warning"]
    assert "abcdef" not in kept[0]["message"] and kept[1]["message"] == "from a thread"


def test_only_so_many_lines_are_kept(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_LINES", 3)
    configure_logs(Settings(log_format="json"), "worker")
    lease = claimed(store)
    with logs_of(store, lease):
        for i in range(10):
            logging.getLogger("workers.x").info("line %d", i)
    kept = [event.data["message"] for event in store.events(lease.job_id) if event.kind == "log"]
    assert kept[:3] == ["line 0", "line 1", "line 2"] and len(kept) == 4 and "worker's own log" in kept[3]


def test_a_database_that_is_gone_keeps_nobody_from_logging(store: JobStore, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_format="json"), "worker")
    lease = claimed(store)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE events")
    with logs_of(store, lease):
        logging.getLogger("workers.x").info("still here")
    assert [line["message"].split(":")[0] for line in lines(capsys)] == [
        "still here",
        "a line could not be kept as an event of its job",
    ]
