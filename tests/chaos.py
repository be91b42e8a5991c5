"""Kill training at random moments, go on, and compare with a run that nobody disturbed.

    python tests/chaos.py [KILLS] [SEED]     # or: make chaos

Every campaign trains one recipe to its end, once undisturbed and once with SIGKILL at random moments: while it starts,
between steps, while a checkpoint is being written. Afterwards the final parameters and the loss of every step must be
those of the undisturbed run, and each start must have gone on from the newest checkpoint that was whole when the kill
came, so that nothing is lost but the steps since.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from xray import data

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0  # seconds for one start to get somewhere
COMMON = "checkpoint_every=4 keep_checkpoints=3 batch_size=16 keep_rate_warmup=30 tensorboard=false"


@dataclass(frozen=True)
class Campaign:
    """What is trained and how often it is killed.

    Attributes:
        name: for the report.
        words: the recipe's name and settings.
        ranks: processes; more than one are restarted by torchrun's agent when one of them is killed.
        kills: how often.
        steps: of the whole run.
        tolerance: largest relative difference of a final parameter; 0 asks for the same bits.
    """

    name: str
    words: str
    ranks: int
    kills: int
    steps: int
    tolerance: float = 0.0


@dataclass
class Report:
    """What happened: for each kill the steps that were done and the checkpoint that was there, and what differs."""

    kills: list[tuple[int, int]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    seconds: float = 0.0


def campaigns(kills: int, steps: int = 60) -> list[Campaign]:
    """The three ways of training that differ in what a kill can break, `kills` in all."""
    share = [kills - 2 * (kills // 3), kills // 3, kills // 3]
    stream = "stream=true readers=2 num_workers=2 shuffle_buffer=40"
    return [
        Campaign("one process", f"tags_tiny {COMMON}", 1, share[0], steps),
        Campaign("a stream, two workers", f"clip_tiny {COMMON} {stream}", 1, share[1], steps),
        Campaign("two processes, one killed", f"clip_tiny {COMMON}", 2, share[2], steps, 1e-6),
    ]


def run(campaign: Campaign, folder: Path, shapes: Path, chance: random.Random) -> Report:
    """One campaign in an empty folder."""
    report, began = Report(), time.monotonic()
    once = _Training(campaign, folder / "once", shapes)
    once.start()
    once.finish()
    victim = _Training(campaign, folder / "often", shapes)
    victim.start()
    for _ in range(campaign.kills):
        victim.wait_for(victim.newest() + chance.randint(0, 9), chance)
        report.kills.append(victim.kill(chance))
        report.differences += victim.goes_on()
    victim.finish()
    report.differences += _differences(once.out, victim.out, campaign.tolerance)
    report.seconds = time.monotonic() - began
    return report


class _Training:
    """A training run that is started, killed and started again, as a scheduler or torchrun's agent does."""

    def __init__(self, campaign: Campaign, out: Path, shapes: Path) -> None:
        self.campaign, self.out, self.log = campaign, out, out.with_suffix(".log")
        settings = [f"steps={campaign.steps}", f"out={out}", f"data={shapes}", "resume=auto"]
        self.command = [*campaign.words.split(), *settings]
        self.process: subprocess.Popen[bytes]
        self.starts = 0

    def start(self) -> None:
        """Start it, or start it again."""
        launcher = ["-m", "xray.train"]
        if self.campaign.ranks > 1:
            agent = f"--standalone --nproc-per-node={self.campaign.ranks} --max-restarts={self.campaign.kills}"
            launcher = ["-m", "torch.distributed.run", *agent.split(), "--monitor-interval=0.1", *launcher]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *self.command],
                env=environment,
                stderr=log,
                stdout=log,
                start_new_session=True,
            )
        self.starts += 1

    def steps(self) -> int:
        """Steps that metrics.jsonl has."""
        try:
            return (self.out / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def newest(self) -> int:
        """The step of the newest whole checkpoint, 0 if there is none."""
        names = (path.name for path in (self.out / "checkpoints").glob("step-*"))
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    def wait_for(self, step: int, chance: random.Random) -> None:
        """Wait until so many steps are done, or for one start in five only a moment, and then a little more."""
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0.2, 3.0))
            return
        self._wait(lambda: self.steps() >= min(step, self.campaign.steps - 2), f"step {step}")
        time.sleep(chance.uniform(0.0, 0.05))

    def kill(self, chance: random.Random) -> tuple[int, int]:
        """SIGKILL: the process and its workers, or one of several processes. The steps done, and the checkpoint."""
        if self.campaign.ranks == 1:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            found = self.steps(), self.newest()
            self.start()
            return found
        ranks = self._ranks()
        os.kill(chance.choice(ranks), signal.SIGKILL)
        # The agent ends the others; what they still publish until then counts.
        self._wait(lambda: not set(ranks) & set(self._ranks()), "the end of the processes")
        self.starts += 1
        return self.steps(), self.newest()

    def goes_on(self) -> list[str]:
        """Wait for the next start to say where it goes on; what is wrong with that."""
        newest = self.newest()
        self._wait(lambda: self._headers() >= self.starts, "the next start")
        header = [line for line in self.log.read_text().splitlines() if " parameters, " in line][-1]
        found = re.search(r"resumed from .*step-(\d+)", header)
        resumed = int(found.group(1)) if found else 0
        return [] if resumed == newest else [f"went on from step {resumed}, and step {newest} was there"]

    def finish(self) -> None:
        """Wait for the end."""
        status = self.process.wait(timeout=PATIENCE * 2)
        if status != 0:
            raise AssertionError(f"{self.campaign.name}: ended with {status}: {self._tail()}")

    def _headers(self) -> int:
        return self.log.read_text().count(" parameters, ")

    def _ranks(self) -> list[int]:
        """Process ids of the ranks: the agent's children."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(word) for word in listed.split()]

    def _wait(self, condition: object, what: str) -> None:
        assert callable(condition)
        deadline = time.monotonic() + PATIENCE
        while not condition():
            ended = self.process.poll()
            if ended == 0:
                return
            if ended is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.campaign.name}: waited for {what}: {self._tail()}")
            time.sleep(0.005)

    def _tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-15:])


def _differences(once: Path, often: Path, tolerance: float) -> list[str]:
    """Final parameters and losses of all steps that are not the same."""
    wrong = []
    first, second = load_file(once / "model.safetensors"), load_file(often / "model.safetensors")
    for name, tensor in first.items():
        difference = float((tensor - second[name]).abs().max() / tensor.abs().max().clamp(min=1e-30))
        if difference > tolerance:
            wrong.append(f"{name} differs by {difference:.1e}")
    losses = [[json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()] for out in (once, often)]
    if len(losses[0]) != len(losses[1]):
        wrong.append(f"{len(losses[0])} steps and {len(losses[1])}")
    far = [step for step, (a, b) in enumerate(zip(*losses, strict=False), 1) if abs(a - b) > tolerance * abs(a)]
    return wrong + ([f"the loss of step {far[0]} and {len(far) - 1} others differs"] if far else [])


def main() -> int:
    """Run all campaigns and print a table; 1 if anything differs."""
    kills, seed = (int(word) for word in [*sys.argv[1:], *("24", "0")[len(sys.argv) - 1 :]])
    chance, failed = random.Random(seed), False
    with tempfile.TemporaryDirectory() as temporary:
        shapes = data.generated(Path(temporary) / "shapes", 240, image_size=32, num_frames=4, shard_bytes=2**17)
        for number, campaign in enumerate(campaigns(kills)):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            report = run(campaign, folder, shapes, chance)
            lost = [done - saved for done, saved in report.kills]
            print(f"{campaign.name}: {len(report.kills)} kills in {report.seconds:.0f} s")
            print("  at steps  ", " ".join(str(done) for done, _ in report.kills))
            print("  steps lost", " ".join(map(str, lost)), f"(at most {max(lost, default=0)})")
            for difference in report.differences or ["equal to the undisturbed run"]:
                print(f"  {difference}", flush=True)
            failed |= bool(report.differences)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
