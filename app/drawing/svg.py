"""SVG as text: a few shapes, texts that are measured by guess, and drawings put under one another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

_STYLE = (
    "text{font-family:'DejaVu Sans','Noto Sans',Arial,Helvetica,sans-serif;font-size:12px}.ink{fill:#1b1b26}"
    ".soft{fill:#5b5b6b}.strong{font-weight:600}.small{font-size:11px}.heading{font-size:15px;font-weight:600}"
    ".line{stroke:#d9d9e3}.axis{stroke:#8b8b9a}.asked{stroke:#1b1b26}.empty{fill:#eeeef4}"
)
_MARGIN, _HEADING, _GAP = 20.0, 26.0, 28.0
_WIDEST = 1500.0
"""Of a row of drawings."""
_MIDDLE = 4
"""How far below its middle a line of text stands."""


def width_of(text: str, size: float = 12) -> float:
    """About how wide a text is, rather too wide than too narrow."""
    return 0.62 * size * len(text)


def shown(value: float | None) -> str:
    """A number as people read it, with three digits.

    >>> shown(0.02346), shown(0.2), shown(1234567), shown(0), shown(0.0000123), shown(None)
    ('0.0235', '0.2', '1.23e6', '0', '1.23e-5', '–')
    """
    if value is None:
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def clipped(text: str, most: int) -> str:
    """A text of at most so many characters, its middle left out: both ends of a name tell.

    >>> clipped("self_attn.q_proj.weight", 11)
    'self_…eight'
    """
    if len(text) <= most:
        return text
    return f"{text[: (most - 1) // 2]}…{text[len(text) - (most - 1 - (most - 1) // 2) :]}"


@dataclass
class Drawing:
    """An SVG being drawn. `label` is what it shows, in words, for those who do not see it; `is_fluid`: a page may make
    it as wide as there is room.
    """

    width: float
    height: float
    label: str
    parts: list[str] = field(default_factory=list)
    is_fluid: bool = False

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str = "", *, title: str = "", css: str = ""
    ) -> None:
        about = _attributes(x=x, y=y, width=max(0.0, width), height=max(0.0, height), fill=fill or None, css=css)
        self.parts.append(f"<rect{about}>{_title(title)}</rect>" if title else f"<rect{about}/>")

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", css: str = "", fill: str = "", turn: float = 0
    ) -> None:
        """`y` is the middle of the line."""
        turned = f"rotate({_n(turn)} {_n(x)} {_n(y)})" if turn else None
        css = css if fill or "soft" in css else f"ink {css}".rstrip()
        about = _attributes(x=x, y=y + _MIDDLE, text_anchor=anchor, fill=fill or None, transform=turned, css=css)
        self.parts.append(f"<text{about}>{escape(text)}</text>")

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, css: str = "line", colour: str = "", dashes: str = ""
    ) -> None:
        css, dashed = "" if colour else css, dashes or None
        about = _attributes(x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour or None, stroke_dasharray=dashed, css=css)
        self.parts.append(f"<line{about}/>")

    def curve(
        self, points: Sequence[tuple[float, float]], colour: str, *, dashes: str = "", title: str = "", width: float = 2
    ) -> None:
        path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        about = _attributes(
            d=path, fill="none", stroke=colour, stroke_width=width, stroke_dasharray=dashes or None, css=""
        )
        self.parts.append(f"<path{about}>{_title(title)}</path>")

    def dot(self, x: float, y: float, colour: str, title: str) -> None:
        self.parts.append(f"<circle{_attributes(cx=x, cy=y, r=3.5, fill=colour, css='')}>{_title(title)}</circle>")

    def swatch(self, x: float, y: float, colour: str, dashes: str = "") -> None:
        """A short piece of a line, for legends; `y` is its middle."""
        self.curve([(x, y), (x + 18, y)], colour, dashes=dashes, width=4)

    def to_svg(self) -> str:
        """For a page: the style sheet there says what classes look like."""
        return f"{self._head()}{''.join(self.parts)}</svg>"

    def standalone(self) -> str:
        """A file of its own, on white."""
        ground = f'<rect width="{_n(self.width)}" height="{_n(self.height)}" fill="#ffffff"/>'
        return f"{self._head()}<style>{_STYLE}</style>{ground}{''.join(self.parts)}</svg>"

    def _head(self) -> str:
        size = f'width="{_n(self.width)}" height="{_n(self.height)}" viewBox="0 0 {_n(self.width)} {_n(self.height)}"'
        css = "drawing fluid" if self.is_fluid else "drawing"
        about = f'class="{css}" role="img" aria-label={quoteattr(self.label)}'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {about}>'


def arranged(title: str, drawings: Iterable[tuple[str, Drawing]]) -> Drawing:
    """Drawings in rows of as many as there is room for, each below its heading."""
    found = list(drawings)
    whole = Drawing(width_of(title, 15) + 2 * _MARGIN, 0, title)
    whole.text(_MARGIN, _MARGIN + 8, title, css="heading")
    y = _MARGIN + 44
    while found:
        fit = 1
        while fit < len(found) and sum(drawing.width + _GAP for _, drawing in found[: fit + 1]) <= _WIDEST:
            fit += 1
        row, found = found[:fit], found[fit:]
        x = _MARGIN
        for name, drawing in row:
            whole.text(x, y + 8, name, css="strong")
            whole.parts.append(f'<g transform="translate({_n(x)} {_n(y + _HEADING)})">{"".join(drawing.parts)}</g>')
            x += drawing.width + _GAP
        whole.width = max(whole.width, x - _GAP + _MARGIN)
        y += _HEADING + max(drawing.height for _, drawing in row) + _GAP
    whole.height = y - _GAP + _MARGIN
    return whole


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about so many.

    >>> ticks(0, 0.9)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(each * size for each in (1, 2, 5, 10) if each * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high; with their threes where they are few, or the ends where there are none.

    >>> log_ticks(0.02, 2), log_ticks(0.2, 0.25)
    ([0.03, 0.1, 0.3, 1.0], [0.2, 0.25])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    many = len(decades) > 4
    found = [float(f"{lead}e{power}") for power in decades for lead in ((1,) if many else (1, 3))]
    inside = [each for each in found if low * 0.999 <= each <= high * 1.001]
    if len(inside) > 8:
        inside = inside[:: math.ceil(len(inside) / 8)]
    return inside if len(inside) > 1 else sorted({low, high})


def _attributes(css: str, **values: float | str | None) -> str:
    told = [f' class="{css}"'] if css else []
    for name, value in values.items():
        if value is not None:
            written = value if isinstance(value, str) else _n(value)
            told.append(f" {name.replace('_', '-')}={quoteattr(written)}")
    return "".join(told)


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
