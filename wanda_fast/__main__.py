"""`python -m wanda_fast prune ...` is `wanda-fast prune ...`."""

from __future__ import annotations

import sys

from wanda_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
