"""Drawings of analyses: as SVG, as pixels, in a terminal."""

from __future__ import annotations

import builtins
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from app.cli import main
from app.drawing import png
from app.drawing.analyses import FIGURES, Analysis
from app.drawing.calibrations import Calibrated
from app.drawing.charts import Curve, Level, Scale, Series, bars, chart, matrix, plot
from app.drawing.colours import diverging, ink_on, sequential
from app.drawing.searches import Trials, Tried
from app.drawing.svg import Drawing, arranged, clipped, log_ticks, ticks
from app.drawing.terminal import print_analysis
from merge_core.analysis.document import REPORT_NAME, AnalysisDocument, analyse
from tests.conftest import CONFIG, mixed_tensors, write_checkpoint

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    for seed, name in enumerate(["base", "m0", "m1"]):
        write_checkpoint(folder / name, mixed_tensors(seed), config=CONFIG)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("analysis") / "out"
    analyse(AnalysisDocument.from_data({"base_model": "base", "models": ["m0", "m1"]}), out, roots=[folder])
    return json.loads((out / REPORT_NAME).read_text())  # type: ignore[no-any-return]


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    parts = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in (red, green, blue)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_scales_are_read_without_telling_red_from_green() -> None:
    """A sequential scale becomes lighter all the way, a diverging one darker to both sides; texts on them are read."""
    steps = [luminance(sequential(i / 20)) for i in range(21)]
    assert steps == sorted(steps) and len(set(steps)) == 21
    for side in (-1, 1):
        steps = [luminance(diverging(side * i / 20)) for i in range(21)]
        assert steps == sorted(steps, reverse=True)
    for colour in (*(sequential(i / 20) for i in range(21)), *(diverging(i / 10 - 1) for i in range(21))):
        dark, light = sorted((luminance(colour), luminance(ink_on(colour))))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
def test_ticks_are_on_the_axis(low: float, size: float) -> None:
    found = ticks(low, low + size)
    slack = 1e-6 * max(abs(low), size)
    assert all(low - slack <= tick <= low + size + slack for tick in found) and len(found) <= 12
    positive = log_ticks(size, 3 * size)
    assert 2 <= len(positive) <= 9


@pytest.mark.parametrize("name", FIGURES)
def test_a_heat_map_has_a_cell_for_every_place(report: dict[str, Any], name: str) -> None:
    """Each with what it is in words, and the report's number."""
    analysis = Analysis(report)
    drawing = analysis.heat_map(FIGURES[name], 0, 1)
    root = ElementTree.fromstring(drawing.to_svg())
    assert root.get("role") == "img" and "3 layers" in str(root.get("aria-label"))
    titles = [str(each.text) for each in root.iter(f"{SVG}title")]
    assert len([title for title in titles if ", layer " in title]) == 12
    assert len(titles) == len(report["tensors"])
    if name == "relative":
        value = next(each for each in report["tensors"] if each["tensor"] == "model.norm.weight")
        assert f"model.norm: {value['models'][0]['relative']:.3g}" in titles
    for rect in root.iter(f"{SVG}rect"):
        x, y, width, height = (float(rect.get(key, "0")) for key in ("x", "y", "width", "height"))
        assert x >= -1 and x + width <= drawing.width + 1 and y >= -1 and y + height <= drawing.height + 1


def test_nothing_in_a_page_s_drawing_needs_leave(report: dict[str, Any]) -> None:
    """No style and no script, which a strict policy refuses; a file has its style in it."""
    for _, drawing in Analysis(report).drawings():
        svg = drawing.to_svg()
        ElementTree.fromstring(svg)
        assert "style" not in svg and "script" not in svg and 'class="drawing' in svg
        assert "<style>" in drawing.standalone()


def test_experts_share_a_row(report: dict[str, Any]) -> None:
    """Tensors in the same place count together, as one of their size."""
    first = next(each for each in report["tensors"] if each["tensor"] == "model.layers.0.mlp.up_proj.weight")
    others = [
        {**first, "tensor": f"model.layers.0.mlp.experts.{i}.w1.weight", "module": f"mlp.experts.{i}.w1.weight"}
        for i in range(8)
    ]
    heat = Analysis({**report, "tensors": others}).heat(FIGURES["relative"])
    assert list(heat.cells) == ["mlp.experts.*.w1"]
    assert heat.cells["mlp.experts.*.w1"][0] == pytest.approx(first["models"][0]["relative"], rel=1e-5)
    cosine = Analysis({**report, "tensors": others}).heat(FIGURES["cosine"]).cells["mlp.experts.*.w1"][0]
    assert cosine == pytest.approx(first["cosine"][0][1], abs=1e-5)


def test_names_are_texts_and_nothing_else() -> None:
    name = '<script>&"x"</script>'
    drawings = [
        matrix([name, "b"], [[1.0, None], [None, 1.0]], Scale(-1, 1, "diverging"), name),
        plot([Curve(name, [(1.0, 2.0), (2.0, 1.0)], 1.5)], name, across=name, up=name, log_x=True),
        bars([name], [{name: 0.2}], 0.1, name, quantity=name),
    ]
    for drawing in (*drawings, arranged(name, [(name, each) for each in drawings])):
        root = ElementTree.fromstring(drawing.to_svg())
        assert root.get("aria-label") == name
        assert not list(root.iter(f"{SVG}script"))


def test_what_is_not_there_is_drawn_empty() -> None:
    """Models that are their base, one layer, no layers."""
    assert "nothing differs" in plot([Curve("a", [])], "a", across="x", up="y", log_x=True).to_svg()
    assert Scale.over([], "log") == Scale(0, 1)
    assert Scale.over([2.0, 2.0]).place(2.0) == 0
    assert clipped("abcdefgh", 5) == "ab…gh"


@pytest.mark.parametrize("layers", [1, 120])
def test_few_layers_and_many_fit(report: dict[str, Any], layers: int) -> None:
    one = [each for each in report["tensors"] if each["layer"] == 0]
    tensors = [{**each, "layer": layer} for layer in range(layers) for each in one]
    drawing = Analysis({**report, "tensors": tensors}).heat_map(FIGURES["relative"])
    assert drawing.width < 1600
    numbers = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="middle"[^>]*>(\d+)</text>', drawing.to_svg())
    places = [float(x) for x, text in numbers if text.isdigit()]
    assert all(later - sooner > 20 for sooner, later in pairwise(places) if later > sooner)


def test_a_picture_shows_it(report: dict[str, Any]) -> None:
    poster = Analysis(report).poster()
    picture = png.to_png(poster)
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[start : start + 4]) for start in (16, 20))
    assert (width, height) == (pytest.approx(2 * poster.width, abs=2), pytest.approx(2 * poster.height, abs=2))


def test_without_a_rasterizer_a_picture_is_refused_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "resvg_py":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    png.check_can_draw.cache_clear()
    monkeypatch.chdir(folder)
    ran = CliRunner().invoke(main, ["inspect", "m0", "--base", "base", "--png", str(tmp_path / "a.png")])
    png.check_can_draw.cache_clear()
    assert ran.exit_code == 1 and "weightsmith[plots]" in ran.output and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("colours", "cell"), [("truecolor", "\x1b[38;2;"), (None, "█")])
def test_a_terminal_shows_it_in_what_colours_it_has(report: dict[str, Any], colours: Any, cell: str) -> None:
    told = io.StringIO()
    console = Console(file=told, force_terminal=colours is not None, color_system=colours, width=60)
    print_analysis(console, Analysis(report), FIGURES["relative"])
    assert cell in told.getvalue() and ("\x1b[38" in told.getvalue()) is (colours is not None)
    plain = re.sub(r"\x1b\[[\d;]*m", "", told.getvalue())
    assert "Distance from the base of m1" in plain and "mlp.down_proj" in plain
    assert max(map(len, plain.splitlines())) <= 60


def test_inspect_draws_and_writes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    files = {kind: tmp_path / f"all.{kind}" for kind in ("png", "svg", "json")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    ran = CliRunner().invoke(main, ["inspect", "m0", "m1", "--base", "base", "--figure", "cosine", *options])
    assert ran.exit_code == 0, ran.output
    assert "Cosine between two of m0 and m1" in ran.output or "Cosine between two of m1 and m0" in ran.output
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "m0, m1, compared with base" in files["svg"].read_text()
    assert json.loads(files["json"].read_text())["models"] == ["m0", "m1"]

    refused = CliRunner().invoke(main, ["inspect", "m0", "nowhere", "--base", "base"])
    assert refused.exit_code == 1 and "nowhere" in refused.output and "Traceback" not in refused.output


def test_a_drawing_has_no_more_digits_than_are_seen() -> None:
    drawing = Drawing(10, 10, "a")
    drawing.rect(1 / 3, 2 / 3, 0.1, 1e-9, "#000000")
    assert drawing.parts == ['<rect x="0.33" y="0.67" width="0.1" height="0" fill="#000000"/>']


def trials_of(*scores: tuple[float, ...], **wanted: Any) -> Trials:
    return Trials(
        [Tried(i, "done", {"w": i / 10}, dict(zip(wanted, each, strict=True))) for i, each in enumerate(scores)], wanted
    )


def inside(drawing: Drawing) -> bool:
    """Whether all that is drawn lies within the drawing."""
    numbers = [float(each) for part in drawing.parts for each in re.findall(r'(?:cx|x1?|x2)="([-.\d]+)"', part)]
    heights = [float(each) for part in drawing.parts for each in re.findall(r'(?:cy|y1?|y2)="([-.\d]+)"', part)]
    return all(0 <= x <= drawing.width for x in numbers) and all(0 <= y <= drawing.height for y in heights)


@given(
    st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2), min_size=1, max_size=12),
    st.sampled_from(["maximize", "minimize"]),
)
def test_the_best_so_far_only_becomes_better(scores: list[tuple[float, float]], direction: str) -> None:
    trials = trials_of(*scores, a=direction, b="maximize")
    best = trials.best
    assert best is not None and best in trials.front
    ahead = max if direction == "maximize" else min
    assert best.metrics["a"] == ahead(each[0] for each in scores)
    for _, _, drawing in trials.drawings():
        ElementTree.fromstring(drawing.to_svg())
        assert inside(drawing)
    (line,) = re.findall(r'<path d="M([^"]+)"[^>]*><title>the best so far', trials.curve("a").to_svg())
    heights = [float(corner.split()[1]) for corner in line.split("L")]
    assert heights == sorted(heights, reverse=direction == "maximize"), "up is less in SVG"


def test_a_search_of_ten_thousand_trials_is_drawn_with_some_of_them() -> None:
    scores = [(float(i * 7919 % 10_000), float(i * 104_729 % 10_007)) for i in range(10_000)]
    trials = trials_of(*scores, a="maximize", b="maximize")
    assert all(drawing.to_svg().count("<circle") < 1000 for _, _, drawing in trials.drawings())


def test_levels_lie_across_a_chart() -> None:
    """What something else comes to is told beside its line, also where all points are on one side of it."""
    drawn = chart(
        [Series("learned", [(0, 2.0), (1, 1.5)], line="straight")],
        "",
        across="step",
        up="loss",
        levels=[Level("0.3", 3)],
    )
    assert inside(drawn) and "0.3: 3" in drawn.to_svg()


def calibrated(*losses: float, **more: Any) -> Calibrated:
    points = [{"step": step, "loss": loss, "labels": loss} for step, loss in enumerate(losses)]
    report = {"curves": [{"name": "training", "points": points}, {"name": "check", "points": points[::2]}], **more}
    return Calibrated(report, ["chat", "code"])


def test_a_calibration_is_drawn_beside_what_it_is_compared_with() -> None:
    lines = [{"name": "task arithmetic at 0.3", "loss": 2.0, "labels": 2.5}]
    coefficients = {f"model.layers.{i}.w.weight": [[0.1 * i, 0.3], [0.5]] for i in range(3)} | {"head": [[0.2], [-0.4]]}
    tensors = [{"tensor": name, "coefficients": each} for name, each in coefficients.items()]
    found = calibrated(4.0, 3.0, 1.0, lines=lines, best_step=2, tensors=tensors)
    assert [(each.name, each.labels) for each in found.compared] == [
        ("learned, after step 2", 1.0),
        ("task arithmetic at 0.3", 2.5),
    ]
    drawn = {name: drawing for name, _, _, drawing in found.drawings()}
    assert list(drawn) == ["labels", "loss", "model-0", "model-1"]
    assert drawn["labels"].label == "Loss by step: held out from 4 to 1, task arithmetic at 0.3 2.5"
    for drawing in drawn.values():
        ElementTree.fromstring(drawing.to_svg())
        assert inside(drawing)
    map_ = found.coefficients(0)
    assert map_ is not None and map_.cells["model.layers.*.w"] == pytest.approx({0: 0.15, 1: 0.2, 2: 0.25})
    assert map_.single == {"head": 0.2} and map_.scale.kind == "diverging"


def test_what_was_measured_and_not_learned_has_no_curve() -> None:
    found = Calibrated({"tensors": [{"tensor": "a", "elements": 3}]}, ["chat"])
    assert not found.compared and not [*found.drawings()]
