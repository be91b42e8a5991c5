"""What happened to each sample: the ledger of all that left or was copied, the table of the steps."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from daft import DataFrame, col, lit
from daft.functions import coalesce, concat

from xray.curate.frame import TEXT
from xray.curate.step import ROWS, Finished, load, step_folders, stored
from xray.data.errors import DataError
from xray.data.shards import COPIED, LEDGER, ledger_schema

SCHEMA = ledger_schema().append(pa.field("detail", pa.string()))
ROW_GROUP = 2**16
WIDTH = 100  # columns of a terminal


@dataclass(frozen=True)
class Account:
    """What became of the source's rows.

    Attributes:
        rows: of the source.
        kept: samples that reached the shards.
        dropped: samples that the ledger gives a reason for.
        copied: kept samples that are drawn more than once.
    """

    rows: int
    kept: int
    dropped: int
    copied: int

    def __str__(self) -> str:
        copied = f", {self.copied:,} of them more than once" if self.copied else ""
        return f"{self.rows:,} rows: {self.kept:,} kept{copied}; {self.dropped:,} dropped"


def write(path: Path, folders: Mapping[str, Path]) -> None:
    """Write the ledger: a row for every dropped or copied sample, by step, then by id.

    The columns are id, step, reason and detail (null where there is none to tell), all text. The same samples
    give the same bytes.

    Args:
        path: of the Parquet file.
        folders: of the finished steps, by name and in order.
    """
    draft = path.with_name(f".{path.name}")
    with pq.ParquetWriter(draft, SCHEMA) as writer:
        for part in _groups(_noted(folders)):
            writer.write_table(part)
    os.replace(draft, path)


def _noted(folders: Mapping[str, Path]) -> Iterator[pa.Table]:
    """The rows of the ledger, in order, in tables of any size."""
    frames = {name: stored(folder / ROWS) for name, folder in folders.items()}
    counting = [name for name, frame in frames.items() if "copies" in frame.column_names]
    for name, frame in frames.items():
        left = frame.where(col("reason").not_null()).select("id", "reason", "detail")
        if name in counting[:1]:  # later steps pass the copies on, and may take some back
            left = left.concat(_copied(frame, frames[counting[-1]]))
        left = left.select(col("id"), lit(name).alias("step"), col("reason"), col("detail"))
        for batch in left.sort(["id", "reason", "detail"]).to_arrow_iter():
            yield pa.Table.from_batches([batch]).cast(SCHEMA)


def _copied(frame: DataFrame, last: DataFrame) -> DataFrame:
    """The samples that are drawn more than once in the end, with what the step that drew them says of it."""
    final = last.where(col("reason").is_null() & (col("copies") > lit(1))).select("id", col("copies").alias("final"))
    why = coalesce(col("detail"), concat(col("final").cast(TEXT), lit(" copies")))
    return frame.join(final, on="id").select("id", lit(COPIED).alias("reason"), why.alias("detail"))


def _groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of `ROW_GROUP` rows, so that the file does not depend on the engine's batches."""
    waiting = SCHEMA.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while waiting.num_rows >= ROW_GROUP:
            yield waiting.slice(0, ROW_GROUP).combine_chunks()
            waiting = waiting.slice(ROW_GROUP)
    if waiting.num_rows:
        yield waiting.combine_chunks()


def account(out: str | Path) -> Account:
    """What became of every row of the source, by the published ledger.

    Args:
        out: the folder of a finished curation.

    Raises:
        DataError: `out` holds none, or its ledger is not that of its steps.
    """
    finished = [load(folder) for folder in step_folders(out).values()]
    path = Path(out) / LEDGER
    try:
        reasons = pq.read_table(path, columns=["reason"])["reason"]
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read ({error}); finish the curation of {out} first") from error
    copied = pc.sum(pc.equal(reasons, COPIED)).as_py() or 0
    result = Account(finished[0].rows_in, finished[-1].rows_out, len(reasons) - copied, copied)
    if result.rows != result.kept + result.dropped:
        raise DataError(f"{path} does not account for every row ({result}); remove {out} and curate anew")
    return result


def table(steps: Sequence[Finished], computed: Collection[str]) -> str:
    """The steps as aligned text, a line for each and one more for each further reason.

    Args:
        steps: in order.
        computed: names of those that were computed now; the others' seconds are in brackets.
    """
    rows: list[tuple[str, ...]] = [("step", "in", "out", "seconds", "dropped")]
    for done in steps:
        seconds = f"{done.seconds:.1f} " if done.name in computed else f"({done.seconds:.1f})"
        reasons = [f"{count:,} {reason}" for reason, count in done.reasons.items()]
        rows.append((done.name, f"{done.rows_in:,}", f"{done.rows_out:,}", seconds, reasons[0] if reasons else ""))
        rows += [("", "", "", "", reason) for reason in reasons[1:]]
    seconds = f"{sum(done.seconds for done in steps if done.name in computed):.1f} "
    rows.append(("in all", f"{steps[0].rows_in:,}", f"{steps[-1].rows_out:,}", seconds, ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, *numbers, reason in rows:
        cells = [name.ljust(widths[0]), *(n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True))]
        start = "  ".join(cells) + "  "
        lines += textwrap.wrap(
            reason, WIDTH, initial_indent=start, subsequent_indent=" " * (len(start) + 2), break_long_words=False
        ) or [start]
    if any(done.name not in computed for done in steps):
        lines.append("(seconds in brackets: computed before)")
    return "\n".join(line.rstrip() for line in lines)
