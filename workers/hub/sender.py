"""The program that sends a job's files to a Hub: `python -m workers.hub.sender`, started by `workers.hub.upload`.

A process of its own, so that whatever the Hub, its client or Xet do, the merge goes on, its memory stays its own, and
a cancel ends it at once. It reads a line of JSON for each thing to do from its standard input, the first of which says
who asks and where to, and answers each by lines on its standard output. It ends with its input.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pydantic import SecretStr

from merge_core.errors import WeightsmithError
from workers.hub.client import HubClient, guarded_client
from workers.hub.errors import HubConflict, HubForbidden, HubLied
from workers.hub.files import is_large
from workers.outbound import ForbiddenAddress
from workers.problems import problem
from workers.redaction import redact

TRAILER = "Merge-Job"
ANSWER_SECONDS = 300.0
"""How long a Hub may take to answer, which it does after it has read a whole file."""
_TOLD_SECONDS = 0.2
_LATEST_REQUESTS = 20
"""Pull requests among which our own is looked for."""
_TRIES = 5
_WEIGHTS = re.compile(r"(?:model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")
"""What a loader might take for a model's weights: of another one, it must not lie beside ours."""


class Sender:
    """Does one thing after the other for one job."""

    def __init__(self, asked: Mapping[str, Any], tell: Callable[[Mapping[str, Any]], None]) -> None:
        self.repo, self.private = asked["repo"], asked["private"]
        self.revision, self.create_pr = asked["revision"], asked["create_pr"]
        self.job_id = asked["job_id"]
        token = SecretStr(asked["token"])
        self.client = HubClient(asked["endpoint"], Path(asked["folder"]), token, tuple(asked["allow"]))
        self._tell, self._sent, self._told_at = tell, 0, 0.0
        self._wants_xet = asked["xet"] == "auto"
        if not self._wants_xet:
            os.environ["HF_HUB_DISABLE_XET"] = "1"  # which huggingface_hub reads when it is imported
        self._is_ready = False

    def send(self, path: str, name: str, size: int, sha256: str) -> dict[str, Any]:
        """Send a large file, which a commit will name later; one that is there already is not sent."""
        with self._told_of():
            self._prepare()
            self._sent = 0
            self.client.api.preupload_lfs_files(
                self.repo,
                [_large_file(name, path, size, sha256)],
                revision=self.revision,
                create_pr=self.create_pr,
            )
        return {}

    def commit(
        self, folder: str, files: Sequence[Mapping[str, Any]], message: str, replaces_weights: bool
    ) -> dict[str, Any]:
        """Commit these files of a folder, those that are not in it having been sent; but only if this job's commit is
        not there yet. What it came to, when the Hub's own listing agrees.
        """
        with self._told_of():
            self._prepare()
            self._sent = 0
            for tries in range(_TRIES, 0, -1):
                head = self.client.api.model_info(self.repo, revision=self.revision).sha
                assert head is not None
                if (found := self._own_commit()) is None:
                    try:
                        found = self._made(head, Path(folder), files, message, replaces_weights)
                    except Exception as error:
                        # Somebody else committed meanwhile, which may have been an attempt at this job.
                        if tries == 1 or _status(error) != 412:
                            raise
                        continue
                self._check(found["commit"], Path(folder), files)
                return found
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def _told_of(self) -> Iterator[None]:
        """Failures as ours, those of writing above all."""
        with self.client.told(self.repo):
            try:
                yield
            except Exception as error:
                # What went wrong with one file huggingface_hub wraps; Xet's errors come as they are.
                cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
                told = _server_message(cause)
                match _status(cause):
                    case 403:
                        detail = f"{self.client.endpoint} does not let this token write to it{told}"
                        raise HubForbidden(self.repo, detail) from None
                    case 409 | 412:
                        raise HubConflict(self.repo, f"was committed to by others again and again{told}") from None
                    case 400 | 413 | 422:
                        raise HubLied(self.repo, f"was not taken by {self.client.endpoint}{told}") from None
                if type(cause) is RuntimeError:
                    raise self.client.unavailable(self.repo, redact(str(cause))[:200]) from None
                raise cause from None

    # The repo.

    def _prepare(self) -> None:
        """Choose how files are sent, and make the repo and its branch, where they are not there."""
        if self._is_ready:
            return
        api = self.client.api
        import huggingface_hub

        huggingface_hub.set_client_factory(self._counting_client)
        if not api.repo_exists(self.repo):
            api.create_repo(self.repo, private=self.private, exist_ok=True)
        if self._wants_xet and not self._has_xet():
            from huggingface_hub import constants

            constants.HF_HUB_DISABLE_XET = True
        if self.revision != "main":
            api.create_branch(self.repo, branch=self.revision, exist_ok=True)
        self._is_ready = True

    def _has_xet(self) -> bool:
        """Whether the Hub takes files by Xet, and at an address that may be called: its client does not fall back."""
        import httpx2

        where = f"{self.client.endpoint}/api/models/{self.repo}/xet-write-token/main"
        url = httpx2.URL(where)
        try:
            answer = self.client.http.get(url, headers=self.client.authorization(url))
            place = str(answer.json()["casUrl"]) if answer.status_code == 200 else ""
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            return False
        if place.startswith("local://"):
            # A folder: such a Hub is a program on this machine.
            return self.client.host in ("127.0.0.1", "localhost", "::1")
        try:
            self.client.guard.check(place)
        except ForbiddenAddress:
            return False
        return True

    def _own_commit(self) -> dict[str, Any] | None:
        """The commit that an earlier attempt at this job made."""
        if not self.create_pr:
            commit = self._find(self.revision)
            return None if commit is None else self._told(commit, None)
        refs = self.client.api.list_repo_refs(self.repo, include_pull_requests=True)
        numbers = [int(ref.ref.rpartition("/")[2]) for ref in refs.pull_requests or ()]
        for number in sorted(numbers, reverse=True)[:_LATEST_REQUESTS]:
            if (commit := self._find(f"refs/pr/{number}")) is not None:
                return self._told(commit, f"{self.client.endpoint}/{self.repo}/discussions/{number}")
        return None

    def _find(self, revision: str) -> str | None:
        ours = f"{TRAILER}: {self.job_id}"
        commits = self.client.api.list_repo_commits(self.repo, revision=revision)
        return next((each.commit_id for each in commits if ours in each.message.splitlines()), None)

    def _told(self, commit: str, request: str | None) -> dict[str, Any]:
        url = f"{self.client.endpoint}/{self.repo}/commit/{commit}"
        return {"repo": self.repo, "commit": commit, "url": url, "pr_url": request}

    # The commit.

    def _made(
        self, head: str, folder: Path, files: Sequence[Mapping[str, Any]], message: str, replaces_weights: bool
    ) -> dict[str, Any]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        there = self._listed(head)
        added: list[Any] = []
        for file in files:
            path = folder / file["path"]
            if path.exists() and not is_large(file["path"]):
                added.append(CommitOperationAdd(file["path"], str(path)))
            else:
                where = str(path) if path.exists() else None
                added.append(_large_file(file["path"], where, file["size"], file["sha256"]))
                same = there.get(file["path"])
                added[-1]._remote_oid = same.lfs.sha256 if same is not None and same.lfs is not None else None
        ours = {file["path"] for file in files}
        removed = [path for path in there if replaces_weights and _WEIGHTS.fullmatch(path) and path not in ours]
        title, _, rest = message.strip().partition("\n")
        made = self.client.api.create_commit(
            self.repo,
            [*added, *(CommitOperationDelete(path) for path in removed)],
            commit_message=title,
            commit_description=f"{rest.strip()}\n\n{TRAILER}: {self.job_id}".strip(),
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=head,
        )
        return self._told(made.oid, made.pr_url)

    def _check(self, commit: str, folder: Path, files: Sequence[Mapping[str, Any]]) -> None:
        """Raise `HubLied` unless the Hub says of every file in the commit what we know of it."""
        there = self._listed(commit)
        for file in files:
            found = there.get(file["path"])
            if found is None:
                is_right = False
            elif found.lfs is not None:
                is_right = (found.lfs.sha256, found.size) == (file["sha256"], file["size"])
            else:
                data = (folder / file["path"]).read_bytes()
                git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
                is_right = (found.blob_id, found.size) == (git, len(data))
            if not is_right:
                detail = f"lists {file['path']} in commit {commit[:12]} other than it was sent; look at it, and retry"
                raise HubLied(self.repo, detail)

    def _listed(self, commit: str) -> dict[str, Any]:
        """The files of a commit by path, as the Hub tells of them."""
        tree = self.client.api.list_repo_tree(self.repo, revision=commit, recursive=True)
        return {each.path: each for each in tree if hasattr(each, "size")}

    # Counting.

    def _counting_client(self) -> Any:
        """The client of huggingface_hub with an end to its patience, and with a count of what it sends."""
        client = guarded_client()
        client.timeout = ANSWER_SECONDS
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks.get("request", []), self._count]}
        return client

    def _count(self, request: Any) -> None:
        if request.method == "PUT":
            request.stream = _counted(request.stream, self._add)

    def _add(self, size: int) -> None:
        self._sent += size
        if (now := time.monotonic()) > self._told_at + _TOLD_SECONDS:
            self._told_at = now
            self._tell({"sent": self._sent})


def _counted(stream: Any, add: Callable[[int], None]) -> Any:
    """A request's body that tells how much of it was read."""
    kind = next(each for each in type(stream).__mro__ if each.__name__ == "SyncByteStream")

    class Counted(kind):  # type: ignore[misc, valid-type]  # of httpx or of httpx2, as huggingface_hub has it
        def __iter__(self) -> Iterator[bytes]:
            for chunk in stream:
                yield chunk
                add(len(chunk))

        def close(self) -> None:
            stream.close()

    return Counted()


def _large_file(name: str, path: str | None, size: int, sha256: str) -> Any:
    """A file that is stored by its sha256, which is known; without a path it was sent before."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(name, b"" if path is None else path)
    operation.upload_info = UploadInfo(size=size, sample=b"", sha256=bytes.fromhex(sha256))
    operation._upload_mode, operation._should_ignore = "lfs", False
    operation._is_uploaded = path is None
    return operation


def _server_message(error: BaseException) -> str:
    """What the Hub said to it, to be put behind a sentence."""
    said = getattr(error, "server_message", None)
    return f": {redact(str(said))[:300]}" if said else ""


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def main() -> None:
    """Do what is asked until nothing more will be."""
    lines: SimpleQueue[str] = SimpleQueue()
    telling = threading.Lock()
    # What others print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr

    def tell(what: Mapping[str, Any]) -> None:
        with telling:
            answers.write(json.dumps(what) + "\n")
            answers.flush()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # nobody is there to be answered

    threading.Thread(target=listen, daemon=True).start()
    sender = Sender(json.loads(lines.get()), tell)
    while True:
        asked = json.loads(lines.get())
        try:
            found = getattr(sender, asked.pop("do"))(**asked)
        except WeightsmithError as error:
            tell({"failed": problem(error)})
        except Exception:
            tell({"broken": traceback.format_exc(limit=-8)})
        else:
            tell({"done": found})


if __name__ == "__main__":
    main()
