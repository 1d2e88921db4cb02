"""Where data of evaluators come from: files that were sent, and data sets on the Hub at one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from merge_core.errors import CheckpointError, CheckpointNotFound, PathNotAllowed
from tests.hub import Hub, running_hub
from workers.evaluators.data import Shelves, rows_of, sha256_of
from workers.hub.errors import HubGated, HubLied, HubNotFound
from workers.hub.opening import HubOptions, JobHub
from workers.jobs import JobStore
from workers.quotas import QuotaTooSmall, set_limits, used
from workers.settings import Settings
from workers.tables import Upload
from workers.uploads import Uploads

ROWS = b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
LARGE = b'{"text": "%s"}\n' % (b"x" * 3000)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        hub.put("datasets/org/pets", {"few.jsonl": ROWS, "large/all.parquet": LARGE, "README.md": b"pets"})
        yield hub


@pytest.fixture
def store(hub: Hub, tmp_path: Path) -> Iterator[JobStore]:
    allowed = {"hub_endpoint": hub.endpoint, "endpoint_allow": ["localhost", "127.0.0.1"]}
    store = JobStore(Settings(data=tmp_path / "data", evaluator_data_bytes=4000, **allowed))
    yield store
    store.close()


def sent(uploads: Uploads, name: str, *pieces: bytes) -> Upload:
    with uploads.coming(name) as coming:
        for piece in pieces:
            coming.write(piece)
        return coming.kept()


def shelves(store: JobStore, owner: str = "ann", hub: JobHub | None = None) -> Shelves:
    return Shelves(store, owner, (hub or JobHub(store, owner)).roots)


# What was sent.


def test_what_was_sent_is_read_under_its_name_by_its_owner_alone(store: JobStore) -> None:
    kept = sent(Uploads(store, "ann"), "few.jsonl", ROWS[:7], ROWS[7:])
    assert (kept.size, kept.sha256) == (len(ROWS), hashlib.sha256(ROWS).hexdigest())
    path, roots = shelves(store).open("data:few.jsonl")
    assert [(place, row["label"]) for place, row in rows_of(path, roots)] == [
        *(("few.jsonl, line 1", 0), ("few.jsonl, line 2", 1))
    ]
    for nothing in ("data:other.jsonl", "data:../few.jsonl", "data:"):
        with pytest.raises(CheckpointNotFound, match="PUT it to"):
            shelves(store).look(nothing)
    with pytest.raises(CheckpointNotFound):
        shelves(store, "ben").look("data:few.jsonl")


def test_a_file_in_place_of_another_leaves_nothing_of_it(store: JobStore) -> None:
    uploads = Uploads(store, "ann")
    sent(uploads, "a", b"first")
    reader = uploads.path("a").open("rb")
    sent(uploads, "b", b"first")
    sent(uploads, "a", b"second")
    sent(uploads, "a", b"second")
    assert uploads.path("a").read_bytes() == b"second" and uploads.path("b").read_bytes() == b"first"
    assert reader.read() == b"first"
    reader.close()
    with pytest.raises(ZeroDivisionError), uploads.coming("c") as coming:
        coming.write(b"half of i")
        raise ZeroDivisionError
    assert [each.name for each in uploads.page(limit=9)] == ["a", "b"]
    assert uploads.delete("a") and uploads.delete("b") and not uploads.delete("b")
    assert list(uploads.folder.rglob("*")) == []


def test_what_was_sent_counts_as_disk(store: JobStore) -> None:
    uploads = Uploads(store, "ann")
    with store.session() as session:
        set_limits(session, "ann", {"disk_bytes": 100})
    sent(uploads, "a", b"x" * 90)
    with pytest.raises(QuotaTooSmall) as refused:
        sent(uploads, "b", b"x" * 20)
    assert refused.value.facts() == {"limit": "disk_bytes", "used": 90, "allowed": 100, "asked": 20}
    sent(uploads, "a", b"y" * 100)
    with store.reading() as session:
        assert used(session, "ann")["disk_bytes"] == 100
    assert len([path for path in uploads.folder.rglob("*") if path.is_file()]) == 1


# What is on the Hub.


@pytest.mark.parametrize(("file", "content"), [("few.jsonl", ROWS), ("large/all.parquet", LARGE)])
def test_a_data_set_is_read_at_the_commit_that_it_was_at(store: JobStore, hub: Hub, file: str, content: bytes) -> None:
    accepted = JobHub(store, "ann")
    shelves(store, hub=accepted).look(f"datasets/org/pets/{file}")
    assert [each["repo"] for each in accepted.resolved] == ["datasets/org/pets"]
    hub.put("datasets/org/pets", {file: content[:-1] + b" \n"})
    for _ in range(2):
        working = JobHub(store, "ann", HubOptions(), accepted.resolved)
        path, roots = shelves(store, hub=working).open(f"datasets/org/pets/{file}")
        assert sha256_of(path, roots) == hashlib.sha256(content).hexdigest()
    renewed = JobHub(store, "ann")
    path, roots = shelves(store, hub=renewed).open(f"datasets/org/pets/{file}@main")
    assert sha256_of(path, roots) == hashlib.sha256(content[:-1] + b" \n").hexdigest()


Change = Callable[[Hub], object]


@pytest.mark.parametrize(
    ("file", "change", "error", "said"),
    [
        ("datasets/org/pets/none.jsonl", None, HubNotFound, "has no folder or file none.jsonl"),
        ("datasets/org/none/few.jsonl", None, HubNotFound, "org/none"),
        ("datasets/org/pets@v9", None, HubNotFound, "v9"),
        ("datasets/org/pets", None, HubNotFound, "name a file in it, such as few.jsonl"),
        ("org/pets/few.jsonl", None, CheckpointNotFound, "in none of this service's model folders"),
        ("datasets/org", None, CheckpointNotFound, "in none of this service's model folders"),
        ("datasets/../../few.jsonl", None, PathNotAllowed, "few.jsonl"),
        (
            "datasets/org/pets/few.jsonl",
            lambda hub: hub.put("datasets/org/pets", {}, gated="auto"),
            HubGated,
            "org/pets",
        ),
        (
            "datasets/org/pets/huge.parquet",
            lambda hub: hub.put("datasets/org/pets", {"huge.parquet": LARGE * 2}),
            CheckpointError,
            "has at most 4,000",
        ),
    ],
)
def test_what_cannot_be_had_is_told(
    store: JobStore, hub: Hub, file: str, change: Change | None, error: type[Exception], said: str
) -> None:
    if change is not None:
        change(hub)
    with pytest.raises(error, match=said):
        shelves(store).look(file)


def test_a_hub_that_sends_other_bytes_is_found_out(store: JobStore, hub: Hub) -> None:
    entry = hub.repos["datasets/org/pets"].files()["large/all.parquet"]
    hub.content(entry.sha256).unlink()
    hub.content(entry.sha256).write_bytes(LARGE[:-2] + b"?\n")
    with pytest.raises(HubLied, match="other bytes"):
        shelves(store).open("datasets/org/pets/large/all.parquet")
