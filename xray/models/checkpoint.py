"""Checkpoint files: one safetensors file with a model's weights, its configuration and its extra strings."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xray.models.clip import Clip
from xray.models.config import ClipConfig, Config, MaeConfig, TagConfig, TextConfig, VisionConfig
from xray.models.heads import TagClassifier
from xray.models.initialization import Assign, copy_whole
from xray.models.layers import resize_frame_positions, resize_positions
from xray.models.mae import MaskedAutoencoder
from xray.models.text import TextTransformer
from xray.models.vit import VisionTransformer


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used; the message says in one sentence which file and why."""


class Header(NamedTuple):
    """What a checkpoint says of itself.

    Attributes:
        kind: "vision", "text", "clip", "mae" or "tags".
        config: of the model.
        metadata: all strings of the header: "kind", "config" (JSON) and whatever ``save`` was given.
    """

    kind: str
    config: Config
    metadata: dict[str, str]


class _Kind(NamedTuple):
    model: type[nn.Module]
    config: type[Config]
    encoder_prefix: str | None  # of the VisionTransformer's parameter names; None where there is none


_KINDS = {
    "vision": _Kind(VisionTransformer, VisionConfig, ""),
    "text": _Kind(TextTransformer, TextConfig, None),
    "clip": _Kind(Clip, ClipConfig, "vision."),
    "mae": _Kind(MaskedAutoencoder, MaeConfig, "encoder."),
    "tags": _Kind(TagClassifier, TagConfig, "encoder."),
}

_RESERVED = ("kind", "config")

# A stage may change these: positions are interpolated, EViT and masks have no weights.
_MAY_DIFFER = ("image_size", "num_frames", "keep_rate", "reorganize_blocks", "mask_ratio")


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
    write(path, weights, {**metadata, "kind": kind, "config": config})


def write(path: str | os.PathLike[str], weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; safetensors makes files private
        save_file(tensors, temporary, metadata=metadata)
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
        _check_shapes(f"checkpoint {path}", _stored_shapes(file), shapes)
        # Clones, because the file's own tensors are views of its memory map.
        weights = {name: file.get_tensor(name).clone() for name in shapes}
    model.load_state_dict(weights, assign=True)
    return model, metadata


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a checkpoint says of itself, without reading its weights.

    Raises:
        CheckpointError: the file is missing, truncated, a pickle, or not one of ours.
    """
    with _open(path) as file:
        return _read_header(path, file)


def load_encoder(model: nn.Module, path: str | os.PathLike[str], *, assign: Assign | None = None) -> list[str]:
    """Start a model's image encoder from the encoder of any checkpoint: the hand-off from stage to stage.

    Names and shapes must agree exactly, except that position embeddings are interpolated where ``image_size``
    (bicubic) or ``num_frames`` (linear) differ. EViT settings may differ, having no weights. One tensor at a time
    is read, after all have been checked.

    Args:
        model: a VisionTransformer, MaskedAutoencoder, TagClassifier or Clip; changed only when all fits. Its
            parameters may be on any device, and DTensors: shapes are global.
        path: a file that ``save`` wrote, of any kind with an image encoder.
        assign: takes over each parameter's whole value, for instance to keep this process's shard of it; None
            copies it.

    Returns:
        The names of ``model``'s parameters that were initialised.

    Raises:
        CheckpointError: as ``load``, or the checkpoint has no image encoder, or a different one; the first field or
            parameter that differs is named.
        TypeError: a model without an image encoder.
        ValueError: parameters on the meta device, and no ``assign``.
    """
    target_prefix, encoder = image_encoder(model)
    with _open(path) as file:
        found, config, _ = _read_header(path, file)
        prefix = _KINDS[found].encoder_prefix
        if prefix is None:
            raise CheckpointError(
                f"checkpoint {path} holds a {found!r} model, which has no image encoder to start from"
            )
        _check_same_fields(path, "an image encoder", getattr(config, "vision", config), encoder.config)
        targets = {prefix + name: parameter for name, parameter in encoder.named_parameters()}
        fill(targets, _stored_shapes(file, prefix), file.get_tensor, f"checkpoint {path}", CheckpointError, assign)
    return [target_prefix + name for name, _ in encoder.named_parameters()]


def load_rest(model: nn.Module, path: str | os.PathLike[str], *, assign: Assign | None = None) -> list[str]:
    """Give a model all that ``load_encoder`` leaves out: text encoder and projections, decoder or classifier.

    Args:
        model: a MaskedAutoencoder, TagClassifier or Clip; changed only when all fits.
        path: a file that ``save`` wrote, of the same kind.
        assign: as for ``load_encoder``.

    Returns:
        The names of ``model``'s parameters that were initialised.

    Raises:
        CheckpointError: as ``load``, or the checkpoint is of another kind or its rest of other sizes; the first
            field or parameter that differs is named.
        TypeError: a model without an image encoder.
        ValueError: parameters on the meta device, and no ``assign``.
    """
    prefix, _ = image_encoder(model)
    kind = kind_of(model)
    with _open(path) as file:
        found, config, _ = _read_header(path, file)
        if found != kind:
            raise CheckpointError(f"checkpoint {path} holds a {found!r} model where a {kind!r} model is needed")
        _check_same_fields(path, f"a {kind!r} model", config, model.config)  # type: ignore[arg-type]
        targets = {name: parameter for name, parameter in model.named_parameters() if not name.startswith(prefix)}
        shapes = {name: shape for name, shape in _stored_shapes(file).items() if not name.startswith(prefix)}
        fill(targets, shapes, file.get_tensor, f"checkpoint {path}", CheckpointError, assign)
    return list(targets)


def image_encoder(model: nn.Module) -> tuple[str, VisionTransformer]:
    """A model's image encoder, after the prefix of its parameters' names ("", "vision." or "encoder.").

    Raises:
        TypeError: an unknown model, or one without an image encoder.
    """
    prefix = _KINDS[kind_of(model)].encoder_prefix
    if prefix is None:
        raise TypeError(f"model must have an image encoder, got {type(model).__name__}")
    encoder = model.get_submodule(prefix.rstrip("."))
    assert isinstance(encoder, VisionTransformer)
    return prefix, encoder


def fill(
    targets: Mapping[str, nn.Parameter],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    source: str,
    error: type[ValueError] = ValueError,
    assign: Assign | None = None,
) -> None:
    """Give parameters stored values, one after the other once all fit, interpolating position embeddings.

    Args:
        targets: the parameters by the names that the source has for them.
        shapes: of every stored value. Position embeddings, ``pos_embed`` (1, G*G, C) and ``time_embed`` (1, T, C),
            may be of other sizes.
        read: gives the stored value of that name.
        source: what to call the source in an error message.
        error: the class of that error.
        assign: as for ``load_encoder``.

    Raises:
        ValueError: (or ``error``) a missing, unexpected or wrongly shaped value, by name.
    """
    assign = copy_whole if assign is None else assign
    resizers = {name: resize for name in targets for ending, resize in _RESIZERS.items() if name.endswith(ending)}
    wanted = {name: tuple(parameter.shape) for name, parameter in targets.items()}
    resizable = {name for name in resizers if name in shapes and _is_resizable(name, shapes[name], wanted[name])}
    _check_shapes(source, shapes, {**wanted, **{name: shapes[name] for name in resizable}}, error)
    for name, parameter in targets.items():
        value = read(name)
        if name in resizable:
            value = resizers[name](value, wanted[name][1])
        assign(parameter, value.to(parameter.dtype))


def _resize_patch_positions(positions: Tensor, count: int) -> Tensor:
    return resize_positions(positions, math.isqrt(count))


_RESIZERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pos_embed": _resize_patch_positions,  # the decoder's of a masked autoencoder too
    "time_embed": resize_frame_positions,
}


def _is_resizable(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if len(stored) != 3 or (stored[0], stored[2]) != (wanted[0], wanted[2]) or stored[1] < 1:
        return False
    return name.endswith("time_embed") or math.isqrt(stored[1]) ** 2 == stored[1]


def _stored_shapes(file: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
    return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _fields(config: Config) -> dict[str, Any]:
    """Fields by name, a text encoder's as "text.width"; an image encoder inside is left to its own comparison."""
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if isinstance(value, dict) and name != "vision":
            fields |= {f"{name}.{inner}": number for inner, number in value.items()}
        elif name != "vision":
            fields[name] = value
    return fields


def _check_same_fields(path: str | os.PathLike[str], what: str, stored: Config, wanted: Config) -> None:
    wanted_fields = _fields(wanted)
    for name, value in _fields(stored).items():
        if name not in _MAY_DIFFER and value != wanted_fields[name]:
            raise CheckpointError(
                f"checkpoint {path} has {what} with {name} {value} where the model has {wanted_fields[name]}"
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


def _read_header(path: str | os.PathLike[str], file: Any) -> Header:
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
    return Header(kind, config, metadata)
