"""Checkpoint files: one safetensors file with a model's weights, its configuration and its extra strings."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xray.models.clip import Clip
from xray.models.config import ClipConfig, MaeConfig, TagConfig, TextConfig, VisionConfig
from xray.models.heads import TagClassifier
from xray.models.layers import resize_frame_positions, resize_positions
from xray.models.mae import MaskedAutoencoder
from xray.models.text import TextTransformer
from xray.models.vit import VisionTransformer


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used; the message says in one sentence which file and why."""


class _Kind(NamedTuple):
    model: type[nn.Module]
    config: type[VisionConfig] | type[TextConfig] | type[ClipConfig] | type[MaeConfig] | type[TagConfig]
    encoder_prefix: str | None  # of the VisionTransformer's parameter names; None where there is none


_KINDS = {
    "vision": _Kind(VisionTransformer, VisionConfig, ""),
    "text": _Kind(TextTransformer, TextConfig, None),
    "clip": _Kind(Clip, ClipConfig, "vision."),
    "mae": _Kind(MaskedAutoencoder, MaeConfig, "encoder."),
    "tags": _Kind(TagClassifier, TagConfig, "encoder."),
}

_RESERVED = ("kind", "config")

# A stage may change these: positions are interpolated, EViT has no weights.
_MAY_DIFFER = ("image_size", "num_frames", "keep_rate", "reorganize_blocks")


def kind_of(model: nn.Module) -> str:
    """The name under which a checkpoint stores this model: "vision", "text", "clip", "mae" or "tags"."""
    for kind, entry in _KINDS.items():
        if isinstance(model, entry.model):
            return kind
    raise TypeError(f"model must be one of {_names()}, got {type(model).__name__}")


def _names() -> str:
    return ", ".join(entry.model.__name__ for entry in _KINDS.values())


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    **metadata: str,
) -> None:
    """Write a model to one safetensors file, whole or not at all (a temporary file, then a rename).

    Args:
        model: one of this package's models.
        path: the file to write; an existing one is replaced.
        state_dict: the weights to write instead of ``model.state_dict()``, under the same names, for a model
            whose own parameters are sharded.
        **metadata: extra strings for the header, such as ``tags`` or ``tokenizer``.

    Raises:
        CheckpointError: the file cannot be written (missing or unwritable folder, no space).
        TypeError: an unknown model, or metadata that is not a string.
        ValueError: metadata under the reserved names ``kind`` and ``config``.
    """
    kind = kind_of(model)
    for name, value in metadata.items():
        if name in _RESERVED:
            raise ValueError(f"metadata must not use the reserved name {name!r}")
        if not isinstance(value, str):
            raise TypeError(f"metadata {name!r} must be a string, got {type(value).__name__}")
    config = json.dumps(model.config.to_dict())  # type: ignore[union-attr, operator]
    weights = model.state_dict() if state_dict is None else state_dict
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; safetensors makes files private
        save_file(tensors, temporary, metadata={**metadata, "kind": kind, "config": config})
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {_reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], *, kind: str | None = None) -> tuple[nn.Module, dict[str, str]]:
    """Read a model back, on CPU, in training mode, in the dtypes it was saved with; nothing is unpickled.

    Args:
        path: a file that ``save`` wrote.
        kind: what the caller needs ("vision", "text", "clip", "mae", "tags"); None takes any.

    Returns:
        The model, and the header's strings: "kind", "config" (JSON) and whatever ``save`` was given.

    Raises:
        CheckpointError: the file is missing, truncated, a pickle, of another kind, or unlike its config.
    """
    with _open(path) as file:
        found, config, metadata = _read_header(path, file)
        if kind is not None and found != kind:
            raise CheckpointError(f"checkpoint {path} holds a {found!r} model where a {kind!r} model is needed")
        with torch.device("meta"):  # no memory and no random numbers spent on weights about to be replaced
            model = _KINDS[found].model(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        _check_shapes(f"checkpoint {path}", stored, shapes)
        # Clones, because the file's own tensors are views of its memory map.
        weights = {name: file.get_tensor(name).clone() for name in shapes}
    model.load_state_dict(weights, assign=True)
    return model, metadata


def load_encoder(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Start a model's image encoder from the encoder of any checkpoint: the hand-off from stage to stage.

    Names and shapes must agree exactly, except that position embeddings are interpolated where ``image_size``
    (bicubic) or ``num_frames`` (linear) differ. EViT settings may differ, having no weights. Call it before
    the model is sharded.

    Args:
        model: a VisionTransformer, MaskedAutoencoder, TagClassifier or Clip; changed only when all fits.
        path: a file that ``save`` wrote, of any kind with an image encoder.

    Returns:
        The names of ``model``'s parameters that were initialised.

    Raises:
        CheckpointError: as ``load``, or the checkpoint has no image encoder, or a different one.
        TypeError: a model without an image encoder.
    """
    target_prefix = _KINDS[kind_of(model)].encoder_prefix
    if target_prefix is None:
        raise TypeError(f"model must have an image encoder, got {type(model).__name__}")
    encoder = model.get_submodule(target_prefix.rstrip("."))
    assert isinstance(encoder, VisionTransformer)
    with _open(path) as file:
        found, config, _ = _read_header(path, file)
        prefix = _KINDS[found].encoder_prefix
        if prefix is None:
            raise CheckpointError(
                f"checkpoint {path} holds a {found!r} model, which has no image encoder to start from"
            )
        _check_same_encoder(path, getattr(config, "vision", config), encoder.config)
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        weights = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        load_encoder_weights(encoder, weights, f"checkpoint {path}", CheckpointError)
    return [target_prefix + name for name in encoder.state_dict()]


def load_encoder_weights(
    encoder: VisionTransformer,
    weights: dict[str, Tensor],
    source: str,
    error: type[ValueError] = ValueError,
) -> None:
    """Copy weights into an encoder, all or nothing, interpolating its position embeddings where sizes differ.

    Args:
        encoder: the encoder to change.
        weights: a tensor for every name of ``encoder.state_dict()``; ``pos_embed`` (1, G*G, width) and
            ``time_embed`` (1, T, width) may be of other sizes.
        source: what to call the weights in an error message.
        error: the class of that error.

    Raises:
        ValueError: (or ``error``) a missing, unexpected or wrongly shaped tensor, by name.
    """
    weights = dict(weights)
    resize = {
        "pos_embed": (resize_positions, encoder.config.grid_size),
        "time_embed": (resize_frame_positions, encoder.config.num_frames),
    }
    for name, (function, size) in resize.items():
        if name in weights and weights[name].ndim == 3:
            weights[name] = function(weights[name], size)
    targets = encoder.state_dict()
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    _check_shapes(source, stored, {name: tuple(tensor.shape) for name, tensor in targets.items()}, error)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])


def _check_same_encoder(path: str | os.PathLike[str], stored: VisionConfig, wanted: VisionConfig) -> None:
    wanted_fields = wanted.to_dict()
    for name, value in stored.to_dict().items():
        if name not in _MAY_DIFFER and value != wanted_fields[name]:
            raise CheckpointError(
                f"checkpoint {path} has an image encoder with {name} {value} where the model has {wanted_fields[name]}"
            )


def _check_shapes(
    source: str,
    stored: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    error: type[ValueError] = CheckpointError,
) -> None:
    if missing := [name for name in wanted if name not in stored]:
        raise error(f"{source} lacks {len(missing)} weights that the model needs, the first being {missing[0]!r}")
    if unexpected := sorted(set(stored) - set(wanted)):
        raise error(f"{source} has {len(unexpected)} weights unknown to the model, the first being {unexpected[0]!r}")
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise error(f"{source} has {name!r} of shape {stored[name]} where the model needs {shape}")


def _reason(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with open(path, "rb") as raw:
            start = raw.read(9)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {_reason(error)}") from error
    # A safetensors file begins with its header's length, 8 bytes that may look like anything, then a brace.
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{":
        raise CheckpointError(
            f"checkpoint {path} is a pickle (a torch.save file), which could run code when opened: "
            f"only safetensors files are read"
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {path} is not a whole safetensors file (truncated or corrupt): {_reason(error)}"
        ) from error


def _read_header(path: str | os.PathLike[str], file: Any) -> tuple[str, Any, dict[str, str]]:
    metadata: dict[str, str] = file.metadata() or {}
    kind = metadata.get("kind")
    if kind is None or "config" not in metadata:
        raise CheckpointError(f"checkpoint {path} was not written by xray: its header lacks the kind and config")
    if kind not in _KINDS:
        raise CheckpointError(f"checkpoint {path} is of unknown kind {kind!r}; known kinds are {', '.join(_KINDS)}")
    try:
        config = _KINDS[kind].config.from_dict(json.loads(metadata["config"]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} has an unusable config: {_reason(error)}") from error
    return kind, config, metadata
