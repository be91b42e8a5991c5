"""Charts as inline SVG that take the page's font and colours (CSS variables), so dark mode just works."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 36
Points = Sequence[tuple[float, float]]


def rank_chart(
    series: Sequence[tuple[str, Points]], *, description: str, mark: tuple[str, float] | None = None
) -> Markup:
    """Frequencies by rank, both on logarithmic axes.

    Args:
        series: a name and its (rank, frequency) points, positive and in order, of at most four curves.
        description: the text that a screen reader gets.
        mark: a name and a frequency at which a line crosses the chart.
    """
    every = [point for _, points in series for point in points]
    if not every:
        return _nothing()
    right = max(math.log10(max(x for x, _ in every)), 1e-3)
    low = math.floor(math.log10(min(y for _, y in every)))
    high = max(math.log10(max(y for _, y in every)), low + 1e-3)

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log10(x) / right
        up = (min(max(math.log10(y), low), high) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_open(description)]
    for power in range(low, math.floor(high) + 1):
        parts.append(_level(place(1, 10**power)[1], _number(10**power)))
    for power in range(math.floor(right) + 1):
        parts.append(_below(place(10**power, 10**low)[0], _number(10**power)))
    parts.append(_axes("rank", "times"))
    if mark is not None and low <= math.log10(mark[1]) <= high:
        level = place(1, mark[1])[1]
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        text = f'<text class="tick" x="{WIDTH - RIGHT}" y="{level - 5:.1f}" text-anchor="end">{escape(mark[0])}</text>'
        parts.append(text)
    for number, (_, points) in enumerate(series):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline class="curve s{number}" points="{path}"/>')
    parts.append("</svg>")
    return Markup("".join([*parts, _legend([name for name, _ in series])]))


def histogram(
    bins: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, description: str, name: str
) -> Markup:
    """Shares of samples by bin, the series side by side.

    Args:
        bins: their names.
        series: a name and a share from 0 to 1 for every bin, of at most four series.
        description: the text that a screen reader gets.
        name: of what the bins measure.
    """
    tallest = max((share for _, shares in series for share in shares), default=0.0)
    if tallest <= 0:
        return _nothing()
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if step * 5 >= tallest or step == 0.25)
    top = step * math.ceil(tallest / step - 1e-9)
    slot = (WIDTH - LEFT - RIGHT) / len(bins)
    bar = 0.84 * slot / len(series)
    base, full = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    parts = [_open(description)]
    for level in range(round(top / step) + 1):
        parts.append(_level(base - level * step / top * full, f"{100 * level * step:.0f}%"))
    stride = math.ceil(len(bins) / 12)
    for number, text in enumerate(bins):
        left = LEFT + number * slot
        if number % stride == 0:
            parts.append(_below(left + slot / 2, text))
        for index, (_, shares) in enumerate(series):
            height = shares[number] / top * full
            x, y = left + 0.08 * slot + index * bar, base - height
            parts.append(
                f'<rect class="bin s{index}" x="{x:.1f}" y="{y:.1f}" width="{bar:.1f}" height="{height:.1f}"/>'
            )
    parts += [_axes(name, "share of samples"), "</svg>", _legend([name for name, _ in series])]
    return Markup("".join(parts))


def _nothing() -> Markup:
    return Markup('<p class="quiet">There is nothing to draw.</p>')


def _open(description: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'


def _level(y: float, text: str) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _below(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'


def _axes(across: str, up: str) -> str:
    name = f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(across)}</text>'
    return f'{name}<text class="tick" x="{LEFT}" y="{HEIGHT - 3}">{escape(up)}</text>'


def _legend(names: Sequence[str]) -> str:
    keys = "".join(f'<span><i class="key s{i}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{keys}</div>' if len(names) > 1 else ""


def _number(value: float) -> str:
    """A tick in few characters: 1000000 is "1M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
