"""What a sampling run is asked to do."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Api = Literal["openai", "sglang"]


class SamplingSettings(BaseModel):
    """How completions are drawn. Lengths are in tokens, stop token included.

    Attributes:
        n: completions a prompt.
        temperature, top_p, top_k, min_p: the base model's own sampling; top_k -1 and min_p 0 are off.
        max_tokens: a completion that reaches it is cut and gets finish_reason `length`.
        seed: of the run; each completion's own seed derives from it (`sample_seed`).
        concurrency: completions in flight.
        retries: attempts after the first, on 429, 5xx and connection errors.
        timeout: seconds that one request may take.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    n: int = Field(default=8, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=-1, ge=-1)
    min_p: float = Field(default=0.0, ge=0.0, lt=1.0)
    max_tokens: int = Field(default=300, ge=1)
    seed: int = Field(default=1, ge=0)
    concurrency: int = Field(default=64, ge=1)
    retries: int = Field(default=5, ge=0)
    timeout: float = Field(default=600.0, gt=0.0)

    def distribution(self) -> dict[str, Any]:
        """What decides the distribution of a completion; recorded in each row under "sampling"."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "max_tokens": self.max_tokens,
        }
