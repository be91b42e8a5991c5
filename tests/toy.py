"""A task and optimizers small enough to see through, for tests of checkpoints."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """Two layers of awkward sizes, a parameter of one element, and a buffer."""

    seen: Tensor

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, width)
        self.second = nn.Linear(width, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += 1
        return (self.second(self.first(inputs).tanh()) * self.scale).square().mean()


class Odd(torch.optim.Optimizer):
    """An optimizer that keeps something of every kind, and whose steps depend on all of it."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "distance": 1.0, "flag": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["distance"] *= 1.5
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["steps"] = 0
                    state["count"] = torch.tensor(0.0, dtype=torch.float64)
                    state["average"] = torch.zeros_like(parameter)
                    state["coarse"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["factors"] = torch.zeros(2, 3)
                    state["best"] = None
                state["steps"] += 1
                state["count"] += 0.25
                state["factors"] += torch.arange(3) * state["steps"]
                state["average"].mul_(0.5).add_(parameter.grad)
                state["coarse"].add_(parameter.grad)
                state["norm"] = parameter.norm()  # of a shard: a sum that is still to be made over processes
                rate = group["lr"] / group["step"] / group["distance"] / state["steps"]
                rate *= 1 / (1 + state["count"].item() + state["factors"].sum().item() / 10)
                parameter.add_(state["average"] + state["coarse"], alpha=-rate)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda module: torch.optim.AdamW(module.parameters(), lr=0.1),
    "fused adamw": lambda module: torch.optim.AdamW(module.parameters(), lr=0.1, fused=True),
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
    "odd": lambda module: Odd(module.parameters()),
}


def train(task: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Each step has inputs of its own, the same in every process."""
    for step in steps:
        loss = task(torch.sin(torch.arange(12.0).view(4, 3) + step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
