"""What a person who runs a pipeline can act on."""

from __future__ import annotations


class PipelineError(RuntimeError):
    """A recipe that is wrong or a stage that failed; the message says what to do."""
