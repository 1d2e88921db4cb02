"""Random numbers are a pure function of key and index."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_core.random import philox, stream_key, uniform


def test_known_answers_of_philox4x32_10() -> None:
    """From the Random123 distribution's known-answer file (counters in the low two words)."""
    zero = [int(word) for word in philox(0, torch.zeros(1, dtype=torch.int64))]
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(st.integers(0, 2**40), st.integers(1, 300), st.integers(0, 299))
def test_any_part_of_a_stream_is_the_same_numbers(start: int, count: int, cut: int) -> None:
    cut = min(cut, count)
    whole = uniform(17, start, count)

    parts = torch.cat([uniform(17, start, cut), uniform(17, start + cut, count - cut)])

    assert torch.equal(whole, parts)
    assert whole.dtype == torch.float32
    assert float(whole.min()) >= 0 and float(whole.max()) < 1


def test_numbers_are_uniform_and_keys_independent() -> None:
    one, other = uniform(stream_key(0, 0, "a"), 0, 200_000), uniform(stream_key(0, 1, "a"), 0, 200_000)

    counts = torch.histc(one, bins=20, min=0, max=1)

    chi_squared = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_squared < 43.8  # 99.9 % of 19 degrees of freedom
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.01


def test_seed_model_and_tensor_each_make_another_stream() -> None:
    keys = {stream_key(seed, model, tensor) for seed in (0, 1) for model in (0, 1) for tensor in ("a", "b")}
    assert len(keys) == 8
