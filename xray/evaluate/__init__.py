"""Evaluation: zero-shot classification, retrieval, tags of clips (and, in `report`, a run's page).

Every number comes beside what guessing would get, and, where one answer is far commoner than others, beside
the best constant answer.
"""

from xray.evaluate.checkpoint import evaluate_checkpoint
from xray.evaluate.embed import Embedded, embed_dataset, embed_texts
from xray.evaluate.errors import EvaluationError
from xray.evaluate.retrieval import retrieval
from xray.evaluate.tags import clip_tags
from xray.evaluate.zero_shot import zero_shot

__all__ = [
    "Embedded",
    "EvaluationError",
    "clip_tags",
    "embed_dataset",
    "embed_texts",
    "evaluate_checkpoint",
    "retrieval",
    "zero_shot",
]
