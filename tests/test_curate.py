"""The pipeline as a whole: each step once, whatever stops it, the same bytes on any engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from curate_frames import frame_of
from daft import DataFrame, col
from limits import small_files

from xray.curate import engine, pipeline
from xray.curate.frame import drop, keeping
from xray.curate.settings import Settings
from xray.curate.step import Context, Step
from xray.data.errors import DataError

QUIET = Settings(progress=False)
Run = Callable[[DataFrame | None, Context], DataFrame]


def begin(frame: DataFrame | None, context: Context) -> DataFrame:
    return keeping(frame_of([{"caption": name, "tags": [name]} for name in ("cat", "dog", "emu", "fox")]))


def no_dogs(frame: DataFrame | None, context: Context) -> DataFrame:
    assert frame is not None
    context.facts["dogs"] = frame.where(col("caption").is_in(["dog"])).count_rows()
    return drop(keeping(frame), col("caption").is_in(["dog"]), "no dogs", col("id"))


def finish(frame: DataFrame | None, context: Context) -> DataFrame:
    assert frame is not None
    captions = "".join(context.keep(frame, "again").sort("id").to_pydict()["caption"])
    (context.folder / "shard-00000.tar").write_text(captions)
    (context.folder / "index.parquet").write_text(captions)
    return keeping(frame)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three small steps in place of the real ones; lists the runs of each."""
    runs: list[str] = []

    def noting(name: str, run: Run) -> Run:
        def noted(frame: DataFrame | None, context: Context) -> DataFrame:
            runs.append(name)
            return run(frame, context)

        return noted

    made = (
        Step("read", noting("read", begin), inputs=lambda source, settings: source),
        Step("dogs", noting("dogs", no_dogs), reads=("max_caption",)),
        Step("shards", noting("shards", finish), reads=("seed",)),
    )
    monkeypatch.setattr(pipeline, "STEPS", made)
    monkeypatch.setattr(pipeline.ledger, "write", lambda path, folders: path.write_text("ledger"))
    monkeypatch.setattr(pipeline.card, "write", lambda path, *rest: path.write_text("card"))
    return runs


def test_only_what_has_changed_is_computed_again(steps: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = pipeline.curate("a", out, QUIET)
    assert (done.computed, [step.rows_out for step in done.steps]) == (["read", "dogs", "shards"], [4, 3, 3])
    assert (done.steps[1].rows_in, done.steps[1].reasons, done.steps[1].facts) == (4, {"no dogs": 1}, {"dogs": 1})
    assert (out / "index.parquet").read_text() == (out / "shard-00000.tar").read_text() == "catemufox"
    assert {path.name for path in out.iterdir()} == {
        "steps", "shard-00000.tar", "index.parquet", "ledger.parquet", "card.html",
    }  # fmt: skip

    again = pipeline.curate("a", out, replace(QUIET, num_workers=1))
    assert (again.computed, again.steps) == ([], done.steps)
    before = (out / "index.parquet").stat().st_mtime_ns
    assert pipeline.curate("a", out, replace(QUIET, seed=1)).computed == ["shards"]
    assert (out / "index.parquet").stat().st_mtime_ns > before
    assert pipeline.curate("a", out, replace(QUIET, seed=1, max_caption=5)).computed == ["dogs", "shards"]
    assert len([path for path in (out / "steps").iterdir() if path.is_dir()]) == 3, "steps of other settings are gone"
    assert not list(out.rglob("scratch"))
    assert steps.count("read") == 1


def test_a_step_that_ends_early_is_the_only_one_lost(
    steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(frame: DataFrame | None, context: Context) -> DataFrame:
        assert frame is not None
        context.keep(frame, "half")
        (context.folder / "shard-00000.tar").write_text("half")
        raise KeyboardInterrupt

    whole = pipeline.STEPS
    monkeypatch.setattr(pipeline, "STEPS", (*whole[:2], replace(whole[2], run=fail)))
    with pytest.raises(KeyboardInterrupt):
        pipeline.curate("a", tmp_path / "out", QUIET)
    assert not (tmp_path / "out" / "index.parquet").exists()
    monkeypatch.setattr(pipeline, "STEPS", whole)
    assert pipeline.curate("a", tmp_path / "out", QUIET).computed == ["shards"]
    assert (tmp_path / "out" / "shard-00000.tar").read_text() == "catemufox"

    step = next((tmp_path / "out" / "steps").glob("01-*"))
    (step / "done.json").write_text("{")
    assert pipeline.curate("a", tmp_path / "out", QUIET).computed == ["dogs"]
    (tmp_path / "out" / "index.parquet").unlink()  # stopped while it published
    assert pipeline.curate("a", tmp_path / "out", QUIET).computed == []
    assert (tmp_path / "out" / "index.parquet").read_text() == "catemufox"
    (tmp_path / "out" / "steps" / "published.json").unlink()  # stopped after the index, before the mark
    assert pipeline.curate("a", tmp_path / "out", QUIET).computed == []
    assert (tmp_path / "out" / "index.parquet").read_text() == "catemufox"


def test_inputs_that_change_are_read_again(steps: list[str], tmp_path: Path) -> None:
    (tmp_path / "list").write_text("1")
    read = replace(pipeline.STEPS[0], inputs=lambda source, settings: (tmp_path / "list").read_text())
    pipeline.STEPS = (read, *pipeline.STEPS[1:])  # the fixture puts the steps back
    assert len(pipeline.curate("a", tmp_path / "out", QUIET).computed) == 3
    (tmp_path / "list").write_text("2")
    assert pipeline.curate("a", tmp_path / "out", QUIET).computed == ["read", "dogs", "shards"]


def test_folders_of_others_are_left_alone(steps: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(DataError, match=r"mine holds files that no curation made"):
        pipeline.curate("a", tmp_path / "mine", QUIET)
    pipeline.curate("a", tmp_path / "out", QUIET)
    with pytest.raises(DataError, match=r"holds the curation of a, not of b"):
        pipeline.curate("b", tmp_path / "out", QUIET)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written"):
        pipeline.curate("a", tmp_path / "file" / "out", QUIET)
    (tmp_path / "out" / "steps" / "run.json").write_text("[]")
    with pytest.raises(DataError, match=r"run.json is damaged"):
        pipeline.curate("a", tmp_path / "out", QUIET)


def test_a_folder_in_use_is_refused(steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(frame: DataFrame | None, context: Context) -> DataFrame:
        with pytest.raises(DataError, match=r"in use by another run"):
            pipeline.curate("a", tmp_path / "out", QUIET)
        return begin(frame, context)

    monkeypatch.setattr(pipeline, "STEPS", (Step("read", twice), *pipeline.STEPS[1:]))
    pipeline.curate("a", tmp_path / "out", QUIET)


def test_nothing_left_is_an_error_that_says_why(
    steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_go(frame: DataFrame | None, context: Context) -> DataFrame:
        assert frame is not None
        return drop(keeping(frame), col("id").not_null(), "all go")

    monkeypatch.setattr(pipeline, "STEPS", (pipeline.STEPS[0], Step("dogs", all_go), pipeline.STEPS[2]))
    with pytest.raises(DataError, match=r"nothing of a is left after dogs; dropped: 4 all go"):
        pipeline.curate("a", tmp_path / "out", QUIET)


def test_a_full_disk_is_named(steps: list[str], tmp_path: Path) -> None:
    with small_files(1000), pytest.raises(DataError, match=r"no space is left to write"):
        pipeline.curate("a", tmp_path / "out", QUIET)
    assert pipeline.curate("a", tmp_path / "out", QUIET).computed == ["read", "dogs", "shards"]


def test_a_process_has_one_engine() -> None:
    engine.start("native")
    with pytest.raises(DataError, match=r"engine is 'ray', but this process runs 'native'"):
        engine.start("ray")
    with pytest.raises(DataError, match=r"engine is 'spark'; one of native, ray is needed"):
        engine.start("spark")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"near_bits": 4}, "near_bits is 4; a value from 0 to 3 is needed"),
        ({"test_share": -0.1}, "test_share is -0.1; a value from 0 to 1"),
        ({"balance": "all"}, "balance is 'all'; one of captions, tags, both, none"),
        ({"max_side": 60_000, "max_frames": 2}, "max_side x max_frames is 60000 x 2"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Settings(**settings)
