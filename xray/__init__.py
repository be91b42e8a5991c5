"""xray: vision models that prune tokens and learn from image-text and video-hashtag pairs (Xray-Visual)."""

__version__ = "0.1.0"
