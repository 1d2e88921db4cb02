"""Whole merges: the numbers, the same bytes always, complete or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import merge_core.files
import merge_core.merge
from merge_core.artifact import LOCK_NAME, read_artifact
from merge_core.errors import (
    Canceled,
    CheckpointError,
    InsufficientStorage,
    NonFinite,
    OutputExists,
    PathNotAllowed,
    WeightsmithError,
)
from merge_core.merge import merge, plan_only
from merge_core.progress import Finished, Progress
from merge_core.recipe import Recipe
from merge_core.shards import ShardWriter
from tests.conftest import (
    CONFIG,
    METHOD_RECIPES,
    kernels_in,
    method_recipe,
    mixed_tensors,
    write_checkpoint,
    write_numbers,
)


def run(models: Path, out: Path, title: str, keys: dict[str, Any] | None = None, **options: Any) -> dict[str, str]:
    recipe = Recipe.from_data(method_recipe(title, **(keys or {})))
    return dict(merge(recipe, out, roots=[models], **options).tensors)


@pytest.mark.parametrize("title", METHOD_RECIPES)
def test_the_same_recipe_gives_the_same_bytes(models: Path, tmp_path: Path, title: str) -> None:
    one = run(models, tmp_path / "one", title, threads=1, block_elements=2**20)

    two = run(models, tmp_path / "two", title, threads=2, block_elements=1, max_shard_size=3000)
    three = run(models, tmp_path / "three", title, threads=2, block_elements=2**20)
    with kernels_in("plain"):
        plain = run(models, tmp_path / "plain", title, threads=2)

    assert one == two == three == plain
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 3
    files = [
        sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in (tmp_path / name).glob("*"))
        for name in ("one", "three")
    ]
    assert files[0] == files[1]


@pytest.fixture
def tall(tmp_path: Path) -> Path:
    """Models with one tensor of many grains and bf16 ties, so that blocks and threads really differ."""
    for seed, name in enumerate(["base", "m0", "m1", "m2", "old"]):
        own = torch.Generator().manual_seed(seed)
        start = torch.randn(5000, 96, generator=torch.Generator().manual_seed(99))
        tensor = (start + 0.01 * (seed > 0) * torch.randn(5000, 96, generator=own)).bfloat16()
        tensors = {"model.embed.weight": tensor, "model.embed.bias": tensor[:, 0].clone()}
        write_checkpoint(tmp_path / "tall" / name, tensors)
    write_numbers(tmp_path / "tall", tensors)
    return tmp_path / "tall"


@pytest.mark.parametrize("title", METHOD_RECIPES)
def test_blocks_and_threads_change_no_byte_of_a_large_tensor(tall: Path, tmp_path: Path, title: str) -> None:
    digests = [
        run(tall, tmp_path / f"{threads}-{elements}", title, threads=threads, block_elements=elements)
        for threads, elements in [(1, 2**20), (2, 3 * 2**16)]
    ]
    with kernels_in("plain"):
        digests.append(run(tall, tmp_path / "plain", title, threads=2))
    assert digests[0] == digests[1] == digests[2]


def _oracle(title: str, base: Tensor, models: list[Tensor]) -> Tensor:
    """The equations in float64, for one tensor."""
    theta0, thetas = base.double(), [model.double() for model in models]
    deltas = torch.stack([theta - theta0 for theta in thetas])
    if title == "linear":
        return torch.stack(thetas).mean(0)
    if title == "task_arithmetic":
        return theta0 + 0.5 * deltas.sum(0)
    if title == "slerp":
        one, other = theta0.flatten(), thetas[0].flatten()
        angle = torch.acos((one @ other) / (one.norm() * other.norm()))
        merged = (torch.sin(0.7 * angle) * one + torch.sin(0.3 * angle) * other) / torch.sin(angle)
        return merged.reshape(theta0.shape)
    assert title == "ties"
    keep = max(1, int(0.2 * base.numel()))
    flat = deltas.reshape(len(deltas), -1)
    order = torch.sort(-flat.float().abs(), dim=1, stable=True).indices[:, :keep]
    trimmed = torch.zeros_like(flat).scatter(1, order, flat.gather(1, order))
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agrees = trimmed.sign() == sign
    mean = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return theta0 + mean.reshape(theta0.shape)


ORACLES = {
    "linear": {"weight": 1},
    "task_arithmetic": {"weight": 0.5},
    "slerp": {"t": 0.3},
    "ties": {"weight": 1, "density": 0.2},
}


@pytest.mark.parametrize("title", ORACLES)
def test_numbers_agree_with_a_float64_oracle_after_one_rounding(models: Path, tmp_path: Path, title: str) -> None:
    run(models, tmp_path / "out", title, {"parameters": ORACLES[title]})
    out = load_file(tmp_path / "out" / "model.safetensors")
    sources = [mixed_tensors(seed) for seed in range(4)]
    for name, merged in out.items():
        if not merged.is_floating_point() or not merged.numel() or (title == "slerp" and merged.ndim == 0):
            continue
        expected = _oracle(
            title, sources[0][name], [source[name] for source in sources[1 : 2 if title == "slerp" else 4]]
        )
        ulp = torch.finfo(merged.dtype).eps * expected.abs() * (0.5001 if merged.dtype.itemsize < 4 else 1) + 1e-6
        if merged.dtype is torch.float64:
            ulp = 1e-12 + 1e-12 * expected.abs()
        assert ((merged.double() - expected).abs() <= ulp).all(), name


def test_passthrough_copies_bits(models: Path, tmp_path: Path) -> None:
    run(models, tmp_path / "out", "passthrough")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, mixed_tensors(1)[name])


def test_output_number_formats(models: Path, tmp_path: Path) -> None:
    run(models, tmp_path / "kept", "linear")
    run(models, tmp_path / "one", "linear", {"dtype": "float32", "out_dtype": "float16"})
    kept, one = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "one"))
    for name, tensor in mixed_tensors(1).items():
        assert kept[name].dtype == tensor.dtype
        assert one[name].dtype == (torch.float16 if tensor.is_floating_point() else tensor.dtype)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["torch_dtype"] == "float16"


def test_integers_are_kept_and_a_difference_is_told(models: Path, tmp_path: Path) -> None:
    changed = {**mixed_tensors(2), "model.steps": torch.tensor([9, 9, 9])}
    for file in (models / "m1").iterdir():
        file.unlink()
    write_checkpoint(models / "m1", changed, config=CONFIG)
    artifact = merge(Recipe.from_data(method_recipe("ties")), tmp_path / "out", roots=[models])
    assert load_file(tmp_path / "out" / "model.safetensors")["model.steps"].tolist() == [3, 1, 4]
    assert any("model.steps differs between the models" in warning for warning in artifact.warnings)


def test_the_artifact_says_how_it_was_made(models: Path, tmp_path: Path) -> None:
    (models / "base" / "tokenizer.json").write_text("{}")
    (models / "base" / "modeling_evil.py").write_text("raise SystemExit")
    artifact = merge(Recipe.from_data(method_recipe("ties", seed=3, name="My merge")), tmp_path / "out", roots=[models])

    lock = json.loads((tmp_path / "out" / LOCK_NAME).read_text())
    assert lock["seed"] == 3 and lock["recipe"]["merge_method"] == "ties"
    assert lock["tensors"].keys() == artifact.tensors.keys()
    for source in lock["sources"]:
        for file in source["files"]:
            data = (models / source["model"] / file["path"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"])
    on_disk = {path.name for path in (tmp_path / "out").iterdir()}
    assert {file.path for file in artifact.files} == on_disk
    assert {"tokenizer.json", "mergekit_config.yml", "README.md", "config.json"} <= on_disk
    assert "modeling_evil.py" not in on_disk
    for file in artifact.files:
        assert hashlib.sha256((tmp_path / "out" / file.path).read_bytes()).hexdigest() == file.sha256
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "# My merge" in card and "merge_method: ties" in card
    assert Recipe.from_text((tmp_path / "out" / "mergekit_config.yml").read_text()).canonical() == lock["recipe"]
    assert read_artifact(tmp_path / "out").files == artifact.files


def _leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "models")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("title", ["linear", "ties-paper", "passthrough"])
def test_a_weight_that_is_no_number_is_refused_by_name(models: Path, tmp_path: Path, title: str, value: float) -> None:
    broken = mixed_tensors(1)
    broken["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    write_checkpoint(models / "m0", broken, shards=2, config=CONFIG)

    with pytest.raises(
        NonFinite, match=r"model\.layers\.1\.mlp\.up_proj\.weight of m0 holds NaN or infinity at element 51 "
    ):
        run(models, tmp_path / "out", title)

    assert _leftovers(tmp_path) == []
    run(models, tmp_path / "out", title, {"allow_nonfinite": True})


def test_a_number_too_large_for_the_output_is_refused(models: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(["m0", "m1", "m2"], 1):
        tensors = mixed_tensors(seed)
        tensors["model.double"] += 1e6
        write_checkpoint(models / name, tensors, shards=2, config=CONFIG)
    with pytest.raises(NonFinite, match=r"model\.double becomes NaN or infinity at element 0 in float16"):
        run(models, tmp_path / "out", "linear", {"dtype": "float16"})
    assert _leftovers(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = os.pwrite, 0

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 5000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(merge_core.files.os, "pwrite", pwrite)
    with pytest.raises(InsufficientStorage, match="the disk filled up"):
        run(models, tmp_path / "out", "linear")
    assert _leftovers(tmp_path) == []


def test_a_model_that_changes_under_the_merge_is_refused(models: Path, tmp_path: Path) -> None:
    def touch(progress: Progress) -> None:
        if progress.tensors_done:
            os.utime(models / "m0" / "model-00001-of-00002.safetensors")

    with pytest.raises(CheckpointError, match="changed"):
        run(models, tmp_path / "out", "linear", report=touch)
    assert _leftovers(tmp_path) == []


@pytest.mark.parametrize("title", METHOD_RECIPES)
def test_progress_only_grows_and_ends_complete(models: Path, tmp_path: Path, title: str) -> None:
    seen: list[tuple[int, int, int]] = []
    last: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append((progress.tensors_done, progress.bytes_read, progress.bytes_written))
        assert 0 <= progress.fraction <= 1
        last[:] = [progress]

    run(models, tmp_path / "out", title, report=watch, threads=1)
    assert seen == sorted(seen) and last[0].fraction == 1.0 and last[0].tensors_done == 20
    assert len(last[0].order) == 20 and last[0].finished.runs() == [(0, 20)]


def test_an_output_is_never_overwritten(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(OutputExists):
        run(models, tmp_path / "out", "linear")
    assert _leftovers(tmp_path / "out") == ["precious"]


def test_a_canceled_merge_leaves_nothing(models: Path, tmp_path: Path) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 40

    with pytest.raises(Canceled):
        run(models, tmp_path / "out", "ties", stop=stop)
    assert _leftovers(tmp_path) == []


class _Killed(BaseException):
    """What the process does not live to handle."""


def kill_after(tensors: int, models: Path, out: Path, title: str) -> None:
    """Begin a merge that dies when so many tensors are done."""

    def die(progress: Progress) -> None:
        if progress.tensors_done == tensors:
            raise _Killed

    with pytest.raises(_Killed):
        run(models, out, title, report=die)


@pytest.mark.parametrize("title", ["linear", "ties", "ties-paper", "dare_ties"])
@pytest.mark.parametrize("blocks", [1, 7, 14, 20])
def test_an_interrupted_merge_goes_on_to_the_same_bytes(models: Path, tmp_path: Path, title: str, blocks: int) -> None:
    whole = run(models, tmp_path / "whole", title, max_shard_size=9000)
    done = 0

    def die(progress: Progress) -> None:
        nonlocal done
        done += progress.phase == "merging"
        if done > blocks:
            raise _Killed

    with pytest.raises(_Killed):
        run(models, tmp_path / "out", title, report=die, max_shard_size=9000)
    assert not (tmp_path / "out").exists()
    resumed = merge(Recipe.from_data(method_recipe(title)), tmp_path / "out", roots=[models], max_shard_size=9000)

    assert resumed.tensors == whole
    assert blocks == 1 or resumed.resumed_tensors > 0
    for path in (tmp_path / "whole").glob("*.safetensors*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_progress_tells_which_tensors_an_earlier_attempt_finished(models: Path, tmp_path: Path) -> None:
    kill_after(7, models, tmp_path / "out", "linear")
    found: list[list[tuple[int, int]]] = []

    def watch(progress: Progress) -> None:
        if progress.tensors_done:
            found.append(progress.finished.runs())

    resumed = run_again(models, tmp_path / "out", report=watch)
    assert resumed > 1 and found[0] == [(0, resumed + 1)], "what was there, and the first that is new"


def run_again(models: Path, out: Path, **options: Any) -> int:
    """Go on with what `kill_after` left of `linear`; how many tensors it had finished."""
    return merge(Recipe.from_data(method_recipe("linear")), out, roots=[models], **options).resumed_tensors


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=40))
def test_finished_places_are_the_fewest_runs(added: list[tuple[int, int]]) -> None:
    finished, places = Finished(), set[int]()
    for begin, length in added:
        finished.add(begin, begin + length)
        places |= set(range(begin, begin + length))
    runs = finished.runs()
    assert [place for begin, end in runs for place in range(begin, end)] == sorted(places)
    assert all(end < following for (_, end), (following, _) in pairwise(runs))


def test_what_a_killed_merge_left_is_proved_before_it_is_used(models: Path, tmp_path: Path) -> None:
    whole = run(models, tmp_path / "whole", "linear")
    kill_after(5, models, tmp_path / "out", "linear")
    partial = tmp_path / ".out.partial"
    shard = next(partial.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + 10] ^= 1
    shard.write_bytes(data)
    with (partial / "journal.jsonl").open("ab") as journal:
        journal.write(b'\n0123456789abcdef {"tensor": "lm_head.weight", "sha')

    assert run(models, tmp_path / "out", "linear") == whole


def test_proving_what_a_killed_merge_left_can_be_canceled(models: Path, tmp_path: Path) -> None:
    kill_after(5, models, tmp_path / "out", "linear")
    plan = plan_only(Recipe.from_data(method_recipe("linear")), roots=[models])
    with ShardWriter(plan, tmp_path / ".out.partial", stop=lambda: True) as writer, pytest.raises(Canceled):
        writer.enter(writer.units[0])


@pytest.mark.parametrize("step", ["fsync_folder", "write_companions", "appear"])
def test_killed_at_its_very_end(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """All is written; what follows is the folder's appearance."""
    whole = run(models, tmp_path / "whole", "linear")

    def die(*_: object, **__: object) -> None:
        raise _Killed

    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(merge_core.merge, step, die)
        run(models, tmp_path / "out", "linear")
    resumed = merge(Recipe.from_data(method_recipe("linear")), tmp_path / "out", roots=[models])
    assert resumed.tensors == whole and resumed.resumed_tensors == len(whole)
    assert {file.path for file in resumed.files} == {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_journal_costs_time_and_never_a_wrong_weight(models: Path, tmp_path: Path, seed: int) -> None:
    whole = run(models, tmp_path / "whole", "ties-paper")
    kill_after(9, models, tmp_path / "out", "ties-paper")
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    data, chance = bytearray(journal.read_bytes()), random.Random(seed)
    for _ in range(5):
        data[chance.randrange(len(data))] = chance.randrange(256)
    journal.write_bytes(data)

    assert run(models, tmp_path / "out", "ties-paper") == whole


def test_what_another_layout_left_is_not_in_the_output(models: Path, tmp_path: Path) -> None:
    kill_after(5, models, tmp_path / "out", "linear")
    artifact = merge(Recipe.from_data(method_recipe("linear")), tmp_path / "out", roots=[models], max_shard_size=3000)
    assert {file.path for file in artifact.files} == {path.name for path in (tmp_path / "out").iterdir()}


def test_two_merges_into_one_folder_do_not_meet(models: Path, tmp_path: Path) -> None:
    refused = []

    def meet(progress: Progress) -> None:
        if progress.tensors_done == 5 and not refused:
            with pytest.raises(OutputExists, match="another merge is writing"):
                run(models, tmp_path / "out", "task_arithmetic")
            refused.append(True)

    run(models, tmp_path / "out", "linear", report=meet)
    assert refused and read_artifact(tmp_path / "out").tensors == run(models, tmp_path / "whole", "linear")


def test_a_folder_of_somebody_else_is_never_removed(models: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    with pytest.raises(OutputExists, match="files that no merge began"):
        run(models, tmp_path / "out", "linear", partial=precious)
    with pytest.raises(WeightsmithError):
        run(models, tmp_path / "out", "linear", {"models": [{"model": "nowhere"}]}, partial=precious)
    assert _leftovers(precious) == ["thesis.txt"]


def test_outputs_that_cannot_appear_are_refused_at_once(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    before = _leftovers(tmp_path)
    for out in (tmp_path / "file", tmp_path / "link", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(WeightsmithError):
            run(models, out, "linear")
    assert _leftovers(tmp_path) == before


def test_a_model_that_vanishes_is_a_problem_and_no_traceback(models: Path, tmp_path: Path) -> None:
    def remove(progress: Progress) -> None:
        shutil.rmtree(models / "m2", ignore_errors=True)

    with pytest.raises(CheckpointError):
        run(models, tmp_path / "out", "linear", report=remove)
    assert _leftovers(tmp_path) == []


def test_companions_stay_below_the_roots(models: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (models / "base" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(PathNotAllowed):
        run(models, tmp_path / "out", "ties")
    assert _leftovers(tmp_path) == ["secret"]


def test_nothing_but_empty_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "models" / "m0", {"a": torch.zeros(0), "b": torch.zeros(3, 0)})
    recipe = {"merge_method": "linear", "models": [{"model": "m0"}], "parameters": {"weight": 1}}
    merge(Recipe.from_data(recipe), tmp_path / "out", roots=[tmp_path / "models"])
    assert load_file(tmp_path / "out" / "model.safetensors")["b"].shape == (3, 0)


@pytest.mark.parametrize("title", ["linear", "task_arithmetic", "ties", "ties-paper", "ties-paper-norms"])
def test_a_nan_that_is_let_through_stays_where_it_is(models: Path, tmp_path: Path, title: str) -> None:
    broken = mixed_tensors(1)
    broken["lm_head.weight"][2, 3] = float("nan")
    write_checkpoint(models / "m0", broken, shards=2, config=CONFIG)
    run(models, tmp_path / "out", title, {"allow_nonfinite": True})
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert head.isnan().nonzero().tolist() == [[2, 3]]


def test_passthrough_copies_integers_of_its_own_model(models: Path, tmp_path: Path) -> None:
    changed = {**mixed_tensors(1), "model.steps": torch.tensor([9, 9, 9])}
    write_checkpoint(models / "m0", changed, shards=2, config=CONFIG)
    run(models, tmp_path / "out", "passthrough", {"base_model": "base"})
    assert load_file(tmp_path / "out" / "model.safetensors")["model.steps"].tolist() == [9, 9, 9]


def test_what_another_recipe_left_is_not_used(models: Path, tmp_path: Path) -> None:
    whole = run(models, tmp_path / "whole", "linear")
    kill_after(5, models, tmp_path / "out", "task_arithmetic")
    assert run(models, tmp_path / "out", "linear") == whole


MERGE_PROGRAM = """
import sys
from pathlib import Path
from merge_core.merge import merge
from merge_core.recipe import Recipe
merge(Recipe.from_text(sys.argv[1]), sys.argv[2], roots=[Path(sys.argv[3])], threads=1)
"""


def test_kill_9_at_any_time_then_again(tall: Path, tmp_path: Path) -> None:
    """A real process, really killed, at six moments of its life."""
    whole = run(tall, tmp_path / "whole", "ties", threads=1)
    arguments = [json.dumps(method_recipe("ties")), str(tmp_path / "out"), str(tall)]
    command = [sys.executable, "-c", MERGE_PROGRAM, *arguments]
    for wait in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while not (tmp_path / ".out.partial").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not (tmp_path / "out").exists():
        subprocess.run(command, check=True)
    assert read_artifact(tmp_path / "out").tensors == whole
    assert _leftovers(tmp_path) == ["out", "tall", "whole"]
