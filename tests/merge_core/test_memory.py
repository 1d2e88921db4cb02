"""Memory is a contract: the plan says the most, the process is measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch

from merge_core.matrices import MatrixMethod
from merge_core.methods import METHODS
from merge_core.sizes import parse_bytes
from tests.conftest import method_recipe, write_checkpoint, write_numbers
from tests.merge_core.test_adapters import write_adapter

PROGRAM = """
import ctypes, json, os, sys
from pathlib import Path
import numpy as np
from merge_core import kernels
from merge_core.merge import merge, plan_only
from merge_core.recipe import Recipe

if kernels.are_compiled():
    import merge_core.kernels.compiled

def pages_of_files():
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb") as pagemap:
        for line in maps:
            span, _, _, _, inode = line.split()[:5]
            start, end = (int(place, 16) // 4096 for place in span.split("-"))
            if inode != "0":
                pagemap.seek(8 * start)
                there = np.frombuffer(pagemap.read(8 * (end - start)), np.int64) < 0
                yield from 4096 * (start + np.flatnonzero(there))

held = np.fromiter(pages_of_files(), np.int64)
for line in sys.stdin:
    if os.fork():
        if os.wait()[1]:
            print("null", flush=True)
        continue
    for page in held.tolist():
        ctypes.string_at(page, 1)
    recipe, models, out = json.loads(line)
    recipe, roots = Recipe.from_data(recipe), [Path(models)]
    planned = plan_only(recipe, roots=roots, threads=2).memory.peak
    merge(recipe, out, roots=roots, threads=2)
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps([planned, int(status["VmHWM"].split()[0]) * 1024]), flush=True)
    os._exit(0)
"""
"""A process that has imported everything and forks for each merge, which then costs no import. A fork's peak counts its
parent's memory but not the pages of libraries that only the parent read; so it reads them first.
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


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensor of 30 MB of which whole matrices are soon decomposed."""
    return write_models(tmp_path_factory.mktemp("narrow"), (60_000, 250))


MergeAlone = Callable[..., None]


@pytest.fixture(scope="module")
def merge_alone() -> Iterator[MergeAlone]:
    """Merges in a process of its own, whose peak must be within the plan and the plan within the limit."""
    started: dict[str, subprocess.Popen[str]] = {}

    def merge(models: Path, out: Path, recipe: Any, form: str = "compiled") -> None:
        if form not in started:
            environment = {**os.environ, "WEIGHTSMITH_KERNELS": form}
            command = [sys.executable, "-c", PROGRAM]
            started[form] = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment)
        requests, answers = started[form].stdin, started[form].stdout
        assert requests and answers
        print(json.dumps([recipe, str(models), str(out)]), file=requests, flush=True)
        planned, measured = json.loads(answers.readline())
        last = recipe[-1] if isinstance(recipe, list) else recipe
        assert measured <= planned <= parse_bytes(last["limits"]["memory"])

    yield merge
    for process in started.values():
        process.communicate()


WHOLE_MATRICES = {
    name for name, of in METHODS.items() for method in of.values() if issubclass(method, MatrixMethod)
} | {"regmean"}


OF_EACH_KIND = (
    *("linear", "slerp", "nuslerp", "model_stock", "ram", "dare_ties", "della", "breadcrumbs", "breadcrumbs-paper"),
    *("ties", "ties-model", "ties-paper", "ties-paper-norms", "graft", "pcb", "sce", "arcee_fusion", "widen", "darex"),
    *("transfer", "ssd", "half_reset", "expert_merging", "fisher"),
)
"""Every way to measure and to merge; the contract tests hold each method to its workspace."""


@pytest.mark.parametrize("title", OF_EACH_KIND)
def test_the_process_stays_under_its_limit_and_under_its_plan(
    large: Path, tmp_path: Path, title: str, merge_alone: MergeAlone
) -> None:
    merge_alone(large, tmp_path / "out", method_recipe(title, limits={"memory": "512MiB"}))


@pytest.mark.parametrize("title", sorted(WHOLE_MATRICES))
def test_whole_matrices_take_five_times_a_tensor_in_float32(
    narrow: Path, tmp_path: Path, title: str, merge_alone: MergeAlone
) -> None:
    memory = 400 * 2**20 + 5 * 4 * 60_000 * 250
    merge_alone(narrow, tmp_path / "out", method_recipe(title, limits={"memory": memory}))


LATER = [pytest.param(title, marks=pytest.mark.slow) for title in ("ties", "dare_linear")]


def test_so_it_does_with_adapters(large: Path, tmp_path: Path, merge_alone: MergeAlone) -> None:
    parts = {"lora_A.weight": torch.ones(32, 1000), "lora_B.weight": torch.ones(24_000, 32)}
    parts |= {"lora_magnitude_vector": torch.ones(24_000)}
    tensors = {f"base_model.model.model.embed.{name}": tensor for name, tensor in parts.items()}
    for name in ("one", "two"):
        write_adapter(large / name, tensors, r=32)
    recipe = method_recipe("task_arithmetic", limits={"memory": "512MiB"})
    merge_alone(large, tmp_path / "out", recipe | {"models": [{"model": "m0+one"}, {"model": "m1+two"}]})


@pytest.mark.parametrize(
    "title", ["linear", "slerp", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ties", "dare_ties"))]
)
def test_so_it_does_with_plain_kernels(narrow: Path, tmp_path: Path, title: str, merge_alone: MergeAlone) -> None:
    """What these hold depends on the block, which is a fifteenth of these tensors."""
    merge_alone(narrow, tmp_path / "out", method_recipe(title, limits={"memory": "512MiB"}), "plain")


@pytest.mark.parametrize("title", ["linear", "ties-model", *LATER])
def test_so_it_does_with_many_models(large: Path, tmp_path: Path, title: str, merge_alone: MergeAlone) -> None:
    """A gigabyte where all ten are held in float32."""
    names = [f"m{i}" for i in range(9)]
    for name in names[3:]:
        if not (large / name).exists():
            (large / name).symlink_to(large / "m0")
    recipe = method_recipe(title, limits={"memory": "512MiB"})
    merge_alone(large, tmp_path / "out", recipe | {"models": [{"model": name} for name in names]})


@pytest.mark.parametrize("title", ["linear", "ties-model", *LATER])
def test_so_it_does_with_a_tensor_larger_than_the_limit(tmp_path: Path, title: str, merge_alone: MergeAlone) -> None:
    """600 MB each, in files that are all holes but for their headers."""
    shape, names = (75_000, 4000), ["base", "m0"]
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


@pytest.mark.parametrize(
    ("form", "size"), [pytest.param("plain", "narrow", marks=pytest.mark.slow), ("compiled", "large")]
)
def test_so_do_stages_of_stages(
    tmp_path: Path, form: str, size: str, request: pytest.FixtureRequest, merge_alone: MergeAlone
) -> None:
    last = {"merge_method": "slerp", "base_model": "one", "models": [{"model": "two"}], "parameters": {"t": 0.5}}
    two = {**method_recipe("dare_ties", name="two"), "models": [{"model": "one"}, {"model": "m2"}]}
    stages = [method_recipe("linear", name="one", dtype="float32"), two]
    models = request.getfixturevalue(size)
    merge_alone(models, tmp_path / "out", [*stages, last | {"limits": {"memory": "512MiB"}}], form)
