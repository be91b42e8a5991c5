"""Curation on Daft: from dirty image-text pairs and tagged clips to balanced shards, on one machine or on a
Ray cluster.
"""

from xray.curate import engine  # first: it decides how Daft is imported
from xray.curate.demo_set import DemoSet, prepare_demo
from xray.curate.pipeline import STEPS, Curated, curate
from xray.curate.settings import Settings
from xray.curate.story import explain

__all__ = ["STEPS", "Curated", "DemoSet", "Settings", "curate", "engine", "explain", "prepare_demo"]
