"""Counter-based random numbers: a number is a pure function of a key and an index, so no order, block or device
matters.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3. The 64-bit key
comes from the seed, the model and the tensor name; the 64-bit counter is the element index divided by four, each
counter giving four numbers.
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


def philox(key: int, counters: Tensor) -> list[Tensor]:
    """The four 32-bit words of each counter (int64, any shape), as int64 tensors of the same shape."""
    words = [counters & _WORD, (counters >> 32) & _WORD, torch.zeros_like(counters), torch.zeros_like(counters)]
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


def uniform(key: int, start: int, count: int) -> Tensor:
    """Numbers in [0, 1) for the element indices `start` to `start + count`: `[count]`, float32, multiples of 2⁻²⁴."""
    first, last = start // 4, (start + count + 3) // 4
    words = philox(key, torch.arange(first, last, dtype=torch.int64))
    numbers = torch.stack(words, dim=1).reshape(-1)[start - 4 * first :][:count]
    return (numbers >> 8).to(torch.float32) * 2.0**-24
