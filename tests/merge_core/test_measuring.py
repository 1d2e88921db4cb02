"""What is measured by running a model, against float64 oracles that take one example and one weight at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from merge_core.learning import Layout, Merged, Schedule, StateVectors, learn
from merge_core.measuring import (
    Dropped,
    Examples,
    Reciprocal,
    fisher,
    grams,
    importances,
    largest,
    layers_of,
    means,
    near,
    search_divisor,
    top_logits,
)
from merge_core.measuring.examples import NO_LABEL
from merge_core.merge import merge
from merge_core.recipe import Recipe

CLASSES = 4


class Tokens(nn.Module):
    """Logits for each token: a tied head, two layers that take the same tensor, one that nothing enters, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 6)
        self.one, self.two = nn.Linear(6, 5), nn.Linear(6, 5, bias=False)
        self.back = nn.Linear(5, 6)
        self.unused = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        mixed = torch.tanh(self.one(hidden)) * self.two(hidden)
        return self.head(hidden + self.back(self.drop(mixed)))  # type: ignore[no-any-return]


def tokens(seed: int = 0) -> Tokens:
    torch.manual_seed(seed)
    return Tokens().double().train()


TEXT = torch.tensor([[0, 3, 2, 1, 1], [1, 1, 2, 0, 3], [2, 2, 2, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
LABELS = torch.cat([TEXT[:, 1:], torch.full((3, 1), NO_LABEL)], 1).masked_fill(MASK.roll(-1, 1) == 0, NO_LABEL)
SINGLE = [Examples(TEXT[i : i + 1], LABELS[i : i + 1], MASK[i : i + 1]) for i in range(3)]


def gradients(net: nn.Module, value: Tensor) -> dict[str, Tensor]:
    parameters = dict(net.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(each) if one is None else one for (name, each), one in pairs}


def mean_of(each: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    return {name: sum(w * one[name] for w, one in zip(weights, each, strict=True)) for name in each[0]}  # type: ignore


def assert_are(found: Iterator[tuple[str, Tensor]] | dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    found = dict(found)
    assert list(found) == list(expected)
    for name, each in found.items():
        assert each.dtype == torch.float32 and each.device.type == "cpu"
        torch.testing.assert_close(each, expected[name].float(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("most_bytes", [None, 300])
def test_given_labels_make_the_empirical_fisher_information(most_bytes: int | None) -> None:
    """A sum over an example's places, squared for each example; in as many sweeps as the memory asks for."""
    net = tokens()
    measured = fisher(net, net, SINGLE, labels="given", most_bytes=most_bytes)
    found = dict(measured)

    net.eval()
    squares = []
    for text, labels in zip(TEXT, LABELS, strict=True):
        logits = net(text[None])[0]
        log = logits.log_softmax(-1)[labels != NO_LABEL]
        pulled = log.gather(-1, labels[labels != NO_LABEL][:, None]).sum()
        squares.append({name: each**2 for name, each in gradients(net, pulled).items()})
    assert_are(found, mean_of(squares, [1 / 3] * 3))
    assert found["embed.weight"].abs().max() > 0 and found["unused.weight"].abs().max() == 0


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(rows)))  # type: ignore[no-any-return]


def classifier() -> tuple[Classifier, Tensor, Tensor]:
    torch.manual_seed(3)
    net = Classifier().double()
    rows = torch.randn(40, 5, dtype=torch.float64)
    return net, rows, torch.randint(CLASSES, (40,))


def test_expected_labels_make_the_fisher_information_and_drawn_ones_estimate_it() -> None:
    """It is the mean of the Jacobian's squares, weighed by the chances: E over y ~ p(y|x), no labels asked."""
    net, rows, _ = classifier()
    rows = rows[:10]
    examples = [Examples(row[None]) for row in rows]

    exact = dict(fisher(net, net, examples))

    squares, weights = [], []
    for row in rows:
        log = net(row[None])[0].log_softmax(-1)
        squares += [{name: each**2 for name, each in gradients(net, log[y]).items()} for y in range(CLASSES)]
        weights += [log[y].exp().item() / len(rows) for y in range(CLASSES)]
    assert_are(exact, mean_of(squares, weights))

    drawn = dict(fisher(net, net, examples, labels="drawn", draws=100))
    for name, each in exact.items():
        assert float((drawn[name] - each).norm() / each.norm()) < 0.2
    few, swept = (dict(fisher(net, net, examples, labels="drawn", most_bytes=most)) for most in (None, 100))
    assert all(torch.equal(few[name], each) for name, each in swept.items()), "the same draws in every sweep"


@pytest.mark.parametrize("without_labels", [False, True])
def test_importances_square_the_gradient_of_batches(without_labels: bool) -> None:
    net, rows, labels = classifier()
    parts = list(zip(rows.split(16), labels.split(16), strict=True))
    batches = [Examples(some, None if without_labels else right) for some, right in parts]

    found = dict(importances(net, net, batches, without_labels=without_labels))

    each = []
    for some, right in parts:
        logits = net(some)
        lost = logits.square().sum(1).mean() if without_labels else cross_entropy(logits, right)
        each.append({name: one.abs() if without_labels else one**2 for name, one in gradients(net, lost).items()})
    assert_are(found, mean_of(each, [1 / 3] * 3))
    assert all(each.grad is None and each.requires_grad for each in net.parameters())


@pytest.mark.parametrize("most_bytes", [None, 1, 600])
def test_grams_are_means_over_the_rows_that_count(most_bytes: int | None) -> None:
    net = tokens()
    found = dict(grams(net, net, [Examples(TEXT[:2], mask=MASK[:2]), SINGLE[2]], most_bytes=most_bytes))

    net.eval()
    rows = net.embed(TEXT)[MASK.bool()]
    mixed = torch.tanh(net.one(rows)) * net.two(rows)
    entering = {"one.weight": rows, "two.weight": rows, "back.weight": mixed}
    expected = {name: each.T @ each / len(each) for name, each in entering.items()}
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name].detach().float())
    assert set(found) == set(expected), "nothing enters the layer that is not used; the head is an embedding"

    averages = means(net, net, SINGLE)
    for name, each in entering.items():
        torch.testing.assert_close(averages[name], each.detach().mean(0).float())


def test_layers_that_take_one_tensor_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tokens()
    heard = []
    listen = "merge_core.measuring.inputs._listen"
    monkeypatch.setattr(listen, lambda *given: heard.extend(given[3]))
    dict(grams(net, net, SINGLE))
    assert heard == ["one.weight", "back.weight", "unused.weight"]


def test_what_cannot_be_measured_is_said() -> None:
    net = tokens()
    with pytest.raises(ValueError, match="one row"):
        dict(fisher(net, net, [Examples(TEXT)]))
    with pytest.raises(ValueError, match="take drawn"):
        dict(fisher(net, net, SINGLE))
    with pytest.raises(ValueError, match="no labels"):
        dict(fisher(net, net, [Examples(TEXT[:1])], labels="given"))
    assert net.training and all(each.requires_grad for each in net.parameters()), "all is as it was"


# DAREx-q.


def two_nets(folder: Path) -> tuple[Classifier, dict[str, Tensor], dict[str, Tensor], Tensor]:
    net, rows, _ = classifier()
    net = net.float()
    base = {name: each.detach().clone() for name, each in net.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    tuned = {name: each + 0.5 * torch.randn(each.shape, generator=generator) for name, each in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors")
    return net, base, tuned, rows.float()


def darex(folder: Path, out: str, **parameters: Any) -> dict[str, Tensor]:
    recipe = {"merge_method": "darex", "base_model": "base", "models": [{"model": "tuned"}], "seed": 7}
    merge(Recipe.from_data({**recipe, "parameters": parameters}), folder / out, roots=[folder])
    return load_file(folder / out / "model.safetensors")


def test_what_a_search_writes_into_a_module_is_what_the_method_merges(tmp_path: Path) -> None:
    net, base, tuned, _ = two_nets(tmp_path)
    shapes = {name: each.shape for name, each in base.items() if "head" not in name}
    whole = [name for name in base if name not in shapes]
    vectors = Dropped(StateVectors(base, [tuned]), 0.75, seed=7, whole=whole)
    found = Merged(net, vectors, Layout.shared(shapes), fixed={name: [1.0] for name in whole})
    found.write(torch.tensor([[1 / 0.5]], dtype=torch.float64))

    drop_rate = [{"filter": "head", "value": 0}, {"value": 0.75}]
    q = [{"filter": "head", "value": 1}, {"value": 0.5}]
    merged = darex(tmp_path, "merged", drop_rate=drop_rate, q=q)

    state = dict(net.named_parameters())
    assert all(torch.equal(state[name], each) for name, each in merged.items())


def test_q_by_gradient_brings_the_logits_nearer(tmp_path: Path) -> None:
    net, base, tuned, rows = two_nets(tmp_path)
    fine = Classifier()
    fine.load_state_dict(tuned)
    wanted = largest(fine(rows).detach())
    merged = Merged(net, Dropped(StateVectors(base, [tuned]), 0.9), layers_of({n: e.shape for n, e in base.items()}))

    def loss(_: int) -> tuple[Tensor, dict[str, float]]:
        return top_logits(net(rows), *wanted), {}

    found = learn(
        merged,
        Reciprocal(0.9),
        loss,
        [[0]] * 25,
        Schedule(rate=2e-2, decay=0.01, shape="cosine"),
        check=lambda: {"loss": loss(0)[0].item()},
        every=4,
    )

    curve = [point["loss"] for point in found.curve]
    q = {name: 1 / each[0, 0].item() for name, each in found.coefficients.items()}
    assert min(curve) < 0.5 * curve[0]
    assert q["hidden.weight"] == q["hidden.bias"] != q["head.weight"] and min(q.values()) >= 0.1
    torch.testing.assert_close(loss(0)[0].item(), min(curve))


def test_layers_share_with_their_bias_and_the_rest_with_all_else() -> None:
    shapes = {"a.weight": (3, 2), "a.bias": (3,), "norm.weight": (3,), "norm.bias": (3,), "embed": (4, 3), "c": ()}
    columns = {name: each.columns.start for name, each in layers_of(shapes).parts.items()}
    assert columns == {"a.weight": 0, "a.bias": 0, "norm.weight": 2, "norm.bias": 2, "embed": 1, "c": 2}


def test_q_is_searched_on_a_coarse_and_then_on_a_fine_grid() -> None:
    found = search_divisor(lambda q: (q - 0.0213) ** 2, 0.99)
    assert found.q == pytest.approx(0.0215)
    coarse = [q for q, _ in found.tried[:6]]
    assert coarse == pytest.approx([0.01, 0.015, 0.02, 0.025, 0.03, 0.035]) and len(found.tried) < 27
    assert search_divisor(lambda q: q, 0.9).q == pytest.approx(0.1), "no q below 1 − p"
    assert search_divisor(lambda q: -q, 0.9, most=0.4, step=0.1).q == pytest.approx(0.4)
    assert search_divisor(lambda q: 0.0, 0.9).q == pytest.approx(0.1), "of equal scores the least q"
    assert search_divisor(lambda q: math.nan if q < 0.2 else q, 0.9, step=0.05).q == pytest.approx(0.2)


def test_of_four_masks_the_farthest_is_left_out() -> None:
    assert near([1.0, 2.0, 3.0, 10.0]) == pytest.approx(2.0)
    assert near([1.0, 3.0]) == pytest.approx(2.0)


def test_top_logits_are_those_of_the_fine_tune() -> None:
    wanted = torch.tensor([[9.0, 8, 7, 6, 5, -100, -100]])
    away = wanted + torch.tensor([[1.0, 1, 1, 1, 1, 50, 50]])
    assert float(top_logits(away, *largest(wanted))) == pytest.approx(1.0)
    assert float(top_logits(wanted[:, :2] + 2, *largest(wanted[:, :2]))) == pytest.approx(4.0)
