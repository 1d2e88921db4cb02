"""The Hub for tests: its state, and the routes by which huggingface_hub asks for it (see the package)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import re
import shutil
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import uvicorn
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.hub.xet import XetStore
from tests.services import eventually

CHUNK = 2**16
LARGE = 10 * 2**20
"""Files of this size are LFS whatever their name."""
LFS_NAMES = (".safetensors", ".bin", ".pt", ".gguf", "tokenizer.json")
GIT_ATTRIBUTES = "".join(f"*{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES).encode()
NAMES = re.compile(r"[\w-][\w.-]{0,95}")


@dataclass(frozen=True)
class User:
    """Somebody with a token: `role` is `read` or `write`, as the token may; `orgs` are other names they write under."""

    name: str
    token: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass
class Entry:
    """A file of a commit. `told_…`: what the Hub says of it instead of the truth."""

    path: str
    size: int
    sha256: str
    git_oid: str
    is_lfs: bool
    xet_hash: str | None = None
    told_path: str | None = None
    told_size: int | None = None
    told_sha256: str | None = None


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Entry]


@dataclass
class Repo:
    """A model repo, or that of a data set, `datasets/org/name`. `gated`: False, `auto` or `manual`; `granted` are the
    names of those whom it was opened to.
    """

    id: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[-2]

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, `refs/…` or sha names."""
        for prefix, refs in (("refs/heads/", self.branches), ("refs/tags/", self.tags)):
            if revision.startswith(prefix):
                return refs.get(revision.removeprefix(prefix))
        for refs in (self.branches, self.tags, self.pull_requests):
            if revision in refs:
                return refs[revision]
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> Mapping[str, Entry]:
        return self.commits[self.resolve(revision) or ""].files

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        found, sha = [], self.resolve(revision)
        while sha is not None:
            found.append(self.commits[sha])
            sha = found[-1].parent
        return found


@dataclass
class Fault:
    """What happens to requests whose `METHOD path?query` has this pattern in it: to `times` of them (None: to all),
    once `after` others have passed.

    `status` (with `headers`) is answered instead of doing what was asked; with `afterwards` it is done first. `seconds`
    is how long the answer is held back, and may be changed meanwhile; `cut` ends the body after so many bytes though
    more were announced; `flip` changes the byte at this offset of the file; `rate` is the most bytes of body in a
    second.
    """

    where: str
    times: int | None = 1
    after: int = 0
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    afterwards: bool = False
    seconds: float = 0.0
    cut: int | None = None
    flip: int | None = None
    rate: float | None = None
    seen: int = 0

    def takes(self, asked: str) -> bool:
        if not re.search(self.where, asked):
            return False
        self.seen += 1
        return self.seen > self.after and (self.times is None or self.seen <= self.after + self.times)


@dataclass
class Asked:
    """A request that came: `host` is `hub` or `cdn`; `agent` is who asked; bytes of the bodies as they
    crossed the wire.
    """

    host: str
    method: str
    path: str
    token: str | None
    range: str | None
    agent: str
    at: float
    status: int = 0
    received: int = 0
    sent: int = 0

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


class Refused(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | named
        super().__init__(message)


class Hub:
    """The state of the double. `alice` writes, `bob` is somebody else, `reader`'s token only reads; they are there."""

    def __init__(self, folder: Path, *, xet: bool = False, page: int = 1000, part: int | None = None) -> None:
        """`xet`: whether it speaks Xet. `page`: entries of a listing at a time. `part`: uploads of more bytes than this
        go in parts of so many.
        """
        self.endpoint = self.cdn = ""
        self.page, self.part = page, part
        self.users: dict[str, User] = {}
        self.alice = self.user("alice")
        self.bob = self.user("bob")
        self.reader = self.user("alice", role="read")
        self.repos: dict[str, Repo] = {}
        self.requests: list[Asked] = []
        self.faults: list[Fault] = []
        self.leaks: list[str] = []
        """Requests to the CDN that carried somebody's token."""
        self.uploads: Counter[str] = Counter()
        """How often each content arrived whole, by sha256, but by Xet."""
        self.links: dict[str, float] = {}
        """Signatures of links to the CDN that are good, and until when."""
        self.link_seconds = 3600.0
        self.objects = folder / "objects"
        self.objects.mkdir(parents=True)
        self.xet = XetStore(folder / "xet") if xet else None
        self.parts: dict[str, dict[int, bytes]] = {}
        self._count = itertools.count(1)

    # What a test does.

    def user(self, name: str, *, role: str = "write", orgs: tuple[str, ...] = ()) -> User:
        """Somebody new, or somebody's further token."""
        user = User(name, f"hf_{uuid.uuid4().hex}ab", role, orgs)
        self.users[user.token] = user
        return user

    def put(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes],
        *,
        revision: str = "main",
        private: bool | None = None,
        gated: str | bool | None = None,
        message: str = "Upload",
    ) -> str:
        """Commit a folder or some files as if their owner had; the repo is made if it is not there. The commit's sha.

        A branch that is not there begins where main is. A folder's large files are linked, not copied.
        """
        repo = self.repos.setdefault(repo_id, Repo(repo_id))
        repo.private = repo.private if private is None else private
        repo.gated = repo.gated if gated is None else gated
        if isinstance(files, Path):
            folder = files
            entries = [self._take_file(path, path.relative_to(folder).as_posix()) for path in files_of(folder)]
        else:
            entries = [self._take(data, path) for path, data in files.items()]
        start = repo.branches.get(revision, repo.branches.get("main"))
        return self._commit(repo, revision, start, entries, (), message, "", repo.owner)

    def fail(self, where: str, **what: Any) -> Fault:
        """Let something go wrong from now on (see `Fault`)."""
        self.faults.append(Fault(where, **what))
        return self.faults[-1]

    def expire_links(self) -> None:
        """No link that was given out so far is good any more."""
        self.links.clear()

    def asked(self, pattern: str) -> list[Asked]:
        """The requests whose `METHOD path?query` has this pattern in it."""
        return [each for each in list(self.requests) if re.search(pattern, each.line)]

    def sent(self, pattern: str = "") -> int:
        """Bytes of the bodies that answered these requests."""
        return sum(each.sent for each in self.asked(pattern))

    def received(self, pattern: str = "") -> int:
        """Bytes of the bodies of these requests."""
        return sum(each.received for each in self.asked(pattern))

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first, without the one that every repo begins with."""
        return [each for each in self.repos[repo_id].history(revision) if each.title != "initial commit"]

    def sha256(self, repo_id: str, revision: str = "main") -> dict[str, str]:
        return {path: entry.sha256 for path, entry in self.repos[repo_id].files(revision).items()}

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        return self.content(self.repos[repo_id].files(revision)[path].sha256).read_bytes()

    # What the routes do.

    def content(self, sha256: str) -> Path:
        return self.objects / sha256

    def link(self, path: str) -> str:
        """A URL on the CDN, signed."""
        signature = uuid.uuid4().hex
        self.links[signature] = time.monotonic() + self.link_seconds
        return f"{self.cdn}{path}?signature={signature}"

    def caller(self, request: Request) -> User | None:
        written = request.headers.get("authorization")
        if written is None:
            return None
        user = self.users.get(written.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def repo(
        self, repo_id: str, request: Request, *, write: bool = False, content: bool = False, asks: bool = False
    ) -> Repo:
        """A repo as far as the caller may see it, change it (`write`), unless that only `asks` for a change, or read
        its files (`content`).
        """
        user, repo = self.caller(request), self.repos.get(repo_id)
        is_own = user is not None and repo is not None and repo.owner in (user.name, *user.orgs)
        if repo is None or (repo.private and not is_own):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refused(401, "Invalid username or password.")
        if write and user is not None and (not (is_own or asks) or user.role != "write"):
            raise Refused(403, "Forbidden: pass a token with write access to this repository")
        if content and repo.gated and not is_own and (user is None or user.name not in repo.granted):
            told = "Access to model " + repo_id + " is restricted. You must have access to it and be authenticated."
            raise Refused(401 if user is None else 403, told, "GatedRepo")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[sha]

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private=private)
        entry = self._take(GIT_ATTRIBUTES, ".gitattributes")
        self._commit(repo, "main", None, [entry], (), "initial commit", "", repo.owner)
        return repo

    async def apply(self, repo: Repo, revision: str, lines: list[dict[str, Any]], user: User, *, as_pr: bool) -> Commit:
        """A commit as it was posted: a header, then operations."""
        header = next(line["value"] for line in lines if line["key"] == "header")
        start = self.commit_of(repo, revision).sha
        if revision not in repo.branches and revision not in repo.pull_requests and not as_pr:
            raise Refused(400, f"{revision} is no branch")
        if (parent := header.get("parentCommit")) is not None and parent != start:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        added, removed = [], []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added.append(self._take(base64.b64decode(value["content"]), value["path"], is_lfs=False))
            elif line["key"] == "lfsFile":
                added.append(await asyncio.to_thread(self._take_sent, value))
            elif line["key"] in ("deletedFile", "deletedFolder"):
                removed.append(value["path"])
        if as_pr:
            number = len(repo.pull_requests) + 1
            revision = f"refs/pr/{number}"
            repo.pull_requests[revision] = start
        sha = self._commit(
            repo, revision, start, added, removed, header["summary"], header.get("description", ""), user.name
        )
        return repo.commits[sha]

    def _commit(
        self,
        repo: Repo,
        revision: str,
        start: str | None,
        added: list[Entry],
        removed: Any,
        title: str,
        message: str,
        author: str,
    ) -> str:
        files = dict(repo.commits[start].files) if start else {}
        for path in removed:
            files = {name: entry for name, entry in files.items() if name != path and not name.startswith(path)}
        files |= {entry.path: entry for entry in added}
        sha = hashlib.sha1(f"{repo.id} {next(self._count)} {title}".encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        repo.commits[sha] = Commit(sha, start, title, message, author, date, dict(sorted(files.items())))
        refs = repo.pull_requests if revision.startswith("refs/pr/") else repo.branches
        refs[revision.removeprefix("refs/heads/")] = sha
        return sha

    def _take(self, data: bytes, path: str, *, is_lfs: bool | None = None) -> Entry:
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.content(sha256).exists():
            self.content(sha256).write_bytes(data)
        return self._entry(path, sha256, len(data), _is_lfs(path, len(data)) if is_lfs is None else is_lfs)

    def _take_file(self, file: Path, path: str) -> Entry:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if not (target := self.content(sha256)).exists():
            try:
                target.hardlink_to(file.resolve())
            except OSError:
                shutil.copyfile(file, target)
        return self._entry(path, sha256, file.stat().st_size, _is_lfs(path, file.stat().st_size))

    def _take_sent(self, value: Mapping[str, Any]) -> Entry:
        """A large file that was sent before it is committed, by LFS or Xet."""
        sha256, xet_hash = value["oid"], None
        if not self.content(sha256).exists() and self.xet is not None:
            xet_hash = self.xet.take(sha256, self.content(sha256))
        if not self.content(sha256).exists():
            raise Refused(400, f"Your push was rejected because the LFS pointer {sha256} points to no file")
        known = (entry for repo in self.repos.values() for commit in repo.commits.values() for entry in _all(commit))
        xet_hash = xet_hash or next((entry.xet_hash for entry in known if entry.sha256 == sha256), None)
        size = self.content(sha256).stat().st_size
        return replace(self._entry(value["path"], sha256, size, is_lfs=True), xet_hash=xet_hash)

    def _entry(self, path: str, sha256: str, size: int, is_lfs: bool) -> Entry:
        if is_lfs:
            return Entry(path, size, sha256, _git_oid(_pointer(sha256, size)), True)
        return Entry(path, size, sha256, _git_oid(self.content(sha256).read_bytes()), False)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _all(commit: Commit) -> Iterator[Entry]:
    return iter(commit.files.values())


def _is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_NAMES) or size >= LARGE


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _told(entry: Entry, *, sibling: bool = False) -> dict[str, Any]:
    """A file as listings tell of it."""
    size = entry.size if entry.told_size is None else entry.told_size
    oid = entry.told_sha256 or entry.sha256
    lfs = {("sha256" if sibling else "oid"): oid, "size": size, "pointerSize": len(_pointer(entry.sha256, size))}
    path = entry.told_path or entry.path
    if sibling:
        return {"rfilename": path, "size": size, "blobId": entry.git_oid} | ({"lfs": lfs} if entry.is_lfs else {})
    told = {"type": "file", "oid": entry.git_oid, "size": size, "path": path}
    return told | ({"lfs": lfs} if entry.is_lfs else {}) | ({"xetHash": entry.xet_hash} if entry.xet_hash else {})


def _hub_app(hub: Hub) -> FastAPI:
    app = FastAPI()

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    @app.get("/api/whoami-v2")
    async def whoami(request: Request) -> Any:
        user = hub.caller(request)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
        orgs = [{"type": "org", "name": name} for name in user.orgs]
        return {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs, "auth": token}

    @app.post("/api/repos/create")
    async def create(request: Request) -> Any:
        user, asked = hub.caller(request), await request.json()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        owner = asked.get("organization") or user.name
        repo_id = f"{owner}/{asked['name']}"
        if not all(NAMES.fullmatch(part) for part in repo_id.split("/")):
            raise Refused(400, f"Invalid repo name: {repo_id}")
        if user.role != "write" or owner not in (user.name, *user.orgs):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = f"{hub.endpoint}/{repo_id}"
        if repo_id in hub.repos:
            return JSONResponse({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.create(repo_id, private=private)
        return {"url": url, "name": repo_id, "id": repo_id}

    @app.delete("/api/repos/delete")
    async def delete(request: Request) -> Any:
        asked = await request.json()
        repo = hub.repo(f"{asked['organization']}/{asked['name']}", request, write=True)
        del hub.repos[repo.id]
        return {}

    @app.post("/api/validate-yaml")
    async def validate_yaml(request: Request) -> Any:
        content = (await request.json())["content"]
        if (front := re.match(r"---\n(.*?)\n---", content, re.DOTALL)) is not None:
            try:
                yaml.safe_load(front[1])
            except yaml.YAMLError as error:
                return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return {"errors": [], "warnings": []}

    @app.get("/api/{kind}/{owner}/{name}")
    @app.get("/api/{kind}/{owner}/{name}/revision/{revision}")
    async def about(kind: str, owner: str, name: str, request: Request, revision: str = "main") -> Any:
        repo = hub.repo(_repo_id(kind, owner, name), request)
        commit = hub.commit_of(repo, unquote(revision))
        with_blobs = request.query_params.get("blobs", "").lower() in ("1", "true")
        siblings = [_told(entry, sibling=True) for entry in _all(commit)]
        return {
            "_id": repo.id,
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.owner,
            "sha": commit.sha,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "lastModified": commit.date,
            "createdAt": repo.history()[-1].date,
            "downloads": 0,
            "likes": 0,
            **_card(hub, commit),
            "siblings": siblings if with_blobs else [{"rfilename": each["rfilename"]} for each in siblings],
        }

    @app.get("/api/{kind}/{owner}/{name}/auth-check")
    @app.get("/api/{kind}/{owner}/{name}/auth-check/write")
    async def auth_check(kind: str, owner: str, name: str, request: Request) -> Any:
        hub.repo(_repo_id(kind, owner, name), request, content=True, write=request.url.path.endswith("/write"))
        return {}

    @app.get("/api/models/{owner}/{name}/tree/{revision}")
    @app.get("/api/models/{owner}/{name}/tree/{revision}/{folder:path}")
    async def tree(owner: str, name: str, revision: str, request: Request, folder: str = "") -> Any:
        repo = hub.repo(f"{owner}/{name}", request)
        commit, folder = hub.commit_of(repo, unquote(revision)), unquote(folder).strip("/")
        recursive = request.query_params.get("recursive", "").lower() in ("1", "true")
        found = _listed(commit, folder, recursive=recursive)
        if folder and not found:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound", X_Repo_Commit=commit.sha)
        return _paged(hub, request, found)

    @app.post("/api/models/{owner}/{name}/paths-info/{revision}")
    async def paths_info(owner: str, name: str, revision: str, request: Request) -> Any:
        repo = hub.repo(f"{owner}/{name}", request)
        commit = hub.commit_of(repo, unquote(revision))
        if request.headers.get("content-type", "").startswith("application/json"):
            paths = (await request.json())["paths"]
        else:
            form = _form(await request.body())
            paths = [value for key, value in form if key == "paths"]
        paths = {path.strip("/") for path in ([paths] if isinstance(paths, str) else paths)}
        return [each for each in _listed(commit, "", recursive=True) if each["path"] in paths]

    @app.get("/api/models/{owner}/{name}/refs")
    async def refs(owner: str, name: str, request: Request) -> Any:
        repo = hub.repo(f"{owner}/{name}", request)

        def told(kind: str, found: Mapping[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name.removeprefix("refs/pr/"), "ref": kind + name, "targetCommit": sha}
                for name, sha in found.items()
            ]

        found = {"branches": told("refs/heads/", repo.branches), "tags": told("refs/tags/", repo.tags), "converts": []}
        with_prs = request.query_params.get("include_prs")
        return found | ({"pullRequests": told("", repo.pull_requests)} if with_prs else {})

    @app.get("/api/models/{owner}/{name}/commits/{revision}")
    async def commits(owner: str, name: str, revision: str, request: Request) -> Any:
        repo = hub.repo(f"{owner}/{name}", request)
        history = repo.history(hub.commit_of(repo, unquote(revision)).sha)
        found = [
            {
                "id": each.sha,
                "title": each.title,
                "message": each.message,
                "authors": [{"user": each.author}],
                "date": each.date,
            }
            for each in history
        ]
        return _paged(hub, request, found)

    @app.post("/api/models/{owner}/{name}/branch/{branch}")
    async def branch(owner: str, name: str, branch: str, request: Request) -> Any:
        repo = hub.repo(f"{owner}/{name}", request, write=True)
        if (wanted := unquote(branch)) in repo.branches:
            raise Refused(409, f"Reference already exists: {wanted}")
        body = await request.body()
        start = (json.loads(body) if body else {}).get("startingPoint", "main")
        repo.branches[wanted] = hub.commit_of(repo, start).sha
        return {}

    @app.post("/api/models/{owner}/{name}/tag/{revision}")
    async def tag(owner: str, name: str, revision: str, request: Request) -> Any:
        repo = hub.repo(f"{owner}/{name}", request, write=True)
        repo.tags[(await request.json())["tag"]] = hub.commit_of(repo, unquote(revision)).sha
        return {}

    @app.post("/api/models/{owner}/{name}/preupload/{revision}")
    async def preupload(owner: str, name: str, revision: str, request: Request) -> Any:
        repo = hub.repo(f"{owner}/{name}", request, write=True, asks=request.query_params.get("create_pr") == "1")
        there = hub.commit_of(repo, unquote(revision)).files
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_lfs(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(there.get(file["path"])),
                }
                for file in (await request.json())["files"]
            ]
        }

    @app.post("/api/models/{owner}/{name}/commit/{revision}")
    async def commit(owner: str, name: str, revision: str, request: Request) -> Any:
        as_pr = request.query_params.get("create_pr") == "1"
        repo = hub.repo(f"{owner}/{name}", request, write=True, asks=as_pr)
        user = hub.caller(request)
        assert user is not None
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
        made = await hub.apply(repo, unquote(revision), lines, user, as_pr=as_pr)
        told = {"success": True, "commitOid": made.sha, "commitUrl": f"{hub.endpoint}/{repo.id}/commit/{made.sha}"}
        number = len(repo.pull_requests)
        return told | ({"pullRequestUrl": f"{hub.endpoint}/{repo.id}/discussions/{number}"} if as_pr else {})

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(owner: str, name: str, request: Request) -> Any:
        # What is sent belongs to no commit yet, and may be asked for by a pull request.
        hub.repo(f"{owner}/{name}", request, write=True, asks=True)
        asked = await request.json()
        found = [_lfs_actions(hub, f"{owner}/{name}", each["oid"], each["size"]) for each in asked["objects"]]
        is_in_parts = any("chunk_size" in each.get("actions", {}).get("upload", {}).get("header", {}) for each in found)
        return {"transfer": "multipart" if is_in_parts else "basic", "objects": found, "hash_algo": "sha256"}

    @app.post("/api/complete-multipart/{upload}")
    async def complete(upload: str, request: Request) -> Any:
        asked = await request.json()
        parts = hub.parts.pop(upload, {})
        data = b"".join(parts[each["partNumber"]] for each in asked["parts"])
        if hashlib.sha256(data).hexdigest() != asked["oid"]:
            raise Refused(400, "The parts are not the object that was announced")
        hub.content(asked["oid"]).write_bytes(data)
        hub.uploads[asked["oid"]] += 1
        return {}

    @app.post("/{owner}/{name}.git/info/lfs/objects/verify")
    async def verify(owner: str, name: str, request: Request) -> Any:
        hub.repo(f"{owner}/{name}", request, write=True, asks=True)
        asked = await request.json()
        content = hub.content(asked["oid"])
        if not content.exists() or content.stat().st_size != asked["size"]:
            raise Refused(404, "The object is not here")
        return {}

    @app.get("/api/models/{owner}/{name}/xet-{what}-token/{revision}")
    async def xet_token(owner: str, name: str, what: str, revision: str, request: Request) -> Any:
        if hub.xet is None or what not in ("read", "write"):
            raise Refused(404, "Not found")
        hub.repo(f"{owner}/{name}", request, write=what == "write", content=what == "read")
        give = hub.xet.folder_for_upload if what == "write" else hub.xet.folder_for_download
        told = {
            "casUrl": f"local://{await asyncio.to_thread(give)}",
            "accessToken": f"xet-{uuid.uuid4().hex}",
            "exp": int(time.time()) + 3600,
        }
        headers = {
            "X-Xet-Cas-Url": told["casUrl"],
            "X-Xet-Access-Token": told["accessToken"],
            "X-Xet-Token-Expiration": str(told["exp"]),
        }
        return JSONResponse(told, headers=headers)

    @app.api_route("/{kind}/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(owner: str, name: str, revision: str, path: str, request: Request, kind: str = "models") -> Any:
        repo = hub.repo(_repo_id(kind, owner, name), request, content=True)
        commit = hub.commit_of(repo, unquote(revision))
        entry, told = commit.files.get(unquote(path)), {"X-Repo-Commit": commit.sha}
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
        if not entry.is_lfs:
            place = f"/api/resolve-cache/{kind}/{owner}/{name}/{commit.sha}/{quote(entry.path)}"
            return Response(status_code=307, headers=told | {"Location": place})
        size = entry.size if entry.told_size is None else entry.told_size
        told |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{entry.told_sha256 or entry.sha256}"'}
        told |= {"ETag": f'"{entry.git_oid}"', "Location": hub.link(f"/objects/{entry.sha256}")}
        if entry.xet_hash is not None:
            route = f"{hub.endpoint}/api/models/{repo.id}/xet-read-token/{commit.sha}"
            told |= {"X-Xet-Hash": entry.xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
        return Response(status_code=302, headers=told)

    @app.api_route("/api/resolve-cache/{kind}/{owner}/{name}/{sha}/{path:path}", methods=["GET", "HEAD"])
    async def small(kind: str, owner: str, name: str, sha: str, path: str, request: Request) -> Any:
        repo = hub.repo(_repo_id(kind, owner, name), request, content=True)
        entry = repo.commits[sha].files[unquote(path)]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry.git_oid}"'}
        return _file(hub, request, entry.sha256, headers, told_size=entry.told_size)

    return app


def _repo_id(kind: str, owner: str, name: str) -> str:
    """As repositories are called here: those of models by their ids alone."""
    return f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"


def _card(hub: Hub, commit: Commit) -> dict[str, Any]:
    """What the front matter of a README says, where the Hub shows it."""
    entry = commit.files.get("README.md")
    text = hub.content(entry.sha256).read_text() if entry else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    card = yaml.safe_load(front[1]) if front else None
    if not isinstance(card, dict):
        return {"tags": []}
    known = {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
    return {"cardData": card, "tags": card.get("tags", []), **known}


def _oid(entry: Entry | None) -> str | None:
    """By which clients see that a file is there as it is."""
    return None if entry is None else entry.sha256 if entry.is_lfs else entry.git_oid


def _listed(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """What lies in a folder, folders first met first."""
    found: dict[str, dict[str, Any]] = {}
    for path, entry in commit.files.items():
        if folder and not path.startswith(f"{folder}/"):
            continue
        inside = path.removeprefix(f"{folder}/") if folder else path
        parts = inside.split("/")
        for depth in range(1, len(parts)):
            name = "/".join(filter(None, (folder, *parts[:depth])))
            if recursive or depth == 1:
                oid = hashlib.sha1(f"{commit.sha} {name}".encode()).hexdigest()
                found.setdefault(name, {"type": "directory", "oid": oid, "size": 0, "path": name})
        if recursive or len(parts) == 1:
            found[path] = _told(entry)
    return list(found.values())


def _paged(hub: Hub, request: Request, found: list[Any]) -> Response:
    start = int(request.query_params.get("cursor", 0))
    page, headers = found[start : start + hub.page], {"X-Total-Count": str(len(found))}
    if start + hub.page < len(found):
        following = request.url.include_query_params(cursor=start + hub.page)
        headers["Link"] = f'<{hub.endpoint}{following.path}?{following.query}>; rel="next"'
    return JSONResponse(page, headers=headers)


def _form(body: bytes) -> list[tuple[str, str]]:
    from urllib.parse import parse_qsl

    return parse_qsl(body.decode())


def _lfs_actions(hub: Hub, repo_id: str, oid: str, size: int) -> dict[str, Any]:
    """How to send an object; nothing to do for one that is here."""
    told: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if hub.content(oid).exists():
        return told
    upload: dict[str, Any] = {"href": hub.link(f"/upload/{oid}"), "header": {}}
    if hub.part is not None and size > hub.part:
        name = uuid.uuid4().hex
        hub.parts[name] = {}
        count = -(-size // hub.part)
        parts = {f"{number:05d}": hub.link(f"/part/{name}/{number}") for number in range(1, count + 1)}
        upload = {"href": f"{hub.endpoint}/api/complete-multipart/{name}"}
        upload["header"] = {"chunk_size": str(hub.part), **parts}
    verify = f"{hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"
    return told | {"actions": {"upload": upload, "verify": {"href": verify}}}


def _cdn_app(hub: Hub) -> FastAPI:
    """Where large files come from and go to: whoever has a signed link, and nobody's token."""
    app = FastAPI()

    def check(request: Request) -> None:
        if "authorization" in request.headers:
            hub.leaks.append(f"{request.method} {request.url.path}")
            raise Refused(400, "Only one auth mechanism allowed")
        if hub.links.get(request.query_params.get("signature", ""), 0.0) < time.monotonic():
            raise Refused(403, "Request has expired")

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return Response(f"<Error><Message>{error}</Message></Error>", error.status, media_type="application/xml")

    @app.api_route("/objects/{oid}", methods=["GET", "HEAD"])
    async def read(oid: str, request: Request) -> Any:
        check(request)
        return _file(hub, request, oid, {"ETag": f'"{hashlib.md5(oid.encode()).hexdigest()}"'})

    @app.put("/upload/{oid}")
    async def write(oid: str, request: Request) -> Any:
        check(request)
        partial, digest = hub.objects / f".{uuid.uuid4().hex}", hashlib.sha256()
        try:
            with partial.open("wb") as file:
                async for chunk in request.stream():
                    file.write(chunk)
                    digest.update(chunk)
            if digest.hexdigest() != oid:
                raise Refused(400, "The content is not what its name says")
            partial.rename(hub.content(oid))
        finally:
            partial.unlink(missing_ok=True)
        hub.uploads[oid] += 1
        return Response(headers={"ETag": f'"{oid[:32]}"'})

    @app.put("/part/{upload}/{number}")
    async def part(upload: str, number: int, request: Request) -> Any:
        check(request)
        data = await request.body()
        hub.parts[upload][number] = data
        return Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    return app


def _file(
    hub: Hub, request: Request, sha256: str, headers: dict[str, str], *, told_size: int | None = None
) -> Response:
    """A file or a range of it, with whatever is to go wrong on the way."""
    fault: Fault | None = request.scope.get("fault")
    size = hub.content(sha256).stat().st_size
    start, end, status = 0, size, 200
    if (written := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))) is not None and any(
        written.groups()
    ):
        first, last = written.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(int(last) + 1, size) if first and last else size
        if start >= size:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    length = end - start if told_size is None else told_size
    headers |= {"Content-Length": str(length), "Accept-Ranges": "bytes"}
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    return StreamingResponse(_body(hub.content(sha256), start, end, fault), status, headers)


async def _body(path: Path, start: int, end: int, fault: Fault | None) -> AsyncIterator[bytes]:
    left = end - start
    if fault is not None and fault.cut is not None:
        left = min(left, fault.cut)
    with path.open("rb") as file:
        file.seek(start)
        while left > 0:
            at = file.tell()
            chunk = file.read(min(CHUNK, left))
            if fault is not None and fault.flip is not None and at <= fault.flip < at + len(chunk):
                changed = bytearray(chunk)
                changed[fault.flip - at] ^= 0xFF
                chunk = bytes(changed)
            left -= len(chunk)
            yield chunk
            if fault is not None and fault.rate:
                await asyncio.sleep(len(chunk) / fault.rate)


class _Door:
    """What every request goes through: it is written down, faults happen to it, and `%2F` in a segment stays."""

    def __init__(self, app: ASGIApp, hub: Hub, host: str) -> None:
        self.app, self.hub, self.host = app, hub, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        raw = scope["raw_path"].decode()
        query = scope["query_string"].decode()
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        token = headers.get("authorization", "").removeprefix("Bearer ") or None
        path = f"{raw}?{query}" if query else raw
        asked = Asked(
            self.host, scope["method"], path, token, headers.get("range"), headers.get("user-agent", ""), time.time()
        )
        self.hub.requests.append(asked)
        segments = (quote(unquote(each), safe="") if "%2F" in each else unquote(each) for each in raw.split("/"))
        scope["path"] = "/".join(segments)
        fault = next((each for each in self.hub.faults if each.takes(asked.line)), None)
        scope["fault"] = fault

        async def counted_receive() -> Message:
            message = await receive()
            asked.received += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                asked.status = message["status"]
            asked.sent += len(message.get("body", b""))  # before whoever has it all looks
            await send(message)

        begun = time.monotonic()
        while fault is not None and (left := begun + fault.seconds - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.02))
        if fault is None or not fault.status:
            with contextlib.suppress(RuntimeError if fault is not None and fault.cut is not None else _Never):
                # A body that ends early ends the connection, and uvicorn says so.
                await self.app(scope, counted_receive, counted_send)
            return
        if fault.afterwards:

            async def swallow(_: Message) -> None:
                """The answer gets lost."""

            await self.app(scope, counted_receive, swallow)
        else:
            while (await counted_receive()).get("more_body"):
                pass
        headers_back = [(name.encode(), value.encode()) for name, value in fault.headers.items()]
        await counted_send({"type": "http.response.start", "status": fault.status, "headers": headers_back})
        await counted_send({"type": "http.response.body", "body": b'{"error": "as the test wants it"}'})


class _Never(Exception):
    """Nobody raises it."""


@contextmanager
def running_hub(folder: Path, *, xet: bool = False, page: int = 1000, part: int | None = None) -> Iterator[Hub]:
    """A Hub on a free port of 127.0.0.1, its CDN on one of localhost; `folder` holds what it keeps (see `Hub`)."""
    hub = Hub(folder, xet=xet, page=page, part=part)
    with (
        _served(lambda: _Door(_hub_app(hub), hub, "hub")) as port,
        _served(lambda: _Door(_cdn_app(hub), hub, "cdn")) as cdn_port,
    ):
        hub.endpoint, hub.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{cdn_port}"
        yield hub


@contextmanager
def _served(app: Callable[[], ASGIApp]) -> Iterator[int]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app(), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
