"""Which tensors make a model's first layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from merge_core.dtypes import FLOAT32, STORED
from merge_core.headers import TensorInfo
from merge_core.patches.shallow import batch_norms, layers

NORM = ("weight", "bias", "running_mean", "running_var")


def infos(shapes: Mapping[str, Sequence[int]]) -> dict[str, TensorInfo]:
    """Tensors in the order of a file, which is that of their names' letters."""
    found = {name: TensorInfo(name, FLOAT32, tuple(shape), "model", 0) for name, shape in sorted(shapes.items())}
    counts = {name.rpartition(".")[0] for name in found if name.endswith("running_mean")}
    return found | {
        f"{norm}.num_batches_tracked": TensorInfo(f"{norm}.num_batches_tracked", STORED["I64"], (), "model", 0)
        for norm in counts
    }


def conv(name: str, *, biased: bool = False) -> dict[str, Sequence[int]]:
    return {f"{name}.weight": (4, 4, 3, 3)} | ({f"{name}.bias": (4,)} if biased else {})


def linear(name: str) -> dict[str, Sequence[int]]:
    return {f"{name}.weight": (4, 4), f"{name}.bias": (4,)}


def norm(name: str) -> dict[str, Sequence[int]]:
    return {f"{name}.{part}": (4,) for part in NORM}


VGG = conv("features.0", biased=True) | conv("features.2", biased=True) | conv("features.10", biased=True)
VGG |= linear("classifier.0") | linear("classifier.3")
VGG_BN = conv("features.0") | norm("features.1") | conv("features.3") | norm("features.4") | linear("classifier.0")
RESNET = conv("conv1") | norm("bn1") | linear("fc")
for stage in (1, 2, 10):
    for block in (0, 1):
        for number in (1, 2):
            RESNET |= conv(f"layer{stage}.{block}.conv{number}") | norm(f"layer{stage}.{block}.bn{number}")
    RESNET |= conv(f"layer{stage}.0.downsample.0") | norm(f"layer{stage}.0.downsample.1")
HUGGING_FACE = conv("resnet.embedder.embedder.convolution") | norm("resnet.embedder.embedder.normalization")
for block in (0, 1):
    for number in (0, 1):
        HUGGING_FACE |= conv(f"resnet.encoder.stages.0.layers.{block}.layer.{number}.convolution")
HUGGING_FACE |= linear("classifier.1")
VIT = conv("vit.embeddings.patch_embeddings.projection") | {"vit.embeddings.position_embeddings": (1, 5, 4)}
for block in (0, 1, 2):
    VIT |= linear(f"vit.encoder.layer.{block}.query") | linear(f"vit.encoder.layer.{block}.output.dense")
VIT |= linear("classifier")
LLAMA = {"model.embed_tokens.weight": (9, 4), "model.norm.weight": (4,)}
for block in range(12):
    LLAMA |= linear(f"model.layers.{block}.q_proj") | linear(f"model.layers.{block}.mlp.up_proj")
    LLAMA |= {f"model.layers.{block}.input_layernorm.weight": (4,)}


@pytest.mark.parametrize(
    ("model", "first"),
    [
        (VGG, ["features.0", "features.2", "features.10"]),
        (VGG_BN, ["features.0", "features.3"]),
        (RESNET, ["conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer10.0", "layer10.1"]),
        (HUGGING_FACE, ["resnet.embedder.embedder", *(f"resnet.encoder.stages.0.layers.{i}" for i in (0, 1))]),
        (
            VIT,
            ["vit.embeddings.patch_embeddings.projection", *(f"vit.encoder.layer.{i}" for i in range(3))],
        ),
        (LLAMA, [f"model.layers.{i}" for i in range(12)]),
        (linear("0") | linear("2") | linear("4"), ["0", "2"]),
        (linear("fc1") | linear("fc2") | linear("fc10"), ["fc1", "fc2"]),
        (conv("conv1") | norm("bn1") | conv("conv2") | norm("bn2") | linear("fc"), ["conv1", "conv2"]),
    ],
    ids=["vgg", "vgg-bn", "resnet", "hugging-face-resnet", "vit", "llama", "sequential", "mlp", "small"],
)
def test_layers_come_from_the_input_on_and_without_the_head(model: dict[str, Sequence[int]], first: list[str]) -> None:
    found = layers(infos(model))
    assert len(found) == len(first)
    for names, prefix in zip(found, first, strict=True):
        assert any(name.startswith(f"{prefix}.") for name in names), (names, prefix)
    assert not any("classifier" in name or name.startswith("fc.") for names in found for name in names)


def test_a_layer_has_its_norms_and_biases() -> None:
    assert layers(infos(VGG))[0] == ["features.0.bias", "features.0.weight"]
    assert set(layers(infos(VGG_BN))[1]) == {"features.3.weight", *norm("features.4")}
    assert set(layers(infos(RESNET))[0]) == {"conv1.weight", *norm("bn1")}
    block = set(layers(infos(RESNET))[1])
    assert {"layer1.0.downsample.0.weight", "layer1.0.bn2.running_var", "layer1.0.conv2.weight"} < block
    small = conv("conv1") | norm("bn1") | conv("conv2") | norm("bn2") | linear("fc")
    assert set(layers(infos(small))[1]) == {"conv2.weight", *norm("bn2")}


def test_batch_norms_are_known_by_their_statistics() -> None:
    assert batch_norms(infos(VGG)) == set()
    assert batch_norms(infos(VGG_BN)) == {*norm("features.1"), *norm("features.4")}
    assert {f"layer1.0.downsample.1.{part}" for part in NORM} < batch_norms(infos(RESNET))
