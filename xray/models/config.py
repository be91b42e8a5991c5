"""Model configurations: frozen dataclasses that validate themselves, and the named sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

CHANNELS = 3
"""Colour channels of a frame; every model here reads RGB."""


def _check_positive_ints(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        label = f"{type(config).__name__}.{name}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{label} must be an int, got {type(value).__name__} {value!r}")
        if value < 1:
            raise ValueError(f"{label} must be at least 1, got {value}")


def _check_positive_number(label: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{label} must be a number, got {type(value).__name__} {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{label} must be positive and finite, got {value}")


def _check_heads(label: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{label}: width {width} must be divisible by heads {heads}")


def check_keep_rate(keep_rate: Any, label: str = "keep_rate") -> None:
    """Raise TypeError or ValueError unless ``keep_rate`` is a number in (0, 1]."""
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, int | float):
        raise TypeError(f"{label} must be a number in (0, 1], got {type(keep_rate).__name__} {keep_rate!r}")
    if not 0 < keep_rate <= 1:
        raise ValueError(f"{label} must lie in (0, 1], got {keep_rate}")


_C = TypeVar("_C", bound="_Config")


class _Config:
    """JSON round trip shared by all configurations; nested configurations become nested objects."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types (numbers, lists, dicts, None)."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[_C], values: Mapping[str, Any]) -> _C:
        """Build and validate from ``to_dict`` output; unknown or missing keys raise ValueError by name."""
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__} needs a mapping of fields, got {type(values).__name__}")
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; its fields are {', '.join(sorted(known))}")
        nested: dict[str, type[_Config]] = {"vision": VisionConfig, "text": TextConfig}
        arguments = {
            name: nested[name].from_dict(value) if name in nested and isinstance(value, Mapping) else value
            for name, value in values.items()
        }
        try:
            return cls(**arguments)
        except TypeError as error:
            message = str(error).replace("__init__() ", "")
            raise ValueError(f"{cls.__name__} cannot be built: {message}") from error


@dataclass(frozen=True)
class VisionConfig(_Config):
    """The image and clip encoder.

    Attributes:
        image_size: side of the square frames whose positions are stored, in pixels; a multiple of ``patch_size``.
            Frames of other multiples take them interpolated.
        patch_size: side of a patch, in pixels.
        width: channels of a token; a multiple of ``heads``.
        depth: number of transformer blocks.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP over ``width``.
        num_frames: the most frames a clip may have; an image is a clip of one frame.
        num_registers: extra learned prefix tokens (Darcet et al., arXiv 2309.16588), never dropped by EViT.
        keep_rate: share of the tokens that each EViT layer keeps, in (0, 1]; 1 leaves EViT off.
        reorganize_blocks: 0-based blocks that reorganise tokens; None means a quarter, a half and three
            quarters of the depth, which is EViT's 3, 6, 9 at depth 12 (Liang et al., ICLR 2022).
        layer_norm_eps: epsilon of every LayerNorm.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    num_frames: int = 1
    num_registers: int = 0
    keep_rate: float = 1.0
    reorganize_blocks: tuple[int, ...] | None = None
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_positive_ints(self, "image_size", "patch_size", "width", "depth", "heads", "num_frames")
        _check_heads("VisionConfig", self.width, self.heads)
        _check_positive_number("VisionConfig.mlp_ratio", self.mlp_ratio)
        _check_positive_number("VisionConfig.layer_norm_eps", self.layer_norm_eps)
        check_keep_rate(self.keep_rate, "VisionConfig.keep_rate")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"VisionConfig.image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}"
            )
        if isinstance(self.num_registers, bool) or not isinstance(self.num_registers, int):
            raise TypeError(f"VisionConfig.num_registers must be an int, got {self.num_registers!r}")
        if self.num_registers < 0:
            raise ValueError(f"VisionConfig.num_registers must be at least 0, got {self.num_registers}")
        if self.reorganize_blocks is not None:
            if not isinstance(self.reorganize_blocks, list | tuple):
                raise TypeError(
                    f"VisionConfig.reorganize_blocks must be a list of block numbers, got {self.reorganize_blocks!r}"
                )
            blocks = tuple(self.reorganize_blocks)
            valid = all(type(i) is int and 0 <= i < self.depth for i in blocks)
            if not valid or list(blocks) != sorted(set(blocks)):
                raise ValueError(
                    f"VisionConfig.reorganize_blocks must be increasing block numbers from 0 to "
                    f"{self.depth - 1}, got {list(blocks)}"
                )
            object.__setattr__(self, "reorganize_blocks", blocks)

    @property
    def grid_size(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def patches_per_frame(self) -> int:
        """Patches of one frame."""
        return self.grid_size**2

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens that EViT must never drop: the class token and the registers."""
        return 1 + self.num_registers

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def evit_blocks(self) -> tuple[int, ...]:
        """The 0-based blocks that reorganise tokens when the keep rate is below 1."""
        if self.reorganize_blocks is not None:
            return self.reorganize_blocks
        return tuple(sorted({self.depth // 4, self.depth // 2, 3 * self.depth // 4}))


@dataclass(frozen=True)
class TextConfig(_Config):
    """The causal text encoder: ``context_length`` is the most tokens a caption may have."""

    vocab_size: int
    context_length: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _check_positive_ints(self, "vocab_size", "context_length", "width", "depth", "heads")
        _check_heads("TextConfig", self.width, self.heads)
        _check_positive_number("TextConfig.mlp_ratio", self.mlp_ratio)

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the MLP."""
        return int(self.width * self.mlp_ratio)


def _check_part(config: object, name: str, kind: type) -> None:
    value = getattr(config, name)
    if not isinstance(value, kind):
        raise TypeError(f"{type(config).__name__}.{name} must be a {kind.__name__}, got {type(value).__name__}")


@dataclass(frozen=True)
class ClipConfig(_Config):
    """An image and a text encoder that meet in a shared space of ``embed_dim`` channels."""

    vision: VisionConfig
    text: TextConfig
    embed_dim: int

    def __post_init__(self) -> None:
        _check_part(self, "vision", VisionConfig)
        _check_part(self, "text", TextConfig)
        _check_positive_ints(self, "embed_dim")


@dataclass(frozen=True)
class MaeConfig(_Config):
    """A masked autoencoder: ``mask_ratio`` in (0, 1) is the share of patches hidden from the encoder."""

    vision: VisionConfig
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    mask_ratio: float = 0.75

    def __post_init__(self) -> None:
        _check_part(self, "vision", VisionConfig)
        _check_positive_ints(self, "decoder_width", "decoder_depth", "decoder_heads")
        _check_heads("MaeConfig decoder", self.decoder_width, self.decoder_heads)
        _check_positive_number("MaeConfig.mask_ratio", self.mask_ratio)
        self.num_masked_of(self.vision.patches_per_frame)

    @property
    def num_masked(self) -> int:
        """Patches hidden in every image of the native size."""
        return self.num_masked_of(self.vision.patches_per_frame)

    def num_masked_of(self, num_patches: int) -> int:
        """Patches hidden of so many: ``mask_ratio`` of them, rounded to the nearest.

        Raises:
            ValueError: none or all would be hidden.
        """
        num_masked = round(self.mask_ratio * num_patches)
        if not 0 < num_masked < num_patches:
            raise ValueError(
                f"MaeConfig.mask_ratio {self.mask_ratio} must hide at least one and leave at least one of "
                f"{num_patches} patches, and hides {num_masked}"
            )
        return num_masked


@dataclass(frozen=True)
class TagConfig(_Config):
    """An encoder with one linear classifier over ``num_tags`` tags."""

    vision: VisionConfig
    num_tags: int

    def __post_init__(self) -> None:
        _check_part(self, "vision", VisionConfig)
        _check_positive_ints(self, "num_tags")


Config = VisionConfig | TextConfig | ClipConfig | MaeConfig | TagConfig
"""The configuration of any model here."""

SIZES: dict[str, VisionConfig] = {
    "tiny": VisionConfig(image_size=32, patch_size=8, width=32, depth=4, heads=2),
    "demo": VisionConfig(image_size=64, patch_size=8, width=128, depth=4, heads=4, num_frames=4),
    "ti16": VisionConfig(image_size=224, patch_size=16, width=192, depth=12, heads=3, num_frames=8),
    "s16": VisionConfig(image_size=224, patch_size=16, width=384, depth=12, heads=6, num_frames=8),
    "b16": VisionConfig(image_size=224, patch_size=16, width=768, depth=12, heads=12, num_frames=8),
    "l14": VisionConfig(image_size=224, patch_size=14, width=1024, depth=24, heads=16, num_frames=8),
    "h14": VisionConfig(image_size=224, patch_size=14, width=1280, depth=32, heads=16, num_frames=8),
    "g14": VisionConfig(
        image_size=224, patch_size=14, width=1408, depth=40, heads=16, mlp_ratio=6144 / 1408, num_frames=8
    ),
    "2b": VisionConfig(image_size=224, patch_size=14, width=2048, depth=40, heads=16, num_frames=8),
}
"""Named encoder sizes, all with EViT off until a recipe sets ``keep_rate``.

Xray-Visual's own widths, depths, resolutions and frame counts are not public, so none of these reproduces
it. "tiny" and "demo" are our choice for tests and for a two-core machine. "ti16" to "g14" have the widths,
depths and heads that the field uses under these names (DeiT; Zhai et al., arXiv 2106.04560; open_clip's
g/14), so that published weights fit. "2b" is our choice: 2.0 billion parameters with 128-channel heads. The
8 frames of the clip sizes are our choice too.
"""
