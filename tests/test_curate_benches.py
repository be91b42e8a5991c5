"""What the benches of curation's quality compute from a model's answers, and the pictures described by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from curate_frames import daft as daft  # skips where it is missing

from bench import curation_helps, swapped_captions


def singular(tag: str) -> str:
    return tag.removesuffix("s")


def test_tags_are_right_in_any_form_and_missing_ones_count_as_chance() -> None:
    tags = ["cats", "cat", "dog", "noise"]
    truth = [["cat"], ["cats", "bird"], ["cat", "bird"], ["dog", "bird"]]
    logits = np.array([[0.0, 3, 1, 2], [2, 0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]])
    found = curation_helps.tag_measures(logits, tags, truth, singular)
    assert found["tag top1"] == 1 / 4
    assert found["tag top5"] == 1.0
    assert found["tags known"] == 1 / 2  # of cat and bird; the dog is of one picture only
    cat = 1.0  # by the likelier of its two forms: 3, 2, 1, 1, of which the first three are cats
    assert found["tag mAP"] == pytest.approx((cat + 3 / 4) / 2)


def test_the_curve_drops_equal_scores_together() -> None:
    scores = np.array([-1.0, 2.0, -1.0, 0.5, 3.0])
    swapped = np.array([True, False, False, True, False])
    recall, precision = swapped_captions.curve(scores, swapped)
    assert recall.tolist() == [0.5, 1.0, 1.0, 1.0]
    assert precision.tolist() == pytest.approx([1 / 2, 2 / 3, 2 / 4, 2 / 5])


def test_the_pictures_by_hand_have_a_caption_and_a_few_tags() -> None:
    found = json.loads(curation_helps.BY_HAND.read_text(encoding="utf-8"))
    assert len(found) >= 150
    assert len({said["caption"] for said in found.values()}) == len(found)
    for name, said in found.items():
        assert not name.startswith("/")
        assert said.keys() == {"caption", "tags"}
        assert said["caption"].strip()
        assert 1 <= len(said["tags"]) == len(set(said["tags"])) <= 4
