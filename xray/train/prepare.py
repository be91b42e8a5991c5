"""What a run needs before its first step: folder, data, starting weights, and how the device computes."""

import functools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recompute

from xray import data, models
from xray.train import checkpoint
from xray.train.distributed import World, assign
from xray.train.errors import TrainError
from xray.train.recipes import Recipe
from xray.train.tasks import Task, learn

LAUNCH = ".launch"
MOST_GRAPHS = 128  # shapes a block is compiled for: images and clips, times layers, times keep rates
KEPT_OPS = {
    "aten": (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "linear",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    # Reorganisation too, so that the backward pass cannot take other tokens than the forward pass did.
    "xray_kernels": ("attention", "attention_with_scores", "class_scores", "add_reorganize_norm", "reorganize_tokens"),
}
"""What "selective" checkpointing keeps: the results of the ops that cost most of a block's time, by namespace."""


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


def learned(recipe: Recipe, texts: Iterable[tuple[str, Sequence[str]]], init: Path | None) -> dict[str, str]:
    """The tags or tokenizer of a new run: from the recipe's file, from what `init` brings, or learned from the data.

    Args:
        recipe: the run's.
        texts: caption and tags of the training samples, read only where there is something to learn.
        init: the model file to start from.

    Raises:
        TrainError: a file that cannot be read or is not what its key says, or data without tags.
    """
    if recipe.task == "tags" and recipe.tags_file:
        return {"tags": json.dumps(read_tags(recipe.tags_file), ensure_ascii=False)}
    if recipe.task == "clip" and recipe.tokenizer_file:
        return {"tokenizer": _read_tokenizer(recipe.tokenizer_file)}
    if init is not None and recipe.task == "clip" and "tokenizer" in (header := _header(init)):
        return {"tokenizer": header["tokenizer"]}
    return learn(recipe, texts)


def read_tags(path: str) -> list[str]:
    """The tags that `tags_file` lists, in its order.

    Raises:
        TrainError: no readable JSON list of different, non-empty strings.
    """
    try:
        tags = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"tags_file is {path}, which cannot be read as JSON: {_in_short(error)}") from error
    if not isinstance(tags, list) or not tags:
        found = "an empty list" if tags == [] else type(tags).__name__
        raise TrainError(f"tags_file is {path}, which holds {found} and must hold a JSON list of tags")
    seen: set[str] = set()
    for place, tag in enumerate(tags):
        if not isinstance(tag, str) or not tag.strip():
            raise TrainError(f"tags_file is {path}, whose entry {place} is {tag!r} and must be a tag, a string")
        if tag in seen:
            raise TrainError(f"tags_file is {path}, which lists {tag!r} twice: list each tag once")
        seen.add(tag)
    return tags


def _read_tokenizer(path: str) -> str:
    """The JSON of the tokenizer in `tokenizer_file`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        data.Tokenizer.load(text)
    except (OSError, ValueError) as error:
        raise TrainError(f"tokenizer_file is {path}, which cannot be used: {_in_short(error)}") from error
    return text


def _in_short(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}  # reading the weights will say what is wrong


def start_from(model: nn.Module, path: Path) -> str:
    """Copy weights from an earlier run's model, one tensor at a time, and say in words which. The model may be sharded.

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
    """Recompute each block in the backward pass, and compile it, as the recipe asks; sharding comes after.

    The compiler is given the block with its recomputation, which it plans into the block's two graphs. The forward
    methods are replaced rather than the modules, so parameter names stay as they are.
    """
    if recipe.compile:
        # Chunks come with gradient and without, and the last may be smaller.
        most = MOST_GRAPHS * (4 if recipe.chunk_size else 1)
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, max(most, getattr(torch._dynamo.config, limit)))
    # There is no dropout, so no random state to restore.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recipe.activation_checkpointing == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy())
    for block in task.blocks():
        if recipe.activation_checkpointing != "none":
            block.forward = functools.partial(recompute, block.forward, **options)
        if recipe.compile:
            # Shapes are few and fixed (see `schedule.keep_rate`), so each gets its own graph instead of a
            # slower general one.
            block.forward = torch.compile(block.forward, dynamic=False)


def _policy() -> Callable[..., CheckpointPolicy]:
    """Which results of a block are kept for its backward pass."""
    packets = (getattr(getattr(torch.ops, space), name, None) for space, names in KEPT_OPS.items() for name in names)
    kept = {getattr(packet, overload) for packet in packets if packet is not None for overload in packet.overloads()}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
