"""A difference as a LoRA adapter in PEFT's layout: low-rank changes of matrices, and whole modules.

Matrices inside modules become pairs A and B. Embeddings, heads and norms that changed are stored whole
(`modules_to_save`). What neither can hold, such as the bias of a linear layer, stays as in the base, and a warning says
so; what changes a model's shape is refused.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from merge_core.adapters import CONFIG_NAME, PREFIX, WEIGHTS_NAME, lora_config
from merge_core.dtypes import OUTPUT
from merge_core.errors import IncompatibleModels, Problem
from merge_core.files import WrittenFile, write_text
from merge_core.layers import stacks
from merge_core.layout import Slot, lay_out
from merge_core.patches.encoding import Difference, Encoding, Parts
from merge_core.patches.encodings.low_rank import LowRank
from merge_core.patches.encodings.sparse import Sparse
from merge_core.patches.writing import ALIGNMENT, ONE_FILE, PARTS, Encoded, Extraction, write_file
from merge_core.weights import Weights, is_embedding

_CONV1D_MODELS = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Layers of those models that keep their weights `[inputs, outputs]` (transformers' Conv1D)."""
_MOST_NAMED = 5
_NO_LIMIT = 2**62


class _Pair(LowRank):
    """A and B of one module, as its layer multiplies with them."""

    is_turned: bool = False

    def encode(self, difference: Difference, parts: Parts) -> Mapping[str, Any] | None:
        sides = self.sides(difference, _NO_LIMIT)
        if sides is None:
            return None
        stored = OUTPUT[self.dtype]
        outputs, inputs = sides[::-1] if self.is_turned else sides
        for direction in range(inputs.shape[1]):
            parts.write("A", stored, difference.fitted(inputs[:, direction], stored), width=inputs.shape[0])
        parts.write("B", stored, difference.fitted(outputs, stored), width=outputs.shape[1])
        return {"rank": outputs.shape[1]}

    def most_bytes(self, difference: Difference) -> int:
        rows, width = difference.grains.rows, difference.grains.width
        rank = min(rows, width, self.rank or _NO_LIMIT)
        return rank * (rows + width) * OUTPUT[self.dtype].itemsize


class _Whole(Sparse):
    """All values of a tensor, and whether it changed: a module is stored with all it has or not at all."""

    def encode(self, difference: Difference, parts: Parts) -> Mapping[str, Any]:
        is_changed = False
        for _, _, base, tuned in difference.blocks():
            is_changed = is_changed or not torch.equal(base, tuned.to(base.dtype))
            parts.write("values", difference.dtype, tuned)
        return {"changed": is_changed}


class _Left(Sparse):
    """Nothing, but whether the tensor changed."""

    def encode(self, difference: Difference, parts: Parts) -> Mapping[str, Any] | None:
        changes = [not torch.equal(base, tuned.to(base.dtype)) for _, _, base, tuned in difference.blocks()]
        return {"changed": True} if any(changes) else None

    def most_bytes(self, difference: Difference) -> int:
        return 0


@dataclass(frozen=True)
class AdapterExtraction(Extraction):
    """What becomes of each tensor. Modules are named as the model's tensors are, without `.weight`."""

    config: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        base: Weights,
        tuned: Weights,
        encoding: Encoding,
        tick: Callable[[int], None] = lambda count: None,
        covariance: Weights | None = None,
    ) -> Self:
        """Raises `IncompatibleModels` naming every tensor that an adapter cannot make."""
        assert isinstance(encoding, LowRank)
        problems, pairs, has_layers = [], [], bool(stacks(tuned.tensors))
        for info in tuned.tensors.values():
            stored = base.tensors.get(info.name)
            if (
                stored is None
                or stored.shape != info.shape
                or (stored.dtype.kind == "float") != (info.dtype.kind == "float")
            ):
                has = "lacks it" if stored is None else f"has it as {stored.dtype} {list(stored.shape)}"
                detail = f"{info.name} is {info.dtype} {list(info.shape)}, but the base {has}"
                problems.append(Problem(f"{detail}; an adapter cannot change that, a delta can", tensor=info.name))
            difference = Difference(tuned, info, base, stored, tick, covariance)
            pairs.append((difference, cls._encoding(difference, encoding, tuned, has_layers)))
        for info in base.tensors.values():
            if info.name not in tuned.tensors and base.tied_partner(info.name, info.shape) is None:
                detail = f"{info.name} is not there any more; an adapter cannot take away, a delta can"
                problems.append(Problem(detail, tensor=info.name))
        if problems:
            raise IncompatibleModels.of(problems)
        return cls(tuple(pairs), (), tuned.config)

    @staticmethod
    def _encoding(difference: Difference, encoding: LowRank, tuned: Weights, has_layers: bool) -> Encoding:
        """How a tensor is stored: as a pair, whole with its module, or not."""
        module, _, kind = difference.name.rpartition(".")
        if not difference.is_numeric or kind not in ("weight", "bias"):
            return _Left()
        weight = tuned.tensors.get(f"{module}.weight")
        if weight is None:
            return _Left()
        is_outside = has_layers and len(weight.shape) == 2 and not stacks([weight.name])
        if len(weight.shape) < 2 or is_outside or (len(weight.shape) == 2 and is_embedding(weight.name)):
            return _Whole()
        if kind == "bias":
            return _Left()
        given = encoding.model_dump() | {"min_ratio": 0.0, "is_turned": _is_turned(module, tuned.config)}
        return _Pair.model_validate(given)


def _is_turned(module: str, config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in _CONV1D_MODELS and module.endswith(_CONV1D)


def assemble_adapter(
    encoded: Sequence[Encoded],
    extraction: AdapterExtraction,
    folder: Path,
    base: str,
    *,
    stop: Callable[[], None] = lambda: None,
) -> tuple[list[WrittenFile], dict[str, str], list[str]]:
    """Put the adapter together from its parts: its files, the blake3 of each of its tensors, and what it leaves out.

    Raises `IncompatibleModels` where no matrix changed.
    """
    about = {difference.name: (difference, encoding) for difference, encoding in extraction.pairs}
    ranks = {_module(each.name): each.settings["rank"] for each in encoded if "rank" in each.settings}
    changed = {each.name for each in encoded if each.settings.get("changed")}
    saved = sorted({_module(name) for name in changed if isinstance(about[name][1], _Whole)})
    if not ranks:
        raise IncompatibleModels("no matrix inside a layer differs from the base, which LoRA needs; write kind: delta")
    slots: list[Slot] = []
    files: dict[str, Path] = {}
    digests: dict[str, str] = {}
    for each in encoded:
        difference, encoding = about[each.name]
        for part in each.parts:
            if isinstance(encoding, _Whole) and _module(each.name) not in saved:
                continue
            name, shape = PREFIX + each.name, difference.info.shape
            if isinstance(encoding, _Pair):
                name = f"{PREFIX}{_module(each.name)}.lora_{part.name}.weight"
                kernel = shape[2:]  # of a convolution
                behind = kernel if part.name == "A" else (1,) * len(kernel)
                shape = (part.shape[0], part.shape[1] // math.prod(behind), *behind)
            slots.append(Slot(name, part.dtype, shape))
            files[name], digests[name] = folder / PARTS / f"{each.number:06d}.{part.name}", part.blake3
    stem = Path(WEIGHTS_NAME).stem
    (layout,) = lay_out(slots, ONE_FILE, {"format": "pt"}, stem=stem, alignment=ALIGNMENT)
    written = [write_file(layout, folder, files, stop)]
    shutil.rmtree(folder / PARTS)
    config = _config(ranks, saved, extraction, base)
    written.append(write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False) + "\n"))
    return written, digests, _warnings(changed, saved, about, extraction.config)


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _config(ranks: Mapping[str, int], saved: Sequence[str], extraction: AdapterExtraction, base: str) -> dict[str, Any]:
    matrices = [_module(difference.name) for difference, each in extraction.pairs if isinstance(each, _Pair)]
    ends = {module.rpartition(".")[2] for module in ranks}
    others = [_module(difference.name) for difference, _ in extraction.pairs]
    meant = {module for module in (*matrices, *others) if module.rpartition(".")[2] in ends}
    architectures = extraction.config.get("architectures") or [""]
    is_causal = isinstance(architectures, list) and str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel"))
    return lora_config(
        ranks,
        dict(ranks),
        base=base,
        task_type="CAUSAL_LM" if is_causal else None,
        targets=sorted(ends if meant == set(ranks) else ranks),
        saved=saved,
        fan_in_fan_out=any(_is_turned(module, extraction.config) for module in ranks),
    )


def _warnings(
    changed: set[str],
    saved: Sequence[str],
    about: Mapping[str, tuple[Difference, Encoding]],
    config: Mapping[str, Any],
) -> list[str]:
    """What of the difference is not in the adapter, or not where one would look for it."""
    found = []
    if left := sorted(name for name in changed if isinstance(about[name][1], _Left)):
        named = ", ".join(left[:_MOST_NAMED]) + (f" and {len(left) - _MOST_NAMED} more" if left[_MOST_NAMED:] else "")
        found.append(f"{named}: changed, but a LoRA adapter cannot hold it; it stays as in the base")
    embeddings = [module for module in saved if is_embedding(f"{module}.weight")]
    if embeddings and config.get("tie_word_embeddings") is True:
        what = (
            f"{', '.join(embeddings)}: stored whole, but PEFT leaves a head that is tied to an embedding as in the base"
        )
        found.append(f"{what}; exclude the embedding, or write kind: delta")
    return found
