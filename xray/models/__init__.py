"""Models: one encoder for images and clips, masked autoencoding, hashtag classification, text and CLIP.

    from xray import models

    encoder = models.VisionTransformer(models.SIZES["s16"])
    features = encoder(pixels, keep_rate=0.7)   # (B, 3, 224, 224) or (B, 3, T, 224, 224) -> (B, 384)

Models know nothing of sharding and nothing of data.
"""

from xray.models.checkpoint import CheckpointError, kind_of, load, load_encoder, save
from xray.models.clip import Clip, ClipOutput
from xray.models.config import (
    SIZES,
    ClipConfig,
    Cost,
    MaeConfig,
    TagConfig,
    TextConfig,
    VisionConfig,
    encoder_cost,
)
from xray.models.heads import TagClassifier
from xray.models.mae import MaeOutput, MaskedAutoencoder
from xray.models.text import TextTransformer
from xray.models.timm_weights import load_timm
from xray.models.vit import EncoderOutput, VisionTransformer

__all__ = [
    "SIZES",
    "CheckpointError",
    "Clip",
    "ClipConfig",
    "ClipOutput",
    "Cost",
    "EncoderOutput",
    "MaeConfig",
    "MaeOutput",
    "MaskedAutoencoder",
    "TagClassifier",
    "TagConfig",
    "TextConfig",
    "TextTransformer",
    "VisionConfig",
    "VisionTransformer",
    "encoder_cost",
    "kind_of",
    "load",
    "load_encoder",
    "load_timm",
    "save",
]
