"""Inline SVG charts that take the page's font and colours (CSS variables), so dark mode just works."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start; values that are not finite are passed over."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm if norm else math.nan)
    return out


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover [low, high] in about ``count`` steps."""
    span = max(high - low, 1e-9)
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * count >= span)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick as few characters: 1500 is "1.5k"."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def line_chart(
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    x_name: str = "step",
    description: str = "",
    width: int = 420,
    height: int = 230,
) -> Markup:
    """A chart of curves: each is drawn faint as it was, and strong as its moving average.

    Args:
        series: (name, x values, y values) of at most four curves; points that are not finite are dropped.
        x_name: what the horizontal axis counts.
        description: the text that a screen reader gets.
        width, height: of the view box; the page scales it.
    """
    curves = []
    for name, xs, ys in series:
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
        if points:
            curves.append((name, points))
    if not curves:
        return Markup('<p class="quiet">Nothing was recorded.</p>')
    all_x = [x for _, points in curves for x, _ in points]
    heights = sorted(y for _, points in curves for _, y in points)
    # The first steps can be far above the rest: the axis ends at the 99th percentile.
    low, high = heights[0], heights[min(len(heights) - 1, int(0.99 * len(heights)))]
    pad = 0.06 * max(high - low, 1e-3)
    low, high = low - pad, high + pad
    x_low, x_high = min(all_x), max(max(all_x), min(all_x) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = min(max((y - low) / (high - low), 0.0), 1.0)
        return LEFT + across * (width - LEFT - RIGHT), height - BOTTOM - up * (height - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">']
    for y in ticks(low, high):
        _, py = place(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{py + 4:.1f}" text-anchor="end">{label(y)}</text>')
    for x in ticks(x_low, x_high):
        px, _ = place(x, low)
        parts.append(
            f'<text class="tick" x="{px:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{label(x)}</text>'
        )
    parts.append(f'<text class="tick" x="{width - RIGHT}" y="{height - 3}" text-anchor="end">{escape(x_name)}</text>')
    for number, (_, points) in enumerate(curves):
        averages = smooth([y for _, y in points], weight=max(0.0, 1 - 25 / len(points)))
        for style, values in (("faint", [y for _, y in points]), ("strong", averages)):
            stride = max(1, len(points) // 400)
            kept = list(zip([x for x, _ in points], values, strict=True))[::stride]
            path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in kept)
            parts.append(f'<polyline class="curve {style} s{number}" points="{path}"/>')
    parts.append("</svg>")
    if len(curves) > 1:
        keys = "".join(f'<span><i class="key s{i}"></i>{escape(name)}</span>' for i, (name, _) in enumerate(curves))
        parts.append(f'<div class="legend">{keys}</div>')
    return Markup("".join(parts))


def bar(value: float, chance: float, constant: float | None = None) -> Markup:
    """A bar for a share from 0 to 1, with a mark at chance and a hollow one at the best constant answer."""

    def place(share: float) -> str:
        return f"{100 * min(max(share, 0.0), 1.0):.2f}%"

    marks = f'<b style="left:{place(chance)}"></b>'
    if constant is not None:
        marks += f'<b class="hollow" style="left:{place(constant)}"></b>'
    return Markup(f'<div class="bar"><i style="width:{place(value)}"></i>{marks}</div>')
