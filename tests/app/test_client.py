"""The Python client: against a service, and against servers that break."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import app.client.transport
from app.client import Client, Damaged, Job, JobCanceled, JobFailed, NotFound, NotWeightsmith, Refused, Unreachable
from app.client.documents import body_of
from app.main import create_app
from tests.app.faulty import Answer, Asked, NoAnswer, faulty_server
from workers.jobs import JobKind
from workers.settings import Settings

JOB = {"id": "mrg_1", "status": "queued", "progress": {}, "warnings": [], "created_at": "2026-01-02T03:04:05Z"}
KINDS = ("merges", "alignments", "patches", "verify", "views", "analyses", "searches", "calibrations")
KEY = "wsk_" + "s3cret" * 5


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.client.transport, "FIRST_PAUSE", 0.001)
    for variable in ("WEIGHTSMITH_URL", "WEIGHTSMITH_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


def answers(*given: Answer | type[NoAnswer]) -> Callable[[Asked], Answer]:
    """One after the other; the last again and again."""
    left = list(given)

    def answer(_: Asked) -> Answer:
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Answer):
            return found
        raise found

    return answer


def problem(status: int, code: str, **members: Any) -> Answer:
    body = {"type": f"/v1/problems/{code}", "title": code, "status": status, "detail": "why", "code": code, **members}
    return Answer(status, body, {"Content-Type": "application/problem+json"})


def test_importing_it_is_light() -> None:
    program = """
import sys, time
started = time.process_time()
import weightsmith
assert weightsmith.Client and time.process_time() - started < 1, time.process_time() - started
heavy = {"torch", "numpy", "fastapi", "starlette", "pydantic", "celery", "sqlalchemy", "rich", "click", "yaml"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_document_may_be_data_text_or_a_file(tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "é"}]}
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe))
    for document in (
        recipe,
        json.dumps(recipe),
        yaml.safe_dump(recipe),
        yaml.safe_dump(recipe).encode(),
        file,
        str(file),
    ):
        assert yaml.safe_load(body_of(document)[0]) == recipe
    assert json.loads(body_of([recipe, recipe])[0]) == [recipe, recipe]
    with pytest.raises(FileNotFoundError):
        body_of("nowhere.yml")


def test_the_client_has_a_word_for_every_route(tmp_path: Path) -> None:
    anything = {
        **JOB,
        "data": [],
        "status": "succeeded",
        "name": "x",
        "plan": {},
        "secret": "x",
        "size": 1,
        "sha256": "x",
    }
    with faulty_server(answers(Answer(200, anything))) as server, Client(server.url) as client:
        for jobs in (getattr(client, plural) for plural in KINDS):
            jobs.submit({})
            list(jobs.list())
            for word in (jobs.get, jobs.cancel, jobs.retry, jobs.delete, jobs.logs, jobs.recipe, jobs.manifest):
                word("x")
            for word in (jobs.report, jobs.files, jobs.deliveries, jobs.tensors):
                word("x")
            jobs.download("x", tmp_path)
        assert list(client.searches.trials("x")) == []
        client.recipes.validate({})
        client.recipes.import_("")
        client.methods.list()
        client.methods.get("x")
        client.api_keys.create()
        client.api_keys.get("x")
        client.api_keys.delete("x")
        (tmp_path / "x").write_bytes(b"x")
        client.data.put(tmp_path / "x")
        client.data.get("x")
        client.data.delete("x")
        client.credentials.put("x", kind="hub", token="x")
        client.credentials.get("x")
        client.credentials.delete("x")
        assert [*client.api_keys.list(), *client.credentials.list(), *client.data.list(), *client.models.list()] == []
        client.system.get()
        client.system.quota()
        client.system.webhook_secret()
    asked = {(each.verb.lower(), each.path.partition("?")[0]) for each in server.asked}
    # A stream of events, and a file's content, have tests of their own.
    asked |= {("get", f"/v1/{plural}/x/{rest}") for plural in KINDS for rest in ("events", "files/x")}
    routes = {
        (verb, re.sub(r"{.*?}", "x", path))
        for path, item in create_app(Settings(data=tmp_path)).openapi()["paths"].items()
        for verb in item
        if path.startswith("/v1/") and not path.startswith("/v1/problems") and verb != "head"
    }
    assert routes <= asked, sorted(routes - asked)


def test_ids_tell_the_kind() -> None:
    with Client("http://127.0.0.1:1") as client:
        for kind in JobKind:
            assert client.jobs_of(f"{kind.prefix}1") is getattr(client, kind.plural)
        with pytest.raises(app.client.ServiceError, match="no job's id"):
            client.jobs_of("x")


# What is asked again, and what is not.


@pytest.mark.parametrize(
    "fault", [problem(503, "queue-unavailable"), problem(429, "rate-limited"), Answer(502, b"<html>"), NoAnswer]
)
def test_a_submit_that_is_repeated_makes_one_job(fault: Answer | type[NoAnswer]) -> None:
    with (
        faulty_server(answers(Answer(200, JOB), fault, fault, Answer(202, JOB))) as server,
        Client(server.url) as client,
    ):
        client.merges.get("mrg_1")
        made = client.merges.submit({})
        assert made.id == "mrg_1" and made.raw == JOB
    first, *_, last = server.asked[1:]
    assert len(server.asked) == 4 and first.headers["idempotency-key"] == last.headers["idempotency-key"]


def test_each_submit_is_another_job_unless_it_says_otherwise() -> None:
    with faulty_server(answers(Answer(202, JOB))) as server, Client(server.url) as client:
        client.merges.submit({})
        client.merges.submit({})
        client.merges.submit({}, idempotency_key="mine")
    keys = [asked.headers["idempotency-key"] for asked in server.asked]
    assert len(set(keys)) == 3 and keys[2] == "mine"


def test_what_would_be_done_twice_is_not_sent_twice() -> None:
    with faulty_server(answers(Answer(200, JOB), NoAnswer)) as server, Client(server.url) as client:
        client.merges.get("mrg_1")
        for call in (lambda: client.merges.retry("mrg_1"), lambda: client.api_keys.create("mine", scopes=["admin"])):
            before = len(server.asked)
            with pytest.raises(Unreachable):
                call()
            assert len(server.asked) == before + 1


def test_refusals_are_not_repeated_and_say_what_the_problem_says() -> None:
    places = [{"pointer": "#/merge_method", "detail": "there is no method"}]
    with faulty_server(answers(problem(422, "invalid-recipe", errors=places))) as server, Client(server.url) as client:
        with pytest.raises(Refused, match="invalid-recipe: why") as refused:
            client.merges.submit({})
        assert (refused.value.status, refused.value.code, refused.value.errors) == (422, "invalid-recipe", places)
    assert len(server.asked) == 1
    with (
        faulty_server(answers(problem(404, "not-found"))) as server,
        Client(server.url) as client,
        pytest.raises(NotFound),
    ):
        client.merges.get("mrg_1")


def test_patience_ends() -> None:
    with (
        faulty_server(answers(problem(503, "queue-unavailable"))) as server,
        Client(server.url, patience=0.5) as client,
    ):
        with pytest.raises(Refused, match="queue-unavailable"):
            client.merges.get("mrg_1")
        assert len(server.asked) > 2
    busy = problem(503, "queue-unavailable")
    busy.headers["Retry-After"] = "5"
    with faulty_server(answers(busy)) as server, Client(server.url, patience=0.5) as client:
        with pytest.raises(Refused):
            client.merges.get("mrg_1")
        assert len(server.asked) == 1, "asked to wait longer than it may, it says so at once"
    with Client("http://127.0.0.1:1", patience=60) as client, pytest.raises(Unreachable, match="cannot be reached"):
        client.merges.get("mrg_1")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"data": 1}', b'{"data": [1]}', b"null"])
def test_what_is_not_weightsmith_is_told_apart(body: bytes) -> None:
    with faulty_server(answers(Answer(200, body))) as server, Client(server.url) as client:
        for call in (
            lambda: client.merges.get("mrg_1"),
            lambda: client.merges.submit({}),
            lambda: next(client.merges.list()),
            lambda: client.merges.files("mrg_1"),
            lambda: next(client.merges.events("mrg_1")),
        ):
            with pytest.raises(NotWeightsmith, match="right address"):
                call()


def test_lists_come_page_by_page() -> None:
    pages = [{"data": [{**JOB, "id": f"mrg_{i}"} for i in page], "next": page[-1]} for page in ((9, 8), (7, 6))]
    last = {"data": [], "next": None}
    with (
        faulty_server(answers(*(Answer(200, page) for page in (*pages, last)))) as server,
        Client(server.url) as client,
    ):
        found = client.merges.list(status="queued", labels={"team": "a"})
        assert [next(found).id, next(found).id] == ["mrg_9", "mrg_8"] and len(server.asked) == 1
        assert [job.id for job in found] == ["mrg_7", "mrg_6"]
    assert all("status=queued" in asked.path and "label=team%3Aa" in asked.path for asked in server.asked)
    assert "after=8" in server.asked[1].path and "after=6" in server.asked[2].path


# The key.


def test_the_key_is_sent_to_the_service_and_shown_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown = []
    with faulty_server(answers(Answer(200, JOB))) as elsewhere:
        there = Answer(307, b"", {"Location": elsewhere.url.replace("127.0.0.1", "localhost") + "/v1/merges/mrg_1"})
        given = (Answer(200, JOB), there, problem(401, "unauthorized"), Answer(200, b"<html>"), NoAnswer)
        with faulty_server(answers(*given)) as server, Client(server.url, api_key=KEY, patience=0.01) as client:
            shown += [repr(client), str(vars(client))]
            client.merges.get("mrg_1")
            for _ in range(4):
                with pytest.raises(Exception) as caught:
                    client.merges.get("mrg_1")
                shown += [repr(caught.value), "".join(traceback.format_exception(caught.value))]
    assert all(asked.headers["authorization"] == f"Bearer {KEY}" for asked in server.asked)
    assert not elsewhere.asked
    for bad in (f"{KEY}\n", f"{KEY} {KEY}", f"{KEY}é"):
        with pytest.raises(Exception, match="characters that no key has") as caught:
            Client("http://127.0.0.1:1", api_key=bad)
        shown.append(str(caught.value))
    with Client(f"http://user:{KEY}@127.0.0.1:1") as client, pytest.raises(Unreachable) as unreachable:
        shown.append(repr(client))
        client.merges.get("mrg_1")
    shown += [str(unreachable.value), caplog.text]
    assert not any("s3cret" in text for text in shown), [text for text in shown if "s3cret" in text]


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_server(answers(Answer(200, JOB))) as server:
        monkeypatch.setenv("WEIGHTSMITH_URL", server.url)
        monkeypatch.setenv("WEIGHTSMITH_API_KEY", KEY)
        with Client() as client:
            client.merges.get("mrg_1")
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    for url in ("http://[::1", "ftp://there", "nowhere", "http://"):
        with pytest.raises(app.client.ServiceError, match="no address"):
            Client(url)


# Waiting and events.


def test_waiting_tells_of_every_answer_and_raises_what_went_wrong() -> None:
    running = {**JOB, "status": "running", "phase": "merging", "progress": {"bytes_read": 5, "bytes_read_total": 10}}
    failed = {
        **JOB,
        "status": "failed",
        "error": {"code": "insufficient-storage", "detail": "no room", "retryable": True},
    }
    told: list[Job] = []
    with faulty_server(answers(Answer(200, running), Answer(200, failed))) as server, Client(server.url) as client:
        with pytest.raises(JobFailed, match="mrg_1 failed: no room") as caught:
            client.merges.wait("mrg_1", progress=told.append)
        assert caught.value.code == "insufficient-storage" and caught.value.retryable
        assert [(job.status, job.progress.bytes_read) for job in told] == [("running", 5), ("failed", 0)]
        assert client.merges.wait("mrg_1", check=False).status == "failed"
    ends: tuple[tuple[dict[str, Any], type[Exception]], ...] = (
        ({**JOB, "status": "canceled"}, JobCanceled),
        (running, TimeoutError),
    )
    for job, error in ends:
        with faulty_server(answers(Answer(200, job))) as server, Client(server.url) as client, pytest.raises(error):
            client.merges.wait("mrg_1", timeout=0.05)


STATES = ["queued", "running", "running", "succeeded"]
SENT = b"retry: 1\n\n" + b"".join(
    f"id: {i}\nevent: state\ndata: {json.dumps({'status': state, 'é': '—'})}\n\n: alive\n\n".encode()
    for i, state in enumerate(STATES, 1)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, len(SENT)), max_size=4))
@example(cuts=[0, 0])
def test_events_come_once_and_in_order_wherever_the_stream_breaks(cuts: list[int]) -> None:
    left = list(cuts)

    def answer(asked: Asked) -> Answer:
        after = int(asked.headers.get("last-event-id", 0))
        if after == len(STATES):
            return Answer(204)
        parts = SENT.split(b"id: ")
        body = parts[0] + b"".join(b"id: " + part for part in parts[1 + after :])
        cut = min(left.pop(0), len(body)) if left else None
        return Answer(200, body, {"Content-Type": "text/event-stream"}, breaks_after=cut)

    with faulty_server(answer) as server, Client(server.url) as client:
        found = list(client.merges.events("mrg_1"))
        assert list(client.merges.events("mrg_1", after=len(STATES))) == []
    assert [(event.seq, event.kind, event.data["status"]) for event in found] == [
        (i, "state", state) for i, state in enumerate(STATES, 1)
    ]


# Downloads.


class Shop:
    """Serves files in parts, and breaks off after the numbers of bytes in `breaks`."""

    def __init__(self, files: dict[str, bytes], breaks: list[int] | None = None, *, has_ranges: bool = True) -> None:
        self.files, self.breaks, self.has_ranges, self.sent = files, list(breaks or []), has_ranges, 0

    def __call__(self, asked: Asked) -> Answer:
        name = asked.path.partition("/files/")[2]
        if not name:
            data = [{"path": path, "size": len(body), "sha256": sha(body)} for path, body in self.files.items()]
            return Answer(200, {"data": data})
        body, status = self.files[name], 200
        headers = {"ETag": f'"{sha(body)}"'}
        if (part := asked.headers.get("range")) and self.has_ranges:
            assert asked.headers["if-range"] == headers["ETag"]
            start = int(part.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        cut = min(self.breaks.pop(0), len(body)) if self.breaks else None
        self.sent += len(body) if cut is None else cut
        return Answer(status, body, headers, breaks_after=cut)


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


BODY = bytes(range(256)) * 600


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(breaks=st.lists(st.integers(0, len(BODY)), max_size=4))
def test_a_download_goes_on_where_it_broke(tmp_path_factory: pytest.TempPathFactory, breaks: list[int]) -> None:
    folder = tmp_path_factory.mktemp("download")
    shop = Shop({"model.safetensors": BODY}, breaks)
    with faulty_server(shop) as server, Client(server.url) as client:
        assert client.merges.download("mrg_1", folder) == [folder / "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == BODY and names(folder) == {"model.safetensors"}
    assert shop.sent == len(BODY), "no byte is sent twice"


def test_a_file_may_come_from_elsewhere_where_the_key_does_not_go(tmp_path: Path) -> None:
    """As from S3, which breaks off once, and knows the file by no tag of ours."""

    def bucket(asked: Asked) -> Answer:
        start = int(asked.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        content_range = {"Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"} if start else {}
        headers = {"ETag": '"md5"', **content_range}
        return Answer(206 if start else 200, BODY[start:], headers, breaks_after=None if start else 1000)

    with faulty_server(bucket) as other:

        def shop(asked: Asked) -> Answer:
            if asked.path.endswith("/files"):
                return Shop({"model.safetensors": BODY})(asked)
            return Answer(307, headers={"Location": f"{other.url}/signed?once"})

        with faulty_server(shop) as server, Client(server.url, api_key=KEY) as client:
            client.merges.download("mrg_1", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == BODY
    assert [asked.headers.get("range") for asked in other.asked] == [None, "bytes=1000-"]
    assert all("authorization" in asked.headers for asked in server.asked)
    assert not any(KEY in str(asked.headers) or "if-range" in asked.headers for asked in other.asked)


def test_a_later_download_goes_on_too_and_leaves_what_is_there(tmp_path: Path) -> None:
    files = {"a.safetensors": BODY, "sub/b.json": b"{}", "empty": b""}
    shop = Shop(files, [1000] * 100)
    with faulty_server(shop) as server, Client(server.url, patience=0) as client, pytest.raises(Unreachable):
        client.merges.download("mrg_1", tmp_path)
    assert "a.safetensors" not in names(tmp_path)
    shop.breaks, shop.sent = [], 0
    before = sum(path.stat().st_size for path in tmp_path.rglob("*.partial"))
    with faulty_server(shop) as server, Client(server.url) as client:
        client.merges.download("mrg_1", tmp_path)
        assert before > 0 and shop.sent <= len(BODY) + 2 - before
        assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == files
        shop.sent = 0
        client.merges.download("mrg_1", tmp_path)
        assert shop.sent == 0


@pytest.mark.parametrize("has_ranges", [True, False])
def test_what_an_earlier_download_left_may_be_wrong(tmp_path: Path, has_ranges: bool) -> None:
    shop = Shop({"a": BODY}, [5000], has_ranges=has_ranges)
    partial = tmp_path / f".a.{sha(BODY)[:16]}.partial"
    for left in (b"other bytes", BODY + b"more", BODY[:-1] + b"?"):
        partial.write_bytes(left)
        (tmp_path / "a").unlink(missing_ok=True)
        with faulty_server(shop) as server, Client(server.url) as client:
            client.merges.download("mrg_1", tmp_path)
        assert (tmp_path / "a").read_bytes() == BODY and names(tmp_path) == {"a"}


def test_a_damaged_file_never_appears(tmp_path: Path) -> None:
    shop = Shop({"a": BODY})

    def answer(asked: Asked) -> Answer:
        found = shop(asked)
        return Answer(200, BODY[::-1], found.headers) if asked.path.endswith("/files/a") else found

    with faulty_server(answer) as server, Client(server.url) as client, pytest.raises(Damaged, match="sha256"):
        client.merges.download("mrg_1", tmp_path)
    assert not (tmp_path / "a").exists() and sum(path.stat().st_size for path in tmp_path.iterdir()) == 0


@pytest.mark.parametrize(
    "name", ["../out", "/etc/passwd", "a/../../out", "..", "", ".", "a\\b", "link/out", "a\nb", "a\0b"]
)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder, outside = tmp_path / "in", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "link").symlink_to(outside)
    with (
        faulty_server(Shop({name: BODY})) as server,
        Client(server.url) as client,
        pytest.raises(Damaged, match="below"),
    ):
        client.merges.download("mrg_1", folder)
    assert names(folder) == set() and names(outside) == set() and names(tmp_path) == set()


def test_two_downloads_of_one_file_do_not_mix(tmp_path: Path) -> None:
    def nested(asked: Asked) -> Answer:
        if asked.path.endswith("/files/a") and len(server.asked) == 2:
            with Client(server.url) as second, pytest.raises(app.client.ServiceError, match="being downloaded"):
                second.merges.download("mrg_1", tmp_path)
        return shop(asked)

    shop = Shop({"a": BODY})
    with faulty_server(nested) as server, Client(server.url) as client:
        client.merges.download("mrg_1", tmp_path)
    assert (tmp_path / "a").read_bytes() == BODY
