"""What enters linear layers: the mean of x xᵀ, and the mean of x, over all rows of all examples.

Rows that the examples' mask leaves out do not count, where an input has the mask's places. Products are float64 on a
CPU and float32 elsewhere, sums float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from merge_core.measuring.examples import Examples, Forward, in_sweeps, parameters_of, undisturbed

Take = Callable[[str, Tensor], None]
"""Is told the rows, `[rows, columns]`, that enter the layer of a name."""


def grams(
    module: nn.Module,
    forward: Forward,
    examples: Sequence[Examples],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    most_bytes: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Mean x xᵀ of what enters each linear layer (Gram matrices of RegMean, arXiv 2212.09849; covariances of EoRA,
    arXiv 2410.21271): the name of its weight and numbers `[columns, columns]`, float32, on the CPU.

    Layers that take the very same tensor, such as those of query, key and value, have one sum. The sums have at most
    `most_bytes` at a time, or are those of one layer; then the examples are run again for the next. A layer that no
    row enters is not given.
    """
    layers = linear_layers(module, tensors)
    alike = _alike(module, forward, examples, layers)
    sizes = {name: 8 * layers[name].in_features ** 2 for name in alike}
    for names in in_sweeps(sizes, most_bytes):
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = dict.fromkeys(names, 0)

        def take(name: str, rows: Tensor, sums: dict[str, Tensor] = sums, counts: dict[str, int] = counts) -> None:
            if name not in sums:
                sums[name] = torch.zeros(2 * rows.shape[1:], dtype=torch.float64, device=rows.device)
            if rows.device.type == "cpu":
                sums[name].addmm_(rows.double().T, rows.double())
            else:
                sums[name] += rows.float().T @ rows.float()
            counts[name] += len(rows)

        _listen(module, forward, examples, {name: layers[name] for name in names}, take)
        for name in names:
            if counts[name]:
                mean = sums.pop(name).div_(counts[name]).float().cpu()
                yield from ((each, mean) for each in alike[name])


def means(
    module: nn.Module,
    forward: Forward,
    examples: Sequence[Examples],
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Mean x of what enters each linear layer (DAREx-q's activations, arXiv 2410.09344): by the name of its weight
    `[columns]`, float32, on the CPU. A layer that no row enters is not among them.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def take(name: str, rows: Tensor) -> None:
        added = rows.double().sum(0)
        sums[name] = sums[name] + added if name in sums else added
        counts[name] = counts.get(name, 0) + len(rows)

    _listen(module, forward, examples, linear_layers(module, tensors), take)
    return {name: (each / counts[name]).float().cpu() for name, each in sums.items() if counts[name]}


def linear_layers(module: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, nn.Linear]:
    """The layers that multiply with a weight of their own, `[rows out, columns in]`, by the weight's name. A head that
    is the embedding too is none of them: what enters it says nothing of what it is looked up for.
    """
    named = {id(each): name for name, each in (parameters_of(module) if tensors is None else tensors).items()}
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            named.pop(id(layer.weight), None)
    return {
        named[id(layer.weight)]: layer
        for layer in module.modules()
        if isinstance(layer, nn.Linear) and id(layer.weight) in named
    }


def _alike(
    module: nn.Module, forward: Forward, examples: Sequence[Examples], layers: Mapping[str, nn.Linear]
) -> dict[str, list[str]]:
    """The layers that take the same tensors as another in the first batch, by the name of the first of them."""
    taken: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: taken[name].append(given[0]))
        for name, layer in layers.items()
    ]
    try:
        with undisturbed(module, {}), torch.no_grad():
            forward(examples[0].inputs)
    finally:
        for hook in hooks:
            hook.remove()
    first: dict[tuple[Any, ...], str] = {}
    found: dict[str, list[str]] = {}
    for name, each in taken.items():
        same = tuple(map(id, each)) or (name,)
        found.setdefault(first.setdefault(same, name), []).append(name)
    return found


def _listen(
    module: nn.Module, forward: Forward, examples: Sequence[Examples], layers: Mapping[str, nn.Linear], take: Take
) -> None:
    """Run all examples and tell what enters the layers."""
    mask: Tensor | None = None

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, given: take(name, _rows(given[0], mask))

    hooks = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    try:
        with undisturbed(module, {}), torch.no_grad():
            for each in examples:
                mask = each.mask
                forward(each.inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _rows(given: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of an input that count, `[rows, columns]`."""
    rows = given.reshape(-1, given.shape[-1])
    if mask is None or (given.shape[:-1] != mask.shape and given.shape[:-1] != (mask.numel(),)):
        return rows
    return rows[mask.reshape(-1).to(rows.device, torch.bool)]
