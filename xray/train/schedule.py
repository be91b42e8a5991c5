"""The optimizer, and what changes along a run: learning rate and keep rate, as pure functions of the step."""

import math

import torch
from torch import nn

from xray.train.recipes import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up to the peak, then a cosine down to zero."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def keep_rate(recipe: Recipe, step: int) -> float:
    """EViT's keep rate at step `step`, counted from 0.

    It falls from 1 to `recipe.keep_rate` along a cosine over `keep_rate_warmup` steps (EViT, ICLR 2022,
    section 4.1), but only through the values of `keep_rates`.
    """
    if step >= recipe.keep_rate_warmup:
        return recipe.keep_rate
    fallen = 0.5 * (1 - math.cos(math.pi * step / recipe.keep_rate_warmup))
    return keep_rates(recipe)[math.floor(fallen * recipe.keep_rate_buckets)]


def keep_rates(recipe: Recipe) -> list[float]:
    """All values that the keep rate takes along a run, evenly spaced, from the first to the last.

    Every value means token counts of its own, and each token count is a shape to compile and to capture. At 196
    patches and a keep rate of 0.7, three buckets make 4 values and 10 token counts; the official schedule, which
    moves at every iteration, makes 146 combinations of 126 token counts.
    """
    if not recipe.keep_rate_warmup:
        return [recipe.keep_rate]
    buckets = recipe.keep_rate_buckets
    return [1 - (1 - recipe.keep_rate) * bucket / buckets for bucket in range(buckets)] + [recipe.keep_rate]


def optimizer(recipe: Recipe, module: nn.Module) -> torch.optim.AdamW:
    """AdamW over the module's parameters; only the weights of linear and convolution layers decay.

    Norms, biases, embeddings, class and mask tokens and the logit scale do not: pulling them to zero
    teaches nothing.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            is_weight = name == "weight" and isinstance(layer, nn.Linear | nn.Conv2d)
            (decayed if is_weight else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
