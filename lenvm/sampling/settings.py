"""What a sampling run is asked to do."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lenvm.sampling import defaults

Api = Literal["openai", "sglang"]


class Distribution(BaseModel):
    """How a completion is drawn: the same for everything a LenVM learns from, and for what it is judged on.

    Attributes:
        temperature, top_p, top_k, min_p: the base model's own sampling; top_k -1 and min_p 0 are off.
        max_tokens: a completion that reaches it is cut and gets finish_reason `length`.
        seed: of the run; each completion's own seed derives from it (`sample_seed`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    temperature: float = Field(default=defaults.TEMPERATURE, ge=0.0)
    top_p: float = Field(default=defaults.TOP_P, gt=0.0, le=1.0)
    top_k: int = Field(default=defaults.TOP_K, ge=-1)
    min_p: float = Field(default=defaults.MIN_P, ge=0.0, lt=1.0)
    max_tokens: int = Field(default=defaults.MAX_TOKENS, ge=1)
    seed: int = Field(default=defaults.SEED, ge=0)


class SamplingSettings(Distribution):
    """What a run is asked to do. Lengths are in tokens, stop token included.

    Attributes:
        n: completions a prompt.
        concurrency: completions in flight.
        retries: attempts after the first, on 429, 5xx and connection errors.
        timeout: seconds that one request may take.
    """

    n: int = Field(default=defaults.N, ge=1)
    concurrency: int = Field(default=defaults.CONCURRENCY, ge=1)
    retries: int = Field(default=defaults.RETRIES, ge=0)
    timeout: float = Field(default=defaults.TIMEOUT, gt=0.0)

    def distribution(self) -> dict[str, Any]:
        """What decides the distribution of a completion; recorded in each row under "sampling"."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "max_tokens": self.max_tokens,
        }
