"""`make science` can begin: its experiments measure what they judge, and a missed bar is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.science import __main__ as science
from benchmarks.science import alignment
from benchmarks.science.harness import Experiment, Numbers, at_least, at_most, claimed
from benchmarks.science.nets import Mlp
from benchmarks.science.report import write

Done = Callable[[Experiment, list[Numbers], float], None]


def untrained(width: int, seed: int, digits: object) -> Mlp:
    torch.manual_seed(seed)
    return Mlp(width)


def test_a_tiny_pair_is_matched_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "WIDTHS", (12, 14))
    monkeypatch.setattr(alignment, "WIDTH", 14)
    monkeypatch.setattr(alignment, "_trained", untrained)  # an optimiser alone takes seconds to import
    measured = dict(alignment.run_pair(0, tmp_path))
    assert measured["14 function"] < 1e-4
    assert measured["14 l2 after"] < measured["14 l2 before"]
    rows = [row for claim in alignment.PAIR.claims for row in claim.judge([measured | {"14 naive barrier": 0.1}])]
    assert {row.verdict for row in rows} >= {"met", "missed"}  # random networks reach few of the bars
    assert set(alignment.PAIR.plots([measured])) == {"line", "width"}


@pytest.mark.parametrize("value", [0.2, -0.2])
def test_a_missed_bar_is_the_exit_status_and_in_the_report(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(experiments: list[Experiment], done: Done, *, quick: bool) -> None:
        for experiment in experiments:
            done(experiment, [_numbers(value)] * len(experiment.seeds), 1.0)

    four, report = alignment.FOUR, tmp_path / "science.md"
    monkeypatch.setattr(science, "EXPERIMENTS", (four,))
    monkeypatch.setattr(science, "run_all", measured)
    monkeypatch.setattr(science, "REPORT", report)
    monkeypatch.setattr(science, "Console", lambda: Console(width=200))
    is_missed = value < 0.15
    assert science.main([]) == is_missed
    told = capsys.readouterr().out
    assert (f"missed: {four.claims[0].title}" in told) == is_missed
    assert "≥ 0.150" in told
    text = report.read_text()
    assert ("**missed**" in text) == is_missed
    assert four.claims[0].says in text
    for drawing in re.findall(r"\]\((science/.*?svg)\)", text):
        assert (tmp_path / drawing).read_text().startswith("<svg")
    (tmp_path / "science" / "old.svg").touch()
    assert write((four,), {}, report)  # nothing is measured anew: it is the report of the numbers that are kept
    assert report.read_text() == text
    assert not (tmp_path / "science" / "old.svg").exists()


def _numbers(many: float) -> Numbers:
    return {"naive": 0.0, "to the first": 0.0, "many": many, "single": 1.0}


def test_a_part_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], bool]] = []
    monkeypatch.setattr(
        science, "run_all", lambda chosen, done, *, quick: asked.append(([each.name for each in chosen], quick))
    )
    assert science.main(["--quick"]) == science.main(["sizes", "soups"]) == 0
    quick = [each.name for each in science.EXPERIMENTS if each.quick]
    assert asked == [(quick, True), (["soups", "sizes"], False)]
    assert len(quick) > 5


def test_no_report_is_written_before_all_was_measured_once(tmp_path: Path) -> None:
    pair, four = alignment.PAIR, alignment.FOUR
    report = tmp_path / "science.md"
    assert not write((pair, four), {four.name: [_numbers(0.2)]}, report)
    assert not report.exists()
    assert write((four,), {}, report)


def test_every_experiment_has_seeds_and_every_claim_names_its_paper() -> None:
    for experiment in science.EXPERIMENTS:
        assert len(experiment.seeds) >= max(1, experiment.quick)
        assert experiment.claims
    claims = [claim for experiment in science.EXPERIMENTS for claim in experiment.claims]
    assert all(claim.paper.startswith("https://arxiv.org/abs/") and claim.says.endswith(".") for claim in claims)
    for names in ([each.name for each in science.EXPERIMENTS], [claim.title for claim in claims]):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(("found", "bar", "verdict"), [([0.1, 0.3], 0.2, "met"), ([0.1, 0.2], 0.2, "missed")])
def test_a_bar_is_held_against_the_mean_or_the_worst(found: list[float], bar: float, verdict: str) -> None:
    assert at_least("", found, bar).verdict == verdict
    assert at_least("", found, bar, of=min).verdict == "missed"
    assert at_most("", found, -bar).verdict == "missed"
    assert claimed("", found, bar).verdict == {"met": "reproduced", "missed": "not reproduced"}[verdict]
