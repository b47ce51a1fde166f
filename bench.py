"""Run the benchmarks: `python bench.py --quick` (under a minute on two CPU cores), `python bench.py --full --out results.json` on a GPU."""

from __future__ import annotations

import sys

from benchmarks.main import main

if __name__ == "__main__":
    sys.exit(main())
