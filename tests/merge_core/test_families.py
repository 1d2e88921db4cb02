"""Derived permutations leave a model's function as it is: every family, every permutation of its spec at random."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from merge_core.alignment.derive import derive
from merge_core.alignment.matching import match
from merge_core.alignment.spec import Indices, PermutationSpec
from merge_core.checkpoint import Checkpoint
from merge_core.errors import IncompatibleModels
from tests.conftest import write_checkpoint

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
GROUPED = {**SMALL, "num_key_value_heads": 2}
IMAGES = {**SMALL, "image_size": 8, "patch_size": 4}
ROTATED = {"rope_type": "default", "rope_theta": 1e4}


def made(kind: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**settings))


def clip() -> nn.Module:
    tower = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 1}
    images = {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=dict(SMALL), vision_config={**tower, **images}, projection_dim=12)
    return transformers.CLIPModel(config)


def siglip() -> nn.Module:
    config = transformers.SiglipConfig(text_config=dict(SMALL), vision_config=dict(IMAGES))
    return transformers.SiglipModel(config)


def llava() -> nn.Module:
    text, images = transformers.LlamaConfig(**GROUPED), transformers.CLIPVisionConfig(**{**IMAGES, "hidden_size": 24})
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text, vision_config=images))


def qwen2_vl() -> nn.Module:
    text = {**GROUPED, "rope_parameters": {**ROTATED, "mrope_section": [1, 1, 0]}}
    vision = {"embed_dim": 8, "hidden_size": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    )


SIDED = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 24,
}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "image_size": 8, "patch_size": 2}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
FALCON = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}

MHA = {"neurons": 2, "heads": 2, "qk": 8, "vo": 8}
"""Two layers of four heads without rotation: everything may be permuted."""
GQA = {"neurons": 2, "groups": 2, "heads": 4, "vo": 4}
"""Two layers of two groups of two heads, rotated: q and k dimensions stay where they are."""

FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "bert": (made("BertForSequenceClassification", "BertConfig", **SMALL), MHA),
    "bert-masked": (made("BertForMaskedLM", "BertConfig", **SMALL), MHA),
    "vit": (made("ViTForImageClassification", "ViTConfig", **IMAGES), MHA),
    "clip": (clip, {"neurons": 3, "heads": 3, "qk": 10, "vo": 10, "joint": 1}),
    "gpt2": (made("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=4, vocab_size=32), MHA),
    "llama": (made("LlamaForCausalLM", "LlamaConfig", **GROUPED), GQA),
    "mistral": (made("MistralForCausalLM", "MistralConfig", **{**GROUPED, "head_dim": 8}), GQA),
    "qwen2": (made("Qwen2ForCausalLM", "Qwen2Config", **GROUPED, tie_word_embeddings=True), GQA),
    "qwen3": (made("Qwen3ForCausalLM", "Qwen3Config", **{**GROUPED, "head_dim": 8}), GQA),
    "phi3": (made("Phi3ForCausalLM", "Phi3Config", **GROUPED, pad_token_id=0), GQA),
    "neox": (
        made("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL, rope_parameters={**ROTATED, "partial_rotary_factor": 0.5}),
        MHA,
    ),
    "mixtral": (
        made("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=3, num_experts_per_tok=2),
        {**GQA, "experts": 2},
    ),
    "qwen3-moe": (
        made(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **GROUPED,
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
        ),
        {**GQA, "experts": 2},
    ),
    "resnet": (
        made("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]),
        {"convolution": 8},
    ),
    "resnet-basic": (
        made(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 2],
            layer_type="basic",
        ),
        {"convolution": 5},
    ),
    "siglip": (siglip, {"neurons": 5, "heads": 5, "qk": 20, "vo": 20}),
    "gemma": (
        made("GemmaForCausalLM", "GemmaConfig", **{**SMALL, "num_key_value_heads": 1, "head_dim": 8}),
        {"neurons": 2, "heads": 2, "vo": 2},
    ),
    "gemma3": (made("Gemma3ForCausalLM", "Gemma3TextConfig", **{**GROUPED, "head_dim": 8}), GQA),
    "t5": (
        made("T5ForConditionalGeneration", "T5Config", **T5, feed_forward_proj="gated-gelu"),
        {"neurons": 4, "heads": 4, "qk": 12, "vo": 12},
    ),
    "bart": (
        made("BartForConditionalGeneration", "BartConfig", **SIDED, vocab_size=32),
        {"neurons": 2, "heads": 3, "qk": 10, "vo": 10},
    ),
    "whisper": (
        made(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **SIDED,
            vocab_size=40,
            num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            max_source_positions=20,
        ),
        {"neurons": 2, "heads": 3, "qk": 10, "vo": 10},
    ),
    "distilbert": (
        made(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            dim=16,
            hidden_dim=24,
            n_layers=2,
            n_heads=4,
            vocab_size=32,
        ),
        {**MHA, "neurons": 3},
    ),
    "roberta": (made("RobertaForSequenceClassification", "RobertaConfig", **SMALL), {**MHA, "neurons": 3}),
    "deberta": (
        made(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **SMALL,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            max_relative_positions=8,
        ),
        MHA,
    ),
    "albert": (
        made("AlbertForMaskedLM", "AlbertConfig", **SMALL, embedding_size=8),
        {"neurons": 1, "heads": 1, "qk": 4, "vo": 4},
    ),
    "electra": (
        made("ElectraForSequenceClassification", "ElectraConfig", **SMALL, embedding_size=8),
        {**MHA, "neurons": 3},
    ),
    "opt": (made("OPTForCausalLM", "OPTConfig", **{**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}), MHA),
    "falcon": (made("FalconForCausalLM", "FalconConfig", **FALCON), {"neurons": 1, "heads": 1, "vo": 1}),
    "falcon-grouped": (
        made("FalconForCausalLM", "FalconConfig", **FALCON, new_decoder_architecture=True, num_kv_heads=2),
        {"neurons": 1, "groups": 1, "heads": 2, "vo": 2},
    ),
    "falcon-alibi": (
        made("FalconForCausalLM", "FalconConfig", **FALCON, alibi=True, multi_query=False),
        {"neurons": 1, "vo": 4},
    ),
    "bloom": (
        made("BloomForCausalLM", "BloomConfig", hidden_size=16, n_layer=2, n_head=4, vocab_size=32),
        {"neurons": 2, "vo": 8},
    ),
    "mpt": (
        made("MptForCausalLM", "MptConfig", d_model=16, n_heads=4, n_layers=1, vocab_size=32),
        {"neurons": 1, "qk": 4, "vo": 4},
    ),
    "gptj": (
        made("GPTJForCausalLM", "GPTJConfig", n_embd=16, n_layer=1, n_head=2, vocab_size=32, rotary_dim=4),
        {"neurons": 1, "heads": 1, "qk": 2, "vo": 2},
    ),
    "starcoder": (
        made("GPTBigCodeForCausalLM", "GPTBigCodeConfig", n_embd=16, n_layer=1, n_head=4, vocab_size=32),
        {"neurons": 1, "heads": 1, "qk": 1, "vo": 1},
    ),
    "persimmon": (
        made("PersimmonForCausalLM", "PersimmonConfig", **SMALL, pad_token_id=0),
        {"neurons": 2, "heads": 2, "vo": 8},
    ),
    "roformer": (
        made("RoFormerForSequenceClassification", "RoFormerConfig", **SMALL, embedding_size=16),
        {"neurons": 3, "heads": 2, "vo": 8},
    ),
    "mpnet": (made("MPNetForSequenceClassification", "MPNetConfig", **SMALL), {"neurons": 3, "qk": 8, "vo": 8}),
    "olmo2": (made("Olmo2ForCausalLM", "Olmo2Config", **GROUPED), GQA),
    "cohere": (made("CohereForCausalLM", "CohereConfig", **GROUPED, use_qk_norm=True), GQA),
    "deit": (made("DeiTForImageClassificationWithTeacher", "DeiTConfig", **IMAGES), MHA),
    "beit": (made("BeitForImageClassification", "BeitConfig", **IMAGES, use_relative_position_bias=True), MHA),
    "beit-shared-bias": (
        made("BeitForImageClassification", "BeitConfig", **IMAGES, use_shared_relative_position_bias=True),
        {"neurons": 2, "qk": 8, "vo": 8},
    ),
    "dinov2": (made("Dinov2ForImageClassification", "Dinov2Config", **{**IMAGES, "mlp_ratio": 2}), MHA),
    "swin": (made("SwinForImageClassification", "SwinConfig", **SWIN), {"neurons": 2, "heads": 2, "qk": 6, "vo": 6}),
    "convnext": (
        made("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        {"neurons": 2},
    ),
    "convnext-v2": (
        made("ConvNextV2ForImageClassification", "ConvNextV2Config", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        {"neurons": 2},
    ),
    "wav2vec2": (
        made(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            **SMALL,
            conv_dim=[8, 8],
            conv_kernel=[3, 3],
            conv_stride=[2, 2],
            num_feat_extract_layers=2,
            num_conv_pos_embedding_groups=2,
            num_conv_pos_embeddings=4,
        ),
        MHA,
    ),
    "llava": (llava, {"neurons": 5, "groups": 2, "heads": 6, "vo": 12}),
    "qwen2-vl": (qwen2_vl, {"neurons": 4, "groups": 2, "heads": 5, "vo": 6}),
}
"""How a small model is made, and how many permutations of each kind are exact for it."""

STORED_OTHERWISE: dict[str, dict[str, int]] = {
    "vit": MHA,
    "mixtral": {**GQA, "neurons": 6},
    "beit": MHA,
    "llava": FAMILIES["llava"][1],
    "qwen2-vl": FAMILIES["qwen2-vl"][1],
}
"""Families whose files have other names than the model in memory, and how many permutations those show."""

STREAM_UNKNOWN = frozenset(
    {"bert-masked", "siglip", "whisper", "albert", "swin", "convnext", "convnext-v2", "wav2vec2", "llava", "qwen2-vl"}
)
"""Families whose residual stream cannot be followed from names: they are refused, but only with `residual`."""

MATCHED = [
    *("bert", "vit", "clip", "gpt2", "llama", "mistral", "qwen2", "qwen3"),
    *("phi3", "neox", "mixtral", "resnet", "t5"),
]
"""Families on which a permutation that was planted is found again."""


class Block(nn.Module):
    """A residual block with torchvision's names; `first` puts norms before the convolutions."""

    def __init__(
        self,
        read: int,
        inner: int,
        write: int,
        *,
        deep: bool,
        groups: int = 1,
        norm: Any = nn.BatchNorm2d,
        first: bool = False,
    ) -> None:
        super().__init__()
        widths = [read, inner, inner, write] if deep else [read, inner, write]
        sizes = [1, 3, 1] if deep else [3, 3]
        self.count, self.first = len(sizes), first
        for i, (one, other, size) in enumerate(zip(widths, widths[1:], sizes, strict=False), 1):
            grouped = groups if deep and i == 2 else 1
            setattr(self, f"conv{i}", nn.Conv2d(one, other, size, padding=size // 2, groups=grouped, bias=False))
            setattr(self, f"bn{i}", norm(one if first else other))
        self.downsample = nn.Sequential(nn.Conv2d(read, write, 1, bias=False), norm(write)) if read != write else None

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.count + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            x = conv(norm(x).relu()) if self.first else norm(conv(x).relu() if i > 1 else conv(x))
        return x + skip if self.first else (x + skip).relu()


class ResNet(nn.Module):
    """A residual network with torchvision's names: two stages of two blocks."""

    def __init__(self, *, first: bool = False, norm: Any = nn.BatchNorm2d, **settings: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(16 if first else 8)
        self.first = first
        kind = {"norm": norm, "first": first, **settings}
        self.layer1 = nn.Sequential(Block(8, 12, 8, **kind), Block(8, 12, 8, **kind))
        self.layer2 = nn.Sequential(Block(8, 12, 16, **kind), Block(16, 12, 16, **kind))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.layer2(self.layer1(x if self.first else self.bn1(x)))
        return self.fc((self.bn1(x) if self.first else x).mean((2, 3)))


class Named(nn.Module):
    """Modules in a row under names of one's own."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


def vgg() -> nn.Module:
    def stage(read: int, write: int) -> list[nn.Module]:
        return [nn.Conv2d(read, write, 3, padding=1), nn.BatchNorm2d(write), nn.ReLU()]

    features = nn.Sequential(*stage(3, 6), *stage(6, 8), nn.MaxPool2d(2), *stage(8, 10))
    classifier = nn.Sequential(
        nn.Linear(90, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 14), nn.ReLU(), nn.Dropout(), nn.Linear(14, 5)
    )
    return Named(features=features, avgpool=nn.AdaptiveAvgPool2d(3), flatten=nn.Flatten(), classifier=classifier)


def separable() -> nn.Module:
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 10, 1),
    ]
    return Named(features=nn.Sequential(*layers), flatten=nn.Flatten(), fc=nn.Linear(160, 5))


class NormedHeads(nn.Module):
    """An attention without positions whose queries and keys pass through norms over the dimensions of a head."""

    def __init__(self, *, per_head: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(12), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.attn.add_module(name, nn.Linear(12, 12))
        for name in ("q_norm", "k_norm"):
            norm = nn.Module()
            norm.weight = nn.Parameter(torch.ones((3, 4) if per_head else 4))
            self.attn.add_module(name, norm)

    def forward(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        y = self.norm1(x)
        q, k, v = (getattr(attn, f"{name}_proj")(y).unflatten(-1, (3, 4)) for name in "qkv")
        q = (nn.functional.rms_norm(q, (4,)) * attn.q_norm.weight).transpose(1, 2)
        k = (nn.functional.rms_norm(k, (4,)) * attn.k_norm.weight).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v.transpose(1, 2))
        return x + attn.out_proj(mixed.transpose(1, 2).flatten(2))


def normed_heads(*, per_head: bool) -> nn.Module:
    layers = nn.Sequential(NormedHeads(per_head=per_head), NormedHeads(per_head=per_head))
    return Named(position_embedding=Shift(), layers=layers)


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "sequential": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4)),
        (6,),
        {"0": 8, "2": 9},
    ),
    "no-biases": (
        lambda: Named(layers=nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(11)))),
        (8,),
        {f"layers.{i}": 8 for i in range(10)},
    ),
    "batch-norm": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 9), nn.LayerNorm(9), nn.Linear(9, 4)
        ),
        (6,),
        {"0": 8, "3": 9},
    ),
    "numbered": (
        lambda: Named(
            fc1=nn.Linear(6, 8), bn1=nn.BatchNorm1d(8), fc2=nn.Linear(8, 8), bn2=nn.BatchNorm1d(8), fc3=nn.Linear(8, 4)
        ),
        (6,),
        {"fc1": 8, "fc2": 8},
    ),
    "told-by-words": (
        lambda: Named(
            input_layer=nn.Linear(6, 7),
            hidden=nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7)),
            output_layer=nn.Linear(7, 4),
        ),
        (6,),
        {"input_layer": 7, "hidden.0": 7, "hidden.2": 7},
    ),
    "told-by-sizes": (lambda: Named(up=nn.Linear(6, 8), act=nn.ReLU(), down=nn.Linear(8, 4)), (6,), {"up": 8}),
    "lenet": (
        lambda: Named(
            conv1=nn.Conv2d(3, 6, 3),
            conv2=nn.Conv2d(6, 7, 3),
            flatten=nn.Flatten(),
            fc1=nn.Linear(112, 9),
            fc2=nn.Linear(9, 4),
        ),
        (3, 8, 8),
        {"conv1": 6, "conv2": 7, "fc1": 9},
    ),
    "vgg": (
        vgg,
        (3, 8, 8),
        {"features.0": 6, "features.3": 8, "features.7": 10, "classifier.0": 12, "classifier.3": 14},
    ),
    "separable": (separable, (3, 8, 8), {"features.0": 8, "features.5": 10}),
    "resnet": (
        lambda: ResNet(deep=False),
        (3, 8, 8),
        {
            "conv1": 8,
            "layer1.0.conv1": 12,
            "layer1.1.conv1": 12,
            "layer2.0.conv1": 12,
            "layer2.1.conv1": 12,
            "layer2.0.downsample.0": 16,
        },
    ),
    "bottleneck": (
        lambda: ResNet(deep=True),
        (3, 8, 8),
        {"conv1": 8, "layer2.0.downsample.0": 16}
        | {f"layer{s}.{b}.conv{c}": 12 for s in (1, 2) for b in (0, 1) for c in (1, 2)},
    ),
    "resnext": (
        lambda: ResNet(deep=True, groups=3),
        (3, 8, 8),
        {"conv1": 8, "layer2.0.downsample.0": 16}
        | {
            f"layer{s}.{b}.conv1.{kind}": n
            for s in (1, 2)
            for b in (0, 1)
            for kind, n in (("groups", 3), ("inside", 4))
        }
        | {f"layer{s}.{b}.conv2.{g}": 4 for s in (1, 2) for b in (0, 1) for g in range(3)},
    ),
    "norm-first": (
        lambda: ResNet(deep=False, first=True),
        (3, 8, 8),
        {
            "conv1": 8,
            "layer1.0.conv1": 12,
            "layer1.1.conv1": 12,
            "layer2.0.conv1": 12,
            "layer2.1.conv1": 12,
            "layer2.0.downsample.0": 16,
        },
    ),
}
"""How a network is made, the shape of one input, and the permutations with their sizes."""


def group_norms() -> nn.Module:
    return ResNet(deep=False, norm=lambda size: nn.GroupNorm(4, size))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same networks every time, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterable[None]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()


def shaken(model: nn.Module) -> nn.Module:
    """The model with every weight, bias, norm and running statistic moved away from where it starts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * (0.15 if tensor.ndim > 1 else 0.3))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.3)
            elif name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def moving(spec: PermutationSpec, seed: int = 1) -> dict[str, Indices]:
    """Random permutations, none of which leaves everything where it is."""
    return {
        name: np.roll(index, 1) if (index == np.arange(len(index))).all() else index
        for name, index in spec.random(seed).items()
    }


def applied(spec: PermutationSpec, tensors: Mapping[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    indexed = moving(spec, seed)
    found = {}
    for name, tensor in tensors.items():
        for axis, index in enumerate(spec.indices(name, indexed)):
            tensor = tensor if index is None else tensor.index_select(axis, torch.from_numpy(index))
        found[name] = tensor.contiguous()
    return found


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def kinds(spec: PermutationSpec) -> dict[str, int]:
    """How many permutations there are of each kind: the last word of their names that is no number."""
    return dict(Counter(re.sub(r"\.\d+$", "", name).rpartition(".")[2] for name in spec.permutations))


def matched(
    spec: PermutationSpec, reference: Mapping[str, Tensor], model: Mapping[str, Tensor], folder: Path
) -> Mapping[str, Indices]:
    """The permutations of a model that bring it closest to another."""
    with (
        Checkpoint.open(write_checkpoint(folder / "reference", reference)) as first,
        Checkpoint.open(write_checkpoint(folder / "model", model)) as second,
    ):
        return match(spec, first, second).indexed


def inputs(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    name, tokens = type(model).__name__, torch.randint(3, 30, (2, 7), generator=generator)
    found: dict[str, Tensor] = {}
    if model.main_input_name == "input_ids" or model.config.is_encoder_decoder:
        found["decoder_input_ids" if name.startswith("Whisper") else "input_ids"] = tokens
    if name.startswith(("T5", "Bart")):
        found["decoder_input_ids"] = tokens.flip(1)
    if model.main_input_name == "pixel_values" or name.startswith(("CLIP", "Siglip")):
        size = 32 if name.startswith(("ResNet", "ConvNext")) else 8
        found["pixel_values"] = torch.randn(2, 3, size, size, generator=generator)
    if name.startswith("Whisper"):
        found["input_features"] = torch.randn(2, 8, 40, generator=generator)
    if name.startswith("Wav2Vec2"):
        found["input_values"] = torch.randn(2, 64, generator=generator)
    return found


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(**inputs(model))
    return found["logits_per_text"] if "logits_per_text" in found else found["logits"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permuted_transformer_computes_the_same(family: str) -> None:
    make, expected = FAMILIES[family]
    model = shaken(make())
    before, tensors = outputs(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    streams = {} if "resnet" in family else {"residual": 2 if family == "clip" else 1}
    for residual, known in ((False, expected), (True, {**expected, **streams})):
        if residual and family in STREAM_UNKNOWN:
            with pytest.raises(IncompatibleModels, match=r"residual stream|pass on to one another"):
                derive(shapes(tensors), model.config.to_dict(), residual=True)
            continue
        spec = derive(shapes(tensors), model.config.to_dict(), residual=residual)
        permuted = applied(spec, tensors)
        model.load_state_dict(permuted)

        assert kinds(spec) == known
        assert outputs(model) == pytest.approx(before, abs=1e-5, rel=1e-5)
        assert not any(torch.equal(permuted[name], tensors[name]) for name in tensors if any(spec.axes[name]))


@pytest.mark.parametrize(
    ("family", "residual"),
    [*((each, False) for each in MATCHED), *((each, True) for each in ("bert", "clip", "llama"))],
)
def test_a_planted_permutation_is_found(family: str, residual: bool, tmp_path: Path) -> None:
    model: Any = shaken(FAMILIES[family][0]())
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec = derive(shapes(tensors), model.config.to_dict(), residual=residual)
    assert_found_again(spec, tensors, tmp_path)


@pytest.mark.parametrize("network", ["sequential", "batch-norm", "lenet", "vgg", "resnet", "bottleneck"])
def test_a_planted_permutation_of_a_plain_network_is_found(network: str, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in shaken(NETWORKS[network][0]()).state_dict().items()}
    assert_found_again(derive(shapes(tensors), {}), tensors, tmp_path)


def assert_found_again(spec: PermutationSpec, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Of a noisy copy that was permuted."""
    noise = torch.Generator().manual_seed(3)
    other = {
        name: tensor + 1e-3 * torch.randn(tensor.shape, generator=noise) if tensor.is_floating_point() else tensor
        for name, tensor in applied(spec, tensors).items()
    }
    found = matched(spec, tensors, other, folder)

    for name, index in spec.then(moving(spec), found).items():
        assert index.tolist() == list(range(len(index))), name


@pytest.mark.parametrize("family", STORED_OTHERWISE)
def test_a_model_is_permuted_by_the_names_in_its_files(family: str, tmp_path: Path) -> None:
    model = shaken(FAMILIES[family][0]())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")

    spec = derive(shapes(tensors), json.loads((tmp_path / "config.json").read_text()))
    save_file(applied(spec, tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})

    assert tensors.keys() != model.state_dict().keys()
    assert kinds(spec) == STORED_OTHERWISE[family]
    assert outputs(type(model).from_pretrained(tmp_path).eval()) == pytest.approx(outputs(model), abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_network_computes_the_same(name: str) -> None:
    make, shape, expected = NETWORKS[name]
    model, data = shaken(make()), torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    before, tensors = model(data).detach(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = {name for name in tensors if "running" in name}

    spec = derive(shapes(tensors), {})
    permuted = applied(spec, tensors)
    model.load_state_dict(permuted)

    assert spec.permutations == expected
    assert spec.unmeasured == statistics
    assert model(data).detach() == pytest.approx(before, abs=1e-5, rel=1e-5)
    assert not any(torch.equal(permuted[name], tensors[name]) for name in tensors if any(spec.axes[name]))


PARTS = {f"layers.0.attn.{part}_proj.weight": (8, 8) for part in "qkvo"}

REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "no number of heads": (
        PARTS,
        {},
        r"layers.0.attn.q_proj.weight \[8, 8\]: the config does not say how many heads .*give a spec of your own",
    ),
    "heads that do not fit": (
        PARTS,
        {"num_attention_heads": 3, "rope_theta": 1e4},
        "do not fit 3 query heads",
    ),
    "no keys": ({"layers.0.attn.q_proj.weight": (8, 8)}, {"n_head": 2}, "a query without key and value beside it"),
    "unknown in an attention": (
        PARTS | {"layers.0.attn.sinks": (2,)},
        {"n_head": 2, "rope_theta": 1e4},
        "layers.0.attn.sinks .* not known in an attention",
    ),
    "quantised": (
        PARTS | {"layers.0.attn.q_proj.weight_scale": (8, 1)},
        {"n_head": 2, "rope_theta": 1e4},
        "layers.0.attn.q_proj.weight_scale",
    ),
    "unknown among neurons": (
        {"layers.0.mlp.fc1.weight": (12, 8), "layers.0.mlp.fc2.weight": (8, 12), "layers.0.mlp.mask": (12,)},
        {},
        "layers.0.mlp.mask .* stands among 12 neurons",
    ),
    "interleaved experts": (
        {"layers.0.mlp.experts.gate_up_proj": (4, 8, 24), "layers.0.mlp.experts.down_proj": (4, 12, 8)},
        {},
        "neurons of several experts",
    ),
    "shared keys": (
        PARTS,
        {"n_head": 2, "rope_theta": 1e4, "num_kv_shared_layers": 1},
        "num_kv_shared_layers",
    ),
    "plain blocks": (
        {f"stage{s}.{i}.conv{c}.weight": (4, 4, 3, 3) for s in (1, 2) for i in (0, 1) for c in (1, 2)},
        {},
        "stage1.0 has several layers; whether it adds its input to what they give is not in the names",
    ),
    "squeeze and excite": (
        {"conv1.weight": (4, 3, 3, 3), "se.fc1.weight": (2, 4), "se.fc2.weight": (4, 2), "fc.weight": (2, 4)},
        {},
        "se.fc1.weight .* the names do not say how the layers around it are connected",
    ),
    "a norm over pixels": (
        {"0.weight": (8, 3, 3, 3), "1.weight": (8, 4, 4), "1.bias": (8, 4, 4), "3.weight": (8, 8, 3, 3)},
        {},
        r"1.weight \[8, 4, 4\]: its role in a network",
    ),
    "a norm over pixels without bias": (
        {"conv1.weight": (8, 3, 3, 3), "norm1.weight": (8, 4, 4), "conv2.weight": (8, 8, 3, 3)},
        {},
        r"norm1.weight \[8, 4, 4\]: its role in a network",
    ),
    "mean and spread": (
        {"tdnn1.weight": (8, 3, 5), "tdnn2.weight": (8, 8, 3), "segment6.weight": (6, 16), "segment7.weight": (2, 6)},
        {},
        "segment6.weight .* reads two numbers for each of 8 channels",
    ),
    "gated convolutions": (
        {"conv1.weight": (8, 3, 3), "conv2.weight": (8, 4, 3), "conv3.weight": (2, 4, 3)},
        {},
        "conv2.weight .* reads 4 of 8 channels: in groups, or halved",
    ),
    "transposed convolutions": (
        {"encoder.0.weight": (8, 3, 3, 3), "decoder.0.weight": (8, 8, 3, 3), "decoder.2.weight": (3, 8, 3, 3)},
        {},
        "decoder.0.weight .* the names do not say how",
    ),
    "rows of an embedding": (
        {"embed.weight": (16, 4), "fc1.weight": (8, 16), "fc2.weight": (2, 8)},
        {},
        "embed.weight .* the names do not say how",
    ),
    "a norm of as many neurons": (
        {"layers.0.mlp.fc1.weight": (8, 8), "layers.0.mlp.norm.weight": (8,), "layers.0.mlp.fc2.weight": (8, 8)},
        {},
        "layers.0.mlp.norm.weight .* stands among 8 neurons",
    ),
    "no order": (
        {"left.weight": (4, 4), "right.weight": (4, 4)},
        {},
        "neither names nor sizes say",
    ),
    "no row": ({"fc1.weight": (4, 4), "fc2.weight": (4, 5)}, {}, "reads 5 channels, but 4 come before it"),
    "recurrent": (
        {"rnn.weight_ih_l0": (8, 4), "rnn.weight_hh_l0": (8, 8), "fc.weight": (2, 8)},
        {},
        "rnn.weight_ih_l0 .* its role in a network",
    ),
    "empty": ({"fc1.weight": (0, 4), "fc2.weight": (2, 0)}, {}, "fc1.weight .* a layer without elements"),
    "a bias without axes": (
        {"layers.0.mlp.fc1.weight": (12, 8), "layers.0.mlp.fc1.bias": (), "layers.0.mlp.fc2.weight": (8, 12)},
        {},
        "layers.0.mlp.fc1.bias .* a tensor of this role has more axes",
    ),
    "one layer": ({"fc.weight": (4, 4)}, {}, "nothing in this model is known to be free to permute"),
    "nothing": ({}, {}, "nothing in this model is known to be free to permute"),
    "digits that are no numbers": ({"a.².weight": (4, 4), "a.³.weight": (4, 4)}, {}, "neither names nor sizes"),
}
"""Tensors, config, and how they are refused."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_to_be_exact_is_refused_by_name(case: str) -> None:
    tensors, config, message = REFUSED[case]

    with pytest.raises(IncompatibleModels, match=message):
        derive(tensors, config)


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": "4", "rope_theta": 1e4},
        {"num_attention_heads": -4},
        {"num_attention_heads": []},
        {"num_attention_heads": 2**40, "rope_theta": 1e4},
        {"text_config": {"text_config": {"text_config": 3}}, "vision_config": []},
    ],
)
def test_a_config_that_nobody_vouches_for_is_no_bug(config: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleModels, match="heads"):
        derive(PARTS, config)


def test_a_spec_of_ones_own_in_its_simple_form_is_all_that_an_unknown_network_needs(tmp_path: Path) -> None:
    """A network that derivation refuses, because its names say nothing about the order of its layers."""
    model, data = shaken(Named(left=nn.Linear(6, 6), right=nn.Linear(6, 6), away=nn.Linear(6, 4))), torch.randn(5, 6)
    before, tensors = model(data).detach(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(IncompatibleModels, match="give a spec of your own"):
        derive(shapes(tensors), {})
    written = json.loads(
        """{"left.weight": ["P_0", null], "left.bias": ["P_0"], "right.weight": ["P_1", "P_0"],
            "right.bias": ["P_1"], "away.weight": [null, "P_1"], "away.bias": [null]}"""
    )

    spec = PermutationSpec.from_data(written, shapes(tensors))
    spec.check(shapes(tensors))
    permuted = applied(spec, tensors)
    model.load_state_dict(permuted)

    assert spec.permutations == {"P_0": 6, "P_1": 6}
    assert model(data).detach() == pytest.approx(before, abs=1e-5, rel=1e-5)
    found = matched(spec, tensors, permuted, tmp_path)
    assert all(index.tolist() == list(range(6)) for index in spec.then(moving(spec), found).values())


@pytest.mark.parametrize("per_head", [False, True])
def test_norms_over_the_dimensions_of_a_head_are_permuted_once_for_all_heads(per_head: bool) -> None:
    model, data = shaken(normed_heads(per_head=per_head)), torch.randn(2, 5, 12)
    before, tensors = model(data).detach(), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    spec = derive(shapes(tensors), {"num_attention_heads": 3})
    model.load_state_dict(applied(spec, tensors))

    assert kinds(spec) == {"heads": 2, "qk": 2, "vo": 6}
    assert model(data).detach() == pytest.approx(before, abs=1e-5, rel=1e-5)


def test_group_norm_moves_whole_groups_and_inside_groups() -> None:
    model, data = shaken(group_norms()), torch.randn(3, 3, 8, 8)
    before, tensors = model(data).detach(), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    spec = derive(shapes(tensors), {"num_groups": 4})
    model.load_state_dict(applied(spec, tensors))

    assert spec.permutations["conv1.groups"] == 4
    assert spec.permutations["layer1.0.conv1.3"] == 3
    assert model(data).detach() == pytest.approx(before, abs=1e-5, rel=1e-5)
    with pytest.raises(IncompatibleModels, match="may be a GroupNorm; the config does not say of how many groups"):
        derive(shapes(tensors), {})
