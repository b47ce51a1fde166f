"""`--config FILE.yaml`: options of a subcommand from a file, under the names of its flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_fast.errors import UserError

if TYPE_CHECKING:
    from wanda_fast.cli.parser import Parser

LARGEST = 1 << 20  # bytes; such a file has a few dozen lines
_KINDS = {bool: "a yes/no value", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping"}


def read(parser: Parser, file: str | Path) -> dict[str, Any]:
    """Options by their `dest`, checked and converted as the parser would convert the words of a command line.

    Raises:
        UserError: the file cannot be read, is no mapping, repeats a key, names an unknown option or another command,
            or gives a value of the wrong type. The line names the file and the key.
    """
    values: dict[str, Any] = {}
    asked = parser.prog.split()[-1]
    for key, value in _mapping(Path(file).expanduser()).items():
        where = f"{file}: {_short(key)}"
        if key == "command":
            if value != asked:
                raise UserError(f"{file}: is for the command {_short(value)}, not {asked}")
            continue
        action = _action(parser, key)
        if action is None:
            raise UserError(f"{where}: no such option of {parser.prog}")
        if action.dest in values:
            raise UserError(f"{where}: given twice, under two names")
        if value is not None:  # a key without a value: the default
            values[action.dest] = _convert(parser, action, value, where)
    for group in parser._mutually_exclusive_groups:
        both = [a.dest for a in group._group_actions if values.get(a.dest) not in (None, False)]
        if len(both) > 1:
            raise UserError(f"{file}: {both[0]} and {both[1]} cannot be given together")
    return values


def _action(parser: Parser, key: object) -> argparse.Action | None:
    if not isinstance(key, str) or key.replace("-", "_") in ("config", "help"):
        return None
    name = key.replace("-", "_")
    found = parser._option_string_actions.get(f"--{name}")
    return found or next((a for a in parser._actions if a.dest == name), None)


def _convert(parser: Parser, action: argparse.Action, value: Any, where: str) -> Any:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where}: must be true or false, not {_short(value)}")
        constant = action.const is not None and not isinstance(action.const, bool)
        return (action.const if value else action.default) if constant else value
    if action.nargs in ("+", "*") or (isinstance(action.nargs, int) and action.nargs > 0):
        values = value if isinstance(value, list) else [value]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            raise UserError(f"{where}: takes {action.nargs} values, not {len(values)}")
        return [_one(parser, action, v, where) for v in values]
    return _one(parser, action, value, where)


def _one(parser: Parser, action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        kind = _KINDS.get(type(value), f"a {type(value).__name__}")
        raise UserError(f"{where}: takes text or a number, not {kind} ({_short(value)})")
    try:
        result = parser._get_value(action, str(value))
        parser._check_value(action, result)
    except argparse.ArgumentError as error:
        raise UserError(f"{where}: {error.message}") from None
    # YAML reads 1e-4 as text, so text may stand for a number with a fraction, but not for a whole number.
    if isinstance(value, str) and isinstance(result, int) and not isinstance(result, bool):
        raise UserError(f"{where}: must be a number, not text ({_short(value)})")
    return result


def _mapping(file: Path) -> dict[Any, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """yaml.safe_load, with repeated keys as an error: it would take the last one without a word."""

    def construct(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise UserError(f"{file}: merge keys (<<) are not supported")
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise UserError(f"{file}: {_short(key.value)} is given twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", construct)
    try:
        if not file.is_file():
            raise UserError(f"{file}: there is no such configuration file")
        if file.stat().st_size > LARGEST:
            raise UserError(f"{file}: is no configuration, it is larger than {LARGEST >> 20} MiB")
        value = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or ("nested too deeply" if isinstance(error, RecursionError) else str(error))
        raise UserError(f"{file}: is not YAML{line} ({_short(problem)})") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        kind = _KINDS.get(type(value), f"a {type(value).__name__}")
        raise UserError(f"{file}: must be a mapping of options to values, not {kind}")
    return value


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def conflicting(parser: Parser, given: Iterable[str]) -> set[str]:
    """Options that are out of the question once those in `given` stand on the command line."""
    given = set(given)
    out: set[str] = set()
    for group in parser._mutually_exclusive_groups:
        dests = {a.dest for a in group._group_actions}
        if dests & given:
            out |= dests - given
    return out
