"""Drawings as PNG, by resvg (the extra `plots`)."""

from __future__ import annotations

import functools

from app.drawing.svg import Drawing

_SHARP = 2.0
"""Pixels for each unit of a drawing."""


class CannotDraw(ValueError):
    """What is needed to make a picture is not there; the message says what to do."""


def to_png(drawing: Drawing) -> bytes:
    """A drawing's pixels, on white. Raises `CannotDraw`."""
    check_can_draw()
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=drawing.standalone(), zoom=_SHARP))


@functools.cache
def check_can_draw() -> None:
    """Raise `CannotDraw` if there is no rasterizer, or no font that it could write with."""
    try:
        import resvg_py
    except ImportError:
        raise CannotDraw("PNG needs resvg: pip install 'weightsmith[plots]', or write --svg instead") from None
    written, empty = Drawing(40, 20, ""), Drawing(40, 20, "")
    written.text(2, 10, "Mm")
    if len({bytes(resvg_py.svg_to_bytes(svg_string=each.standalone())) for each in (written, empty)}) == 1:
        raise CannotDraw("no font was found to write with: install one, such as fonts-dejavu-core, or write --svg")
