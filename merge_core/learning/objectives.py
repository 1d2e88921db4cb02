"""What is minimised. Logits are `[..., classes]`; a `mask` (`[...]`) says which of their places count, all without it.
Every objective is a mean over the places that count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """−log p(label), with the number of the right class in each place: `[...]`, int64."""
    lost = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return mean(lost, mask)


def entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """−Σ p log p: how undecided the model is, which AdaMerging and test-time aTLAS minimise without labels."""
    log = logits.log_softmax(-1)
    return mean(-(log.exp() * log).sum(-1), mask)


def distillation(logits: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """T² · −Σ p_teacher log p_student at temperature T: Expert Merging's alignment of logits."""
    wanted = (teacher / temperature).softmax(-1)
    lost = -(wanted * (logits / temperature).log_softmax(-1)).sum(-1)
    return temperature**2 * mean(lost, mask)


def hidden_states(hidden: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """The mean over layers of the mean squared difference: Expert Merging's alignment of hidden states.

    A layer's are `[..., width]`; `mask` as for logits.
    """
    lost = [mean((mine - theirs).square().mean(-1), mask) for mine, theirs in zip(hidden, teacher, strict=True)]
    return torch.stack(lost).mean()


def next_tokens(logits: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and mask of a causal language model that is to say each token after those before:
    `[rows, tokens - 1, ...]`.
    """
    return logits[:, :-1], tokens[:, 1:], mask[:, 1:]


def mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the places that count."""
    if mask is None:
        return values.mean()
    counts = mask.to(values.dtype)
    return (values * counts).sum() / counts.sum()
