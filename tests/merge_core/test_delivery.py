"""Files that are delivered as soon as they are complete: each once, in order, and never more than two on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_core.artifact import LOCK_NAME, Artifact
from merge_core.errors import Canceled, RecipeError, StorageFailed
from merge_core.files import WrittenFile
from merge_core.merge import merge, plan_only
from merge_core.recipe import Recipe
from tests.conftest import METHOD_RECIPES, method_recipe

SHARD = 6000
HUB = {"hub": {"repo": "alice/merged"}}


class _Killed(BaseException):
    """What the merge does not handle: it ends there and then."""


class Inbox:
    """Keeps what is delivered, and looks at what lies beside it; `before` may do anything first."""

    def __init__(self, *, removes: bool, before: Callable[[WrittenFile], None] = lambda file: None) -> None:
        self.removes, self._before = removes, before
        self.files: list[WrittenFile] = []
        self.most_on_disk = 0
        self.gave_up = threading.Event()

    def deliver(self, path: Path, file: WrittenFile) -> None:
        self.most_on_disk = max(self.most_on_disk, len(list(path.parent.glob("*.safetensors"))))
        self._before(file)
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256)
        self.files.append(file)

    def give_up(self) -> None:
        self.gave_up.set()


def run(models: Path, out: Path, inbox: Inbox | None, title: str = "linear", **options: object) -> Artifact:
    keep = {} if inbox is None else {"keep": not inbox.removes, **HUB}
    recipe = Recipe.from_data(method_recipe(title, outputs={"max_shard_size": SHARD, **keep}))
    return merge(recipe, out, roots=[models], delivery=inbox, **options)  # type: ignore[arg-type]


def shards(artifact: Artifact) -> list[WrittenFile]:
    return [file for file in artifact.files if file.path.endswith(".safetensors")]


def digests(artifact: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for file in artifact.files}


@pytest.mark.parametrize("title", ["linear", "ties-model", "dare_ties"])
@pytest.mark.parametrize("removes", [False, True])
def test_each_file_is_delivered_once_and_is_the_same(models: Path, tmp_path: Path, removes: bool, title: str) -> None:
    assert title in METHOD_RECIPES
    plain = run(models, tmp_path / "plain", None, title)
    inbox = Inbox(removes=removes)

    sent = run(models, tmp_path / "sent", inbox, title)

    assert inbox.files == shards(plain) and len(inbox.files) > 4
    assert digests(sent) == digests(plain)  # the lock too: where a merge went is none of its bytes
    there = {path.name for path in sent.folder.iterdir()}
    gone = {file.path for file in inbox.files} if removes else set()
    assert there == {file.path for file in plain.files} - gone
    assert set(json.loads((sent.folder / LOCK_NAME).read_text())["tensors"]) == set(plain.tensors)


def test_at_most_two_files_are_on_the_disk(models: Path, tmp_path: Path) -> None:
    """However slowly they leave: looked at all the time, from outside."""
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # the folder appears, and takes another name at the end
                seen.append(len(list((tmp_path / ".out.partial").glob("*.safetensors"))))

    inbox = Inbox(removes=True, before=lambda file: time.sleep(0.05))
    watcher = threading.Thread(target=watch)
    watcher.start()
    run(models, tmp_path / "out", inbox, threads=2)
    over.set()
    watcher.join()
    assert inbox.most_on_disk == 2 == max(seen)


@pytest.mark.parametrize("removes", [False, True])
@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_after_a_kill_nothing_is_delivered_again(models: Path, tmp_path: Path, removes: bool, at: int) -> None:
    plain = run(models, tmp_path / "plain", None)

    def die(file: WrittenFile) -> None:
        if len(first.files) == at:
            raise _Killed

    first, second = Inbox(removes=removes, before=die), Inbox(removes=removes)
    with pytest.raises(_Killed):
        run(models, tmp_path / "out", first)

    again = run(models, tmp_path / "out", second)

    assert [*first.files, *second.files] == shards(plain)
    assert digests(again) == digests(plain)
    written = [file for file in shards(plain) if file not in first.files]
    if removes:  # what was delivered is not merged again
        assert again.resumed_tensors >= len(plain.tensors) - sum(
            tensors_in(tmp_path / "plain" / f.path) for f in written
        )


WRONG = [
    ({"keep": False}, "leave keep away"),
    ({"keep": False, "reversible": True, "hub": {"repo": "a/b"}}, "leave keep away"),
    *(
        ({"hub": {"repo": repo}}, "owner/name")
        for repo in ("name", "a/b/c", "../b", "a/..", "-a/b", "a/b.git", "a/b--c", "a/")
    ),
    ({"hub": {"repo": "a/" + "b" * 100}}, "96 characters"),
    *(
        ({"hub": {"repo": "a/b", "revision": name}}, "names no branch")
        for name in ("", "refs/pr/1", "a b", "x..y", "-x", "x.lock", "0" * 40, "a//b")
    ),
    ({"hub": {"repo": "a/b", "commit_message": " "}}, "has words"),
    ({"hub": {"repo": "a/b", "publick": True}}, "publick"),
    ({"hub": {"private": True}}, "repo"),
]


@pytest.mark.parametrize(("outputs", "told"), WRONG, ids=[str(outputs)[:60] for outputs, _ in WRONG])
def test_where_to_is_read_strictly(outputs: dict[str, object], told: str) -> None:
    recipe = (
        method_recipe("linear") | {"patches": [{"patch": "p"}]} if "reversible" in outputs else method_recipe("linear")
    )
    with pytest.raises(RecipeError) as raised:
        Recipe.from_data({**recipe, "outputs": outputs})
    assert told in str(raised.value)
    assert all((problem.pointer or "").startswith("#/outputs") for problem in raised.value.problems)


def tensors_in(path: Path) -> int:
    data = path.read_bytes()
    return len(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).keys() - {"__metadata__"})


def test_killed_between_delivery_and_removal(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal has the file, and the disk too: it goes, and is not sent again."""
    plain, first, second = run(models, tmp_path / "plain", None), Inbox(removes=True), Inbox(removes=True)

    def die(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".safetensors":
            raise _Killed

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(Path, "unlink", die)
        run(models, tmp_path / "out", first)
    assert len(first.files) == 1 and (tmp_path / ".out.partial" / first.files[0].path).exists()

    assert digests(run(models, tmp_path / "out", second)) == digests(plain)
    assert [*first.files, *second.files] == shards(plain)


def test_what_the_journal_lost_is_merged_again_and_not_sent(models: Path, tmp_path: Path) -> None:
    plain, first, second = run(models, tmp_path / "plain", None), Inbox(removes=True), Inbox(removes=True)

    def die(file: WrittenFile) -> None:
        if len(first.files) == 2:
            raise _Killed

    first._before = die
    with pytest.raises(_Killed):
        run(models, tmp_path / "out", first)
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    lines = journal.read_text().split("\n")
    torn = next(i for i, line in enumerate(lines) if '"tensor"' in line)
    journal.write_text("\n".join([*lines[:torn], *lines[torn + 1 :]]))

    assert digests(run(models, tmp_path / "out", second)) == digests(plain)
    assert [*first.files, *second.files] == shards(plain)


@pytest.mark.parametrize("removes", [False, True])
def test_a_delivery_that_fails_ends_the_merge(models: Path, tmp_path: Path, removes: bool) -> None:
    def refuse(file: WrittenFile) -> None:
        raise StorageFailed("no room there")

    with pytest.raises(StorageFailed, match="no room there"):
        run(models, tmp_path / "out", Inbox(removes=removes, before=refuse))
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_delivery_that_lasts_does_not_keep_a_merge_from_being_canceled(models: Path, tmp_path: Path) -> None:
    asked = threading.Event()

    def last(file: WrittenFile) -> None:
        asked.set()
        assert inbox.gave_up.wait(30)
        raise Canceled("given up")

    inbox = Inbox(removes=True, before=last)
    with pytest.raises(Canceled):
        run(models, tmp_path / "out", inbox, stop=asked.is_set)


def test_the_plan_counts_two_files(models: Path, tmp_path: Path) -> None:
    whole = method_recipe("linear", outputs={"max_shard_size": SHARD})
    sent = method_recipe("linear", outputs={"max_shard_size": SHARD, "keep": False, **HUB})
    plain, going = (plan_only(Recipe.from_data(recipe), roots=[models]) for recipe in (whole, sent))
    sizes = [shard.size for shard in plain.shards]
    assert plain.disk_bytes == plain.output_bytes == going.output_bytes == sum(sizes)
    assert going.disk_bytes == max(a + b for a, b in itertools.pairwise(sizes)) < sum(sizes) / 2
    assert (plain.digest, plain.to_dict()["bytes_on_disk"]) == (going.digest, sum(sizes))
