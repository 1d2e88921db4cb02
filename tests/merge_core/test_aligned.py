"""Merges of models whose neurons are brought into one order first."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.cli import main
from merge_core import aligned
from merge_core.align import AlignmentDocument, align, applying
from merge_core.align import plan_only as align_plan
from merge_core.alignment import assignment
from merge_core.alignment.assignment import assign
from merge_core.alignment.derive import derive
from merge_core.alignment.matching import Matching, match
from merge_core.alignment.permutations import Permutations, Permuted
from merge_core.alignment.report import AlignmentReport, analyse
from merge_core.alignment.spec import Indexed, PermutationSpec
from merge_core.checkpoint import Checkpoint
from merge_core.errors import (
    Canceled,
    CheckpointError,
    IncompatibleModels,
    MemoryLimitExceeded,
    RecipeError,
    WeightsmithError,
)
from merge_core.merge import adopt, merge, plan_only
from merge_core.progress import Progress
from merge_core.recipe import Recipe
from merge_core.weights import Weights
from tests.conftest import write_checkpoint

AXES: dict[str, list[str | None]] = {
    "0.weight": ["P_0", None],
    "0.bias": ["P_0"],
    "1.weight": ["P_1", "P_0"],
    "1.bias": ["P_1"],
    "2.weight": [None, "P_1"],
    "2.bias": [None],
}
SHAPES = {
    "0.weight": (24, 8),
    "0.bias": (24,),
    "1.weight": (16, 24),
    "1.bias": (16,),
    "2.weight": (4, 16),
    "2.bias": (4,),
}
SPEC = PermutationSpec.from_data(AXES, SHAPES)
FIRST: dict[str, list[str | None]] = {"0.weight": ["P_0", None], "0.bias": ["P_0"], "1.weight": [None, "P_0"]}


def mlp(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def permuted(tensors: Mapping[str, Tensor], indexed: Indexed) -> dict[str, Tensor]:
    """The same function of its inputs, its neurons in another order."""
    found = dict(tensors)
    for name in found:
        for axis, index in enumerate(SPEC.indices(name, indexed)):
            if index is not None:
                found[name] = found[name].index_select(axis, torch.from_numpy(index))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a`; `b` and `c`, which are `a` with its neurons elsewhere; and the permutations that bring them back."""
    folder = tmp_path_factory.mktemp("aligned")
    write_checkpoint(folder / "a", mlp(0))
    for seed, name in enumerate("bc", 1):
        write_checkpoint(folder / name, permuted(mlp(0), SPEC.random(seed)))
    back = {name: SPEC.inverse(SPEC.random(seed)) for seed, name in enumerate("bc", 1)}
    Permutations(SPEC, {"a": SPEC.identity(), **back}, {"to": "first"}).save(folder / "found.safetensors")
    (folder / "spec.json").write_text(json.dumps(AXES))
    return folder


def recipe(*models: str, method: str = "linear", **keys: Any) -> Recipe:
    parameters = {"parameters": {"weight": 1.0}} if method == "linear" else {}
    return Recipe.from_data(
        {"merge_method": method, "models": [{"model": model} for model in models], "dtype": "float32"}
        | parameters
        | keys
    )


def merged(recipe: Recipe, folder: Path, out: Path, **how: Any) -> dict[str, Tensor]:
    artifact = merge(recipe, out, roots=[folder], **how)
    return load_file(artifact.folder / "model.safetensors")


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(ours[name].float(), theirs[name].float()) for name in theirs)


def test_stored_permutations_bring_models_together(folder: Path, tmp_path: Path) -> None:
    stored = {"permutations": "found.safetensors"}
    assert same(merged(recipe("a", "b", "c", alignment=stored), folder, tmp_path / "out"), mlp(0))
    assert not same(merged(recipe("a", "b", "c"), folder, tmp_path / "apart"), mlp(0))
    lock = json.loads((tmp_path / "out" / "merge.lock.json").read_text())
    files = {source["model"]: [file["path"] for file in source["files"]] for source in lock["sources"]}
    assert files == {"a": ["model.safetensors"]} | {
        name: ["model.safetensors", "alignment.safetensors"] for name in "bc"
    }
    assert lock["exact_on"] == "any machine"
    assert "found.safetensors" in (tmp_path / "out" / "README.md").read_text()


def test_one_model_is_permuted_by_passing_it_through(folder: Path, tmp_path: Path) -> None:
    stored = {"permutations": "found.safetensors", "names": {"a": "b"}}
    moved = merged(recipe("a", method="passthrough", alignment=stored), folder, tmp_path / "out")
    assert same(moved, permuted(mlp(0), SPEC.inverse(SPEC.random(1))))


REFUSED: list[tuple[dict[str, Any], type[WeightsmithError], str, str]] = [
    ({"permutations": "found.safetensors", "to": "first"}, RecipeError, "#/alignment/to", "read from a file"),
    ({"permutation": "found.safetensors"}, RecipeError, "#/alignment/permutation", "did you mean permutations"),
    ({"permutations": "nowhere"}, CheckpointError, "#/alignment/permutations", "none of this service's"),
    ({"permutations": "a"}, CheckpointError, "#/alignment/permutations", "holds no permutations"),
    ({"permutations": "../x"}, CheckpointError, "#/alignment/permutations", "outside"),
    ({"permutations": "found.safetensors", "names": {"b": "x"}}, RecipeError, "#/models/1/model", "those of a, b, c"),
    ({"permutations": "found.safetensors", "names": {"bb": "c"}}, RecipeError, "#/alignment/names/bb", "mean b"),
    ({"to": "base"}, RecipeError, "#/alignment/to", "no base_model"),
    ({"method": "zipit"}, RecipeError, "#/alignment/method", "weight_matching"),
    ({"names": {"a": "b"}}, RecipeError, "#/alignment/names", "not given"),
    ({"spec": 3}, RecipeError, "#/alignment/spec", "name of a file"),
    ({"spec": "\0"}, RecipeError, "#/alignment/spec", "names no file"),
    ({"spec": "../x"}, CheckpointError, "#/alignment/spec", "outside"),
]


@pytest.mark.parametrize(("keys", "error", "pointer", "says"), REFUSED)
def test_what_cannot_be_meant_is_refused(
    folder: Path, keys: dict[str, Any], error: type[WeightsmithError], pointer: str, says: str
) -> None:
    with pytest.raises(error, match=says) as found:
        plan_only(recipe("a", "b", alignment=keys), roots=[folder])
    assert pointer in [problem.pointer for problem in found.value.problems]


def test_a_file_for_other_models_is_refused(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", {**mlp(0), "3.weight": torch.ones(4, 4)})
    with pytest.raises(IncompatibleModels, match=r"does not say what happens to 3\.weight"):
        stored = {"permutations": str(folder / "found.safetensors"), "names": {str(tmp_path / "a"): "b"}}
        plan_only(recipe(str(tmp_path / "a"), method="passthrough", alignment=stored))


def weightsmith(*arguments: object, status: int = 0) -> str:
    """What the command line says, run in this process."""
    ran = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert ran.exit_code == status, ran.output
    return ran.output


def test_the_command_line_inspects_inverts_and_applies(folder: Path, tmp_path: Path) -> None:
    found, away, out = folder / "found.safetensors", tmp_path / "away.safetensors", tmp_path / "out"
    told = weightsmith("permutations", "inspect", found)
    assert "2 permutations of 40 elements on 6 tensors" in told and "a  moves 0 elements" in told
    weightsmith("permutations", "invert", found, away)
    assert "exists" in weightsmith("permutations", "invert", found, away, status=2)
    assert "ends in .safetensors" in weightsmith("permutations", "invert", found, tmp_path / "away", status=2)
    assert "say which of them" in weightsmith("permutations", "apply", away, folder / "a", out, status=1)
    weightsmith("permutations", "apply", away, folder / "a", out, "--as", "b")
    assert same(load_file(out / "model.safetensors"), load_file(folder / "b" / "model.safetensors"))


SPEC_KEY = {"spec": "spec.json"}


@pytest.mark.parametrize("to", ["first", "mean", "base"])
def test_models_are_brought_together_before_they_are_merged(folder: Path, tmp_path: Path, to: str) -> None:
    base = {"base_model": "a"} if to == "base" else {}
    found = merged(recipe("a", "b", "c", alignment={"to": to, **SPEC_KEY}, **base), folder, tmp_path / "out")
    assert same(found, mlp(0))
    lock = json.loads((tmp_path / "out" / "merge.lock.json").read_text())
    assert lock["exact_on"] == "this machine"
    assert "alignment.safetensors" in [file["path"] for file in lock["files"]]
    assert "weight matching" in (tmp_path / "out" / "README.md").read_text()
    stored = Permutations.open(tmp_path / "out" / "alignment.safetensors")
    assert list(stored.models) == ["a", "b", "c"] and not any(stored.moved("a").values())
    again = {"permutations": str(tmp_path / "out" / "alignment.safetensors")}
    plain = Recipe.from_data({**recipe("a", "b", "c").to_data(), "alignment": again})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        merge(plain, tmp_path / "again")
    assert same(load_file(tmp_path / "again" / "model.safetensors"), mlp(0))


def document(*models: str, **keys: Any) -> AlignmentDocument:
    return AlignmentDocument.from_data({"models": list(models), "alignment": SPEC_KEY} | keys)


@pytest.mark.parametrize("report", ["distances", "full"])
@pytest.mark.parametrize("to", ["first", "mean"])
def test_an_alignment_is_an_artifact_of_its_own(folder: Path, tmp_path: Path, to: str, report: str) -> None:
    asked = document("a", "b", "c", alignment={"to": to, **SPEC_KEY}, report=report)
    artifact = align(asked, tmp_path / "out", roots=[folder])

    files = {file.path for file in artifact.files}
    assert files == {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"alignment.safetensors", "alignment.yml", "report.json", "alignment.lock.json"}
    found = Permutations.open(tmp_path / "out" / "alignment.safetensors")
    for seed, name in enumerate("bc", 1):
        assert found.models[name].keys() == SPEC.permutations.keys()
        back = SPEC.inverse(SPEC.random(seed))
        assert all((found.models[name][each] == back[each]).all() for each in back)
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["compared_with"] == "a"
    if to == "first":
        assert told["models"]["b"]["l2"][0] > 1 and told["models"]["b"]["l2"][1] == 0
    if to == "mean" or report == "full":
        assert told["models"]["b"]["analysis"]["distance_after"] == 0
    assert adopt(tmp_path / "out").files == artifact.files
    lock = json.loads((tmp_path / "out" / "alignment.lock.json").read_text())
    assert lock["exact_on"] == "this machine" and [source["model"] for source in lock["sources"]] == ["a", "b", "c"]


def test_a_report_does_not_depend_on_how_many_threads_there_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(*models: Any, **how: Any) -> AlignmentReport:
        seen.append(torch.get_num_threads())
        return analyse(*models, **how)

    monkeypatch.setattr("merge_core.align.analyse", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        align(document("a", "b", report="full"), tmp_path / "out", roots=[folder])
        assert seen == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_stage_s_models_are_aligned_and_a_stage_can_be_aligned(folder: Path, tmp_path: Path) -> None:
    """The stage's models to one another, then what comes out, which is in `b`'s order, to `a`."""
    stage = recipe("b", "c", name="one", alignment=SPEC_KEY).to_data()
    output = recipe("a", "one", alignment={**SPEC_KEY, "to": "first"}).to_data()
    both = Recipe.from_data([stage, output])
    assert same(merged(both, folder, tmp_path / "out"), mlp(0))
    names = {path.name for path in (tmp_path / "out").glob("alignment*")}
    assert names == {"alignment.safetensors", "alignment-1.safetensors"}
    plan = plan_only(both, roots=[folder]).to_dict()
    assert plan["alignment"]["matched_with"] == "a" and plan["stages"][0]["alignment"]["matched_with"] == "b"


def test_what_is_only_matched_with_is_in_the_lock(folder: Path, tmp_path: Path) -> None:
    found = merged(recipe("b", "c", base_model="a", alignment=SPEC_KEY), folder, tmp_path / "out")
    assert same(found, mlp(0))
    lock = json.loads((tmp_path / "out" / "merge.lock.json").read_text())
    assert {source["model"] for source in lock["sources"]} == {"a", "b", "c"}


@pytest.mark.parametrize("how", [{"threads": 1, "block_elements": 64}, {"threads": 3, "block_elements": 4096}])
def test_how_it_is_run_changes_no_byte(folder: Path, tmp_path: Path, how: dict[str, int]) -> None:
    wanted = recipe("a", "b", "other", alignment={"to": "mean", **SPEC_KEY})
    write_checkpoint(tmp_path / "other", mlp(7))
    as_ever = merge(wanted, tmp_path / "one", roots=[tmp_path, folder])
    otherwise = merge(wanted, tmp_path / "two", roots=[tmp_path, folder], **how)
    assert as_ever.tensors == otherwise.tensors
    files = [(tmp_path / out / "alignment.safetensors").read_bytes() for out in ("one", "two")]
    assert files[0] == files[1]


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.mark.parametrize("phase", ["aligning", "merging"])
def test_what_was_found_before_a_kill_is_not_found_again(
    folder: Path, tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe("a", "b", "c", alignment=SPEC_KEY)
    kept, partial = tmp_path / "part" / "alignment.safetensors", tmp_path / "part"

    def kill(progress: Progress) -> None:
        if progress.phase == phase and kept.exists():
            raise Killed

    with pytest.raises(Killed):
        merge(wanted, tmp_path / "out", roots=[folder], partial=partial, report=kill)
    known = list(Permutations.open(kept).models)
    assert known[:1] == ["a"] and (phase == "aligning" or known == ["a", "b", "c"])
    matched: list[str] = []

    def counted(spec: PermutationSpec, reference: Weights, model: Weights, **how: Any) -> Matching:
        matched.append(model.path.name)
        return match(spec, reference, model, **how)

    monkeypatch.setattr(aligned, "match", counted)
    merge(wanted, tmp_path / "out", roots=[folder], partial=partial)
    assert matched == [name for name in "abc" if name not in known]
    assert same(load_file(tmp_path / "out" / "model.safetensors"), mlp(0))


def test_another_recipe_finds_its_own(folder: Path, tmp_path: Path) -> None:
    """What an earlier attempt at something else left is not taken."""
    partial = tmp_path / "part"

    def kill(progress: Progress) -> None:
        if progress.phase == "merging":
            raise Killed

    with pytest.raises(Killed):
        merge(recipe("a", "b", alignment=SPEC_KEY), tmp_path / "out", roots=[folder], partial=partial, report=kill)
    merge(recipe("c", "b", alignment=SPEC_KEY), tmp_path / "out", roots=[folder], partial=partial)
    assert list(Permutations.open(tmp_path / "out" / "alignment.safetensors").models) == ["c", "b"]


def test_canceled_while_aligning(folder: Path, tmp_path: Path) -> None:
    phases: list[str] = []
    with pytest.raises(Canceled):
        merge(
            recipe("a", "b", alignment=SPEC_KEY),
            tmp_path / "out",
            roots=[folder],
            report=lambda progress: phases.append(progress.phase),
            stop=lambda: "aligning" in phases,
        )
    assert phases[-1] == "aligning" and list(tmp_path.iterdir()) == []


def test_a_cancel_does_not_wait_for_an_assignment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def slow(matrix: Any) -> Any:
        begun.set()
        goes_on.wait(30)
        return assign(matrix)

    monkeypatch.setattr(assignment, "assign", slow)
    started = time.monotonic()
    try:
        with pytest.raises(Canceled):
            merge(recipe("a", "b", alignment=SPEC_KEY), tmp_path / "out", roots=[folder], stop=begun.is_set)
        assert begun.is_set() and time.monotonic() - started < 20 and list(tmp_path.iterdir()) == []
    finally:
        goes_on.set()


def test_a_model_with_an_adapter_is_aligned_as_one(folder: Path, tmp_path: Path) -> None:
    """`a` with an adapter, and the same permuted: their average is either."""
    adapter = tmp_path / "adapter"
    generator = torch.Generator().manual_seed(3)
    factors = {"A": torch.randn(2, 24, generator=generator), "B": torch.randn(16, 2, generator=generator)}
    adapter.mkdir()
    save_file(
        {f"base_model.model.1.lora_{name}.weight": factor for name, factor in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["1"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    changed = {name: tensor.float() for name, tensor in mlp(0).items()}
    changed["1.weight"] = changed["1.weight"] + factors["B"] @ factors["A"]
    write_checkpoint(tmp_path / "b", permuted(changed, SPEC.random(5)))
    wanted = recipe(f"a+{adapter}", str(tmp_path / "b"), alignment={"spec": AXES})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        merge(wanted, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(found[name], changed[name], atol=1e-5) for name in changed)


def llama(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """`a`, and `b`, which is `a` with its neurons elsewhere; the config has these `settings` too."""
    width, inner, heads, groups = 16, 24, 4, 2
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (32, width), "model.norm.weight": (width,), "lm_head.weight": (32, width)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width * groups // heads, width) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    config = {"model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 2}
    config |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": 32}
    config |= settings
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    if settings.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    spec = derive(shapes, config)
    write_checkpoint(folder / "a", tensors, config=config)
    with Permuted(Checkpoint.open(folder / "a"), spec, spec.random(1)) as moved:
        write_checkpoint(
            folder / "b",
            {name: moved.rows(info, 0, info.rows).clone() for name, info in moved.tensors.items()},
            config=config,
        )
    return tensors


def test_a_llama_and_the_same_permuted_average_to_itself(tmp_path: Path) -> None:
    """No spec is given: which permutations are exact is derived, and they are planned before they are known."""
    tensors = llama(tmp_path)
    plan = plan_only(recipe("a", "b", alignment={}), roots=[tmp_path])
    assert plan.alignment is not None and set(plan.alignment.sizes) == {4, 24}
    found = merged(recipe("a", "b", alignment={}), tmp_path, tmp_path / "out")
    assert same(found, tensors)


@pytest.mark.parametrize("outputs", ["full", "delta"])
def test_tied_weights_are_compared_when_their_order_is_known(tmp_path: Path, outputs: str) -> None:
    tensors = llama(tmp_path, tie_word_embeddings=True)
    keys = {"method": "task_arithmetic", "parameters": {"weight": 1.0}, "base_model": "a", "outputs": outputs}
    wanted = recipe("b", alignment={"residual": True}, **keys)
    artifact = merge(wanted, tmp_path / "out", roots=[tmp_path])
    if outputs == "full":
        written = load_file(artifact.folder / "model.safetensors")
        assert same(tensors, written) and tensors.keys() - written.keys() == {"lm_head.weight"}
    assert "alignment.safetensors" in {file.path for file in artifact.files}


def test_models_whose_configs_ask_for_other_permutations_are_refused(tmp_path: Path) -> None:
    llama(tmp_path)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "vocab_size": 31}))
    plan_only(recipe("a", "b", alignment={}), roots=[tmp_path])
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    with pytest.raises(IncompatibleModels, match="their configs differ"):
        plan_only(recipe("a", "b", alignment={}), roots=[tmp_path])


def test_models_with_nothing_in_common_are_refused(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", {"3.weight": torch.ones(2, 2)})
    asked = document(str(folder / "a"), str(tmp_path / "other"), alignment={"spec": AXES | {"3.weight": [None, None]}})
    with pytest.raises(IncompatibleModels, match="no tensor in common that is permuted"):
        align(asked, tmp_path / "out")


def test_another_spec_in_the_same_file_is_another_plan(folder: Path, tmp_path: Path) -> None:
    """Or what was merged before a kill would be in another order than the rest."""
    spec = tmp_path / "spec.json"
    keys = {"alignment": {"spec": str(spec)}}
    models, digests = [str(folder / name) for name in "ab"], set()
    for axes in (AXES, dict(reversed(AXES.items())), {name: [None] * len(axes) for name, axes in AXES.items()} | FIRST):
        spec.write_text(json.dumps(axes))
        digests |= {plan_only(recipe(*models, **keys)).digest, align_plan(document(*models, **keys)).digest}
    assert len(digests) == 6


def test_an_assignment_that_the_machine_cannot_hold_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 2**13)
    with pytest.raises(MemoryLimitExceeded, match=r"of 24 elements.* this machine has 64 MiB"):
        align(document("a", "b"), tmp_path / "out", roots=[folder])


def test_the_full_report_is_planned_by_what_it_decomposes(tmp_path: Path) -> None:
    """Not by what nothing permutes, however large; only headers are there."""
    for name in "ab":
        tensors = {"fc.weight": [8, 4], "out.weight": [2, 8], "fixed.weight": [3000, 3000]}
        header, at = {}, 0
        for tensor, shape in tensors.items():
            header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at := at + 4 * math.prod(shape)]}
        text = json.dumps(header).encode()
        (tmp_path / f"{name}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(tmp_path / f"{name}.safetensors", 8 + len(text) + at)
    models = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    keys: dict[str, Any] = {"report": "full", "limits": {"memory": "600MiB"}}
    spec = {"fc.weight": ["P", None], "out.weight": [None, "P"], "fixed.weight": [None, None]}
    align_plan(document(*models, alignment={"spec": spec}, **keys), threads=1)
    with pytest.raises(MemoryLimitExceeded, match=r"decompose fixed\.weight"):
        align_plan(document(*models, alignment={"spec": {**spec, "fixed.weight": ["Q", None]}}, **keys), threads=1)


def test_what_only_one_model_has_is_permuted_with_it(folder: Path, tmp_path: Path) -> None:
    """A model of another vocabulary, and with a tensor of its own: the file says what happens to them all the same."""
    own = {"2.weight": torch.ones(9, 16), "2.bias": torch.ones(9), "extra": torch.arange(24.0)}
    write_checkpoint(tmp_path / "own", permuted(mlp(0), SPEC.random(4)) | own)
    spec = {"spec": AXES | {"extra": ["P_0"]}}
    align(document(str(folder / "a"), str(tmp_path / "own"), alignment=spec), tmp_path / "out")
    merge(applying(tmp_path / "out" / "alignment.safetensors", str(tmp_path / "own")), tmp_path / "moved")
    found = load_file(tmp_path / "moved" / "model.safetensors")
    assert torch.equal(found["1.weight"], mlp(0)["1.weight"])
    back = SPEC.inverse(SPEC.random(4))
    assert torch.equal(found["extra"], own["extra"][torch.from_numpy(back["P_0"])])


def test_the_command_line_aligns(folder: Path, tmp_path: Path) -> None:
    a, b, out = folder / "a", folder / "b", tmp_path / "out"
    told = weightsmith("align", "--spec", folder / "spec.json", a, b, "-o", out, "--plan")
    assert "1 of 24, 1 of 16" in told and not out.exists()
    told = weightsmith("align", "--spec", folder / "spec.json", "--to", "first", a, b, "-o", out)
    assert f"{b}: moved" in told and told.strip().endswith("alignment.safetensors")
    wanted = tmp_path / "align.yml"
    wanted.write_text(json.dumps({"models": [str(a), str(b)], "alignment": {"spec": AXES}}))
    assert "which says all else" in weightsmith("align", "--full-report", wanted, tmp_path / "again", status=2)
    weightsmith("align", wanted, tmp_path / "again")
    found = [Permutations.open(each / "alignment.safetensors").models for each in (out, tmp_path / "again")]
    assert all((found[0][str(b)][name] == found[1][str(b)][name]).all() for name in SPEC.permutations)
    assert "give a document" in weightsmith("align", a, b, status=2)
    told = weightsmith(
        "align", "--spec", folder / "spec.json", "--to", "mean", a, b, folder / "c", "-o", tmp_path / "mean"
    )
    assert told.count("now 0\n") == 2
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(str(a), str(b), alignment={"spec": AXES}).to_data()))
    assert f"aligns      {b} with {a}" in weightsmith("plan", tmp_path / "recipe.json")
