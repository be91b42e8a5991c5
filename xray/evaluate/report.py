"""report.html: one file, no scripts, nothing fetched, pictures and charts inside; and the summary as text."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xray import pages
from xray.evaluate.charts import bar, line_chart
from xray.evaluate.errors import EvaluationError
from xray.evaluate.pictures import Pictures, data_uri

TEMPLATE = "report.html.jinja"
LONGEST_TEXT = 90
# Plain words for what metrics.json and the ledger call by one.
NAMES = {
    "data": "fetching and curating",
    "mae": "stage 1",
    "tags": "stage 2",
    "clip": "stage 3",
    "clip_only": "CLIP alone",
    "total": "all together",
    "cpu": "processor",
    "memory_gib": "memory, GiB",
    "gpu": "GPU",
}
REASONS = {
    "read": "could not be read",
    "decode": "could not be decoded",
    "caption": "neither caption nor tag",
    "blank": "blank pictures",
    "exact duplicate": "exact duplicates",
    "near duplicate": "near duplicates",
}

Curves = Mapping[str, Sequence[Mapping[str, Any]]]


def duration(seconds: float) -> str:
    """Seconds as people say them: "0.4 s", "38 s", "7 min 05 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def shorten(text: str, longest: int = LONGEST_TEXT) -> str:
    """See ``pages.shorten``."""
    return pages.shorten(text, longest)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        EvaluationError: it cannot be written; one sentence says why.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_report(path: Path, metrics: Mapping[str, Any], curves: Curves, pictures: Pictures) -> Path:
    """Render the report of a demo run.

    Everything that comes from data (captions, tags, class names, reasons) is escaped by the template.

    Args:
        path: the file to write.
        metrics: what metrics.json holds (see ``xray.demo``).
        curves: stage name -> the lines of its metrics.jsonl; the ablation's is called "clip_only".
        pictures: what to show; empty lists leave their sections out.

    Returns:
        ``path``.

    Raises:
        EvaluationError: the file cannot be written.
    """
    template = pages.template(Path(__file__).with_name(TEMPLATE), duration=duration, shorten=shorten, uri=data_uri)
    comparison = _comparison(metrics)
    html = template.render(
        m=metrics,
        pictures=pictures,
        bar=bar,
        headlines=_headlines(metrics),
        comparison=comparison,
        verdict=_verdict(comparison),
        charts=_charts(curves),
        stages=_stages(metrics),
        names=NAMES,
        reasons=REASONS,
    )
    write_text(path, html)
    return path


def _headlines(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    retrieval, zero_shot, tags = metrics["retrieval"], metrics["zero_shot"], metrics["clip_tags"]
    return [
        {
            "title": "Text to image, recall at 5",
            "value": retrieval["text_to_image"]["r@5"],
            "chance": retrieval["chance_r@5"],
            "constant": None,
            "text": f"A caption finds its picture among the first 5 of {retrieval['images']:,}. "
            f"Guessing: {100 * retrieval['chance_r@5']:.2g}%.",
        },
        {
            "title": "Zero-shot classification, top-1",
            "value": zero_shot["top1"],
            "chance": zero_shot["chance"],
            "constant": zero_shot["most_frequent"],
            "text": f"{zero_shot['classes']} classes, known by name only. "
            f"Guessing: {100 * zero_shot['chance']:.2g}%; "
            f"always the commonest: {100 * zero_shot['most_frequent']:.1f}%.",
        },
        {
            "title": "Clip tags, top-1",
            "value": tags["top1"],
            "chance": tags["chance"],
            "constant": tags["most_frequent"],
            "text": f"The likeliest of {tags['classes']:,} tags is right. "
            f"Guessing: {100 * tags['chance']:.2g}%; "
            f"always the commonest: {100 * tags['most_frequent']:.1f}%.",
        },
    ]


def _comparison(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    full, alone = metrics, metrics["ablation"]["clip_only"]
    lines = [
        {
            "name": f"{name}, R@{k}",
            "full": full["retrieval"][key][f"r@{k}"],
            "alone": alone["retrieval"][key][f"r@{k}"],
            "chance": full["retrieval"][f"chance_r@{k}"],
        }
        for name, key in (("text to image", "text_to_image"), ("image to text", "image_to_text"))
        for k in (1, 5, 10)
    ]
    lines += [
        {
            "name": name,
            "full": full["zero_shot"][key],
            "alone": alone["zero_shot"][key],
            "chance": full["zero_shot"]["chance"],
        }
        for name, key in (("zero-shot, top-1", "top1"), ("zero-shot, mean over classes", "mean_per_class"))
    ]
    return lines


def _verdict(comparison: Sequence[Mapping[str, Any]]) -> str:
    wins = sum(line["full"] > line["alone"] for line in comparison)
    losses = sum(line["full"] < line["alone"] for line in comparison)
    return f"Here the three stages are ahead in {wins} of {len(comparison)} measures and behind in {losses}."


def _charts(curves: Curves) -> list[dict[str, Any]]:
    def points(name: str) -> tuple[list[float], list[float]]:
        lines = curves.get(name, ())
        losses = [line.get("loss") for line in lines]
        return [float(line["step"]) for line in lines], [math.nan if loss is None else loss for loss in losses]

    charts = []
    for title, names in (
        ("Stage 1, masked autoencoding: error on hidden patches", {"mae": "mae"}),
        ("Stage 2, tags of clips and images: cross-entropy", {"tags": "tags"}),
        ("Stage 3, CLIP: contrastive loss", {"clip": "after stages 1 and 2", "clip_only": "from scratch"}),
    ):
        series = [(label, *points(name)) for name, label in names.items()]
        charts.append({"title": title, "svg": line_chart(series, description=f"{title}, by step")})
    return charts


def _stages(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    titles = {"mae": "1. masked autoencoding", "tags": "2. tags", "clip": "3. CLIP"}
    origins = {"mae": "random weights", "tags": "stage 1", "clip": "stage 2"}
    rows = [{**stage, "name": titles[stage["name"]], "init": origins[stage["name"]]} for stage in metrics["stages"]]
    return [*rows, {**metrics["ablation"]["clip_only"], "name": "CLIP alone", "init": "random weights"}]


def summary_table(metrics: Mapping[str, Any]) -> str:
    """The main numbers beside chance, as aligned text."""
    alone = metrics["ablation"]["clip_only"]
    rows: list[Sequence[str]] = [("", "three stages", "CLIP alone", "guessing", "commonest")]
    for title, way in (("text to image R@5", "text_to_image"), ("image to text R@5", "image_to_text")):
        full, chance = metrics["retrieval"][way]["r@5"], metrics["retrieval"]["chance_r@5"]
        rows.append((title, _share(full), _share(alone["retrieval"][way]["r@5"]), _share(chance), ""))
    shot, tags = metrics["zero_shot"], metrics["clip_tags"]
    rows.append(
        (
            f"zero-shot top-1, {shot['classes']} classes",
            _share(shot["top1"]),
            _share(alone["zero_shot"]["top1"]),
            _share(shot["chance"]),
            _share(shot["most_frequent"]),
        )
    )
    rows.append(
        (
            f"clip tags top-1, {tags['classes']} tags",
            _share(tags["top1"]),
            "",
            _share(tags["chance"]),
            _share(tags["most_frequent"]),
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    times = ", ".join(f"{name} {duration(value)}" for name, value in metrics["seconds"].items())
    return "\n".join([*lines, "", times])


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
