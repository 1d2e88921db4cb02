"""Templates, and the files beside them."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from app.armor import PAGE_POLICY
from app.auth import Caller
from app.pages import words
from app.sessions import COOKIE
from merge_core import __version__

_HERE = Path(__file__).parent
_STATIC = _HERE / "static"
TABS = (
    ("/", "New merge"),
    ("/jobs", "Jobs"),
    ("/compare", "Compare models"),
    ("/methods", "Methods"),
    ("/settings", "Settings"),
)
"""The address and the name of each page that all pages lead to, in order."""


def _digest() -> str:
    """Of every file that pages use: it is part of their addresses, so that browsers may keep them for ever."""
    found = hashlib.sha256()
    for path in sorted(path for path in _STATIC.rglob("*") if path.is_file()):
        found.update(path.relative_to(_STATIC).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


STATIC_URL = f"/static/{_digest()}"


@functools.cache
def exists(path: str) -> bool:
    """Whether there is such a template or file, below `templates/` or `static/`."""
    return (_HERE / path).is_file()


class Static(StaticFiles):
    """The files that pages use, never to be asked for again."""

    def __init__(self) -> None:
        super().__init__(directory=_STATIC)

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


@functools.cache
def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"static": STATIC_URL, "version": __version__, "job_name": words.job_name}
    made.filters |= words.FILTERS
    return made


class Page:
    """Renders templates in answer to one request."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __call__(self, template: str, /, *, status: int = 200, **context: Any) -> HTMLResponse:
        """A whole page, or a part of one, as HTML. What a template needs besides, every template has: `path`, the
        `tabs`, `is_signed_in`, and `owner`, who asks.
        """
        caller = getattr(self._request.state, "caller", None)
        about = {
            "path": self._request.url.path,
            "tabs": TABS,
            "is_signed_in": COOKIE in self._request.cookies,
            "owner": caller.owner if isinstance(caller, Caller) else "",
        }
        made = _templates().get_template(template).render(about | context)
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store"}
        return HTMLResponse(made, status, headers)


PageDep = Annotated[Page, Depends(Page)]
