"""What is put into an artifact store is there whole, or not at all once the janitor has been there."""

from __future__ import annotations

import hashlib
import itertools
import random
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from huggingface_hub import snapshot_download

import workers.s3
from app.main import create_app
from merge_core.errors import Canceled, StorageFailed
from merge_core.files import WrittenFile
from tests.services import Bucket, Fault, running_s3, served
from workers.artifacts import ArtifactStore, FolderStore, open_artifacts
from workers.jobs import JobStore
from workers.settings import Settings

JOB = "mrg_1"


pytestmark = pytest.mark.xdist_group("s3")


@pytest.fixture(scope="module")
def s3() -> Iterator[Bucket]:
    with running_s3() as bucket:
        yield bucket


@pytest.fixture
def bucket(s3: Bucket) -> Bucket:
    """An empty bucket without faults."""
    s3.faults.clear()
    artifacts = store_in(s3)
    for job_id in list(artifacts.list()):
        artifacts.delete(job_id)
    s3.requests.clear()
    return s3


def store_in(bucket: Bucket, **changed: str) -> ArtifactStore:
    names = {name.removeprefix("WEIGHTSMITH_").lower(): value for name, value in bucket.settings.items()}
    return open_artifacts(Settings(artifact_store=names.pop("artifacts"), **(names | changed)))


@pytest.fixture(params=["folder", "s3"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "folder":
        return FolderStore(tmp_path / "shared" / "artifacts")
    return store_in(request.getfixturevalue("bucket"))


def made(folder: Path, **sizes: int) -> list[WrittenFile]:
    """A finished artifact's files: the lock is the first of them, so that its place shows who cared."""
    files = []
    for name, size in {"merge.lock.json": 100, "deep/model.safetensors": 3 * 2**20 + 7, **sizes}.items():
        content = random.Random(name).randbytes(size)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        files.append(WrittenFile(name, size, hashlib.sha256(content).hexdigest()))
    return files


def read_back(artifacts: ArtifactStore, files: list[WrittenFile]) -> None:
    assert artifacts.files(JOB) == {file.path: file.size for file in files}
    for file in files:
        whole = b"".join(artifacts.read(JOB, file.path, 0, file.size))
        assert hashlib.sha256(whole).hexdigest() == file.sha256


def test_what_was_put_is_read(artifacts: ArtifactStore, tmp_path: Path) -> None:
    files = made(tmp_path / "out")
    sent: list[int] = []
    assert list(artifacts.list()) == [] and artifacts.files(JOB) == {}
    artifacts.put_folder(JOB, tmp_path / "out", files, sent=sent.append)
    assert sum(sent) == sum(file.size for file in files)
    assert list(artifacts.list()) == [JOB]
    read_back(artifacts, files)
    content = (tmp_path / "out" / "deep/model.safetensors").read_bytes()
    for start, end in [(0, 1), (2**20 - 1, 2**20 + 1), (5, len(content)), (7, 7), (len(content) - 1, len(content))]:
        assert b"".join(artifacts.read(JOB, "deep/model.safetensors", start, end)) == content[start:end]


def test_what_is_not_there_is_said_before_a_byte_is_sent(artifacts: ArtifactStore) -> None:
    with pytest.raises(FileNotFoundError):
        artifacts.read(JOB, "nothing", 0, 1)


def test_deleted_is_gone_and_may_be_deleted_again(artifacts: ArtifactStore, tmp_path: Path) -> None:
    files = made(tmp_path / "out")
    artifacts.put_folder(JOB, tmp_path / "out", files)
    artifacts.put_folder(f"{JOB}0", tmp_path / "out", files)
    for _ in range(2):
        artifacts.delete(JOB)
        assert artifacts.files(JOB) == {} and list(artifacts.list()) == [f"{JOB}0"]


def test_a_canceled_put_can_go_on_or_be_removed(artifacts: ArtifactStore, tmp_path: Path) -> None:
    files = made(tmp_path / "out", second=2**20)
    done = 0

    def stop() -> bool:
        return done > 4 * 2**20

    def sent(size: int) -> None:
        nonlocal done
        done += size

    with pytest.raises(Canceled):
        artifacts.put_folder(JOB, tmp_path / "out", files, sent=sent, stop=stop)
    assert list(artifacts.list()) == [JOB], "what nobody finished can be found"
    assert "merge.lock.json" not in artifacts.files(JOB), "the lock comes last"
    (tmp_path / "out" / "deep/model.safetensors").unlink()
    artifacts.put_folder(JOB, tmp_path / "out", files)
    read_back(artifacts, files)
    artifacts.delete(JOB)
    assert list(artifacts.list()) == []


def test_putting_again_changes_nothing(artifacts: ArtifactStore, tmp_path: Path) -> None:
    files = made(tmp_path / "out")
    for _ in range(2):
        artifacts.put_folder(JOB, tmp_path / "out", files)
    read_back(artifacts, files)


def test_what_lies_where_it_is_kept_is_not_moved(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    artifacts = open_artifacts(settings)
    files = made(settings.artifacts / JOB)
    assert artifacts.holds(settings.artifacts / JOB)
    artifacts.put_folder(JOB, settings.artifacts / JOB, files)
    read_back(artifacts, files)
    (settings.artifacts / f".{JOB}.1.partial").mkdir()
    assert list(artifacts.list()) == [JOB], "work that grows is not stored yet"


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    artifacts = FolderStore(tmp_path / "file" / "artifacts")
    with pytest.raises(StorageFailed, match="Not a directory"):
        artifacts.put_folder(JOB, tmp_path / "out", made(tmp_path / "out"))
    with pytest.raises(StorageFailed, match="Not a directory"):
        list(artifacts.list())


def test_large_files_are_sent_in_parts_and_read_in_ranges(bucket: Bucket, tmp_path: Path) -> None:
    artifacts = store_in(bucket)
    files = made(tmp_path / "out", large=24 * 2**20 + 1)
    artifacts.put_folder(JOB, tmp_path / "out", files)
    parts = [line for line in bucket.requests if "partNumber" in line]
    assert len(parts) == 4 and bucket.uploads() == 0
    stored = [line for line in bucket.requests if line.startswith("PUT") or "uploadId" in line]
    assert "merge.lock.json" in stored[-1], "the lock comes last"
    read_back(artifacts, files)
    content = (tmp_path / "out" / "large").read_bytes()
    for start, end in [(8 * 2**20 - 1, 8 * 2**20 + 1), (24 * 2**20, 24 * 2**20 + 1)]:
        assert b"".join(artifacts.read(JOB, "large", start, end)) == content[start:end]


def test_what_a_killed_upload_sent_is_not_sent_again(bucket: Bucket, tmp_path: Path) -> None:
    artifacts = store_in(bucket)
    files = made(tmp_path / "out", second=100, third=200)
    bucket.faults.append(
        lambda method, path: Fault(403, "AccessDenied") if "third" in path and method == "PUT" else None
    )
    with pytest.raises(StorageFailed):
        artifacts.put_folder(JOB, tmp_path / "out", files)
    bucket.faults.clear()
    there = artifacts.files(JOB)
    assert "third" not in there and "merge.lock.json" not in there
    bucket.requests.clear()
    artifacts.put_folder(JOB, tmp_path / "out", files)
    sent = {line.rpartition("/")[2] for line in bucket.requests if line.startswith("PUT")}
    assert sent == {file.path.rpartition("/")[2] for file in files} - {path.rpartition("/")[2] for path in there}
    read_back(artifacts, files)


def test_other_bytes_of_the_same_size_are_replaced(bucket: Bucket, tmp_path: Path) -> None:
    artifacts = store_in(bucket)
    files = made(tmp_path / "old")
    artifacts.put_folder(JOB, tmp_path / "old", files)
    for file in files:
        path = tmp_path / "old" / file.path
        path.write_bytes(bytes(reversed(path.read_bytes())))
    changed = [
        WrittenFile(file.path, file.size, hashlib.sha256((tmp_path / "old" / file.path).read_bytes()).hexdigest())
        for file in files
    ]
    artifacts.put_folder(JOB, tmp_path / "old", changed)
    read_back(artifacts, changed)


def test_a_store_that_fails_for_a_moment_is_asked_again(bucket: Bucket, tmp_path: Path) -> None:
    """Every third request is answered 503, whatever it asks for."""
    artifacts = store_in(bucket)
    count = itertools.count()
    bucket.faults.append(lambda method, path: Fault(503, "SlowDown") if next(count) % 3 == 1 else None)
    files = made(tmp_path / "out", large=24 * 2**20 + 1)
    artifacts.put_folder(JOB, tmp_path / "out", files)
    read_back(artifacts, files)
    artifacts.delete(JOB)
    assert list(artifacts.list()) == []
    assert bucket.uploads() == 0


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "InvalidAccessKeyId", "the store refuses the key, InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch", "the store refuses the key, SignatureDoesNotMatch"),
        (404, "NoSuchBucket", "there is no bucket bucket"),
        (400, "Odd", "the store answered 400 Odd"),
    ],
)
def test_what_the_store_refuses_is_said_without_its_keys(
    bucket: Bucket, tmp_path: Path, status: int, code: str, said: str
) -> None:
    artifacts = store_in(bucket)
    bucket.faults.append(lambda method, path: Fault(status, code))
    attempts: list[Callable[[], object]] = [
        lambda: artifacts.put_folder(JOB, tmp_path / "out", made(tmp_path / "out")),
        lambda: artifacts.read(JOB, "x", 0, 1),
        lambda: artifacts.files(JOB),
        lambda: artifacts.delete(JOB),
        lambda: list(artifacts.list()),
    ]
    for attempt in attempts:
        with pytest.raises(StorageFailed, match=said) as raised:
            attempt()
        told = "".join(traceback.format_exception(raised.value))
        assert "not-to-be-printed" not in told and "AKIDEXAMPLE" not in told


def test_a_store_that_is_not_there_or_has_no_key_is_said(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.s3, "ANSWER_SECONDS", 0.1)
    with pytest.raises(StorageFailed, match=r"s3://bucket/some/prefix cannot be used: .*error sending request"):
        store_in(bucket, s3_endpoint="http://127.0.0.1:1").files(JOB)
    with pytest.raises(StorageFailed, match="no key was given"):
        store_in(bucket, s3_secret_access_key="")
    with pytest.raises(ValueError, match="neither a folder nor s3://"):
        Settings(artifact_store="gs://bucket")


def test_cancel_does_not_wait_for_a_store_that_hangs(bucket: Bucket, tmp_path: Path) -> None:
    artifacts = store_in(bucket)
    bucket.faults.append(lambda method, path: Fault(seconds=600) if "partNumber=2" in path else None)
    files = made(tmp_path / "out", large=24 * 2**20)
    canceled_at: list[float] = []

    def stop() -> bool:
        if any("partNumber=2" in line for line in bucket.requests):
            canceled_at.append(time.monotonic())
        return bool(canceled_at)

    with pytest.raises(Canceled):
        artifacts.put_folder(JOB, tmp_path / "out", files, stop=stop)
    assert time.monotonic() - canceled_at[0] < 2.0
    bucket.faults.clear()
    assert "merge.lock.json" not in artifacts.files(JOB)


def test_a_link_gives_the_file_to_whoever_has_it(bucket: Bucket, tmp_path: Path) -> None:
    artifacts = store_in(bucket)
    files = made(tmp_path / "out")
    artifacts.put_folder(JOB, tmp_path / "out", files)
    link = artifacts.link(JOB, "merge.lock.json", 60)
    assert link is not None and "not-to-be-printed" not in link
    answer = httpx2.get(link, headers={"Range": "bytes=5-9"}, trust_env=False, timeout=60)
    assert answer.status_code == 206 and answer.content == (tmp_path / "out" / "merge.lock.json").read_bytes()[5:10]


@pytest.mark.parametrize("redirects", [False, True])
def test_the_hub_s_client_reads_what_is_in_the_store(bucket: Bucket, tmp_path: Path, redirects: bool) -> None:
    names = {name.removeprefix("WEIGHTSMITH_").lower(): value for name, value in bucket.settings.items()}
    place = names.pop("artifacts")
    settings = Settings(data=tmp_path / "data", artifact_store=place, s3_redirect=redirects, auth="none", **names)
    store = JobStore(settings)
    job = store.add({}, {})
    lease = store.claim(job.id, "w/1")
    assert lease is not None
    files = made(tmp_path / "out")
    open_artifacts(settings).put_folder(job.id, tmp_path / "out", files)
    store.succeed(lease, files=[vars(file) for file in files], warnings=[], progress={})
    store.close()
    repo, name = f"merges/{job.id}", "deep/model.safetensors"
    with served(create_app(settings)) as url:
        endpoint = f"{url}/hub"
        folder = Path(snapshot_download(repo, endpoint=endpoint, cache_dir=tmp_path / "cache", token=False))
        assert all((folder / file.path).read_bytes() == (tmp_path / "out" / file.path).read_bytes() for file in files)
        bucket.requests.clear()
        part = httpx2.get(
            f"{endpoint}/{repo}/resolve/main/{name}",
            headers={"Range": "bytes=5-9"},
            follow_redirects=True,
            trust_env=False,
            timeout=60,
        )
        assert part.status_code == 206 and part.content == (tmp_path / "out" / name).read_bytes()[5:10]
        assert len(bucket.requests) == 1, "a range is one request to the store"


@pytest.mark.parametrize("redirects", [False, True])
def test_files_are_served_from_the_store(bucket: Bucket, tmp_path: Path, redirects: bool) -> None:
    names = {name.removeprefix("WEIGHTSMITH_").lower(): value for name, value in bucket.settings.items()}
    place = names.pop("artifacts")
    settings = Settings(data=tmp_path / "data", artifact_store=place, s3_redirect=redirects, **names)
    store = JobStore(settings)
    job = store.add({}, {})
    lease = store.claim(job.id, "w/1")
    assert lease is not None
    files = made(tmp_path / "out", **{"an ödd name.json": 10})
    open_artifacts(settings).put_folder(job.id, tmp_path / "out", files)
    store.succeed(lease, files=[vars(file) for file in files], warnings=[], progress={})
    store.close()

    with TestClient(create_app(settings)) as client:
        for file in files:
            url, content = f"/v1/merges/{job.id}/files/{file.path}", (tmp_path / "out" / file.path).read_bytes()
            head = client.head(url)
            assert head.status_code == 200 and head.headers["content-length"] == str(file.size)
            assert head.headers["etag"] == f'"{file.sha256}"'
            assert client.get(url, headers={"If-None-Match": head.headers["etag"]}).status_code == 304
            answer = client.get(url, headers={"Range": "bytes=3-7"}, follow_redirects=False)
            if redirects:
                assert answer.status_code == 307 and answer.headers["cache-control"] == "no-store"
                headers = {"Range": "bytes=3-7"}
                answer = httpx2.get(answer.headers["location"], headers=headers, trust_env=False, timeout=60)
            assert answer.status_code == 206 and answer.content == content[3:8]
        open_artifacts(settings).delete(job.id)
        if not redirects:
            gone = client.get(url)
            assert gone.status_code == 410 and gone.json()["code"] == "gone"
