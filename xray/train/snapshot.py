"""The state of a run as flat tensors by name, and back: model, optimizer, loader and random generators.

`take` lists what there is; `targets` makes room for the same in a fresh process, to be loaded into. Nothing here knows
which optimizer it is: whatever an optimizer keeps for a parameter is either a tensor, which becomes one of the
checkpoint's, or a number, which goes into a layout of plain JSON types together with what kind each tensor is of:

    {"state": {parameter: {key: "tensor cpu" | "scalar cpu" | number | None}}, "groups": [{key: number}]}
"""

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xray.train.errors import TrainError

# Of an optimizer's groups, what the recipe decides, which a resumed run may change.
FROM_RECIPE = ("lr", "weight_decay", "betas", "eps", "lr_scale")


class Stored(NamedTuple):
    """A tensor of a checkpoint: the shape of the whole, whatever the shards, and the dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Mismatch(Exception):
    """A checkpoint is not as the model or the optimizer needs it; the message says what is here and what there."""


def take(
    task: nn.Module, optimizer: torch.optim.Optimizer, loader_state: Mapping[int, bytes], rank: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of this process by name, and the optimizer's layout. All processes must call it.

    Shards stay shards, and tensors are the live ones. What each process has of its own (random states, readers) has its
    number in the name. Of an optimizer, a tensor that is no DTensor is taken to be the same in all processes.

    Raises:
        TrainError: the optimizer keeps something that is neither tensor nor number.
    """
    tensors = _model(task)
    layout: dict[str, dict[str, Any]] = {}
    for name, parameter in task.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            entry = value
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = _with_dimension(_storable(value, parameter))
                entry = f"{'tensor' if value.ndim else 'scalar'} {value.device.type}"
            elif value is not None and not isinstance(value, int | float):
                raise TrainError(
                    f"{type(optimizer).__name__} keeps {key} of {name} as a {type(value).__name__}, and only tensors "
                    "and numbers can be saved: choose another optimizer"
                )
            layout.setdefault(name, {})[key] = entry
    tensors |= {f"rng.{rank}.{name}": state for name, state in _random_states().items()}
    for reader, position in loader_state.items():
        tensors[f"loader.{reader}"] = torch.from_numpy(np.frombuffer(position, dtype=np.uint8).copy())
    groups = [{key: value for key, value in group.items() if _moves(key, value)} for group in optimizer.param_groups]
    return tensors, {"state": layout, "groups": groups}


def targets(
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    layout: Mapping[str, Any],
    stored: Mapping[str, Stored],
    rank: int,
) -> dict[str, Tensor]:
    """Tensors to load a checkpoint into, by name; gives the optimizer the state that the checkpoint has.

    Args:
        task, optimizer: as new.
        layout: what `take` returned.
        stored: the checkpoint's tensors.
        rank: this process's; its random states are among the tensors if the checkpoint has some.

    Raises:
        Mismatch: the model or the optimizer's groups are others; the first difference.
    """
    found = model_targets(task, stored)
    parameters = dict(task.named_parameters())
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, entries in layout["state"].items():
        parameter = parameters[name]
        for key, entry in entries.items():
            value, full = entry, f"optimizer.{name}.{key}"
            if isinstance(entry, str):
                if full not in stored:
                    raise _mismatch(full, tuple(parameter.shape), None)
                value = _empty(entry, stored[full], parameter, group_of[parameter])
                found[full] = _with_dimension(value)
            optimizer.state[parameter][key] = value
    _set_groups(optimizer, layout["groups"])
    own = ("loader.", f"rng.{rank}.")
    found |= {name: torch.zeros(s.shape, dtype=s.dtype) for name, s in stored.items() if name.startswith(own)}
    return found


def model_targets(task: nn.Module, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The model's part of `targets`.

    Raises:
        Mismatch: the first parameter that is missing here or there or has another shape.
    """
    found = _model(task)
    for name, tensor in found.items():
        there = stored[name].shape if name in stored else None
        if there != tuple(tensor.shape):
            raise _mismatch(name, tuple(tensor.shape), there)
    if more := sorted(name for name in stored if name.startswith("model.") and name not in found):
        raise _mismatch(more[0], None, stored[more[0]].shape)
    return found


def finish(loaded: Mapping[str, Tensor], rank: int) -> dict[int, bytes]:
    """Set the random states that were loaded; the positions of all readers."""
    _set_random_states({name.removeprefix(f"rng.{rank}."): t for name, t in loaded.items() if name.startswith("rng.")})
    readers = {name: tensor for name, tensor in loaded.items() if name.startswith("loader.")}
    return {int(name.removeprefix("loader.")): tensor.numpy().tobytes() for name, tensor in readers.items()}


def _model(task: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in task.state_dict().items()}


def _mismatch(name: str, here: tuple[int, ...] | None, there: tuple[int, ...] | None) -> Mismatch:
    here_text, there_text = ("none" if shape is None else f"shape {shape}" for shape in (here, there))
    return Mismatch(f"{name} has {here_text} here and {there_text} there")


def _with_dimension(tensor: Tensor) -> Tensor:
    """A 0-D tensor as [1], of the same memory: Distributed Checkpoint's safetensors layout wants a dimension."""
    return tensor.view(1) if tensor.ndim == 0 else tensor


def _storable(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A tensor of the optimizer as the checkpoint takes it: a shard like the parameter's, or the same everywhere."""
    if not isinstance(value, DTensor):
        return value
    is_shard = value.ndim > 0 and value.shape == parameter.shape
    return value if is_shard and not any(place.is_partial() for place in value.placements) else value.full_tensor()


def _empty(entry: str, stored: Stored, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    """Room for a tensor of the optimizer, where the optimizer wants it to be."""
    kind, device = entry.split()
    if kind == "tensor" and stored.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=stored.dtype, requires_grad=False)
    # PyTorch's rule: fused and capturable optimizers count on the parameter's device, whatever the state came from.
    on_cpu = device == "cpu" and not (group.get("fused") or group.get("capturable"))
    shape = stored.shape if kind == "tensor" else ()
    return torch.zeros(shape, dtype=stored.dtype, device="cpu" if on_cpu else parameter.device)


def _moves(key: str, value: Any) -> bool:
    """Whether an entry of an optimizer's group is state, such as `step`, and not a setting."""
    return isinstance(value, int | float) and not isinstance(value, bool) and key not in FROM_RECIPE


def _set_groups(optimizer: torch.optim.Optimizer, numbers: list[dict[str, Any]]) -> None:
    here = len(optimizer.param_groups)
    if any(numbers) and len(numbers) != here:
        raise Mismatch(f"the optimizer has {here} groups of parameters here and {len(numbers)} there")
    for group, entries in zip(optimizer.param_groups, numbers, strict=False):
        group.update(entries)


def _random_states() -> dict[str, Tensor]:
    """The states of Python's, NumPy's and torch's global generators as tensors."""
    _, words, gauss = random.getstate()
    mersenne: dict[str, Any] = np.random.get_state(legacy=False)
    keys, position = mersenne["state"]["key"], mersenne["state"]["pos"]
    states = {
        "python": torch.tensor([*words, gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor(
            [*keys.tolist(), position, mersenne["has_gauss"], mersenne["gauss"]], dtype=torch.float64
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    if "python" in states:
        *words, has_gauss, gauss = states["python"].tolist()
        random.setstate((3, tuple(int(word) for word in words), gauss if has_gauss else None))
    if "numpy" in states:
        *keys, position, has_gauss, cached = states["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
