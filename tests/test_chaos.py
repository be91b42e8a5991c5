"""A run that is killed and goes on ends as one that was left alone; `make chaos` does it many times more."""

from __future__ import annotations

import random
from pathlib import Path

import chaos
import pytest

from xray import data


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.generated(
        tmp_path_factory.mktemp("data") / "shapes", 240, image_size=32, num_frames=4, shard_bytes=2**17
    )


@pytest.mark.parametrize("campaign", chaos.campaigns(kills=3, steps=20), ids=lambda campaign: campaign.name)
def test_kills_change_nothing(campaign: chaos.Campaign, shapes: Path, tmp_path: Path) -> None:
    report = chaos.run(campaign, tmp_path, shapes, random.Random(campaign.name))
    assert len(report.kills) == 1
    assert not report.differences
