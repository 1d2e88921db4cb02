"""New merge: a form and a text that are one recipe, and what that would do."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from app.pages.rendering import PageDep
from merge_core.documents import MAX_DOCUMENT_BYTES
from merge_core.methods import METHODS

router = APIRouter()


@router.get("/")
def begin(page: PageDep) -> HTMLResponse:
    """The form, which the browser fills from `/v1/methods` and `/v1/models`."""
    methods = [(name, next(iter(meanings.values())).title) for name, meanings in METHODS.items()]
    return page("merging.html", methods=methods, limit=MAX_DOCUMENT_BYTES)
