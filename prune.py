#!/usr/bin/env python3
"""Prune a diffusion UNet: `python prune.py --ratio 0.3 --pruner wanda-diff`, the same as `wanda-fast prune ...`."""

from __future__ import annotations

import sys

from wanda_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["prune", *sys.argv[1:]]))
