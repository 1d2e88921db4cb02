"""Coefficients chosen by gradient for the four tasks of `four_tasks`: with labels (aTLAS), from the experts' outputs
alone (Expert Merging), and by being decided (AdaMerging).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from app.drawing.svg import Drawing
from benchmarks.digits import TASKS, Net, load_checkpoint
from benchmarks.science.four_tasks import Bench
from benchmarks.science.harness import (
    Claim,
    Experiment,
    Numbers,
    Row,
    at_least,
    claimed,
    compared,
    each,
    mean,
    several,
)
from benchmarks.science.plots import curves, scores
from merge_core.learning import (
    Cached,
    Form,
    Layout,
    Learned,
    Merged,
    Plain,
    Schedule,
    Sigmoid,
    StateVectors,
    learn,
    objectives,
)
from merge_core.learning.steps import Loss

SAMPLES = (5, 20, 300)
"""Unlabelled images of each task, for Expert Merging."""
BATCH = 30
CACHE = 2**26
"""Bytes: all task vectors of so small a network."""
PARTS = 4
"""Runs of a tensor with a coefficient each, as Expert Merging++ cuts it."""

Batch = tuple[str, Tensor]
"""A task, and the numbers of images."""


class Learner:
    """Learns coefficients for the fine-tunes of a bench on its images for tuning, and merges with them by a recipe."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.images, self.labels = bench, bench.validation.test_images, bench.validation.test_labels
        self._generator = torch.Generator().manual_seed(seed)
        self._base, *self._experts = (load_checkpoint(bench.folder / name) for name in (bench.base, *bench.tuned))
        self._teachers = dict(zip(TASKS, self._experts, strict=True))

    def score(
        self,
        name: str,
        form: Form,
        loss: Callable[[Net, Batch], Tensor],
        schedule: Schedule,
        *,
        steps: int,
        samples: int,
        parts: int = 1,
        biases: bool = True,
    ) -> float:
        """What the merge scores. A round has a batch of each task, of its first so many images in a random order."""
        net = load_checkpoint(self.bench.folder / self.bench.base)
        vectors = StateVectors(self._base.state_dict(), [expert.state_dict() for expert in self._experts])
        shapes = {key: vectors.shape(key) for key in self._base.state_dict() if key.startswith("trunk.")}
        layout = Layout.of({key: shape for key, shape in shapes.items() if biases or len(shape) > 1}, parts)
        merged = Merged(net, Cached(vectors, CACHE), layout)
        rounds = self._rounds(steps, samples)

        def mean_loss(batches: Sequence[Batch]) -> Loss:
            return torch.stack([loss(net, batch) for batch in batches]).mean(), {}

        found = learn(merged, form, mean_loss, rounds, schedule)
        return self.bench.score(self._merge(name, found), self.bench.test)

    def labelled(self, net: Net, batch: Batch) -> Tensor:
        """aTLAS: the cross entropy."""
        task, chosen = batch
        return objectives.cross_entropy(net(self.images[chosen], task), self.labels[task][chosen])

    def distilled(self, net: Net, batch: Batch) -> Tensor:
        """Expert Merging: the expert's outputs, and its last hidden layer."""
        task, chosen = batch
        teacher, images = self._teachers[task], self.images[chosen]
        with torch.no_grad():
            wanted, wanted_hidden = teacher(images, task), teacher.trunk(images)
        logits = objectives.distillation(net(images, task), wanted)
        return logits + objectives.hidden_states([net.trunk(images)], [wanted_hidden])

    def undecided(self, net: Net, batch: Batch) -> Tensor:
        """AdaMerging: the entropy."""
        task, chosen = batch
        return objectives.entropy(net(self.images[chosen], task))

    def _rounds(self, steps: int, samples: int) -> list[list[list[Batch]]]:
        """All tasks in one backward pass."""
        orders: dict[str, list[Tensor]] = {task: [] for task in TASKS}
        for batches in orders.values():
            while len(batches) < steps:
                batches.extend(torch.randperm(samples, generator=self._generator).split(BATCH))
        return [[[(task, batches[step]) for task, batches in orders.items()]] for step in range(steps)]

    def _merge(self, name: str, found: Learned) -> Path:
        """By `expert_merging`, with a file of coefficients beside each model."""
        files = [f"{name}-{model}.safetensors" for model in range(len(self.bench.tuned))]
        for model, file in enumerate(files):
            values = {tensor: each[model].float().contiguous() for tensor, each in found.coefficients.items()}
            save_file(values, self.bench.folder / file)
        recipe = self.bench.recipe("expert_merging")
        for model, file in zip(recipe["models"], files, strict=True):
            model["statistics"] = {"coefficients": file}
        return self.bench.merge(recipe)


def run(seed: int, folder: Path) -> Numbers:
    """Learn each way once."""
    bench = Bench(seed, folder)
    learner = Learner(bench, seed)
    found = {
        "average": bench.tested("linear", weight=1),
        "ta 0.3": bench.tested("task_arithmetic", weight=1, **{"lambda": 0.3}),
        "ta tuned": bench.tuned_scale("task_arithmetic", weight=1)[1],
    }
    few_shot = Schedule(rate=0.1, decay=0.0, shape="cosine")
    for name, parts in (("atlas", 1), (f"atlas ×{PARTS}", PARTS)):
        found[name] = learner.score(name, Plain(), learner.labelled, few_shot, steps=100, samples=300, parts=parts)
    for samples in SAMPLES:
        found[f"expert merging {samples}"] = learner.score(
            f"kd-{samples}",
            Sigmoid(0.1),
            learner.distilled,
            Schedule(rate=0.5),
            steps=50,
            samples=samples,
            biases=False,
        )
    slowly = Schedule(rate=1e-3, decay=0.0, shape="constant", clip=None)
    found["entropy"] = learner.score("entropy", Plain(0.3), learner.undecided, slowly, steps=500, samples=300)
    return found


def judge_atlas(runs: Sequence[Numbers]) -> Sequence[Row]:
    """A coefficient of its own for each tensor is better than one λ for all."""
    return [
        at_least(
            "with labels, ahead of task arithmetic, λ tuned",
            each(runs, "atlas", "ta tuned"),
            0.01,
            f"score {mean(runs, 'atlas'):.3f}",
        ),
        claimed(f"{PARTS} coefficients for each tensor, ahead of one", each(runs, f"atlas ×{PARTS}", "atlas"), 0.0),
        compared("others", several(runs, {"average": "average", "task arithmetic, λ tuned": "ta tuned"})),
    ]


def judge_expert_merging(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Without labels, ahead of a λ that nobody tuned."""
    wanted = "expert merging 20"
    return [
        at_least(
            "20 images without labels, ahead of task arithmetic at 0.3",
            each(runs, wanted, "ta 0.3"),
            0.015,
            f"score {mean(runs, wanted):.3f}",
        ),
        claimed(
            "20 images without labels, ahead of task arithmetic, λ tuned with labels",
            each(runs, wanted, "ta tuned"),
            0.0,
        ),
        compared("by images", several(runs, {str(samples): f"expert merging {samples}" for samples in SAMPLES})),
    ]


def judge_entropy(runs: Sequence[Numbers]) -> Sequence[Row]:
    """Being decided is not being right, where tasks are as alike as here."""
    return [
        claimed(
            "without labels, ahead of task arithmetic at 0.3",
            each(runs, "entropy", "ta 0.3"),
            0.0,
            f"score {mean(runs, 'entropy'):.3f}",
        )
    ]


def plots(runs: Sequence[Numbers]) -> Mapping[str, Drawing]:
    """Ways beside one another, and what more images are worth."""
    names = {
        "average": "average",
        "ta 0.3": "task arithmetic at 0.3",
        "ta tuned": "task arithmetic, tuned",
        "atlas": "aTLAS",
        f"atlas ×{PARTS}": f"aTLAS, tensors in {PARTS} runs",
        **{f"expert merging {samples}": f"Expert Merging, {samples} images" for samples in SAMPLES},
        "entropy": "AdaMerging",
    }
    samples = {
        "Expert Merging": {float(count): f"expert merging {count}" for count in SAMPLES},
        "task arithmetic at 0.3": {float(count): "ta 0.3" for count in SAMPLES},
        "task arithmetic, tuned with labels": {float(count): "ta tuned" for count in SAMPLES},
    }
    return {
        "scores": scores(runs, names, "Scores of merges of four fine-tunes by who chose", across="score"),
        "samples": curves(
            runs, samples, "Score by images", across="images of each task, without labels", up="score", log_x=True
        ),
    }


EXPERIMENT = Experiment(
    "learned",
    "Coefficients chosen by gradient",
    "The four fine-tunes and the scores of the experiment above. Coefficients are learned on the 300 images that λ is "
    "tuned on: for each matrix and task, by aTLAS with labels (from 0, Adam at 0.1, a cosine of 100 steps), by Expert "
    "Merging from the experts' outputs and last hidden layers (from 0.1, AdamW at 0.5, 50 steps, γ = 0: what holds "
    "coefficients near 0.1 holds these networks back), by "
    "AdaMerging from the entropy of its own (from 0.3, Adam at 0.001, 500 steps).",
    run,
    range(3),
    (
        Claim(
            "aTLAS",
            "https://arxiv.org/abs/2407.02880",
            "Task vectors scaled by learned coefficients for each parameter block interfere less when they are added.",
            judge_atlas,
        ),
        Claim(
            "Expert Merging",
            "https://arxiv.org/abs/2509.25712",
            "Layer-wise coefficients learned from unlabelled data, so that the merged model answers as its experts do, "
            "surpass strong merging baselines.",
            judge_expert_merging,
        ),
        Claim(
            "AdaMerging",
            "https://arxiv.org/abs/2310.02575",
            "Coefficients that minimise the entropy on unlabelled data are better than task arithmetic by 11 %.",
            judge_entropy,
        ),
    ),
    plots,
    quick=1,
)
