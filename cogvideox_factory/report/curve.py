"""A line chart as a picture, for where SVG is not shown: model cards."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 800, 320, 70, 40, 30
_COLOURS = ((43, 108, 176), (221, 107, 32), (56, 161, 105))


def curve(series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str) -> np.ndarray:
    """Return a chart uint8 [H, W, 3] of `series`: lines through (x, y) points, y from 0 or the least value up.

    Points that are not finite are left out.
    """
    lines = {name: [(x, y) for x, y in points if np.isfinite(y)] for name, points in series.items()}
    xs = [x for points in lines.values() for x, _ in points] or [0.0]
    ys = [y for points in lines.values() for _, y in points] or [0.0]
    low, high = min(0.0, *ys), max(*ys, 0.0)
    left, right, high = min(xs), max(max(xs), min(xs) + 1), high if high > low else low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left)
        up = (y - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - 20), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)

    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * (high - low)
        y = place(left, value)[1]
        draw.line([(_LEFT, y), (_WIDTH - 20, y)], fill=(225, 225, 225))
        draw.text((_LEFT - 8, y), f"{value:.3g}", fill=(90, 90, 90), font=font, anchor="rm")
    for x, anchor in ((left, "lt"), (right, "rt")):
        text = f"{x:g} {x_label}" if x == right else f"{x:g}"
        draw.text((place(x, low)[0], _HEIGHT - _BOTTOM + 8), text, fill=(90, 90, 90), font=font, anchor=anchor)
    beside = _LEFT
    for (name, points), colour in zip(lines.items(), _COLOURS, strict=False):
        where = [place(x, y) for x, y in points]
        draw.line(where, fill=colour, width=2)
        for x, y in where if len(where) < 40 else []:
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
        draw.text((beside, 6), name, fill=colour, font=font)
        beside += int(draw.textlength(name, font=font)) + 24
    return np.asarray(picture)
