"""Counter-based random numbers: a number is a pure function of a key and an index, so no order, block or device
matters.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3. The 64-bit key
comes from the seed, the model and the tensor name; the low 64 bits of the counter follow the element index, the third
word is the stream. A number has 24 bits: the high 8 are a byte of stream 0, the low 16 a half-word of stream 1. So
whoever compares a number with a threshold needs the second stream once in 256 times only.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def stream_key(seed: int, model: int, tensor: str) -> int:
    """A 64-bit key for one model (its index in the recipe) and one output tensor."""
    text = f"{seed}\0{model}\0{tensor}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def philox(key: int, counters: Tensor, stream: int = 0) -> list[Tensor]:
    """The four 32-bit words of each counter (int64, any shape), as int64 tensors of the same shape."""
    words = [counters & _WORD, (counters >> 32) & _WORD, torch.full_like(counters, stream), torch.zeros_like(counters)]
    low, high = key & _WORD, key >> 32
    for _ in range(_ROUNDS):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((second >> 32) & _WORD) ^ words[1] ^ low,
            second & _WORD,
            ((first >> 32) & _WORD) ^ words[3] ^ high,
            first & _WORD,
        ]
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return words


def uniform(key: int, start: int, count: int, device: torch.device | None = None) -> Tensor:
    """Numbers in [0, 1) for the element indices `start` to `start + count`: `[count]`, float32, multiples of 2⁻²⁴."""
    high = _parts(key, 0, 8, start, count, device)
    low = _parts(key, 1, 16, start, count, device)
    return (high << 16 | low).to(torch.float32) * 2.0**-24


def _parts(key: int, stream: int, bits: int, start: int, count: int, device: torch.device | None) -> Tensor:
    """The elements' parts of a stream, each of so many bits, the lowest bits of a word first: `[count]`, int64."""
    per_word = 32 // bits
    first = start // (4 * per_word)
    last = -(-(start + count) // (4 * per_word))
    words = torch.stack(philox(key, torch.arange(first, last, dtype=torch.int64, device=device), stream), dim=1)
    shifts = bits * torch.arange(per_word, dtype=torch.int64, device=device)
    parts = (words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return parts.reshape(-1)[start - 4 * per_word * first :][:count]


def permutation(key: int, count: int) -> Tensor:
    """The numbers 0 to `count` in a random order: `[count]`, int64."""
    first, second, *_ = philox(key, torch.arange(count, dtype=torch.int64), stream=2)
    return torch.argsort(first << 31 ^ second, stable=True)
