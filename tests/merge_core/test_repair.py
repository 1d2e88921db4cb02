"""REPAIR and BatchNorm re-estimation on small networks whose statistics are known."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from merge_core.alignment.repair import reestimate, repair
from merge_core.errors import IncompatibleModels

_random = torch.Generator().manual_seed(1)
BATCHES = list(torch.randn(6, 16, 3, 1, 1, generator=_random) + 0.3 * torch.randn(6, 16, 3, 8, 8, generator=_random))


def plain(seed: int = 0, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=bias),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(6, 5, 3, groups=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


def normalised(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))


def average(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    shares = weights or [1 / len(models)] * len(models)
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    with torch.no_grad():
        for name, tensor in merged.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(sum(share * state[name] for share, state in zip(shares, states, strict=True)))
    return merged


def outputs(network: nn.Module, batches: Sequence[Tensor] = BATCHES) -> dict[str, Tensor]:
    """What every convolution and linear layer gives for all images: `[units, numbers]`."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    training = network.training
    with torch.no_grad():
        network.eval()(torch.cat(list(batches)))
    network.train(training)
    for hook in hooks:
        hook.remove()
    return {name: out.movedim(1, 0).flatten(1).double() for name, out in found.items()}


@pytest.mark.parametrize("spread", ["deviation", "variance"])
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]])
def test_units_get_the_interpolated_mean_and_spread(spread: str, weights: list[float] | None) -> None:
    models = [plain(seed) for seed in range(3)]
    merged = average(models, weights)
    shrunken = outputs(merged)["0"].std(1).mean() / outputs(models[0])["0"].std(1).mean()
    assert shrunken < 0.8  # what there is to repair

    done = repair(merged, models, [torch.cat(BATCHES)], weights=weights, spread=spread)

    assert (done.layers, done.normalisations, done.biases, done.note) == (("0", "3", "7"), (), (), None)
    shares = torch.tensor(weights or [1 / 3] * 3, dtype=torch.float64).unsqueeze(1)
    theirs = [outputs(model) for model in models]
    for name, units in outputs(merged).items():
        means = torch.stack([each[name].mean(1) for each in theirs])
        variances = torch.stack([each[name].var(1, correction=0) for each in theirs])
        torch.testing.assert_close(units.mean(1), (shares * means).sum(0), atol=1e-5, rtol=1e-5)
        wanted = (shares * variances).sum(0).sqrt() if spread == "variance" else (shares * variances.sqrt()).sum(0)
        torch.testing.assert_close(units.std(1, correction=0), wanted, atol=1e-5, rtol=1e-5)


def test_several_batches_of_any_size_come_near() -> None:
    models = [plain(0), plain(1)]
    merged = average(models)
    repair(merged, models, list(torch.cat(BATCHES).split([50, 20, 26])))
    ours, one, other = (outputs(model) for model in (merged, *models))
    for name in ours:
        wanted = (one[name].std(1) + other[name].std(1)) / 2
        torch.testing.assert_close(ours[name].std(1), wanted, atol=0, rtol=0.1)
        mean = (one[name].mean(1) + other[name].mean(1)) / 2
        assert ((ours[name].mean(1) - mean).abs() < 0.1 * wanted).all()


def test_one_model_repairs_itself_to_itself() -> None:
    model = plain(0)
    merged = copy.deepcopy(model)
    repair(merged, [model], BATCHES)
    torch.testing.assert_close(outputs(merged)["7"], outputs(model)["7"], atol=1e-5, rtol=1e-5)


def test_constant_units_get_their_mean_and_layers_without_bias_a_bias() -> None:
    models = [plain(0, bias=False), plain(1, bias=False)]
    with torch.no_grad():
        models[1][0].weight[2] = -models[0][0].weight[2]
    merged = average(models)
    assert not merged[0].weight[2].any()
    done = repair(merged, models, BATCHES)
    assert done.biases == ("0",)
    assert not merged[0].weight[2].any()
    wanted = (outputs(models[0])["0"][2].mean() + outputs(models[1])["0"][2].mean()) / 2
    assert merged[0].bias[2].item() == pytest.approx(wanted.item(), abs=1e-6)


def test_batchnorm_statistics_are_the_mean_over_the_batches() -> None:
    network = normalised()
    network[1].momentum = 0.3
    inputs = [network[0](batch) for batch in BATCHES]

    done = reestimate(network.train(), BATCHES)

    assert done.normalisations == ("1",)
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in inputs]).mean(0)
    variance = torch.stack([batch.var((0, 2, 3)) for batch in inputs]).mean(0)
    torch.testing.assert_close(network[1].running_mean, mean)
    torch.testing.assert_close(network[1].running_var, variance)
    assert network[1].momentum == 0.3
    assert all(module.training for module in network.modules())


def test_layers_before_a_batchnorm_need_its_statistics_only() -> None:
    models = [normalised(0), normalised(1)]
    for model in models:
        nn.init.uniform_(model[1].weight, 0.5, 2)
        reestimate(model, BATCHES)
    merged = average(models)
    weight, head = merged[0].weight.clone(), merged[4].weight.clone()

    done = repair(merged, models, BATCHES)

    assert (done.normalisations, done.layers) == (("1",), ("4",))
    assert torch.equal(merged[0].weight, weight)
    assert not torch.equal(merged[4].weight, head)
    with torch.no_grad():
        after = merged.eval()[1](merged[0](torch.cat(BATCHES)))
    torch.testing.assert_close(after.std((0, 2, 3)), merged[1].weight, atol=0, rtol=0.1)


def test_networks_that_normalise_samples_are_left_alone() -> None:
    networks = [nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2)) for _ in range(2)]
    merged = average(networks)
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    batches = [torch.randn(4, 8)]
    done = repair(merged, networks, batches)
    assert done.layers == ()
    assert done.note is not None
    assert done.note.startswith("LayerNorm normalises every sample on its own")
    assert (
        reestimate(merged, batches).note
        == "LayerNorm normalises every sample on its own: there are no statistics to take again"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())
    assert reestimate(plain(), BATCHES).note == "the network has no BatchNorm with running statistics"


def test_what_cannot_be_measured_is_refused() -> None:
    models = [plain(0), plain(1)]
    with pytest.raises(IncompatibleModels, match="no batch"):
        repair(average(models), models, iter(BATCHES))
    with pytest.raises(IncompatibleModels, match="1 weights for 2 models"):
        repair(average(models), models, BATCHES, weights=[1.0])
    with pytest.raises(IncompatibleModels, match="at least one"):
        repair(average(models), [], BATCHES)
    with pytest.raises(IncompatibleModels, match=r"models\[1\] has Flatten of 0 units where the merged network has 3"):
        repair(average(models), [models[0], normalised()], BATCHES)
    with pytest.raises(IncompatibleModels, match="has nothing where the merged network has 7"):
        repair(average(models), [models[0], plain()[:5]], BATCHES)
    with pytest.raises(IncompatibleModels, match="no batch"):
        reestimate(normalised(), [])
