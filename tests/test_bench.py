"""The benchmark harness: parity before timing, turns side by side, result files, and the README's tables."""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness, results, steps, table
from bench.results import GREEN, Comparison, Target, Timing
from xray.train.recipes import clip_tiny
from xray_kernels import _library
from xray_kernels.tag_loss.spec import SPECS as TAG_LOSS
from xray_kernels.testing import Inputs, OpSpec, nbytes
from xray_kernels.token_reorganize.spec import SPECS as REORGANIZE

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def comparison(**changes: Any) -> Comparison:
    """Baseline 4 ms, ours 2 ms, copy 1 ms for a megabyte."""
    usual = Comparison(
        function="double",
        case="1000 x 125",
        dtype="float32",
        direction="forward",
        bytes=1_000_000,
        flops=1000,
        copy_samples=[0.001, 0.001, 0.001],
        matmul_samples=[0.002, 0.002, 0.002],
        matmul_flops=2_000_000,
        others=0.0,
        peers=[
            Timing("plain", GREEN, [0.004, 0.004, 0.005]),
            Timing("xray reference", GREEN, [0.001, 0.002, 0.003], ours=True, default=True),
        ],
        skipped={"cleverlib": "cleverlib is not installed"},
        targets=[Target("plain", 2.0)],
    )
    return replace(usual, **changes)


class Clock:
    """Stands in for pytest-benchmark's fixture: runs the turns and gives each a made-up time."""

    def __init__(self) -> None:
        self.data: list[float] = []
        self.disabled = False
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=self.data))

    def pedantic(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        setup: Callable[[], Any] | None = None,
        teardown: Callable[..., None] | None = None,
        rounds: int = 1,
        warmup_rounds: int = 0,
    ) -> None:
        if setup is None or teardown is None:
            target(*args)
            return
        for turn in range(warmup_rounds + rounds):
            arguments, keywords = setup()
            target(*arguments, **keywords)
            teardown(*arguments, **keywords)
            if turn >= warmup_rounds:
                self.data.append(float(turn))


def double(x: Tensor) -> Tensor:
    return x + x


SPEC = OpSpec(
    name="double",
    function=double,
    composition=lambda x: 2 * x,
    cases=(),
    traffic=lambda inputs: (2 * nbytes(inputs["x"]), 2 * nbytes(inputs["x"])),
    flops=lambda inputs: (inputs["x"].numel(), inputs["x"].numel()),
)


def inputs() -> Inputs:
    return {"x": torch.randn(5, 7, generator=torch.Generator().manual_seed(0))}


def bench_of(found: list[Comparison], full: bool = True) -> harness.Bench:
    return harness.Bench(cast(Any, Clock()), full, found)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ROUNDS", (3, 3))
    monkeypatch.setattr(harness, "MATMUL_SIZE", 8)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("direction", harness.DIRECTIONS)
def test_a_wrong_peer_is_red_and_gets_no_time(full: bool, direction: str, ours: bool) -> None:
    """One of ours fails the benchmark, too."""
    runs = {"right": 0, "wrong": 0}

    @harness.peer("right")
    def right(x: Tensor) -> Tensor:
        runs["right"] += 1
        return 2 * x

    @harness.peer("wrong")
    def wrong(x: Tensor) -> Tensor:
        runs["wrong"] += 1
        return 2 * x + 0.01 * x.roll(1)

    found: list[Comparison] = []
    expected = pytest.raises(AssertionError, match=r"^wrong: parity red, out0: error .* over the bound")
    with expected if ours else contextlib.nullcontext():
        peers = (right, replace(wrong, ours=ours))
        bench_of(found, full).compare(SPEC, inputs(), peers, "5 x 7", direction)
    assert runs["wrong"] == 1 < runs["right"]
    if full:
        verdicts = {peer.name: (peer.parity == GREEN, len(peer.samples)) for peer in found[0].peers}
        assert verdicts == {"right": (True, 3), "wrong": (False, 0)}
    else:
        assert not found


def test_a_wrong_gradient_is_red_in_the_backward_direction_only() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2.01 * grad

    plain = harness.peer("plain")(SPEC.composition)
    wrong = harness.Peer("wrong gradient", lambda x: Wrong.apply(x), ours=True)
    bench_of([]).compare(SPEC, inputs(), (plain, wrong), "5 x 7", "forward")
    with pytest.raises(AssertionError, match="wrong gradient: parity red, grad_x"):
        bench_of([]).compare(SPEC, inputs(), (plain, wrong), "5 x 7", "forward+backward")


def test_peers_take_turns() -> None:
    order: list[str] = []

    def logged(name: str) -> harness.Peer:
        def function(x: Tensor) -> Tensor:
            order.append(name)
            return 2 * x

        return harness.peer(name)(function)

    found: list[Comparison] = []
    bench_of(found).compare(SPEC, inputs(), (logged("a"), logged("b")), "5 x 7", "forward")
    assert order == ["a", "b"] * (len(order) // 2)
    # parity, the round that sets their number, the warm-up, three rounds; after a and b come copy_ and matmul
    assert len(order) == 2 * (1 + 1 + 1 + 3)
    assert [peer.samples for peer in found[0].peers] == [[4, 8, 12], [5, 9, 13]]
    assert found[0].copy_samples == [6, 10, 14]
    assert found[0].matmul_samples == [7, 11, 15]
    assert found[0].matmul_flops == 2 * 8**3
    assert found[0].bytes == 2 * 5 * 7 * 4


def test_long_rounds_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one round takes long, three and no warm-up; where it takes minutes, one."""
    monkeypatch.setattr(harness, "ROUNDS", (7, 40))
    plain = harness.peer("plain")(SPEC.composition)
    for long, very_long, count in ((-1.0, -0.5, 1), (-1.0, math.inf, harness.FEW), (math.inf, math.inf, 40)):
        monkeypatch.setattr(harness, "LONG", long)
        monkeypatch.setattr(harness, "VERY_LONG", very_long)
        found: list[Comparison] = []
        bench_of(found).compare(SPEC, inputs(), (plain,), "5 x 7", "forward")
        assert len(found[0].peers[0].samples) == count


def test_parity_can_be_checked_on_fewer() -> None:
    """The oracle and every peer are compared on `checked`; what is timed is the whole."""
    shapes: list[torch.Size] = []

    def composition(x: Tensor) -> Tensor:
        assert x.shape == (2, 7), "the oracle must not see the large inputs"
        return 2 * x

    @harness.peer("seen")
    def seen(x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return 2 * x

    found: list[Comparison] = []
    spec = replace(SPEC, composition=composition)
    bench_of(found).compare(spec, inputs(), (seen,), "5 x 7", "forward", checked={"x": torch.ones(2, 7)})
    assert shapes[0] == (2, 7)
    assert set(shapes[1:]) == {(5, 7)}
    assert found[0].bytes == 2 * 5 * 7 * 4


def test_the_copy_moves_the_bytes_of_the_op() -> None:
    """Half of them are read and half written."""

    class Copies(TorchDispatchMode):
        moved: ClassVar[list[int]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                self.moved.append(nbytes(*args[:2]))
            return func(*args, **(kwargs or {}))

    copy = harness.copy_of(8000)
    with Copies():
        copy()
    assert Copies.moved == [8000]


def test_bytes_and_flops_of_both_directions_add_up() -> None:
    found: list[Comparison] = []
    plain = harness.peer("plain")(SPEC.composition)
    bench_of(found).compare(SPEC, inputs(), (plain,), "5 x 7", "forward+backward")
    assert (found[0].bytes, found[0].flops) == (4 * 5 * 7 * 4, 2 * 5 * 7)


def test_absent_peers_are_skipped_by_name() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("must not run")

    found: list[Comparison] = []
    plain = harness.peer("plain")(SPEC.composition)
    absent = harness.peer("cleverlib", needs="no_such_package_or_program")(fail)
    bench_of(found).compare(SPEC, inputs(), (plain, absent), "5 x 7", "forward")
    assert found[0].skipped == {"cleverlib": "no_such_package_or_program is not installed"}
    assert [peer.name for peer in found[0].peers] == ["plain"]
    slow = harness.peer("slow", slow=True)(fail)
    bench_of([], full=False).compare(SPEC, inputs(), (plain, slow), "5 x 7", "forward")


def test_ours_are_the_implementations_of_this_machine() -> None:
    """An op with a kernel comes once for each instruction set, the best one as default; a reference comes once."""
    assert [peer.name for peer in harness.ours(TAG_LOSS[0])] == ["xray reference"]
    expected = ["reference", *(f"cpu-{level}" for level in _library.cpu_capabilities())]
    peers = harness.ours(REORGANIZE[0])
    assert [peer.name for peer in peers] == [f"xray {name}" for name in expected]
    assert [peer.default for peer in peers] == [False] * (len(peers) - 1) + [True]
    for level, peer in enumerate(peers[1:]):
        with peer.context():
            in_use = torch.ops.xray_kernels.cpu_capability_set(level)
            assert in_use == level, peer.name


def test_numbers_of_a_row() -> None:
    c = comparison()
    ours = results.row(c, c.peers[1])
    assert ours is not None
    assert (ours.median, ours.ratio, ours.gb_per_s, ours.roofline) == pytest.approx((0.002, 2.0, 0.5, 0.5))
    assert (ours.low, ours.high) == pytest.approx((0.0015, 0.0025))
    once = results.row(c, replace(c.peers[1], samples=[0.003]))
    assert once is not None
    assert (once.low, once.median, once.high) == (0.003, 0.003, 0.003)
    bound_by_arithmetic = replace(c, flops=1_500_000)
    slower = results.row(bound_by_arithmetic, c.peers[1])
    assert slower is not None
    assert slower.roofline == pytest.approx(0.75)


def test_table_of_the_terminal() -> None:
    lines = table.terminal([comparison()]).splitlines()
    assert "double, 1000 x 125, float32, forward; copy 1.0 GB/s, matmul 1 GFLOP/s, others 0.0 cores" in lines
    row = next(line for line in lines if line.startswith("xray reference *"))
    assert row.split() == ["xray", "reference", "*", "2.00", "ms", "1.50", "-", "2.50", "2.00x", "0.50", "50%"]
    assert any(line.split() == ["cleverlib", "skipped:", "cleverlib", "is", "not", "installed"] for line in lines)


def test_targets_are_hit_or_missed_by_the_default() -> None:
    wanted = [Target("plain", 2.0), Target("plain", 2.5), Target(results.COPY, 0.5), Target("absent", 1.0)]
    wanted.append(Target(results.MATMUL, 0.2))
    c = comparison(targets=wanted)
    product = c.flops / statistics.median(c.peers[1].samples) * statistics.median(c.matmul_samples) / c.matmul_flops
    assert [results.reached(c, target) for target in wanted] == [2.0, 2.0, 0.5, None, pytest.approx(product)]
    assert product > 0
    lines = [line.split(maxsplit=1)[1] for line in table.terminal([c]).splitlines() if line.startswith("target")]
    assert lines == [
        "2x plain: 2.00x, hit",
        "2.5x plain: 2.00x, missed",
        "50% of copy: 50%, hit",
        "1x absent: not measured",
        f"20% of matmul: {product:.0%}, {'hit' if product >= 0.2 else 'missed'}",
    ]
    red = replace(c, peers=[c.peers[0], Timing("xray reference", "parity red", [], ours=True, default=True)])
    assert results.reached(red, wanted[0]) is None


@pytest.mark.parametrize("own", [True, False])
def test_a_peer_that_does_another_thing_is_checked_against_its_own_composition(own: bool) -> None:
    def triple(x: Tensor) -> Tensor:
        return 3 * x

    other = harness.Peer("triple", triple, composition=triple if own else None)
    found: list[Comparison] = []
    bench = bench_of(found, full=True)
    if own:
        bench.compare(SPEC, inputs(), (other, harness.Peer("double", SPEC.function)), "5 x 7", "forward")
        assert [peer.parity for peer in found[0].peers] == [GREEN, GREEN]
    else:
        with pytest.raises(AssertionError, match="triple: parity red"):
            bench.compare(SPEC, inputs(), (replace(other, ours=True),), "5 x 7", "forward")


def test_what_is_timed_can_be_more_than_what_is_checked() -> None:
    """A whole training step is timed; parity looks at the loss and the gradients, by their names."""
    runs = {"checked": 0, "timed": 0}

    def peer(factor: float, ours: bool) -> harness.Peer:
        def checked(x: Tensor) -> dict[str, Tensor]:
            runs["checked"] += 1
            return {"loss": x.sum(), "gradient": factor * torch.ones_like(x)}

        def timed(x: Tensor) -> None:
            runs["timed"] += 1

        return harness.Peer("step", checked, ours=ours, timed=timed)

    spec = replace(SPEC, composition=lambda x: {"loss": x.sum(), "gradient": torch.ones_like(x)})
    found: list[Comparison] = []
    bench_of(found).compare(spec, inputs(), (peer(1.0, False),), "5 x 7", harness.STEP, samples=5)
    assert runs == {"checked": 1, "timed": 1 + 1 + 3}
    assert (found[0].direction, found[0].samples) == ("training step", 5)
    with pytest.raises(AssertionError, match="step: parity red, gradient: error"):
        bench_of([]).compare(spec, inputs(), (peer(1.1, True),), "5 x 7", harness.STEP)
    assert runs["timed"] == 5


def test_a_target_can_be_wanted_of_another_than_the_default() -> None:
    faster = Timing("xray keep 0.7", GREEN, [0.001, 0.001, 0.001], ours=True, memory=3 * 2**30)
    c = comparison(targets=[Target("plain", 3.0, "xray keep 0.7"), Target("plain", 3.0, "absent")], samples=8)
    c = replace(c, peers=[*c.peers, faster])
    assert [results.reached(c, target) for target in c.targets] == [4.0, None]
    text = table.terminal([c])
    assert "3x plain by xray keep 0.7: 4.00x, hit" in text
    assert "3x plain by absent: not measured" in text
    line = next(line for line in text.splitlines() if line.startswith("xray keep 0.7"))
    assert line.endswith("8000.0 samples/s, 3.0 GiB")


def test_others_have_their_turns_between_the_steps_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a step and after the next by turns, with that step's batch; nobody's clock runs while another works."""
    events: list[str] = []
    now = [0]
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(seconds: int, event: str = "") -> None:
        now[0] += seconds
        events.extend([event] if event else [])

    def batches() -> Iterator[int]:
        for batch in range(4):
            work(100)
            yield batch

    def prepared(batch: int) -> Callable[[], None]:
        work(1000)
        return lambda: work(2, f"bare {batch}")

    turns = steps.TurnsWithTheLoop(batches(), {"bare": prepared})
    for batch in turns:
        work(1, f"loop {batch}")
    turns.end_step()
    assert events == ["bare 0", "loop 0", "loop 1", "bare 1", "bare 2", "loop 2", "loop 3", "bare 3"]
    assert turns.samples == {"loop": [1] * 4, "bare": [2] * 4}


def test_their_weights_and_gradients_are_ours_under_other_names() -> None:
    """Every parameter has its counterpart, and none is mistaken for another."""
    task = steps.clip_task(replace(clip_tiny(), num_frames=1), 64)
    ours = {name: torch.randn_like(tensor) for name, tensor in task.model.state_dict().items()}
    back = steps._as_ours(steps._as_theirs(ours))
    sums = ("vision.time_embed", "vision.patch_embed.proj.bias")  # both move all positions at once
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        expected = ours["vision.pos_embed"][0].sum(0).expand_as(tensor) if name in sums else tensor
        torch.testing.assert_close(back[name], expected, msg=name)


RED = "parity red, grad_x: error 1 over the bound 0.1"


def test_red_parity_shows_no_number() -> None:
    c = comparison()
    red = Timing("xray reference", RED, [], ours=True, default=True)
    line = next(x for x in table.terminal([replace(c, peers=[c.peers[0], red])]).splitlines() if "*" in x[:20])
    assert line.split(maxsplit=3)[3] == f"not timed: {RED}"
    assert table.markdown_row(replace(c, peers=[c.peers[0], red])).endswith("| parity red | - | - | - |")


def test_a_red_baseline_gives_no_ratio() -> None:
    c = comparison()
    c = replace(c, peers=[Timing("plain", RED, []), c.peers[1]], targets=[])
    text = table.terminal([c])
    assert re.search(r"\dx", text) is None
    assert "2.00 ms" in text
    cells = [cell.strip() for cell in table.markdown_row(c).split("|")]
    assert cells[4] == "parity red"
    assert cells[6:10] == ["reference 2.0 (1.5-2.5) ms", "-", "0.5", "50%"]


def test_result_file_comes_back_as_it_was(tmp_path: Path) -> None:
    c = comparison(direction="forward+backward")
    file = results.write(tmp_path, results.record("double", CPU, [c]))
    assert file == tmp_path / results.device_slug(CPU) / "double.json"
    facts, found = results.read(file)
    assert found == [c]
    assert facts["parity"] == GREEN
    assert (facts["op"], facts["device_type"], facts["torch"]) == ("double", "cpu", torch.__version__)
    for ours in (True, False):
        red = replace(c, peers=[c.peers[0], Timing("wrong", RED, [], ours=ours)])
        assert results.record("double", CPU, [red])["parity"] == ("red" if ours else GREEN)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.pop("torch"),
        lambda content: content["comparisons"][0].pop("bytes"),
        lambda content: content["comparisons"][0]["peers"][0].update(speed=1),
        lambda content: content.update(schema=0),
    ],
    ids=["fact", "comparison", "peer", "schema"],
)
def test_a_result_file_of_another_form_is_refused(tmp_path: Path, spoil: Callable[[Any], object]) -> None:
    content = results.record("double", CPU, [comparison()])
    spoil(content)
    file = results.write(tmp_path, {**content, "device": "somewhere"})
    with pytest.raises(ValueError, match=r"double\.json is not a result file of this project"):
        results.read(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"double\.json is not a result file of this project"):
        results.read(file)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC", "cpu-amd-epyc"),
        ("AMD EPYC 7763 64-Core Processor", "cpu-amd-epyc-7763-64-core"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu-intel-xeon-platinum-8481c"),
        ("", "cpu-unknown"),
    ],
)
def test_device_folders(monkeypatch: pytest.MonkeyPatch, name: str, slug: str) -> None:
    monkeypatch.setattr(results, "device_name", lambda device: name)
    assert results.device_slug(CPU) == f"{slug}-{torch.get_num_threads()}-threads"


def test_work_of_other_processes_is_seen() -> None:
    """All processes took 9 s in 4 s of clock, 5 s of them our own: others had one core."""
    assert results.cores_of_others((10.0, 100.0, 1.0), (14.0, 109.0, 6.0)) == 1.0
    assert results.cores_of_others(None, None) is None
    first = results.processor_seconds()
    if first is not None:
        time.sleep(0.05)
        second = results.processor_seconds()
        assert second is not None
        assert second[0] > first[0]
        assert second[1] >= first[1]
        assert second[2] >= first[2]


def test_readme_is_brought_up_to_date_once(tmp_path: Path) -> None:
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n")
    assert table.update(readme, folder)
    assert "Nothing is measured yet" in readme.read_text()
    results.write(folder, results.record("double", CPU, [comparison(others=0.1), comparison(others=0.3)]))
    assert table.update(readme, folder)
    first = readme.read_text()
    assert not table.update(readme, folder)
    assert readme.read_text() == first
    assert first.startswith("# Title\n\n")
    assert first.endswith(f"{table.END}\n\nafter\n")
    assert "old" not in first
    assert "other processes took up to 0.3 cores meanwhile" in first
    ours = (
        "| `double` | 1000 x 125, float32 | forward | plain 4.0 (4.0-4.5) ms | - | reference 2.0 (1.5-2.5) ms | 2.00x |"
    )
    assert ours in first


@pytest.mark.parametrize(
    "text", ["", 2 * table.BEGIN + table.END, table.BEGIN, table.END + table.BEGIN, 2 * (table.BEGIN + table.END)]
)
def test_a_readme_without_its_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="once each, in this order"):
        table.update(readme, tmp_path)
    assert readme.read_text() == text


def test_committed_results_are_whole_and_the_readme_shows_them(tmp_path: Path) -> None:
    for file in results.RESULTS.glob("*/*.json"):
        facts, found = results.read(file)
        assert (facts["device"], facts["op"]) == (file.parent.name, file.stem)
        assert found
        assert facts["parity"] == GREEN
        assert (ROOT / "bench" / f"bench_{file.stem}.py").exists()
        for c in found:
            for peer in c.peers:
                shown = results.row(c, peer)
                # `copy_` may read every line before it writes it, so what does not can be half as fast again; more than
                # that means that the measurement was disturbed
                assert shown is None or shown.roofline < 1.5, f"{file}: {c.function}, {c.case}, {peer.name}"
                assert (len(peer.samples) == len(c.copy_samples)) == (peer.parity == GREEN), f"{file}: {c.case}"
        assert "/" not in json.dumps({key: value for key, value in facts.items() if key != "device_name"})
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    assert not table.update(readme, results.RESULTS), "run python -m bench.table"


def test_the_flag_lives_beside_the_options_of_pytest_benchmark() -> None:
    words = ["bench/bench_tag_loss.py", "--benchmark", "--benchmark-min-rounds=3", "--collect-only", "-q"]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_tag_loss[forward+backward]" in done.stdout
