"""`make science` can begin: its experiments measure what they judge, and a missed bar is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.science import __main__ as science
from benchmarks.science import alignment
from benchmarks.science.harness import Experiment, Numbers
from benchmarks.science.nets import Mlp


def untrained(width: int, seed: int, digits: object) -> Mlp:
    torch.manual_seed(seed)
    return Mlp(width)


def test_a_tiny_pair_is_matched_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "WIDTH", 12)
    monkeypatch.setattr(alignment, "_trained", untrained)  # an optimiser alone takes seconds to import
    measured = alignment.run_pair(0, tmp_path)
    assert measured["function"] < 1e-4
    assert measured["l2 after"] < measured["l2 before"]
    rows = alignment.judge_pair([{**measured, "naive barrier": 0.1}])
    assert len(rows) == 5
    assert {row.met for row in rows} == {True, False}  # random networks reach few of the bars


@pytest.mark.parametrize("value", [0.2, -0.2])
def test_a_missed_bar_is_the_exit_status(
    value: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(experiments: list[Experiment], done) -> None:
        for experiment in experiments:
            done(experiment, [_numbers(value)] * len(experiment.seeds), 1.0)

    four = alignment.FOUR
    monkeypatch.setattr(science, "EXPERIMENTS", (four,))
    monkeypatch.setattr(science, "run_all", measured)
    monkeypatch.setattr(science, "Console", lambda: Console(width=200))
    assert science.main() == (value < 0.15)
    told = capsys.readouterr().out
    assert ("missed: " + four.title in told) == (value < 0.15)
    assert "≥ 0.150" in told


def _numbers(many: float) -> Numbers:
    return {"naive": 0.0, "to the first": 0.0, "many": many, "single": 1.0}


def test_every_experiment_has_seeds_and_names_its_paper() -> None:
    for experiment in science.EXPERIMENTS:
        assert len(experiment.seeds) >= 1
        assert experiment.paper.startswith("https://arxiv.org/abs/")
    assert len({experiment.title for experiment in science.EXPERIMENTS}) == len(science.EXPERIMENTS)
