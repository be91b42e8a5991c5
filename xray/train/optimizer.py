"""The optimizer of a run: which parameters decay, how fast each layer learns, and AdamW, Lion or LAMB over them."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xray.models import VisionTransformer
from xray.train.distributed import whole
from xray.train.errors import TrainError
from xray.train.recipes import Recipe
from xray.train.schedule import set_learning_rate


def build(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over `module`'s parameters, sharded or not.

    Raises:
        TrainError: `optimizer` is lion and lion-pytorch is not installed.
    """
    groups = parameter_groups(module, recipe.weight_decay, recipe.layer_decay)
    if recipe.optimizer == "lion":
        optimizer = _lion(groups, recipe)
    elif recipe.optimizer == "lamb":
        optimizer = _lamb(groups, recipe)
    else:
        optimizer = torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.epsilon, fused=True)
    set_learning_rate(optimizer, recipe.learning_rate)
    return optimizer


def parameter_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """`module`'s parameters in groups that share `weight_decay` and `lr_scale`, the part of the learning rate they get.

    Only the weights of linear and convolution layers decay. Norms, biases, embeddings, class and mask tokens and
    scales do not: pulling them to zero teaches nothing.

    With `layer_decay` d and an image encoder of L blocks, block i from 0 learns at d^(L - i) of the rate, what comes
    before the blocks at d^(L + 1), and all else (the final norm, heads, decoder, text encoder) at the whole rate, as
    when BEiT and MAE are fine-tuned (Bao et al., arXiv 2106.08254; He et al., CVPR 2022). The groups come in the
    order of their first parameter; meta tensors and DTensors will do.
    """
    scales = _layer_scales(module, layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            decays = name == "weight" and isinstance(layer, nn.Linear | nn.Conv2d)
            members = groups.setdefault((scales.get(parameter, 1.0), decays), [])
            members.append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for (scale, decays), members in groups.items()
    ]


def _layer_scales(module: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """The part of the learning rate that the image encoder's parameters get, where it is not the whole."""
    scales: dict[nn.Parameter, float] = {}
    for encoder in module.modules():
        if isinstance(encoder, VisionTransformer):
            depth = len(encoder.blocks)
            scales |= dict.fromkeys(encoder.parameters(), layer_decay ** (depth + 1))
            for index, block in enumerate(encoder.blocks):
                scales |= dict.fromkeys(block.parameters(), layer_decay ** (depth - index))
            scales |= dict.fromkeys(encoder.norm.parameters(), 1.0)
    return scales


def _lion(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """Lion (Chen et al., arXiv 2302.06675). It works element by element, so shards are stepped like whole tensors."""
    try:
        from lion_pytorch.foreach import Lion
    except ImportError as error:
        raise TrainError("optimizer is lion, which needs the package lion-pytorch: pip install lion-pytorch") from error
    return Lion(groups, lr=1.0, betas=recipe.betas)


def _lamb(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """NVIDIA apex's fused LAMB where it can work, on whole parameters on a GPU, otherwise ours; both compute the same.

    apex takes the norms of the memory it is given, which of a shard would be the shard's.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = _apex_lamb()
    if fused is not None and all(p.is_cuda and not isinstance(p, DTensor) for p in parameters):
        # The loop clips gradients as the recipe says; apex would clip them to 1 besides.
        no_limit = torch.finfo(torch.float32).max
        return fused(groups, betas=recipe.betas, eps=recipe.epsilon, max_grad_norm=no_limit)
    return Lamb(groups, betas=recipe.betas, eps=recipe.epsilon)


def _apex_lamb() -> Callable[..., torch.optim.Optimizer] | None:
    """NVIDIA apex's `FusedLAMB`, or None where apex is absent, built without its kernels, or PyPI's unrelated apex."""
    spec = importlib.util.find_spec("apex")  # finds it without importing it
    folders = (spec.submodule_search_locations if spec else None) or []
    if not any((Path(folder) / "optimizers" / "fused_lamb.py").is_file() for folder in folders):
        return None
    try:
        importlib.import_module("amp_C")
        return importlib.import_module("apex.optimizers").FusedLAMB
    except ImportError:
        return None


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., arXiv 1904.00962, algorithm 2): Adam's step, its length set by the parameter's norm.

    With u = m / (sqrt(v) + eps) + weight_decay * w, of Adam's bias-corrected means, w -= lr * |w| / |u| * u. The trust
    ratio |w| / |u| is 1 where either norm is 0, and for groups without weight decay, as in NVIDIA apex. Norms are
    those of whole parameters: of DTensors a group's norms are added up over the shards in one all-reduce.

    Args:
        params: parameters, or groups of them with their own `lr`, `betas`, `eps` or `weight_decay`.
        lr: learning rate.
        betas: decay rates of the means of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled, in u.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from the parameters' gradients; parameters without one stay. `closure` may compute them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step(group, parameters)
        return loss

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state(parameter) for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)

        steps = [int(state["step"].add_(1)) for state in states]  # on the CPU, so the device is not waited for
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(divisors, group["eps"])
        updates = list(torch._foreach_div(means, divisors))
        torch._foreach_div_(updates, [1 - beta1**step for step in steps])
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, _trust_ratios(parameters, updates))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def _trust_ratios(parameters: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    """|parameter| / |update| of each pair, 1 where either is 0; scalars that every process has."""
    norms = whole(torch.stack(torch._foreach_norm([*parameters, *updates])))
    lengths, update_lengths = norms.chunk(2)
    return list(torch.where((lengths > 0) & (update_lengths > 0), lengths / update_lengths, 1.0))
