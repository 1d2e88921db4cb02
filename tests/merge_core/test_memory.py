"""Memory is a contract: the plan says the most, the process is measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_core.matrices import MatrixMethod
from merge_core.methods import METHODS
from merge_core.sizes import parse_bytes
from tests.conftest import method_recipe, write_checkpoint, write_numbers
from tests.merge_core.test_adapters import write_adapter

PROGRAM = """
import json, sys
from pathlib import Path
from merge_core.merge import merge, plan_only
from merge_core.recipe import Recipe
recipe, models, out = Recipe.from_text(sys.argv[1]), [Path(sys.argv[2])], sys.argv[3]
planned = plan_only(recipe, roots=models, threads=2).memory.peak
merge(recipe, out, roots=models, threads=2)
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps([planned, int(status["VmHWM"].split()[0]) * 1024]))
"""


def write_models(folder: Path, shape: tuple[int, int]) -> Path:
    """Base and three fine-tunes of one bf16 tensor."""
    for seed, name in enumerate(["base", "m0", "m1", "m2"]):
        tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        write_checkpoint(folder / name, {"model.embed.weight": tensor})
        del tensor
    (folder / "old").symlink_to(folder / "m0")
    write_numbers(folder, {"model.embed.weight": torch.empty(shape)})
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensor of 48 MB: 384 MB where all four are held in float32."""
    return write_models(tmp_path_factory.mktemp("large"), (24_000, 1000))


def merge_alone(models: Path, out: Path, recipe: dict[str, Any] | list[dict[str, Any]], form: str = "compiled") -> None:
    """Merge in a process of its own, whose peak must be within the plan and the plan within the limit."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(recipe), str(models), str(out)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "WEIGHTSMITH_KERNELS": form},
    )
    planned, measured = json.loads(ran.stdout)
    last = recipe[-1] if isinstance(recipe, list) else recipe
    assert measured <= planned <= parse_bytes(last["limits"]["memory"])


WHOLE_MATRICES = {name for name, of in METHODS.items() for method in of.values() if issubclass(method, MatrixMethod)}


OF_EACH_KIND = (
    *("linear", "slerp", "nuslerp", "model_stock", "ram", "dare_ties", "della", "breadcrumbs", "breadcrumbs-paper"),
    *("ties", "ties-model", "ties-paper", "ties-paper-norms", "graft", "pcb", "sce", "arcee_fusion", "widen", "darex"),
    *("transfer", "ssd", "half_reset", "expert_merging"),
)
"""Every way to measure and to merge; the contract tests hold each method to its workspace."""


@pytest.mark.parametrize("title", OF_EACH_KIND)
def test_the_process_stays_under_its_limit_and_under_its_plan(large: Path, tmp_path: Path, title: str) -> None:
    merge_alone(large, tmp_path / "out", method_recipe(title, limits={"memory": "512MiB"}))


@pytest.mark.parametrize("title", sorted(WHOLE_MATRICES))
def test_whole_matrices_take_five_times_a_tensor_in_float32(tmp_path: Path, title: str) -> None:
    models = write_models(tmp_path / "models", (15_000, 1000))
    memory = 400 * 2**20 + 5 * 4 * 15_000 * 1000
    merge_alone(models, tmp_path / "out", method_recipe(title, limits={"memory": memory}))


def test_so_it_does_with_adapters(large: Path, tmp_path: Path) -> None:
    parts = {"lora_A.weight": torch.ones(32, 1000), "lora_B.weight": torch.ones(24_000, 32)}
    parts |= {"lora_magnitude_vector": torch.ones(24_000)}
    tensors = {f"base_model.model.model.embed.{name}": tensor for name, tensor in parts.items()}
    for name in ("one", "two"):
        write_adapter(large / name, tensors, r=32)
    recipe = method_recipe("task_arithmetic", limits={"memory": "512MiB"})
    merge_alone(large, tmp_path / "out", recipe | {"models": [{"model": "m0+one"}, {"model": "m1+two"}]})


@pytest.mark.parametrize("title", ["linear", "slerp", "ties", "dare_ties"])
def test_so_it_does_with_plain_kernels(large: Path, tmp_path: Path, title: str) -> None:
    merge_alone(large, tmp_path / "out", method_recipe(title, limits={"memory": "512MiB"}), "plain")


@pytest.mark.parametrize("title", ["linear", "ties", "ties-model", "dare_linear"])
def test_so_it_does_with_many_models_of_one_tensor_larger_than_the_limit(tmp_path: Path, title: str) -> None:
    """600 MB each, in files that are all holes but for their headers."""
    shape, names = (75_000, 4000), ["base", *(f"m{i}" for i in range(9))]
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2 * math.prod(shape)]}
    header = json.dumps({"model.embed.weight": entry}).encode()
    for name in names:
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + entry["data_offsets"][1])  # type: ignore[operator]
    recipe = method_recipe(title, limits={"memory": "512MiB"})
    merge_alone(tmp_path / "models", tmp_path / "out", recipe | {"models": [{"model": name} for name in names[1:]]})


@pytest.mark.parametrize("form", ["plain", "compiled"])
def test_so_do_stages_of_stages(large: Path, tmp_path: Path, form: str) -> None:
    last = {"merge_method": "slerp", "base_model": "one", "models": [{"model": "two"}], "parameters": {"t": 0.5}}
    two = {**method_recipe("dare_ties", name="two"), "models": [{"model": "one"}, {"model": "m2"}]}
    stages = [method_recipe("linear", name="one", dtype="float32"), two]
    merge_alone(large, tmp_path / "out", [*stages, last | {"limits": {"memory": "512MiB"}}], form)
