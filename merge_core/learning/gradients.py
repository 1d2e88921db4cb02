"""A module that is a merge: its parameters are written from coefficients, and what a backward pass finds out about
them becomes the gradient of the coefficients, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from merge_core.learning.parts import Layout, Parts
from merge_core.learning.vectors import Vectors, widened


class Merged:
    """Takes a module's parameters over: those in the layout are merged and learned, `fixed` ones are merged once with
    a coefficient for each model, all others stay as they are and want no gradient.

    In memory are the module, one tensor of each kind at a time, and what `vectors` keep. `tensors` says which of the
    module's parameters or buffers has which name; without it they have their own.
    """

    def __init__(
        self,
        module: nn.Module,
        vectors: Vectors,
        layout: Layout,
        *,
        fixed: Mapping[str, Sequence[float]] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.module, self.vectors, self.layout = module, vectors, layout
        self.gradient = torch.zeros(vectors.models, layout.width, dtype=torch.float64)
        self._tensors = dict(module.named_parameters()) | dict(module.named_buffers()) if tensors is None else tensors
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        module.eval()
        for name, weights in (fixed or {}).items():
            whole = Parts(name, tuple(self._tensors[name].shape), range(1))
            self._put(whole, torch.tensor(weights, dtype=torch.float64)[:, None])
        self._hooks = [self._listen(each) for each in layout.parts.values()]

    def close(self) -> None:
        """Let go of the module, which stays as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def write(self, coefficients: Tensor) -> None:
        """Make the module the merge with these coefficients, `[models, width]`."""
        for name, each in self.layout.split(coefficients.detach()).items():
            self._put(self.layout.parts[name], each)

    def clear(self) -> None:
        """Forget the gradient, which backward passes add up."""
        self.gradient.zero_()

    def _put(self, parts: Parts, coefficients: Tensor) -> None:
        into = self._tensors[parts.tensor]
        device = into.device
        origin = self.vectors.origin(parts.tensor)
        merged = None if origin is None else widened(origin.to(device))
        for model in range(self.vectors.models):
            added = parts.times(self.vectors.vector(parts.tensor, model).to(device), coefficients[model])
            merged = added if merged is None else merged + added
        assert merged is not None  # a merge has models
        with torch.no_grad():
            into.copy_(merged)

    def _listen(self, parts: Parts) -> Any:
        parameter = self._tensors[parts.tensor]
        parameter.requires_grad_(True)
        return parameter.register_post_accumulate_grad_hook(self._arrived(parts))  # type: ignore[no-untyped-call]

    def _arrived(self, parts: Parts) -> Callable[[Tensor], None]:
        columns = slice(parts.columns.start, parts.columns.stop)

        @torch.no_grad()
        def arrived(parameter: Tensor) -> None:
            """The gradient of a parameter is whole: add what it says of the coefficients, and let it go."""
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            for model in range(self.vectors.models):
                vector = self.vectors.vector(parts.tensor, model).to(gradient.device)
                self.gradient[model, columns] += parts.sums(gradient, vector).cpu()

        return arrived
