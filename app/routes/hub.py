"""A Hub of our own, read-only: finished jobs as models, for clients whose `HF_ENDPOINT` leads here.

What clients were seen to ask for is here; see `app.hub` for how it is spelled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse

from app import hub
from app.auth import CallerDep
from app.deps import ShelvesDep, read_body
from app.errors import HttpProblem, answers
from app.repos import Repo
from app.sending import ANSWERS, send_file
from merge_core.cards import CARD_NAME, MAX_CARD_BYTES, front_matter

MOST_ENTRIES = 1000
MOST_MODELS = 100
MAX_PATHS_BYTES = 2**20
_RESOLVED = {
    hub.COMMIT: "the commit",
    "X-Linked-Etag": "the ETag",
    "X-Linked-Size": "the size of the whole file",
}
router = APIRouter(prefix=hub.PREFIX, tags=["hub"])


def _repo(
    shelf: Annotated[str, Path(max_length=100, description="`merges`, `patches` or `views`")],
    repo: Annotated[str, Path(max_length=100, description="the id of a job that succeeded")],
    shelves: ShelvesDep,
    caller: CallerDep,
) -> Repo:
    found = shelves[shelf].find(repo, caller.owner) if shelf in shelves else None
    if found is None:
        raise hub.no_repo(f"{shelf}/{repo}")
    return found


RepoDep = Annotated[Repo, Depends(_repo)]
Revision = Annotated[str, Path(max_length=200, description="`main` or the commit")]


def _revision(repo: RepoDep, revision: Revision) -> Repo:
    return hub.at_revision(repo, revision)


RevisionDep = Annotated[Repo, Depends(_revision)]
_Parts = Annotated[list[str], Query(max_length=50, description="only these parts of the description")]
_SameParts = Annotated[list[str], Query(alias="expand[]", max_length=50, description="the same")]


def _only(expand: _Parts = [], expand_: _SameParts = []) -> list[str]:  # noqa: B006
    return [*expand, *expand_]


OnlyDep = Annotated[list[str], Depends(_only)]


def _model(
    only: OnlyDep,
    blobs: Annotated[bool, Query(description="with sizes and digests of the files")] = False,
    security: Annotated[bool, Query(alias="securityStatus", description="with what scans found: nothing")] = False,
) -> Callable[[Repo], hub.Model]:
    """Describes a repo as the query asks."""

    def describe(repo: Repo) -> hub.Model:
        card = _card(repo) if not only or _OF_CARDS & set(only) else None
        return hub.model(repo, card, blobs=blobs, security=security or "securityRepoStatus" in only, only=only)

    return describe


DescribeDep = Annotated[Callable[[Repo], hub.Model], Depends(_model)]


@router.get("/api/whoami-v2", response_model=hub.User, responses=answers())
def whoami(caller: CallerDep) -> Any:
    """Whose key this is."""
    return hub.user(caller.owner)


@router.get(
    "/api/models",
    response_model=list[hub.Model],
    response_model_exclude_unset=True,
    responses={
        **answers("storage-failed"),
        200: {"headers": {"Link": {"description": "the page after this", "schema": {"type": "string"}}}},
    },
)
def list_hub_models(
    shelves: ShelvesDep,
    caller: CallerDep,
    request: Request,
    response: Response,
    only: OnlyDep,
    author: Annotated[str, Query(max_length=100, description="`merges`, `patches` or `views`")] = "merges",
    search: Annotated[str, Query(max_length=100, description="a piece of the id")] = "",
    limit: Annotated[int, Query(ge=1, description=f"of a page, which has at most {MOST_MODELS}")] = MOST_MODELS,
    cursor: Annotated[str | None, Query(max_length=100, description="where the page before this ended")] = None,
    full: Annotated[bool, Query(description="with files and cards")] = False,
    card_data: Annotated[bool, Query(alias="cardData", description="with cards")] = False,
) -> Any:
    """The caller's own, newest first."""
    limit = min(limit, MOST_MODELS)
    found = shelves[author].page(caller.owner, limit + 1, cursor) if author in shelves else []
    if len(found) > limit:
        found = found[:limit]
        response.headers["Link"] = _next(request, found[-1].id.partition("/")[2])
    with_cards = full or card_data or bool(_OF_CARDS & set(only))
    return [
        hub.model(repo, _card(repo) if with_cards else None, siblings=full or "siblings" in only, only=only)
        for repo in found
        if search.lower() in repo.id.lower()
    ]


_OF_CARDS = {"cardData", "tags", "library_name", "pipeline_tag"}


def _next(request: Request, cursor: str) -> str:
    """The Link to the page that begins after this; whole, as the Hub's clients want it."""
    kept = [pair for pair in request.query_params.multi_items() if pair[0] != "cursor"]
    return f'<{request.url.replace(query=urlencode([*kept, ("cursor", cursor)]))}>; rel="next"'


def _card(repo: Repo) -> Mapping[str, Any]:
    """What a repo's card says at its top; nothing, where it has none or it is gone."""
    file = repo.files.get(CARD_NAME)
    if file is None or file.size > MAX_CARD_BYTES:
        return {}
    try:
        return front_matter(b"".join(repo.read(CARD_NAME, 0, file.size)))
    except FileNotFoundError:
        return {}


MODEL = "/api/models/{shelf}/{repo}"


@router.get(
    MODEL,
    response_model=hub.Model,
    response_model_exclude_unset=True,
    responses=answers("not-found", "storage-failed"),
)
def read_hub_model(repo: RepoDep, describe: DescribeDep) -> Any:
    """A model's description: commit, files, what its card says."""
    return describe(repo)


@router.get(
    MODEL + "/revision/{revision:path}",
    response_model=hub.Model,
    response_model_exclude_unset=True,
    responses=answers("not-found", "storage-failed"),
)
def read_hub_model_at(repo: RevisionDep, describe: DescribeDep) -> Any:
    """The same at a revision."""
    return describe(repo)


@router.get(MODEL + "/auth-check", status_code=204, responses=answers("not-found"))
def check_hub_access(repo: RepoDep) -> None:
    """Whether the caller may read it: they may, or there is nothing."""


@router.get(MODEL + "/refs", response_model=hub.Refs, responses=answers("not-found"))
def list_hub_refs(repo: RepoDep) -> Any:
    """The branches: `main` alone."""
    return hub.refs(repo)


@router.get(MODEL + "/commits/{revision:path}", response_model=list[hub.Commit], responses=answers("not-found"))
def list_hub_commits(repo: RevisionDep, caller: CallerDep) -> Any:
    """The commits: one."""
    return hub.commits(repo, caller.owner)


TREE: dict[str, Any] = {
    "response_model": list[hub.Entry],
    "response_model_exclude_unset": True,
    "responses": {
        **answers("not-found"),
        200: {"headers": {"Link": {"description": "the page after this", "schema": {"type": "string"}}}},
    },
}


@router.get(MODEL + "/tree/{revision}", name="list_hub_tree", **TREE)
@router.get(MODEL + "/tree/{revision}/{path:path}", name="list_hub_folder", **TREE)
def list_hub_tree(
    repo: RepoDep,
    revision: Revision,
    request: Request,
    response: Response,
    path: str = "",
    recursive: Annotated[bool, Query(description="with all that is below")] = False,
    expand: Annotated[bool, Query(description="with the commit")] = False,
    limit: Annotated[int, Query(ge=1, le=MOST_ENTRIES, description="of a page")] = MOST_ENTRIES,
    cursor: Annotated[str, Query(description="the last path of the page before this")] = "",
) -> Any:
    """The files and folders in a folder."""
    revision, path = hub.split_revision(revision, path)
    repo = hub.at_revision(repo, revision)
    paths = [each for each in hub.paths_below(repo, path.strip("/"), recursive=recursive) if each > cursor]
    if len(paths) > limit:
        paths = paths[:limit]
        response.headers["Link"] = _next(request, paths[-1])
    return [hub.entry(repo, each, expand=expand) for each in paths]


async def _asked_paths(request: Request) -> tuple[list[str], bool]:
    """The paths and whether to expand, from a form or from JSON."""
    body = await read_body(request, MAX_PATHS_BYTES)
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            asked = json.loads(body)
            paths, expand = asked["paths"], asked.get("expand", False)
        else:
            form = parse_qs(body.decode())
            paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() in ("true", "1")
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise HttpProblem("invalid-request", "send paths=… as a form, or JSON with a list of texts, paths") from None
    if len(paths) > MOST_ENTRIES:
        raise HttpProblem("invalid-request", f"these are {len(paths):,} paths; ask for at most {MOST_ENTRIES:,}")
    return paths, bool(expand)


PATHS: dict[str, Any] = {
    "type": "object",
    "required": ["paths"],
    "properties": {"paths": {"type": "array", "items": {"type": "string"}}, "expand": {"type": "boolean"}},
}


@router.post(
    MODEL + "/paths-info/{revision:path}",
    response_model=list[hub.Entry],
    response_model_exclude_unset=True,
    responses=answers("not-found", "invalid-request", "payload-too-large", "unsupported-media-type"),
    openapi_extra={
        "requestBody": {
            "content": {kind: {"schema": PATHS} for kind in ("application/json", "application/x-www-form-urlencoded")}
        }
    },
)
def read_hub_paths(repo: RevisionDep, asked: Annotated[tuple[list[str], bool], Depends(_asked_paths)]) -> Any:
    """The files and folders of these paths; those that are not there are left away."""
    paths, expand = asked
    found = (hub.entry(repo, path.strip("/"), expand=expand) for path in dict.fromkeys(paths))
    return [entry for entry in found if entry is not None]


def _with_headers(documented: dict[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    more = {name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in _RESOLVED.items()}
    return {
        status: {**answer, "headers": answer["headers"] | more} if "headers" in answer else answer
        for status, answer in documented.items()
    }


@router.get(
    "/{shelf}/{repo}/resolve/{revision}/{path:path}", response_class=FileResponse, responses=_with_headers(ANSWERS)
)
def download_hub_file(
    path: str,
    repo: RepoDep,
    revision: Revision,
    request: Request,
    range_: Annotated[str | None, Header(alias="Range", description="`bytes=0-99`, several parts too")] = None,
    if_range: Annotated[str | None, Header(description="the ETag for which `Range` is meant")] = None,
    if_match: Annotated[str | None, Header(description="the ETag that is asked for")] = None,
    if_none_match: Annotated[str | None, Header(description="the ETag of what the caller has")] = None,
) -> Response:
    """One file, as everywhere here: see the files of a job."""
    revision, path = hub.split_revision(revision, path)
    repo = hub.at_revision(repo, revision)
    if (file := repo.files.get(path)) is None:
        raise hub.no_entry(repo, path)
    return send_file(request, repo, file, hub.file_headers(repo, file))


@router.api_route(
    "/{anything:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False, name="no_hub_route"
)
def no_such_thing(anything: str, request: Request) -> None:
    """All else that a client of the Hub may ask for: other people's models, data sets, uploads."""
    if request.method == "GET":
        raise hub.no_repo(re.sub("^api/(models|datasets|spaces)/", "", anything))
    detail = "this Hub is read-only; to publish a merge on another, say so in the recipe's outputs"
    raise HttpProblem("method-not-allowed", detail, headers={"Allow": "GET, HEAD"})
