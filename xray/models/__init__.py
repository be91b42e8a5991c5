"""Models: one encoder for images and clips, masked autoencoding, hashtag classification, text and CLIP.

    from xray import models

    encoder = models.VisionTransformer(models.SIZES["s16"])
    features = encoder(pixels, keep_rate=0.7)   # (B, 3, 224, 224) or (B, 3, T, 224, 224) -> (B, 384)

Models know nothing of sharding and nothing of data.
"""

from xray.models.checkpoint import CheckpointError, Header, kind_of, load, load_encoder, load_rest, read_header, save
from xray.models.clip import Clip, ClipOutput
from xray.models.config import (
    SIZES,
    ClipConfig,
    Config,
    MaeConfig,
    TagConfig,
    TextConfig,
    VisionConfig,
)
from xray.models.costs import Cost, encoder_cost, model_cost
from xray.models.heads import TagClassifier
from xray.models.initialization import Assign, initialize
from xray.models.mae import MaeOutput, MaskedAutoencoder
from xray.models.text import TextTransformer
from xray.models.timm_weights import load_timm, save_timm, to_timm
from xray.models.vit import EncoderOutput, VisionTransformer

__all__ = [
    "SIZES",
    "Assign",
    "CheckpointError",
    "Clip",
    "ClipConfig",
    "ClipOutput",
    "Config",
    "Cost",
    "EncoderOutput",
    "Header",
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
    "initialize",
    "kind_of",
    "load",
    "load_encoder",
    "load_rest",
    "load_timm",
    "model_cost",
    "read_header",
    "save",
    "save_timm",
    "to_timm",
]
