"""`python -m lenvm` is the same as `lenvm`."""

from __future__ import annotations

from lenvm.cli import main

if __name__ == "__main__":
    main()
