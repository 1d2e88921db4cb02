"""Coefficients chosen by gradient: the streamed gradient is autograd's own, and what is learned is what it says."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merge_core.learning import (
    Cached,
    Clamped,
    Form,
    Layout,
    Merged,
    Plain,
    Schedule,
    Sigmoid,
    Softmax,
    StateVectors,
    chunks,
    importances,
    learn,
    objectives,
    round_robin,
)
from merge_core.learning.steps import Kept

Tensors = dict[str, Tensor]


class Net(nn.Module):
    """A convolution, a norm, an embedding that is the head too, a scalar, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.embed = nn.Embedding(7, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.zeros(5))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embed(tokens))
        mixed = self.conv(hidden.flatten(0, 1)[:, None]).mean(1).reshape(hidden.shape)
        return self.head(torch.tanh(hidden * self.scale + mixed) + self.shift)  # type: ignore[no-any-return]


def nets(count: int, dtype: torch.dtype = torch.float64) -> tuple[Net, list[Tensors]]:
    """A net, and the tensors of so many like it, by the names that its parameters have."""
    torch.manual_seed(0)
    base = Net().to(dtype)
    tensors = named(base)
    return base, [{name: each + 0.3 * torch.randn_like(each) for name, each in tensors.items()} for _ in range(count)]


def named(net: nn.Module) -> Tensors:
    found = dict(net.named_parameters()) | dict(net.named_buffers())
    return {name: each.detach().clone() for name, each in found.items()}


TOKENS = torch.tensor([[0, 3, 2, 6], [1, 1, 5, 4]])
LEARNED = ("conv.weight", "conv.bias", "norm.weight", "embed.weight", "scale")


def by_autograd(net: Net, vectors: Any, layout: Layout, values: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """The loss of the merge, with a graph from `values`, all task vectors in memory."""
    merged = named(net)
    for name, each in layout.split(values).items():
        terms = [each[i][parts[name]] * vectors.vector(name, i) for i in range(vectors.models)]
        origin = vectors.origin(name)
        merged[name] = sum(terms) if origin is None else origin + sum(terms)
    logits = torch.func.functional_call(net, merged, (TOKENS,))
    return objectives.entropy(logits)


def parts_of(layout: Layout) -> Mapping[str, Tensor]:
    """Each element's part, told by which coefficient it is multiplied with."""
    return {
        name: each.times(torch.ones(each.shape, dtype=torch.float64), torch.arange(each.count)).long()
        for name, each in layout.parts.items()
    }


LAYOUTS: Mapping[str, Callable[[Mapping[str, Any]], Layout]] = {
    "per tensor": Layout.of,
    "per model": Layout.shared,
    "runs": lambda shapes: Layout.of(shapes, {"conv.weight": 4, "embed.weight": 3, "norm.weight": 9, "scale": 1}),
    "random": lambda shapes: Layout.of(shapes, 3, rule="random", seed=1),
}


@pytest.mark.parametrize(
    "form", [Plain(0.2), Clamped(0.3), Sigmoid(0.1), Softmax()], ids=lambda form: type(form).__name__
)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_gradient_of_the_coefficients_is_autograds(kind: str, form: Form) -> None:
    net, states = nets(3)
    base = named(net)
    vectors = StateVectors(None, states) if isinstance(form, Softmax) else StateVectors(base, states)
    layout = LAYOUTS[kind]({name: base[name].shape for name in LEARNED})
    raw = torch.full((3, layout.width), form.start(3), dtype=torch.float64) + 0.1 * torch.rand(3, layout.width).double()
    constants = torch.ones(form.constants, dtype=torch.float64)
    raw.requires_grad_()
    constants.requires_grad_()
    wanted = torch.autograd.grad(
        by_autograd(net, vectors, layout, form(raw, constants), parts_of(layout)),
        [raw, constants],
        allow_unused=True,
    )

    merged = Merged(net, vectors, layout)
    values = form(raw, constants)
    merged.write(values)
    objectives.entropy(net(TOKENS)).backward()
    found = torch.autograd.grad(values, [raw, constants], merged.gradient, allow_unused=True)

    assert layout.width > 0 and float(wanted[0].abs().max()) > 1e-3
    for mine, autograds in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, autograds, rtol=1e-11, atol=1e-14)


def test_what_is_not_learned_stays_or_is_merged_once() -> None:
    net, states = nets(2)
    base = named(net)
    merged = Merged(
        net,
        StateVectors(base, states),
        Layout.of({"embed.weight": (7, 5)}),
        fixed={"norm.weight": (0.25, 0.5), "shift": (1.0, 0.0)},
    )
    merged.write(torch.tensor([[0.0], [1.0]], dtype=torch.float64))

    found = named(net)
    torch.testing.assert_close(found["embed.weight"], states[1]["embed.weight"])
    torch.testing.assert_close(found["shift"], states[0]["shift"])
    expected = 0.25 * base["norm.weight"] + 0.25 * states[0]["norm.weight"] + 0.5 * states[1]["norm.weight"]
    torch.testing.assert_close(found["norm.weight"], expected)
    assert torch.equal(found["conv.weight"], base["conv.weight"])
    objectives.entropy(net(TOKENS)).backward()
    assert all(each.grad is None for each in net.parameters()), "gradients are let go as they arrive"
    merged.close()
    objectives.entropy(net(TOKENS)).backward()
    assert net.embed.weight.grad is not None


def test_runs_are_torch_chunks_and_random_parts_are_one_of_all() -> None:
    layout = Layout.of({"w": (7, 5)}, 4)
    cut = torch.arange(35).chunk(4)
    expected = torch.cat([torch.full_like(each, number) for number, each in enumerate(cut)])
    assert torch.equal(parts_of(layout)["w"].flatten(), expected)
    found = parts_of(Layout.of({"w": (400, 50)}, 5, rule="random"))["w"]
    counts = torch.bincount(found.flatten(), minlength=5)
    assert counts.min() > 3_700 and counts.max() < 4_300
    assert not torch.equal(found, parts_of(Layout.of({"w": (400, 50)}, 5, rule="random", seed=1))["w"])
    assert torch.equal(found[:7, :], parts_of(Layout.of({"w": (7, 50)}, 5, rule="random"))["w"])


class Counted(StateVectors):
    """Counts what is asked for."""

    asked = 0

    def vector(self, name: str, model: int) -> Tensor:
        self.asked += 1
        return super().vector(name, model)


def test_a_cache_keeps_what_finds_room() -> None:
    net, states = nets(2)
    base = named(net)
    vectors = Counted(base, states)
    shapes = {name: base[name].shape for name in LEARNED}
    none, some, all_ = Cached(vectors, 0), Cached(vectors, 300), Cached(vectors, 10_000)
    found = []
    for cached in (none, some, all_):
        vectors.asked = 0
        merged = Merged(Net().double(), cached, Layout.of(shapes))
        for _ in range(3):
            merged.write(torch.full((2, 5), 0.5, dtype=torch.float64))
        found.append((vectors.asked, named(merged.module)["embed.weight"]))
    asked = [count for count, _ in found]
    assert asked[0] == 30 and asked[0] > asked[1] > asked[2] == 10
    assert all(torch.equal(each, found[0][1]) for _, each in found)


def distilled(net: nn.Module, states: list[Tensors]) -> Callable[[int], Any]:
    teachers = []
    for state in states:
        teacher = Net().double()
        teacher.load_state_dict(state | {"head.weight": state["embed.weight"]})
        teachers.append(teacher(TOKENS).detach())

    def loss(task: int) -> Any:
        lost = objectives.distillation(net(TOKENS), teachers[task])
        return lost, {f"task {task}": lost.item()}

    return loss


def run(stop_after: int | None = None, kept: Kept | None = None, *, choose: bool = True) -> Any:
    net, states = nets(2)
    base = named(net)
    layout = Layout.of({name: base[name].shape for name in LEARNED})
    merged = Merged(net, StateVectors(base, states), layout)
    loss, saved = distilled(net, states), []

    def keep(made: Kept) -> None:
        saved.append(made)
        if made.step == stop_after:
            raise InterruptedError

    found = None
    with contextlib.suppress(InterruptedError):
        found = learn(
            merged,
            Sigmoid(0.1),
            loss,
            [[0, 1]] * 8,
            Schedule(rate=0.5, anchor=0.01, period=5),
            check=lambda: {"held out": objectives.entropy(net(TOKENS)).item()},
            every=3,
            choose=choose,
            kept=kept,
            keep=keep,
        )
    return found, saved, named(net)


def test_learning_lowers_the_loss_and_goes_on_where_it_was_to_the_same_bits() -> None:
    whole, _, net = run()
    losses = [point["loss"] for point in whole.curve if "loss" in point]
    assert losses[-1] < losses[0] and len(losses) == 8
    assert list(whole.curve[0]) == ["step", "loss", "task 0", "task 1", "anchor", "held out"]
    assert [point["step"] for point in whole.curve if "held out" in point] == [0, 3, 6, 8]
    assert whole.best_step == min(whole.curve, key=lambda point: point.get("held out", math.inf))["step"]

    _, saved, _ = run(stop_after=4)
    again, _, net_again = run(kept=saved[-1])
    assert torch.equal(again.values, whole.values) and again.curve == whole.curve
    assert all(torch.equal(net[name], net_again[name]) for name in net)


def test_what_is_held_out_may_only_watch() -> None:
    """Then the last coefficients are the result, and the curve is the same."""
    best, _, _ = run()
    last, saved, _ = run(choose=False)
    assert last.curve == best.curve and last.best_step is None
    assert torch.equal(last.values, Sigmoid(0.1)(saved[-1].tensors["raw"], saved[-1].tensors["constants"]))
    assert not torch.equal(last.values, best.values)


def test_a_loss_that_is_no_number_ends_it() -> None:
    net, states = nets(1)
    merged = Merged(net, StateVectors(named(net), states), Layout.of({"scale": ()}))
    with pytest.raises(FloatingPointError, match="nan in step 0"):
        learn(merged, Plain(), lambda _: (net(TOKENS).sum() * math.nan, {}), [[0]], Schedule())


def test_rates_follow_their_shape() -> None:
    restarts = Schedule(rate=0.4, period=4)
    assert [round(restarts.rate_at(step, 8), 6) for step in range(5)] == [0.4, 0.341421, 0.2, 0.058579, 0.4]
    assert replace(restarts, shape="cosine").rate_at(4, 8) == pytest.approx(0.2)
    assert {replace(restarts, shape="constant").rate_at(step, 8) for step in range(8)} == {0.4}


def test_important_tensors_get_the_chunks() -> None:
    base = {"a": torch.zeros(4, dtype=torch.float64), "b": torch.zeros(2, 4, dtype=torch.float64)}
    states = [{"a": torch.ones(4).double(), "b": torch.full((2, 4), 3.0).double()}]
    layout = Layout.of({"a": (4,), "b": (2, 4)})
    shares = importances(StateVectors(base, states), layout, torch.tensor([[0.5, 0.25]], dtype=torch.float64))
    # |c| · mean|τ| · n: 0.5 · 1 · 4 = 2 and 0.25 · 3 · 8 = 6.
    assert shares == pytest.approx({"a": 0.25, "b": 0.75})
    assert chunks(shares, 8) == {"a": 2, "b": 6}
    assert chunks(shares, 8, steepness=0) == {"a": 4, "b": 4}
    assert chunks(shares, 2, steepness=3) == {"a": 0, "b": 1}


def test_objectives_are_means_over_what_counts() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 4, 2], [1, 1, 3]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    places = mask.bool()
    torch.testing.assert_close(
        objectives.cross_entropy(logits, labels, mask), nn.functional.cross_entropy(logits[places], labels[places])
    )
    log = logits.log_softmax(-1)
    torch.testing.assert_close(objectives.entropy(logits), -(log.exp() * log).sum(-1).mean())
    torch.testing.assert_close(objectives.distillation(logits, logits, 2.0), 4 * objectives.entropy(logits / 2))
    assert objectives.hidden_states([logits, logits], [logits + 1, logits + 3]) == pytest.approx(5.0)
    assert [len(each[0][0]) for each in [objectives.next_tokens(logits, labels, mask)]] == [2]


def test_round_robin_is_balanced() -> None:
    assert round_robin([[1, 2, 3], [4], [5, 6]]) == [1, 4, 5, 2, 6, 3]
