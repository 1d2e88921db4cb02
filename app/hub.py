"""The Hub's protocol: what its clients ask for, spelled as they expect it.

Its words are the Hub's (`rfilename`, `oid`, `siblings`, …) and are nowhere else. All answers are made of a `Repo`;
every file is one that the Hub would keep in LFS, so that its sha256 is all that needs to be known of it.
"""

# Fields are named as in the protocol.
# ruff: noqa: N815

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import MEDIA_TYPE as PROBLEM
from app.errors import HttpProblem
from app.repos import Repo, RepoFile
from merge_core.cards import texts

PREFIX = "/hub"
BRANCH = "main"
REF = f"refs/heads/{BRANCH}"
ERROR_CODE = "X-Error-Code"
ERROR_MESSAGE = "X-Error-Message"
COMMIT = "X-Repo-Commit"
BAD_KEY = "Invalid credentials in Authorization header"
"""How the Hub says that a token is not good; its clients know these words."""
_LONGEST_MESSAGE = 1000


class Lfs(BaseModel):
    """What the Hub says of a file in LFS: its sha256 under the one name or the other."""

    size: int
    pointerSize: int
    sha256: str | None = None
    oid: str | None = None


class Sibling(BaseModel):
    """A file in a model's description; sizes and digests where `blobs` asks for them."""

    rfilename: str
    size: int | None = None
    blobId: str | None = None
    lfs: Lfs | None = None


class Model(BaseModel):
    """A model's description, or those parts of it that `expand` asks for."""

    model_config = ConfigDict(populate_by_name=True)

    key: str = Field(alias="_id")
    id: str
    modelId: str | None = None
    author: str | None = None
    sha: str | None = Field(None, description="the commit: the first 40 digits of the lock's sha256")
    createdAt: str | None = None
    lastModified: str | None = None
    private: bool | None = None
    gated: Literal[False] | None = None
    disabled: bool | None = None
    downloads: int | None = None
    likes: int | None = None
    tags: list[str] | None = None
    library_name: str | None = None
    pipeline_tag: str | None = None
    cardData: dict[str, Any] | None = Field(None, description="the front matter of the card")
    siblings: list[Sibling] | None = None
    spaces: list[str] | None = None
    usedStorage: int | None = Field(None, description="bytes of all files")
    securityRepoStatus: dict[str, Any] | None = None


class LastCommit(BaseModel):
    """The commit that a file is of."""

    id: str
    title: str
    date: str


class Entry(BaseModel):
    """A file or a folder."""

    type: Literal["file", "directory"]
    path: str
    oid: str
    size: int
    lfs: Lfs | None = None
    lastCommit: LastCommit | None = None
    securityFileStatus: dict[str, Any] | None = None


class Ref(BaseModel):
    """A branch."""

    name: str
    ref: str
    targetCommit: str


class Refs(BaseModel):
    """The branches, which is one."""

    branches: list[Ref]
    converts: list[Ref]
    tags: list[Ref]
    pullRequests: list[Ref]


class Author(BaseModel):
    """Whose it is."""

    user: str


class Commit(BaseModel):
    """A commit."""

    id: str
    title: str
    message: str
    authors: list[Author]
    date: str


class User(BaseModel):
    """Whoever asks."""

    type: Literal["user"]
    id: str
    name: str
    fullname: str
    isPro: bool
    orgs: list[dict[str, Any]]
    auth: dict[str, Any]


def no_repo(repo_id: str) -> HttpProblem:
    """There is no such repo, or it is somebody else's."""
    detail = f"there is no {repo_id[:200]!r} here; what is here are finished jobs: merges/<id of the job>"
    return HttpProblem("not-found", detail, headers={ERROR_CODE: "RepoNotFound"})


def no_revision(repo: Repo, revision: str) -> HttpProblem:
    """A repo has no such revision."""
    detail = f"{repo.id} has no revision {revision[:200]!r}; it has {BRANCH}, which is {repo.commit}"
    return HttpProblem("not-found", detail, headers={ERROR_CODE: "RevisionNotFound"})


def no_entry(repo: Repo, path: str) -> HttpProblem:
    """A repo has no such file or folder, which clients remember for the commit."""
    headers = {ERROR_CODE: "EntryNotFound", COMMIT: repo.commit}
    return HttpProblem("not-found", f"{repo.id} has no {path[:200]!r}", headers=headers)


def at_revision(repo: Repo, revision: str) -> Repo:
    """The repo, if it has this revision."""
    if revision not in (BRANCH, REF, repo.commit):
        raise no_revision(repo, revision)
    return repo


def split_revision(revision: str, path: str) -> tuple[str, str]:
    """Revision and path of `main/a/b` and of `refs/heads/main/a/b`, cut at the first slash."""
    if revision != "refs":
        return revision, path
    kind, _, rest = path.partition("/")
    name, _, path = rest.partition("/")
    return f"refs/{kind}/{name}", path


def model(
    repo: Repo,
    card: Mapping[str, Any] | None,
    *,
    blobs: bool = False,
    security: bool = False,
    siblings: bool = True,
    only: Sequence[str] = (),
) -> Model:
    """A repo's description. `card`: the front matter of its card (None: not read). `only`: the parts that are wanted
    (all, if none is named); those that are not known here are left away.
    """
    told: dict[str, Any] = {
        "modelId": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": repo.commit,
        "createdAt": _date(repo.created_at),
        "lastModified": _date(repo.made_at),
        "private": True,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "spaces": [],
        "usedStorage": sum(file.size for file in repo.files.values()),
    }
    if siblings:
        told["siblings"] = [_sibling(file, blobs) for file in repo.files.values()]
    if security:
        told["securityRepoStatus"] = {"scansDone": False, "filesWithIssues": []}
    if card is not None:
        told |= {"cardData": dict(card), "tags": _tags(repo, card)}
        told |= {key: card[key] for key in ("library_name", "pipeline_tag") if isinstance(card.get(key), str)}
    if only:
        told = {key: value for key, value in told.items() if key in only}
    return Model(key=hashlib.sha256(repo.id.encode()).hexdigest()[:24], id=repo.id, **told)


def _tags(repo: Repo, card: Mapping[str, Any]) -> list[str]:
    """The card's tags, and what the Hub makes of its other keys."""
    found = [card["library_name"]] if isinstance(card.get("library_name"), str) else []
    found += ["safetensors"] if any(path.endswith(".safetensors") for path in repo.files) else []
    found += texts(card.get("tags")) + texts(card.get("language"))
    relation = card.get("base_model_relation")
    for parent in texts(card.get("base_model")):
        found += [f"base_model:{parent}", *([f"base_model:{relation}:{parent}"] if isinstance(relation, str) else [])]
    found += [f"license:{name}" for name in texts(card.get("license"))]
    return list(dict.fromkeys(found))


def _sibling(file: RepoFile, blobs: bool) -> Sibling:
    if not blobs:
        return Sibling(rfilename=file.path)
    told: dict[str, Any] = {} if file.sha256 is None else {"lfs": Lfs(**_lfs(file), sha256=file.sha256)}
    return Sibling(rfilename=file.path, size=file.size, blobId=_oid(file), **told)


def _pointer(file: RepoFile) -> bytes:
    """What git keeps of a file in LFS."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.size}\n".encode()


def _lfs(file: RepoFile) -> dict[str, int]:
    return {"size": file.size, "pointerSize": len(_pointer(file))}


def _oid(file: RepoFile) -> str:
    """The id that git has for a file: of its pointer, where its sha256 is known."""
    if file.sha256 is None:
        return file.etag[:40]
    pointer = _pointer(file)
    return hashlib.sha1(b"blob %d\0%b" % (len(pointer), pointer), usedforsecurity=False).hexdigest()


def entry(repo: Repo, path: str, *, expand: bool = False) -> Entry | None:
    """The file or folder of this path; None: there is none. `expand`: with the commit."""
    more: dict[str, Any] = {}
    if expand:
        more["lastCommit"] = LastCommit(id=repo.commit, title=repo.title, date=_date(repo.made_at))
    file = repo.files.get(path)
    if file is not None:
        if expand:
            more["securityFileStatus"] = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
        if file.sha256 is not None:
            more["lfs"] = Lfs(**_lfs(file), oid=file.sha256)
        return Entry(type="file", path=path, oid=_oid(file), size=file.size, **more)
    inside = [file for name, file in repo.files.items() if name.startswith(f"{path}/")]
    if not inside:
        return None
    listing = "\n".join(f"{file.path} {file.etag}" for file in inside)
    oid = hashlib.sha256(listing.encode()).hexdigest()[:40]
    return Entry(type="directory", path=path, oid=oid, size=0, **more)


def paths_below(repo: Repo, folder: str, *, recursive: bool) -> list[str]:
    """The paths of what is in a folder (`""`: of the whole repo), sorted; with all that is below, if `recursive`.

    Raises `HttpProblem` where there is no such folder.
    """
    start = f"{folder}/" if folder else ""
    found = {path for name in repo.files if name.startswith(start) for path in _steps(name, len(start), recursive)}
    if folder and not found:
        raise no_entry(repo, folder)
    return sorted(found)


def _steps(path: str, start: int, recursive: bool) -> Iterator[str]:
    """A path, and the folders above it that lie further down than its first `start` characters."""
    end = path.find("/", start)
    while end >= 0:
        yield path[:end]
        if not recursive:
            return
        end = path.find("/", end + 1)
    yield path


def refs(repo: Repo) -> Refs:
    """The one branch."""
    branch = Ref(name=BRANCH, ref=REF, targetCommit=repo.commit)
    return Refs(branches=[branch], converts=[], tags=[], pullRequests=[])


def commits(repo: Repo, owner: str) -> list[Commit]:
    """The one commit."""
    date = _date(repo.made_at)
    return [Commit(id=repo.commit, title=repo.title, message="", authors=[Author(user=owner)], date=date)]


def user(owner: str) -> User:
    """Whoever asks, who may read."""
    token = {"displayName": owner, "role": "read"}
    auth = {"type": "access_token", "accessToken": token}
    return User(type="user", id=owner, name=owner, fullname=owner, isPro=False, orgs=[], auth=auth)


def file_headers(repo: Repo, file: RepoFile) -> dict[str, str]:
    """The headers of a file's answer that clients look for."""
    return {COMMIT: repo.commit, "X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class InHubWords:
    """Says problems to the Hub's clients as the Hub does: in `X-Error-Code`, `X-Error-Message` and the key `error`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(f"{PREFIX}/"):
            await self.app(scope, receive, send)
            return
        held: Message | None = None
        body = b""

        async def translated(message: Message) -> None:
            nonlocal held, body
            if message["type"] == "http.response.start" and Headers(scope=message).get("content-type") == PROBLEM:
                held = message
                return
            if held is None:
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                content = _say(json.loads(body), MutableHeaders(scope=held), Headers(scope=scope), scope["path"])
                await send(held)
                await send({"type": "http.response.body", "body": content})

        await self.app(scope, receive, translated)


def _say(problem: dict[str, Any], headers: MutableHeaders, asked: Headers, path: str) -> bytes:
    """Put a problem into an answer's headers, and give its body."""
    said = problem["detail"]
    if problem["code"] == "unauthorized":
        if "authorization" in asked:
            said = BAD_KEY
        elif path != f"{PREFIX}/api/whoami-v2":
            headers.setdefault(ERROR_CODE, "RepoNotFound")
    plain = " ".join(said.replace("…", "...").split()).encode("ascii", "replace").decode()
    headers[ERROR_MESSAGE] = plain[:_LONGEST_MESSAGE]
    content = json.dumps({**problem, "error": problem["detail"]}, ensure_ascii=False).encode()
    headers["Content-Length"] = str(len(content))
    return content
