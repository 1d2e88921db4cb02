"""Patterns match as PEFT's expression does, and cannot take forever."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_core.errors import CheckpointError
from merge_core.patterns import Patterns

PIECES = ["q", "a", "layers", ".", r"\.", ".*", "[0-9]+", r"\d", "1", "a?", "(1|2)", "a*", "-", "^"]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), st.text("aq12.-", min_size=1, max_size=12))
def test_plain_patterns_match_as_regular_expressions_do(pieces: list[str], name: str) -> None:
    pattern = "".join(piece for i, piece in enumerate(pieces) if i == 0 or piece != "^")
    try:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        expected = False
    try:
        found = Patterns(Path("c"), "key", {pattern: 1}).get(name) is not None
    except CheckpointError:
        return
    # A plain name means its dots; PEFT would take any character for them.
    assert found == expected or (re.fullmatch(r"[\w.-]+", pattern) is not None and "." in pattern)


def test_the_first_that_matches_counts() -> None:
    patterns = Patterns(Path("c"), "key", {".*q": 1, "layers.0.q": 2, "k|v": 3, "^layers.1.o": 4, "o$": 5})
    names = ["layers.0.q", "a.k", "a.v", "layers.1.o", "x.layers.1.o", "a.w"]
    assert [patterns.get(name) for name in names] == [1, 3, 3, 4, 5, None]


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "a{9}", "(?=a)", "a**", "[^a]", r"(a)\$", "", "(a", "a)", "[z-a]", "^"]
)
def test_other_expressions_are_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="no plain one"):
        Patterns(Path("c"), "key", {pattern: 1})


def test_hostile_patterns_end_soon() -> None:
    patterns = Patterns(Path("c"), "key", {".*" * 400 + f"{i}b": 1 for i in range(100)})
    with pytest.raises(CheckpointError, match="too many patterns"):
        for i in range(1000):
            patterns.get(f"a{i}")
