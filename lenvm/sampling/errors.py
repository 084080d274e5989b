"""The one error of sampling that a person can act on."""

from __future__ import annotations


class SamplingError(ValueError):
    """Input that cannot be sampled, a file that cannot be continued, or a server that cannot be asked."""
