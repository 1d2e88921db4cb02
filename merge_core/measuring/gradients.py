"""Squared gradients: how much what a model says depends on each of its weights.

The gradient of each parameter is squared, added up and let go as a backward pass finds it. Sums are float32 (float64 of
parameters that are so).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from merge_core.measuring.examples import Examples, Forward, in_sweeps, parameters_of, sweep, undisturbed

Labels = Literal["given", "expected", "drawn"]
Pull = tuple[Tensor, float, bool]
"""A scalar to take the gradient of, how much that counts, and whether the same graph is needed again."""


def fisher(
    module: nn.Module,
    forward: Forward,
    examples: Sequence[Examples],
    *,
    labels: Labels = "expected",
    draws: int = 1,
    seed: int = 0,
    tensors: Mapping[str, Tensor] | None = None,
    most_bytes: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The diagonal of the Fisher information (Matena & Raffel 2021, arXiv 2111.09832, §3): the mean over examples, each
    a batch of one row, of (∂ log p(y|x) / ∂θ)², log p being the sum over the example's places.

    `labels` says which y: `expected` is E over y ~ p(y|x), exact, one backward pass per class, for examples with one
    place; `drawn` estimates it by as many `draws` from p for every place; `given` takes the examples' labels, which is
    the empirical Fisher information and no estimate of the other. Gives each parameter's name and numbers in its shape,
    float32, on the CPU; `tensors` names those that are wanted. What is added up has at most `most_bytes` at a time.
    """

    def pulls() -> Iterator[Pull]:
        for place, each, logits in sweep(examples, forward):
            if len(logits) != 1:
                raise ValueError("the gradient of each example is squared: give batches of one row")
            log = each.counted(logits).log_softmax(-1)
            if bool(log.isnan().any()):
                raise ValueError("what the model says is no number; look at the model's weights, and at the data")
            if labels == "expected":
                if len(log) != 1:
                    raise ValueError(f"expected is for one place, not {len(log)}; take drawn")
                chances = log[0].detach().exp().tolist()
                for number, chance in enumerate(chances):
                    if chance > 0:
                        yield log[0, number], chance / len(examples), number + 1 < len(chances)
            elif labels == "given":
                yield log.gather(-1, each.right(logits)[:, None]).sum(), 1 / len(examples), False
            else:
                drawn = _drawn(log.detach(), draws, seed, place)
                for number in range(draws):
                    pulled = log.gather(-1, drawn[:, number, None].to(log.device)).sum()
                    yield pulled, 1 / (draws * len(examples)), number + 1 < draws

    return _summed(module, pulls, torch.square, tensors, most_bytes)


def importances(
    module: nn.Module,
    forward: Forward,
    batches: Sequence[Examples],
    *,
    without_labels: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
    most_bytes: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """What selective synaptic dampening asks for (Foster et al. 2023, arXiv 2308.07707, as its code has it): the mean
    over batches of (∂L/∂θ)², L the mean cross entropy of the batch. No Fisher information of single examples: it
    depends on how large the batches are.

    `without_labels` (Loss-free SSD, arXiv 2402.19308): the mean of |∂ mean ‖logits‖² / ∂θ|. For the rest see `fisher`.
    """

    def pulls() -> Iterator[Pull]:
        for _, each, logits in sweep(batches, forward):
            counted = each.counted(logits)
            if without_labels:
                lost = counted.square().sum(-1).mean()
            else:
                lost = nn.functional.cross_entropy(counted, each.right(logits))
            yield lost, 1 / len(batches), False

    return _summed(module, pulls, torch.abs if without_labels else torch.square, tensors, most_bytes)


def _drawn(log: Tensor, draws: int, seed: int, place: int) -> Tensor:
    """Classes by their chances, `[places, draws]`; the same ones in every sweep."""
    generator = torch.Generator().manual_seed((seed << 32) + place)
    return torch.multinomial(log.double().exp().cpu(), draws, replacement=True, generator=generator)


def _summed(
    module: nn.Module,
    pulls: Callable[[], Iterable[Pull]],
    change: Callable[[Tensor], Tensor],
    tensors: Mapping[str, Tensor] | None,
    most_bytes: int | None,
) -> Iterator[tuple[str, Tensor]]:
    """Σ weight · change(gradient) of each parameter, by name, in as many sweeps as it takes."""
    wanted = parameters_of(module) if tensors is None else tensors
    kinds = {name: torch.float64 if each.dtype == torch.float64 else torch.float32 for name, each in wanted.items()}
    sizes = {name: each.numel() * kinds[name].itemsize for name, each in wanted.items()}
    for names in in_sweeps(sizes, most_bytes):
        chosen = {name: wanted[name] for name in names}
        sums = _Sums(chosen, kinds, change)
        with undisturbed(module, chosen):
            try:
                with torch.enable_grad():
                    for pulled, sums.weight, again in pulls():
                        if pulled.requires_grad:  # or it depends on none of these
                            pulled.backward(retain_graph=again)  # type: ignore[no-untyped-call]
            finally:
                sums.close()
        while sums.values:
            name = next(iter(sums.values))
            yield name, sums.values.pop(name).float().cpu()


class _Sums:
    """Adds up what each parameter's gradient is changed to, times `weight`, as backward passes find it."""

    def __init__(
        self, parameters: Mapping[str, Tensor], kinds: Mapping[str, torch.dtype], change: Callable[[Tensor], Tensor]
    ) -> None:
        self.weight = 0.0
        self.values = {
            name: torch.zeros(each.shape, dtype=kinds[name], device=each.device) for name, each in parameters.items()
        }
        self._change = change
        self._hooks: list[Any] = [
            each.register_post_accumulate_grad_hook(self._arrived(name))  # type: ignore[no-untyped-call]
            for name, each in parameters.items()
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, name: str) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            total = self.values[name]
            total.add_(self._change(gradient.to(total.dtype)), alpha=self.weight)

        return arrived
