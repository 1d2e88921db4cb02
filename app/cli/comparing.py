"""`weightsmith inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from app.cli.terminal import MEMORY, THREADS, cache_folder, failures_told, model_places, progress_bar, size_of
from app.drawing.analyses import FIGURES, Analysis
from merge_core.imports import quick_imports

FILE_OUT = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODELS…")
@click.option("--base", required=True, metavar="MODEL", help="What the models were tuned from.")
@click.option("--figure", type=click.Choice(list(FIGURES)), default="relative", show_default=True, help="What to draw.")
@click.option("--density", type=click.FloatRange(0, 1, min_open=True), default=0.2, show_default=True)
@click.option("--top", type=click.IntRange(0, 256), default=16, show_default=True, help="Singular values; 0: none.")
@click.option("--png", type=FILE_OUT, metavar="FILE", help="Everything drawn, as a picture (the extra `plots`).")
@click.option("--svg", type=FILE_OUT, metavar="FILE", help="Everything drawn, as SVG.")
@click.option("--json", "as_json", type=FILE_OUT, metavar="FILE", help="The whole report.")
@MEMORY
@THREADS
def inspect(
    models: tuple[str, ...],
    base: str,
    figure: str,
    density: float,
    top: int,
    png: Path | None,
    svg: Path | None,
    as_json: Path | None,
    memory: str | None,
    threads: int | None,
) -> None:
    """Compare MODELS with their base and with one another: how far, where, in which directions.

    Draws a heat map of layers and modules here; --png, --svg and --json write all that was found. Model paths are as
    seen from here; Hub ids will do too.
    """
    import json
    import tempfile

    most = size_of(memory)
    with failures_told():
        if png is not None:
            from app.drawing.png import check_can_draw, to_png

            check_can_draw()  # rather than after an hour
        with quick_imports():
            from merge_core.analysis.document import REPORT_NAME, AnalysisDocument, analyse

        written = {"base_model": base, "models": list(models), "density": density, "top": top}
        document = AnalysisDocument.from_data(written)
        with tempfile.TemporaryDirectory() as folder, progress_bar() as report:
            out = Path(folder) / "analysis"
            artifact = analyse(
                document,
                out,
                roots=model_places(),
                memory=most,
                threads=threads,
                cache=cache_folder(),
                report=report,
            )
            text = (out / REPORT_NAME).read_text()
        analysis = Analysis(json.loads(text))
        if as_json is not None:
            as_json.write_text(text)
        if svg is not None:
            svg.write_text(analysis.poster().standalone())
        if png is not None:
            png.write_bytes(to_png(analysis.poster()))
    from rich.console import Console

    from app.drawing.terminal import print_analysis

    for warning in artifact.warnings:
        click.echo(f"warning: {warning}", err=True)
    print_analysis(Console(), analysis, FIGURES[figure])
    for suspicion in analysis.report["suspicions"]:
        click.echo(f"look: {suspicion['words']}")
