"""The error of the evaluation package: its message is one sentence that says what came and what is needed."""

from __future__ import annotations


class EvaluationError(ValueError):
    """Data, features or arguments that cannot be evaluated."""
