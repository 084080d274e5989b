"""Tasks for EleutherAI's lm-evaluation-harness, which asks a server with a LenVM at several lengths.

`FOLDER` goes to its `--include_path`; `lenvm harness` prints it. The harness reads the YAML files there and calls
`tasks.py`, both of this folder.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
