"""What a run needs before its first step: folder, data, starting weights, and how the device computes."""

import functools
import json
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from xray import data, models
from xray.train import checkpoint
from xray.train.distributed import World
from xray.train.errors import TrainError
from xray.train.recipes import Recipe
from xray.train.tasks import Task, learn

LAUNCH = ".launch"
MOST_GRAPHS = 128  # shapes a block is compiled for: images and clips, times layers, times keep rates


def open_folder(out: Path, recipe: Recipe, start: int, resumed: Path | None) -> None:
    """Make the run's folder ready for steps from `start` on, and write `recipe.json` into it.

    Raises:
        TrainError: the folder cannot be written, or holds an earlier run that would be lost.
    """
    doomed = checkpoint.complete(out)
    used = doomed or (out / "metrics.jsonl").is_file() or (out / "model.safetensors").is_file()
    own = resumed is not None and resumed.parent.resolve() == (out / "checkpoints").resolve()
    if own:
        doomed = [path for path in doomed if checkpoint.step_of(path) > start]
        # Later ones than the newest whole one are damaged.
        if doomed and not recipe.overwrite and recipe.resume not in ("latest", "auto"):
            raise TrainError(
                f"resume goes back to step {start} and {out} holds later checkpoints up to "
                f"{doomed[-1].name}: add overwrite=true to delete them"
            )
    elif used and not recipe.overwrite and recipe.resume not in ("latest", "auto"):
        raise TrainError(
            f"{out} holds an earlier run: go on with it by resume=latest, replace it by overwrite=true, or "
            f"choose another out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in doomed:
            shutil.rmtree(path)
        if not own:
            shutil.rmtree(out / "tensorboard", ignore_errors=True)
        (out / "model.safetensors").unlink(missing_ok=True)
        (out / LAUNCH).write_text(_launch(), encoding="utf-8")
        written = replace(recipe, resume="", overwrite=False)
        (out / "recipe.json").write_text(json.dumps(asdict(written), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise TrainError(f"out is {out}, which cannot be written: {checkpoint.reason(error)}") from error


def after_restart(out: Path, recipe: Recipe, place: World) -> Recipe:
    """The recipe, but going on with its run where torchrun has restarted the processes that had begun it.

    A restart that follows a mistake, such as a folder that holds another run, must not take that run for its own: the
    folder remembers who began.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return recipe

    def begun() -> bool:
        try:
            return (out / LAUNCH).read_text(encoding="utf-8") == _launch()
        except OSError:
            return False

    if place.share(begun() if place.is_first else None):
        return replace(recipe, resume="auto", overwrite=False)
    return recipe


def _launch() -> str:
    """What stays the same while an agent of torchrun restarts its processes, and in no other launch: the agent."""
    return f"{socket.gethostname()} {os.environ.get('TORCHELASTIC_RUN_ID', '')} {os.getppid()}"


def open_data(recipe: Recipe, out: Path, place: World) -> list[data.Dataset]:
    """The training split of every folder that `recipe.data` names; the generated set is made on the first
    call.

    Raises:
        DataError: a folder is missing or damaged.
    """
    if recipe.data == "generated":
        frames = max(2, recipe.num_frames)
        root = out / f"generated-{recipe.data_size}x{recipe.image_size}x{frames}"

        def generate() -> None:
            if not (root / "index.parquet").is_file():
                data.generated(root, recipe.data_size, image_size=recipe.image_size, num_frames=frames)

        place.first_does(generate)
        roots = [root]
    else:
        roots = [Path(part.strip()) for part in recipe.data.split(",")]
    media = "image" if recipe.task == "mae" else None
    min_tags = 1 if recipe.task == "tags" else 0
    return [data.Dataset(root, "train", media=media, min_tags=min_tags) for root in roots]


def model_file(init: str) -> Path:
    """The file that `init` names: itself, or the final model in a run's folder.

    Raises:
        TrainError: there is none.
    """
    path = Path(init)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        ending = ", the run there has not finished" if (path.parent / "recipe.json").is_file() else ""
        raise TrainError(
            f"init is {init}, and there is no file {path}{ending}: give a .safetensors file or a run's folder"
        )
    return path


def learned(recipe: Recipe, datasets: Sequence[data.Dataset], init: Path | None) -> dict[str, str]:
    """The tags or tokenizer of a new run, learned from its data, or the tokenizer that `init` brings."""
    if init is not None and recipe.task == "clip" and "tokenizer" in (header := _header(init)):
        return {"tokenizer": header["tokenizer"]}
    return learn(recipe, datasets)


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}  # reading the weights will say what is wrong


def start_from(model: nn.Module, path: Path, *, assign: models.Assign | None = None) -> str:
    """Copy weights from an earlier run's model, one tensor at a time, and say in words which; `assign` as in
    `models.load_encoder`.

    The image encoder always; from a clip model to a clip model of the same text encoder all the rest too,
    so that a finished model can be trained on.

    Raises:
        CheckpointError: the file is damaged or its encoder is another.
    """
    models.load_encoder(model, path, assign=assign)
    config = models.read_header(path).config
    if not isinstance(model, models.Clip) or not isinstance(config, models.ClipConfig):
        return "the image encoder"
    if config.text != model.config.text or config.embed_dim != model.config.embed_dim:
        return "the image encoder, but not the text encoder, which is of another size"
    models.load_rest(model, path, assign=assign)
    return "the whole model"


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """What matrix products run in: "auto" is bfloat16 on a GPU that has it; CPUs are mostly slow at it."""
    if recipe.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32


def accelerate(task: Task, recipe: Recipe) -> None:
    """Compile each block, then recompute it in the backward pass, as the recipe asks; sharding comes after.

    The forward methods are replaced rather than the modules, so parameter names stay as they are.
    """
    if recipe.compile:
        # Chunks come with gradient and without, and the last may be smaller.
        most = MOST_GRAPHS * (4 if recipe.chunk_size else 1)
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, max(most, getattr(torch._dynamo.config, limit)))
    for block in task.blocks():
        if recipe.compile:
            # Shapes are few and fixed (see `schedule.keep_rate`), so each gets its own graph instead of a
            # slower general one.
            block.forward = torch.compile(block.forward, dynamic=False)
        if recipe.activation_checkpointing != "none":
            # There is no dropout, so no random state to restore.
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
