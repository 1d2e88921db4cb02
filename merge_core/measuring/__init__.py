"""Numbers about a model that methods ask for, measured by running it over examples: on any `torch.nn.Module`, no
transformers, no files, no service.

`gradients.py` squares what a backward pass finds (Fisher information, the importances of selective synaptic dampening),
`inputs.py` looks at what enters linear layers (Gram matrices for RegMean and EoRA, means for DAREx-q), `divisors.py`
chooses DAREx-q's q. One model lies in memory; what is measured of it is given out tensor by tensor, as the methods'
statistics files have it, and in as many sweeps over the examples as the memory for it asks for.

    from merge_core.measuring import Examples, fisher, grams, importances

    examples = [Examples(image, labels=label) for image, label in ...]      # each a batch of rows
    for name, numbers in fisher(net, net, examples):                         # net twice: what has the parameters, and
        ...                                                                  # what makes logits of an example's inputs
    save_file(dict(grams(net, net, examples)), "grams.safetensors")
"""

from merge_core.measuring.divisors import (
    Dropped,
    Reciprocal,
    Searched,
    largest,
    layers_of,
    near,
    search_divisor,
    top_logits,
)
from merge_core.measuring.examples import Examples
from merge_core.measuring.gradients import fisher, importances
from merge_core.measuring.inputs import grams, means

__all__ = [
    "Dropped",
    "Examples",
    "Reciprocal",
    "Searched",
    "fisher",
    "grams",
    "importances",
    "largest",
    "layers_of",
    "means",
    "near",
    "search_divisor",
    "top_logits",
]
