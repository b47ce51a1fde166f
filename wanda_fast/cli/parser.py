"""The argument parser: either spelling of a flag, one-line errors, help that opens with commands that run."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


def one_line(text: object) -> str:
    """Text on a single line, whatever it holds."""
    return " ".join(str(text).split())


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34, width=110, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--save_path, --out DIR`: the value once, not after every spelling."""
        names = ", ".join(action.option_strings)
        if not action.option_strings or action.nargs == 0:
            return names or super()._format_action_invocation(action)
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; `--dry-run` and `--dry_run` are the same flag.

    Args:
        prog: what errors refer to.
        examples: text that opens the help.
    """

    def __init__(self, prog: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=examples,
            usage=argparse.SUPPRESS,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_args([*map(self._spelling, words[:end]), *words[end:]], namespace)

    def _spelling(self, word: str) -> str:
        if not word.startswith("--"):
            return word
        flag, equals, value = word.partition("=")
        known = "--" + flag[2:].replace("-", "_")
        return known + equals + value if known in self._option_string_actions else word

    def error(self, message: str) -> NoReturn:
        text = re.sub(r"^argument (--\w+)(/--\w+)*:", r"\1:", one_line(message))
        sys.stderr.write(f"{self.prog.split()[0]}: error: {text} (see {self.prog} --help)\n")
        raise SystemExit(2)


def share(text: str) -> float:
    """A share 0 <= r < 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"the ratio is the share of channels removed, 0 <= ratio < 1; got {text}")
    return value


def whole(least: int) -> Callable[[str], int]:
    """Type of whole numbers of at least `least`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}; got {text}")
        return value

    return convert
