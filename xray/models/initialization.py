"""Initialisation that depends on a seed and on names alone, so that it is the same however a model is laid out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

Assign = Callable[[nn.Parameter, Tensor], None]
"""Gives a parameter its value: called with the parameter and the whole value, a CPU tensor of the parameter's
(global) shape and dtype, to be copied from and not kept."""


@torch.no_grad()
def copy_whole(parameter: nn.Parameter, value: Tensor) -> None:
    """The ``Assign`` of a model that is not sharded: copy, whatever device the parameter is on.

    Raises:
        ValueError: a parameter on the meta device, which holds nothing.
    """
    if parameter.is_meta:
        raise ValueError(
            "the model's parameters must have memory to be given values, got some on the meta device: "
            "call model.to_empty(device=...) first"
        )
    parameter.copy_(value)


def initialize(model: nn.Module, seed: int, *, assign: Assign | None = None) -> None:
    """Initialise every parameter of a model, built on the meta device or not, in place.

    Each module's own parameters come from its ``reset_parameters``, run on the CPU with a generator that is seeded
    by ``seed`` and by the module's qualified name. So values do not depend on devices, on sharding, on order, or on
    what else the model holds. Only one module's parameters are whole in memory at a time, and the global random
    state is left as it was.

    Args:
        model: any module each of whose parameters belongs to a module with ``reset_parameters``, as torch's own
            layers have it and all of this package's do. Its parameters may be DTensors: shapes are global.
        seed: any integer.
        assign: takes over each parameter's whole value, for instance to keep this process's shard of it; None
            copies it.

    Raises:
        TypeError: a module that holds parameters and cannot initialise them, or holds buffers, by name.
        ValueError: a parameter that has no memory (on the meta device) and no ``assign``.
    """
    assign = copy_whole if assign is None else assign
    modules = [(name, module) for name, module in model.named_modules() if _holds_state(name, module)]
    # Only the CPU's generator is seeded: torch.manual_seed would reach those of accelerators too.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        for name, module in modules:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
            _reset(module, assign)


def _holds_state(name: str, module: nn.Module) -> bool:
    """Whether the module has parameters of its own; TypeError for state that cannot be initialised."""
    label = f"{type(module).__name__} {name!r}"
    if any(buffer is not None for buffer in module._buffers.values()):
        raise TypeError(f"model must hold parameters only to be initialised, got buffers in {label}")
    held = any(parameter is not None for parameter in module._parameters.values())
    if held and not callable(getattr(module, "reset_parameters", None)):
        raise TypeError(f"{label} must have reset_parameters() to initialise the parameters it holds")
    return held


def _reset(module: nn.Module, assign: Assign) -> None:
    """Assign freshly initialised values to the module's own parameters, made in CPU parameters that stand in."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    fresh = {name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for name, p in own.items()}
    module._parameters.update(fresh)
    try:
        module.reset_parameters()  # type: ignore[operator]
    finally:
        module._parameters.update(own)
    for name, parameter in own.items():
        assign(parameter, fresh.pop(name).detach())
