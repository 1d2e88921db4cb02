"""Secrets are taken out of what is logged, in whatever they are wrapped; the rest stays as it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.redaction import REDACTED, redact, redact_event, redacted

_WORD = "ABCDEFGHJKMNPQRSTVWXYZabcdefghijkmnpqrstuvwxyz23456789"


def _of(least: int, most: int, alphabet: str = _WORD) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=least, max_size=most)


SECRETS = st.one_of(
    _of(43, 43).map("wsk_{}".format),
    _of(30, 40).map("hf_{}".format),
    _of(24, 40).map("whsec_{}".format),
    _of(16, 16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789").map("AKIA{}".format),
)
"""What is known by its own look."""
WRAPPINGS: dict[str, Callable[[str], str]] = {
    "alone": lambda secret: secret,
    "in a sentence": lambda secret: f"the token {secret} was refused by the Hub; try another",
    "in a URL": lambda secret: f"GET https://hub.example/api?x=1&token={secret}&y=2 gave 403",
    "as a password": lambda secret: f"https://user:{secret}@hub.example/x",
    "in a repr": lambda secret: repr({"headers": [("authorization", f"Bearer {secret}")]}),
    "in JSON": lambda secret: f'{{"secret": "{secret}"}}',
    "after an equals sign": lambda secret: f"--token={secret}",
    "in lines": lambda secret: f"Traceback\n  File x\nValueError: {secret}\n",
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@given(secret=SECRETS)
def test_a_secret_is_taken_out_of_any_wrapping(wrapping: str, secret: str) -> None:
    text = WRAPPINGS[wrapping](secret)
    assert secret[8:] not in redact(text) and REDACTED in redact(text)
    assert secret[8:] not in str(redacted({"a": [text, (text, {"b": text.encode()})], "c": RuntimeError(text)}))


@given(secret=_of(8, 40).map("7Z{}".format))
def test_a_secret_without_a_look_is_known_by_its_place(secret: str) -> None:
    for text in (
        f"Authorization: Bearer {secret}",
        f"authorization: {secret}",
        f"{{'Authorization': 'Basic {secret}'}}",
        f"(b'authorization', b'{secret}')",
        f"postgresql://weightsmith:{secret}@db/jobs",
        f"redis://:{secret}@cache:6379/0",
        f"AWS_SECRET_ACCESS_KEY={secret}",
        f"password: '{secret}'",
        f"https://bucket.example/x?X-Amz-Signature={secret}&a=b",
    ):
        assert secret not in redact(text).replace(REDACTED, ""), text
    for key in ("token", "hub_token", "secret", "Authorization", "api_key", "access_key_id", "Set-Cookie", "password"):
        assert redacted({key: secret}) == {key: REDACTED}


@pytest.mark.parametrize(
    "text",
    [
        "mrg_01JABCDEFGHJKMNPQRSTVWXYZ0 succeeded after 3.2 s",
        "model.layers.0.self_attn.q_proj.weight is [4, 3] in models[1] but [3, 4] in the base",
        "add_special_tokens: the tokenizer has no chat template",
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "http://127.0.0.1:8000/v1/merges",
        "wsk_ and hf_ are prefixes; half_reset is a method",
        "meta-llama/Llama-3.1-8B@0e9e39f249a16976918f6564b8830bc894c89659",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_values_stay_what_they_are() -> None:
    event: dict[str, Any] = {"event": "merged", "tokens": 5, "seconds": 1.5, "done": True, "job": None, "token": None}
    assert redact_event(None, "info", dict(event)) == event
    assert redact_event(None, "info", {"event": "called", "token": "x", "url": "s3://a:b@c"}) == {
        "event": "called",
        "token": REDACTED,
        "url": f"s3://a:{REDACTED}@c",
    }


@given(text=st.text(max_size=200))
def test_twice_is_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


def test_long_texts_take_no_longer_than_they_must() -> None:
    """No shape goes back over what it has read, which would make minutes of a hostile text of 200 kB."""
    started = time.process_time()
    for piece in ("authorization", "a" * 9, "token=", "hf_", "x://", "'", "secret_", ":"):
        redact(piece * (200_000 // len(piece)))
    assert time.process_time() - started < 10
