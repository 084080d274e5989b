"""Defaults of sampling, in one place for the command line, the settings and the pipeline's recipes.

Plain numbers, so that the command line can read them without importing anything.
"""

from __future__ import annotations

N = 8
TEMPERATURE = 1.0
TOP_P = 1.0
TOP_K = -1
MIN_P = 0.0
MAX_TOKENS = 300
SEED = 1
CONCURRENCY = 64
RETRIES = 5
TIMEOUT = 600.0
