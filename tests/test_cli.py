"""The command line: what it prints, what it refuses, and that it starts fast."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xray
from xray import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in an empty folder: its exit status, what it printed, and what it complained of."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        try:
            status = cli.main(words)
        except SystemExit as exit:  # argparse ends --help and --version this way
            status = int(exit.code or 0)
        printed, complained = capfd.readouterr()
        return status, printed, complained

    return call


def refused(result: tuple[int, str, str]) -> str:
    """The one line of a refusal."""
    status, printed, complained = result
    assert status == 2
    assert printed == ""
    assert complained.startswith("error: ")
    assert complained.count("\n") == 1
    return complained.strip()


def test_help_names_the_commands_without_loading_torch() -> None:
    script = (
        "import sys; from xray import cli; status = cli.main(['train', '--list']); "
        "sys.exit(status or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(xray.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "clip_2b" in done.stdout


def test_help_and_version(run: Run) -> None:
    for words in ((), ("--help",)):
        status, printed, _ = run(*words)
        assert status == 0
        for command in ("demo", "data", "curate", "train", "export", "eval"):
            assert f"\n    {command} " in printed
    assert run("--version")[1].strip() == f"xray {xray.__version__}"
    assert "fetch" in run("data")[1]
    assert run("train")[1] == run("train", "--list")[1]


def test_list_is_aligned(run: Run) -> None:
    lines = run("train", "--list")[1].splitlines()
    column = lines[0].index("model")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    assert len(lines) == 19


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian clip_tiny", "error: there is no command 'trian'; did you mean train?"),
        ("xyz", "error: there is no command 'xyz'; the commands are demo, data, curate, train, export, eval"),
        ("train clip_tny", "error: there is no recipe 'clip_tny'; did you mean clip_tiny?"),
        ("train zzz", "error: there is no recipe 'zzz': see `xray train --list`"),
        ("train clip_tiny stesp=3", "error: a recipe has no key 'stesp'; did you mean steps?"),
        ("train clip_tiny steps=x", "error: steps is 'x' and must be a whole number"),
        ("train clip_tiny steps=0", "error: steps is 0 and must be at least 1"),
        ("train clip_tiny steps", "error: 'steps' is not a setting: write key=value, such as steps=100"),
        ("train clip_tiny --fast", "error: '--fast' is not understood here; see `xray train --help`"),
        ("train clip_tiny resume=latest", "error: resume is latest and runs/clip_tiny holds no run"),
        ("train clip_tiny init=nothing", "error: init is nothing, and there is no file nothing"),
        ("train clip_tiny data=nothing", "error: nothing"),
        ("eval", "error: the following arguments are required: CHECKPOINT; see `xray eval --help`"),
        ("eval nothing", "error: the checkpoint nothing does not exist"),
        ("eval nothing data=other", "error: checkpoint nothing does not exist"),
        ("eval x data=y batchsize=3", "error: there is no setting 'batchsize'; did you mean batch_size?"),
        ("eval x data=y batch_size=a", "error: batch_size is 'a' and must be a whole number"),
        ("eval x data=y progress=perhaps", "error: progress is 'perhaps' and must be true or false"),
        ("data fetch", "error: fetch needs one or more names: "),
        ("data fetch openclipat", "error: the source 'openclipat' is unknown; did you mean 'openclipart'?"),
        ("data fetch a cash=b", "error: there is no setting 'cash'; did you mean cache?"),
        ("data pack nothing out", "error: nothing"),
        ("data pack nothing", "error: the following arguments are required: OUT"),
        ("data pack nothing out facts=none", "error: there is no setting 'facts'; the settings are "),
        ("data generate out siz=4", "error: there is no setting 'siz'; did you mean size?"),
        ("data generate out size=0", "error: size is 0"),
        ("curate x", "error: curate needs SOURCE and OUT; see `xray curate --help`"),
        ("curate x out near_bit=1", "error: there is no setting 'near_bit'; did you mean near_bits?"),
        ("curate x out near_bits=4", "error: near_bits is 4; a value from 0 to 3 is needed"),
        ("curate x out seed=a", "error: seed is 'a' and must be a whole number"),
        ("curate x out balance=all", "error: balance is 'all'; one of captions, tags, both, none is needed"),
        ("curate x out y", "error: 'y' is not a setting: write key=value"),
        ("curate x out --fast", "error: '--fast' is not understood here; see `xray curate --help`"),
        ("curate explain", "error: explain needs an id and the folder of a curation: xray curate explain ID OUT"),
        ("curate explain 001", "error: explain needs an id and the folder of a curation: "),
        ("curate explain 001 seed=1", "error: explain needs an id and the folder of a curation: "),
        ("curate explain 001 nothing", "error: nothing holds no curation; name a folder that `xray curate` made"),
        ("demo seet=1", "error: there is no setting 'seet'; did you mean seed?"),
    ],
)
def test_mistakes_get_one_line(run: Run, words: str, message: str) -> None:
    assert refused(run(*words.split())).startswith(message)


def test_unwritable_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused(run("train", "mae_tiny", "out=file/run", "progress=false"))
    assert line == "error: out is file/run, which cannot be written: Not a directory"


def test_traceback_on_request(run: Run) -> None:
    with pytest.raises(ValueError, match="no recipe"):
        run("train", "clip_tny", "--traceback")


def test_show_prints_settings_that_can_be_given_again(run: Run) -> None:
    status, printed, _ = run("train", "clip_tiny", "--show", "steps=7", "compile=true", "betas=0.5,0.6")
    assert status == 0
    settings = printed.split("\n")
    assert {"steps=7", "compile=true", "betas=0.5,0.6", "task=clip"} <= set(settings)
    again = [line for line in settings if line and not line.startswith(("name=", "task="))]
    assert run("train", "clip_tiny", *again, "--show")[1] == printed


def test_train_then_evaluate(run: Run, tmp_path: Path) -> None:
    assert run("data", "generate", "shapes", "size=80", "seed=2")[:2] == (0, "shapes\n")
    quick = ["data=shapes", "steps=2", "batch_size=8", "tensorboard=false"]
    status, printed, complained = run("train", "clip_tiny", "out=run", *quick)
    assert (status, printed) == (0, "run/model.safetensors\n")
    assert complained.startswith("clip_tiny: 0.")
    assert " steps of 8, float32 on cpu\n" in complained
    assert "clip_tiny 2/2: loss " in complained
    assert refused(run("train", "clip_tiny", "out=run", *quick)).startswith("error: run holds an earlier run")

    status, printed, _ = run("eval", "run", "json=result.json", "progress=false", "split=train")
    assert status == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kind"] == "clip"
    shown = " ".join(printed.split())
    assert f"r@5 {result['retrieval']['text_to_image']['r@5']:.4g}" in shown
    assert run("eval", "run/model.safetensors", "data=shapes", "progress=false", "split=train")[1] == printed

    # Where the run made its own data, they are found without being named.
    run("train", "mae_tiny", "out=own", "data_size=40", "steps=1", "batch_size=8", "tensorboard=false")
    status, printed, _ = run("eval", "own", "progress=false")
    assert status == 0
    assert "reconstruction" in printed
    (tmp_path / "own" / "model.safetensors").write_bytes(b"\x80\x04nonsense")
    assert "own/model.safetensors" in refused(run("eval", "own"))


def test_numbers_are_shown_aligned() -> None:
    nested: dict[str, Any] = {"kind": "clip", "retrieval": {"r@1": 0.123456, "candidates": 40}, "names": ["a", "b"]}
    assert cli.result_table(nested).splitlines() == [
        "kind   clip",
        "names  2 entries",
        "retrieval",
        "  r@1         0.1235",
        "  candidates  40",
    ]


def test_demo_gets_its_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from xray import demo

    calls: list[Any] = []

    def fake(out: Path, *, seed: int = 0, quick: bool = False, cache: str | Path | None = None) -> None:
        calls.append((out, seed, quick, cache))

    monkeypatch.setattr(demo, "run", fake)
    assert run("demo", "seed=3", "quick=yes", "cache=there")[0] == 0
    assert run("demo", "out=elsewhere", "cache=none")[0] == 0
    assert calls == [(Path("runs/demo"), 3, True, Path("there")), (Path("elsewhere"), 0, False, None)]


def test_ctrl_c_ends_quietly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from xray import demo

    def interrupted(out: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert run("demo") == (130, "", "interrupted\n")


def test_sources_that_are_missing_are_named(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from xray import data

    def fake(name: str, cache: str | Path | None = None, progress: bool = True) -> Path:
        if name == "emojibase":
            raise data.SourceUnavailable("npm is not installed")
        return tmp_path / name

    monkeypatch.setattr(data, "fetch", fake)
    status, printed, complained = run("data", "fetch", "emojibase", "openclipart")
    assert status == 2
    assert printed == f"openclipart: {tmp_path / 'openclipart'}\n"
    assert complained == "emojibase: npm is not installed\n"


def test_curate_lists_its_steps_and_settings(run: Run) -> None:
    pytest.importorskip("daft")
    from xray.curate import STEPS

    lines = run("curate", "--steps")[1].splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == [step.name for step in STEPS]
    assert all(line[18] != " " and len(line) <= 100 for line in lines)
    printed = run("curate", "--show", "near_bits=1", "columns=caption=text,url=link", "progress=no")[1]
    assert {"near_bits=1", "columns=caption=text,url=link", "progress=false"} <= set(printed.splitlines())
    assert run("curate", "source", "out", "--show", *printed.splitlines())[1] == printed


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps of a curation that only note that they ran."""
    from curate_finished import replace_steps

    return replace_steps(monkeypatch)


def test_curate_prints_what_every_step_did(run: Run, steps: list[str], tmp_path: Path) -> None:
    status, printed, _ = run("curate", "anything", "out", "seed=3")
    lines = printed.splitlines()
    assert status == 0
    assert lines[0].split() == ["step", "in", "out", "seconds", "dropped"]
    assert lines[1].split()[:3] == ["read", "12", "12"]
    assert lines[-3] == "12 rows: 7 kept, 2 of them more than once; 5 dropped"
    assert lines[-2:] == [str(tmp_path / "out" / name) for name in ("index.parquet", "card.html")]
    assert all(Path(line).is_file() for line in lines[-2:])
    assert len(steps) == 14
    assert "(seconds in brackets: computed before)" in run("curate", "anything", "out", "seed=3")[1]
    assert len(steps) == 14, "what is done is not done again"

    status, printed, _ = run("curate", "explain", "009", "out")
    assert (status, printed.splitlines()[0]) == (0, "009")
    assert "left: the same pixels as another: 003, which stays" in printed
    refusal = refused(run("curate", "explain", "09", "out"))
    assert refusal == "error: no sample of out has the id '09'; did you mean 009?"


def test_a_source_may_be_called_explain(run: Run, steps: list[str], tmp_path: Path) -> None:
    (tmp_path / "explain").write_text("")
    assert run("curate", "explain", "out")[0] == 0
    assert run("curate", "explain", "other", "seed=2")[0] == 0
    assert len(steps) == 28
    assert run("curate", "explain", "001", "out")[1].startswith("001\n"), "an id and a folder: a story, none the less"
    (tmp_path / "a=b").symlink_to(tmp_path / "out")
    assert run("curate", "explain", "001", "a=b")[1].startswith("001\n")


def test_a_curation_that_is_interrupted_goes_on(run: Run, steps: list[str]) -> None:
    steps.append("stop at balance")
    assert run("curate", "anything", "out", "progress=no") == (130, "", "interrupted\n")
    before = len(steps)
    steps.remove("stop at balance")
    assert run("curate", "anything", "out", "progress=no")[0] == 0
    assert steps[before - 1 :] == ["balance", "split", "shards"]
