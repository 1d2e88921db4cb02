"""The dependencies a route may ask for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any

import yaml
from fastapi import Depends, Header, Path, Request
from fastapi.concurrency import run_in_threadpool

from app.auth import CallerDep
from app.errors import HttpProblem
from app.repos import Shelf
from app.watching import Watch
from merge_core.documents import MAX_DOCUMENT_BYTES
from merge_core.published import MAX_CARD_BYTES
from merge_core.recipe import Recipe
from workers.idempotency import RequestKey
from workers.jobs import JobKind
from workers.kinds import WORK, Document
from workers.queue import Queue
from workers.settings import Settings
from workers.tables import Job

YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml", "text/plain")


def _settings(request: Request) -> Settings:
    found = request.app.state.settings
    assert isinstance(found, Settings)
    return found


def _queue(request: Request) -> Queue:
    found = request.app.state.queue
    assert isinstance(found, Queue)
    return found


def _watch(request: Request) -> Watch:
    found = request.app.state.watch
    assert isinstance(found, Watch)
    return found


def _shelves(request: Request) -> Mapping[str, Shelf]:
    found = request.app.state.shelves
    assert isinstance(found, Mapping)
    return found


SettingsDep = Annotated[Settings, Depends(_settings)]
QueueDep = Annotated[Queue, Depends(_queue)]
WatchDep = Annotated[Watch, Depends(_watch)]
ShelvesDep = Annotated[Mapping[str, Shelf], Depends(_shelves)]


async def _document_body(request: Request) -> bytes:
    return await read_body(request, MAX_DOCUMENT_BYTES)


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


BodyDep = Annotated[bytes, Depends(_document_body)]


def document_of(kind: JobKind) -> Callable[..., Awaitable[Any]]:
    """Reads the body as a document of this kind: JSON, which is YAML too, or YAML."""
    document = WORK[kind]().document

    async def read(request: Request, body: BodyDep) -> Document:
        media_type = _media_type(request)
        if media_type not in ("application/json", *YAML_TYPES):
            name = document.__name__.lower()
            detail = f"send a {name} as application/json or application/yaml, not {media_type[:100]}"
            raise HttpProblem("unsupported-media-type", detail)
        return await run_in_threadpool(document.from_text, body)

    return read


def _request_key(
    request: Request,
    caller: CallerDep,
    body: BodyDep,
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern="^[!-~]{1,255}$",
            description="a key of your own for this request, such as a UUID: sent again, it makes no second job",
        ),
    ] = None,
) -> RequestKey | None:
    """The key of a request, and a digest of all that decides what it asks for; how long to wait does not."""
    if idempotency_key is None:
        return None
    asked = sorted(pair for pair in request.query_params.multi_items() if pair[0] != "wait")
    told = [request.headers.get(name) for name in ("webhook-url", "webhook-events")]
    what = [request.method, request.url.path, asked, told, _media_type(request), hashlib.sha256(body).hexdigest()]
    return RequestKey(caller.owner, idempotency_key, hashlib.sha256(json.dumps(what).encode()).hexdigest())


RequestKeyDep = Annotated[RequestKey | None, Depends(_request_key)]


async def _card(request: Request) -> bytes:
    """The body as it is: a recipe or a model card, whatever it calls itself."""
    return await read_body(request, MAX_CARD_BYTES)


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request, of at most so many bytes."""
    return b"".join([part async for part in body_parts(request, most)])


async def body_parts(request: Request, most: int, piece: int = 0) -> AsyncIterator[bytes]:
    """The body of a request as it comes, at most so many bytes, in parts of `piece` or more but for the last."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise HttpProblem("unsupported-media-type", f"send the body as it is, without Content-Encoding: {coding[:60]}")
    waiting, count = bytearray(), 0
    async for part in request.stream():
        waiting += part
        count += len(part)
        if count > most:
            detail = f"at most {most:,} bytes are read here"
            raise HttpProblem("payload-too-large", detail, headers={"Connection": "close"})
        if len(waiting) > piece:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)


def job_of(kind: JobKind) -> Callable[..., Job]:
    """Finds the caller's job of this kind that the path names."""

    def find(job_id: Annotated[str, Path(max_length=32)], queue: QueueDep, caller: CallerDep) -> Job:
        job = queue.store.find(job_id, caller.owner, kind)
        if job is None:
            raise HttpProblem("not-found", f"there is no {kind} {job_id[:60]!r}")
        return job

    return find


_EXAMPLES: dict[JobKind, Any] = {
    JobKind.MERGE: {
        "merge_method": "ties",
        "base_model": "mistral-7b",
        "models": [
            {"model": "mistral-7b-chat", "parameters": {"weight": 0.6, "density": 0.5}},
            {"model": "mistral-7b-code", "parameters": {"weight": 0.4, "density": [0.3, 0.7]}},
        ],
        "dtype": "bfloat16",
    },
    JobKind.ALIGNMENT: {"models": ["first", "second"], "alignment": {"to": "first"}},
    JobKind.PATCH: {
        "operation": "apply",
        "model": "classifier",
        "patches": [{"patch": "blur", "strength": 0.5}],
    },
    JobKind.VERIFICATION: {"model": "mistral-7b-merged", "sample": 20},
    JobKind.SEARCH: {
        "merge_method": "task_arithmetic",
        "base_model": "mistral-7b",
        "models": [{"model": "mistral-7b-chat", "parameters": {"weight": 1}}],
        "search": {
            "method": "tpe",
            "trials": 40,
            "space": {"lambda": {"low": 0, "high": 1}},
            "evaluator": {"http": {"url": "https://evaluate.example.org"}},
            "metrics": {"accuracy": "maximize"},
        },
    },
    JobKind.CALIBRATION: {
        "merge_method": "expert_merging",
        "base_model": "mistral-7b",
        "models": [{"model": "mistral-7b-chat"}, {"model": "mistral-7b-code"}],
        "calibrate": {
            "method": "expert_merging",
            "data": [
                {"model": "mistral-7b-chat", "file": "chat.jsonl"},
                {"model": "mistral-7b-code", "file": "code.jsonl"},
            ],
        },
        "limits": {"memory": "4GiB"},
    },
    JobKind.VIEW: {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("mistral-7b-chat", "mistral-7b-code")],
    },
    JobKind.ANALYSIS: {"base_model": "mistral-7b", "models": ["mistral-7b-chat", "mistral-7b-code"], "density": 0.2},
}


def document_body(kind: JobKind) -> dict[str, Any]:
    """What the OpenAPI document says of a document's body, which is read by hand because it may be YAML."""
    work = WORK[kind]()
    name = work.document.__name__
    schema: dict[str, Any] = {"$ref": f"#/components/schemas/{name}"}
    if work.in_stages:
        schema = {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}
    written = f"the same as {name} in YAML" + (", of one document or several" if work.in_stages else "")
    example = _EXAMPLES[kind]
    text = yaml.safe_dump(example, sort_keys=False)
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schema, "examples": {"usual": {"value": example}}},
                "application/yaml": {
                    "schema": {"type": "string", "description": written},
                    "examples": {"usual": {"value": text}},
                },
            },
        }
    }


RecipeDep = Annotated[Recipe, Depends(document_of(JobKind.MERGE))]
CardDep = Annotated[bytes, Depends(_card)]
CARD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "string", "description": "a published recipe, or a model card with one in it"}}
            for kind in ("application/yaml", "text/markdown")
        },
    }
}
"""What the OpenAPI document says of a published recipe's body."""
