"""Coefficients of a merge chosen by gradient, on any `torch.nn.Module`: no transformers, no files, no service.

Every learned merge is θ_j = θ₀_j + Σᵢ c_ij ⊙ δ_ij, with c a small function (`forms.py`) of raw numbers, one for each
model and part of a tensor (`parts.py`). So the gradient of c is ⟨∂L/∂θ_j, δ_ij⟩, summed over the part: one model lies
in memory, and as each gradient arrives the task vectors of that tensor are read, multiplied, summed and let go
(`gradients.py`). `steps.py` takes the steps, `objectives.py` has what is minimised, `importance.py` the chunks of
Expert Merging++.

    from merge_core.learning import Layout, Merged, Schedule, Sigmoid, StateVectors, learn, objectives

    vectors = StateVectors(base_tensors, [tensors_of_one_expert, tensors_of_another])   # name → tensor, as state_dict()
    layout = Layout.of({name: vectors.shape(name) for name in learned_names})            # a coefficient per tensor
    merged = Merged(net, vectors, layout)                                                # net's parameters are now ours

    def loss(batch):                                     # whatever batch is; only what it comes to is ours
        distilled = objectives.distillation(net(batch.images), batch.teacher, temperature=1.0)
        return distilled, {"logits": float(distilled)}   # a scalar with a graph, and what the curve tells besides

    learned = learn(merged, Sigmoid(0.1), loss, rounds=[[batch, batch], ...], schedule=Schedule(rate=0.5))
    learned.coefficients["layers.0.weight"]              # [models, parts], float64: as they multiply
    learned.curve                                        # [{"step": 0, "loss": 1.3, "logits": 1.3}, ...]
    merged.write(learned.values)                         # net is the merged model

A round is what one step of the optimizer sees, batch after batch, and their mean counts. `Layout.of(..., parts=4)`
has four runs of each tensor (`rule="runs"`, Expert Merging++) or four random sets of elements (`rule="random"`,
aTLAS ×K); `Layout.shared(...)` one coefficient for the whole of each model. A learned soup has no base:
`learn(Merged(net, StateVectors(None, [...]), layout), Softmax(), ...)`.
"""

from merge_core.learning import objectives
from merge_core.learning.forms import Clamped, Form, Plain, Sigmoid, Softmax
from merge_core.learning.gradients import Merged
from merge_core.learning.importance import chunks, importances
from merge_core.learning.parts import Layout
from merge_core.learning.steps import Learned, Schedule, learn, round_robin
from merge_core.learning.vectors import Cached, StateVectors, Vectors

__all__ = [
    "Cached",
    "Clamped",
    "Form",
    "Layout",
    "Learned",
    "Merged",
    "Plain",
    "Schedule",
    "Sigmoid",
    "Softmax",
    "StateVectors",
    "Vectors",
    "chunks",
    "importances",
    "learn",
    "objectives",
    "round_robin",
]
