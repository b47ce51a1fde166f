"""What the program prints: notes while it runs, then one table, or JSON alone."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO


class Terminal:
    """Standard output for results, standard error for everything else.

    A reader that goes away (`| head`) does not stop the work: the output ends, the run goes on.

    Args:
        quiet: no notes and no progress bars.
        machine: standard output holds one JSON object and nothing else; notes go to standard error.
        silent: print nothing at all: of several processes one speaks.
    """

    def __init__(self, *, quiet: bool = False, machine: bool = False, silent: bool = False) -> None:
        self.quiet, self.machine, self.silent = quiet or silent, machine, silent

    @property
    def progress(self) -> bool:
        """Whether progress bars are wanted (on standard error)."""
        return not self.quiet

    def note(self, line: str) -> None:
        """A line about what is going on."""
        if not self.quiet:
            self._write(sys.stderr if self.machine else sys.stdout, line)

    def result(self, text: str) -> None:
        """Text that was asked for; left out where JSON is asked for."""
        if not self.machine:
            self._write(sys.stdout, text)

    def json(self, value: Any) -> None:
        """The JSON object, where it is asked for."""
        if self.machine:
            self._write(sys.stdout, json.dumps(finite(value), indent=1, allow_nan=False))

    def _write(self, stream: TextIO, text: str) -> None:
        if self.silent:
            return
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:
            # Also keeps the interpreter from complaining when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def finite(value: Any) -> Any:
    """JSON has no Infinity and no NaN (a PSNR of equal images): they become null."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first flush left, the others flush right."""
    width = len(head)
    cells = [list(head), *([*row, *[""] * (width - len(row))] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(width)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in cells
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def si(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 6080643 -> "6.08 M"."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g} {prefix}{unit}" if abs(value) < scale * 999.5 else f"{value / scale:.0f} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def change(before: float, after: float) -> str:
    """Relative change in percent: "-49.1 %"."""
    return f"{(after / before - 1) * 100:+.1f} %" if before else ""


def seconds(value: float) -> str:
    """Three digits: "12.3 ms", "4.57 s"."""
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"
