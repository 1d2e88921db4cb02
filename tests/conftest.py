"""Tiny checkpoints: several shards, mixed number formats, an empty and a 0-d tensor, an integer buffer."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge_core import kernels
from merge_core.method import MergeMethod
from merge_core.methods import METHODS, find_method
from tests.services import Postgres, running_postgres
from workers import logs

torch.set_num_threads(1)
os.environ.setdefault("WEIGHTSMITH_HUB_ENDPOINT", "")  # tests about a Hub have their own
os.environ.setdefault("WEIGHTSMITH_AUTH", "none")  # `tests/app/test_auth.py` is about who may come in
collect_ignore = ["mergekit_runs.py"]  # runs under mergekit's Python
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """The Hugging Face layout: tensors dealt out in runs to so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {
            name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors"
            for i, name in enumerate(names)
        }
        for file in set(weight_map.values()):
            save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def mixed_tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A layered model with one of everything; fine-tunes of it differ in their random part only."""
    origin = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)

    def weight(*shape: int, stored: torch.dtype = dtype) -> Tensor:
        start = torch.randn(shape, generator=origin)
        return (start + 0.1 * torch.randn(shape, generator=own) * (seed > 0)).to(stored)

    tensors = {"model.embed_tokens.weight": weight(96, 24)}
    for layer in range(3):
        tensors |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": weight(24, 24),
            f"model.layers.{layer}.mlp.up_proj.weight": weight(40, 24, stored=torch.float16),
            f"model.layers.{layer}.mlp.down_proj.weight": weight(24, 40, stored=torch.float32),
            f"model.layers.{layer}.input_layernorm.weight": weight(24),
        }
    return tensors | {
        "model.norm.weight": weight(24),
        "model.scale": weight(),
        "model.double": weight(7, 5, stored=torch.float64),
        "model.nothing": torch.zeros(0, 4, dtype=dtype),
        "model.steps": torch.tensor([3, 1, 4], dtype=torch.int64),
        "model.mask": torch.tensor([True, False]),
        "lm_head.weight": weight(96, 24),
    }


CONFIG = {
    "model_type": "tiny",
    "num_hidden_layers": 3,
    "vocab_size": 96,
    "hidden_size": 24,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Whoever runs a command in this process has it tell its log to a stderr that is gone afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    levels = {name: logging.getLogger(name).level for name in logs.OURS}
    yield
    root.handlers = handlers
    root.setLevel(level)
    for name, each in levels.items():
        logging.getLogger(name).setLevel(each)
    logging.captureWarnings(capture=False)
    logs._process.clear()


FORMS = ("plain", "compiled")


@contextmanager
def kernels_in(form: str) -> Iterator[None]:
    """Run with one form of the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "are_compiled", lambda: form == "compiled")
        yield


@pytest.fixture(scope="session")
def made_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `models` copies."""
    folder = tmp_path_factory.mktemp("made") / "models"
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        write_checkpoint(folder / name, mixed_tensors(seed), shards=2, config=CONFIG)
    write_checkpoint(folder / "old", mixed_tensors(4), config=CONFIG)
    write_numbers(folder, mixed_tensors(0))
    return folder


@pytest.fixture
def models(made_models: Path, tmp_path: Path) -> Path:
    """A folder with `base` and three fine-tunes `m0`, `m1`, `m2`, in two shards each; also `old`, what they might have
    been tuned from, and files of numbers in each shape that a method may take (`Given.shape`).
    """
    return shutil.copytree(made_models, tmp_path / "models", copy_function=shutil.copyfile)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with running_postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield Postgres(url)


POSTGRES = pytest.param("postgresql", marks=pytest.mark.xdist_group("postgres"))
"""A dialect: what needs the server runs in one process, so that there is one server."""
DIALECTS = ("sqlite", POSTGRES)


@pytest.fixture(params=DIALECTS)
def database(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The settings that select a database: SQLite in the data folder, then PostgreSQL."""
    if request.param == "sqlite":
        yield {}
    else:
        with request.getfixturevalue("postgres").database() as url:
            yield {"database_url": url}


@pytest.fixture(params=DIALECTS)
def empty_database(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The same, without tables."""
    if request.param == "sqlite":
        yield {}
    else:
        with request.getfixturevalue("postgres").database(migrated=False) as url:
            yield {"database_url": url}


def _square(samples: Tensor) -> Tensor:
    return samples.T.float() @ samples.float() / len(samples)


def numbers(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Numbers about every tensor, by shape."""
    generator = torch.Generator().manual_seed(7)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).half()

    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {
        "same": {name: some(*tensor.shape) for name, tensor in floats.items()},
        "columns": {name: some(*tensor.shape[1:]) for name, tensor in floats.items() if tensor.ndim > 1},
        "square": {name: _square(some(5, tensor.shape[1])) for name, tensor in floats.items() if tensor.ndim == 2},
        "vector": {name: some(3) for name in floats},
    }


def write_numbers(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put beside models whatever files `METHOD_RECIPES` name under `statistics`."""
    for shape, found in numbers(tensors).items():
        save_file(found, folder / f"{shape}.safetensors")


def _recipe_of(method: type[MergeMethod]) -> dict[str, Any]:
    base = {"base_model": "base"} if method.base == "required" else {}
    meaning = {"semantics": "paper"} if method.semantics == "paper" and len(METHODS[method.name]) > 1 else {}
    example = method.example_parameters()
    is_per_model = method.parameters()
    whole = method.model_validate({name: (value,) if is_per_model[name] else value for name, value in example.items()})
    files = {name: f"{each.shape}.safetensors" for name, each in method.statistics.items() if whole.needs(name, 0)}
    statistics = {"statistics": files} if files else {}
    return {"merge_method": method.name, **base, **meaning, **statistics, "parameters": example}


VARIANTS: dict[str, dict[str, Any]] = {
    "wise_ft-plain": {"merge_method": "wise_ft", "base_model": "base"},
    "graft-given": {
        "merge_method": "graft",
        "base_model": "base",
        "statistics": {"mask": "same.safetensors"},
        "parameters": {"entries": "given"},
    },
    "ties-exact": {"merge_method": "ties", "base_model": "base", "parameters": {"weight": 1, "density": 0.2}},
    "ties-model-rescaled": {
        "merge_method": "ties",
        "base_model": "base",
        "scope": "model",
        "parameters": {"weight": 1, "density": 0.2, "rescale": True},
    },
    "ties-model": {
        "merge_method": "ties",
        "base_model": "base",
        "scope": "model",
        "parameters": {"weight": 1, "density": 0.2},
    },
    "ties-paper-norms": {
        "merge_method": "ties",
        "base_model": "base",
        "semantics": "paper",
        "scope": "tensor",
        "parameters": {"election": "normmass", "aggregate": "max"},
    },
}
"""Ways to merge that the registry's examples do not take."""
METHOD_RECIPES: dict[str, dict[str, Any]] = {
    f"{name}-paper" if meaning == "paper" and len(meanings) > 1 else name: _recipe_of(method)
    for name, meanings in METHODS.items()
    for meaning, method in meanings.items()
} | VARIANTS
"""Every method with every meaning, and variants, on the models of the `models` fixture (see `method_recipe`)."""


def method_recipe(title: str, **keys: Any) -> dict[str, Any]:
    """One of `METHOD_RECIPES`, complete, with further top-level keys."""
    recipe = METHOD_RECIPES[title]
    method = find_method(recipe["merge_method"], recipe.get("semantics", "mergekit"))
    beside = {"base_model": "old"} if method.own_bases else {}
    return {**recipe, "models": [{"model": name} | beside for name in ("m0", "m1", "m2")[: method.count[1]]], **keys}
