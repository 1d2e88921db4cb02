"""What averaging does to the statistics of a network's units, measured with data and put right.

Units that are averaged vary less than those they were made of. A BatchNorm forgets it when its running statistics are
taken again; where there is none, REPAIR (Jordan et al., https://arxiv.org/abs/2211.08403) gives every output unit of a
convolution or linear layer the mean and the spread that the interpolated models have there:

    w ← w · σ* / σ        b ← μ* + (b − μ) · σ* / σ        μ* = Σᵢ wᵢ μᵢ        σ* = Σᵢ wᵢ σᵢ

μ and σ are the merged network's own, its earlier layers being right already. Layers that a BatchNorm follows need no
more than its statistics: what comes out of it has the mean and the spread that it was merged to. Networks that
normalise every sample on its own (LayerNorm, RMSNorm, GroupNorm) have nothing to be put right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from merge_core.errors import IncompatibleModels, Problem

Spread = Literal["deviation", "variance"]
Run: TypeAlias = Callable[[nn.Module, Any], object]
"""How a batch is put through a network."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (*_CONVOLUTIONS, nn.Linear)
_BATCHED = nn.modules.batchnorm._BatchNorm
_PER_SAMPLE = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
_DEAD = 1e-6
"""A unit that varies less than this beside what it should is constant: no factor makes it vary."""


@dataclass(frozen=True)
class Repaired:
    """What was done: BatchNorms with new statistics, layers with new weights, those of them that had no bias and have
    one now, and `note`, what else the user should know.
    """

    normalisations: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    note: str | None = None


def _whole(network: nn.Module, batch: Any) -> object:
    return network(batch)


def reestimate(network: nn.Module, batches: Iterable[Any], *, run: Run = _whole) -> Repaired:
    """Take the running statistics of all BatchNorms again, in place: the mean over one pass through the batches.

    Raises `IncompatibleModels` where there is no batch.
    """
    found = {name: module for name, module in network.named_modules() if isinstance(module, _BATCHED)}
    kept = {name: module for name, module in found.items() if module.running_mean is not None}
    if not kept:
        return Repaired(note=_nothing_to_reestimate(network))
    with _evaluating(network), _fresh_statistics(kept.values()):
        _each(network, batches, run)
    return Repaired(normalisations=tuple(kept))


def repair(
    merged: nn.Module,
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    spread: Spread = "deviation",
    run: Run = _whole,
) -> Repaired:
    """Give the units of a merged network the statistics of the models it was made of, in place.

    `models` are networks of the same modules, aligned as they were merged, `weights` their shares (equal without).
    `batches` are gone through once for each model and once for the merged network, so they must be a list, a
    `DataLoader` or the like. In one batch the statistics become those wanted; in several nearly, since what deeper
    layers see changes while it is measured, the less so where the batches and their order are the same every time.
    `spread` is which average: of standard deviations, or of variances, as some take for more than two models. Layers
    that are not used, or whose outputs go into a BatchNorm, keep their weights; BatchNorms are estimated again in the
    same pass.

    Raises `IncompatibleModels` for networks of other modules and where there is no batch.
    """
    shares = _shares(models, weights)
    layers = {name: module for name, module in merged.named_modules() if isinstance(module, _LAYERS)}
    if (alone := _normalising_samples(merged)) is not None:
        kept = reestimate(merged, batches, run=run) if _has_batchnorm(merged) else Repaired()
        note = f"{alone} normalises every sample on its own: the layers were left as they are"
        return Repaired(normalisations=kept.normalisations, note=note)
    for i, model in enumerate(models):
        _check_same(merged, model, layers, i)
    measured = [_measure(model, layers, batches, run) for model in models]
    observed = {
        name: _Observed(layer, [found[name] for found in measured], shares, spread)
        for name, layer in layers.items()
        if all(name in found for found in measured)
    }
    batchnorms = [module for module in merged.modules() if isinstance(module, _BATCHED) and _is_tracking(module)]
    with _evaluating(merged), _fresh_statistics(batchnorms), _watched(observed.values()):
        _each(merged, batches, run)
    done = [name for name, layer in observed.items() if layer.moments.count]
    biases = [name for name in done if layers[name].bias is None]
    for name in done:
        observed[name].fuse()
    names = tuple(name for name, module in merged.named_modules() if any(module is one for one in batchnorms))
    return Repaired(names, tuple(done), tuple(biases))


class _Moments:
    """Mean and spread of every unit of a layer's outputs, over all that was put in; float64.

    `so_far`: means and variances as they were after each batch.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())
        self.so_far: list[tuple[Tensor, Tensor]] = []

    def put(self, values: Tensor) -> None:
        """`values`: `[..., units]`; the numbers of all batches count the same, however many a batch has."""
        values = values.reshape(-1, values.shape[-1]).to(torch.float64)
        if not (count := len(values)):
            return
        mean = values.mean(0)
        squares = (values - mean).square_().sum(0)
        if self.count:
            total, step = self.count + count, mean - self.mean
            squares = self.squares + squares + step.square() * (self.count * count / total)
            count, mean = total, self.mean + step * (count / total)
        self.count, self.mean, self.squares = count, mean, squares
        self.so_far.append((mean, squares / count))


class _Observed:
    """A layer of the merged network, whose outputs are made right while they are measured, so that later layers see
    what they will see: after each batch the statistics of those so far are compared with the models' of as many, so
    that what is special about the first batches is in both.
    """

    def __init__(self, layer: nn.Module, models: Sequence[_Moments], shares: Sequence[float], spread: Spread) -> None:
        self.layer, self.models, self.spread = layer, models, spread
        self.shares = torch.tensor(shares, dtype=torch.float64, device=models[0].mean.device).unsqueeze(1)
        self.moments = _Moments()

    def __call__(self, layer: nn.Module, inputs: object, outputs: Tensor) -> Tensor:
        units = _units_last(layer, outputs)
        self.moments.put(units)
        if not self.moments.count:
            return outputs
        factor, shift = self._change()
        changed = units.to(torch.float64) * factor + shift
        return _units_back(layer, changed.to(outputs.dtype))

    def _change(self) -> tuple[Tensor, Tensor]:
        """What every unit is multiplied by, and what is added then."""
        seen = len(self.moments.so_far)
        theirs = [model.so_far[min(seen, len(model.so_far)) - 1] for model in self.models]
        wanted_mean = (self.shares * torch.stack([mean for mean, _ in theirs])).sum(0)
        variances = torch.stack([variance for _, variance in theirs])
        if self.spread == "variance":
            wanted = (self.shares * variances).sum(0).clamp(min=0).sqrt()
        else:
            wanted = (self.shares * variances.sqrt()).sum(0).clamp(min=0)
        mean, variance = self.moments.so_far[-1]
        found = variance.sqrt()
        is_dead = found <= _DEAD * wanted
        factor = torch.where(is_dead, 1.0, wanted / found.masked_fill(is_dead, 1.0))
        return factor, wanted_mean - mean * factor

    @torch.no_grad()
    def fuse(self) -> None:
        factor, shift = self._change()
        weight, bias = self.layer.weight, self.layer.bias
        assert isinstance(weight, Tensor)
        weight.copy_(weight.to(torch.float64) * factor.reshape(-1, *[1] * (weight.dim() - 1)))
        if bias is None:
            self.layer.bias = nn.Parameter(shift.to(weight))
        else:
            assert isinstance(bias, Tensor)
            bias.copy_(bias.to(torch.float64) * factor + shift)


def _measure(network: nn.Module, wanted: Iterable[str], batches: Iterable[Any], run: Run) -> dict[str, _Moments]:
    """Of the layers that are used and that no BatchNorm follows, the moments of their outputs."""
    named = dict(network.named_modules())
    found: dict[str, _Moments] = {name: _Moments() for name in wanted}
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that none gets the id of another
    normalised: set[str] = set()

    def after(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(layer: nn.Module, inputs: object, output: Tensor) -> None:
            found[name].put(_units_last(layer, output))
            outputs[id(output)] = name, output

        return hook

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if (known := outputs.get(id(inputs[0]))) is not None:
            normalised.add(known[0])

    with ExitStack() as stack:
        stack.enter_context(_evaluating(network))
        for name in found:
            stack.callback(named[name].register_forward_hook(after(name)).remove)
        for module in network.modules():
            if isinstance(module, _BATCHED):
                stack.callback(module.register_forward_pre_hook(before).remove)
        _each(network, batches, run, outputs.clear)
    return {name: moments for name, moments in found.items() if moments.count and name not in normalised}


def _units_last(layer: nn.Module, outputs: Tensor) -> Tensor:
    return outputs.movedim(_units(layer), -1)


def _units_back(layer: nn.Module, outputs: Tensor) -> Tensor:
    return outputs.movedim(-1, _units(layer))


def _units(layer: nn.Module) -> int:
    """The axis of a layer's outputs along which its units lie."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _CONVOLUTIONS) else -1


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; afterwards every module trains that did before."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _fresh_statistics(modules: Iterable[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """BatchNorms that average the statistics of all batches put in meanwhile, and nothing else."""
    modules = list(modules)
    before = [module.momentum for module in modules]
    for module in modules:
        module.reset_running_stats()
        module.momentum = None
        module.training = True
    try:
        yield
    finally:
        for module, momentum in zip(modules, before, strict=True):
            module.momentum = momentum
            module.training = False


@contextmanager
def _watched(observed: Iterable[_Observed]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in observed:
            stack.callback(each.layer.register_forward_hook(each).remove)
        yield


def _each(network: nn.Module, batches: Iterable[Any], run: Run, then: Callable[[], object] = lambda: None) -> None:
    count = 0
    for batch in batches:
        run(network, batch)
        then()
        count += 1
    if not count:
        detail = "there is no batch to measure the network with; give a list, which can be gone through again and again"
        raise IncompatibleModels(detail, [Problem(detail)])


def _check_same(merged: nn.Module, model: nn.Module, layers: Mapping[str, nn.Module], number: int) -> None:
    named = dict(model.named_modules())
    for name, layer in layers.items():
        theirs = named.get(name)
        if type(theirs) is not type(layer) or _width(theirs) != _width(layer):
            found = "nothing" if theirs is None else f"{type(theirs).__name__} of {_width(theirs)} units"
            detail = f"models[{number}] has {found} where the merged network has {name}, "
            detail += f"{type(layer).__name__} of {_width(layer)} units"
            raise IncompatibleModels.of([Problem(detail, tensor=name)])


def _width(layer: nn.Module) -> int:
    weight = getattr(layer, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() else 0


def _shares(models: Sequence[nn.Module], weights: Sequence[float] | None) -> Sequence[float]:
    if models and weights is None:
        return [1 / len(models)] * len(models)
    if weights is None or len(weights) != len(models):
        detail = f"{len(weights or ())} weights for {len(models)} models; give one for each, and at least one"
        raise IncompatibleModels(detail, [Problem(detail)])
    return weights


def _normalising_samples(network: nn.Module) -> str | None:
    """The kind of module that normalises every sample on its own; None where there is none."""
    kinds = (type(module).__name__ for module in network.modules())
    return next((kind for kind in kinds if any(word in kind for word in _PER_SAMPLE)), None)


def _has_batchnorm(network: nn.Module) -> bool:
    return any(isinstance(module, _BATCHED) and _is_tracking(module) for module in network.modules())


def _is_tracking(module: nn.modules.batchnorm._BatchNorm) -> bool:
    return module.running_mean is not None


def _nothing_to_reestimate(network: nn.Module) -> str:
    if (alone := _normalising_samples(network)) is not None:
        return f"{alone} normalises every sample on its own: there are no statistics to take again"
    return "the network has no BatchNorm with running statistics"
