"""What a user does with a Hub, done by the real client: `python -m tests.hub.round FOLDER ENDPOINT TOKEN STRANGER`.

A program of its own, as huggingface_hub reads its settings when it is imported, and so that another version of it than
the one that is installed can be tried: by `PYTHONPATH`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LARGE = 300_000


def expect(
    error: type[Exception], what: object, *arguments: object, status: int | None = None, **named: object
) -> None:
    assert callable(what)
    try:
        what(*arguments, **named)
    except error as found:
        assert status is None or getattr(found, "response").status_code == status, found  # noqa: B009
        return
    raise AssertionError(f"no {error.__name__} from {what}")


def extra() -> list[CommitOperationAdd]:
    return [CommitOperationAdd("b.txt", b"b")]


def whole_round(folder: Path, endpoint: str, token: str, stranger: str) -> None:
    api = HfApi(endpoint=endpoint, token=token)
    assert api.whoami()["name"] == "alice"
    repo = api.create_repo("alice/merged", private=True).repo_id
    expect(HfHubHTTPError, api.create_repo, "alice/merged", status=409)
    api.create_repo("alice/merged", exist_ok=True)
    expect(HfHubHTTPError, api.create_repo, "bob/merged", status=403)

    # Files before their commit, one after the other, and one commit of all.
    sent = folder / "sent"
    (sent / "sub").mkdir(parents=True)
    operations = []
    for number in (1, 2):
        shard = sent / f"model-{number}.safetensors"
        shard.write_bytes(os.urandom(LARGE))
        operation = CommitOperationAdd(shard.name, str(shard))
        api.preupload_lfs_files(repo, [operation])
        operations.append(operation)
    for name, data in (
        ("config.json", b"{}"),
        ("sub/a b.txt", b"text"),
        ("README.md", b"---\ntags: [merge]\n---\n# It\n"),
    ):
        (sent / name).write_bytes(data)
        operations.append(CommitOperationAdd(name, str(sent / name)))
    start = api.model_info(repo).sha
    made = api.create_commit(repo, operations, commit_message="All", commit_description="more", parent_commit=start)
    assert made.oid != start
    expect(HfHubHTTPError, api.create_commit, repo, extra(), commit_message="Late", parent_commit=start, status=412)
    history = api.list_repo_commits(repo)
    assert [each.title for each in history] == ["All", "initial commit"] and history[0].message == "more"

    # The same files again make no commit.
    again = api.create_commit(repo, [CommitOperationAdd("config.json", b"{}")], commit_message="Again")
    assert again.oid == made.oid

    # Listings.
    expected = {path.relative_to(sent).as_posix(): path for path in sent.rglob("*") if path.is_file()}
    tree = {each.path: each for each in api.list_repo_tree(repo, recursive=True, expand=True) if hasattr(each, "size")}
    for path, file in expected.items():
        assert tree[path].size == file.stat().st_size
        if file.suffix == ".safetensors":
            assert tree[path].lfs.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert {each.path for each in api.list_repo_tree(repo)} == {*tree} - {"sub/a b.txt"} | {"sub"}
    assert [each.path for each in api.get_paths_info(repo, ["config.json", "none"])] == ["config.json"]
    info = api.model_info(repo, files_metadata=True)
    assert info.private and not info.gated and info.tags == ["merge"] and info.card_data is not None
    assert {each.rfilename: each.size for each in info.siblings or ()} == {
        path: each.size for path, each in tree.items()
    }

    # Branches, tags and pull requests.
    api.create_branch(repo, branch="x/y")
    api.create_tag(repo, tag="v1")
    other = api.create_commit(repo, extra(), commit_message="There", revision="x/y")
    api.create_commit(repo, [CommitOperationDelete("b.txt")], commit_message="Gone", revision="x/y")
    asked = api.create_commit(repo, extra(), commit_message="Please", create_pr=True)
    assert asked.pr_revision == "refs/pr/1" and asked.pr_url
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert {each.name: each.target_commit for each in refs.branches}["main"] == made.oid
    assert refs.tags[0].target_commit == made.oid and refs.pull_requests and refs.pull_requests[0].ref == "refs/pr/1"
    assert not api.file_exists(repo, "b.txt", revision="x/y") and api.file_exists(repo, "b.txt", revision=other.oid)

    # Downloads: all, one, a range.
    found = Path(snapshot_download(repo, endpoint=endpoint, token=token, cache_dir=folder / "cache"))
    assert found.name == made.oid
    assert {path: (found / path).read_bytes() for path in expected} == {k: v.read_bytes() for k, v in expected.items()}
    one = hf_hub_download(
        repo, "b.txt", revision="refs/pr/1", endpoint=endpoint, token=token, cache_dir=str(folder / "other")
    )
    assert Path(one).read_bytes() == b"b"
    url = hf_hub_url(repo, "model-1.safetensors", revision="v1", endpoint=endpoint)
    metadata = get_hf_file_metadata(url, token=token)
    assert metadata.size == LARGE and metadata.commit_hash == made.oid and metadata.location != url
    assert metadata.etag == hashlib.sha256(expected["model-1.safetensors"].read_bytes()).hexdigest()
    with HfFileSystem(endpoint=endpoint, token=token).open(
        f"{repo}/model-1.safetensors", "rb", block_size=1000
    ) as file:
        file.seek(1234)
        assert file.read(99) == expected["model-1.safetensors"].read_bytes()[1234:1333]

    # What goes wrong, as the types that say it.
    nobody, somebody = HfApi(endpoint=endpoint, token=False), HfApi(endpoint=endpoint, token=stranger)
    for whose in (nobody, somebody):
        expect(RepositoryNotFoundError, whose.model_info, repo)
        expect(RepositoryNotFoundError, whose.model_info, "alice/none")
    expect(RevisionNotFoundError, api.model_info, repo, revision="none")
    expect(EntryNotFoundError, api.hf_hub_download, repo, "none.json", cache_dir=folder / "none")
    assert somebody.model_info("org/gated").gated == "manual"
    expect(GatedRepoError, somebody.auth_check, "org/gated")
    expect(GatedRepoError, somebody.hf_hub_download, "org/gated", "config.json", cache_dir=folder / "none")
    expect(GatedRepoError, nobody.hf_hub_download, "org/gated", "config.json", cache_dir=folder / "none")
    expect(HfHubHTTPError, somebody.create_commit, "alice/open", extra(), commit_message="Mine", status=403)
    expect(HfHubHTTPError, HfApi(endpoint=endpoint, token="hf_unknown").whoami, status=401)
    api.delete_repo("alice/open")
    expect(RepositoryNotFoundError, api.model_info, "alice/open")


if __name__ == "__main__":
    import huggingface_hub

    whole_round(Path(sys.argv[1]), *sys.argv[2:])
    print(huggingface_hub.__version__)
