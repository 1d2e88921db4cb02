"""Adapters in PEFT's layout: a folder with `adapter_config.json` and `adapter_model.safetensors`.

An adapter says what is added to some weights of a model, s·B·A with thin B and A, and which tensors it replaces.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from merge_core.cards import CARD_NAME, Card, read_card
from merge_core.checkpoint import Checkpoint, check_below
from merge_core.errors import CheckpointError, CheckpointNotFound, UnsafeFormat
from merge_core.headers import IS_UNSAFE, MAX_CONFIG_BYTES, TensorInfo, clip, read_json
from merge_core.patterns import Patterns

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""
MAX_RANK = 2**16
_WHOLE_MODELS = ("model.safetensors", "model.safetensors.index.json")
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<adapter>\.(?!weight$|bias$)[^.]+)?(?P<kind>\.weight|\.bias)?"
)
_SAVED = re.compile(r"(?P<module>.+?)(\.modules_to_save(\.[^.]+)?|\.base_layer)?\.(?P<kind>weight|bias)")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED = {
    "target_parameters": "adapts parameters of expert layers",
    "trainable_token_indices": "trains single tokens",
    "layer_replication": "repeats layers",
    "alora_invocation_tokens": "is switched on by tokens, which no merged weight can be",
    "use_qalora": "pools its inputs (QA-LoRA)",
    "arrow_config": "is a router over adapters (Arrow)",
    "use_bdlora": "is block-diagonal",
}
"""Options of LoRA under which a merged weight would be another one, and what each means."""


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    try:
        return (path / CONFIG_NAME).is_file() and not any((path / name).exists() for name in _WHOLE_MODELS)
    except OSError:
        return False  # whoever opens it says what is wrong with the name


def lora_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    base: str | None,
    task_type: str | None,
    targets: Sequence[str],
    saved: Sequence[str] = (),
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """`adapter_config.json` for modules of these ranks and alphas: the commonest, and patterns for the others."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    by_length = sorted(ranks, key=lambda module: (-len(module), module))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: ranks[module] for module in by_length if ranks[module] != rank},
        "alpha_pattern": {module: alphas[module] for module in by_length if alphas[module] != alpha},
        "target_modules": list(targets),
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


class AdapterConfig(BaseModel):
    """What `adapter_config.json` says that bears on the weights; PEFT's defaults."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    peft_type: Literal["LORA"]
    r: int = Field(8, ge=1, le=MAX_RANK)
    lora_alpha: float = Field(8, allow_inf_nan=False)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    exclude_modules: list[str] | str | None = None

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _none_is_empty(cls, written: Any) -> Any:
        return {} if written is None else written

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas_are_finite(cls, alphas: dict[str, float]) -> dict[str, float]:
        if not all(math.isfinite(alpha) for alpha in alphas.values()):
            raise ValueError("holds a value that is not a finite number")
        return alphas

    @field_validator("init_lora_weights")
    @classmethod
    def _leaves_the_base(cls, written: bool | str | None) -> bool | str | None:
        if isinstance(written, str) and written.lower().startswith(_CHANGES_BASE):
            raise ValueError(f"{clip(written)} changes the base model too; convert the adapter to plain LoRA with PEFT")
        return written

    @classmethod
    def read(cls, path: Path, roots: Sequence[Path] | None = None) -> Self:
        """Raises `CheckpointError` naming every key that is wrong."""
        written = read_json(path, MAX_CONFIG_BYTES, roots)
        kind = written.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(path, f"describes a {clip(str(kind))} adapter; only LORA can be applied")
        for key, meaning in _REFUSED.items():
            if written.get(key):
                raise CheckpointError(path, f"sets {key}: the adapter {meaning}, which is not supported")
        try:
            return cls.model_validate(written)
        except ValidationError as error:
            wrong = "; ".join(f"{clip('.'.join(map(str, found['loc'])))}: {found['msg']}" for found in error.errors())
            raise CheckpointError(path, f"is not a configuration that can be used: {clip(wrong)}") from None


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one weight: `scale` · B·A, or its transpose where `is_embedding`.

    `down` is A, `[rank, inputs…]`, and `up` is B, `[outputs, rank]`; of an embedding A is `[rank, tokens]` and B
    `[width, rank]`. `magnitude` (DoRA) is what each row's norm becomes, `bias` what is added to the bias, also scaled.
    """

    down: TensorInfo
    up: TensorInfo
    scale: float
    is_embedding: bool = False
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class Adapter:
    """An adapter, opened from its headers.

    Attributes: `path`; `config`; `weights`, its tensors as they are stored; `modules`, module name → `Factors`;
    `saved`, tensor name → the stored tensor that replaces it. Names are the adapter's, without PEFT's prefixes.
    """

    def __init__(self, path: Path, config: AdapterConfig, weights: Checkpoint) -> None:
        self.path, self.config, self.weights = path, config, weights
        self.saved: dict[str, TensorInfo] = {}
        self.modules: dict[str, Factors] = {}
        self._sort()

    @classmethod
    def open(cls, path: str | Path, *, roots: Sequence[Path] | None = None) -> Self:
        """Open from config and header. Raises `CheckpointError` and its kin, naming file and tensor."""
        folder = Path(path)
        try:
            check_below(folder, roots)
            if not folder.is_dir():
                raise CheckpointNotFound(clip(str(path)), "is no folder; an adapter is a folder with " + CONFIG_NAME)
            if not (folder / CONFIG_NAME).exists():
                raise CheckpointNotFound(folder, f"holds no {CONFIG_NAME}, so it is no adapter")
            check_below(folder / CONFIG_NAME, roots)
            if not (folder / WEIGHTS_NAME).exists():
                if (folder / "adapter_model.bin").exists():
                    raise UnsafeFormat(folder / "adapter_model.bin", f"is a pickle, which {IS_UNSAFE}")
                raise CheckpointNotFound(folder, f"holds no {WEIGHTS_NAME}")
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(clip(str(path)), f"cannot be read: {clip(str(error))}") from None
        config = AdapterConfig.read(folder / CONFIG_NAME, roots)
        return cls(folder, config, Checkpoint.open(folder / WEIGHTS_NAME, roots=roots))

    @property
    def cards(self) -> Mapping[str, Card]:
        """Its model card, if it has one that can be read."""
        found = read_card(self.path / CARD_NAME, self.weights.roots)
        return {} if found is None else {CARD_NAME: found}

    def _sort(self) -> None:
        """Tell factors from whole tensors by their names, and see that each is complete."""
        parts: dict[str, dict[str, TensorInfo]] = {}
        names: set[str] = set()
        for info in self.weights.tensors.values():
            if info.dtype.kind != "float":
                self._refuse(info, f"is stored as {info.dtype}, not as numbers that can be added")
            name = info.name.removeprefix(PREFIX)
            if factor := _FACTOR.fullmatch(name):
                part = factor["part"] + (".bias" if factor["kind"] == ".bias" else "")
                names.add(factor["adapter"] or ".default")
                if parts.setdefault(factor["module"], {}).setdefault(part, info) is not info:
                    self._refuse(info, "is there twice under different spellings")
            elif saved := _SAVED.fullmatch(name):
                if self.saved.setdefault(f"{saved['module']}.{saved['kind']}", info) is not info:
                    self._refuse(info, "is there twice under different spellings")
            else:
                self._refuse(info, "is neither a factor of LoRA nor a tensor to be replaced")
        if len(names) > 1:
            raise CheckpointError(
                self.weights.path, f"holds several adapters ({', '.join(sorted(clip(n[1:]) for n in names))}); give one"
            )
        if not parts and not self.saved:
            raise CheckpointError(self.weights.path, "holds no tensors")
        ranks = Patterns(self.path / CONFIG_NAME, "rank_pattern", self.config.rank_pattern)
        alphas = Patterns(self.path / CONFIG_NAME, "alpha_pattern", self.config.alpha_pattern)
        for module, found in parts.items():
            self.modules[module] = self._factors(module, found, ranks.get(module), alphas.get(module))

    def _factors(
        self, module: str, parts: Mapping[str, TensorInfo], rank: float | None, alpha: float | None
    ) -> Factors:
        info = next(iter(parts.values()))
        kind = "lora_embedding" if "lora_embedding_A" in parts or "lora_embedding_B" in parts else "lora"
        down, up = parts.get(f"{kind}_A"), parts.get(f"{kind}_B")
        extra = set(parts) - {f"{kind}_A", f"{kind}_B", "lora_magnitude_vector", "lora_B.bias"}
        if down is None or up is None or extra:
            self._refuse(info, f"does not make a pair {kind}_A and {kind}_B with what else there is of {clip(module)}")
        wanted = self.config.r if rank is None else int(rank)
        is_pair = len(down.shape) >= 2 and len(up.shape) >= 2 and math.prod(up.shape[2:]) == 1
        if not is_pair or down.shape[0] != up.shape[1] or not down.shape[0]:
            self._refuse(down, f"is {list(down.shape)}, which does not fit {up.name} {list(up.shape)}")
        if down.shape[0] != wanted:
            self._refuse(down, f"is {list(down.shape)}, of rank {down.shape[0]}, but {CONFIG_NAME} says {wanted}")
        alpha = self.config.lora_alpha if alpha is None else alpha
        scale = alpha / (math.sqrt(wanted) if self.config.use_rslora else wanted)
        magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
        if self.config.use_dora and magnitude is None:
            self._refuse(up, f"has no lora_magnitude_vector beside it, but {CONFIG_NAME} says use_dora: true")
        return Factors(down, up, scale, kind == "lora_embedding", magnitude, bias)

    def _refuse(self, info: TensorInfo, reason: str) -> NoReturn:
        raise CheckpointError(self.weights.path, f"{clip(info.name)} {reason}", tensor=info.name)
