"""Tables of results: in the terminal after a run, and in the README, which `python -m bench.table` updates.

It also writes `xray_kernels/measured.json`, by which the package chooses implementations on devices measured before.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

from bench.results import COPY, GREEN, MATMUL, RESULTS, ROOT, Comparison, Target, reached, read, row
from xray_kernels import _library

README = ROOT / "README.md"
MEASURED = ROOT / "xray_kernels" / "measured.json"
ON_CUDA = ("reference", "triton", "cuda", "sdpa", "flash_attn", "xformers")
"""Implementations of an op, and backends of attention, of which the fastest becomes the default."""
JUDGED_BY = {
    "contrastive_statistics": ("clip_loss", "forward"),
    "contrastive_statistics_backward": ("clip_loss", "forward+backward"),
    "sigmoid_contrastive": ("siglip_loss", "forward+backward"),
}
"""Ops that no function is named after -> the comparisons they are judged by; of others, see `measured`."""
BEGIN = "<!-- results: written by `python -m bench.table` -->"
END = "<!-- end of results -->"


def terminal(comparisons: list[Comparison]) -> str:
    """One table: a heading for each comparison, then a line for each peer. `*` marks what runs by default."""
    width = max([14, *(len(peer.name) + 2 for c in comparisons for peer in c.peers)])
    lines = [f"{'':{width}}  {'median':>10}  {'quartiles':>17}  {'ratio':>7}  {'GB/s':>6}  {'roofline':>8}"]
    for c in comparisons:
        lines += ["", f"{c.function}, {c.case}, {c.dtype}, {c.direction}; {speeds(c)}"]
        for timing in c.peers:
            name, r = f"{timing.name}{' *' if timing.default else ''}", row(c, timing)
            if r is None:
                lines.append(f"{name:{width}}  not timed: {timing.parity}")
                continue
            spread = f"{r.low * 1e3:.2f} - {r.high * 1e3:.2f}"
            ratio = "" if r.ratio is None else f"{r.ratio:.2f}x"
            numbers = f"{r.median * 1e3:7.2f} ms  {spread:>17}  {ratio:>7}  {r.gb_per_s:6.2f}  {r.roofline:8.0%}"
            rate = f"  {c.samples / r.median:.1f} samples/s" if c.samples else ""
            memory = f", {timing.memory / 2**30:.1f} GiB" if timing.memory else ""
            lines.append(f"{name:{width}}  {numbers}{rate}{memory}")
        lines += [f"{name:{width}}  skipped: {why}" for name, why in c.skipped.items()]
        lines += [f"{'target':{width}}  {verdict(c, target)}" for target in c.targets]
    lines += [
        "",
        "ratio: median of the first line over this one; roofline: share of the faster of copy and matmul limits",
    ]
    return "\n".join(lines)


def verdict(c: Comparison, target: Target) -> str:
    """A target, what was reached of it, and whether that is a hit or a miss."""
    found = reached(c, target)
    is_share = target.against in (COPY, MATMUL)
    wanted = f"{target.at_least:.0%} of {target.against}" if is_share else f"{target.at_least:g}x {target.against}"
    wanted += f" by {target.of}" if target.of else ""
    if found is None:
        return f"{wanted}: not measured"
    shown = f"{found:.0%}" if is_share else f"{found:.2f}x"
    return f"{wanted}: {shown}, {'hit' if found >= target.at_least else 'missed'}"


def speeds(c: Comparison) -> str:
    """What a comparison's roofline is made of, and how many cores other processes took meanwhile."""
    copied, multiplied = statistics.median(c.copy_samples), statistics.median(c.matmul_samples)
    text = f"copy {c.bytes / copied / 1e9:.1f} GB/s, matmul {c.matmul_flops / multiplied / 1e9:.0f} GFLOP/s"
    return text if c.others is None else f"{text}, others {c.others:.1f} cores"


def markdown(folder: Path) -> str:
    """All result files below `folder` as one table a device: the baseline, and what this project runs by default."""
    parts: list[str] = []
    files = sorted(folder.glob("*/*.json"))
    for device in sorted({file.parent for file in files}):
        found = [read(file) for file in files if file.parent == device]
        facts = found[0][0]
        others = [c.others for _, comparisons in found for c in comparisons if c.others is not None]
        beside = f"; other processes took up to {max(others):.1f} cores meanwhile" if others else ""
        parts += [
            f"**{facts['device_name']}**, {facts['threads']} threads, torch {facts['torch']}, measured {facts['date']}"
            f" ([raw samples](bench/results/{facts['device']})){beside}:",
            "",
            "| function | input | direction | baseline | torch.compile | xray | ratio | GB/s | roofline |",
            "|---|---|---|---|---|---|---|---|---|",
            *(markdown_row(c) for _, comparisons in found for c in comparisons),
            "",
        ]
    return "\n".join(parts).rstrip() if parts else "Nothing is measured yet: `make bench` measures."


def markdown_row(c: Comparison) -> str:
    """One comparison: medians and quartiles in ms, and the ratio of the baseline's median to ours."""
    cells = [f"`{c.function}`", f"{c.case}, {c.dtype}", c.direction]
    baseline = c.peers[0]
    compiled = next((peer for peer in c.peers if peer.name == "torch.compile"), None)
    default = next((peer for peer in c.peers if peer.default), None)
    for timing, named in ((baseline, True), (compiled, False), (default, True)):
        r = None if timing is None else row(c, timing)
        if timing is None or r is None:
            cells.append("-" if timing is None else "parity red")
        else:
            name = f"{timing.name.removeprefix('xray ')} " if named else ""
            cells.append(f"{name}{r.median * 1e3:.1f} ({r.low * 1e3:.1f}-{r.high * 1e3:.1f}) ms")
    r = None if default is None else row(c, default)
    if r is None:
        cells += ["-", "-", "-"]
    else:
        cells += ["-" if r.ratio is None else f"{r.ratio:.2f}x", f"{r.gb_per_s:.1f}", f"{r.roofline:.0%}"]
    return f"| {' | '.join(cells)} |"


def update(readme: Path, folder: Path) -> bool:
    """Put the tables of `folder` between the markers of `readme`; whether that changed it.

    Raises:
        ValueError: the file does not hold both markers once, in order.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} must hold the lines {BEGIN} and {END} once each, in this order")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{markdown(folder)}\n\n{END}{after}"
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def fastest(comparisons: list[Comparison]) -> str | None:
    """The implementation with the least product of medians over comparisons; only those with green parity in all."""
    products: dict[str, float] = {}
    for name in ON_CUDA:
        timings = [peer for c in comparisons for peer in c.peers if peer.ours and peer.name == f"xray {name}"]
        if len(timings) == len(comparisons) and all(timing.parity == GREEN for timing in timings):
            products[name] = sum(math.log(statistics.median(timing.samples)) for timing in timings)
    return min(products, key=lambda name: products[name], default=None)


def measured(folder: Path) -> str:
    """The text of `measured.json`: CUDA device name -> op -> dtype -> the fastest implementation.

    An op is judged by the comparisons of its function's forward direction, a backward op by those of both directions.
    """
    table: dict[str, dict[str, dict[str, str]]] = {}
    for file in sorted(folder.glob("*/*.json")):
        facts, comparisons = read(file)
        if facts["device_type"] != "cuda":
            continue
        for function, dtype in dict.fromkeys((c.function, c.dtype) for c in comparisons):
            own = {function: (function, "forward"), f"{function}_backward": (function, "forward+backward")}
            judged = {op: by for op, by in {**own, **JUDGED_BY}.items() if by[0] == function}
            for op, (_, direction) in judged.items():
                same = [c for c in comparisons if (c.function, c.dtype, c.direction) == (function, dtype, direction)]
                best = fastest(same) if same and op in _library.REFERENCES else None
                if best is not None:
                    table.setdefault(facts["device_name"], {}).setdefault(op, {})[dtype] = best
    return json.dumps(table, indent=1) + "\n"


def main() -> int:
    """Bring the README and `measured.json` up to date; a mistake is one line."""
    try:
        changed = update(README, RESULTS)
        MEASURED.write_text(measured(RESULTS), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{README.name}: {'new tables' if changed else 'up to date'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
