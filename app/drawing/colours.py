"""Colours that stand for numbers and for models.

Scales are straight lines of lightness in OKLab (Ottosson, 2020, https://bottosson.github.io/posts/oklab), so that equal
steps look equal, and go from blue to yellow or from blue to orange, which people who do not tell red from green see
too. Models have the eight colours of Okabe & Ito (2008), a little darker where they would vanish on white.
"""

from __future__ import annotations

import math

MODELS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8c564b", "#7f7f7f")
DASHES = ("", "6 3", "2 2")
"""From the ninth model on lines are dashed."""


def of_model(number: int) -> tuple[str, str]:
    """The colour of a model's lines, and their dashes."""
    return MODELS[number % len(MODELS)], DASHES[number // len(MODELS) % len(DASHES)]


def sequential(share: float) -> str:
    """From dark blue for 0 over green to bright yellow for 1.

    >>> sequential(0), sequential(1)
    ('#22116d', '#ffef73')
    """
    share = min(1.0, max(0.0, share))
    return _colour(0.28 + 0.66 * share, 0.105 + 0.04 * abs(2 * share - 1), 280 - 178 * share)


def diverging(share: float) -> str:
    """From blue for −1 over a light grey for 0 to orange for 1."""
    share = min(1.0, max(-1.0, share))
    strength = abs(share)
    return _colour(0.93 - 0.4 * strength, 0.005 + 0.145 * strength, 50 if share > 0 else 258)


def ink_on(colour: str) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def _colour(lightness: float, chroma: float, hue: float) -> str:
    """An OKLCh colour in sRGB, what lies outside of that clipped."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    shown = (12.92 * each if each <= 0.0031308 else 1.055 * each ** (1 / 2.4) - 0.055 for each in map(_clip, linear))
    return "#" + "".join(f"{round(255 * _clip(each)):02x}" for each in shown)


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))
