"""The one error of the evaluation and the report that a person can act on."""

from __future__ import annotations


class EvaluationError(ValueError):
    """Input that cannot be evaluated or a server that cannot be asked; the message says what to do."""
