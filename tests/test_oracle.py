"""The tool that compares with mergekit, without mergekit: what it runs, and what it calls different."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_core.merge import plan_only
from merge_core.methods import find_method
from merge_core.recipe import Recipe
from tests import oracle
from tests.oracle import Trial, compare, main, shapes, trials, units, write_models
from tests.test_docs import ROOT

RECIPES_PAGE = ROOT / "docs" / "recipes.md"
OF_MERGEKIT = (
    "arcee_fusion breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear karcher linear model_stock",
    "multislerp nearswap nuslerp passthrough ram ramplus_tl sce slerp task_arithmetic ties",
)
TRIAL = Trial("a trial", [{"base_model": "base", "models": [{"model": "one"}]}])
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle") / "models"
    write_models(folder)
    return folder


def test_every_method_of_mergekit_is_tried_and_every_trial_plans(tiny: Path) -> None:
    found = trials()
    for trial in found:
        plan_only(Recipe.from_text(trial.recipe), roots=[tiny])
    assert {document["merge_method"] for trial in found for document in trial.documents} == set(
        " ".join(OF_MERGEKIT).split()
    )
    assert len({trial.title for trial in found}) == len(found)


def test_what_differs_is_explained_in_the_docstring_or_in_the_docs() -> None:
    for trial in trials():
        method = find_method(trial.documents[-1]["merge_method"], "mergekit")
        explained = " ".join(f"{method.__doc__} {RECIPES_PAGE.read_text()}".split())
        assert bool(trial.differ) == bool(trial.because) and trial.because in explained, trial.title


def test_fine_changes_are_exact_and_no_two_are_of_equal_magnitude(tiny: Path) -> None:
    base, tuned = (oracle.load_model(tiny / name) for name in ("base32", "two32"))
    for name in shapes():
        changes = (tuned[name] - base[name]).flatten()
        assert torch.equal(changes.double(), (tuned[name].double() - base[name].double()).flatten())
        magnitudes = changes.abs()[changes != 0]
        assert 0 < len(magnitudes) < len(changes) and len(magnitudes.unique()) == len(magnitudes)


def test_a_unit_is_that_of_the_larger_number_and_more_where_numbers_cancel() -> None:
    ours = torch.tensor([1.0, 1.0, -4.0, 0.0, 1e-9, 8.0, float("nan")], dtype=torch.float64)
    theirs = torch.tensor([1.0, 1 + 2**-7, -4 - 2**-4, 0.0, 3e-9, -8.0, 1.0], dtype=torch.float64)
    assert units(ours[:4], theirs[:4]).tolist() == [0, 1, 2, 0]
    assert units(ours[:6], theirs[:6])[4] < 1 and units(ours, theirs)[-1].isnan()
    assert (
        units(torch.zeros(2), torch.zeros(2)).tolist() == [0, 0] and not units(torch.zeros(0), torch.zeros(0)).numel()
    )


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    oracle.write_model(folder, tensors)
    return folder


def test_outputs_are_compared(tiny: Path, tmp_path: Path) -> None:
    tensors = oracle.load_model(tiny / "one")
    ours = write(tmp_path / "ours", tensors)

    def wrong(name: str, trial: Trial = TRIAL, head: Tensor = tensors[HEAD]) -> str:
        theirs = write(tmp_path / name, {**tensors, HEAD: head})
        return "; ".join(compare(trial, ours, theirs, tiny).wrong)

    head = tensors[HEAD]  # in which one number is another
    step = torch.zeros_like(head, dtype=torch.int16)
    step[3, 4] = 1
    near = (head.view(torch.int16) + step).view(torch.bfloat16)
    far = (head.view(torch.int16) + 3 * step).view(torch.bfloat16)
    assert wrong("equal") == "" and wrong("near", head=near) == ""
    assert "lm_head.weight: 1 of 8192 further than a unit away" in wrong("far", head=far)
    assert wrong("explained", replace(TRIAL, differ={"head": 0.001}, because="so it is"), head=far) == ""
    assert "further" in wrong("elsewhere", replace(TRIAL, differ={"norm": 1.0}, because="so it is"), head=far)
    assert "further" in wrong("nan", head=torch.where(step > 0, float("nan"), head.float()).bfloat16())
    assert "(128, 64)" in wrong("longer", head=torch.cat([head, head])) and "float32" in wrong(
        "wider", head=head.float()
    )
    assert wrong("as many", replace(TRIAL, compare="counts"), head=head.roll(1, 0)) != ""
    assert wrong("alike", replace(TRIAL, compare="chances")) == ""
    base = oracle.load_model(tiny / "base")[HEAD]
    assert "moved" in wrong("unmoved", replace(TRIAL, compare="chances"), head=base)


def test_new_tokens_are_compared_by_name(tmp_path: Path) -> None:
    rows = torch.randn(6, 64).bfloat16()
    for folder, order in (("ours", [0, 1, 2, 3, 4, 5]), ("theirs", [0, 1, 2, 4, 3, 5])):
        tensors = {name: rows[order] if shape[0] == 6 else torch.zeros(shape) for name, shape in shapes(6).items()}
        tokens = [["<s>", "</s>", "a", "b", "c", "d"][i] for i in order]
        oracle.write_model(tmp_path / folder, tensors, tokenizer=oracle.tokenizer(tokens, ()))
    assert compare(TRIAL, tmp_path / "ours", tmp_path / "theirs", tmp_path).wrong == []


def test_without_mergekit_all_is_skipped_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MERGEKIT", str(tmp_path / "mergekit-yaml"))
    assert main(None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"0 passed, 0 failed, {len(trials())} skipped"
    assert all("make bench-peer" in line for line in lines[:-1])


def test_what_mergekit_does_not_do_is_skipped_and_what_we_refuse_fails(tiny: Path) -> None:
    assert oracle.judge(TRIAL, 0, tiny.parent, "ValueError: no") == ("skipped", "mergekit fails: ValueError: no")
    refused = replace(TRIAL, documents=[{**TRIAL.documents[0], "merge_method": "nothing"}])
    outcome, why = oracle.judge(refused, 0, tiny.parent, None)
    assert outcome == "failed" and "there is no method" in why
