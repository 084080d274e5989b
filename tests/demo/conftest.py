"""The examples are folders of scripts, not packages: put them on the path."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES / "demo"), str(EXAMPLES / "rl")]
