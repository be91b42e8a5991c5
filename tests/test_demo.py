"""The demo end to end on generated shapes: what it writes, and how it goes on after being interrupted."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from xray import cli, data, demo, train
from xray.curate import demo_set
from xray.evaluate import facts
from xray.train.metrics import Metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quick run; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("demo") / "run"
    demo.run(out, quick=True, progress=False)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Notes (stage, resume) of every stage that is trained."""
    stages: list[tuple[str, str]] = []
    original = train.run

    def noting(recipe: train.Recipe) -> Path:
        stages.append((Path(recipe.out).name, recipe.resume))
        return original(recipe)

    monkeypatch.setattr(train, "run", noting)
    return stages


def metrics_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


def test_metrics_have_every_key(finished: Path) -> None:
    metrics = metrics_of(finished)
    assert {key: metrics["data"][key] for key in ("train", "test", "dropped")} == {
        "train": len(data.Dataset(finished / "data", "train")),
        "test": len(data.Dataset(finished / "data", "test")),
        "dropped": 0,
    }
    for split in ("train", "test"):
        assert metrics["data"][f"{split}_clips"] == len(data.Dataset(finished / "data", split, media="clip"))
    assert [stage["name"] for stage in metrics["stages"]] == ["mae", "tags", "clip"]
    for stage in metrics["stages"]:
        assert stage["steps"] == 6
        assert stage["seconds"] > 0
        lines = [json.loads(line) for line in (finished / stage["name"] / "metrics.jsonl").open()]
        assert stage["final_loss"] == pytest.approx(sum(line["loss"] for line in lines) / 6)
    images = data.Dataset(finished / "data", "test", media="image")
    for result in (metrics, metrics["ablation"]["clip_only"]):
        retrieval = result["retrieval"]
        assert retrieval["candidates"] == len(set(images.column("caption")))
        assert retrieval["chance_r@5"] == 5 / retrieval["candidates"]
        for way in ("text_to_image", "image_to_text"):
            assert 0 <= retrieval[way]["r@1"] <= retrieval[way]["r@5"] <= retrieval[way]["r@10"] <= 1
        assert result["zero_shot"]["chance"] == 1 / result["zero_shot"]["classes"]
        assert 0 <= result["zero_shot"]["top1"] <= 1
    assert metrics["ablation"]["clip_only"]["steps"] == metrics["stages"][2]["steps"]
    clips = data.Dataset(finished / "data", "test", media="clip")
    assert metrics["clip_tags"]["clips"] + metrics["clip_tags"]["without_tags"] == len(clips)
    assert 0 < metrics["clip_tags"]["chance"] < metrics["clip_tags"]["most_frequent"]
    assert metrics["hardware"]["threads"] == torch.get_num_threads()
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["seconds"]["total"] == pytest.approx(
        sum(value for name, value in metrics["seconds"].items() if name != "total")
    )
    assert metrics["command"].endswith("quick=true")


def test_report_shows_the_run(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    for heading in ("Text to image", "Masked autoencoding", "What EViT keeps", "Tags of held-out clips"):
        assert f"<h2>{heading}</h2>" in html
    assert html.count("<svg") == 3
    # 8 queries of 5 results, 6 reconstructions of 3, 7 samples with 4 steps (input and 3 layers), 6 clips.
    assert html.count("<img") == 8 * 5 + 6 * 3 + 7 * 4 + 6
    assert "quick=true" in html
    assert not list(finished.rglob("*.partial"))


def test_a_finished_run_trains_nothing_again(
    copy: Path, trained: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = metrics_of(copy)
    (copy / "metrics.json").unlink()
    (copy / "report.html").unlink()
    page = demo.run(copy, quick=True, progress=False)
    assert trained == []
    assert page == copy / "report.html"
    assert page.is_file()
    after = metrics_of(copy)
    for key in ("data", "stages", "zero_shot", "retrieval", "clip_tags", "ablation"):
        assert after[key] == before[key], "a moved folder, too, gives the same numbers"
    assert after["seconds"]["data"] == before["seconds"]["data"]
    output = capsys.readouterr()
    assert output.err.count("done before") == 4
    assert "text to image R@5" in output.out


def test_an_interrupted_stage_goes_on(
    finished: Path,
    tmp_path: Path,
    trained: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished / "data", out / "data")
    write = Metrics.write

    def interrupting(self: Metrics, step: int, values: Any) -> None:
        write(self, step, values)
        if len(trained) == 2 and step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", interrupting)
        with pytest.raises(KeyboardInterrupt):
            demo.run(out, quick=True, progress=False)
    assert trained == [("mae", ""), ("tags", "")]
    assert not (out / "metrics.json").exists()
    assert f"go on with: xray demo out={out} quick=true" in capsys.readouterr().err
    trained.clear()
    demo.run(out, quick=True, progress=False)
    assert trained == [("tags", "latest"), ("clip", ""), ("clip_only", "")]
    steps = [json.loads(line)["step"] for line in (out / "tags" / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5, 6]
    for stage in ("mae", "tags", "clip", "clip_only"):
        weights, expected = (load_file(run / stage / "model.safetensors") for run in (out, finished))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights), stage


def test_a_changed_recipe_retrains_what_depends_on_it(
    copy: Path, trained: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train.RECIPES["demo_tags"]
    monkeypatch.setitem(train.RECIPES, "demo_tags", lambda: replace(original(), learning_rate=5e-4))
    demo.run(copy, quick=True, progress=False)
    assert trained == [("tags", ""), ("clip", "")]
    trained.clear()
    changed = train.RECIPES["demo_tags"]
    monkeypatch.setitem(train.RECIPES, "demo_tags", lambda: replace(changed(), checkpoint_every=1, log_every=3))
    demo.run(copy, quick=True, progress=False)
    assert trained == []


def test_stages_start_from_each_other_and_the_ablation_from_nothing() -> None:
    chosen = demo.recipes(quick=False, seed=3)
    assert list(chosen) == ["mae", "tags", "clip", "clip_only"]
    assert chosen["clip_only"] == chosen["clip"]
    assert {recipe.seed for recipe in chosen.values()} == {3}
    assert demo.STARTS_FROM == {"mae": "", "tags": "mae", "clip": "tags", "clip_only": ""}


def test_folders_that_cannot_be_used(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(demo.DemoError, match=r"^out is .*file/run, which cannot be written: Not a directory$"):
        demo.run(tmp_path / "file" / "run", quick=True)
    own = tmp_path / "own"
    shutil.copytree(finished / "data", own / "data")
    (own / "mae").mkdir()
    (own / "mae" / "thesis.txt").write_text("years of work")
    with pytest.raises(demo.DemoError, match=r"mae holds something that no demo made"):
        demo.run(own, quick=True, progress=False)
    assert (own / "mae" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(demo.DemoError, match=r"quick=true seed=1 needs"):
        demo.run(own, quick=True, seed=1, progress=False)
    with pytest.raises(data.DataError, match=r"holds another dataset"):
        demo.run(own, progress=False)


def test_sets_that_cannot_be_reached_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, cache: Any, progress: bool) -> Path:
        raise data.SourceUnavailable(f"npm is missing, and {name} needs it")

    monkeypatch.setattr(demo_set, "fetch", unreachable)
    monkeypatch.setattr(demo_set, "GENERATED_FOR_ONE", 40)
    made = demo_set.prepare_demo(tmp_path / "data", tmp_path / "cache", progress=False)
    found = facts.dataset(made.folder, made.missing)
    assert found["train"] + found["test"] == 80
    assert [(source["name"], source["used"]) for source in found["sources"]] == [
        ("generated", True),
        *((name, False) for name in demo_set.SETS),
    ]
    assert "could not be reached" in found["sources"][1]["reason"]


def test_dropped_samples_are_counted_by_reason(tmp_path: Path) -> None:
    source = tmp_path / "source"
    data_set = data.Dataset(data.generated(tmp_path / "set", size=40, clip_share=0), None)
    source.mkdir()
    rows = ["file_name,caption"]
    for position in range(3):
        data_set[position].frames[0].save(source / f"{position}.png")
        rows.append(f"{position}.png,{data_set[position].caption}")
    shutil.copy(source / "0.png", source / "again.png")
    (source / "broken.png").write_bytes(b"no picture")
    rows += ["again.png,the first once more", "broken.png,nothing"]
    (source / "metadata.csv").write_text("\n".join(rows))
    data.pack(source, tmp_path / "out", num_workers=0, progress=False)
    found = facts.dataset(tmp_path / "out")
    assert (found["train"] + found["test"], found["dropped"]) == (3, 2)
    assert found["dropped_by_reason"] == {"exact duplicate": 1, "decode": 1}
    assert [source["used"] for source in found["sources"]] == [True], "only the demo knows of missing sets"


def test_command_line(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", f"out={copy}", "quick=true", "progress=false"]) == 0
    assert str(copy / "report.html") in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", f"out={tmp_path / 'file' / 'run'}", "quick=true"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
