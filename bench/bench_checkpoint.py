"""What a checkpoint costs training: the seconds that `Checkpointer.save` keeps it waiting, on this machine's disk.

A save that writes in the background is given the time to finish before the next, outside of what is timed, as it has it
between two checkpoints of a run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.harness import DEVICE, Bench, Peer
from bench.results import Target
from xray.train import recipes
from xray.train.checkpointer import Checkpointer
from xray.train.distributed import World
from xray_kernels.testing import Inputs, OpSpec, nbytes

SIDE, LAYERS, SMOKE_SIDE = 1024, 26, 8


class Saver:
    """A model with AdamW's state, as large as its weights say, and a run's checkpointer for it."""

    def __init__(self, out: Path, weights: Tensor, asynchronous: bool) -> None:
        self.model = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)).to(weights)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        for parameter, value in zip(self.model.parameters(), weights, strict=True):
            parameter.data.copy_(value)
            parameter.grad = value / 2
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.checkpointer = Checkpointer(
            out, recipes.clip_tiny(), {}, World(rank=0, size=1, device=DEVICE), asynchronous=asynchronous
        )
        self.steps = 0

    def save(self, weights: Tensor) -> None:
        """One checkpoint more."""
        self.steps += 1
        self.checkpointer.save(self.steps, self.model, self.optimizer, loader_state={}, counts={})

    def saved(self, weights: Tensor) -> dict[str, Tensor]:
        """What a save leaves on the disk of the weights and of AdamW's two numbers for each."""
        self.save(weights)
        self.checkpointer.wait()
        folder = self.checkpointer.folder / f"step-{self.steps}"
        stored = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        return {name: stored[name] for name in self.state()}

    def state(self) -> dict[str, Tensor]:
        """The same from memory."""
        found = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            found |= {f"optimizer.{name}.{key}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return found

    @contextlib.contextmanager
    def until_written(self) -> Iterator[None]:
        """What is saved within is on the disk at the end."""
        yield
        self.checkpointer.wait()


def test_save(bench: Bench, tmp_path: Path) -> None:
    side, layers = (SIDE, LAYERS) if bench.full else (SMOKE_SIDE, 2)
    weights = torch.randn(layers, side, side, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    savers = {name: Saver(tmp_path / name, weights, name == "asynchronous") for name in ("synchronous", "asynchronous")}
    inputs: Inputs = {"weights": weights}
    peers = tuple(
        Peer(
            name,
            saver.saved,
            context=saver.until_written,
            ours=True,
            default=name == "asynchronous",
            timed=saver.save,
        )
        for name, saver in savers.items()
    )
    composition = functools.partial(_state, savers["synchronous"])
    size = 3 * nbytes(weights)
    spec = OpSpec(
        "checkpoint", savers["asynchronous"].saved, composition, (), lambda _: (2 * size, 0), lambda _: (0, 0)
    )
    try:
        case = f"{nbytes(weights) / 2**20:.0f} MiB of weights and AdamW's state"
        bench.compare(spec, inputs, peers, case, "save", [Target("synchronous", 10.0)])
    finally:
        for saver in savers.values():
            saver.checkpointer.close()


def _state(saver: Saver, weights: Tensor) -> dict[str, Tensor]:
    return saver.state()
