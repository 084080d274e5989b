"""Sizes of `lenvm eval control`, in one place for the command line, the plan and the pipeline's recipes.

Plain numbers, so that the command line can read them without importing anything.
"""

from __future__ import annotations

MODES = ("equal_to", "at_most", "at_least")
MAX_PROMPTS = 104
TARGETS = 3
BOUND_TARGETS = 2
MEDIAN_SAMPLES = 4
SHARE_SAMPLES = 4
CURVE_SAMPLES = 2
BIASES = (-16.0, -6.0, -2.0, 4.0)
BUDGETS = (0.4, 0.8, 1.1)
"""Shares of the base's mean length; the plan adds `plan.SHARE`, at which the trade-off is judged."""
