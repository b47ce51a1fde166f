"""The argument parser: either spelling of a flag, one-line errors, help that opens with commands that run."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from wanda_fast.errors import UserError


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
        self.add_argument_group("all options from a file").add_argument("--config", metavar="FILE.yaml",
            help="options by the names of these flags; those on the command line come first (a run writes such a file "
            "into its folder: config.yaml)")  # fmt: skip

    def format_help(self) -> str:
        groups = self._action_groups
        place = next(i for i, group in enumerate(groups) if any(a.dest == "config" for a in group._group_actions))
        groups.append(groups.pop(place))  # made first, shown last
        return super().format_help()

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words = [*map(self._spelling, words[:end]), *words[end:]]
        if any(word == "--config" or word.startswith("--config=") for word in words[:end]):
            namespace = self._with_file(words, namespace or argparse.Namespace())
        else:
            namespace = super().parse_args(words, namespace)
        for action in self._actions:  # as from a shell variable that is not set; a path would mean the current folder
            values = getattr(namespace, action.dest, None)
            if "" in (values if isinstance(values, list) else [values]):
                self.error(f"argument {'/'.join(action.option_strings) or action.metavar}: is empty")
        del namespace.config  # has done its work; commands hand the rest to functions
        return namespace

    def _with_file(self, words: list[str], namespace: argparse.Namespace) -> argparse.Namespace:
        """What the command line gives, then the file, then the defaults."""
        from wanda_fast.cli import config

        missing = object()
        actions = [a for a in self._actions if argparse.SUPPRESS not in (a.dest, a.default)]
        required = [a for a in actions if a.required and a.nargs != "*"]  # argparse requires these too, and takes none for an answer
        for action in actions:
            setattr(namespace, action.dest, missing)
        groups = [g for g in self._mutually_exclusive_groups if g.required]
        demanding: list[Any] = [*required, *groups]
        for thing in demanding:
            thing.required = False  # the file may hold it
        try:
            super().parse_args(words, namespace)
        finally:
            for thing in demanding:
                thing.required = True
        # A positional argument for any number of values, given none, holds an empty list.
        given = {a.dest for a in actions if (v := getattr(namespace, a.dest)) is not missing and (v != [] or a.option_strings)}
        try:
            values = config.read(self, namespace.config)
        except UserError as error:
            self.error(str(error))
        barred = config.conflicting(self, given)
        for action in actions:
            if action.dest in given:
                continue
            value = action.default
            if action.dest in values and action.dest not in barred:
                value = values[action.dest]
            elif isinstance(value, str):
                value = self._get_value(action, value)
            setattr(namespace, action.dest, value)
        namespace.config = None
        for action in required:
            if getattr(namespace, action.dest) in (None, []):
                name = "/".join(action.option_strings) or action.metavar or action.dest
                self.error(f"the following arguments are required: {name}")
        for group in groups:
            if all(getattr(namespace, a.dest) in (None, False) for a in group._group_actions):
                names = " ".join("/".join(a.option_strings) for a in group._group_actions)
                self.error(f"one of the arguments {names} is required")
        return namespace

    def _spelling(self, word: str) -> str:
        if not word.startswith("--"):
            return word
        flag, equals, value = word.partition("=")
        known = "--" + flag[2:].replace("-", "_")
        return known + equals + value if known in self._option_string_actions else word

    def error(self, message: str) -> NoReturn:
        text = re.sub(r"^argument (--\w+)(/--?\w+)*:", r"\1:", one_line(message))
        sys.stderr.write(f"{self.prog.split()[0]}: error: {text} (see {self.prog} --help)\n")
        raise SystemExit(2)


def model_name(model: str | None) -> str:
    """What the results of a model are named after: its folder (not `unet` inside it) or the last part of its hub id."""
    if model is None or (model == "bundled" and not Path(model).exists()):
        return "ddpm-cifar10-small"
    path = Path(model).expanduser().resolve()
    return (path.parent.name if path.name == "unet" else path.name) or "model"


def share(text: str) -> float:
    """A share 0 <= r < 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"the ratio is the share of channels removed, 0 <= ratio < 1; got {text}")
    return value


def add_batch_size(group: Any, remark: str = "", more: str = "") -> None:
    """--batch_size, of which the library chooses the default."""
    group.add_argument("--batch_size", type=whole(1), default=None, metavar="N",
        help=f"images per pass{remark} (default: 32; on a GPU 32 to 256, by their size{more})")  # fmt: skip


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
