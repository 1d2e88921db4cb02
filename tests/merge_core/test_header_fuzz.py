"""Headers against the safetensors library: what it refuses we refuse, and what we read it reads alike.

Files are made valid, then broken in ways that only somebody who knows the format would think of.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import safetensors
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from merge_core.errors import CheckpointError
from merge_core.headers import read_header

STRICTER = [
    (r"key .* appears twice", "a key twice: the library keeps one of them"),
    (r"a tensor name that cannot be used", "names that are empty, too long or not printable"),
    (r"from its first byte", "space before the header"),
    (r"no whole numbers of a sensible size", "more than 16 dimensions, or one beyond 2^56"),
    (r"without dtype, shape and data_offsets", "keys in an entry that nobody knows"),
    (r"a dtype we do not know", "number formats that nothing is merged in"),
    (r"is no number$", "NaN and Infinity"),
]
"""Why we refuse what the library reads."""
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "BOOL": 1, "F64": 8, "F8_E4M3": 1, "F4": 0.5, "U16": 2, "C64": 8}
ODD_NUMBERS: list[Any] = [-1, 0, 1, 2, 3, 2**31, 2**53 + 1, 2**56, 2**63, 2**64, 10**30, 1.0, 2.5, True, None, "2", []]
ODD_NAMES = [
    "",
    "a",
    "__metadata__",
    "../../x",
    "a\x00b",
    "a\u202eb",
    "ä",
    "a" * 1025,
    "\ud800",
    "a b",
    "a\nb",
    "\ufeff",
]
ODD_DTYPES: list[Any] = [*SIZES, "f32", "F17", "", None, 4, ["F32"], "F6_E2M3", "E8M0"]
ODD_METADATA: list[Any] = [{}, {"format": "pt"}, {"a": 1}, {"a": None}, [], "x", None, {"a": {}}, {"": ""}]
NOISE = [b" ", b"\n", b"\0", b"}", b"x", b"\xff", b"\xef\xbb\xbf", b'{"a":1}']

shapes = st.lists(st.integers(0, 4), max_size=4)
tensors = st.lists(
    st.tuples(st.sampled_from(["w", "b", "layer.0.w", "z"]), st.sampled_from(["F32", "BF16", "I8", "BOOL"]), shapes),
    max_size=4,
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file of some tensors with some number of things wrong."""
    entries: list[tuple[str, Any]] = []
    at = 0
    for name, dtype, shape in draw(tensors):
        size = int(SIZES[dtype])
        for length in shape:
            size *= length
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}))
        at += size
    if draw(st.booleans()):
        entries = [(f"{i}{name}", entry) for i, (name, entry) in enumerate(entries)]
    data = bytes(draw(st.integers(0, 255)) for _ in range(min(at, 4))) * (at // 4 + 1)
    data = data[:at]
    before = after = b""
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["entry", "name", "order", "twice", "metadata", "data", "noise"]))
        event(kind)
        if kind == "entry" and entries:
            _break_entry(draw, entries[draw(st.integers(0, len(entries) - 1))][1])
        elif kind == "name" and entries:
            place = draw(st.integers(0, len(entries) - 1))
            entries[place] = (draw(st.sampled_from(ODD_NAMES)), entries[place][1])
        elif kind == "order":
            entries = draw(st.permutations(entries))
        elif kind == "twice" and entries:
            entries.append(draw(st.sampled_from(entries)))
        elif kind == "metadata":
            entries.append(("__metadata__", copy.deepcopy(draw(st.sampled_from(ODD_METADATA)))))
        elif kind == "data":
            data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=9))
        elif draw(st.booleans()):
            before += draw(st.sampled_from(NOISE))
        else:
            after += draw(st.sampled_from(NOISE))
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + "}"
    codec = draw(st.sampled_from(["utf-8"] * 20 + ["utf-16-le", "utf-32"]))
    header = before + text.encode(codec) + after
    length = len(header) + draw(st.sampled_from([0] * 20 + [-1, 1, 8, 2**63]))
    raw = max(length, 0).to_bytes(8, "little") + header + data
    if draw(st.integers(0, 9)) == 0 and raw:
        place = draw(st.integers(0, len(raw) - 1))
        raw = raw[:place] + bytes([draw(st.integers(0, 255))]) + raw[place + 1 :]
    return raw


def _break_entry(draw: st.DrawFn, entry: Any) -> None:
    if not isinstance(entry, dict):
        return
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
    if key == "dtype":
        entry[key] = draw(st.sampled_from(ODD_DTYPES))
    elif key == "other":
        entry[draw(st.sampled_from(["extra", "dtype", "shape", "data_offsets"]))] = copy.deepcopy(
            draw(st.sampled_from(ODD_METADATA))
        )
    elif isinstance(entry.get(key), list):
        numbers = list(entry[key])
        numbers.insert(draw(st.integers(0, len(numbers))), draw(st.sampled_from(ODD_NUMBERS)))
        entry[key] = numbers if draw(st.booleans()) else numbers[1:]


def theirs(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        found = safetensors.deserialize(raw)
    except SafetensorError:
        return None
    return {name: (each["dtype"], tuple(each["shape"]), bytes(each["data"])) for name, each in found}


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(raw=files())
def test_the_library_and_we_agree_but_where_we_are_stricter(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    expected = theirs(raw)

    try:
        _, infos = read_header(path)
    except CheckpointError as error:
        if expected is not None:
            reasons = [what for pattern, what in STRICTER if re.search(pattern, str(error))]
            assert reasons, f"the library reads it, and no reason is listed: {error}"
            event(f"stricter: {reasons[0]}")
        return
    event("both read it")
    assert expected is not None, "we read what the library refuses"
    ours = {info.name: (info.dtype.name, info.shape, raw[info.begin : info.begin + info.nbytes]) for info in infos}
    assert ours == expected
