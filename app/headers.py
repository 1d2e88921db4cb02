"""Headers that several routes read and write in the same way."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlencode

from fastapi import Request

MAX_WAIT_SECONDS = 60


def tags(request: Request, header: str) -> set[str]:
    """The entity tags in a header, as they are written."""
    return {tag.strip() for line in request.headers.getlist(header) for tag in line.split(",") if tag.strip()}


def is_known(request: Request, etag: str) -> bool:
    """Whether the caller has what the tag stands for (If-None-Match, compared weakly)."""
    known = {tag.removeprefix("W/") for tag in tags(request, "if-none-match")}
    return bool(known & {etag.removeprefix("W/"), "*"})


def next_link(request: Request, after: str | int) -> str:
    """The Link (RFC 8288) to the page that begins after this; all other parameters stay."""
    kept = [(name, value) for name, value in parse_qsl(request.url.query, keep_blank_values=True) if name != "after"]
    return f'<{request.url.path}?{urlencode([*kept, ("after", after)])}>; rel="next"'


def preferred_wait(request: Request) -> int | None:
    """`Prefer: wait=n` (RFC 7240): how many seconds the caller would like to wait; at most a minute."""
    for line in request.headers.getlist("prefer"):
        for preference in line.split(","):
            if found := re.fullmatch(r'wait\s*=\s*"?(\d{1,9})"?', preference.partition(";")[0].strip(), re.IGNORECASE):
                return min(int(found[1]), MAX_WAIT_SECONDS)
    return None


def preferred_type(request: Request, *offered: str) -> str:
    """Which of the media types the caller's Accept likes best; the first of them if it says nothing of any."""
    wanted: dict[str, float] = {}
    for line in request.headers.getlist("accept"):
        for part in line.split(","):
            kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
            quality = next((given[2:] for given in parameters if given.startswith("q=")), "1")
            wanted[kind] = float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality) else 1.0

    def liking(kind: str) -> float:
        return wanted.get(kind, wanted.get(f"{kind.partition('/')[0]}/*", wanted.get("*/*", 0.0)))

    return max(offered, key=liking)
