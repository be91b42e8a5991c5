"""Training: recipes, three tasks (masked autoencoding, tags, CLIP), one loop for one process and for
torchrun.

Importing this package is cheap: torch is imported when a run starts. `xray.train.grad_cache`, large
contrastive batches in the memory of small ones, is for training loops of your own too.
"""

from pathlib import Path

from xray.train.errors import Stopped, TrainError
from xray.train.metrics import read_metrics
from xray.train.overrides import find_recipe, parse_overrides, recipe_for, validate
from xray.train.recipes import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "Recipe",
    "Stopped",
    "TrainError",
    "find_recipe",
    "parse_overrides",
    "read_metrics",
    "recipe_for",
    "run",
    "validate",
]


def run(recipe: Recipe) -> Path:
    """Train what `recipe` describes and return its folder.

    The folder holds `recipe.json`, `environment.json` (on what machine and with what versions), `metrics.jsonl` (a line
    a step, see `read_metrics`), `tensorboard/`, `checkpoints/step-N/` and, at the end, `model.safetensors`. Under
    `torchrun` every rank calls this, and the global batch is split between them.

    Raises:
        TrainError: a value, a folder or a checkpoint cannot be used; one sentence says why.
        Stopped: SIGINT or SIGTERM came; the state is saved and the message says how to go on.
    """
    from xray.train import loop

    return loop.run(recipe)
