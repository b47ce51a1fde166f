"""What README.md and the guide promise: their snippets run, their commands parse, their tables are those of the program.

`python tests/test_readme.py` writes the guide's table of parameters anew; `python tests/test_readme.py OUTPUT FOLDER` puts what the first
command printed (a text file) and its pictures (the folder it wrote) in their places too.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from runs import one_thread as one_thread

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wanda_fast.cli import prune as command  # noqa: E402
from wanda_fast.cli.parser import Parser  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
TEXTS = {"README.md": README, "docs/guide.md": GUIDE}
OUTPUT, OUTPUT_END = "<!-- output:run -->\n", "<!-- output:end -->"
BEGIN, END = "<!-- table:parameters -->\n", "<!-- table:end -->"


def parser() -> Parser:
    made = Parser("wanda-fast prune", command.EXAMPLES)
    command.add_arguments(made)
    return made


def parameter_table() -> str:
    """Markdown of all options, from the parser itself."""
    lines = ["| flag | meaning and default | in Python |", "|---|---|---|"]
    for action in parser()._actions:
        flags = ", ".join(f"`{s}`" for s in action.option_strings)
        value = "" if action.nargs == 0 else " " + ("|".join(action.choices) if action.choices else str(action.metavar))
        meaning = str(action.help).replace("{pruners}", "a registered criterion").replace("%%", "%").replace("<", "&lt;")
        name = {"analyze": "`analyse`", "save_analysis": "", "push_to_hub": "`publish.push`",
                "config": "", "json": "", "quiet": "`progress`, `log`", "==SUPPRESS==": ""}  # fmt: skip
        python = name.get(action.dest, f"`{action.dest}`")
        lines.append(" | ".join(["", flags + value.replace("|", "\\|"), meaning.replace("|", "\\|"), python, ""]).strip())
    return "\n".join(lines) + "\n"


def blocks(text: str, language: str, after: str = "") -> list[str]:
    """Code blocks of a language; with `after`, those that follow this marker line."""
    return re.findall(rf"{re.escape(after)}\n?```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


RUNNABLE = [(name, code) for name, text in TEXTS.items() for code in blocks(text, "python", "<!-- run -->\n")]


@pytest.mark.parametrize("code", [c for _, c in RUNNABLE], ids=[f"{n}-{i}" for i, (n, _) in enumerate(RUNNABLE)])
def test_snippets_run(code, tmp_path, monkeypatch):
    from wanda_fast import importance

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importance, "CRITERIA", dict(importance.CRITERIA))
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    assert not list(tmp_path.iterdir())


def test_there_are_snippets_and_the_others_are_valid():
    assert len(RUNNABLE) >= 5
    for text in TEXTS.values():
        for code in blocks(text, "python"):
            ast.parse(code)


def test_every_command_of_the_program_parses():
    found = 0
    for text in TEXTS.values():
        for block in blocks(text, "bash"):
            for line in block.splitlines():
                match = re.search(r"(?:python prune\.py|wanda-fast prune|python -m wanda_fast prune) (.*?)(?:\s+#.*)?$", line)
                if match:
                    parser().parse_args(shlex.split(match[1]))
                    found += 1
    assert found >= 6


def test_guide_lists_every_parameter():
    assert GUIDE.split(BEGIN)[1].split(END)[0] == parameter_table(), "run: python tests/test_readme.py"


def test_commands_are_two_lines():
    for marker in ("run", "test"):
        (block,) = blocks(README, "bash", f"<!-- command:{marker} -->")
        assert block.count("\n") == 1 and "torch==" in block and "--no-build-isolation" in block
    (run,) = blocks(README, "bash", "<!-- command:run -->")
    assert run.rstrip().endswith("&& python prune.py --ratio 0.3 --pruner wanda-diff")


def test_ci_runs_the_command_of_the_readme():
    """The extraction in .ci/run finds the very line that a reader sees."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extraction = next(line for line in script.splitlines() if line.startswith("command=$("))
    done = subprocess.run(["bash", "-c", f'{extraction}\nprintf "%s\\n" "$command"'], cwd=ROOT, capture_output=True, text=True)
    assert [done.stdout] == blocks(README, "bash", "<!-- command:test -->"), done.stderr


def test_readme_shows_the_output_of_the_command():
    output = README.split(OUTPUT)[1].split(OUTPUT_END)[0]
    for words in ("model: ddpm-cifar10-small (bundled", "device: ", "parameters", "SSIM", "asked: ratio 0.3", "open it with"):
        assert words in output
    assert "/tmp" not in output and "/home" not in output


def test_links_lead_somewhere():
    for name, text in TEXTS.items():
        headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.is_file(), (name, target)
            if anchor and path:
                other = file.read_text(encoding="utf-8")
                headings_there = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
                                  for h in re.findall(r"^#+ (.*)$", other, re.MULTILINE)}  # fmt: skip
                assert anchor in headings_there, (name, target)
            elif anchor:
                assert anchor in headings, (name, target)


def test_pictures_are_small():
    for which in ("before", "after"):
        file = ROOT / "docs" / f"{which}_pruning.png"
        assert file.stat().st_size < 300_000
        assert min(Image.open(file).size) >= 200


def main(arguments: list[str]) -> None:
    head, rest = GUIDE.split(BEGIN)
    (ROOT / "docs" / "guide.md").write_text(head + BEGIN + parameter_table() + END + rest.split(END)[1], encoding="utf-8")
    if arguments:
        printed, folder = Path(arguments[0]), Path(arguments[1])
        head, rest = README.split(OUTPUT)
        text = f"{head}{OUTPUT}```text\n{printed.read_text(encoding='utf-8').strip()}\n```\n{OUTPUT_END}{rest.split(OUTPUT_END)[1]}"
        (ROOT / "README.md").write_text(text, encoding="utf-8")
        for which in ("before", "after"):
            shutil.copyfile(folder / "vis" / f"{which}_pruning.png", ROOT / "docs" / f"{which}_pruning.png")


if __name__ == "__main__":
    main(sys.argv[1:])
