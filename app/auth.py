"""Who is asking, and whether they may: `Gate` stands before every route, `CallerDep` says whom it let in."""

from __future__ import annotations

import copy
import ipaddress
import logging
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import exc
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from app import sessions
from app.errors import HttpProblem, answers, problem_response
from workers.credentials import NoSecretKey
from workers.jobs import JobKind
from workers.keys import EVERYTHING, PREFIX, KeyRing, Scope
from workers.problems import problem_of
from workers.queue import Queue
from workers.settings import Settings
from workers.tables import LOCAL_OWNER

SCHEME = "key"
_SAFE = ("GET", "HEAD", "OPTIONS", "TRACE")
_JOBS = "|".join(kind.plural for kind in JobKind)
_ANY = "any"
PAGES = r"/|/(jobs|compare|settings)(/.*)?"
"""What people look at, and need a key for."""
_RULES: tuple[tuple[re.Pattern[str], Scope | str | None, Scope | str | None], ...] = tuple(
    (re.compile(path, re.DOTALL), reading, writing)
    for path, reading, writing in (
        # What is the same for everybody and tells nothing of anybody.
        (r"/openapi\.json|/healthz|/readyz|/v1/(methods|problems)(/.*)?", None, None),
        (r"/(docs|sign-in|sign-out)|/(static|methods)(/.*)?", None, None),
        (PAGES, Scope.MERGES_READ, Scope.MERGES_WRITE),
        (rf"/v1/({_JOBS})/[^/]+/files(/.*)?", Scope.FILES_READ, Scope.FILES_READ),
        (rf"/v1/({_JOBS}|credentials|data)(/.*)?", Scope.MERGES_READ, Scope.MERGES_WRITE),
        (r"/hub/api/whoami-v2", _ANY, _ANY),
        # A POST there asks for paths; nothing can be written.
        (r"/hub/.*", Scope.FILES_READ, Scope.FILES_READ),
        (r"/v1/(recipes:[a-z]+|models)", Scope.MERGES_READ, Scope.MERGES_READ),
        # Who reads it can speak to the owner's webhooks as if they were us.
        (r"/v1/webhook-secret", Scope.MERGES_WRITE, Scope.MERGES_WRITE),
        (r"/v1/(api-keys(/.*)?|quota|system)", _ANY, _ANY),
    )
)
log = logging.getLogger(__name__)


class Doors(StrEnum):
    """Who is let in. `LOOPBACK`: whoever is on this machine, without a key; no other site's page in their browser."""

    KEYS = "keys"
    LOOPBACK = "loopback"
    OPEN = "none"


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request: what they make belongs to `owner`, and they see nothing else."""

    owner: str
    scopes: frozenset[Scope] = EVERYTHING
    expires_at: float | None = None

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes

    def may(self, scope: Scope | str | None) -> bool:
        """Whether a scope, or what `needed` gave, is theirs. An administrator has every scope."""
        return scope is None or scope == _ANY or scope in self.scopes or self.is_admin


NOBODY = Caller("", frozenset())


def _caller(request: Request) -> Caller:
    found = request.state.caller
    assert isinstance(found, Caller)
    return found


CallerDep = Annotated[Caller, Depends(_caller)]


def doors_for(settings: Settings, host: str | None) -> Doors:
    """Who is let in where the service listens on `host`; None: nobody knows where that is."""
    if settings.auth != "auto":
        return Doors(settings.auth)
    return Doors.LOOPBACK if host is not None and is_loopback(host) else Doors.KEYS


def doors_of(app: FastAPI) -> Doors:
    """Who is let in by an app."""
    found = app.state.doors
    assert isinstance(found, Doors)
    return found


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, and no other can reach it."""
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def needed(verb: str, path: str) -> Scope | str | None:
    """The scope that a request needs; None: it is open to all. What nobody thought of is for administrators."""
    for rule, reading, writing in _RULES:
        if rule.fullmatch(path):
            return reading if verb in _SAFE else writing
    return Scope.ADMIN


class Gate:
    """Lets in who may come in, and says who they are.

    It stands before the routes, so that none can be forgotten, and before their bodies are read.
    """

    def __init__(self, app: ASGIApp, *, doors: Doors, settings: Settings) -> None:
        self.app, self.doors, self.settings = app, doors, settings

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            caller = await self._admit(scope)
        except HttpProblem as refused:
            if refused.body["code"] == "unauthorized" and _is_looked_at(scope):
                await _sign_in(scope)(scope, receive, send)
                return
            await problem_response(refused.body, refused.headers)(scope, receive, send)
            return
        except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
            log.warning("the database cannot be used: %s", error)
            body = problem_of("database-unavailable", "the service's database cannot be used now; try again")
            await problem_response(body, {"Retry-After": "5"})(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, receive, send)

    async def _admit(self, scope: Connection) -> Caller:
        headers = Headers(scope=scope)
        verb, path = scope["method"], scope["path"]
        if "\0" in path or b"%00" in scope["query_string"]:
            # Nothing here is called so, and PostgreSQL has no text that it could be compared with.
            detail = "the address has a NUL character in it, which nothing here has"
            place = {"pointer": "#/path" if "\0" in path else "#/query", "detail": detail}
            raise HttpProblem("invalid-request", detail, errors=[place])
        session = None if "authorization" in headers else self._session(scope)
        if self.doors is not Doors.KEYS or session is not None or re.fullmatch("/sign-(in|out)", path):
            self._refuse_other_sites(verb, headers)
        wanted = needed(verb, path)
        if wanted is None:
            # A door that is open to all stays open to who holds a key that is good no more.
            return NOBODY
        written = headers.getlist("authorization")
        if self.doors is not Doors.KEYS and not any(PREFIX in each for each in written):
            # Whatever else stands there is between the caller and a proxy.
            return Caller(LOCAL_OWNER)
        caller = await self._holder(scope, written or ([f"Bearer {session}"] if session else []))
        if not caller.may(wanted):
            detail = f"this key lacks the scope {wanted}; it has {', '.join(sorted(caller.scopes)) or 'none'}"
            challenge = f'Bearer realm="weightsmith", error="insufficient_scope", scope="{wanted}"'
            raise HttpProblem("forbidden", detail, headers={"WWW-Authenticate": challenge})
        return caller

    async def _holder(self, scope: Connection, written: list[str]) -> Caller:
        """Whose key it is. Every key that is not good is refused in the same words."""
        if not written:
            detail = "a key is needed here: send it as `Authorization: Bearer wsk_…`"
            raise HttpProblem("unauthorized", detail, headers={"WWW-Authenticate": 'Bearer realm="weightsmith"'})
        kind, _, secret = written[0].partition(" ")
        key = None
        if len(written) == 1 and kind.lower() == "bearer":
            queue = scope["app"].state.queue
            assert isinstance(queue, Queue)
            key = await run_in_threadpool(KeyRing(queue.store).known, secret.strip(" "))
        if key is None:
            detail = (
                "this key is not good: it is unknown, revoked or expired, or not sent as `Authorization: Bearer wsk_…`"
            )
            challenge = 'Bearer realm="weightsmith", error="invalid_token"'
            raise HttpProblem("unauthorized", detail, headers={"WWW-Authenticate": challenge})
        return Caller(key.owner, frozenset(map(Scope, key.scopes)), key.expires_at)

    def _session(self, scope: Connection) -> str | None:
        """The key that somebody signed in with on the page."""
        try:
            return sessions.secret_in(HTTPConnection(scope), self.settings)
        except NoSecretKey:
            return None

    def _refuse_other_sites(self, verb: str, headers: Headers) -> None:
        """Without keys, or signed in, a browser would ask in its owner's name for whatever page it shows."""
        host = headers.get("host", "")
        if self.doors is Doors.LOOPBACK and not is_loopback(_name(host)):
            detail = (
                f"this service answers to localhost alone, not to {host[:100]!r}: without keys it is for this machine; "
                "behind a proxy set WEIGHTSMITH_AUTH=keys"
            )
            raise HttpProblem("misdirected-request", detail)
        origin = headers.get("origin")
        if verb not in _SAFE and origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise HttpProblem("forbidden", f"a page of {origin[:100]!r} cannot change anything here")


def _is_looked_at(scope: Connection) -> bool:
    """Whether a browser asks for a page."""
    return scope["method"] in _SAFE and re.fullmatch(PAGES, scope["path"]) is not None


def _sign_in(scope: Connection) -> RedirectResponse:
    """Where one says who one is, and goes on from there."""
    query = scope["query_string"].decode("latin-1")
    wanted = scope["path"] + (f"?{query}" if query else "")
    return RedirectResponse(f"/sign-in?next={quote(wanted, safe='/')}", 303)


def _name(host: str) -> str:
    """The name or address in a Host header."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def describe(app: FastAPI) -> None:
    """Say in the OpenAPI document which operations need a key, and how it is refused."""
    document = app.openapi()
    about = {"type": "http", "scheme": "bearer", "description": "`wsk_…`; not needed on loopback"}
    document["components"].setdefault("securitySchemes", {})[SCHEME] = about
    for path, operations in document["paths"].items():
        for verb, operation in operations.items():
            refusals = ["misdirected-request"]
            scope = needed(verb.upper(), path)
            if scope is not None:
                operation["security"] = [{SCHEME: []}]
                refusals += ["unauthorized"]
                good_for = "Any key" if scope == _ANY else f"Needs the scope `{scope}`"
                operation["description"] = f"{operation.get('description', '')}\n\n{good_for}.".lstrip()
            if scope is not None or verb.upper() not in _SAFE:
                refusals += ["forbidden"]
            for status, answer in answers(*refusals).items():
                _add_answer(operation["responses"], str(status), answer)


def _add_answer(found: dict[str, Any], status: str, answer: dict[str, Any]) -> None:
    """Document an answer beside what there is for that status; operations may share what there is."""
    if status in found:
        answer, added = copy.deepcopy(found[status]), answer
        if added["description"] not in answer["description"]:
            answer["description"] += " " + added["description"]
        for kind, content in added["content"].items():
            answer.setdefault("content", {}).setdefault(kind, {"schema": content["schema"]})
            answer["content"][kind].setdefault("examples", {}).update(content["examples"])
    found[status] = answer
