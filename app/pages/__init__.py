"""The page: what people see in a browser. Rendered here, made lively by htmx and small modules of our own."""

from __future__ import annotations

from fastapi import FastAPI

from app.pages import (
    api_reference,
    calibrating,
    catalogue,
    comparing,
    jobs,
    merging,
    one_job,
    searching,
    settings,
    signing_in,
)
from app.pages.rendering import STATIC_URL, Static

PAGES = (signing_in, merging, jobs, one_job, searching, calibrating, comparing, catalogue, settings, api_reference)


def install(app: FastAPI) -> None:
    """Add every page, and the files that they use."""
    app.mount(STATIC_URL, Static())
    for page in PAGES:
        app.include_router(page.router, include_in_schema=False)
