"""Secrets in what is logged: found by how they look, and taken out.

The second line of defence. The first is that a secret is never put into a message: credentials are named, keys are
digested. This is for what others put together: an exception's text, a URL, a header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

REDACTED = "[redacted]"
_NAMES = r"(?:secret|token|password|passwd|passphrase|credential|api[_-]?key|access[_-]?key)"
_QUOTE = r"(?:(?:b(?=['\"]))?['\"])?"
_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(shape, re.IGNORECASE), instead)
    for shape, instead in (
        # Our keys, the Hub's tokens, webhooks' signing secrets: the prefix stays, so that one sees what it was.
        (r"(?<![a-z0-9])((?:wsk|hf|api_org|whsec)_)[a-z0-9+/=_-]{8,}", rf"\1{REDACTED}"),
        (r"(?<![a-z0-9])((?-i:AKIA|ASIA))(?-i:[A-Z0-9]{16}(?![A-Z0-9]))", rf"\1{REDACTED}"),
        (rf"(authorization['\"]?\s*[:=,]\s*{_QUOTE}(?:(?:basic|bearer|digest)\s+)?)[^\s'\",;)]+", rf"\1{REDACTED}"),
        (r"\b((?:bearer|basic)\s+)[a-z0-9._~+/=-]{8,}", rf"\1{REDACTED}"),
        (r"([a-z][a-z0-9+.-]{0,20}://[^\s:/@]{0,200}):[^\s/@]{1,1000}@", rf"\1:{REDACTED}@"),
        (r"([?&](?:x-amz-(?:signature|credential|security-token)|sig|signature)=)[^&\s'\"]+", rf"\1{REDACTED}"),
        (rf"({_NAMES}['\"]?\s*[=:]\s*{_QUOTE})(?!\[redacted\])[^\s'\",;&)}}\]]+", rf"\1{REDACTED}"),
    )
)
"""What each looks like and what stands in its place. None looks back far: a hostile text costs no more than another."""
_SECRET_KEY = re.compile(rf"^(?:[\w-]*[_-])?(?:{_NAMES}|authorization|cookie|set-cookie)(?:s|[_-]id)?$", re.I)


def redact(text: str) -> str:
    """The text without what looks like a secret.

    >>> redact("GET https://hub/x failed with Authorization: Bearer hf_abcdefghijklmnop")
    'GET https://hub/x failed with Authorization: Bearer [redacted]'
    >>> redact("redis://:hunter2@cache:6379/0 refused")
    'redis://:[redacted]@cache:6379/0 refused'
    """
    for shape, instead in _SHAPES:
        text = shape.sub(instead, text)
    return text


def redacted(value: Any) -> Any:
    """The same value, with every text in it redacted, and whatever stands under a name such as `token` taken out."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, bytes):
        return redact(value.decode(errors="backslashreplace"))
    if isinstance(value, Mapping):
        return {key: REDACTED if _is_secret(key, each) else redacted(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(each) for each in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(repr(value))


def redact_event(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor for structlog: put it after whatever turns exceptions into text, before what renders."""
    for key, value in event.items():
        event[key] = REDACTED if _is_secret(key, value) else redacted(value)
    return event


def _is_secret(key: object, value: object) -> bool:
    if not value or isinstance(value, bool | int | float):
        return False
    return isinstance(key, str) and bool(_SECRET_KEY.match(key))
