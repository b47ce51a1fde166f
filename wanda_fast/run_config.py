"""config.yaml: the file with which a run can be repeated, written into every folder that a run makes.

It holds the command and its options under the names of the flags. Where the result goes (`save_path`, `overwrite`) and
how it is shown (`quiet`, `json`) are no part of it, so `wanda-fast COMMAND --config OLD/config.yaml --save_path NEW`
repeats the run elsewhere. Paths stand in it as they were given, and nothing else tells of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "config.yaml"
# Where the result goes and how it is shown; a file that a person writes may hold these too.
LEFT_OUT = ("save_path", "overwrite", "resume", "dry_run", "quiet", "json", "config", "help")


def text(command: str, options: Mapping[str, Any], note: str = "") -> str:
    """YAML of a run: its command, then the options that were set, in their order.

    Args:
        command: subcommand of `wanda-fast`.
        options: values by the name of the flag; None and the names of `LEFT_OUT` are left out.
        note: a sentence for the reader, such as what cannot be repeated from a file.
    """
    import yaml

    values = {k: _plain(v) for k, v in options.items() if v is not None and k not in LEFT_OUT}
    head = f"# wanda-fast {command} --config {NAME} --save_path FOLDER\n" + (f"# {note}\n" if note else "")
    return head + yaml.safe_dump({"command": command, **values}, sort_keys=False, allow_unicode=True, width=1000)


def write(folder: str | os.PathLike[str], command: str, options: Mapping[str, Any], note: str = "") -> None:
    """Write `config.yaml` into a folder; inside `checkpoint.atomic_folder` it appears with the rest."""
    (Path(folder) / NAME).write_text(text(command, options, note), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
