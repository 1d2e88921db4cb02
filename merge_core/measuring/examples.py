"""What is run: inputs, what they ought to give, and which places of them are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NO_LABEL = -100
"""Where nothing is to be said, as torch's losses have it."""
Forward = Callable[[Any], Tensor]
"""Makes logits, `[rows, ..., classes]`, of the inputs of examples."""


@dataclass(frozen=True)
class Examples:
    """A batch of rows. `inputs` are whatever the model is run with. `labels` (`[rows, ...]`, int64): the class in each
    place of the logits, or `NO_LABEL`. `mask` (`[rows, tokens]`): which tokens are there, and not only fill up.
    """

    inputs: Any
    labels: Tensor | None = None
    mask: Tensor | None = None

    def counted(self, logits: Tensor) -> Tensor:
        """The logits of the places that count, `[places, classes]`: those with a label, else those of the mask."""
        which = self.mask if self.labels is None else self.labels != NO_LABEL
        if which is None or which.shape != logits.shape[:-1]:
            return logits.reshape(-1, logits.shape[-1])
        return logits[which.to(logits.device, torch.bool)]

    def right(self, logits: Tensor) -> Tensor:
        """The classes of these places, `[places]`."""
        if self.labels is None:
            raise ValueError("these examples have no labels")
        return self.labels[self.labels != NO_LABEL].to(logits.device)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters, each once, by their first names."""
    return dict(module.named_parameters())


@contextmanager
def undisturbed(module: nn.Module, wanted: Mapping[str, Tensor]) -> Iterator[None]:
    """A module without dropout, of whose parameters only those want gradients; all is as it was afterwards."""
    was_training = module.training
    wanted_before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    gradients = {id(each) for each in wanted.values()}
    for parameter, _ in wanted_before:
        parameter.requires_grad_(id(parameter) in gradients)
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
        for parameter, wants in wanted_before:
            parameter.requires_grad_(wants)


def in_sweeps(sizes: Mapping[str, int], most_bytes: int | None) -> list[list[str]]:
    """Names in groups of at most so many bytes, or of one name where that alone has more; None: all at once."""
    groups: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not groups or (most_bytes is not None and size > left):
            groups.append([])
            left = most_bytes or 0
        groups[-1].append(name)
        left -= size
    return groups


def sweep(examples: Sequence[Examples], forward: Forward) -> Iterator[tuple[int, Examples, Tensor]]:
    """Run all examples in their order: the place of each batch, itself, and its logits in float32 or better."""
    for place, each in enumerate(examples):
        logits = forward(each.inputs)
        yield place, each, logits if logits.dtype == torch.float64 else logits.float()
