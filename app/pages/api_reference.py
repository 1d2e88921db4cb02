"""`/docs`: the API, to be read and tried."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from app.armor import PAGE_POLICY
from app.pages.rendering import PageDep

router = APIRouter()


@router.get("/docs")
def read(page: PageDep) -> HTMLResponse:
    """Swagger UI over the OpenAPI document."""
    answer = page("api_reference.html")
    # It writes styles of its own into the page.
    answer.headers["Content-Security-Policy"] = PAGE_POLICY.replace(
        "style-src 'self'", "style-src 'self' 'unsafe-inline'"
    )
    return answer
